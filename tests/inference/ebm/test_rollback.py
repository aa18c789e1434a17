"""Stage 2 with the guard: a run that explodes goes back, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.inference.ebm import guard as guard_module
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.inference.ebm.state import Training
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run
from tests.tiny import POINTS


class Guarded(NamedTuple):
    """A run and what it printed."""

    run: Run
    printed: str


STEPS, EVERY = 70, 10


def healthy(**options: Any) -> Config:
    """Return a setting without trouble, at the default limits."""
    tree = yaml.safe_load(POINTS)
    tree["ebm"] |= {"objective": "mle", "steps": STEPS, "checkpoint_every": EVERY, "validate_every": STEPS, **options}
    return from_dict(tree, "a test")


def explosive(**options: Any) -> Config:
    """Return persistent unadjusted chains with a large step, and a learning rate 500 times the default.

    The number of returns until it is stable depends on a processor's rounding, so many are allowed.
    """
    rates = {"learning_rate": 1.0, "final_learning_rate": 1.0, "max_rollbacks": 8}
    config = healthy(**{**rates, "replay_probability": 0.95, "min_acceptance": 0.0, **options})
    return replace(config, kernel=replace(config.kernel, name="langevin", step_size=0.7))


@pytest.fixture(scope="module", autouse=True)
def short_patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard_module, "PATIENCE", 5)
        yield


@functools.cache
def points() -> tuple[Data, HierarchicalVAE]:
    config = healthy()
    data = load_data(config.data, config.seed)
    return data, new_vae(config, data).eval()


def fit(folder: Path, config: Config, *, resumes: bool = False) -> Run:
    run = Run.create(folder)
    data, vae = points()
    resume = checkpoints.load(run.checkpoints("ebm")) if resumes else None
    fit_ebm(run, config, data, vae, resume)
    return run


def events(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.metrics("ebm") if "event" in record]


def steps_of(run: Run) -> list[dict[str, Any]]:
    """Return the record of every step, without the time."""
    records = [record for record in run.metrics("ebm") if "energy_gap" in record]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_run_without_the_guard_explodes(tmp_path: Path) -> None:
    run = fit(tmp_path, explosive(guard=False, steps=3 * STEPS))
    assert max(abs(record["energy_gap"]) for record in steps_of(run)) > 500
    assert events(run) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    """Return the guarded run that several tests look at."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run = fit(tmp_path_factory.mktemp("whole"), explosive())
    return Guarded(run, printed.getvalue())


def test_the_guard_returns_until_the_run_ends_well(whole: Guarded) -> None:
    run, printed = whole
    records, found = steps_of(run), events(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert max(abs(record["energy_gap"]) for record in records) < 300  # single steps may pass the limit of 100
    assert found and all(event["event"] == "rollback" and event["to_step"] % EVERY == 0 for event in found)
    assert records[-1]["lr"] == pytest.approx(0.3 ** len(found)) and records[0]["lr"] == 1.0
    assert records[-1]["num_rollbacks"] == len(found)
    assert all(f"step {each['step']}: {each['reason']}: back to step {each['to_step']}" in printed for each in found)
    assert checkpoints.load(run.checkpoints("ebm")).step == STEPS


def test_the_last_checkpoint_is_the_result_after_the_last_return(tmp_path: Path) -> None:
    config = explosive(max_rollbacks=1)
    run = fit(tmp_path, config)
    last = events(run)[-1]
    saved = checkpoints.load(run.checkpoints("ebm"))
    assert last["event"] == "stop" and saved.step == last["to_step"] < STEPS
    assert math.isfinite(steps_of(run)[-1]["energy_gap"]) and steps_of(run)[-1]["step"] == saved.step
    # There is nothing to resume: the result stays as it is.
    before = (run.checkpoints("ebm") / f"step-{saved.step:08d}" / "weights.safetensors").read_bytes()
    records = run.metrics("ebm")
    fit(tmp_path, config, resumes=True)
    assert run.metrics("ebm") == records
    assert checkpoints.available(run.checkpoints("ebm"))[-1] == saved.step
    assert (run.checkpoints("ebm") / f"step-{saved.step:08d}" / "weights.safetensors").read_bytes() == before


def test_a_run_without_checkpoints_begins_again_and_then_fails(tmp_path: Path) -> None:
    config = explosive(checkpoint_every=STEPS, max_rollbacks=1, max_energy_gap=1e-3)
    with pytest.raises(DivergedError, match="energy gap averages .* start the stage again with a lower learning rate"):
        fit(tmp_path, config)
    assert [event["to_step"] for event in events(Run(tmp_path))] == [0]


def test_the_guard_changes_nothing_of_a_healthy_run(tmp_path: Path) -> None:
    """Negative control, and the same run as without the guard."""
    run, unguarded = fit(tmp_path / "on", healthy(steps=30)), fit(tmp_path / "off", healthy(steps=30, guard=False))
    assert events(run) == [] and steps_of(run) == steps_of(unguarded)


def interrupted(folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, after: int, steps: int) -> None:
    """Fit until an interruption, so many steps into the attempt after so many returns."""
    original, num_seen = Guard.watch, 0

    def watch(self: Guard, monitors: Mapping[str, float]) -> str | None:
        nonlocal num_seen
        num_seen += self.num_rollbacks == after
        if num_seen > steps:
            raise KeyboardInterrupt
        return original(self, monitors)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "watch", watch)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, config)


@pytest.mark.parametrize("when", ["soon after the first", "at the end of the last attempt"])
def test_a_run_resumed_after_a_return_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Guarded, when: str
) -> None:
    run, config = whole.run, explosive()
    last_return = events(run)[-1]
    assert last_return["num_rollbacks"] >= 2
    after, steps = 1, 2
    if when == "at the end of the last attempt":
        after, steps = last_return["num_rollbacks"], STEPS - last_return["to_step"] - 1
    interrupted(tmp_path, config, monkeypatch, after, steps)
    resumed = fit(tmp_path, config, resumes=True)
    assert steps_of(resumed) == steps_of(run) and events(resumed) == events(run)
    last = f"step-{STEPS:08d}/weights.safetensors"
    assert (resumed.checkpoints("ebm") / last).read_bytes() == (run.checkpoints("ebm") / last).read_bytes()


def test_an_attempt_after_a_return_has_other_data() -> None:
    """Or the same explosion would follow, if a little later."""
    config, (data, vae) = explosive(), points()
    first, second = Guard(config), Guard(config)
    second.num_rollbacks = 1
    batches = [Training(config, data, vae, guard.seed).batch(0)[0] for guard in (first, second)]
    assert not batches[0].equal(batches[1])


def test_a_gradient_that_is_not_finite_for_long_is_a_reason_to_go_back(tmp_path: Path) -> None:
    """The energies overflow within a few steps, before any average passes a limit."""
    config = explosive(learning_rate=1e30, final_learning_rate=1e30, max_rollbacks=1, steps=60, replay_probability=0.0)
    run = fit(tmp_path, config)
    reasons = [event["reason"] for event in events(run)]
    assert len(reasons) == 2 and all("gradient has not been finite for 20 steps" in reason for reason in reasons)
