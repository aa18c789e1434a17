"""VAEBM runs so small that every command finishes in a second, fitted once for all tests."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from ppl_vaebm import fit
from ppl_vaebm.devices import has_bfloat16
from ppl_vaebm.reports import report
from ppl_vaebm.runs.run import Run

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU only emulates bfloat16")

_FITTED = tempfile.TemporaryDirectory()  # removed when the process ends

POINTS = """
threads: 1
data: {name: gaussians25, num_points: 500}
model: {latents: [1, 1], width: 8, depth: 1}
svi: {steps: 12, batch_size: 16, kl_warmup_steps: 4, validate_every: 6, checkpoint_every: 4, log_every: 2}
energy: {width: 8, depth: 1, num_fourier: 4}
ebm: {steps: 12, batch_size: 8, num_importance: 16, replay_size: 16, num_transitions: 2, validate_every: 6,
  checkpoint_every: 4, num_validation_draws: 200}
kernel: {name: mixture, num_steps: 2}
sampling: {kernel: {name: mixture, num_steps: 2}, num_steps: 3}
"""

IMAGES = """
threads: 1
data: digits
model: {latents: [2, 1], channels: 2, x_scale: local, init_x_scale: 0.3}
svi: {steps: 4, batch_size: 16, kl_warmup_steps: 2, validate_every: 2, checkpoint_every: 2}
energy: {channels: 2}
ebm: {objective: mle, steps: 4, batch_size: 8, num_importance: 16, replay_size: 16, replay_probability: 0.9,
  num_transitions: 2, energy_l2: 0.01, spectral_penalty: 0.01, validate_every: 2, checkpoint_every: 2,
  num_validation_draws: 200}
kernel: {name: mala}
sampling: {kernel: {name: mala}, num_steps: 3}
"""


def write_recipe(folder: Path, text: str = POINTS) -> Path:
    """Write a recipe and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def fit_run(folder: Path, text: str = POINTS, *options: str) -> Path:
    """Return ``folder / "run"``, a copy of a run of both stages that is fitted once for all tests of a process."""
    write_recipe(folder, text)
    return copy_run(_fitted(text, options), folder)


def copy_run(run: Path, folder: Path) -> Path:
    """Copy a run to ``folder / "run"``, for a test that writes to it."""
    shutil.copytree(run, folder / "run")
    return folder / "run"


@functools.cache
def _fitted(text: str, options: tuple[str, ...]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_FITTED.name))
    recipe, run = write_recipe(folder, text), folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write_empty_report)
        fit.main(["--stage", "svi", "--recipe", str(recipe), "--run", str(run)])
        fit.main(["--stage", "ebm", "--run", str(run), *options])
    return run


def write_empty_report(run: Run) -> Path:
    """Replace ``report.write_report``, whose pictures take longer than a tiny run.

    A module that is first imported while it is in place keeps it, so all tests use this one.
    """
    run.report_file.touch()
    return run.report_file
