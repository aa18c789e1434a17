"""What a JAX sampler is to us: all chains at once, from a start through its own warm-up to draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from jax import Array


AnyArray: TypeAlias = Any
"""JAX's array where a function is traced, numpy's once it has been run."""


class Options(NamedTuple):
    """What a sampler is told; a program is compiled for each set of them."""

    num_warmup: int
    """Steps of the sampler's own adaptation; 0 keeps ``step_size`` and unit mass."""
    step_size: float
    """Leapfrog step, or where its adaptation starts."""
    trajectory_length: float
    """Of HMC, and of what starts from HMC's."""
    target_acceptance: float
    """What the adaptation aims at, where there is an acceptance rate."""
    max_tree_depth: int
    """Bound on NUTS's doublings."""


class Draw(NamedTuple):
    """One transition of every chain; or several, with an axis in front."""

    position: AnyArray
    """``(C, D)``."""
    potential_energy: AnyArray
    """U there, ``(C,)``, nats."""
    acceptance_rate: AnyArray
    """``(C,)``."""
    is_divergent: AnyArray
    """``(C,)``."""
    energy: AnyArray
    """``(C,)``, nats: the Hamiltonian of the transition; U where the step ends, for a sampler without one."""
    num_evals: AnyArray
    """Evaluations of Phi with gradient that this chain's own trajectory took, ``(C,)``."""


class Tuned(NamedTuple):
    """What the warm-up left; chains that adapt alone differ."""

    step_size: Array
    """``(C,)``."""
    inverse_mass: Array
    """``(C, D)``."""
    trajectory_length: Array
    """``(C,)``."""


class Sampler(NamedTuple):
    """Three functions for JAX to trace. Two of them take Phi, as :func:`potential_energy` does."""

    start: Callable[[AnyArray, Array, Array], tuple[Any, Array]]
    """From random keys ``(C,)`` and positions ``(C, D)`` to a state, and the evaluations that took, ``(C,)``."""
    step: Callable[[AnyArray, Any], tuple[Any, Draw]]
    """One transition."""
    tuned: Callable[[Any], Tuned]
    """Read the parameters out of a state."""
    num_warm_steps: int = 0
    """Steps in which the sampler adapts before the draws; 0 where ``start`` does it."""
    is_adjusted: bool = True
    """Whether a Metropolis test makes the draws exact."""


def potential_energy(phi: Any) -> Callable[[Array], Array]:
    """Make ``U = Phi + |q|^2 / 2`` of one chain, ``(D,)`` to ``()``.

    Args:
        phi: a ``jax.tree_util.Partial``, so that it passes through JAX's transformations as an argument does, of one
            position. Whatever arrays are bound in it may differ from call to call of a compiled program.

    Returns:
        The function.
    """
    return lambda position: phi(position) + 0.5 * (position @ position)


def log_density(phi: Any) -> Callable[[Array], Array]:
    """Make ``-U`` of one chain, ``(D,)`` to ``()``, from Phi as in :func:`potential_energy`."""
    energy = potential_energy(phi)
    return lambda position: -energy(position)
