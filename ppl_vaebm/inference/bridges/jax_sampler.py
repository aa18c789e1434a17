"""Types that a JAX sampler consists of, and the target that it samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ppl_vaebm.inference.bridges.transitions import AnyArray, Transition

if TYPE_CHECKING:
    from jax import Array


class Tuned(NamedTuple):
    """Parameters after the warm-up; they differ between chains that adapt alone."""

    step_size: Array  # (C,)
    inverse_mass: Array  # (C, D)
    trajectory_length: Array  # (C,)


class JaxSampler(NamedTuple):
    """Three functions for JAX to trace; ``phi`` is Phi of one position, a ``jax.tree_util.Partial``."""

    start: Callable[[AnyArray, Array, Array], tuple[Any, Array]]
    """From phi, random keys ``(C,)`` and positions ``(C, D)`` to a state and the evaluations spent, ``(C,)``."""
    step: Callable[[AnyArray, Any], tuple[Any, Transition]]
    """From phi and a state to the next state and its draw."""
    tuned: Callable[[Any], Tuned]
    """Read the parameters from a state."""
    num_warm_steps: int = 0
    """Steps in which the sampler adapts before the draws; 0 where ``start`` contains the warm-up."""
    is_adjusted: bool = True
    """Whether a Metropolis test makes the draws exact."""


def potential_energy(phi: Any) -> Callable[[Array], Array]:
    """Make ``U = Phi + |q|^2 / 2`` of one chain, ``(D,)`` to ``()``."""
    return lambda position: phi(position) + 0.5 * (position @ position)


def log_density(phi: Any) -> Callable[[Array], Array]:
    """Make ``-U`` of one chain, ``(D,)`` to ``()``."""
    energy = potential_energy(phi)
    return lambda position: -energy(position)
