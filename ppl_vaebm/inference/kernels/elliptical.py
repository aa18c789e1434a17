"""Elliptical slice sampling (Murray, Adams and MacKay 2010): gradient-free, nothing to tune.

A draw n from N(0, I) and the position span an ellipse of points ``q cos t + n sin t`` on which N(0, I) is
constant; the angle t is slice-sampled under exp(-Phi) with a bracket that shrinks towards t = 0.
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
    init_without_grad,
    log_density_energy,
    select,
    value_only,
)
from ppl_vaebm.inference.kernels.hmc import draw_normal

# Each shrink keeps on average half of a bracket of 2 pi, so 60 of them leave 5e-18, below float64's resolution.
MAX_SHRINKS = 60


def build_elliptical(potential: Potential, *, name: str = "elliptical") -> Kernel:
    """Make an elliptical slice kernel.

    Args:
        potential: Phi, relative to N(0, I).
        name: the kernel's name.

    Returns:
        The kernel. ``num_evals`` is the number of points each chain tried; its acceptance rate is 1, unless
        :data:`MAX_SHRINKS` points were refused: the chain then stays, rate 0, flagged divergent.
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
    num_evals = torch.zeros_like(value, dtype=torch.int64)
    is_accepted = torch.zeros_like(value, dtype=torch.bool)
    saw_non_finite = torch.zeros_like(is_accepted)
    for attempt in range(1, MAX_SHRINKS + 1):
        active = (~is_accepted).nonzero().squeeze(-1)
        if not len(active):
            break
        t = angle[active].unsqueeze(-1)
        point = state.position[active] * t.cos() + noise[active] * t.sin()
        point_value = value_only(potential, point)
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
