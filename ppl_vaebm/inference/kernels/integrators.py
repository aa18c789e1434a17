"""Trajectories of Hamiltonian dynamics: splitting against N(0, I), or leapfrog.

A step is half a kick, a drift and half a kick. Leapfrog kicks by the gradient of ``U = Phi + |q|^2 / 2`` and drifts
straight. Splitting (Beskos, Pinski, Sanz-Serna and Stuart 2011, "Hybrid Monte Carlo on Hilbert spaces") kicks by that
of Phi and drifts along the exact flow of ``|q|^2/2 + |p|^2/2``, a rotation of ``(q, p)``: the Gaussian part costs no
accuracy, so the step does not shrink with the dimension, and Phi = 0 is sampled without error at any step.

The momentum is kept in whitened coordinates, ``p ~ N(0, I)``: an inverse mass m_i only rescales coordinate i's step to
``h * sqrt(m_i)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import DiagonalGaussian, KernelState, Potential, value_and_grad

Integrator = Literal["splitting", "leapfrog"]

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


def follow(
    potential: Potential, state: KernelState, momentum: Tensor, step_sizes: Tensor, num_steps: int, flow: Flow
) -> Trajectory:
    """Alternate kicks and drifts: half a kick, ``num_steps`` drifts with kicks between them, half a kick.

    The state has its gradient; momenta are whitened, ``(C, D)``; kicks have step sizes ``(D,)`` or ``(C, 1)``.
    Splitting conserves the Gaussian part exactly, so that only kicks and Phi enter the change of the Hamiltonian: its
    rounding error does not grow with ``|q|^2``.
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


def make_flow(integrator: Integrator, step_sizes: Tensor, reference: DiagonalGaussian | None = None) -> Flow:
    """Divide the Hamiltonian between kick and drift.

    Coordinate i drifts by ``step_sizes[i]``, of shape ``(D,)``; where splitting splits off a reference, it turns by
    ``step_sizes[i] / scale[i]``. Leapfrog knows no reference; ``None`` is N(0, I).
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


def _flow_about(reference: DiagonalGaussian, step_sizes: Tensor) -> Flow:
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


def _kick(momentum: Tensor, kick: Tensor) -> tuple[Tensor, Tensor]:
    """Kick the momentum; return it and the kinetic energy gained, ``(C,)``, float64."""
    gained = (kick * momentum.add(kick, alpha=0.5)).sum(-1, dtype=ENERGY_DTYPE)
    return momentum + kick, gained
