"""Hamiltonian Monte Carlo on rows, by splitting against N(0, I) or by leapfrog.

Splitting (Beskos, Pinski, Sanz-Serna and Stuart 2011, "Hybrid Monte Carlo on Hilbert spaces"): half a
kick by grad Phi, the exact flow of ``|q|^2/2 + |p|^2/2``, which is a rotation of ``(q, p)``, half a
kick. The Gaussian part costs no accuracy, so the step does not shrink with the dimension and Phi = 0 is
sampled without error at any step. Leapfrog treats ``U = Phi + |q|^2/2`` as one potential.

The momentum is kept in whitened coordinates, ``p ~ N(0, I)``: an inverse mass m_i then only rescales
coordinate i's step to ``h * sqrt(m_i)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    Reference,
    init_with_grad,
    log_density_energy,
    metropolis,
    value_and_grad,
)

Integrator = Literal["splitting", "leapfrog"]

# Between the 0.65 that is optimal for leapfrog in high dimension (Beskos et al. 2013) and the 0.8 of Stan.
TARGET_ACCEPTANCE = 0.75
MAX_NUM_STEPS = 16
# What energy changes are added up in, whatever the dtype of positions: before chains of D = 150,000 have settled, a
# trajectory trades 100,000s of nats of potential for kinetic energy, which float32 would round to tenths of nats.
ENERGY_DTYPE = torch.float64


class Trajectory(NamedTuple):
    """Where a trajectory ends and what it did to the energy."""

    end: KernelState
    momentum: Tensor
    """Whitened momentum at the end, ``(C, D)``: integrating from the end with its sign flipped leads back."""
    energy_change: Tensor
    """Hamiltonian at the end minus at the start, ``(C,)``, float64, nats, formed by differences."""


class Flow(NamedTuple):
    """A Hamiltonian divided in two parts, each of which can be followed exactly."""

    force: Callable[[Tensor, Tensor], Tensor]
    """Gradient of the part that kicks, from the position and the gradient of Phi there."""
    drift: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Position and momentum after one step under the other part."""
    change: Callable[[KernelState, KernelState], Tensor]
    """Change between two states of what drifts do not conserve, but for the kinetic energy that kicks account for;
    ``(C,)``, float64."""


def build(
    potential: Potential,
    *,
    integrator: Integrator = "splitting",
    num_steps: int | None = None,
    max_num_steps: int = MAX_NUM_STEPS,
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
    """Follow one trajectory from given momenta, and accept or reject its end.

    Args:
        potential: Phi.
        generator: source of the acceptances.
        state: start.
        momentum: whitened, ``(C, D)``.
        params: inverse mass, and the Gaussian that splitting splits off; its step and length are not read.
        step_size: angle h, ``()``.
        num_steps: steps, at least 1.
        integrator: ``splitting`` or ``leapfrog``.

    Returns:
        The new state, the report of the step, and the trajectory that was proposed.
    """
    state, fill_evals = with_grad(potential, state)
    step_sizes = step_size * params.inverse_mass.sqrt()
    flow = make_flow(integrator, step_sizes, params.reference)
    trajectory = follow(potential, state, momentum, step_sizes, num_steps, flow)
    start_energy = log_density_energy(state) + 0.5 * momentum.double().square().sum(-1)
    new, rate, is_accepted, is_divergent = metropolis(generator, state, trajectory.end, trajectory.energy_change)
    num_evals = torch.full_like(is_accepted, num_steps + fill_evals, dtype=torch.int64)
    return new, KernelInfo(rate, is_accepted, is_divergent, start_energy, num_evals), trajectory


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
        integrator: ``splitting`` (against N(0, I)) or ``leapfrog``.

    Returns:
        The end and the change of the Hamiltonian. Under splitting the rotation conserves the Gaussian part
        exactly, so only kicks and Phi enter the change: its rounding error does not grow with ``|q|^2``.
    """
    return follow(potential, state, momentum, step_sizes, num_steps, make_flow(integrator, step_sizes))


def follow(
    potential: Potential, state: KernelState, momentum: Tensor, step_sizes: Tensor, num_steps: int, flow: Flow
) -> Trajectory:
    """Alternate kicks and drifts: half a kick, ``num_steps`` drifts with kicks between them, half a kick.

    Args:
        potential: Phi.
        state: start, with its gradient.
        momentum: whitened momentum, ``(C, D)``.
        step_sizes: of the kicks, ``(D,)`` or ``(C, 1)``.
        num_steps: drifts, at least 1.
        flow: how the Hamiltonian is divided between kick and drift.

    Returns:
        The end and the change of the Hamiltonian.
    """
    assert state.grad is not None
    half, whole = -0.5 * step_sizes, -step_sizes
    position = state.position
    momentum, change = _kick(momentum, half * flow.force(position, state.grad))
    for steps_left in reversed(range(num_steps)):
        position, momentum = flow.drift(position, momentum)
        value, grad = value_and_grad(potential, position)
        # The half kick that ends a step and the one that begins the next are one kick.
        momentum, gained = _kick(momentum, (whole if steps_left else half) * flow.force(position, grad))
        change += gained
    end = KernelState(position, value, grad)
    change += flow.change(state, end)
    return Trajectory(end, momentum, change)


def make_flow(integrator: Integrator, step_sizes: Tensor, reference: Reference | None = None) -> Flow:
    """Divide the Hamiltonian between kick and drift.

    Args:
        integrator: ``splitting`` or ``leapfrog``, which knows no reference.
        step_sizes: per-coordinate step, ``(D,)``; coordinate i of a reference turns by ``step_sizes[i] / scale[i]``.
        reference: what splitting splits off; ``None`` is N(0, I).

    Returns:
        The flow.
    """
    if integrator == "leapfrog":
        return Flow(
            force=lambda position, grad: grad + position,
            drift=lambda position, momentum: (position + step_sizes * momentum, momentum),
            change=lambda start, end: _potential_change(start, end) + _half_square_change(start.position, end.position),
        )
    if reference is None:
        cos, sin = step_sizes.cos(), step_sizes.sin()
        return Flow(
            force=lambda position, grad: grad,
            drift=lambda position, momentum: (position * cos + momentum * sin, momentum * cos - position * sin),
            change=_potential_change,
        )
    return _flow_about(reference, step_sizes)


def _flow_about(reference: Reference, step_sizes: Tensor) -> Flow:
    """Rotate ``(y, p)`` with ``y = (q - mean) / scale``, and kick by ``U(q) - |y|^2 / 2``."""
    mean, scale = reference
    precision = scale.square().reciprocal()
    angles = step_sizes / scale
    cos, sin = angles.cos(), angles.sin()

    def drift(position: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        y = (position - mean) / scale
        return mean + scale * (y * cos + momentum * sin), momentum * cos - y * sin

    def change(start: KernelState, end: KernelState) -> Tensor:
        whole = _potential_change(start, end) + _half_square_change(start.position, end.position)
        return whole - _half_square_change((start.position - mean) / scale, (end.position - mean) / scale)

    return Flow(lambda position, grad: grad + position - (position - mean) * precision, drift, change)


def _potential_change(start: KernelState, end: KernelState) -> Tensor:
    return end.potential.to(ENERGY_DTYPE) - start.potential


def _half_square_change(start: Tensor, end: Tensor) -> Tensor:
    """Return ``|end|^2 / 2 - |start|^2 / 2`` per chain, float64, which does not round with the squares."""
    return 0.5 * ((end - start) * (end + start)).sum(-1, dtype=ENERGY_DTYPE)


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
    gained = (kick * momentum.add(kick, alpha=0.5)).sum(-1, dtype=ENERGY_DTYPE)
    return momentum + kick, gained


def _jittered(generator: torch.Generator, step_size: Tensor, jitter: float) -> Tensor:
    if not jitter:
        return step_size
    uniform = torch.rand((), generator=generator, dtype=step_size.dtype, device=step_size.device)
    return step_size * (1 + jitter * (2 * uniform - 1))


def bounded(ratio: Tensor, max_num_steps: int) -> int:
    """Round a number of steps to the nearest from 1 to ``max_num_steps``."""
    return max(1, min(max_num_steps, round(float(ratio))))
