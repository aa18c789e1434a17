"""What watches stage 2, and what happens when it explodes: back to the last checkpoint, with a lower learning rate.

The official code of VAEBM leaves to the eye when to stop. Here every step reports its monitors, the guard keeps their
averages, and one that passes its limit ends the attempt. Nothing is saved unless all averages are within their limits,
so every checkpoint is a good one. If the attempt from a checkpoint ends before the next one is saved, the checkpoint
counts as the cause, and the attempt after it begins at the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppl_vaebm.config import Config
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.rng import seed_for
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

STAGE = "ebm"


MIN_LANGEVIN_ACCEPTANCE = 0.4
"""An energy on which unadjusted steps would have been accepted less often explodes soon: on digits, with steps of angle
0.5, acceptance was above 0.5 while the Frechet distance fell, and below 0.45 while it rose
(experiments/stability.py)."""
MIN_ACCEPTANCE = 0.01
"""The step of other kernels follows the energy, or it has none; chosen by us, for independence proposals on images are
rarely accepted."""


class Limit(NamedTuple):
    """What a monitor's average may be."""

    name: str
    """Of the monitor, as it is logged."""
    words: str
    """The same in a sentence."""
    option: str
    """Name of the option that holds the bound."""
    is_lower: bool = False
    """Whether the bound is below."""


LIMITS = (
    Limit("energy_gap", "the size of the energy gap", "max_energy_gap"),
    Limit("energy_sd", "the standard deviation of the energies", "max_energy_sd"),
    Limit("grad_norm", "the norm of the gradient", "max_grad_norm"),
    Limit("saturation", "the share of the negatives' pixels beyond [-1, 1]", "max_saturation"),
    Limit("acceptance_rate", "the chains' acceptance", "min_acceptance", is_lower=True),
    Limit("exchange_rate", "the acceptance of the first latent's exchanges", "min_exchange", is_lower=True),
)


class Guard:
    """Averages of the monitors, and how often the training went back.

    Args:
        config: the run's, with the limits and what to do when one is passed.
    """

    def __init__(self, config: Config) -> None:
        self.loop = config.ebm
        self.run_seed = config.seed
        self.bounds = {limit.name: _bound(limit, config) for limit in LIMITS}
        self.averages: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.num_rollbacks = 0
        self.is_stopped = False
        self.began_at: int | None = None  # step of the checkpoint that the attempt began at; none is the start
        self.events: list[dict[str, Any]] = []

    @property
    def seed(self) -> int:
        """Seed of the attempt: the run's at first, and after each return another, or the same noise would follow."""
        return seed_for(self.run_seed, "rollback", self.num_rollbacks) if self.num_rollbacks else self.run_seed

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied by."""
        return self.loop.rollback_factor**self.num_rollbacks

    def watch(self, monitors: Mapping[str, float], step: int) -> None:
        """Take in the monitors of a step.

        A value that is not finite enters no average: its update was skipped and counted, and too many of those in a
        row end the attempt by themselves.

        Args:
            monitors: names to values; those that :data:`LIMITS` does not name are not looked at.
            step: number of the step.

        Raises:
            DivergedError: an average has passed its limit.
        """
        if not self.loop.guard:
            return
        for limit in LIMITS:
            value = abs(monitors.get(limit.name, math.nan))  # the gap alone has a sign, and may swing
            if math.isfinite(value):
                self._check(limit, value, step)

    def _check(self, limit: Limit, value: float, step: int) -> None:
        count = self.counts[limit.name] = self.counts.get(limit.name, 0) + 1
        before = self.averages.get(limit.name, 0.0)
        average = self.averages[limit.name] = before + (value - before) / min(count, self.loop.guard_patience)
        bound = self.bounds[limit.name]
        if average < bound if limit.is_lower else average > bound:
            where = f"the limit ebm.{limit.option.replace('_', '-')} {bound:g}"
            raise DivergedError(step, f"{limit.words} averages {average:.4g}, beyond {where}")

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, for a checkpoint."""
        return {
            "averages": self.averages,
            "counts": self.counts,
            "num_rollbacks": self.num_rollbacks,
            "is_stopped": self.is_stopped,
            "began_at": self.began_at,
            "events": self.events,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        self.load_averages(state)
        self.num_rollbacks, self.is_stopped = state["num_rollbacks"], state["is_stopped"]
        self.events = list(state["events"])
        self.began_at = state.get("began_at")  # an earlier version had none

    def load_averages(self, state: Mapping[str, Any]) -> None:
        """Take up the averages alone: of a checkpoint that the training went back to."""
        self.averages, self.counts = dict(state["averages"]), dict(state["counts"])

    def rewind(self, run: Run, step: int | None) -> None:
        """Forget what the record holds after a step, or from the start on, but for the returns themselves."""
        kept = -1 if step is None else step  # the first latent's part leaves a validation at step 0
        run.rewind_metrics(STAGE, kept)
        for event in self.events:
            if event["step"] > kept:
                run.log(event)


def _bound(limit: Limit, config: Config) -> float:
    asked: float | None = getattr(config.ebm, limit.option)
    if asked is not None:
        return asked
    return MIN_LANGEVIN_ACCEPTANCE if config.kernel.name == "langevin" else MIN_ACCEPTANCE


def go_back(run: Run, guard: Guard, error: DivergedError) -> checkpoints.Checkpoint | None:
    """Choose where the next attempt begins, and take the guard there; or stop, where it has gone back often enough.

    Args:
        run: whose checkpoints and record are cut back to there.
        guard: says by ``is_stopped`` whether there is another attempt.
        error: what ended the last one.

    Returns:
        The checkpoint to take up, ``None`` for the start. The last one is marked as the stage's result where it stops.

    Raises:
        DivergedError: the last attempt allowed has ended and there is no checkpoint.
    """
    folder = run.checkpoints(STAGE)
    steps = checkpoints.available(folder)
    guard.is_stopped = guard.num_rollbacks == guard.loop.max_rollbacks
    if guard.is_stopped and not steps:
        raise error
    if not guard.is_stopped:
        guard.num_rollbacks += 1
        if steps and guard.began_at == steps[-1]:
            steps.pop()
            checkpoints.delete_after(folder, steps[-1] if steps else -1)
    saved = checkpoints.load(folder, "last") if steps else None
    fresh: dict[str, Any] = {"averages": {}, "counts": {}}
    # A checkpoint of an earlier version has none either.
    guard.load_averages(fresh if saved is None else saved.state.get("guard", fresh))
    guard.began_at = None if saved is None else saved.step
    event = {"event": "stop" if guard.is_stopped else "rollback", "to_step": guard.began_at or 0}
    counted = {"reason": error.reason, "num_rollbacks": guard.num_rollbacks}
    guard.events.append({"stage": STAGE, "step": error.step + 1, **event, **counted})
    guard.rewind(run, guard.began_at)
    if guard.is_stopped and saved is not None:
        _mark_as_result(run, guard, saved)
    return saved


def _mark_as_result(run: Run, guard: Guard, saved: checkpoints.Checkpoint) -> None:
    """Write a checkpoint again with the guard's last word in it, so that resuming does not begin another attempt."""
    checkpoints.save(
        run.checkpoints(STAGE),
        stage=STAGE,
        step=saved.step,
        weights=saved.weights,
        state=saved.state | {"guard": guard.state()},
        config=saved.config,
        score=saved.score,
    )


def words(guard: Guard) -> str:
    """Say in a sentence what the last event was."""
    event = guard.events[-1]
    went = f"step {event['step']}: {event['reason']}: "
    place = f"step {event['to_step']}"
    if event["event"] == "stop":
        times = guard.num_rollbacks
        return f"{went}stage ebm stops after {times} returns, with the checkpoint of {place} as its result"
    return f"{went}back to {place} with {guard.rate_factor:.3g} of the learning rate"
