"""Files of a comparison's chains, one for each kernel and seed."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.kernels import Budget, run_kernel, starts
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, load_netcdf, save_netcdf, to_inference_data
from ppl_vaebm.inference.diagnostics.functionals import PositionRecorder, noise_functionals
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run

NUM_PICTURED = 3  # chains of which images are kept
MAX_PICTURES = 16  # images of each; when there are more, every other one goes

_NAME = re.compile(r"(?P<kernel>.+)-seed(?P<seed>\d+)\.nc")


class Outcome(NamedTuple):
    """Result of one kernel with one seed: chains, or the error."""

    kernel: str
    seed: int
    idata: InferenceData | None
    """The chains; their attributes include budget and fingerprint."""
    error: str = ""
    """Empty if there are chains."""


def chains_path(run: Run, kernel: str, seed: int) -> Path:
    """Return the file of the chains of one kernel and seed."""
    return run.comparison_dir / f"{kernel}-seed{seed}.nc"


def pictures_path(run: Run, kernel: str, seed: int) -> Path:
    """Return the file of images of these chains."""
    return chains_path(run, kernel, seed).with_suffix(".npz")


def identity(budget: Budget, fingerprint: str) -> dict[str, str | int | float]:
    """Return the attributes that chains must have in common to be compared."""
    return {"fingerprint": fingerprint, **{f"budget_{name}": value for name, value in budget._asdict().items()}}


def run_and_save(loaded: LoadedRun, kernel: str, seed: int, budget: Budget) -> Outcome:
    """Run one kernel with one seed, and write its chains and the images of a few; older files are removed."""
    run, potential = loaded.run, loaded.potential
    chains_path(run, kernel, seed).unlink(missing_ok=True)
    pictures_path(run, kernel, seed).unlink(missing_ok=True)
    functionals = noise_functionals(potential, loaded.data.modes)
    num_pictured = min(NUM_PICTURED, budget.num_chains) if len(loaded.data.event_shape) == 3 else 0
    recorder = PositionRecorder(functionals, num_pictured, potential.packing.dim, MAX_PICTURES)
    try:
        chains = run_kernel(
            kernel,
            potential,
            loaded.config.sampling.kernel,
            starts(potential, budget.num_chains, seed),
            budget,
            seed,
            recorder if num_pictured else functionals,
        )
    # Errors of four libraries for targets and options that a kernel does not support; the other kernels continue.
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return Outcome(kernel, seed, None, " ".join(str(error).split()) or type(error).__name__)
    idata = to_inference_data(chains)
    idata["posterior"].attrs.update(identity(budget, loaded.fingerprint))
    run.comparison_dir.mkdir(exist_ok=True)
    if num_pictured:
        _save_pictures(pictures_path(run, kernel, seed), potential, recorder)
    save_netcdf(idata, chains_path(run, kernel, seed))
    return Outcome(kernel, seed, idata)


def _save_pictures(path: Path, potential: NoisePotential, recorder: PositionRecorder) -> None:
    like = next(potential.vaebm.parameters())
    rows = [potential.decode(torch.from_numpy(row).to(like)).float().cpu().numpy() for row in recorder.positions]
    buffer = io.BytesIO()
    np.savez(buffer, x=np.stack(rows), stride=np.array(recorder.stride))
    write_atomic(path, buffer.getvalue())


def kept_outcomes(
    run: Run, but: Sequence[str], seeds: Sequence[int], budget: Budget, fingerprint: str
) -> dict[str, list[Outcome]]:
    """Read the outcomes of an earlier comparison by kernel, in the order of the seeds, except of kernels in ``but``.

    Raises:
        InputError: there are none, or some have another density or budget, or lack a seed.
    """
    files = [(kernel, seed) for kernel, seed in _files(run) if kernel not in but]
    if not files:
        raise InputError(
            f"expected chains of other kernels in {run.comparison_dir} to keep, found none; leave out --keep"
        )
    expected = identity(budget, fingerprint)
    kept = {}
    for kernel in sorted({kernel for kernel, _ in files}):
        lacking = [seed for seed in seeds if (kernel, seed) not in files]
        if lacking:
            raise InputError(
                f"expected the kept {kernel} to have the seeds of this comparison, found none of seed "
                f"{', '.join(map(str, lacking))}; leave out --keep, or give the earlier --seed and --num-seeds"
            )
        kept[kernel] = [_checked(run, kernel, seed, expected) for seed in seeds]
    return kept


def _files(run: Run) -> list[tuple[str, int]]:
    matches = [_NAME.fullmatch(path.name) for path in sorted(run.comparison_dir.glob("*.nc"))]
    return [(match["kernel"], int(match["seed"])) for match in matches if match]


def _checked(run: Run, kernel: str, seed: int, expected: Mapping[str, Any]) -> Outcome:
    path = chains_path(run, kernel, seed)
    idata = load_netcdf(path)
    attrs = idata["posterior"].attrs
    if attrs.get("fingerprint") != expected["fingerprint"]:
        raise InputError(
            f"expected the kept {kernel} to be of this VAE and energy, found {path} of other weights or "
            "another version; leave out --keep, and all kernels run anew"
        )
    changed = [name for name, value in expected.items() if attrs.get(name) != value]
    if changed:
        details = ", ".join(
            f"{name.removeprefix('budget_').replace('_', '-')} {attrs.get(name)} instead of {expected[name]}"
            for name in changed
        )
        raise InputError(
            f"expected the kept {kernel} to have had this comparison's budget, found {path} with {details}; "
            "give the same options as then, or leave out --keep"
        )
    return Outcome(kernel, seed, idata)


def remove_others(run: Run, outcomes: Sequence[Outcome]) -> None:
    """Delete chains and pictures of earlier comparisons."""
    kept = {(outcome.kernel, outcome.seed) for outcome in outcomes}
    for kernel, seed in _files(run):
        if (kernel, seed) not in kept:
            chains_path(run, kernel, seed).unlink()
            pictures_path(run, kernel, seed).unlink(missing_ok=True)


def load_pictures(run: Run, kernel: str, seed: int) -> tuple[NDArray[Any], int] | None:
    """Read images of chains, ``(chains, times, C, H, W)``, and the draws between two; ``None`` without a file."""
    path = pictures_path(run, kernel, seed)
    if not path.exists():
        return None
    with np.load(path) as file:
        return file["x"], int(file["stride"])
