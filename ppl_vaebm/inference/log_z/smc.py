"""A sequential Monte Carlo sampler along the path (Del Moral, Doucet and Jasra 2006): annealing with resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import Ladder, Potential
from ppl_vaebm.inference.log_z.annealing import (
    BuildKernel,
    check_ladder,
    check_particles,
    default_kernel,
    kernel_at,
    move,
    resample,
    take,
)
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp, weights_ess

RESAMPLING_SHARE = 0.5
"""Particles are resampled where fewer than this share of them is effective: Del Moral, Doucet and Jasra (2006)."""


class Population(NamedTuple):
    """Where one population ended."""

    log_z: float
    """Nats; its exponential is unbiased for Z. nan where the energy of a particle is."""
    position: Tensor
    """``(N, D)``, moved at b = 1; with the weights a sample of the target."""
    log_weights: Tensor
    """``(N,)``, float64, their exponentials sum to one."""
    ancestors: Tensor
    """The particle at the start that each descends from, ``(N,)``."""
    num_resamplings: int
    acceptance_rate: Tensor
    """Mean over particles at each level with b > 0, ``(K,)``."""
    num_divergent: int
    """Divergent moves of all particles and levels."""
    num_not_finite: int
    """Particles at the start without a finite Phi."""
    num_evals: int
    """Evaluations of Phi, over all particles."""

    @property
    def num_ancestors(self) -> int:
        """Particles at the start that have descendants: few of them mean that the genealogy has collapsed."""
        return len(self.ancestors.unique())


def run_smc(
    potential: Potential,
    generator: torch.Generator,
    position: Tensor,
    ladder: Ladder,
    *,
    build: BuildKernel = default_kernel,
) -> Population:
    """Send one population from N(0, I) to the target.

    Args:
        potential: Phi.
        generator: source of the resampling and the moves.
        position: independent draws of N(0, I), ``(N, D)``.
        ladder: K + 1 levels and their step sizes, not chosen by these particles.
        build: makes the kernels.

    Returns:
        The population. Its particles are not independent once they were resampled, so an error takes several
        populations: :func:`combine`.

    Raises:
        InputError: fewer than two particles, or a ladder that does not rise from 0 to 1.
    """
    check_particles(position)
    check_ladder(ladder)
    num = len(position)
    state = kernel_at(potential, 1.0, build).init(position)
    num_not_finite = int((~state.potential.isfinite()).sum())
    even = torch.full((num,), -math.log(num), dtype=torch.float64, device=position.device)
    log_weights, ancestors = even, torch.arange(num, device=position.device)
    log_z, num_resamplings, num_divergent, num_evals = 0.0, 0, 0, num
    rates: list[float] = []
    levels, steps = ladder.inverse_temperatures.tolist(), ladder.step_sizes.tolist()
    for last, level, step_size in zip(levels[:-1], levels[1:], steps[1:], strict=True):
        log_weights = log_weights - (level - last) * state.potential.double()
        growth = log_weights.logsumexp(0)
        log_z += float(growth)
        log_weights = log_weights - growth
        # A nan compares false: such a population is not resampled, and its log Z says nan.
        if weights_ess(log_weights) < RESAMPLING_SHARE * num:
            index = resample(log_weights, generator)
            state, ancestors, log_weights = take(state, index), ancestors[index], even
            num_resamplings += 1
        state, info = move(potential, build, generator, state, level, step_size)
        rates.append(float(info.acceptance_rate.mean()))
        num_divergent += int(info.is_divergent.sum())
        num_evals += int(info.num_evals.sum())
    return Population(
        log_z,
        state.position,
        log_weights,
        ancestors,
        num_resamplings,
        torch.tensor(rates, dtype=torch.float64),
        num_divergent,
        num_not_finite,
        num_evals,
    )


def combine(populations: Sequence[Population]) -> LogZ:
    """Estimate log Z from independent populations.

    Args:
        populations: at least two.

    Returns:
        The log of the mean of their estimates of Z, with the error that their spread gives; the effective size counts
        populations.
    """
    return log_mean_exp(torch.tensor([population.log_z for population in populations], dtype=torch.float64))


def equal_draws(population: Population, generator: torch.Generator) -> Tensor:
    """Resample a population once more, so that its particles count alike.

    Args:
        population: at its end.
        generator: source of one uniform.

    Returns:
        Positions, ``(N, D)``, some of them more than once.
    """
    return population.position[resample(population.log_weights, generator)]
