"""Starts for chains on a posterior that is far from N(0, I): particles led there by tempering.

Sequential Monte Carlo (Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo samplers", section 3.3.1): from draws
of N(0, I) through the densities ``exp(-b Phi) N(q; 0, I)``, b from 0 to 1. At each level the particles are resampled by
their weights, so that what explains nothing dies out, and then moved by HMC. The particles end near the posterior with
its modes about as heavy as they should be, which chains that descend on their own cannot promise; they are starts,
not draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE
from ppl_vaebm.inference.kernels.base import Kernel, Potential
from ppl_vaebm.inference.log_z.annealing import kernel_at, move, resample, take
from ppl_vaebm.inference.potential import NoisePotential

TARGET_ESS = 0.5
"""Share of the particles that are effective after a level's weights, which fixes the level: the usual choice."""
MAX_LEVELS = 200
"""Levels after which the tempering is given up. Chosen by us: posteriors of digits take 7 to 10."""
NUM_MOVES = 4
"""Transitions per level."""
NUM_STEPS = 5
"""Steps of one transition's trajectory."""
JITTER = 0.2
"""Relative spread of its angle, the configuration's default."""
NUM_BISECTIONS = 40
"""Halvings that find a level, to 1e-12 of b."""
FIRST_STEP_SIZE = 0.5
"""Angle at b = 0, where every angle is right."""


class Starts(NamedTuple):
    """Where chains may begin."""

    position: Tensor
    """``(C, D)``; of several observations each has as many rows, one after another."""
    step_size: float
    """Angle of HMC's steps in the end."""
    num_levels: int
    """Levels of the tempering after b = 0."""
    num_evals: int
    """Evaluations of the potential per particle."""


def annealed_starts(
    potential: NoisePotential,
    generator: torch.Generator,
    num_chains: int,
    *,
    num_groups: int = 1,
    num_particles: int | None = None,
) -> Starts:
    """Lead particles from N(0, I) to a posterior.

    Args:
        potential: of the posterior.
        generator: source of all randomness.
        num_chains: starts for each observation.
        num_groups: observations that the potential has.
        num_particles: particles for each observation, at least as many as chains; four times as many if not given.

    Returns:
        The starts: particles chosen at random.

    Raises:
        InputError: fewer particles than chains, no particle of an observation has a finite Phi, or the posterior is
            too far for :data:`MAX_LEVELS` levels.
    """
    size = 4 * num_chains if num_particles is None else num_particles
    if size < num_chains:
        raise InputError(f"expected at least {num_chains} particles, one for each chain, found {size}: give more")
    state = kernel_at(potential, 1.0, _build).init(potential.draw_reference(generator, num_groups * size))
    inverse_temperature, step_size, num_evals = 0.0, FIRST_STEP_SIZE, 1
    for level in range(1, MAX_LEVELS + 1):
        phi = state.potential.double().view(num_groups, size)
        phi = phi.masked_fill(~phi.isfinite(), math.inf)  # a weight of zero
        rise = _largest_rise(phi, 1 - inverse_temperature)
        state = take(state, _resampled(generator, -rise * phi))
        inverse_temperature = 1.0 if rise == 1 - inverse_temperature else inverse_temperature + rise
        for _ in range(NUM_MOVES):
            state, info = move(potential, _build, generator, state, inverse_temperature, step_size)
            # The step follows the acceptance from one transition to the next.
            excess = float(info.acceptance_rate.mean()) - hmc.HMC_TARGET_ACCEPTANCE
            step_size = min(MAX_STEP_SIZE, step_size * math.exp(excess))
            num_evals += NUM_STEPS
        if inverse_temperature == 1:
            order = torch.rand(num_groups, size, generator=generator, device=phi.device).argsort(1)[:, :num_chains]
            return Starts(state.position[_rows(order, size)], step_size, level, num_evals)
    raise InputError(
        f"expected tempering to reach the posterior, found it at b = {inverse_temperature:.3g} after {MAX_LEVELS} "
        "levels: what was observed is too far from what the model draws, so state a larger noise-sd"
    )


def _build(potential: Potential) -> Kernel:
    return hmc.build(potential, num_steps=NUM_STEPS, jitter=JITTER)


def _rows(within: Tensor, size: int) -> Tensor:
    """Turn places within groups, ``(G, P)``, into rows."""
    return (within + size * torch.arange(len(within), device=within.device).unsqueeze(1)).flatten()


def _largest_rise(phi: Tensor, largest: float) -> float:
    """Find how far b may rise until the weights' effective share, on average over groups, has come to the target.

    Args:
        phi: ``(G, P)``.
        largest: rise to b = 1.

    Returns:
        The rise, at most the largest.
    """
    if not phi.isfinite().any(1).all():
        raise InputError(
            "expected an observation that some draws of the VAE can explain, found that no particle of some "
            "observation has a finite potential: check the values given, or state a larger noise-sd"
        )
    if _effective_share(-largest * phi) >= TARGET_ESS:
        return largest
    low, high = 0.0, largest
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _effective_share(-middle * phi) >= TARGET_ESS else (low, middle)
    return high


def _effective_share(log_weights: Tensor) -> float:
    log_ess = 2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)
    return float(log_ess.exp().mean()) / log_weights.shape[1]


def _resampled(generator: torch.Generator, log_weights: Tensor) -> Tensor:
    """Choose rows within each group by its weights, ``(G, P)`` to ``(G * P,)``."""
    chosen = torch.stack([resample(group, generator) for group in log_weights])
    return _rows(chosen, log_weights.shape[1])
