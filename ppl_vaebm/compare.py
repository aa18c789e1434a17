"""Compare kernels on a fitted VAEBM: ``python -m ppl_vaebm.compare RUN --kernels langevin,hmc,mixture``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppl_vaebm import cli
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.options import parse

DESCRIPTION = """Run several kernels from the same starts on a fitted VAEBM, with the same number of evaluations of the
potential for each, and print one table. Writes compare.csv and the report."""


@dataclass(frozen=True)
class Options(cli.ChainOptions):
    """Options of compare."""

    kernels: str = "langevin,mala,hmc,pcn,elliptical,mixture,pyro-hmc,pyro-nuts"
    """Kernels, separated by commas."""
    num_chains: int = 8
    """Chains of each kernel; Pyro's run one after another."""
    num_evals: int = 1_000
    """Evaluations of the potential per chain for the draws."""


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "compare", DESCRIPTION)

    from ppl_vaebm import comparison
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.loading import load_run
    from ppl_vaebm.report import write_report
    from ppl_vaebm.rng import stream

    names = [name.strip() for name in options.kernels.split(",") if name.strip()]
    comparison.check_names(names)
    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    budget = comparison.Budget(options.num_chains, options.num_warmup, options.num_evals)
    device = loaded.config.device
    start = loaded.potential.draw_reference(stream(options.seed, "start", device=device), options.num_chains)
    reference, error = comparison.exact_energy(loaded.potential, options.seed)
    rows = []
    for name in names:
        chains = comparison.run_kernel(
            name, loaded.potential, loaded.config.sampling.kernel, start, budget, options.seed
        )
        rows.append(comparison.summary_row(chains, reference))
        print(f"{name}: {rows[-1].seconds:.1f} s", file=sys.stderr)
    print(comparison.to_text(rows))
    print(f"mean energy of exact draws: {reference:.4g} +- {error:.2g}")
    write_atomic(loaded.run.comparison_file, comparison.to_csv(rows))
    print(f"{loaded.run.comparison_file}\nreport: {write_report(loaded.run)}")


if __name__ == "__main__":
    main()
