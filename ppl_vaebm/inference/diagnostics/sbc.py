"""Simulation-based calibration: a test of whether a sampler draws from the right posterior.

Talts, Betancourt, Simpson, Vehtari and Gelman (2018), "Validating Bayesian inference algorithms with simulation-based
calibration", arXiv:1804.06788, algorithm 2: draw from the prior, simulate an observation, draw from its posterior, and
rank the prior draw among the posterior draws. If all three are right, the rank is uniform on 0, ..., L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor


class Uniformity(NamedTuple):
    """Histogram of ranks and a test of its uniformity."""

    counts: list[int]
    """Simulations in each bin."""
    chi_square: float
    """Pearson's statistic against equal expected counts."""
    p_value: float
    """Upper tail of the chi-square distribution with one degree of freedom fewer than bins."""


def ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Count the L posterior draws of a quantity, ``(S, L)``, nearly independent, below its prior draw, ``(S,)``."""
    return (draws < truth.unsqueeze(1)).sum(1)


def uniformity(ranks: Tensor, num_draws: int, num_bins: int) -> Uniformity:
    """Test ranks among ``num_draws``, ``(S,)``, for uniformity; ValueError for bins of different probability.

    The number of bins is a divisor of ``num_draws + 1``, so that all are equally probable.
    """
    if (num_draws + 1) % num_bins:
        raise ValueError(f"expected num_bins to divide the {num_draws + 1} possible ranks, found {num_bins}")
    counts = torch.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)
    chi_square, p_value = stats.chisquare(counts.numpy())
    return Uniformity(counts.tolist(), float(chi_square), float(p_value))
