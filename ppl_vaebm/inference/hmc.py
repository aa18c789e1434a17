"""Hamiltonian Monte Carlo on rows, by splitting against N(0, I) or by leapfrog.

Splitting (Beskos, Pinski, Sanz-Serna and Stuart 2011, "Hybrid Monte Carlo on Hilbert spaces"): half a
kick by grad Phi, the exact flow of ``|q|^2/2 + |p|^2/2``, which is a rotation of ``(q, p)``, half a
kick. The Gaussian part costs no accuracy, so the step does not shrink with the dimension and Phi = 0 is
sampled without error at any step. Leapfrog treats ``U = Phi + |q|^2/2`` as one potential.

The momentum is kept in whitened coordinates, ``p ~ N(0, I)``: an inverse mass m_i then only rescales
coordinate i's step to ``h * sqrt(m_i)``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ppl_vaebm.inference.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    init_with_grad,
    log_density_energy,
    metropolis,
    value_and_grad,
)

Integrator = Literal["splitting", "leapfrog"]

# Between the 0.65 that is optimal for leapfrog in high dimension (Beskos et al. 2013) and the 0.8 of Stan.
TARGET_ACCEPTANCE = 0.75


class Trajectory(NamedTuple):
    """Where a trajectory ends and what it did to the energy."""

    end: KernelState
    momentum: Tensor
    """Whitened momentum at the end, ``(C, D)``: integrating from the end with its sign flipped leads back."""
    energy_change: Tensor
    """Hamiltonian at the end minus at the start, ``(C,)``, float64, nats, formed by differences."""


def build(
    potential: Potential,
    *,
    integrator: Integrator = "splitting",
    num_steps: int | None = None,
    max_num_steps: int = 16,
    jitter: float = 0.0,
    target_acceptance: float = TARGET_ACCEPTANCE,
    name: str = "hmc",
) -> Kernel:
    """Make an HMC kernel: fresh momentum, one trajectory, accept or reject each chain on its own.

    Args:
        potential: Phi, relative to N(0, I).
        integrator: ``splitting`` or ``leapfrog``.
        num_steps: integration steps per trajectory; ``None`` takes
            ``round(trajectory_length / step_size)`` of the parameters, between 1 and ``max_num_steps``.
        max_num_steps: bound on the steps of one trajectory where ``num_steps`` is not given.
        jitter: each trajectory's angle is multiplied by a uniform draw from ``[1 - jitter, 1 + jitter]``, one
            draw for all chains, at an unchanged number of steps; 0 is a fixed trajectory.
        target_acceptance: what warm-up tunes the step size to.
        name: the kernel's name.

    Returns:
        The kernel; ``num_steps`` evaluations with gradient per step, and one more where the state came
        from a gradient-free kernel.

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
        state, fill_evals = with_grad(potential, state)
        momentum = draw_normal(generator, state.position)
        h = _jittered(generator, params.step_size, jitter)
        steps = num_steps or _num_steps(params, max_num_steps)
        trajectory = integrate(potential, state, momentum, h * params.inverse_mass.sqrt(), steps, integrator)
        start_energy = log_density_energy(state) + 0.5 * momentum.double().square().sum(-1)
        new, rate, is_accepted, is_divergent = metropolis(generator, state, trajectory.end, trajectory.energy_change)
        num_evals = torch.full_like(is_accepted, steps + fill_evals, dtype=torch.int64)
        return new, KernelInfo(rate, is_accepted, is_divergent, start_energy, num_evals)

    return Kernel(name, init_with_grad(potential), step, target_acceptance)


def integrate(
    potential: Potential,
    state: KernelState,
    momentum: Tensor,
    step_sizes: Tensor,
    num_steps: int,
    integrator: Integrator,
) -> Trajectory:
    """Follow the Hamiltonian flow from a state.

    Args:
        potential: Phi.
        state: start, with its gradient.
        momentum: whitened momentum, ``(C, D)``.
        step_sizes: per-coordinate angle, ``(D,)``.
        num_steps: steps, at least 1.
        integrator: ``splitting`` or ``leapfrog``.

    Returns:
        The end and the change of the Hamiltonian. Under splitting the rotation conserves the Gaussian part
        exactly, so only kicks and Phi enter the change: its rounding error does not grow with ``|q|^2``.
    """
    assert state.grad is not None
    is_splitting = integrator == "splitting"
    half, whole = -0.5 * step_sizes, -step_sizes
    if is_splitting:
        cos, sin = step_sizes.cos(), step_sizes.sin()
    position = state.position
    force = state.grad if is_splitting else state.grad + position
    momentum, change = _kick(momentum, half * force)
    for steps_left in reversed(range(num_steps)):
        if is_splitting:
            position, momentum = position * cos + momentum * sin, momentum * cos - position * sin
        else:
            position = position + step_sizes * momentum
        value, grad = value_and_grad(potential, position)
        force = grad if is_splitting else grad + position
        # The half kick that ends a step and the one that begins the next are one kick.
        momentum, gained = _kick(momentum, (whole if steps_left else half) * force)
        change += gained
    change += value.double() - state.potential
    if not is_splitting:
        moved, total = position - state.position, position + state.position
        change += 0.5 * (moved * total).sum(-1, dtype=torch.float64)
    return Trajectory(KernelState(position, value, grad), momentum, change)


def with_grad(potential: Potential, state: KernelState) -> tuple[KernelState, int]:
    """Fill in the gradient that a gradient-free kernel left out; return also the evaluations that took, 0 or 1."""
    if state.grad is not None:
        return state, 0
    return KernelState(state.position, *value_and_grad(potential, state.position)), 1


def draw_normal(generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw standard normals shaped, typed and placed like a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _kick(momentum: Tensor, kick: Tensor) -> tuple[Tensor, Tensor]:
    """Kick the momentum; return it and the kinetic energy gained, ``(C,)``, float64."""
    gained = (kick * momentum.add(kick, alpha=0.5)).sum(-1, dtype=torch.float64)
    return momentum + kick, gained


def _jittered(generator: torch.Generator, step_size: Tensor, jitter: float) -> Tensor:
    if not jitter:
        return step_size
    uniform = torch.rand((), generator=generator, dtype=step_size.dtype, device=step_size.device)
    return step_size * (1 + jitter * (2 * uniform - 1))


def _num_steps(params: KernelParams, max_num_steps: int) -> int:
    ratio = float(params.trajectory_length / params.step_size)
    return max(1, min(max_num_steps, round(ratio)))
