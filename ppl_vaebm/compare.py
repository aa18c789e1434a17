"""Compare kernels on a fitted VAEBM: ``python -m ppl_vaebm.compare RUN --kernels langevin,hmc,mixture``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ppl_vaebm.config.kernel import kernel_names, missing_packages
from ppl_vaebm.config.options import NOT_NEGATIVE, ChainOptions, Count
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.evaluation.kernel_files import Outcome
    from ppl_vaebm.evaluation.kernels import Budget
    from ppl_vaebm.runs.loading import LoadedRun

DESCRIPTION = """Run several Markov kernels on a fitted VAEBM, each from the same starts, and print one table: which of
them mixes best for the same number of energy evaluations, and which for the same time. Each kernel runs until it has
used both budgets, with several seeds; when a kernel fails, the table has its message and the others continue. Writes
compare.csv (the table), compare/compare.html (pictures), compare/KERNEL-seedN.nc (chains for ArviZ) and the report."""

DEFAULT_KERNELS = (
    *("langevin", "mala", "hmc", "hmc-leapfrog", "pcn", "elliptical", "mixture", "chees", "tempered"),
    *("pyro-nuts", "numpyro-nuts", "blackjax-nuts", "blackjax-mclmc"),
)


@dataclass(frozen=True)
class Options(ChainOptions):
    """Options of compare."""

    kernels: str | None = None
    """Kernels, separated by commas; a wrong name is answered with all known ones. The default is most of them. Those of
    NumPyro and BlackJAX need pip install -e '.[jax]'; without it the default leaves them out."""
    num_chains: Count = 8
    """Chains of each kernel and seed, started from N(0, I); Pyro's run one after another. R-hat needs 4 or more."""
    num_warmup: Count = 100
    """Warm-up steps, which tune the step size; counted and timed apart."""
    num_evals: Count = 2_000
    """First budget: energy evaluations per chain after warm-up, most with the gradient."""
    num_seconds: Annotated[float, NOT_NEGATIVE] = 3.0
    """Second budget: seconds of all chains after warm-up. A kernel continues until it has used both; with 0 only the
    evaluations count."""
    num_seeds: Count = 3
    """Runs of each kernel, with seed, seed + 1, ...; the table has their mean and spread."""
    keep: bool = False
    """Keep the kernels of an earlier compare with the same options in the table; those in kernels run anew."""


def default_kernels() -> str:
    """Return the default kernels that are installed, and report the others."""
    absent = [name for name in DEFAULT_KERNELS if missing_packages(name)]
    if absent:
        print(f"left out, because they need pip install -e '.[jax]': {', '.join(absent)}", file=sys.stderr)
    return ",".join(name for name in DEFAULT_KERNELS if name not in absent)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "compare", DESCRIPTION)

    from ppl_vaebm.runs.run import Run  # here, because NumPy would double the time of --help

    names = kernel_names(options.kernels or default_kernels())
    Run.open(options.run)

    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.evaluation import kernel_files, kernel_table, kernels
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.reports import comparison_page
    from ppl_vaebm.reports.report import write_report
    from ppl_vaebm.runs.loading import load_run

    loaded = load_run(options.run)
    set_threads(loaded.config.threads)
    run, seeds = loaded.run, range(options.seed, options.seed + options.num_seeds)
    budget = kernels.Budget(options.num_chains, options.num_warmup, options.num_evals, options.num_seconds)
    outcomes: dict[str, list[Outcome]] = {}
    if options.keep:
        outcomes = kernel_files.kept_outcomes(run, names, seeds, budget, loaded.fingerprint)
        print(f"kept: {', '.join(outcomes)}", file=sys.stderr)
    reference = kernels.reference(loaded.potential, loaded.data, options.seed)
    rows = [kernel_table.kernel_row(name, kept, budget, reference) for name, kept in outcomes.items()]
    for index, name in enumerate(names):
        outcomes[name] = [_run(loaded, name, seed, budget, f"[{index + 1}/{len(names)}]") for seed in seeds]
        rows.append(kernel_table.kernel_row(name, outcomes[name], budget, reference))
        write_atomic(run.comparison_file, kernel_table.to_csv(rows))  # an interrupted run keeps what is done
    everything = [outcome for part in outcomes.values() for outcome in part]
    kernel_files.remove_others(run, everything)
    print(kernel_table.to_text(rows, budget, reference))
    print(f"\n{kernel_table.reference_text(reference)}")
    page = comparison_page.write_comparison(run, rows, outcomes, budget, reference)
    print(f"{run.comparison_file}\npictures: {page}\nreport: {write_report(run)}")


def _run(loaded: LoadedRun, name: str, seed: int, budget: Budget, progress: str) -> Outcome:
    """Run one kernel with one seed, write its chains and report it; a failure is an outcome too."""
    from ppl_vaebm.evaluation.kernel_files import run_and_save

    start = time.perf_counter()
    outcome = run_and_save(loaded, name, seed, budget)
    result = "failed: " + outcome.error if outcome.error else "done"
    print(f"{progress} {name}, seed {seed}: {time.perf_counter() - start:.1f} s, {result}", file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    main()
