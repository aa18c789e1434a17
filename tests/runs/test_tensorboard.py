"""What TensorBoard reads is what the run logged, once each, also after a kill."""

from __future__ import annotations

import importlib.util
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from ppl_vaebm.errors import InputError
from ppl_vaebm.runs.run import Run
from ppl_vaebm.runs.tensorboard import StageBoards, check_installed, open_board


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={IMAGES: 0})
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(run: Run, stage: str) -> dict[str, list[tuple[int, Any]]]:
    """Return every number of the run's record, as TensorBoard should have it."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in run.metrics(stage):
        for name, value in record.items():
            if name not in ("stage", "step", "event"):
                found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6, nan_ok=True)))
    return found


def fit(run: Run, first: int, last: int, scale: float = 1.0) -> None:
    """Log some steps as a stage does."""
    run.rewind_metrics("svi", first)
    with open_board(run, "svi", first) as board:
        mirrored = replace(run, mirror=board)
        for step in range(first + 1, last + 1):
            mirrored.log({"stage": "svi", "step": step, "loss": scale * step, "kl_nats/z_1": 0.5, "num_skipped": 2})


def test_every_number_of_the_record_comes_back(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    fit(run, 0, 3)
    with open_board(run, "svi", 3) as board:
        replace(run, mirror=board).log({"stage": "svi", "step": 3, "validation_elbo_nats": math.nan, "late": "inf"})
    assert scalars(run.tensorboard_dir / "svi") == logged(run, "svi")
    assert set(logged(run, "svi")) == {"loss", "kl_nats/z_1", "num_skipped", "validation_elbo_nats", "late"}


def test_a_resumed_stage_leaves_no_duplicates(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    fit(run, 0, 7)
    fit(run, 4, 9, scale=-1.0)
    found = scalars(run.tensorboard_dir / "svi")
    assert found == logged(run, "svi")
    assert found["loss"] == [(step, step if step <= 4 else -step) for step in range(1, 10)]


def test_without_the_purge_there_would_be_duplicates(tmp_path: Path) -> None:
    """The comparison above can fail."""
    for scale in (1.0, -1.0):
        with StageBoards(Run(tmp_path), "svi", 100) as board:
            board.log({"stage": "svi", "step": 4, "loss": scale})
    assert scalars(tmp_path / "tensorboard" / "svi")["loss"] == [(4, 1.0), (4, -1.0)]


def test_a_stage_that_starts_again_forgets_the_old_one(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    fit(run, 0, 5)
    fit(run, 0, 2, scale=3.0)
    assert scalars(run.tensorboard_dir / "svi")["loss"] == [(1, 3.0), (2, 6.0)]


def test_what_was_logged_before_the_option_was_on_is_copied(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for step in range(1, 6):
        run.log({"stage": "svi", "step": step, "loss": float(step)})
        run.log({"stage": "ebm", "step": step, "loss": -1.0})
    fit(run, 3, 4, scale=10.0)
    assert scalars(run.tensorboard_dir / "svi")["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_the_parts_of_a_stage_have_files_of_their_own(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    with open_board(run, "ebm") as board:
        mirrored = replace(run, mirror=board)
        for stage in ("ebm-latent", "ebm", "other"):
            for step in (1, 2):
                mirrored.log({"stage": stage, "step": step, "energy_gap": float(len(stage) * step)})
    assert scalars(run.tensorboard_dir / "ebm") == logged(run, "ebm") == {"energy_gap": [(1, 3.0), (2, 6.0)]}
    assert scalars(run.tensorboard_dir / "ebm-latent") == logged(run, "ebm-latent")
    assert sorted(folder.name for folder in run.tensorboard_dir.iterdir()) == ["ebm", "ebm-latent"]
    # Opened later, it is told the same.
    shutil.rmtree(run.tensorboard_dir)
    with open_board(run, "ebm", 2):
        pass
    assert scalars(run.tensorboard_dir / "ebm") == logged(run, "ebm")
    assert scalars(run.tensorboard_dir / "ebm-latent") == logged(run, "ebm-latent")


def test_what_the_run_takes_back_is_forgotten(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    with open_board(run, "ebm") as board:
        mirrored = replace(run, mirror=board)
        for scale in (1.0, -1.0):
            for step in range(1 if scale > 0 else 4, 7):
                mirrored.log({"stage": "ebm", "step": step, "loss": scale * step})
            if scale > 0:
                mirrored.rewind_metrics("ebm", 3)
                mirrored.log({"stage": "ebm", "step": 6, "event": "rollback", "to_step": 3})
    found = scalars(run.tensorboard_dir / "ebm")
    assert found == logged(run, "ebm")
    assert found["loss"] == [(step, step if step <= 3 else -step) for step in range(1, 7)]


def test_a_killed_process_has_written_what_it_logged(tmp_path: Path) -> None:
    with StageBoards(Run(tmp_path), "svi") as board:
        board.log({"stage": "svi", "step": 1, "loss": 2.0})
        assert scalars(tmp_path / "tensorboard" / "svi") == {"loss": [(1, 2.0)]}


def test_pictures_come_back_with_their_size(tmp_path: Path) -> None:
    with StageBoards(Run(tmp_path), "svi") as board:
        board.images({"prior t=0.7": np.full((6, 4, 3), 200, np.uint8)}, 5)
    events = read(tmp_path / "tensorboard" / "svi")
    (tag,) = events.Tags()["images"]
    (event,) = events.Images(tag)
    assert tag == "prior t=0.7" and (event.step, event.height, event.width) == (5, 6, 4)


def test_a_missing_package_is_one_sentence_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[log\]'"):
        open_board(Run.create(tmp_path), "svi")
    assert list(tmp_path.iterdir()) == []
