"""Diagnose chains on a fitted VAEBM: ``python -m ppl_vaebm.diagnose RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ppl_vaebm.config import commands as cli
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.inference.diagnostics.coordinates import Coordinates
    from ppl_vaebm.inference.diagnostics.functionals import PositionRecorder
    from ppl_vaebm.runs.loading import LoadedRun

DESCRIPTION = """Run real chains on a fitted VAEBM, warm-up then draws, and say how well they mixed: R-hat, effective
sample sizes, Monte Carlo errors, BFMI, divergences. Writes chains.nc (ArviZ's InferenceData) and the report."""


@dataclass(frozen=True)
class Options(cli.ChainOptions):
    """Options of diagnose."""

    kernel: str | None = None
    """Kernel, any that compare knows; the run's sampling kernel if not given."""
    chains_per_start: int = 1
    """Neighbouring chains that begin at one place, for many short chains; a divisor of num-chains.
    The nested R-hat then compares the places, and needs no long chains."""
    all_coordinates: bool = False
    """Judge every coordinate of the noise by itself too, and keep whole positions in positions.nc, in float32."""
    position_mib: int = 512
    """all-coordinates: memory, and size of positions.nc, in MiB.
    When the draws need more, every second, fourth, ... of them is kept."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        cli.positive("chains-per-start", self.chains_per_start)
        cli.positive("position-mib", self.position_mib)
        if self.num_chains % self.chains_per_start:
            raise ValueError(
                f"num-chains must be a multiple of chains-per-start, got {self.num_chains} and {self.chains_per_start}"
            )


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "diagnose", DESCRIPTION)

    from ppl_vaebm.evaluation import kernels as comparison
    from ppl_vaebm.inference.diagnostics import functionals
    from ppl_vaebm.inference.diagnostics import summary as diagnostics
    from ppl_vaebm.inference.diagnostics.arviz_io import save_netcdf, to_inference_data
    from ppl_vaebm.reports.html import write_report
    from ppl_vaebm.runs.loading import load_run

    if options.kernel is not None:
        comparison.check_names([options.kernel])
    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    potential, config = loaded.potential, loaded.config.sampling.kernel
    start = comparison.starts(potential, options.num_chains, options.seed, options.chains_per_start)
    budget = comparison.Budget(options.num_chains, options.num_warmup, options.num_evals)
    stored = functionals.noise_functionals(potential, loaded.data.modes)
    recorder = None
    if options.all_coordinates:
        dim, max_bytes = potential.packing.dim, options.position_mib * 2**20
        stored = recorder = functionals.record_positions(stored, options.num_chains, dim, max_bytes)
    chains = comparison.run_kernel(
        options.kernel or config.name, potential, config, start, budget, options.seed, stored
    )
    attrs = {**chains.attrs, "chains_per_start": options.chains_per_start, "fingerprint": loaded.fingerprint}
    inference_data = to_inference_data(replace(chains, attrs=attrs))
    summaries = diagnostics.summarize(inference_data)  # before anything is written, for it refuses too few draws
    coordinates = None if recorder is None else _coordinates(loaded, recorder)
    save_netcdf(inference_data, loaded.run.chains_file)
    # Positions of other chains than those would not be told apart.
    loaded.run.positions_file.unlink(missing_ok=True)
    print(diagnostics.summary_table(summaries, inference_data))
    print(f"\n{loaded.run.chains_file}")
    if recorder is not None and coordinates is not None:
        from ppl_vaebm.inference.diagnostics.coordinates import save_coordinates

        save_coordinates(loaded.run.positions_file, recorder.positions, coordinates)
        print("\n".join([*coordinates.lines, str(loaded.run.positions_file)]))
    print(f"report: {write_report(loaded.run)}")


def _coordinates(loaded: LoadedRun, recorder: PositionRecorder) -> Coordinates:
    """Judge every coordinate by the positions that were kept."""
    from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, diagnose_columns
    from ppl_vaebm.inference.diagnostics.coordinates import Coordinates, coordinate_names

    num_chains, num_draws, _ = recorder.positions.shape
    if num_draws < MIN_DRAWS:
        raise InputError(f"expected at least {MIN_DRAWS} positions per chain, found {num_draws}: draw longer chains")
    found = diagnose_columns(recorder.positions)
    names = coordinate_names(loaded.potential.packing)
    return Coordinates(found, names, num_chains, num_draws, recorder.stride)


if __name__ == "__main__":
    main()
