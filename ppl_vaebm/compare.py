"""Compare kernels on a fitted VAEBM: ``python -m ppl_vaebm.compare RUN --kernels langevin,hmc,mixture``."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppl_vaebm.config import commands as cli
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.evaluation.kernel_files import Outcome
    from ppl_vaebm.evaluation.kernels import Budget
    from ppl_vaebm.runs.loading import LoadedRun

DESCRIPTION = """Run several Markov kernels on a fitted VAEBM, each from the same starts, and print one table: which of
them draws best for the same number of evaluations of the energy, and which for the same time. Every kernel runs until
it has spent both, with several seeds; a kernel that fails says why and the others go on. Writes compare.csv (the
table), compare/compare.html (pictures), compare/KERNEL-seedN.nc (the chains, for ArviZ) and the report."""

DEFAULT_KERNELS = (
    "langevin,mala,hmc,hmc-leapfrog,pcn,elliptical,mixture,chees,tempered,"
    "pyro-nuts,numpyro-nuts,blackjax-nuts,blackjax-mclmc"
)


@dataclass(frozen=True)
class Options(cli.ChainOptions):
    """Options of compare."""

    kernels: str = DEFAULT_KERNELS
    """Kernels, separated by commas; an unknown name is answered with all known ones.
    Those of NumPyro and BlackJAX need pip install 'ppl_vaebm[jax]', without which the default leaves them out."""
    num_chains: int = 8
    """Chains of each kernel and seed, from fresh noise; Pyro's run one after another. R-hat needs 4 or more."""
    num_warmup: int = 100
    """Steps of warm-up, in which the step size is tuned; counted and timed apart."""
    num_evals: int = 2_000
    """Evaluations of the energy, most with its gradient, per chain for the draws: the first of two equal budgets."""
    num_seconds: float = 3.0
    """Seconds of the draws over all chains, warm-up not counted: the second budget.
    A kernel that has spent its evaluations goes on until it has spent this too; 0 for evaluations alone."""
    num_seeds: int = 3
    """Times that every kernel runs, with seed, seed + 1, ...; the table has mean and spread over them."""
    keep: bool = False
    """Take the kernels of an earlier compare of this run, with the same options, into the table too.
    Those in --kernels run anew."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        cli.positive("num-seeds", self.num_seeds)
        if not 0 <= self.num_seconds < math.inf:
            raise ValueError(f"num-seconds must be 0 or more and finite, got {self.num_seconds}")


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "compare", DESCRIPTION)

    from ppl_vaebm.evaluation import kernel_files as comparison_files
    from ppl_vaebm.evaluation import kernel_table as comparison_table
    from ppl_vaebm.evaluation import kernel_text as comparison_text
    from ppl_vaebm.evaluation import kernels as comparison
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.reports import comparison_page
    from ppl_vaebm.reports.html import write_report
    from ppl_vaebm.runs.loading import load_run

    names = _names(options.kernels)
    comparison.check_names(names)
    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    run, seeds = loaded.run, range(options.seed, options.seed + options.num_seeds)
    budget = comparison.Budget(options.num_chains, options.num_warmup, options.num_evals, options.num_seconds)
    outcomes: dict[str, list[Outcome]] = {}
    if options.keep:
        outcomes = comparison_files.kept_outcomes(run, names, seeds, budget, loaded.fingerprint)
        print(f"kept: {', '.join(outcomes)}", file=sys.stderr)
    reference = comparison.reference(loaded.potential, loaded.data, options.seed)
    rows = [comparison_table.kernel_row(name, kept, budget, reference) for name, kept in outcomes.items()]
    for index, name in enumerate(names):
        outcomes[name] = [_run(loaded, name, seed, budget, f"[{index + 1}/{len(names)}]") for seed in seeds]
        rows.append(comparison_table.kernel_row(name, outcomes[name], budget, reference))
        write_atomic(run.comparison_file, comparison_text.to_csv(rows))  # an interrupted run keeps what is done
    everything = [outcome for part in outcomes.values() for outcome in part]
    comparison_files.remove_others(run, everything)
    print(comparison_text.to_text(rows, budget, reference))
    print(f"\n{comparison_text.reference_text(reference)}")
    page = comparison_page.write_comparison(run, rows, outcomes, budget, reference)
    print(f"{run.comparison_file}\npictures: {page}\nreport: {write_report(run)}")


def _names(kernels: str) -> list[str]:
    """Split the option, and leave out of the default what cannot run here."""
    from ppl_vaebm.evaluation.kernels import missing_packages

    names = [name.strip() for name in kernels.split(",") if name.strip()]
    left_out = [name for name in names if kernels == DEFAULT_KERNELS and missing_packages(name)]
    if left_out:
        print(f"left out, without pip install 'ppl_vaebm[jax]': {', '.join(left_out)}", file=sys.stderr)
    return [name for name in names if name not in left_out]


def _run(loaded: LoadedRun, name: str, seed: int, budget: Budget, progress: str) -> Outcome:
    """Run one kernel with one seed, write its chains, and say so; what goes wrong is the outcome."""
    from ppl_vaebm.evaluation import kernel_files as comparison_files

    start = time.perf_counter()
    outcome = comparison_files.run_and_save(loaded, name, seed, budget)
    result = "failed: " + outcome.error if outcome.error else "done"
    print(f"{progress} {name}, seed {seed}: {time.perf_counter() - start:.1f} s, {result}", file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    main()
