"""The guard of stage 2: its averages, its limits, and where it goes back to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppl_vaebm.config import Config, EbmConfig, KernelName, TrainingKernelConfig
from ppl_vaebm.inference.ebm.guard import LIMITS, MIN_ACCEPTANCE, STAGE, Guard, go_back, words
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

LOOP = EbmConfig(guard_patience=4, max_energy_gap=10.0, min_acceptance=0.2, max_rollbacks=3, rollback_factor=0.5)
CONFIG = Config(ebm=LOOP)
HEALTHY = {"energy_gap": -2.0, "energy_sd": 3.0, "acceptance_rate": 0.7, "saturation": 0.4, "grad_norm": 5.0}


def test_an_average_is_a_mean_at_first_and_exponential_then() -> None:
    guard = Guard(CONFIG)
    values = [1.0, -2.0, 4.0, 0.5, 3.0, 2.0]
    for step, value in enumerate(values):
        guard.watch({"energy_gap": value}, step)
    expected = sum(abs(value) for value in values[:4]) / 4
    for value in values[4:]:
        expected = 3 / 4 * expected + abs(value) / 4
    assert guard.averages["energy_gap"] == pytest.approx(expected)


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)], ids=["above", "below", "swinging"])
def test_the_gap_trips_on_either_side_and_not_by_one_step(signs: tuple[int, int]) -> None:
    guard = Guard(CONFIG)
    for step in range(10):
        guard.watch({"energy_gap": 0.0}, step)
    guard.watch({"energy_gap": signs[0] * 39.0}, 10)  # a quarter of it is within the limit
    with pytest.raises(
        DivergedError, match="step 12: the size of the energy gap averages .*limit ebm.max-energy-gap 10"
    ) as stop:
        guard.watch({"energy_gap": signs[1] * 39.0}, 11)
    assert stop.value.step == 11


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_every_monitor_has_a_limit_that_trips(limit: object) -> None:
    assert isinstance(limit, tuple)
    name, _, option, is_lower = limit
    bound = getattr(EbmConfig(), option) or MIN_ACCEPTANCE
    for factor, is_bad in ((0.99, is_lower), (1.01, not is_lower)):
        guard = Guard(Config())
        if is_bad:
            with pytest.raises(DivergedError, match=option.replace("_", "-")):
                guard.watch(HEALTHY | {name: factor * bound}, 0)
        else:
            guard.watch(HEALTHY | {name: factor * bound}, 0)


@pytest.mark.parametrize(
    ("kernel", "asked", "bound"), [("langevin", None, 0.4), ("mala", None, 0.01), ("mala", 0.2, 0.2)]
)
def test_steps_that_do_not_follow_the_energy_have_a_limit_of_their_own(
    kernel: KernelName, asked: float | None, bound: float
) -> None:
    config = Config(ebm=EbmConfig(min_acceptance=asked), kernel=TrainingKernelConfig(kernel))
    guard = Guard(config)
    guard.watch({"acceptance_rate": 1.01 * bound}, 0)
    with pytest.raises(DivergedError, match=f"acceptance averages .*min-acceptance {bound:g}"):
        Guard(config).watch({"acceptance_rate": 0.99 * bound}, 0)


def test_the_guard_can_be_left_out() -> None:
    guard = Guard(replace(CONFIG, ebm=replace(LOOP, guard=False)))
    guard.watch({"energy_gap": 1e9, "acceptance_rate": 0.0}, 0)


def test_a_value_that_is_not_finite_enters_no_average() -> None:
    guard = Guard(CONFIG)
    guard.watch(HEALTHY, 0)
    guard.watch({name: math.nan for name in HEALTHY} | {"energy_gap": math.inf}, 1)
    assert guard.averages == {name: abs(value) for name, value in HEALTHY.items()}


def test_a_restored_guard_goes_on_alike() -> None:
    guard, restored = Guard(CONFIG), Guard(CONFIG)
    guard.watch(HEALTHY, 0)
    guard.num_rollbacks = 2
    restored.load(guard.state())
    for each in (guard, restored):
        each.watch({"energy_gap": 5.0}, 1)
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
    saved = go_back(run, guard, DivergedError(step, "something grew"))
    return None if saved is None else saved.step


def test_it_goes_back_to_the_last_checkpoint_and_further_where_that_one_leads_nowhere(tmp_path: Path) -> None:
    run, guard = Run.create(tmp_path / "run"), Guard(CONFIG)
    guard.watch({"energy_gap": 1.5}, 0)
    save(run, guard, 4, 8)
    guard.watch({"energy_gap": 9.0}, 9)
    assert reached(run, guard, 10) == 8
    assert guard.averages == {"energy_gap": 1.5} and guard.num_rollbacks == 1
    assert checkpoints.available(run.checkpoints(STAGE)) == [4, 8]
    assert "back to step 8 with 0.5 of the learning rate" in words(guard)
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
    assert guard.is_stopped and "stops after 3 returns, with the checkpoint of step 8 as its result" in words(guard)
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
        go_back(run, guard, DivergedError(3, "something grew"))
