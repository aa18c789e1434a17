"""Replica exchange between N(0, I) and the target, along ``exp(-b Phi(q)) N(q; 0, I)`` for b from 0 to 1.

Every chain has a ladder of replicas. All of them move at once, each by HMC that splits off N(0, I) with ``b Phi`` as
its potential; then neighbours swap, pairs from even levels up in one sweep and pairs from odd levels up in the next.
That is the non-reversible scheme of Syed, Bouchard-Cote, Deligiannidis and Doucet 2022, "Non-reversible parallel
tempering: a scalable highly parallel MCMC scheme", whose round trips do not slow down as levels are added. At b = 0
nothing kicks, and a quarter turn ends at its momentum, an independent draw from N(0, I): no mode is out of reach there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.adaptation import start_averaging, update_averaging
from ppl_vaebm.inference.kernels.base import (
    Counts,
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Ladder,
    Potential,
    Replicas,
    draw_normal,
    hamiltonian,
    metropolis,
    value_and_grad,
)
from ppl_vaebm.inference.kernels.integrators import Trajectory, follow, make_flow
from ppl_vaebm.inference.kernels.ladder import add_swaps, new_counts, report, respace, start_ladder, swap_rates

# Moves are MALA's by default, and so is their target.
TEMPERED_TARGET_ACCEPTANCE = 0.65
NUM_MOVE_STEPS = 1
# Chosen by us: K rejections add up to the barrier, and below a half each it is at most 2.5. That of gaussians25 is
# 0.7, and 1.3 that of 25 modes under a mean energy of 23 nats (targets.grid_modes).
NUM_LEVELS = 6
# Fractions of the warm-up after which the levels are spaced anew by the swaps since the last time: rounds that double,
# as in the paper. The last half is for the steps that suit the last levels.
RESPACE_AFTER = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def build(
    potential: Potential,
    *,
    num_levels: int = NUM_LEVELS,
    num_steps: int = NUM_MOVE_STEPS,
    target_acceptance: float = TEMPERED_TARGET_ACCEPTANCE,
    name: str = "tempered",
) -> Kernel:
    """Make the kernel.

    ``init`` knows the target's positions only, and puts all replicas of a chain there; they forget it within a few
    round trips. Chains that start as exact draws of the target stay exact only if every replica is replaced by an exact
    draw of its own level, with :func:`with_replicas`.

    Args:
        potential: Phi, relative to N(0, I).
        num_levels: K + 1, those at b = 0 and b = 1 included.
        num_steps: integration steps of a move.
        target_acceptance: what warm-up tunes the step of every level with b > 0 to.
        name: the kernel's name.

    Returns:
        The kernel. A step, a sweep, evaluates ``C * num_levels`` rows ``num_steps`` times. Acceptance rate and energy
        are those of the move at b = 1; a divergence is that of any level. A replica moves only where Phi and its
        gradient are finite, at b = 0 too: no level has mass where the target has none.

    Raises:
        ValueError: fewer than two levels, or a number of steps below 1.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")

    def init(position: Tensor) -> KernelState:
        position = position.detach()
        value, grad = value_and_grad(potential, position)
        q, phi, force = (
            part.unsqueeze(1).expand(-1, num_levels - 1, *part.shape[1:]) for part in (position, value, grad)
        )
        counts = new_counts(len(position), num_levels, position.device)
        return KernelState(position, value, grad, Replicas(q, phi, force, counts))

    def ladder_of(params: KernelParams) -> Ladder:
        return params.ladder or start_ladder(num_levels, params, num_steps)

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        new, info, _ = _sweep(potential, generator, state, ladder_of(params), params.inverse_mass, num_steps)
        return new, info

    def warm_up(
        generator: torch.Generator, state: KernelState, params: KernelParams, num_sweeps: int
    ) -> tuple[KernelState, KernelParams, int]:
        def sweep(state: KernelState, ladder: Ladder) -> tuple[KernelState, KernelInfo, Tensor]:
            return _sweep(potential, generator, state, ladder, params.inverse_mass, num_steps)

        state, ladder, num_evals = _tune(sweep, state, ladder_of(params), num_sweeps, target_acceptance)
        return state, params._replace(step_size=ladder.step_sizes[-1], ladder=ladder), num_evals

    def report_run(state: KernelState, params: KernelParams) -> dict[str, float | list[float]]:
        return report(_counts(state), ladder_of(params))

    return Kernel(name, init, step, target_acceptance, warm_up, report_run)


def with_replicas(potential: Potential, state: KernelState, position: Tensor) -> KernelState:
    """Move a state's replicas to positions ``(C, K, D)``, hottest first, and set its counts to zero."""
    value, grad = value_and_grad(potential, position.flatten(0, 1))
    counts = new_counts(len(position), position.shape[1] + 1, position.device)
    replicas = Replicas(position, value.reshape(position.shape[:2]), grad.reshape(position.shape), counts)
    return state._replace(replicas=replicas)


def all_positions(state: KernelState) -> Tensor:
    """Return where all replicas of every chain stand, hottest first: ``(C, K + 1, D)``."""
    assert state.replicas is not None
    return torch.cat([state.replicas.position, state.position.unsqueeze(1)], 1)


def _flatten(state: KernelState, ladder: Ladder) -> tuple[KernelState, Counts]:
    """Lay the levels of all chains out as rows, ``C * (K + 1)`` of them, level by level within a chain."""
    replicas, num_levels = state.replicas, len(ladder.inverse_temperatures)
    if replicas is None or state.grad is None:
        raise ValueError("a tempered kernel needs replicas: start from its own init")
    if replicas.position.shape[1] + 1 != num_levels:
        raise ValueError(
            f"a ladder has a step for every level: expected {replicas.position.shape[1] + 1}, got {num_levels}"
        )
    levels = KernelState(
        all_positions(state).flatten(0, 1),
        torch.cat([replicas.potential, state.potential.unsqueeze(1)], 1).flatten(),
        torch.cat([replicas.grad, state.grad.unsqueeze(1)], 1).flatten(0, 1),
    )
    return levels, replicas.counts


def _unflatten(levels: KernelState, counts: Counts) -> KernelState:
    assert levels.grad is not None
    position, potential, grad = (
        part.reshape(*counts.label.shape, *part.shape[1:]) for part in (levels.position, levels.potential, levels.grad)
    )
    replicas = Replicas(position[:, :-1], potential[:, :-1], grad[:, :-1], counts)
    return KernelState(position[:, -1], potential[:, -1], grad[:, -1], replicas)


def _sweep(
    potential: Potential,
    generator: torch.Generator,
    state: KernelState,
    ladder: Ladder,
    inverse_mass: Tensor,
    num_steps: int,
) -> tuple[KernelState, KernelInfo, Tensor]:
    """Move every replica, then swap neighbours; return also each level's acceptance rate over chains, ``(K + 1,)``."""
    levels, counts = _flatten(state, ladder)
    momentum = draw_normal(generator, levels.position)
    energy = hamiltonian(levels, momentum)
    trajectory = _trajectory(potential, levels, momentum, ladder, inverse_mass, num_steps)
    moved, *outcome = metropolis(generator, levels, trajectory.end, trajectory.energy_change)
    energy, rate, is_accepted, is_divergent = (part.reshape(counts.label.shape) for part in (energy, *outcome))
    counts = counts._replace(move_rate_sums=counts.move_rate_sums + rate.mean(0).double())
    moved, counts, is_new = _swap(generator, moved, counts, ladder.inverse_temperatures.double())
    num_evals = torch.full_like(counts.num_round_trips, num_steps * len(ladder.step_sizes))
    info = KernelInfo(rate[:, -1], is_accepted[:, -1] | is_new, is_divergent.any(1), energy[:, -1], num_evals)
    return _unflatten(moved, counts), info, rate.mean(0)


def _trajectory(
    potential: Potential, levels: KernelState, momentum: Tensor, ladder: Ladder, inverse_mass: Tensor, num_steps: int
) -> Trajectory:
    """Integrate every replica at its own level: the kicks are by ``b grad Phi``."""
    num_chains = len(momentum) // len(ladder.step_sizes)
    b = ladder.inverse_temperatures.repeat(num_chains)
    h = ladder.step_sizes.repeat(num_chains).unsqueeze(1)
    # At b = 0 there is no kick, whatever the gradient is, and nothing for an inverse mass to improve.
    is_reference = b == 0
    step_sizes = torch.where(is_reference.unsqueeze(1), h, h * inverse_mass.sqrt())

    def force(position: Tensor, grad: Tensor) -> Tensor:
        return torch.where(is_reference.unsqueeze(1), 0.0, b.unsqueeze(1) * grad)

    def change(start: KernelState, end: KernelState) -> Tensor:
        weighted = b.double() * (end.potential.double() - start.potential.double())
        return torch.where(is_reference, 0.0, weighted).masked_fill(~end.potential.isfinite(), math.nan)

    flow = make_flow("splitting", step_sizes)._replace(force=force, change=change)
    return follow(potential, levels, momentum, step_sizes, num_steps, flow)


def _swap(
    generator: torch.Generator, levels: KernelState, counts: Counts, b: Tensor
) -> tuple[KernelState, Counts, Tensor]:
    """Swap neighbours; return the rows, the counts, and whether the replica at b = 1 changed, ``(C,)``."""
    num_chains, num_levels = counts.label.shape
    lower = torch.arange(counts.num_sweeps % 2, num_levels - 1, 2, device=b.device)
    rate = swap_probability(levels.potential.reshape(num_chains, num_levels), b, lower)
    uniform = torch.rand(rate.shape, generator=generator, dtype=rate.dtype, device=rate.device)
    is_swapped = (uniform < rate).long()
    order = torch.arange(num_levels, device=b.device).repeat(num_chains, 1)
    order[:, lower] += is_swapped
    order[:, lower + 1] -= is_swapped
    rows = (order + num_levels * torch.arange(num_chains, device=b.device).unsqueeze(1)).flatten()
    assert levels.grad is not None
    swapped = KernelState(levels.position[rows], levels.potential[rows], levels.grad[rows])
    return swapped, add_swaps(counts, lower, rate, order), order[:, -1] != num_levels - 1


def swap_probability(energies: Tensor, b: Tensor, lower: Tensor) -> Tensor:
    """Compute the swap probabilities of neighbours, ``min(1, exp((b_i - b_j)(E_i - E_j)))``, ``(C, P)``, float64.

    The energies are Phi at every level, ``(C, K + 1)``, and ``lower`` the hotter level of each of P pairs. The
    probability is 0 where the energy that would come to the colder level is not finite, or the one that would leave it
    is nan. Only a chain's start can be either, and an infinite energy leaves it by a swap.
    """
    hot, cold = energies[:, lower].double(), energies[:, lower + 1].double()
    rate = ((b[lower] - b[lower + 1]) * (hot - cold)).exp().clamp(max=1.0)
    return rate.masked_fill(~hot.isfinite() | cold.isnan(), 0.0)


def _tune(
    sweep: Callable[[KernelState, Ladder], tuple[KernelState, KernelInfo, Tensor]],
    state: KernelState,
    ladder: Ladder,
    num_sweeps: int,
    target_acceptance: float,
) -> tuple[KernelState, Ladder, int]:
    """Tune every level's step by dual averaging, and space the levels at the end of every round."""
    round_ends, num_evals = {round(fraction * num_sweeps) for fraction in RESPACE_AFTER}, 0
    averagings = [start_averaging(float(h)) for h in ladder.step_sizes[1:]]
    for index in range(1, num_sweeps + 1):
        state, info, rates = sweep(state, ladder)
        num_evals += int(info.num_evals.sum())
        averagings = [
            update_averaging(averaging, rate, target_acceptance)
            for averaging, rate in zip(averagings, rates[1:].tolist(), strict=True)
        ]
        ladder = _with_steps(ladder, [averaging.log_step for averaging in averagings])
        if index in round_ends and _counts(state).num_swaps.all():
            ladder = _with_steps(ladder, [averaging.log_step_average for averaging in averagings])
            ladder = respace(ladder, swap_rates(_counts(state)))
            averagings = [start_averaging(float(h)) for h in ladder.step_sizes[1:]]
            state = _reset(state)
    ladder = _with_steps(ladder, [averaging.log_step_average for averaging in averagings])
    return _reset(state), ladder, num_evals


def _with_steps(ladder: Ladder, log_steps: list[float]) -> Ladder:
    """Replace the step sizes of all levels but b = 0."""
    return ladder._replace(step_sizes=torch.cat([ladder.step_sizes[:1], ladder.step_sizes.new_tensor(log_steps).exp()]))


def _counts(state: KernelState) -> Counts:
    assert state.replicas is not None
    return state.replicas.counts


def _reset(state: KernelState) -> KernelState:
    assert state.replicas is not None
    num_chains, num_levels = state.replicas.counts.label.shape
    counts = new_counts(num_chains, num_levels, state.position.device)
    return state._replace(replicas=state.replicas._replace(counts=counts))
