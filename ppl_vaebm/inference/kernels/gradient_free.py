"""Gradient-free kernels, which keep N(0, I) by construction: only Phi decides about a move.

Crank-Nicolson (Cotter, Roberts, Stuart and White 2013, "MCMC methods for functions"): ``q' = q cos h + n sin h`` with
n ~ N(0, I). At its full step, a quarter turn, it forgets q: independence Metropolis with the VAE as proposal.

Elliptical slice sampling (Murray, Adams and MacKay 2010): the points ``q cos t + n sin t`` form an ellipse on which
N(0, I) is constant; t is slice-sampled under exp(-Phi) with a bracket that shrinks towards t = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    draw_normal,
    init_without_grad,
    log_density_energy,
    metropolis,
    select,
    value_only,
)

FULL_STEP = math.pi / 2
# Near the 0.234 of random-walk Metropolis (Roberts, Gelman and Gilks 1997), which pCN is on the scale of Phi.
PCN_TARGET_ACCEPTANCE = 0.25
# Each shrink keeps on average half of a bracket of 2 pi, so 60 of them leave 5e-18, below float64's resolution.
MAX_SHRINKS = 60


def build_pcn(
    potential: Potential,
    *,
    step_size: float | None = None,
    target_acceptance: float = PCN_TARGET_ACCEPTANCE,
    name: str = "pcn",
) -> Kernel:
    """Make a Crank-Nicolson kernel: one evaluation without gradient per step.

    Args:
        potential: Phi, relative to N(0, I).
        step_size: a fixed angle in (0, pi/2]; ``None`` takes the parameters' step, which warm-up tunes.
        target_acceptance: what warm-up tunes the step to, where it is not fixed.
        name: the kernel's name.

    Raises:
        ValueError: a step outside (0, pi/2].
    """
    if step_size is not None and not 0 < step_size <= FULL_STEP:
        raise ValueError(f"the angle of a Crank-Nicolson step must be in (0, pi/2], got {step_size}")

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        noise = draw_normal(generator, state.position)
        if step_size == FULL_STEP:
            position = noise  # exactly, where cos(pi/2) would leave 6e-17 of the old position
        else:
            angles = params.inverse_mass.sqrt() * (params.step_size if step_size is None else step_size)
            position = state.position * angles.cos() + noise * angles.sin()
        proposal = KernelState(position, value_only(potential, position), None)
        energy_change = proposal.potential.double() - state.potential.double()
        new, rate, is_accepted, is_divergent = metropolis(generator, state, proposal, energy_change)
        num_evals = torch.ones_like(is_accepted, dtype=torch.int64)
        return new, KernelInfo(rate, is_accepted, is_divergent, log_density_energy(new), num_evals)

    return Kernel(name, init_without_grad(potential), step, target_acceptance if step_size is None else None)


def build_independence(potential: Potential, *, name: str = "independence") -> Kernel:
    """Make the kernel that proposes a fresh VAE sample: Crank-Nicolson at its full step, nothing to tune."""
    return build_pcn(potential, step_size=FULL_STEP, name=name)


def build_elliptical(potential: Potential, *, name: str = "elliptical") -> Kernel:
    """Make an elliptical slice kernel, with nothing to tune.

    ``num_evals`` is the number of points each chain tried; its acceptance rate is 1, unless :data:`MAX_SHRINKS` points
    were refused: the chain then stays, rate 0, flagged divergent.
    """

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        noise = draw_normal(generator, state.position)
        # Every uniform that a step may need is drawn here, so one chain's shrinks never shift another's randomness.
        uniforms = torch.rand(
            (len(noise), MAX_SHRINKS + 1), generator=generator, dtype=noise.dtype, device=noise.device
        )
        proposal, num_evals, is_accepted, saw_non_finite = _shrink(potential, state, noise, uniforms)
        new = select(is_accepted, proposal, state)
        rate = is_accepted.double()
        is_divergent = ~is_accepted | saw_non_finite
        return new, KernelInfo(rate, is_accepted, is_divergent, log_density_energy(new), num_evals)

    return Kernel(name, init_without_grad(potential), step, None)


def _shrink(
    potential: Potential, state: KernelState, noise: Tensor, uniforms: Tensor
) -> tuple[KernelState, Tensor, Tensor, Tensor]:
    """Shrink every chain's bracket until its point is on its slice; chains that are done are not evaluated again."""
    threshold = state.potential - torch.log1p(-uniforms[:, 0])  # a uniform of exactly 0 is allowed, 1 never occurs
    angle = 2 * math.pi * uniforms[:, 1]
    low, high = angle - 2 * math.pi, angle.clone()
    position, value = state.position.clone(), state.potential.clone()
    is_by_place = getattr(potential, "is_by_place", False)
    num_evals = torch.zeros_like(value, dtype=torch.int64)
    is_accepted = torch.zeros_like(value, dtype=torch.bool)
    saw_non_finite = torch.zeros_like(is_accepted)
    for attempt in range(1, MAX_SHRINKS + 1):
        active = (~is_accepted).nonzero().squeeze(-1)
        if not len(active):
            break
        rows = torch.arange(len(angle), device=angle.device) if is_by_place else active
        t = angle[rows].unsqueeze(-1)
        point = state.position[rows] * t.cos() + noise[rows] * t.sin()
        point_value = value_only(potential, point)
        if is_by_place:
            point, point_value = point[active], point_value[active]
        position[active], value[active] = point, point_value
        num_evals[active] += 1
        # Without isfinite a chain would take -inf and never leave it. The sum is as finite as the point.
        is_finite = point_value.isfinite() & point.sum(-1).isfinite()
        saw_non_finite[active] |= ~is_finite
        is_accepted[active] = is_finite & (point_value <= threshold[active])
        low = torch.where(angle < 0, angle, low)
        high = torch.where(angle < 0, high, angle)
        if attempt < MAX_SHRINKS:
            angle = low + (high - low) * uniforms[:, attempt + 1]
    return KernelState(position, value, None), num_evals, is_accepted, saw_non_finite
