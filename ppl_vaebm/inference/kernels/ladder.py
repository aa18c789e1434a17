"""Ladders of inverse temperatures: how they start, and how swaps space them.

Syed, Bouchard-Cote, Deligiannidis and Doucet 2022, "Non-reversible parallel tempering: a scalable highly parallel MCMC
scheme": the rejection rates of neighbours add up to the communication barrier, whatever the levels between 0 and 1,
and round trips are most frequent when all neighbours share it equally.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE, MIN_STEP_SIZE, STEP_SIZE_GAIN
from ppl_vaebm.inference.kernels.base import Counts, KernelParams, Ladder

# The first levels are b = (k / K)^3. Chosen by us: most of a barrier is near b = 0, where an energy first bites.
START_POWER = 3.0
# Rejection rate that every pair is credited with at least, so that the barrier rises everywhere. Chosen by us.
MIN_REJECTION = 1e-3
# Share of the way to their new places that the levels go per training update: the rates of one update are noisy. Chosen
# by us.
SPACING_GAIN = 0.02


def start_ladder(num_levels: int, params: KernelParams, num_steps: int) -> Ladder:
    """Make the ladder of K + 1 levels, at least 2, that a warm-up starts from.

    The parameters' step size is that of all levels with b > 0; at b = 0 the ``num_steps`` of a move add up to a quarter
    turn, which forgets the start.
    """
    levels = torch.linspace(0, 1, num_levels, dtype=params.step_size.dtype, device=params.step_size.device)
    step_sizes = params.step_size.expand(num_levels).clone()
    step_sizes[0] = MAX_STEP_SIZE / num_steps
    return Ladder(levels.pow(START_POWER), step_sizes)


def stored_ladder(state: Mapping[str, Any], like: Tensor) -> Ladder:
    """Read a ladder from a checkpoint, as ``Ladder._asdict`` gave it, with the type and device of ``like``."""
    return Ladder(*(state[name].to(like) for name in Ladder._fields))


def new_counts(num_chains: int, num_levels: int, device: torch.device) -> Counts:
    """Begin to count for C chains and K + 1 levels: replicas are labelled by the level that they stand at."""
    label = torch.arange(num_levels, device=device).expand(num_chains, -1)
    return Counts(
        num_sweeps=0,
        swap_rate_sums=torch.zeros(num_chains, num_levels - 1, dtype=torch.float64, device=device),
        num_swaps=torch.zeros(num_levels - 1, dtype=torch.int64, device=device),
        move_rate_sums=torch.zeros(num_levels, dtype=torch.float64, device=device),
        label=label,
        was_cold=label == num_levels - 1,
        has_been_hot=torch.zeros_like(label, dtype=torch.bool),
        num_round_trips=torch.zeros(num_chains, dtype=torch.int64, device=device),
    )


def add_swaps(counts: Counts, lower: Tensor, rate: Tensor, order: Tensor) -> Counts:
    """Add the swaps of one sweep.

    Pairs were proposed at their hotter levels ``lower``, ``(P,)``, with acceptance probabilities ``(C, P)``; ``order``,
    ``(C, K + 1)``, is the level that each level's new replica came from.
    """
    sums, num_swaps = counts.swap_rate_sums.clone(), counts.num_swaps.clone()
    sums[:, lower] += rate
    num_swaps[lower] += 1
    label = counts.label.gather(1, order)
    hot, cold = label[:, :1], label[:, -1:]
    has_been_hot = counts.has_been_hot.scatter(1, hot, counts.was_cold.gather(1, hot))
    num_round_trips = counts.num_round_trips + has_been_hot.gather(1, cold).squeeze(1)
    return Counts(
        num_sweeps=counts.num_sweeps + 1,
        swap_rate_sums=sums,
        num_swaps=num_swaps,
        move_rate_sums=counts.move_rate_sums,
        label=label,
        was_cold=counts.was_cold.scatter(1, cold, True),
        has_been_hot=has_been_hot.scatter(1, cold, False),
        num_round_trips=num_round_trips,
    )


def swap_rates(counts: Counts) -> Tensor:
    """Average each pair's acceptance probability over chains and sweeps, ``(K,)``; nan for a pair never proposed."""
    return counts.swap_rate_sums.mean(0) / counts.num_swaps


def respace(ladder: Ladder, rates: Tensor) -> Ladder:
    """Move the levels so that all neighbours, of acceptance ``rates`` ``(K,)``, would reject equally often.

    Between levels the barrier is taken to rise linearly, where the paper has a monotone cubic: rounds of adaptation
    repeat the move, and the fixed point is the same.
    """
    rejections = (1 - rates).clamp(min=MIN_REJECTION)
    return space_evenly(ladder, torch.cat([rejections.new_zeros(1), rejections.cumsum(0)]), len(rates) + 1)


def space_evenly(ladder: Ladder, barrier: Tensor, num_levels: int) -> Ladder:
    """Place levels at equal distances of a barrier.

    The barrier, ``(K + 1,)``, is known at the levels of a ladder, increases from 0, and is linear between them. The
    logs of the new levels' step sizes are interpolated over b.
    """
    levels, knots = ladder.inverse_temperatures.tolist(), barrier.tolist()
    places = [knots[-1] * k / (num_levels - 1) for k in range(1, num_levels - 1)]
    spaced = [levels[0], *(_interpolate(place, knots, levels) for place in places), levels[-1]]
    log_steps = ladder.step_sizes.log().tolist()
    # At b = 0 every step is accepted, so its step size says nothing about the levels next to it.
    log_steps = [log_steps[0], *(_interpolate(b, levels[1:], log_steps[1:]) for b in spaced[1:])]
    like = ladder.inverse_temperatures
    return Ladder(like.new_tensor(spaced), like.new_tensor([math.exp(value) for value in log_steps]))


def follow_rates(ladder: Ladder, counts: Counts, target_acceptance: float) -> Ladder:
    """Move a ladder a little towards what its last sweeps ask for, for a density that changes under its chains.

    Levels go :data:`SPACING_GAIN` of the way of :func:`respace`; the steps of all levels but b = 0, whose moves are
    always accepted, follow their acceptance. The counts are of two sweeps at least, so that every pair was proposed.
    """
    errors = counts.move_rate_sums / max(1, counts.num_sweeps) - target_acceptance
    steps = (ladder.step_sizes.log() + STEP_SIZE_GAIN * errors.to(ladder.step_sizes)).exp()
    steps = steps.clamp(MIN_STEP_SIZE, MAX_STEP_SIZE)
    steps[0] = ladder.step_sizes[0]
    spaced = respace(ladder, swap_rates(counts)).inverse_temperatures
    return Ladder(ladder.inverse_temperatures.lerp(spaced, SPACING_GAIN), steps)


def report(counts: Counts, ladder: Ladder) -> dict[str, float | list[float]]:
    """Report how well the ladder carries replicas over a run.

    Returns:
        ``inverse_temperatures``; ``swap_rates`` of neighbours; ``communication_barrier``, the sum of their rejection
        rates, of which about ``2 barrier + 1`` levels are best; ``num_round_trips`` over all chains; and
        ``round_trips_per_1000_sweeps``, of one chain on average.
    """
    rates = swap_rates(counts)
    num_chain_sweeps = max(1, counts.num_sweeps * len(counts.num_round_trips))
    num_round_trips = int(counts.num_round_trips.sum())
    return {
        "inverse_temperatures": ladder.inverse_temperatures.tolist(),
        "swap_rates": rates.tolist(),
        "communication_barrier": float((1 - rates).sum()),
        "num_round_trips": num_round_trips,
        "round_trips_per_1000_sweeps": 1000 * num_round_trips / num_chain_sweeps,
    }


def _interpolate(x: float, knots: list[float], values: list[float]) -> float:
    """Interpolate linearly between increasing knots, and constantly beyond them."""
    index = bisect_left(knots, x)
    if index in (0, len(knots)):
        return values[min(index, len(knots) - 1)]
    left, right, one, other = knots[index - 1], knots[index], values[index - 1], values[index]
    return one + (other - one) * (x - left) / (right - left)
