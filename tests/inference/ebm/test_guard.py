"""The guard of stage 2: its averages, its limits, and where it goes back to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppl_vaebm.config import Config, EbmConfig, KernelName, TrainingKernelConfig
from ppl_vaebm.inference.ebm import guard as guard_module
from ppl_vaebm.inference.ebm.guard import STAGE, Guard, Limit, go_back, limits_of
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

LOOP = EbmConfig(max_energy_gap=10.0, min_acceptance=0.2, max_rollbacks=3, rollback_factor=0.5)
CONFIG = Config(ebm=LOOP)
HEALTHY = {"energy_gap": -2.0, "energy_sd": 3.0, "acceptance_rate": 0.7, "saturation": 0.4, "grad_norm": 5.0}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "PATIENCE", 4)


def test_an_average_is_a_mean_at_first_and_exponential_then() -> None:
    guard = Guard(CONFIG)
    values = [1.0, -2.0, 4.0, 0.5, 3.0, 2.0]
    for value in values:
        assert guard.watch({"energy_gap": value}) is None
    expected = sum(abs(value) for value in values[:4]) / 4
    for value in values[4:]:
        expected = 3 / 4 * expected + abs(value) / 4
    assert guard.averages["energy_gap"] == pytest.approx(expected)


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)], ids=["above", "below", "swinging"])
def test_the_gap_trips_on_either_side_and_not_by_one_step(signs: tuple[int, int]) -> None:
    guard = Guard(CONFIG)
    for _ in range(10):
        assert guard.watch({"energy_gap": 0.0}) is None
    assert guard.watch({"energy_gap": signs[0] * 39.0}) is None  # a quarter of it is within the limit
    reason = guard.watch({"energy_gap": signs[1] * 39.0})
    assert reason is not None
    assert reason.startswith("the size of the energy gap averages ")
    assert reason.endswith("beyond the limit ebm.max-energy-gap 10")


@pytest.mark.parametrize("limit", limits_of(Config()), ids=lambda limit: limit.monitor)
def test_every_monitor_has_a_limit_that_trips(limit: Limit) -> None:
    for factor, is_bad in ((0.99, limit.is_lower), (1.01, not limit.is_lower)):
        reason = Guard(Config()).watch(HEALTHY | {limit.monitor: factor * limit.bound})
        assert (reason is not None) == is_bad
        assert reason is None or (reason.startswith(limit.description) and f"{limit.option} {limit.bound:g}" in reason)


@pytest.mark.parametrize(
    ("kernel", "asked", "bound"), [("langevin", None, 0.4), ("mala", None, 0.01), ("mala", 0.2, 0.2)]
)
def test_steps_that_do_not_follow_the_energy_have_a_limit_of_their_own(
    kernel: KernelName, asked: float | None, bound: float
) -> None:
    config = Config(ebm=EbmConfig(min_acceptance=asked), kernel=TrainingKernelConfig(kernel))
    assert Guard(config).watch({"acceptance_rate": 1.01 * bound}) is None
    reason = Guard(config).watch({"acceptance_rate": 0.99 * bound})
    assert reason is not None and f"acceptance averages {0.99 * bound:.4g}" in reason
    assert f"ebm.min-acceptance {bound:g}" in reason


def test_the_guard_can_be_left_out() -> None:
    guard = Guard(replace(CONFIG, ebm=replace(LOOP, guard=False)))
    assert guard.watch({"energy_gap": 1e9, "acceptance_rate": 0.0}) is None


def test_a_value_that_is_not_finite_enters_no_average() -> None:
    guard = Guard(CONFIG)
    guard.watch(HEALTHY)
    guard.watch({name: math.nan for name in HEALTHY} | {"energy_gap": math.inf})
    assert guard.averages == {name: abs(value) for name, value in HEALTHY.items()}


def test_a_restored_guard_continues_alike() -> None:
    guard, restored = Guard(CONFIG), Guard(CONFIG)
    guard.watch(HEALTHY)
    guard.num_rollbacks = 2
    restored.load(guard.state())
    for each in (guard, restored):
        each.watch({"energy_gap": 5.0})
    assert restored.state() == guard.state()
    assert restored.seed == guard.seed != Guard(CONFIG).seed == 0
    assert restored.rate_factor == 0.25


def save(run: Run, guard: Guard, *steps: int) -> None:
    for step in steps:
        run.log({"stage": STAGE, "step": step})
        checkpoints.save(
            run.checkpoints(STAGE),
            stage=STAGE,
            step=step,
            weights={"energy": {"w": torch.tensor([float(step)])}},
            state={"guard": guard.state()},
            config={},
            score=None,
        )


def reached(run: Run, guard: Guard, step: int) -> int | None:
    """Let the attempt end at a step; return where the next one begins, ``None`` for the start."""
    run.log({"stage": STAGE, "step": step})
    saved = go_back(run, guard, step, "something grew")
    return None if saved is None else saved.step


def test_it_goes_back_to_the_last_checkpoint_and_further_where_that_one_leads_nowhere(tmp_path: Path) -> None:
    run, guard = Run.create(tmp_path / "run"), Guard(CONFIG)
    guard.watch({"energy_gap": 1.5})
    save(run, guard, 4, 8)
    guard.watch({"energy_gap": 9.0})
    assert reached(run, guard, 10) == 8
    assert guard.averages == {"energy_gap": 1.5} and guard.num_rollbacks == 1
    assert checkpoints.available(run.checkpoints(STAGE)) == [4, 8]
    assert "back to step 8 with 0.5 of the learning rate" in guard.describe()
    # The attempt from 8 ends before anything new is saved, so 8 is to blame.
    assert reached(run, guard, 9) == 4
    assert checkpoints.available(run.checkpoints(STAGE)) == [4]
    # Now there is something new, so the next return is to that.
    save(run, guard, 8)
    assert reached(run, guard, 11) == 8
    records = run.metrics(STAGE)
    assert [record["step"] for record in records if "event" not in record] == [4, 8]
    events = [(record["step"], record["event"], record["to_step"]) for record in records if "event" in record]
    assert events == [(11, "rollback", 8), (10, "rollback", 4), (12, "rollback", 8)]
    # That was the third and last.
    assert reached(run, guard, 12) == 8
    assert guard.is_stopped and "stops after 3 returns, with the checkpoint of step 8 as its result" in guard.describe()
    assert run.metrics(STAGE)[-1]["event"] == "stop"
    saved = checkpoints.load(run.checkpoints(STAGE))
    assert saved.step == 8 and saved.weights["energy"]["w"].item() == 8.0
    again = Guard(CONFIG)
    again.load(saved.state["guard"])
    assert again.is_stopped and again.events == guard.events


def test_the_checkpoint_of_step_0_is_not_the_start(tmp_path: Path) -> None:
    """Stage ebm's part before its first step leaves one, and starting again renews it: it has not been tried then."""
    run, guard = Run.create(tmp_path / "run"), Guard(CONFIG)
    save(run, guard, 0)
    assert [reached(run, guard, 3), reached(run, guard, 3)] == [0, None]
    assert not run.metrics(STAGE) or all("event" in record for record in run.metrics(STAGE))  # step 0 is void too
    save(run, guard, 0)
    again = Guard(CONFIG)
    again.load(guard.state())
    assert again.began_at is None
    assert reached(run, again, 3) == 0 and checkpoints.available(run.checkpoints(STAGE)) == [0]


def test_without_a_checkpoint_it_goes_back_to_the_start_and_fails_in_the_end(tmp_path: Path) -> None:
    run, guard = Run.create(tmp_path / "run"), Guard(CONFIG)
    save(run, guard, 4)
    assert [reached(run, guard, 6), reached(run, guard, 6), reached(run, guard, 3)] == [4, None, None]
    assert guard.averages == {} and checkpoints.available(run.checkpoints(STAGE)) == []
    with pytest.raises(DivergedError, match="something grew"):
        go_back(run, guard, 3, "something grew")
