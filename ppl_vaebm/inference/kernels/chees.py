"""HMC whose trajectories are tuned across chains by the ChEES criterion.

Hoffman, Radul and Sountsov 2021, "An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte
Carlo". Each trajectory goes a uniform fraction of the longest one, the same for all chains. The longest one, an angle,
climbs the criterion by Adam while dual averaging tunes the step. Warm-up also fits a Gaussian
with independent coordinates to the chains: the inverse mass of leapfrog, and what splitting splits off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.kernels.adaptation import (
    DualAveraging,
    average_in,
    start_averaging,
    update_averaging,
    with_step_size,
)
from ppl_vaebm.inference.kernels.base import (
    DiagonalGaussian,
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    draw_normal,
    init_with_grad,
)
from ppl_vaebm.inference.kernels.integrators import Integrator, Trajectory

# Hoffman, Radul and Sountsov 2021; the target is that of Beskos et al. 2013 for leapfrog in high dimension.
CHEES_TARGET_ACCEPTANCE = 0.651
LEARNING_RATE, SQUARE_DECAY = 0.025, 0.95
# That of TensorFlow Probability and of BlackJAX. A trajectory that long is a step size that went wrong.
CHEES_MAX_NUM_STEPS = 1000
# One chain has no spread to measure.
MIN_CHAINS = 2
# Fractions of the warm-up after which the Gaussian is fitted anew, to the draws since the last fit; what is left is for
# the step and the length that suit the last fit. Chosen by us.
FIT_AFTER = (0.1, 0.3, 0.6)
# A mean must differ from 0, or a variance from 1, as significantly as a normal variable at so many standard deviations,
# for its coordinate to leave N(0, 1): noise in thousands of coordinates must not cost what a few fitted ones gain.
# Chosen by us.
MIN_Z = 3.0
NUM_BISECTIONS = 60
# Chains' worth of N(0, 1) that a fit starts from; Stan's shrinkage of variances has the same number of draws.
PRIOR_CHAINS = 5.0


class Moments(NamedTuple):
    """Sums over draws of every chain since the last fit."""

    num_draws: int
    total: Tensor
    """``(C, D)``, float64."""
    square: Tensor
    """``(C, D)``, float64."""


class Tuning(NamedTuple):
    """State of the warm-up."""

    averaging: DualAveraging
    log_length: float
    """Log of the longest trajectory, an angle."""
    log_length_average: float
    """The same, averaged over steps as the log of the step size is."""
    square_gradient: float
    """Running mean of squared gradients of the criterion in ``log_length``."""
    num_gradients: int


def build(
    potential: Potential,
    *,
    integrator: Integrator = "splitting",
    max_num_steps: int = CHEES_MAX_NUM_STEPS,
    target_acceptance: float = CHEES_TARGET_ACCEPTANCE,
    fits_reference: bool = True,
    name: str = "chees",
) -> Kernel:
    """Make the kernel.

    Deviations from the paper: the fraction of a trajectory is a Halton sequence in warm-up only, and a uniform draw u
    in the sampling stage, where a step does not know how many came before it; and moves are measured in units of the
    fitted Gaussian, so that wide coordinates do not hide the others.

    Args:
        potential: Phi, relative to N(0, I).
        integrator: ``splitting`` or ``leapfrog``.
        max_num_steps: bound on the steps of one trajectory.
        target_acceptance: what warm-up tunes the step size to: the harmonic mean over chains.
        fits_reference: whether warm-up fits a Gaussian to the chains.
        name: the kernel's name.

    Returns:
        The kernel. A step takes ``ceil(u * trajectory_length / step_size)`` evaluations with gradient.

    Raises:
        ValueError: a bound below 1.
    """
    if max_num_steps < 1:
        raise ValueError(f"max_num_steps must be at least 1, got {max_num_steps}")

    def move(
        generator: torch.Generator, state: KernelState, params: KernelParams, fraction: float
    ) -> tuple[KernelState, KernelInfo, Trajectory]:
        momentum = draw_normal(generator, state.position)
        ratio = fraction * float(params.trajectory_length) / float(params.step_size)
        steps = max(1, math.ceil(min(ratio, max_num_steps)))
        return hmc.transition(potential, generator, state, momentum, params, params.step_size, steps, integrator)

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        fraction = torch.rand((), generator=generator, dtype=torch.float64, device=state.position.device)
        new, info, _ = move(generator, state, params, float(fraction))
        return new, info

    def warm_up(
        generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
    ) -> tuple[KernelState, KernelParams, int]:
        if len(state.position) < MIN_CHAINS:
            raise InputError(f"{name} tunes across chains: expected {MIN_CHAINS} or more, found 1; run more chains")
        fits = [round(fraction * num_steps) for fraction in FIT_AFTER] if fits_reference else [0]
        tuning, moments, num_evals = _start(params), _no_moments(state.position), 0
        for index in range(1, num_steps + 1):
            fraction = halton(index)
            new, info, trajectory = move(generator, state, params, fraction)
            angle = fraction * float(params.trajectory_length)
            # By the log of the longest trajectory, of which this one's angle is a fixed fraction.
            gradient = angle * criterion_gradient(state, trajectory, info, params)
            state, num_evals = new, num_evals + int(info.num_evals.sum())
            tuning = _update(tuning, info, gradient, target_acceptance, max_num_steps)
            params = _with(params, tuning.averaging.log_step, tuning.log_length)
            if index <= fits[-1]:
                moments = _add(moments, state.position)
            if index in fits:
                params = _refit(params, moments, integrator)
                tuning, moments = _start(params), _no_moments(state.position)
        return state, _with(params, tuning.averaging.log_step_average, tuning.log_length_average), num_evals

    def report(state: KernelState, params: KernelParams) -> dict[str, float | list[float]]:
        return {"trajectory_length": float(params.trajectory_length)}

    return Kernel(name, init_with_grad(potential), step, target_acceptance, warm_up, report)


def halton(index: int) -> float:
    """Return element ``index``, from 1, of the Halton sequence of base 2: 1/2, 1/4, 3/4, 1/8, 5/8, ..."""
    value, weight = 0.0, 0.5
    while index:
        value, weight, index = value + weight * (index % 2), weight / 2, index // 2
    return value


def criterion_gradient(start: KernelState, trajectory: Trajectory, info: KernelInfo, params: KernelParams) -> float:
    """Estimate the derivative of ChEES by the angle of a trajectory as the paper does, up to a constant factor.

    With positions in units of ``sqrt(inverse_mass)`` and their mean over chains taken off, it is the mean of
    ``(|q'|^2 - |q|^2) <q', p'>``, weighted by acceptance; p', the whitened momentum at the end, is the velocity there.
    A proposal that is not finite has no weight, and without any weight the estimate is 0.
    """
    weight = info.acceptance_rate.to(start.position)
    total = float(weight.sum())
    if not total > 0:
        return 0.0
    rows = weight.unsqueeze(1)
    scale = params.inverse_mass.sqrt()
    ends = torch.where(rows > 0, trajectory.end.position, 0.0)
    momentum = torch.where(rows > 0, trajectory.momentum, 0.0)
    before = (start.position - start.position.mean(0)) / scale
    after = (ends - (rows * ends).sum(0) / total) / scale
    gained = (after.square() - before.square()).sum(1, dtype=torch.float64)
    speed = (after * momentum).sum(1, dtype=torch.float64)
    return float((info.acceptance_rate * gained * speed).sum() / info.acceptance_rate.sum())


def fit_gaussian(moments: Moments, like: Tensor) -> DiagonalGaussian:
    """Fit mean and scale of every coordinate that is not N(0, 1) to within the error of two chains or more.

    The mean and the log of the variance are shrunk towards N(0, 1) by ``C / (C + PRIOR_CHAINS)``. Chains count, and not
    their draws, which may not be independent. What is not finite stays N(0, 1).
    """
    num_chains = len(moments.total)
    means = moments.total / moments.num_draws
    mean = means.mean(0)
    variances = moments.square / moments.num_draws - mean * (2 * means - mean)
    variance = variances.mean(0)
    t_mean = mean.abs() / (means.std(0) / math.sqrt(num_chains))
    t_variance = (variance - 1).abs() / (variances.std(0) / math.sqrt(num_chains))
    is_other = (
        (torch.maximum(t_mean, t_variance) > t_bound(MIN_Z, num_chains - 1)) & (variance > 0) & variance.isfinite()
    )
    weight = num_chains / (num_chains + PRIOR_CHAINS)
    return DiagonalGaussian(
        torch.where(is_other, weight * mean, 0.0).to(like),
        torch.where(is_other, variance, 1.0).pow(weight / 2).to(like),
    )


def t_bound(z: float, degrees: int) -> float:
    """Return what ``|t|`` of Student's distribution exceeds as often as a normal variable exceeds ``|z|``."""
    low, high, inside = 0.0, math.pi / 2, math.erf(z / math.sqrt(2))
    for _ in range(NUM_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _t_inside(middle, degrees) < inside else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _t_inside(angle: float, degrees: int) -> float:
    """Probability of ``|t| < sqrt(degrees) tan(angle)`` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    odd, cosine = degrees % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for index in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (index + 1) / (index + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def harmonic_mean(info: KernelInfo) -> float:
    """Average acceptance rates over chains that did not diverge so that one that hardly moves counts most.

    It is 0 where all of them diverged.
    """
    rates = info.acceptance_rate[~info.is_divergent]
    return float(1 / (1 / rates).mean()) if len(rates) else 0.0


def _no_moments(position: Tensor) -> Moments:
    zeros = torch.zeros_like(position, dtype=torch.float64)
    return Moments(0, zeros, zeros)


def _add(moments: Moments, position: Tensor) -> Moments:
    position = position.double()
    return Moments(moments.num_draws + 1, moments.total + position, moments.square + position.square())


def _refit(params: KernelParams, moments: Moments, integrator: Integrator) -> KernelParams:
    """Move to a new Gaussian.

    The longest trajectory stays as long where coordinates are wider than was known. Where they are narrower it keeps
    its angle: as long in the old unit it would go round the new Gaussian many times.
    """
    reference = fit_gaussian(moments, params.inverse_mass)
    inverse_mass = reference.scale.square()
    factor = (params.inverse_mass.mean() / inverse_mass.mean()).sqrt()
    return params._replace(
        inverse_mass=inverse_mass,
        trajectory_length=params.trajectory_length * factor.clamp(max=1),
        reference=reference if integrator == "splitting" else None,
    )


def _start(params: KernelParams) -> Tuning:
    log_length = math.log(params.trajectory_length)
    return Tuning(start_averaging(float(params.step_size)), log_length, log_length, 0.0, 0)


def _update(tuning: Tuning, info: KernelInfo, gradient: float, target_acceptance: float, max_num_steps: int) -> Tuning:
    averaging = update_averaging(tuning.averaging, harmonic_mean(info), target_acceptance)
    count = tuning.num_gradients + 1
    square = SQUARE_DECAY * tuning.square_gradient + (1 - SQUARE_DECAY) * gradient**2
    # Adam without momentum: its step in log_length does not depend on the scale of the criterion.
    scale = math.sqrt(square / (1 - SQUARE_DECAY**count))
    log_length = tuning.log_length + (LEARNING_RATE * gradient / scale if scale > 0 else 0.0)
    log_length = min(max(log_length, averaging.log_step), averaging.log_step + math.log(max_num_steps))
    average = average_in(tuning.log_length_average, log_length, count)
    return Tuning(averaging, log_length, average, square, count)


def _with(params: KernelParams, log_step: float, log_length: float) -> KernelParams:
    length = torch.full_like(params.trajectory_length, math.exp(log_length))
    return with_step_size(params, math.exp(log_step))._replace(trajectory_length=length)
