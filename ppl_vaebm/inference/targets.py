"""Targets with known moments, normaliser and exact draws: for tests, documentation and benchmarks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.base import Potential


class Target(NamedTuple):
    """A density relative to N(0, I) about which everything is known."""

    name: str
    potential: Potential
    """Phi, ``(C, D)`` to ``(C,)``, nats."""
    mean: Tensor
    """``(D,)``."""
    variance: Tensor
    """``(D,)``."""
    log_z: float
    """``log E[exp(-Phi(q))]`` under q ~ N(0, I), nats."""
    exact: Callable[[torch.Generator, int], Tensor]
    """Independent draws, ``(n, D)``, from a generator and n."""


def reference(dim: int, dtype: torch.dtype = torch.float64) -> Target:
    """N(0, I) itself: Phi = 0.

    Args:
        dim: D.
        dtype: of positions.

    Returns:
        The target; log Z = 0.
    """
    return Target(
        "reference",
        lambda position: torch.zeros_like(position[:, 0]),
        torch.zeros(dim, dtype=dtype),
        torch.ones(dim, dtype=dtype),
        0.0,
        lambda generator, n: torch.randn(n, dim, generator=generator, dtype=dtype),
    )


def gaussian(mean: Tensor, scale: Tensor) -> Target:
    """N(mean, diag(scale^2)).

    ``Phi = sum_i ((q_i - mean_i)^2 / scale_i^2 - q_i^2) / 2``, so ``log Z = sum_i log scale_i``.

    Args:
        mean: ``(D,)``.
        scale: ``(D,)``, positive.

    Returns:
        The target.
    """

    def potential(position: Tensor) -> Tensor:
        return 0.5 * (((position - mean) / scale).square() - position.square()).sum(-1)

    def exact(generator: torch.Generator, n: int) -> Tensor:
        return mean + scale * torch.randn(n, len(mean), generator=generator, dtype=mean.dtype)

    return Target("gaussian", potential, mean, scale.square(), float(scale.log().sum()), exact)


def ar1_gaussian(dim: int, correlation: float = 0.8, dtype: torch.dtype = torch.float64) -> Target:
    """A Gaussian with unit variances and correlation ``correlation^|i - j|``.

    Args:
        dim: D.
        correlation: of neighbours, in (-1, 1).
        dtype: of positions.

    Returns:
        The target; ``log Z = (D - 1) log(1 - correlation^2) / 2``.
    """
    innovation = math.sqrt(1 - correlation**2)

    def potential(position: Tensor) -> Tensor:
        innovations = (position[:, 1:] - correlation * position[:, :-1]) / innovation
        return 0.5 * (innovations.square() - position[:, 1:].square()).sum(-1)

    def exact(generator: torch.Generator, n: int) -> Tensor:
        noise = torch.randn(n, dim, generator=generator, dtype=dtype)
        columns = [noise[:, 0]]
        for index in range(1, dim):
            columns.append(correlation * columns[-1] + innovation * noise[:, index])
        return torch.stack(columns, -1)

    zeros, ones = torch.zeros(dim, dtype=dtype), torch.ones(dim, dtype=dtype)
    return Target("ar1_gaussian", potential, zeros, ones, (dim - 1) * math.log(innovation), exact)


def two_modes(distance: float = 2.0, scale: float = 0.2, dtype: torch.dtype = torch.float64) -> Target:
    """Half of N(-distance, scale^2) and half of N(+distance, scale^2) in one dimension.

    The modes are ``distance / scale`` standard deviations from the middle: local kernels do not cross, moves
    through N(0, I) do.

    Args:
        distance: of a mode from 0.
        scale: standard deviation of a mode.
        dtype: of positions.

    Returns:
        The target; Phi is normalised against Lebesgue measure, so ``log Z = -log(2 pi) / 2``.
    """
    log_scale = math.log(scale)

    def potential(position: Tensor) -> Tensor:
        q = position[:, 0]
        exponents = torch.stack([-0.5 * ((q - sign * distance) / scale).square() for sign in (-1, 1)])
        log_density = exponents.logsumexp(0) - math.log(2) - log_scale - 0.5 * math.log(2 * math.pi)
        return -log_density - 0.5 * q.square()

    def exact(generator: torch.Generator, n: int) -> Tensor:
        sign = torch.randint(0, 2, (n, 1), generator=generator, dtype=dtype) * 2 - 1
        return sign * distance + scale * torch.randn(n, 1, generator=generator, dtype=dtype)

    mean = torch.zeros(1, dtype=dtype)
    variance = torch.full((1,), distance**2 + scale**2, dtype=dtype)
    return Target("two_modes", potential, mean, variance, -0.5 * math.log(2 * math.pi), exact)
