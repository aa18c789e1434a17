"""Hamiltonian Monte Carlo on rows: fresh momentum, a trajectory of :mod:`integrators`, accept or reject."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    draw_normal,
    hamiltonian,
    init_with_grad,
    metropolis,
    with_grad,
)
from ppl_vaebm.inference.kernels.integrators import Integrator, Trajectory, follow, make_flow

# Between the 0.65 that is optimal for leapfrog in high dimension (Beskos et al. 2013) and the 0.8 of Stan.
HMC_TARGET_ACCEPTANCE = 0.75
HMC_MAX_NUM_STEPS = 16


def build(
    potential: Potential,
    *,
    integrator: Integrator = "splitting",
    num_steps: int | None = None,
    max_num_steps: int = HMC_MAX_NUM_STEPS,
    jitter: float = 0.0,
    target_acceptance: float = HMC_TARGET_ACCEPTANCE,
    name: str = "hmc",
) -> Kernel:
    """Make an HMC kernel: fresh momentum, one trajectory, accept or reject each chain on its own.

    Args:
        potential: Phi, relative to N(0, I).
        integrator: ``splitting`` or ``leapfrog``.
        num_steps: integration steps per trajectory; ``None`` takes ``round(trajectory_length / step_size)`` of the
            parameters, between 1 and ``max_num_steps``.
        max_num_steps: bound on them.
        jitter: each trajectory's angle is multiplied by a uniform draw from ``[1 - jitter, 1 + jitter]``, one draw for
            all chains, at an unchanged number of steps.
        target_acceptance: what warm-up tunes the step size to.
        name: the kernel's name.

    Returns:
        The kernel; ``num_steps`` evaluations with gradient per step, one more after a gradient-free kernel.

    Raises:
        ValueError: an unknown integrator, a number of steps below 1, or jitter outside [0, 1).
    """
    if integrator not in get_args(Integrator):
        raise ValueError(f"integrator must be one of {', '.join(get_args(Integrator))}, got {integrator!r}")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must be in [0, 1), got {jitter}")

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        momentum = draw_normal(generator, state.position)
        h = _jittered(generator, params.step_size, jitter)
        steps = num_steps or bounded(params.trajectory_length / params.step_size, max_num_steps)
        new, info, _ = transition(potential, generator, state, momentum, params, h, steps, integrator)
        return new, info

    return Kernel(name, init_with_grad(potential), step, target_acceptance)


def transition(
    potential: Potential,
    generator: torch.Generator,
    state: KernelState,
    momentum: Tensor,
    params: KernelParams,
    step_size: Tensor,
    num_steps: int,
    integrator: Integrator,
) -> tuple[KernelState, KernelInfo, Trajectory]:
    """Follow one trajectory from whitened momenta ``(C, D)``, and accept or reject its end; return it too.

    The angle ``step_size`` is taken ``num_steps`` times; step and length of the parameters are not read.
    """
    state, fill_evals = with_grad(potential, state)
    step_sizes = step_size * params.inverse_mass.sqrt()
    flow = make_flow(integrator, step_sizes, params.reference)
    trajectory = follow(potential, state, momentum, step_sizes, num_steps, flow)
    new, rate, is_accepted, is_divergent = metropolis(generator, state, trajectory.end, trajectory.energy_change)
    num_evals = torch.full_like(is_accepted, num_steps + fill_evals, dtype=torch.int64)
    return new, KernelInfo(rate, is_accepted, is_divergent, hamiltonian(state, momentum), num_evals), trajectory


def _jittered(generator: torch.Generator, step_size: Tensor, jitter: float) -> Tensor:
    if not jitter:
        return step_size
    uniform = torch.rand((), generator=generator, dtype=step_size.dtype, device=step_size.device)
    return step_size * (1 + jitter * (2 * uniform - 1))


def bounded(ratio: Tensor, max_num_steps: int) -> int:
    """Round a number of steps to the nearest from 1 to ``max_num_steps``."""
    return max(1, min(max_num_steps, round(float(ratio))))
