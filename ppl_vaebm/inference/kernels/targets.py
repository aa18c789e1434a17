"""Targets with known moments, normaliser and exact draws: for tests, documentation and benchmarks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import Potential
from ppl_vaebm.rng import stream


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
    mode: Callable[[Tensor], Tensor] | None = None
    """Index of the mode that a position belongs to, ``(C, D)`` to ``(C,)``, int64; where there are several."""


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


def conditioned_gaussian(
    dim: int, condition_number: float = 100.0, dtype: torch.dtype = torch.float64, *, is_rotated: bool = False
) -> Target:
    """A Gaussian with mean zero and variances from ``1 / condition_number`` to 1, evenly spaced in their logarithm.

    No direction is wider than the reference, as where an energy only narrows what the VAE draws. Kernels with unit
    mass do not notice a rotation; those that scale single coordinates cannot undo one.

    Args:
        dim: D, at least 2.
        condition_number: largest variance over the smallest, at least 1.
        dtype: of positions.
        is_rotated: turn the axes by one fixed random rotation; else coordinate i has the i-th smallest variance.

    Returns:
        The target; ``log Z = sum_i log sd_i``.
    """
    variances = torch.logspace(-math.log10(condition_number), 0, dim, dtype=dtype)
    if not is_rotated:
        return gaussian(torch.zeros(dim, dtype=dtype), variances.sqrt())._replace(name="conditioned_gaussian")
    along_axes = gaussian(torch.zeros(dim, dtype=dtype), variances.sqrt())
    normals = torch.randn(dim, dim, generator=stream(0, "rotation"), dtype=torch.float64)
    rotation = torch.linalg.qr(normals).Q.to(dtype)
    return Target(
        "conditioned_gaussian",
        lambda position: along_axes.potential(position @ rotation),
        along_axes.mean,
        rotation.square() @ variances,
        along_axes.log_z,
        lambda generator, n: along_axes.exact(generator, n) @ rotation.mT,
    )


def ar1_gaussian(
    dim: int,
    correlation: float = 0.8,
    dtype: torch.dtype = torch.float64,
    *,
    scales: Tensor | None = None,
) -> Target:
    """A Gaussian with mean zero and correlation ``correlation^|i - j|``.

    Args:
        dim: D.
        correlation: of neighbours, in (-1, 1).
        dtype: of positions.
        scales: standard deviations, ``(D,)``, positive; all 1 if not given.

    Returns:
        The target; ``log Z = (D - 1) log(1 - correlation^2) / 2 + sum_i log scale_i``.
    """
    innovation = math.sqrt(1 - correlation**2)
    scale = torch.ones(dim, dtype=dtype) if scales is None else scales.to(dtype)

    def potential(position: Tensor) -> Tensor:
        unit = position / scale
        innovations = (unit[:, 1:] - correlation * unit[:, :-1]) / innovation
        return 0.5 * (unit[:, 0].square() + innovations.square().sum(-1) - position.square().sum(-1))

    def exact(generator: torch.Generator, n: int) -> Tensor:
        noise = torch.randn(n, dim, generator=generator, dtype=dtype)
        columns = [noise[:, 0]]
        for index in range(1, dim):
            columns.append(correlation * columns[-1] + innovation * noise[:, index])
        return torch.stack(columns, -1) * scale

    log_z = (dim - 1) * math.log(innovation) + float(scale.log().sum())
    return Target("ar1_gaussian", potential, torch.zeros(dim, dtype=dtype), scale.square(), log_z, exact)


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
    log_z = -0.5 * math.log(2 * math.pi)
    return Target("two_modes", potential, mean, variance, log_z, exact, lambda position: (position[:, 0] > 0).long())
