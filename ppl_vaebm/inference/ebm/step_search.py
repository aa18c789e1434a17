"""Step size and number of steps of the training chains, found before training.

Chains from fresh noise, as training starts them, descend the energy. What counts is how far they come for what an
update costs, as long as the steps would be accepted. An untrained energy has no slope, so the energy is a copy that
the ratio objective has trained for a while. It is flatter than the one at the end: on digits MALA's step found after
50, 200 and 600 steps of the ratio was 1.57, 0.79 and 0.56, and 0.39 on the energy at the recipe's end; langevin's 0.56
after 200, and 0.39 (one seed). A kernel whose step follows its acceptance makes up for that in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ppl_vaebm.config import Config, KernelConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.inference.ebm.learner import EnergyLearner
from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE, with_step_size
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream

MAX_NUM_STEPS = 40
"""Longest chains tried; the published ones have 6 to 10 steps in training (Xiao et al. 2021)."""
STEP_RATIO = 2**-0.5
"""From one step size tried to the next; the fall per gradient is flat to a few percent over it."""
MIN_STEP_SIZE = 1e-3
"""Last step size tried; the smallest published one is 1.7e-3."""
NUM_WORSE = 3
"""Step sizes in a row that do worse than the best, after which smaller ones are not tried."""
MAX_TARGET = 0.99
"""Largest acceptance that a kernel is told to follow: at 1 its step would shrink for ever."""
FIXED_GRADIENTS = 2.0
"""What an update costs beside its chains' steps, in gradients of as many chains: their first one, and the loss's on
data and negatives, which has no decoder but two batches."""


class Trial(NamedTuple):
    """The best number of steps at one step size, and what it gives."""

    step_size: float
    """The angle h."""
    num_steps: int
    """Kernel steps of an update."""
    fall: float
    """Of the mean energy, nats per 1,000 gradients, those that every update has included."""
    rejection: float
    """Mean Metropolis rejection of those steps, for an unadjusted kernel that which they would have had."""


class Descent(NamedTuple):
    """What chains from fresh noise do at one step size, step after step."""

    fall: list[float]
    """How much lower the mean energy is than at the start, nats."""
    rejection: list[float]
    """Mean over chains and the steps so far."""
    num_evals: list[float]
    """Gradients per chain so far."""


def tune(config: Config, potential: NoisePotential) -> list[Trial]:
    """Try step sizes from the largest down.

    Args:
        config: kernel, and the bound on rejection; of the kernel's options the step size is not read.
        potential: of a VAEBM with some slope.

    Returns:
        A trial for every step size, in the order tried.
    """
    trials: list[Trial] = []
    step_size, num_worse, best = MAX_STEP_SIZE, 0, -math.inf
    while step_size >= MIN_STEP_SIZE and num_worse < NUM_WORSE:
        trial = _best_length(step_size, descend(config, potential, step_size), config.ebm.tune_rejection)
        trials.append(trial)
        if trial.rejection <= config.ebm.tune_rejection:
            num_worse = 0 if trial.fall > best else num_worse + 1
            best = max(best, trial.fall)
        step_size *= STEP_RATIO
    return trials


def chosen(trials: Sequence[Trial], max_rejection: float) -> Trial:
    """Return the trial with the largest fall per gradient of those within the bound.

    Args:
        trials: at least one.
        max_rejection: the bound; where none is within it, the one with the least rejection is taken.
    """
    within = [trial for trial in trials if trial.rejection <= max_rejection]
    return max(within, key=lambda trial: trial.fall) if within else min(trials, key=lambda trial: trial.rejection)


def descend(config: Config, potential: NoisePotential, step_size: float) -> Descent:
    """Run chains from fresh noise; the noise is the same for every step size, so that they compare.

    Args:
        config: kernel and batch.
        potential: of the VAEBM.
        step_size: the angle h.

    Returns:
        What they did after each step.
    """
    generator = stream(config.seed, "tune", device=config.device)
    position = potential.draw_reference(generator, min(config.ebm.batch_size, potential.rows_per_pass))
    kernel = build_kernel(config.kernel, potential)
    params = with_step_size(start_params(config.kernel, position), step_size)
    state = kernel.init(position)
    start = state.potential.double().mean()
    falls, rates, num_evals = [], [], []
    for _ in range(MAX_NUM_STEPS):
        state, info = kernel.step(generator, state, params)
        falls.append(start - state.potential.double().mean())
        rates.append(info.acceptance_rate.double().mean())
        num_evals.append(info.num_evals.double().mean())
    counts = torch.arange(1, MAX_NUM_STEPS + 1)
    mean_rates = torch.stack(rates).cpu().cumsum(0) / counts
    return Descent(
        torch.stack(falls).tolist(), (1 - mean_rates).tolist(), torch.stack(num_evals).cpu().cumsum(0).tolist()
    )


def _best_length(step_size: float, descent: Descent, max_rejection: float) -> Trial:
    """Choose the number of steps at one step size, within the bound if any number is."""
    trials = [
        Trial(step_size, index + 1, 1_000 * fall / (num_evals + FIXED_GRADIENTS), rejection)
        for index, (fall, rejection, num_evals) in enumerate(zip(*descent, strict=True))
    ]
    return chosen(trials, max_rejection)


def trained_copy(config: Config, data: Data, vaebm: VAEBM) -> NoisePotential:
    """Train an energy by the ratio for a while, for its slope.

    Args:
        config: the run's configuration.
        data: the data.
        vaebm: with an energy as it was made, which is trained in place.

    Returns:
        The potential of the averaged energy.
    """
    loop = config.ebm
    ratio = replace(
        loop,
        objective="ratio",
        tune=False,
        guard=False,
        steps=loop.tune_steps,
        num_importance=loop.batch_size,
    )
    brief = replace(config, ebm=ratio)
    learner = EnergyLearner(brief, data, vaebm, Guard(brief))
    for step in range(ratio.steps):
        learner.step(step, is_logged=False)
    return NoisePotential(VAEBM(vaebm.vae, learner.average.module))


def with_trial(config: Config, trial: Trial) -> Config:
    """Put a trial into a configuration.

    Args:
        config: the run's.
        trial: the one chosen.

    Returns:
        The same, with step size and number of transitions. A kernel whose step follows its acceptance in training
        follows the one found; langevin, whose step stays, is sampled with the same step.

    Raises:
        InputError: the trial's steps are never accepted, so there is nothing to follow.
    """
    is_fixed = config.kernel.name == "langevin"
    target = None if is_fixed else min(MAX_TARGET, round(1 - trial.rejection, 3))
    if target == 0:
        raise InputError(
            f"ebm.tune found no step of {config.kernel.name} that is accepted, down to {trial.step_size:.3g}: leave "
            "out --tune and set --kernel.step-size, or shorten ebm.tune-steps, after which the energy is flatter"
        )
    kernel = replace(config.kernel, step_size=trial.step_size, target_acceptance=target)
    sampling: KernelConfig = config.sampling.kernel
    if is_fixed and sampling.name == "langevin":
        sampling = replace(sampling, step_size=trial.step_size)
    return replace(
        config,
        ebm=replace(config.ebm, num_transitions=trial.num_steps),
        kernel=kernel,
        sampling=replace(config.sampling, kernel=sampling),
    )


def table(trials: Sequence[Trial], choice: Trial) -> str:
    """Lay trials out as text, smallest step first, with a mark at the one chosen."""
    head = f"{'step size':>10} {'steps':>6} {'fall per 1000 gradients':>24} {'rejection':>10}"
    rows = [
        f"{trial.step_size:>10.4g} {trial.num_steps:>6} {trial.fall:>19.4g} nats {trial.rejection:>10.3f}"
        + ("  <- chosen" if trial == choice else "")
        for trial in reversed(trials)
    ]
    return "\n".join([head, *rows])
