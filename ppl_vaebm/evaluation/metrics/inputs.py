"""Checks of the features that metrics of samples take, and an estimate with its error."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ppl_vaebm.errors import InputError


class Estimate(NamedTuple):
    """A number from random samples."""

    value: float
    error: float
    """Standard error; of an Inception Score the standard deviation over its splits, as is the custom."""


def checked(features: Tensor, metric: str, at_least: int = 2) -> Tensor:
    """Check features ``(n, d)`` of a metric, named with its article, and return them in float64.

    Raises:
        InputError: another shape, fewer rows, or numbers that are not finite.
    """
    if features.ndim != 2 or len(features) < at_least or not bool(features.isfinite().all()):
        raise InputError(
            f"{metric} needs finite features of shape (n, d) with n >= {at_least}, got shape "
            f"{tuple(features.shape)} with {int((~features.isfinite()).sum())} numbers that are not finite; "
            "look at the samples"
        )
    return features.double()


def checked_pair(a: Tensor, b: Tensor, metric: str, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Check two sets of features of one width, and return them in float64; see :func:`checked`."""
    a, b = checked(a, metric, at_least), checked(b, metric, at_least)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"{metric} needs features of one width, got {a.shape[1]} and {b.shape[1]}; use the same network for both"
        )
    return a, b
