"""How far samples are from data, from given features or points; everything in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError

# A point within this many standard deviations of its nearest mode is of high quality: the convention of the
# 25-Gaussians experiments (Srivastava et al. 2017, VEEGAN, arXiv:1705.07761).
HIGH_QUALITY_NUM_STD = 3.0


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Frechet distance of two Gaussians fitted to features.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982; Heusel et al. 2017,
    arXiv:1706.08500). It falls with the number of samples: compare only at equal numbers, and name the
    result after the network that made the features.

    Args:
        features_a: ``(n_a, d)``.
        features_b: ``(n_b, d)``.

    Returns:
        The squared distance, in squared units of the features; the same set twice gives 0 up to rounding.

    Raises:
        InputError: fewer than two rows, different widths, or numbers that are not finite.
    """
    mean_a, covariance_a = _moments(features_a)
    mean_b, covariance_b = _moments(features_b)
    if mean_a.shape != mean_b.shape:
        raise InputError(
            f"a Frechet distance needs features of one width, got {len(mean_a)} and {len(mean_b)}; "
            "use the same network for both"
        )
    root_a = _square_root(covariance_a)
    # Rounding can make the smallest eigenvalues of a semi-definite matrix negative.
    eigenvalues = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0)
    trace = covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.sqrt().sum()
    return float((mean_a - mean_b).square().sum() + trace)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or len(features) < 2 or not bool(features.isfinite().all()):
        raise InputError(
            f"a Frechet distance needs finite features of shape (n, d) with n >= 2, got shape "
            f"{tuple(features.shape)} with {int((~features.isfinite()).sum())} numbers that are not finite; "
            "look at the samples"
        )
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _square_root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return root


class ModeStatistics(NamedTuple):
    """How samples cover a mixture with known, equally likely modes."""

    high_quality: float
    """Share of the samples within 3 standard deviations of their nearest mode, in [0, 1]; in two dimensions
    the true mixture has 1 - exp(-4.5) = 0.9889."""
    num_modes: int
    """Modes with at least one such sample."""
    kl_to_uniform: float
    """KL divergence, in nats, of the histogram q of such samples over the m modes against uniform, sum q log(q m):
    0 if even, log(m) if all are at one mode, NaN if there is no such sample."""


def mode_statistics(x: Tensor, modes: Tensor, mode_std: float) -> ModeStatistics:
    """Count samples at the modes of a mixture.

    Args:
        x: samples, ``(n, d)``, n >= 1; one that is not finite is at no mode.
        modes: centres, ``(m, d)``.
        mode_std: standard deviation of each component, along every axis.

    Returns:
        The statistics.

    Raises:
        InputError: the shapes do not fit.
    """
    if x.ndim != 2 or len(x) == 0 or x.shape[1:] != modes.shape[1:]:
        raise InputError(
            f"mode statistics need samples of shape (n, {modes.shape[1]}) with n >= 1, got {tuple(x.shape)}; "
            "give one sample per row"
        )
    squares = (x.double().unsqueeze(1) - modes.double()).square().sum(-1)
    nearest, mode = squares.min(1)
    is_good = nearest.sqrt() <= HIGH_QUALITY_NUM_STD * mode_std
    counts = torch.bincount(mode[is_good], minlength=len(modes)).double()
    share = counts / counts.sum()
    kl = math.log(len(modes)) + torch.special.xlogy(share, share).sum()
    return ModeStatistics(float(is_good.double().mean()), int((counts > 0).sum()), float(kl))
