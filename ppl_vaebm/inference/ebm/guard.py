"""Guard of stage 2: averages of the monitors, their limits, and the return to a checkpoint with a lower learning rate.

Nothing is saved unless all averages are within their limits, so every checkpoint is a good one. If the attempt from a
checkpoint ends before the next one is saved, that checkpoint counts as the cause, and the next attempt begins at the
one before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

from ppl_vaebm.config import Config
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.rng import seed_for
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

STAGE = "ebm"
PATIENCE = 20
"""Steps that the averages look back on, exponentially. Chosen by us."""
MAX_ENERGY_SD, MAX_GRAD_NORM, MAX_SATURATION = 1_000.0, 1e6, 0.9
"""Limits of energies (nats), of gradients before the clip, and of the fraction of pixels out of range. Chosen by us,
far beyond what healthy runs reach."""
MIN_SWAP_RATE = 0.1
"""Below it the chains of the first latent no longer follow the joint term: on StackedMNIST the rate fell from 0.66 to
0.1 within thirty updates, and gradients of norm 1,000 followed."""
MIN_LANGEVIN_ACCEPTANCE = 0.4
"""An energy on which unadjusted steps would have been accepted less often explodes soon: on digits the Frechet distance
fell above 0.5 and rose below 0.45 (experiments/stability.py)."""
MIN_ACCEPTANCE = 0.01
"""Of other kernels, whose step follows the energy, or which have none. Chosen by us: independence proposals of images
are rarely accepted."""

RESUMED = ("averages", "counts", "num_rollbacks", "is_stopped", "began_at", "events")
"""Attributes of the guard that a checkpoint holds."""


class Limit(NamedTuple):
    """Bound of a monitor's average."""

    monitor: str
    """Name of the monitor, as it is logged."""
    description: str
    bound: float
    is_lower: bool = False
    """Whether the bound is below."""
    option: str = ""
    """Name of the option that sets the bound, if one does."""

    def excess(self, average: float) -> str | None:
        """Describe an average beyond the limit, as the end of a sentence; return ``None`` for one within."""
        if not (average < self.bound if self.is_lower else average > self.bound):
            return None
        limit = f"{self.option} {self.bound:g}" if self.option else f"{self.bound:g}"
        return f"{self.description} averages {average:.4g}, beyond the limit {limit}"


def limits_of(config: Config) -> tuple[Limit, ...]:
    """Return the limits that a run's options and kernel ask for."""
    loop = config.ebm
    min_acceptance = MIN_LANGEVIN_ACCEPTANCE if config.kernel.name == "langevin" else MIN_ACCEPTANCE
    if loop.min_acceptance is not None:
        min_acceptance = loop.min_acceptance
    return (
        Limit("energy_gap", "the size of the energy gap", loop.max_energy_gap, option="ebm.max-energy-gap"),
        Limit("energy_sd", "the standard deviation of the energies", MAX_ENERGY_SD),
        Limit("grad_norm", "the norm of the gradient", MAX_GRAD_NORM),
        Limit("saturation", "the fraction of the negatives' pixels beyond [-1, 1]", MAX_SATURATION),
        Limit("acceptance_rate", "the chains' acceptance", min_acceptance, True, "ebm.min-acceptance"),
        Limit("exchange_rate", "the acceptance of swaps of the first latent", MIN_SWAP_RATE, True),
    )


class Guard:
    """Averages of the monitors, and the record of the returns."""

    def __init__(self, config: Config) -> None:
        self.loop = config.ebm
        self.run_seed = config.seed
        self.limits = limits_of(config)
        self.averages: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.num_rollbacks = 0
        self.is_stopped = False
        """Whether no attempt is left."""
        self.began_at: int | None = None
        """Step of the checkpoint that the attempt began at; ``None`` is the start."""
        self.events: list[dict[str, Any]] = []

    @property
    def seed(self) -> int:
        """Seed of the attempt: the run's at first, and another after each return, or the same noise would follow."""
        return seed_for(self.run_seed, "rollback", self.num_rollbacks) if self.num_rollbacks else self.run_seed

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate."""
        return self.loop.rollback_factor**self.num_rollbacks

    def watch(self, monitors: Mapping[str, float]) -> str | None:
        """Average the monitors of a step, and describe the first average beyond its limit, if one is.

        A value that is not finite enters no average: its update was skipped, and the optimiser counts those.
        """
        if not self.loop.guard:
            return None
        excesses = []
        for limit in self.limits:
            value = abs(monitors.get(limit.monitor, math.nan))  # only the gap has a sign
            if math.isfinite(value):
                excesses.append(limit.excess(self._average(limit.monitor, value)))
        return next(filter(None, excesses), None)

    def _average(self, name: str, value: float) -> float:
        """Take a value into an average, a plain mean for the first :data:`PATIENCE` values."""
        count = self.counts[name] = self.counts.get(name, 0) + 1
        before = self.averages.get(name, 0.0)
        self.averages[name] = before + (value - before) / min(count, PATIENCE)
        return self.averages[name]

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, for a checkpoint."""
        return {name: getattr(self, name) for name in RESUMED}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        vars(self).update({name: copy(state[name]) for name in RESUMED})

    def rewind(self, run: Run, step: int | None) -> None:
        """Drop what the record holds after a step, or from the start on, but keep the returns themselves."""
        last_kept = -1 if step is None else step  # the first latent's term leaves a validation at step 0
        run.rewind_metrics(STAGE, last_kept)
        for event in self.events:
            if event["step"] > last_kept:
                run.log(event)

    def describe(self) -> str:
        """Describe the last event in a sentence."""
        event = self.events[-1]
        place = f"step {event['to_step']}"
        if event["event"] == "stop":
            outcome = (
                f"stage ebm stops after {self.num_rollbacks} returns, with the checkpoint of {place} as its result"
            )
        else:
            outcome = f"back to {place} with {self.rate_factor:.3g} of the learning rate"
        return f"step {event['step']}: {event['reason']}: {outcome}"


def go_back(run: Run, guard: Guard, step: int, reason: str) -> checkpoints.Checkpoint | None:
    """Choose where the next attempt begins, and cut run and guard back to there; or stop, if no attempt is left.

    The last attempt was ended at a step, for a reason. Returns the checkpoint to begin at, ``None`` for the start; if
    the guard stops, it is marked as the stage's result.

    Raises:
        DivergedError: the last attempt allowed has ended and there is no checkpoint.
    """
    folder = run.checkpoints(STAGE)
    steps = checkpoints.available(folder)
    guard.is_stopped = guard.num_rollbacks == guard.loop.max_rollbacks
    if guard.is_stopped and not steps:
        raise DivergedError(step, reason)
    if not guard.is_stopped:
        guard.num_rollbacks += 1
        if steps and guard.began_at == steps[-1]:
            steps.pop()
            checkpoints.delete_after(folder, steps[-1] if steps else -1)
    saved = checkpoints.load(folder, "last") if steps else None
    before = None if saved is None else saved.state["guard"]
    guard.averages, guard.counts = (dict(before["averages"]), dict(before["counts"])) if before else ({}, {})
    guard.began_at = None if saved is None else saved.step
    event = {"event": "stop" if guard.is_stopped else "rollback", "to_step": guard.began_at or 0}
    counted = {"reason": reason, "num_rollbacks": guard.num_rollbacks}
    guard.events.append({"stage": STAGE, "step": step + 1, **event, **counted})
    guard.rewind(run, guard.began_at)
    if guard.is_stopped and saved is not None:
        # Written again with the last event, so that resuming does not begin another attempt.
        saved = replace(saved, state=saved.state | {"guard": guard.state()})
        checkpoints.save(folder, **{name: value for name, value in vars(saved).items() if name != "path"})
    return saved
