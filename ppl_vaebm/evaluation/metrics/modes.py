"""Coverage of known modes, centres of a mixture or classes, by samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Binomial

from ppl_vaebm.errors import InputError

# A point within this many standard deviations of its nearest mode is of high quality: the convention of the
# 25-Gaussians experiments (Srivastava et al. 2017, VEEGAN, arXiv:1705.07761).
HIGH_QUALITY_NUM_STD = 3.0


class ModeStatistics(NamedTuple):
    """Coverage of a mixture with known, equally likely modes by samples."""

    high_quality: float
    """Fraction of the samples within 3 standard deviations of their nearest mode, in [0, 1]; in two dimensions
    the true mixture has 1 - exp(-4.5) = 0.9889."""
    num_modes: int
    """Modes with at least one such sample."""
    kl_to_uniform: float
    """KL divergence, in nats, of the histogram q of such samples over the m modes against uniform, sum q log(q m):
    0 if even, log(m) if all are at one mode, NaN if there is no such sample."""


def mode_statistics(x: Tensor, modes: Tensor, mode_std: float) -> ModeStatistics:
    """Count samples at the modes of a mixture; arguments as :func:`mode_counts`, InputError for other shapes."""
    if x.ndim != 2 or len(x) == 0 or x.shape[1:] != modes.shape[1:]:
        raise InputError(
            f"mode statistics need samples of shape (n, {modes.shape[1]}) with n >= 1, got {tuple(x.shape)}; "
            "give one sample per row"
        )
    counts = mode_counts(x, modes, mode_std)
    return ModeStatistics(float(counts.sum()) / len(x), int((counts > 0).sum()), _kl_to_uniform(counts))


def mode_counts(x: Tensor, modes: Tensor, mode_std: float) -> Tensor:
    """Count the samples ``(n, d)`` at each mode ``(m, d)``, their nearest, within 3 standard deviations: ``(m,)``.

    A sample that is not finite is at no mode. ``mode_std`` is that of each component, along every axis.
    """
    squares = (x.double().unsqueeze(1) - modes.double()).square().sum(-1)
    nearest, mode = squares.min(1)
    return torch.bincount(mode[nearest.sqrt() <= HIGH_QUALITY_NUM_STD * mode_std], minlength=len(modes))


class ClassCoverage(NamedTuple):
    """Coverage of equally likely classes, such as StackedMNIST's 1,000, by classified samples."""

    num_modes: float
    """Classes with at least one sample; a mean over sets of samples need not be whole."""
    kl_to_uniform: float
    """KL divergence, in nats, of the histogram q of the m classes against uniform, sum q log(q m)."""


def class_coverage(labels: Tensor, num_classes: int) -> ClassCoverage:
    """Count the classes of samples and measure how evenly they occur (Metz et al. 2017, arXiv:1611.02163).

    Both numbers grow or fall with the number of samples: compare only at equal numbers, and with
    :func:`coverage_of_even_draws`. The custom for StackedMNIST is 26,000 (Lin et al. 2018, PacGAN, arXiv:1712.04086).

    Args:
        labels: the class of each sample, ``(n,)``, integers in {0, ..., num_classes - 1}, n >= 1.

    Raises:
        InputError: there are no labels, or one is not such a class.
    """
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
        raise InputError(
            f"class coverage needs integer labels of shape (n,) with n >= 1, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; give one class per sample"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"labels must lie in 0..{num_classes - 1}, got {low}..{high}; use the classifier of the same data"
        )
    counts = torch.bincount(labels, minlength=num_classes)
    return ClassCoverage(int((counts > 0).sum()), _kl_to_uniform(counts))


def coverage_of_even_draws(num: int, num_classes: int) -> ClassCoverage:
    """Compute what independent draws of evenly distributed classes have on average.

    A class is missing with probability ``(1 - 1/m)^n``, so ``m (1 - (1 - 1/m)^n)`` are there. For the divergence, all m
    classes have a Binomial(n, 1/m) count C, and ``m E[C/n log(m C/n)] = E[log(m (1 + B)/n)]`` with B of
    Binomial(n - 1, 1/m), for ``c P(C = c) = n/m P(B = c - 1)``. The customary ``(m - 1) / 2n`` is its limit for many
    draws: of 1,000 classes 2,000 draws have 0.285 nats, where that says 0.250, and 26,000 have 0.0193 where it says
    0.0192. InputError for no draws, or no classes.
    """
    if num < 1 or num_classes < 1:
        raise InputError(f"even draws need n >= 1 draws of m >= 1 classes, got {num} of {num_classes}; ask for more")
    others = torch.arange(num, dtype=torch.float64)
    probability = torch.tensor(1 / num_classes, dtype=torch.float64)
    weights = Binomial(num - 1, probability).log_prob(others).exp()
    divergence = float((weights * (others + 1).log()).sum()) - math.log(num / num_classes)
    missing = (1 - 1 / num_classes) ** num
    return ClassCoverage(num_classes * (1 - missing), divergence)


def _kl_to_uniform(counts: Tensor) -> float:
    """Return the divergence of a histogram ``(m,)`` from the uniform one, in nats; NaN if it is empty."""
    share = counts.double() / counts.sum()
    return math.log(len(counts)) + float(torch.special.xlogy(share, share).sum())
