"""Dual averaging of the step size (Hoffman and Gelman 2014, section 3.2), on the mean acceptance over chains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, KernelState

# Hoffman and Gelman 2014, section 3.2.1.
STABILISATION, DECAY = 10.0, 0.75
# Chosen by us. Their 0.05 is for one chain; on the steadier mean over chains it makes the step swing, and HMC tuned to
# 0.75 on 10-dimensional Gaussians ended at 0.80 to 0.98 after 50 to 200 steps with 100 chains (this one: 0.71 to 0.83).
SHRINKAGE = 0.2
# A quarter turn forgets the position; a larger angle brings it back.
MAX_STEP_SIZE = math.pi / 2
# A chain that accepts nothing at this step never will, and a step that shrinks for ever would be 0 in float32. Chosen
# by us.
MIN_STEP_SIZE = 1e-6

# Robbins-Monro gain on log h per training update; the target moves slowly, so the gain is constant. Chosen by us.
STEP_SIZE_GAIN = 0.05

# A chain below this fraction of the target has not found its step, or stands where none will do. Chosen by us.
MIN_FRACTION_OF_TARGET = 0.1


class DualAveraging(NamedTuple):
    """State of the averaging; logs are of the step size."""

    log_step: float
    """Step to try next."""
    log_step_average: float
    """Step to keep when warm-up ends."""
    anchor: float
    """Where the iterates are shrunk to."""
    mean_error: float
    """Running mean of target minus acceptance."""
    num_updates: int
    """Updates so far."""


def start_averaging(step_size: float) -> DualAveraging:
    """Begin at a step size, with the anchor ten times above it so that large steps are tried first."""
    return DualAveraging(math.log(step_size), math.log(step_size), math.log(10 * step_size), 0.0, 0)


def update_averaging(averaging: DualAveraging, acceptance_rate: float, target: float) -> DualAveraging:
    """Take in one acceptance rate, the mean over chains, with its target.

    Both steps stay between :data:`MIN_STEP_SIZE` and :data:`MAX_STEP_SIZE`.
    """
    count = averaging.num_updates + 1
    weight = 1 / (count + STABILISATION)
    mean_error = (1 - weight) * averaging.mean_error + weight * (target - acceptance_rate)
    log_step = averaging.anchor - math.sqrt(count) / SHRINKAGE * mean_error
    log_step = max(math.log(MIN_STEP_SIZE), min(log_step, math.log(MAX_STEP_SIZE)))
    average = average_in(averaging.log_step_average, log_step, count)
    return DualAveraging(log_step, average, averaging.anchor, mean_error, count)


def average_in(average: float, value: float, count: int) -> float:
    """Take a value into an average of iterates that forgets early ones: number ``count`` weighs ``count^-DECAY``."""
    decay: float = count**-DECAY
    return decay * value + (1 - decay) * average


def warm_up(
    kernel: Kernel, generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
) -> tuple[KernelState, KernelParams, int]:
    """Run a kernel while tuning its step size, or what its own warm-up tunes; one without a target only runs.

    Returns:
        The state, the tuned parameters, and the evaluations spent over all chains; 0 steps change nothing.
    """
    if kernel.warm_up is not None and num_steps:
        return kernel.warm_up(generator, state, params, num_steps)
    averaging = start_averaging(float(params.step_size))
    num_evals = 0
    for _ in range(num_steps):
        state, info = kernel.step(generator, state, params)
        num_evals += int(info.num_evals.sum())
        if kernel.target_acceptance is not None:
            averaging = update_averaging(averaging, float(info.acceptance_rate.mean()), kernel.target_acceptance)
            params = with_step_size(params, math.exp(averaging.log_step))
    if num_steps and kernel.target_acceptance is not None:
        params = with_step_size(params, math.exp(averaging.log_step_average))
    return state, params, num_evals


def with_step_size(params: KernelParams, step_size: float) -> KernelParams:
    """Return the parameters with another step size; the other levels of a ladder keep theirs relative to it."""
    ladder = params.ladder
    if ladder is not None:
        step_sizes = ladder.step_sizes * (step_size / ladder.step_sizes[-1])
        step_sizes = step_sizes.clamp(MIN_STEP_SIZE, MAX_STEP_SIZE)
        step_sizes[0] = ladder.step_sizes[0]  # not a matter of acceptance
        ladder = ladder._replace(step_sizes=step_sizes)
    return params._replace(step_size=torch.full_like(params.step_size, step_size), ladder=ladder)


def follow_acceptance(params: KernelParams, acceptance_rate: float, target: float) -> KernelParams:
    """Move the step size a little towards a target acceptance, for a density that changes under its chains.

    The acceptance rate is the mean over chains; the step stays within :data:`MIN_STEP_SIZE` and :data:`MAX_STEP_SIZE`.
    """
    log_step = math.log(params.step_size) + STEP_SIZE_GAIN * (acceptance_rate - target)
    return with_step_size(params, max(MIN_STEP_SIZE, min(math.exp(log_step), MAX_STEP_SIZE)))


def acceptance_note(kernel: Kernel, acceptance_rate: Tensor) -> str | None:
    """Return a sentence if some chain hardly accepts, which a tuned step should not leave it to, else ``None``.

    Of acceptance rates ``(C, N)`` a chain's mean is held against :data:`MIN_FRACTION_OF_TARGET` of the kernel's target.
    """
    target = kernel.target_acceptance
    if target is None:
        return None
    means = acceptance_rate.mean(1)
    num_stuck = int((~(means >= MIN_FRACTION_OF_TARGET * target)).sum())
    if not num_stuck:
        return None
    return (
        f"{num_stuck} of {len(means)} chains accept less than {MIN_FRACTION_OF_TARGET * target:.2g} of their "
        f"proposals, where {kernel.name} is tuned to {target:.2g}: their draws repeat few positions; warm up for "
        "longer, or set a smaller step size"
    )
