"""Stage svi shows its VAE in TensorBoard at every checkpoint, and the best one at its end."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES as IMAGE_EVENTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppl_vaebm import fit
from ppl_vaebm.data.splits import Split
from ppl_vaebm.reports import report
from ppl_vaebm.reports.gallery import gallery_grids
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.gallery import gallery
from ppl_vaebm.runs.loading import FittedVAE, open_fitted_vae
from ppl_vaebm.runs.run import Run
from tests.tiny import IMAGES, write_empty_report, write_recipe

PRIORS = [f"prior t={t}" for t in ("0.6", "0.7", "0.8", "1")]


def fit_svi(folder: Path, *options: str) -> Run:
    folder.mkdir()
    fit.main(["--stage", "svi", "--recipe", str(write_recipe(folder, IMAGES)), "--run", str(folder / "run"), *options])
    return Run(folder / "run")


def grids_of(fitted: FittedVAE, split: Split) -> dict[str, np.ndarray]:
    files = gallery(fitted, split, fitted.config.seed)
    return {label: grid for name, arrays in files.items() for label, grid in gallery_grids(name, arrays).items()}


def test_tensorboard_shows_the_vae_at_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", write_empty_report)
    run = fit_svi(tmp_path / "shown", "--tensorboard")
    events = EventAccumulator(str(run.tensorboard_dir / "svi"), size_guidance={IMAGE_EVENTS: 0})
    events.Reload()
    shown = {
        tag: {event.step: np.array(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(tag)}
        for tag in events.Tags()["images"]
    }
    for label in ("reconstructions", *PRIORS):
        assert list(shown[label]) == [2, 4], label
        assert list(shown[f"test/{label}"]) == [4], label

    fitted, best = open_fitted_vae(str(run.path)), checkpoint.load(run.checkpoints("svi"), "best").step
    for label, grid in grids_of(fitted, fitted.data.validation).items():
        np.testing.assert_array_equal(shown[label][best], grid, label)
    for label, grid in grids_of(fitted, fitted.data.test).items():
        np.testing.assert_array_equal(shown[f"test/{label}"][4], grid, label)
    assert not np.array_equal(shown["reconstructions"][2], shown["reconstructions"][4])

    plain = fit_svi(tmp_path / "plain")
    assert not plain.tensorboard_dir.exists()
    first, second = (checkpoint.load(fitted_run.checkpoints("svi"), "last").weights for fitted_run in (run, plain))
    for name, parameters in first.items():
        for parameter, value in parameters.items():
            assert value.equal(second[name][parameter]), (name, parameter)
