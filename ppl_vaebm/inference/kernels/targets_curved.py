"""Targets with one mode that are not Gaussian: bent, of varying scale, and a posterior of a regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.inference.kernels.base import Potential
from ppl_vaebm.inference.kernels.targets import Target

# Neal (2003), "Slice sampling", section 8: the logarithm of the others' variance has standard deviation 3.
FUNNEL_SCALE = 3.0
# Points and reach of the quadrature over one standard normal; what lies beyond the reach has mass below 1e-22.
NUM_POINTS, REACH = 20_001, 10.0


def banana(
    scale: float = 0.7, width: float = 0.3, curvature: float = 0.4, dtype: torch.dtype = torch.float64
) -> Target:
    """A Gaussian bent along a parabola (Haario, Saksman and Tamminen 1999), in two dimensions.

    ``q_0 = scale u_0`` and ``q_1 = width u_1 + curvature (q_0^2 - scale^2)`` of two standard normals u.

    Args:
        scale: standard deviation along the parabola's axis, positive.
        width: standard deviation across the parabola, positive.
        curvature: of the parabola; 0 leaves a Gaussian.
        dtype: of positions.

    Returns:
        The target; the map from u has Jacobian ``scale width``, so ``log Z = log(scale width)``.
    """

    def potential(position: Tensor) -> Tensor:
        bend = curvature * (position[:, 0].square() - scale**2)
        along, across = position[:, 0] / scale, (position[:, 1] - bend) / width
        return 0.5 * (along.square() + across.square() - position.square().sum(-1))

    def exact(generator: torch.Generator, n: int) -> Tensor:
        along, across = torch.randn(2, n, generator=generator, dtype=dtype)
        return torch.stack([scale * along, width * across + curvature * scale**2 * (along.square() - 1)], dim=1)

    variance = torch.tensor([scale**2, width**2 + 2 * curvature**2 * scale**4], dtype=dtype)
    return Target("banana", potential, torch.zeros(2, dtype=dtype), variance, math.log(scale * width), exact)


def funnel(observations: Tensor, noise_scale: float = 1.0) -> Target:
    """Neal's funnel written in noise, with every branch observed.

    ``v = 3 eps_0`` and ``x_i = exp(v / 2) eps_i``, and ``y_i`` is seen of ``x_i`` with normal noise. Without the
    observations the noise is N(0, I) exactly, which is why one samples it there and not in ``(v, x)``; they couple
    ``eps_0`` to all others. Given ``eps_0`` the others are independent normals, so everything follows from
    quadrature over ``eps_0``.

    Args:
        observations: ``y``, ``(D - 1,)``; their dtype is that of the target.
        noise_scale: standard deviation of the observations, positive.

    Returns:
        The target, ``Phi = sum_i (y_i - x_i)^2 / (2 noise_scale^2)``; exact draws of ``eps_0`` are as exact as the
        linear interpolation of its distribution function between 20,001 points, an error below 1e-6 in probability.
    """

    def potential(position: Tensor) -> Tensor:
        x = (0.5 * FUNNEL_SCALE * position[:, :1]).exp() * position[:, 1:]
        return 0.5 * ((observations - x) / noise_scale).square().sum(-1)

    y = observations.double()
    points, mass, log_z = _funnel_quadrature(y, noise_scale)
    means, variances = _branches(points, y, noise_scale)
    mean = torch.cat([(mass @ points).unsqueeze(0), mass @ means])
    second = torch.cat([(mass @ points.square()).unsqueeze(0), mass @ (variances.unsqueeze(1) + means.square())])
    cumulative = mass.cumsum(0) - 0.5 * mass

    def exact(generator: torch.Generator, n: int) -> Tensor:
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        right = torch.searchsorted(cumulative, uniform).clamp(1, len(points) - 1)
        fraction = (uniform - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
        first = points[right - 1] + fraction * (points[right] - points[right - 1])
        loc, variance = _branches(first, y, noise_scale)
        others = loc + variance.sqrt().unsqueeze(1) * torch.randn(n, len(y), generator=generator, dtype=torch.float64)
        return torch.cat([first.unsqueeze(1), others], dim=1).to(observations)

    return Target("funnel", potential, mean.to(observations), (second - mean.square()).to(observations), log_z, exact)


def _branches(first: Tensor, y: Tensor, noise_scale: float) -> tuple[Tensor, Tensor]:
    """Give the law of the others given ``eps_0``: means ``(n, D - 1)`` and the variance that all share, ``(n,)``."""
    slope = (0.5 * FUNNEL_SCALE * first).exp()
    variance = 1 / (1 + (slope / noise_scale).square())
    return (variance * slope / noise_scale**2).unsqueeze(1) * y, variance


def _funnel_quadrature(y: Tensor, noise_scale: float) -> tuple[Tensor, Tensor, float]:
    """Integrate the others out: points of ``eps_0``, the mass of each under the target, and log Z."""
    points = torch.linspace(-REACH, REACH, NUM_POINTS, dtype=torch.float64)
    spread = (FUNNEL_SCALE * points).exp() + noise_scale**2
    evidence = -0.5 * (y.square() / spread.unsqueeze(1)).sum(1) - 0.5 * len(y) * (spread / noise_scale**2).log()
    log_density = evidence - 0.5 * points.square() - 0.5 * math.log(2 * math.pi)
    log_z = float(log_density.logsumexp(0)) + math.log(2 * REACH / (NUM_POINTS - 1))
    return points, log_density.softmax(0), log_z


def logistic_regression(features: Tensor, labels: Tensor) -> Potential:
    """The posterior of a logistic regression whose coefficients are N(0, I) a priori: Phi is minus its log likelihood.

    Nothing of it is known in closed form; ``tests/inference/reference_moments.json`` has the moments on one data set.

    Args:
        features: ``(n, D)``, with a column of ones where an intercept is wanted.
        labels: 0 or 1, ``(n,)``.

    Returns:
        Phi.
    """
    signs = 2 * labels.to(features) - 1
    signed = (signs.unsqueeze(1) * features).mT
    return lambda position: functional.softplus(-(position @ signed)).sum(-1)
