"""Search for the step size and the number of steps of the training chains, before training.

Chains from fresh noise, as training starts them, descend the energy. The measure is how far they come for what an
update costs, as long as the steps would be accepted. An untrained energy has no slope, so the energy is a copy that
the density ratio has trained for a while. It is flatter than the one at the end (on digits MALA's step falls from 1.57
after 50 steps to 0.39), which a kernel whose step follows its acceptance makes up for in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm import losses
from ppl_vaebm.inference.ebm.state import Training
from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE, with_step_size
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import stream
from ppl_vaebm.tables import text_table

NUM_RATIO_STEPS = 500
"""Steps of the density ratio that train the copy; after few the energy is flat, and the step found too large. Chosen by
us."""
MAX_REJECTION = 0.25
"""Largest Metropolis rejection that the step found may have, or would have had. Chosen by us."""
LONGEST_CHAIN = 40
"""Most steps tried; the published chains have 6 to 10 in training (Xiao et al. 2021)."""
STEP_RATIO = 2**-0.5
"""From one step size tried to the next; the fall per gradient is flat to a few percent over it."""
SMALLEST_STEP = 1e-3
"""Last step size tried; the smallest published one is 1.7e-3."""
NUM_WORSE = 3
"""Step sizes in a row that do worse than the best, after which smaller ones are not tried. Chosen by us."""
MAX_TARGET = 0.99
"""Largest target acceptance: at 1 a kernel's step would shrink for ever."""
FIXED_GRADIENTS = 2.0
"""Cost of an update beside its chains' steps, in gradients of as many chains: their first one, and the loss's on data
and negatives, which has no decoder but two batches."""


class Trial(NamedTuple):
    """A step size and a number of steps, and their result."""

    step_size: float
    """The angle h."""
    num_steps: int
    """Kernel steps of an update."""
    fall: float
    """Of the mean energy, nats per 1,000 gradients, :data:`FIXED_GRADIENTS` of every update included."""
    rejection: float
    """Mean Metropolis rejection of those steps, for an unadjusted kernel that which they would have had."""


def search(config: Config, data: Data, vae: HierarchicalVAE) -> tuple[Trial, str]:
    """Choose step size and number of steps; return the trial chosen, and a text that shows all."""
    trials = tune(config, trained_copy(config, data, vae))
    choice = choose(trials)
    text = f"tuned on the energy after {NUM_RATIO_STEPS} steps of the ratio:\n{trial_table(trials, choice)}"
    if choice.rejection > MAX_REJECTION:
        text += f"\nnote: no step size has a rejection of at most {MAX_REJECTION:g}; the least is taken"
    return choice, text


def trained_copy(config: Config, data: Data, vae: HierarchicalVAE) -> NoisePotential:
    """Train an energy by the density ratio for a while; return the potential of its average."""
    loop = replace(config.ebm, steps=NUM_RATIO_STEPS)
    training = Training(replace(config, ebm=loop), data, vae, config.seed)
    energy, potential = training.vaebm.energy, training.chains.potential
    for step in range(NUM_RATIO_STEPS):
        x, z = training.batch(step)
        generator = stream(config.seed, "negatives", step, device=config.device)
        energy_data = energy(x, z)
        energy_draws = potential(potential.draw_reference(generator, loop.batch_size))
        loss = losses.density_ratio(energy_data, energy_draws)
        loss = loss + loop.energy_l2 * losses.mean_square(energy_data, energy_draws)
        if loop.spectral_penalty:
            loss = loss + loop.spectral_penalty * training.spectral()
        training.optimizer.step(loss, step)
        training.average.update(energy)
    return noise_potential(training.averaged())


def tune(config: Config, potential: NoisePotential, max_rejection: float = MAX_REJECTION) -> list[Trial]:
    """Try step sizes from the largest down, with a bound on the rejection in (0, 1); the kernel's own is not read."""
    trials: list[Trial] = []
    step_size, num_worse, best = MAX_STEP_SIZE, 0, -math.inf
    while step_size >= SMALLEST_STEP and num_worse < NUM_WORSE:
        trial = choose(descend(config, potential, step_size), max_rejection)
        trials.append(trial)
        if trial.rejection <= max_rejection:
            num_worse = 0 if trial.fall > best else num_worse + 1
            best = max(best, trial.fall)
        step_size *= STEP_RATIO
    return trials


def choose(trials: Sequence[Trial], max_rejection: float = MAX_REJECTION) -> Trial:
    """Return the trial with the largest fall within a bound on the rejection; if none is, the least rejection."""
    within = [trial for trial in trials if trial.rejection <= max_rejection]
    return max(within, key=lambda trial: trial.fall) if within else min(trials, key=lambda trial: trial.rejection)


def descend(config: Config, potential: NoisePotential, step_size: float) -> list[Trial]:
    """Run chains from fresh noise, the same for every step size h, and return a trial after every step."""
    generator = stream(config.seed, "tune", device=config.device)
    position = potential.draw_reference(generator, config.ebm.batch_size)
    kernel = build_kernel(config.kernel, potential)
    params = with_step_size(start_params(config.kernel, position), step_size)
    state = kernel.init(position)
    start = state.potential.double().mean()
    falls, rejections, num_evals = [], [], []
    for _ in range(LONGEST_CHAIN):
        state, info = kernel.step(generator, state, params)
        falls.append(start - state.potential.double().mean())
        rejections.append(1 - info.acceptance_rate.double().mean())
        num_evals.append(info.num_evals.double().mean())
    steps = torch.arange(1, LONGEST_CHAIN + 1)
    rates = 1_000 * torch.stack(falls).cpu() / (torch.stack(num_evals).cpu().cumsum(0) + FIXED_GRADIENTS)
    mean_rejections = torch.stack(rejections).cpu().cumsum(0) / steps
    columns = (steps.tolist(), rates.tolist(), mean_rejections.tolist())
    return [Trial(step_size, *row) for row in zip(*columns, strict=True)]


def with_trial(config: Config, trial: Trial) -> Config:
    """Put a trial's step size and number of transitions into a configuration; InputError if it accepts no step.

    A kernel whose step follows its acceptance in training follows the one of the trial; langevin, whose step stays, is
    sampled with the same step.
    """
    is_fixed = config.kernel.name == "langevin"
    target = None if is_fixed else min(MAX_TARGET, round(1 - trial.rejection, 3))
    if target == 0:
        raise InputError(
            f"ebm.tune found no step of {config.kernel.name} that is accepted, down to {trial.step_size:.3g}: leave "
            "out --tune and set --kernel.step-size"
        )
    kernel = replace(config.kernel, step_size=trial.step_size, target_acceptance=target)
    sampling = config.sampling
    if is_fixed and sampling.kernel.name == "langevin":
        sampling = replace(sampling, kernel=replace(sampling.kernel, step_size=trial.step_size))
    loop = replace(config.ebm, num_transitions=trial.num_steps)
    return replace(config, ebm=loop, kernel=kernel, sampling=sampling)


def trial_table(trials: Sequence[Trial], choice: Trial) -> str:
    """Lay trials out as text, smallest step first, with a mark at the one chosen."""
    rows = []
    for trial in reversed(trials):
        numbers = [f"{trial.step_size:.4g}", str(trial.num_steps), f"{trial.fall:.4g} nats", f"{trial.rejection:.3f}"]
        rows.append([*numbers, "<- chosen" if trial == choice else ""])
    headers = ["step size", "steps", "fall per 1000 gradients", "rejection", ""]
    return text_table(rows, headers, numbers=(0, 1, 2, 3))
