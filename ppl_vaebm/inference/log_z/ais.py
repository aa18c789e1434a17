"""Annealed importance sampling (Neal 2001), down the path from N(0, I) to the target and back up it.

Down, the mean of the weights is unbiased for Z, so by Jensen's inequality the log of the mean is a lower bound of log Z
in expectation. Up, from draws of the target, the inverse weights' mean is unbiased for 1 / Z, and minus its log an
upper bound in expectation (Grosse, Ghahramani and Adams 2015, arXiv:1511.02543). So in expectation neither is off by
more than the gap between the two.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import Ladder, Potential
from ppl_vaebm.inference.log_z.annealing import BuildKernel, check_ladder, check_particles, default_kernel, move
from ppl_vaebm.inference.log_z.base import LogZ, bootstrap_error, log_mean_exp

Direction = Literal["forward", "reverse"]


class AnnealedWeights(NamedTuple):
    """Result of annealing, by particle and by temperature."""

    log_weights: Tensor
    """``sum_k -(b_k - b_(k-1)) Phi(q)``, each Phi where the particle stood between the two levels; ``(N,)``, float64,
    nats, of one sign in both directions."""
    position: Tensor
    """Where the particles ended, ``(N, D)``."""
    acceptance_rate: Tensor
    """Mean over particles at each level with a move, ``(K - 1,)``, hottest first."""
    num_divergent: int
    """Divergent moves of all particles and levels."""
    num_evals: int
    """Evaluations of Phi, over all particles."""


class AnnealedEstimate(NamedTuple):
    """A bound of log Z in expectation, from below if forward and from above if reverse."""

    log_z: LogZ
    """From the mean weight; its error is the bootstrap's over particles."""
    mean_log_weight: LogZ
    """The mean of the log weights, a wider bound of the same kind; its error is that of a mean."""
    num_not_finite: int
    """Particles whose log weight is not finite. They are not replaced: a nan makes the estimates nan."""


def anneal(
    potential: Potential,
    generator: torch.Generator,
    position: Tensor,
    ladder: Ladder,
    direction: Direction = "forward",
    *,
    build: BuildKernel = default_kernel,
) -> AnnealedWeights:
    """Anneal independent draws, ``(N, D)``: of N(0, I) towards the target if forward, of the target back if reverse.

    The K + 1 levels and their step sizes must not be chosen by these particles. Where the particles of a forward run
    ended, at level ``b_(K-1)``, is with the weights a sample of the target. From chains that have not converged the
    reverse bound is as good as they are.

    Raises:
        InputError: fewer than two particles, or a ladder that does not rise from 0 to 1.
    """
    check_particles(position)
    check_ladder(ladder)
    levels, steps = ladder.inverse_temperatures.tolist(), ladder.step_sizes.tolist()
    gaps = list(range(1, len(levels)))  # gap k lies between levels k - 1 and k
    if direction == "reverse":
        gaps.reverse()
    state = build(potential).init(position)
    log_weights = torch.zeros(len(position), dtype=torch.float64, device=position.device)
    rates: list[float] = []
    num_divergent, num_evals = 0, len(position)
    for gap, next_gap in zip(gaps, [*gaps[1:], None], strict=True):
        log_weights -= (levels[gap] - levels[gap - 1]) * state.potential.double()
        if next_gap is None:
            break
        shared = min(gap, next_gap)
        state, info = move(potential, build, generator, state, levels[shared], steps[shared])
        rates.append(float(info.acceptance_rate.mean()))
        num_divergent += int(info.is_divergent.sum())
        num_evals += int(info.num_evals.sum())
    if direction == "reverse":
        rates.reverse()
    return AnnealedWeights(
        log_weights, state.position, torch.tensor(rates, dtype=torch.float64), num_divergent, num_evals
    )


def estimate(log_weights: Tensor, generator: torch.Generator, direction: Direction) -> AnnealedEstimate:
    """Estimate log Z from annealed weights, ``(N,)``: both bounds of one direction.

    Effective sizes are those of the weights, or of the inverse weights if reverse; ``generator`` draws the bootstrap.

    Raises:
        InputError: fewer than two weights.
    """
    check_particles(log_weights.unsqueeze(1))
    sign = 1 if direction == "forward" else -1
    log_weights = log_weights.double()
    signed = sign * log_weights
    mean_weight = log_mean_exp(signed)
    mean_error = float(log_weights.std()) / math.sqrt(len(log_weights))
    return AnnealedEstimate(
        LogZ(sign * mean_weight.value, bootstrap_error(signed, generator), mean_weight.ess),
        LogZ(float(log_weights.mean()), mean_error, mean_weight.ess),
        int((~log_weights.isfinite()).sum()),
    )
