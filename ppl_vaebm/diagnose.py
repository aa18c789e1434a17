"""Diagnose chains on a fitted VAEBM: ``python -m ppl_vaebm.diagnose RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ppl_vaebm.config.kernel import kernel_names
from ppl_vaebm.config.options import ChainOptions, Count, require
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.inference.diagnostics.coordinates import Coordinates
    from ppl_vaebm.inference.diagnostics.functionals import PositionRecorder
    from ppl_vaebm.runs.loading import LoadedRun

DESCRIPTION = """Run Markov chains on a fitted VAEBM, warm-up then draws, and report how well they mix: R-hat, effective
sample sizes, Monte Carlo errors, BFMI, divergences. Writes chains.nc (ArviZ's InferenceData) and the report."""


@dataclass(frozen=True)
class Options(ChainOptions):
    """Options of diagnose."""

    kernel: str | None = None
    """Kernel, any that compare has; the default is sampling.kernel of the run."""
    chains_per_start: Count = 1
    """Neighbouring chains that share a start, for many short chains; must divide num-chains. The nested R-hat then
    compares the starts, and needs no long chains."""
    all_coordinates: bool = False
    """Diagnose every coordinate of the noise too, and store whole positions in positions.nc, in float32."""
    position_mib: Count = 512
    """With all-coordinates: memory for the positions, and size of positions.nc, in MiB. When the draws need more, only
    every second, fourth, ... position is stored."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        if self.kernel is not None:
            kernel_names(self.kernel)
        expected = f"a multiple of chains-per-start ({self.chains_per_start})"
        require(self.num_chains % self.chains_per_start == 0, "num-chains", expected, self.num_chains)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "diagnose", DESCRIPTION)

    from ppl_vaebm.runs.run import Run  # here, because NumPy would double the time of --help

    Run.open(options.run)

    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.evaluation.kernels import Budget, run_kernel, starts
    from ppl_vaebm.inference.diagnostics import functionals
    from ppl_vaebm.inference.diagnostics import summary as diagnostics
    from ppl_vaebm.inference.diagnostics.arviz_io import save_netcdf, to_inference_data
    from ppl_vaebm.reports.report import write_report
    from ppl_vaebm.runs.loading import load_run

    loaded = load_run(options.run)
    set_threads(loaded.config.threads)
    potential, config = loaded.potential, loaded.config.sampling.kernel
    start = starts(potential, options.num_chains, options.seed, options.chains_per_start)
    budget = Budget(options.num_chains, options.num_warmup, options.num_evals)
    stored = functionals.noise_functionals(potential, loaded.data.modes)
    recorder = None
    if options.all_coordinates:
        dim, max_bytes = potential.packing.dim, options.position_mib * 2**20
        stored = recorder = functionals.record_positions(stored, options.num_chains, dim, max_bytes)
    chains = run_kernel(options.kernel or config.name, potential, config, start, budget, options.seed, stored)
    attrs = {**chains.attrs, "chains_per_start": options.chains_per_start, "fingerprint": loaded.fingerprint}
    inference_data = to_inference_data(replace(chains, attrs=attrs))
    summaries = diagnostics.summarize(inference_data)  # before anything is written, because it refuses too few draws
    coordinates = None if recorder is None else _coordinates(loaded, recorder)
    save_netcdf(inference_data, loaded.run.chains_file)
    # Old positions would be taken for those of the new chains.
    loaded.run.positions_file.unlink(missing_ok=True)
    print(diagnostics.summary_table(summaries, inference_data))
    print(f"\n{loaded.run.chains_file}")
    if recorder is not None and coordinates is not None:
        from ppl_vaebm.inference.diagnostics.coordinates import save_coordinates

        save_coordinates(loaded.run.positions_file, recorder.positions, coordinates)
        print("\n".join([*coordinates.lines, str(loaded.run.positions_file)]))
    print(f"report: {write_report(loaded.run)}")


def _coordinates(loaded: LoadedRun, recorder: PositionRecorder) -> Coordinates:
    """Diagnose every coordinate by the stored positions."""
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
