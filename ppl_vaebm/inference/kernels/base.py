"""What every kernel shares: the target, the state, the report of a step, and the parameters.

A target is given by its energy relative to N(0, I), ``Phi``, so that the negative log density is
``U(q) = Phi(q) + |q|^2 / 2`` nats up to a constant. Chains are rows; nothing is summed over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A Hamiltonian that rises by more than this along one trajectory marks a divergence: BlackJAX's and Stan's threshold.
DIVERGENCE_THRESHOLD_NATS = 1000.0


class Potential(Protocol):
    """``Phi``: positions ``(C, D)`` to ``(C,)`` nats relative to N(0, I); rows are independent.

    An optional attribute ``rows_per_pass`` bounds the rows of one call. Where an attribute ``is_by_place`` is true the
    place of a row says which target it is of, so that all rows go in every call.
    """

    def __call__(self, position: Tensor) -> Tensor:
        """Evaluate Phi for every chain."""
        ...


class Replicas(NamedTuple):
    """The hotter chains that a tempered kernel keeps behind every chain: levels ``b_0 = 0`` to ``b_(K-1)``."""

    position: Tensor
    """``(C, K, D)``, hottest first."""
    potential: Tensor
    """Phi there, not multiplied by b, ``(C, K)``."""
    grad: Tensor
    """The gradient of Phi there, ``(C, K, D)``."""
    counts: Counts
    """What their swaps have done since the counts were last set to zero."""


class Counts(NamedTuple):
    """Bookkeeping of a ladder's swaps, since it was last set to zero."""

    num_sweeps: int
    """Sweeps; decides too whether even or odd neighbours swap next."""
    swap_rate_sums: Tensor
    """Sum of the acceptance probabilities of each pair of neighbours, ``(C, K)``, float64."""
    num_swaps: Tensor
    """Proposed swaps of each pair of neighbours, ``(K,)``."""
    move_rate_sums: Tensor
    """Sum over sweeps of the mean acceptance probability of each level's moves, ``(K + 1,)``, float64."""
    label: Tensor
    """Which replica stands at each level, ``(C, K + 1)``, so that its way along the ladder can be followed."""
    was_cold: Tensor
    """Whether the replica with each label has been at b = 1, ``(C, K + 1)``."""
    has_been_hot: Tensor
    """Whether the replica with each label was at b = 0 since it was last at b = 1, ``(C, K + 1)``."""
    num_round_trips: Tensor
    """Times that some replica came from b = 1 to b = 0 and back, ``(C,)``."""


class KernelState(NamedTuple):
    """What the next step needs. It is valid for one set of the target's parameters only."""

    position: Tensor
    """Where the chains stand, ``(C, D)``."""
    potential: Tensor
    """Phi there, ``(C,)``, nats."""
    grad: Tensor | None
    """The gradient of Phi there, ``(C, D)``; ``None`` after a gradient-free kernel moved."""
    replicas: Replicas | None = None
    """The hotter chains of a tempered kernel; no other has any."""
    partners: Partners | None = None
    """The chains of the first latent that an exchanging kernel keeps; no other has any."""


class Partners(NamedTuple):
    """What stands behind every chain of a kernel that exchanges its first latent (``latent_exchange``)."""

    state: KernelState
    """Chains of the first latent's own term, ``(C, d)``, with their replicas."""
    rate_sum: Tensor
    """Sum of the acceptance probabilities of every chain's exchanges, ``(C,)``, float64."""
    num_exchanges: int
    """Exchanges proposed to every chain."""
    num_steps: int
    """Steps since the last of them."""


class KernelInfo(NamedTuple):
    """What a diagnostician needs of one step; every field is ``(C,)``."""

    acceptance_rate: Tensor
    """Metropolis acceptance probability; for an unadjusted kernel the one that it would have had."""
    is_accepted: Tensor
    """Whether the chain moved to its proposal."""
    is_divergent: Tensor
    """The proposal was not finite, or an integrated one's energy rose by :data:`DIVERGENCE_THRESHOLD_NATS`."""
    energy: Tensor
    """Nats, float64: the Hamiltonian that the step starts from, with the momentum drawn for it; or U
    where the step ends, for a kernel without momentum. BFMI reads it."""
    num_evals: Tensor
    """Evaluations of Phi in this step, with their gradient where the kernel uses one."""


class DiagonalGaussian(NamedTuple):
    """A Gaussian with independent coordinates, for splitting to split off instead of N(0, I)."""

    mean: Tensor
    """``(D,)``."""
    scale: Tensor
    """Standard deviations, ``(D,)``."""


class Ladder(NamedTuple):
    """The levels of a tempered kernel, hottest first: level i samples ``exp(-b_i Phi) N(q; 0, I)``."""

    inverse_temperatures: Tensor
    """``b``, increasing from 0 to 1, ``(K + 1,)``."""
    step_sizes: Tensor
    """Angle of the moves at each level, ``(K + 1,)``; the last one is the step size of the parameters."""


class KernelParams(NamedTuple):
    """Everything that adaptation may change, and nothing else."""

    step_size: Tensor
    """``h``, an angle in noise space, ``()``; the paper's Langevin step eta is ``h**2``."""
    inverse_mass: Tensor
    """Per-coordinate scale, ``(D,)``; coordinate i moves with step ``h * sqrt(inverse_mass[i])``."""
    trajectory_length: Tensor
    """Total angle of one HMC trajectory, ``()``; kernels of one step ignore it."""
    ladder: Ladder | None = None
    """Levels of a tempered kernel; no other has any."""
    reference: DiagonalGaussian | None = None
    """What HMC by splitting splits off; ``None`` is N(0, I)."""
    partners: KernelParams | None = None
    """Those of the chains that an exchanging kernel keeps; no other has any."""


WarmUp = Callable[[torch.Generator, KernelState, KernelParams, int], tuple[KernelState, KernelParams, int]]
"""Runs a number of steps while it tunes: to the state, the parameters, and the evaluations spent over all chains."""


Step = Callable[[torch.Generator, KernelState, KernelParams], tuple[KernelState, KernelInfo]]


class Kernel(NamedTuple):
    """A Markov transition as pure functions of explicit state."""

    name: str
    init: Callable[[Tensor], KernelState]
    step: Step
    target_acceptance: float | None
    """Acceptance rate that warm-up tunes ``step_size`` to; ``None`` where there is nothing to tune."""
    warm_up: WarmUp | None = None
    """The kernel's own warm-up, where more is tuned than ``step_size``."""
    report: Callable[[KernelState, KernelParams], Mapping[str, float | list[float]]] | None = None
    """What the kernel has to say of a whole run, beyond what every step reports; names to numbers."""
    last_step: Step | None = None
    """A step that does not evaluate Phi where it ends, if the move does not depend on it; potential and acceptance
    rate are nan then. ``None`` if every move depends on it."""


def run_steps(
    kernel: Kernel, generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
) -> tuple[KernelState, list[KernelInfo]]:
    """Run a chain of which only the last position is wanted; return its end and the report of every step.

    Of two steps or more the last is the kernel's ``last_step``, if it has one: then K steps take K evaluations, that of
    ``init`` included.
    """
    infos = []
    for count in range(1, num_steps + 1):
        step = kernel.last_step if 1 < num_steps == count else None
        state, info = (step or kernel.step)(generator, state, params)
        infos.append(info)
    return state, infos


def init_params(position: Tensor, step_size: float, trajectory_length: float = torch.pi / 2) -> KernelParams:
    """Make parameters of unit mass like a position ``(C, D)``: the angle h, and the total angle of an HMC trajectory.

    A quarter turn forgets the start when Phi = 0.
    """
    return KernelParams(
        position.new_tensor(step_size), torch.ones_like(position[0]), position.new_tensor(trajectory_length)
    )


def value_and_grad(potential: Potential, position: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate Phi ``(C,)`` and its gradient ``(C, D)`` for every chain, both detached.

    Rows go in passes of at most the potential's ``rows_per_pass``.

    Raises:
        ValueError: the potential did not return one number per chain.
    """
    values, grads = zip(*(_value_and_grad(potential, rows) for rows in _passes(potential, position)), strict=True)
    return (values[0], grads[0]) if len(values) == 1 else (torch.cat(values), torch.cat(grads))


def _value_and_grad(potential: Potential, position: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = position.detach().requires_grad_(True)
        value = _checked(potential(leaf), position)
        # A potential that does not depend on the position (Phi = 0) has gradient zero, not none.
        if value.requires_grad:
            grad = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)[0]
        else:
            grad = torch.zeros_like(leaf)
    return value.detach(), grad


def value_only(potential: Potential, position: Tensor) -> Tensor:
    """Evaluate Phi for every chain without a gradient, ``(C, D)`` to ``(C,)``; else as :func:`value_and_grad`."""
    with torch.no_grad():
        values = [_checked(potential(rows), rows) for rows in _passes(potential, position)]
    return values[0] if len(values) == 1 else torch.cat(values)


def _passes(potential: Potential, position: Tensor) -> Sequence[Tensor]:
    """Cut positions into the passes that fit in memory; all draws are made before, so they do not depend on it."""
    num_rows = getattr(potential, "rows_per_pass", None)
    return [position] if num_rows is None or len(position) <= num_rows else position.split(num_rows)


def _checked(value: Tensor, position: Tensor) -> Tensor:
    if value.shape != position.shape[:1]:
        raise ValueError(
            f"a potential returns one number per chain, shape ({len(position)},); "
            f"this one returned shape {tuple(value.shape)} for positions {tuple(position.shape)}: "
            "sum over the event dimensions only"
        )
    return value


def init_with_grad(potential: Potential) -> Callable[[Tensor], KernelState]:
    """Make the ``init`` of a kernel that uses gradients."""
    return lambda position: KernelState(position.detach(), *value_and_grad(potential, position))


def init_without_grad(potential: Potential) -> Callable[[Tensor], KernelState]:
    """Make the ``init`` of a gradient-free kernel."""
    return lambda position: KernelState(position.detach(), value_only(potential, position), None)


def log_density_energy(state: KernelState) -> Tensor:
    """Return U = Phi + |q|^2 / 2 of a state, ``(C,)``, float64, nats."""
    return state.potential.double() + 0.5 * state.position.double().square().sum(-1)


def hamiltonian(state: KernelState, momentum: Tensor) -> Tensor:
    """Return U + |p|^2 / 2 of a state with whitened momenta p ``(C, D)``; ``(C,)``, float64, nats."""
    return log_density_energy(state) + 0.5 * momentum.double().square().sum(-1)


def metropolis(
    generator: torch.Generator, state: KernelState, proposal: KernelState, energy_change: Tensor
) -> tuple[KernelState, Tensor, Tensor, Tensor]:
    """Accept or reject every chain's proposal by its energy change, ``(C,)``, float64, nats.

    A change that is not a number rejects, and is flagged divergent; so does a proposal whose gradient is not finite,
    since the next step could not start from it.

    Returns:
        The new state, the acceptance probability ``(C,)``, whether it was accepted, whether it diverged.
    """
    acceptance_rate, is_divergent = acceptance(proposal, energy_change)
    uniform = torch.rand(acceptance_rate.shape, generator=generator, dtype=torch.float64, device=energy_change.device)
    is_accepted = uniform < acceptance_rate
    return select(is_accepted, proposal, state), acceptance_rate, is_accepted, is_divergent


def acceptance(proposal: KernelState, energy_change: Tensor) -> tuple[Tensor, Tensor]:
    """Turn energy changes, ``(C,)``, nats, into acceptance probabilities and divergence flags, ``(C,)`` each.

    The probability is zero where the change, the proposal's position or its gradient is not finite.
    """
    # Sums are as finite as their terms, and cheaper to ask.
    total = energy_change + proposal.position.sum(-1)
    if proposal.grad is not None:
        total += proposal.grad.sum(-1)
    is_not_finite = ~(total.abs() < math.inf)
    rate = (-energy_change).exp().clamp(max=1.0).masked_fill(is_not_finite, 0.0)
    if proposal.grad is None:  # nothing was integrated: a high energy is an honest proposal's, and only rejects it
        return rate, is_not_finite
    return rate, is_not_finite | (energy_change > DIVERGENCE_THRESHOLD_NATS)


def select(mask: Tensor, chosen: KernelState, other: KernelState) -> KernelState:
    """Take rows of ``chosen`` where ``mask``, ``(C,)``, holds, of ``other`` elsewhere.

    The gradient is ``None`` unless both have one.
    """
    rows = mask.unsqueeze(-1)
    grad = None
    if chosen.grad is not None and other.grad is not None:
        grad = torch.where(rows, chosen.grad, other.grad)
    return KernelState(
        torch.where(rows, chosen.position, other.position), torch.where(mask, chosen.potential, other.potential), grad
    )


def with_grad(potential: Potential, state: KernelState) -> tuple[KernelState, int]:
    """Fill in the gradient that a gradient-free kernel left out; return also the evaluations that took, 0 or 1."""
    if state.grad is not None:
        return state, 0
    return KernelState(state.position, *value_and_grad(potential, state.position)), 1


def draw_normal(generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw standard normals shaped, typed and placed like a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
