"""A sequential Monte Carlo sampler along the path (Del Moral, Doucet and Jasra 2006): annealing with resampling.

One sampler serves three uses. On a ladder that is given it estimates log Z. With :class:`Adaptive` it lays out its own
levels: a pilot whose levels :func:`spaced_ladder` turns into a ladder for others, or particles led to a posterior as
starts for chains. Particles that count must not choose their own levels or steps, or their weights lose their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE, MIN_STEP_SIZE
from ppl_vaebm.inference.kernels.base import KernelState, Ladder, Potential
from ppl_vaebm.inference.kernels.ladder import space_evenly
from ppl_vaebm.inference.log_z.annealing import (
    BuildKernel,
    check_ladder,
    check_particles,
    default_kernel,
    move,
    resample,
    take,
)
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp, weights_ess

RESAMPLING_FRACTION = 0.5
"""On a given ladder, particles are resampled where fewer than this fraction is effective: Del Moral et al. (2006)."""
FIRST_STEP_SIZE = 0.5
"""Where the tuning of the first adaptive level begins; every other one begins where the one before ended."""
NUM_BISECTIONS = 60
"""Halvings that find the next level, to the last bit of a float."""
EVEN_FRACTION = 1e-3
"""Fraction of evenly spaced b that is mixed into the spacing by barrier, so that b increases where Phi does not vary.
Chosen by us."""


class Adaptive(NamedTuple):
    """Levels that the particles choose (Del Moral, Doucet and Jasra 2012); they are resampled at each of them."""

    target_ess: float = 0.9
    """b rises until this fraction of the particles is effective, in (0, 1)."""
    num_moves: int = 15
    """Moves at every level, between which the step size follows its acceptance."""
    max_levels: int = 1_000
    """Levels after which to give up."""


class Population(NamedTuple):
    """Where one population ended, and by which levels it came there. N particles in G groups of equal size."""

    log_z: Tensor
    """Of each group, ``(G,)``, float64, nats; on a given ladder its exponential is unbiased for Z. nan where the energy
    of a particle is."""
    position: Tensor
    """``(N, D)``, moved at b = 1; with the weights a sample of the target, group by group."""
    log_weights: Tensor
    """``(N,)``, float64, their exponentials sum to one in each group."""
    ancestors: Tensor
    """The particle at the start that each descends from, ``(N,)``."""
    ladder: Ladder
    """Its levels, K + 1, and the step size that each ended with."""
    energy_sd: Tensor
    """Standard deviation of Phi over the particles at each level, ``(K + 1,)``, nats."""
    acceptance_rate: Tensor
    """Mean over the particles and moves at each level with b > 0, ``(K,)``."""
    num_resamplings: int
    num_divergent: int
    """Divergent moves of all particles and levels."""
    num_not_finite: int
    """Particles at the start without a finite Phi."""
    num_evals: int
    """Evaluations of Phi, over all particles."""

    @property
    def num_levels(self) -> int:
        """Levels with b > 0."""
        return len(self.energy_sd) - 1

    @property
    def num_ancestors(self) -> int:
        """Particles at the start that have descendants: few of them mean that the genealogy has collapsed."""
        return len(self.ancestors.unique())

    @property
    def barrier(self) -> float:
        """The integral of the standard deviation of Phi over b, nats: the length of the path.

        With K temperatures spaced evenly in it, and moves that forget where they came from, log weights have variance
        ``barrier^2 / K``, and so the gap between the two bounds of annealing is that.
        """
        return float(_cumulative_barrier(self)[-1])


def run_smc(
    potential: Potential,
    generator: torch.Generator,
    position: Tensor,
    schedule: Ladder | Adaptive,
    *,
    build: BuildKernel = default_kernel,
    num_groups: int = 1,
) -> Population:
    """Send one population from N(0, I) to the target.

    Args:
        potential: Phi.
        generator: source of the resampling and the moves.
        position: independent draws of N(0, I), ``(N, D)``.
        schedule: a ladder not chosen by these particles, with one move a level; or how they choose their own.
        build: makes the kernels.
        num_groups: targets that the potential has, each with as many rows, one after another; groups share levels, and
            particles are resampled within theirs.

    Returns:
        The population. Its particles are not independent once they were resampled, so an error takes several
        populations: :func:`combine`. With adaptive levels a particle without a finite Phi has weight 0.

    Raises:
        InputError: fewer than two particles, a ladder that does not rise from 0 to 1; with adaptive levels a group
            without a finite Phi, or a path of too many levels.
    """
    check_particles(position)
    if isinstance(schedule, Ladder):
        check_ladder(schedule)
    kernel, num = build(potential), len(position)
    state, size = kernel.init(position), num // num_groups
    even = position.new_full((num_groups, size), -math.log(size), dtype=torch.float64)
    log_weights, ancestors = even, torch.arange(num, device=position.device)
    log_z, num_not_finite = even.new_zeros(num_groups), int((~state.potential.isfinite()).sum())
    num_resamplings, num_divergent, num_evals = 0, 0, num
    levels = [
        _Level(0.0, MAX_STEP_SIZE if isinstance(schedule, Adaptive) else float(schedule.step_sizes[0]), _sd(state))
    ]
    while levels[-1].inverse_temperature < 1:
        energy = _energies(state, num_groups, schedule)
        b, step_size, num_moves = _next_level(schedule, levels, log_weights, energy)
        log_weights = log_weights - (b - levels[-1].inverse_temperature) * energy
        growth = log_weights.logsumexp(1)
        log_z, log_weights = log_z + growth, log_weights - growth.unsqueeze(1)
        # A nan compares false: such a population is not resampled, and its log Z says nan.
        if _effective_fraction(log_weights) < (1 if isinstance(schedule, Adaptive) else RESAMPLING_FRACTION):
            index = _resample_groups(log_weights, generator)
            state, ancestors, log_weights = take(state, index), ancestors[index], even
            num_resamplings += 1
        rates = []
        for _ in range(num_moves):
            state, info = move(potential, build, generator, state, b, step_size)
            rates.append(float(info.acceptance_rate.mean()))
            num_divergent += int(info.is_divergent.sum())
            num_evals += int(info.num_evals.sum())
            if isinstance(schedule, Adaptive) and kernel.target_acceptance is not None:
                step_size *= math.exp(rates[-1] - kernel.target_acceptance)
                step_size = max(MIN_STEP_SIZE, min(MAX_STEP_SIZE, step_size))
        levels.append(_Level(b, step_size, _sd(state), sum(rates) / num_moves))
    columns = torch.tensor(levels, dtype=torch.float64).unbind(1)
    return Population(
        log_z=log_z,
        position=state.position,
        log_weights=log_weights.flatten(),
        ancestors=ancestors,
        ladder=Ladder(columns[0], columns[1]),
        energy_sd=columns[2],
        acceptance_rate=columns[3][1:],
        num_resamplings=num_resamplings,
        num_divergent=num_divergent,
        num_not_finite=num_not_finite,
        num_evals=num_evals,
    )


class _Level(NamedTuple):
    """What is kept of a level that was passed."""

    inverse_temperature: float
    step_size: float
    energy_sd: float
    acceptance_rate: float = math.nan


def _sd(state: KernelState) -> float:
    return float(state.potential.double().std())


def _energies(state: KernelState, num_groups: int, schedule: Ladder | Adaptive) -> Tensor:
    """Return Phi by group, ``(G, P)``, float64; with adaptive levels, what is not finite becomes a weight of 0."""
    energy = state.potential.double().view(num_groups, -1)
    if isinstance(schedule, Ladder):
        return energy
    is_finite = energy.isfinite()
    if not is_finite.any(1).all():
        raise InputError(
            f"expected a finite energy of some of {energy.shape[1]} VAE samples, found none: fit again with "
            "regularisation; where something is observed, check the values given, or state a larger noise-sd"
        )
    return energy.where(is_finite, math.inf)


def _next_level(
    schedule: Ladder | Adaptive, passed: Sequence[_Level], log_weights: Tensor, energy: Tensor
) -> tuple[float, float, int]:
    """Return the next b, the step size that its moves begin with, and the number of moves."""
    if isinstance(schedule, Ladder):
        return float(schedule.inverse_temperatures[len(passed)]), float(schedule.step_sizes[len(passed)]), 1
    b, step_size = passed[-1][:2]
    if len(passed) > schedule.max_levels:
        raise InputError(
            f"expected the path to the target to take at most {schedule.max_levels} levels, found b = {b:.3g} after "
            "them: the energy varies too much over VAE samples, so regularise it; where something is observed, state "
            "a larger noise-sd"
        )

    def remains_effective(rise: float) -> bool:
        return _effective_fraction(log_weights - rise * energy) >= schedule.target_ess

    step_size = FIRST_STEP_SIZE if len(passed) == 1 else step_size
    if remains_effective(1 - b):
        return 1.0, step_size, schedule.num_moves
    low, high = 0.0, 1 - b
    for _ in range(NUM_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if remains_effective(middle) else (low, middle)
    return b + high, step_size, schedule.num_moves


def _effective_fraction(log_weights: Tensor) -> float:
    """Average the effective fraction of the particles over groups, from ``(G, P)``."""
    return sum(map(weights_ess, log_weights)) / log_weights.numel()


def _resample_groups(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Choose rows within each group by its weights, ``(G, P)`` to ``(G * P,)``."""
    num_groups, size = log_weights.shape
    return torch.cat([resample(log_weights[group], generator) + group * size for group in range(num_groups)])


def combine(populations: Sequence[Population]) -> LogZ:
    """Estimate log Z from two or more independent populations of one group.

    It is the log of the mean of their estimates of Z, with the error that their spread gives; the effective size counts
    populations.
    """
    return log_mean_exp(torch.cat([population.log_z for population in populations]))


def equal_draws(population: Population, generator: torch.Generator) -> Tensor:
    """Resample a population once more, so that its particles count alike: ``(N, D)``, some more than once."""
    log_weights = population.log_weights.view(len(population.log_z), -1)
    return population.position[_resample_groups(log_weights, generator)]


def spaced_ladder(pilot: Population, num_temperatures: int) -> Ladder:
    """Space K temperatures evenly in the barrier of a pilot (Syed, Bouchard-Cote, Deligiannidis and Doucet 2021).

    Raises:
        InputError: fewer than one step, or a particle of the pilot without a finite Phi.
    """
    if num_temperatures < 1:
        raise InputError(f"expected at least 1 temperature, found {num_temperatures}: give a larger number")
    barrier = _cumulative_barrier(pilot)
    even = EVEN_FRACTION * float(barrier[-1]) or 1.0
    return space_evenly(pilot.ladder, barrier + even * pilot.ladder.inverse_temperatures, num_temperatures + 1)


def num_temperatures_for(pilot: Population, gap_nats: float, least: int, most: int) -> int:
    """Return ``barrier^2 / gap``, in bounds: temperatures that leave that gap if moves forget their start."""
    return max(least, min(most, math.ceil(pilot.barrier**2 / gap_nats)))


def _cumulative_barrier(pilot: Population) -> Tensor:
    """Integrate the standard deviation of Phi from 0 to every level by trapezoids, ``(K + 1,)``."""
    if pilot.num_not_finite:
        raise InputError(
            f"expected a finite energy of every pilot particle, found {pilot.num_not_finite} of {len(pilot.position)} "
            "without: the energy network or the decoder overflows on VAE samples, so fit again with regularisation"
        )
    pieces = 0.5 * (pilot.energy_sd[1:] + pilot.energy_sd[:-1]) * pilot.ladder.inverse_temperatures.diff()
    return torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
