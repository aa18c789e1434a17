"""Diagnose chains on a fitted VAEBM: ``python -m ppl_vaebm.diagnose RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppl_vaebm import cli
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.options import parse

DESCRIPTION = """Run real chains on a fitted VAEBM, warm-up then draws, and say how well they mixed: R-hat, effective
sample sizes, Monte Carlo errors, BFMI, divergences. Writes chains.nc (ArviZ's InferenceData) and the report."""


@dataclass(frozen=True)
class Options(cli.ChainOptions):
    """Options of diagnose."""

    kernel: str | None = None
    """Kernel, pyro-hmc and pyro-nuts included; the run's sampling kernel if not given."""


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "diagnose", DESCRIPTION)

    from ppl_vaebm import comparison
    from ppl_vaebm.inference import diagnostics
    from ppl_vaebm.loading import load_run
    from ppl_vaebm.report import write_report
    from ppl_vaebm.rng import stream

    if options.kernel is not None:
        comparison.check_names([options.kernel])
    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    config = loaded.config.sampling.kernel
    device = loaded.config.device
    start = loaded.potential.draw_reference(stream(options.seed, "start", device=device), options.num_chains)
    budget = comparison.Budget(options.num_chains, options.num_warmup, options.num_evals)
    chains = comparison.run_kernel(options.kernel or config.name, loaded.potential, config, start, budget, options.seed)
    inference_data = diagnostics.to_inference_data(chains)
    summaries = diagnostics.summarize(inference_data)  # before anything is written, for it refuses too few draws
    diagnostics.save_netcdf(inference_data, loaded.run.chains_file)
    print(diagnostics.text_table(summaries, inference_data))
    print(f"\n{loaded.run.chains_file}\nreport: {write_report(loaded.run)}")


if __name__ == "__main__":
    main()
