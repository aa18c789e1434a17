"""Distances of two sets of features: Frechet's, with its bias, and the kernel distance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.inputs import Estimate, checked_pair


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Frechet distance of two Gaussians fitted to features ``(n_a, d)`` and ``(n_b, d)``.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982; Heusel et al. 2017,
    arXiv:1706.08500), in squared units of the features; 0 for the same set twice, up to rounding. It falls with the
    number of samples: compare only at equal numbers, and name the result after the network that made the features.

    Raises:
        InputError: fewer than two rows, different widths, or numbers that are not finite.
    """
    features_a, features_b = checked_pair(features_a, features_b, "a Frechet distance")
    mean_a, covariance_a = _moments(features_a)
    mean_b, covariance_b = _moments(features_b)
    root_a = _square_root(covariance_a)
    # Rounding can make the smallest eigenvalues of a semi-definite matrix negative.
    eigenvalues = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0)
    trace = covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.sqrt().sum()
    return float((mean_a - mean_b).square().sum() + trace)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _square_root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return root


class FrechetBias(NamedTuple):
    """Bias of a Frechet distance of few samples, which is too high, in squared units of the features."""

    low: float
    """How much higher the distance of halves of both sets is: the bias where it falls as 1 / n, which it does from
    about twice as many samples as features on; with fewer it falls more slowly, and this is part of it."""
    high: float
    """The distance of two disjoint parts of the data, which would be 0 but for the bias. One is as large as the
    generated set if the data are at least twice as many, and then this is the bias of samples of that distribution;
    else both are halves, and it is above that."""


def frechet_bias(real: Tensor, generated: Tensor, generator: torch.Generator) -> FrechetBias:
    """Estimate the bias of a Frechet distance of data and samples, ``(n, d)`` each, without a model of the features.

    Covariances of few samples differ even where the distributions are the same, so the distance is too high:
    for two sets of n samples of d independent Gaussian features by about d / 2n of their total variance where n is
    well above d, and by up to twice that variance where n is far below. In simulations with 16 features the low value
    was within 5 % of the bias at n = 8 d, and from n = d / 3 to 2 d the bias lay between the two, but for 10 %
    (``tests/evaluation/metrics/test_frechet.py``). The generator, on the CPU, draws the parts.

    Raises:
        InputError: fewer than four rows, different widths, or numbers that are not finite.
    """
    real, generated = checked_pair(real, generated, "the bias of a Frechet distance", 4)
    real, generated = (x[torch.randperm(len(x), generator=generator).to(x.device)] for x in (real, generated))
    real_halves, generated_halves = real.tensor_split(2), generated.tensor_split(2)
    halved = [frechet_distance(a, b) for a, b in zip(real_halves, generated_halves, strict=True)]
    num = min(len(generated), len(real) // 2)
    return FrechetBias(sum(halved) / 2 - frechet_distance(real, generated), frechet_distance(real[:num], real[num:]))


def kernel_distance(
    features_a: Tensor, features_b: Tensor, generator: torch.Generator, num_subsets: int = 100, subset_size: int = 1_000
) -> Estimate:
    """Estimate the kernel distance (KID): the squared maximum mean discrepancy under a cubic kernel, without bias.

    ``E k(a, a') + E k(b, b') - 2 E k(a, b)`` with ``k(x, y) = (x y / d + 1)^3``, averaged over random subsets
    (Binkowski et al. 2018, arXiv:1801.01401, section 4). Unlike a Frechet distance its mean does not depend on the
    number of samples, so it may be negative where the sets are alike.

    Args:
        features_a: ``(n_a, d)``.
        features_b: ``(n_b, d)``.
        generator: source of the subsets, on the CPU.
        subset_size: members of a subset, drawn without replacement from each set; at most half of the smaller set, for
            whole sets in every subset would not show how much another set would differ.

    Returns:
        The distance and its standard error. The latter has two parts: which subsets were drawn, and which samples there
        were. The second follows from the spread s of the subsets, for the variance of a mean over m of n is to that
        over n as n to m: ``s^2 f / (1 - f)`` with ``f = m / n``. Each set has its own f, so s^2 is shared between them,
        as it is found in pairs of subsets when those of one set change and those of the other stay. Where the sets are
        alike the error is too large, for there the variance falls as 1 / n^2.

    Raises:
        InputError: fewer than four rows, subsets of fewer than two, different widths, or numbers that are not finite.
    """
    features_a, features_b = checked_pair(features_a, features_b, "a kernel distance", 4)
    if num_subsets < 2 or subset_size < 2:
        raise InputError(
            f"a kernel distance needs at least 2 subsets of at least 2 members, got {num_subsets} of {subset_size}; "
            "ask for more"
        )
    num = min(len(features_a), len(features_b))
    size = min(subset_size, num // 2)
    values: list[Tensor] = []
    by_a = by_b = 0.0
    for start in range(0, num_subsets, 2):
        pairs = [
            (_Subset.of(features_a, size, generator), _Subset.of(features_b, size, generator))
            for _ in range(min(2, num_subsets - start))
        ]
        values += [_kernel_distance(a, b) for a, b in pairs]
        if len(pairs) == 2:
            # Two subsets of each set make a table of four distances; its rows and columns differ independently.
            (a, b), (other_a, other_b) = pairs
            straight, crossed = values[-1] - values[-2], _kernel_distance(other_a, b) - _kernel_distance(a, other_b)
            by_a += float((straight + crossed).square())
            by_b += float((straight - crossed).square())
    part_a = by_a / (by_a + by_b) if by_a + by_b else 0.5
    factor_a, factor_b = (size / (len(features) - size) for features in (features_a, features_b))
    estimates = torch.stack(values)
    error = estimates.var() * (1 / num_subsets + part_a * factor_a + (1 - part_a) * factor_b)
    return Estimate(float(estimates.mean()), math.sqrt(float(error)))


class _Subset(NamedTuple):
    rows: Tensor
    """``(size, d)``."""
    within: Tensor
    """Mean kernel of two different rows, ``()``."""

    @staticmethod
    def of(features: Tensor, size: int, generator: torch.Generator) -> _Subset:
        rows = features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]
        matrix = _kernel(rows, rows)
        return _Subset(rows, (matrix.sum() - matrix.trace()) / (size * (size - 1)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _kernel_distance(a: _Subset, b: _Subset) -> Tensor:
    """Return the unbiased estimate from two subsets of one size, ``()``."""
    return a.within + b.within - 2 * _kernel(a.rows, b.rows).mean()
