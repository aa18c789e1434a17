"""Targets with known moments, log Z and exact draws, for tests, documentation and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.inference.kernels.base import Potential
from ppl_vaebm.rng import stream

# Neal (2003), "Slice sampling", section 8: the logarithm of the others' variance has standard deviation 3.
FUNNEL_SCALE = 3.0
# Points and reach of the quadrature over one standard normal; what lies beyond the reach has mass below 1e-22.
FUNNEL_POINTS, FUNNEL_REACH = 20_001, 10.0

NUM_PER_AXIS = 5
MODE_SCALE = 0.05
"""Standard deviation of a mode, where neighbours are 1 apart: that of the recipe gaussians25, in units of its grid."""
STEP_QUANTILES = (0.2, 0.4, 0.6, 0.8)
"""Where the steps are, as quantiles of N(0, 1): every landing has a fifth of the noise."""
STEP_WIDTH = 0.05
"""Standard deviation of a step in noise. Chosen by us: a tenth of the inner landings, so that bridges are rare."""
LANDING_SLOPE = 0.6
"""Slope of the landings. Chosen by us: the inner ones then reach 3 standard deviations of a mode to either side."""
# Inversion: bisections of a bracket of length 40, to below 1e-14. Quadrature: points and reach in noise.
NUM_BISECTIONS, BRACKET = 52, 20.0
GRID_POINTS = 400_001


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
    """N(0, I) itself in ``dim`` dimensions: Phi = 0, log Z = 0."""
    return Target(
        "reference",
        lambda position: torch.zeros_like(position[:, 0]),
        torch.zeros(dim, dtype=dtype),
        torch.ones(dim, dtype=dtype),
        0.0,
        lambda generator, n: torch.randn(n, dim, generator=generator, dtype=dtype),
    )


def gaussian(mean: Tensor, scale: Tensor) -> Target:
    """N(mean, diag(scale^2)), both ``(D,)``.

    ``Phi = sum_i ((q_i - mean_i)^2 / scale_i^2 - q_i^2) / 2``, so ``log Z = sum_i log scale_i``.
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

    No direction is wider than the reference, as where an energy only narrows the VAE. With ``is_rotated`` the axes are
    turned by one fixed random rotation: kernels with unit mass do not notice it, those that scale single coordinates
    cannot undo it. ``log Z = sum_i log sd_i``.
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
    dim: int, correlation: float = 0.8, dtype: torch.dtype = torch.float64, *, scales: Tensor | None = None
) -> Target:
    """A Gaussian with mean zero, correlation ``correlation^|i - j|`` and standard deviations ``scales``.

    ``log Z = (D - 1) log(1 - correlation^2) / 2 + sum_i log scale_i``.
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

    The modes are ``distance / scale`` standard deviations from the middle: local kernels do not cross it, moves through
    N(0, I) do. Phi is normalized against Lebesgue measure, so ``log Z = -log(2 pi) / 2``.
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


def banana(
    scale: float = 0.7, width: float = 0.3, curvature: float = 0.4, dtype: torch.dtype = torch.float64
) -> Target:
    """A Gaussian bent along a parabola (Haario, Saksman and Tamminen 1999), in two dimensions.

    ``q_0 = scale u_0`` and ``q_1 = width u_1 + curvature (q_0^2 - scale^2)`` of two standard normals u. The map from u
    has Jacobian ``scale width``, so ``log Z = log(scale width)``.
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
    """Neal's funnel written in noise, with every branch observed: ``y_i``, ``(D - 1,)``, is ``x_i`` with normal noise.

    ``v = 3 eps_0``, ``x_i = exp(v / 2) eps_i`` and ``Phi = sum_i (y_i - x_i)^2 / (2 noise_scale^2)``. Without
    observations the noise is N(0, I) exactly; they couple ``eps_0`` to all others. Given ``eps_0`` the others are
    independent normals, so everything follows from quadrature over ``eps_0``. Exact draws interpolate its distribution
    function between 20,001 points, with an error below 1e-6 in probability.
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
    """Return means ``(n, D - 1)`` and common variance ``(n,)`` of the others given ``eps_0``."""
    slope = (0.5 * FUNNEL_SCALE * first).exp()
    variance = 1 / (1 + (slope / noise_scale).square())
    return (variance * slope / noise_scale**2).unsqueeze(1) * y, variance


def _funnel_quadrature(y: Tensor, noise_scale: float) -> tuple[Tensor, Tensor, float]:
    """Integrate the others out: points of ``eps_0``, the mass of each under the target, and log Z."""
    points = torch.linspace(-FUNNEL_REACH, FUNNEL_REACH, FUNNEL_POINTS, dtype=torch.float64)
    spread = (FUNNEL_SCALE * points).exp() + noise_scale**2
    evidence = -0.5 * (y.square() / spread.unsqueeze(1)).sum(1) - 0.5 * len(y) * (spread / noise_scale**2).log()
    log_density = evidence - 0.5 * points.square() - 0.5 * math.log(2 * math.pi)
    log_z = float(log_density.logsumexp(0)) + math.log(2 * FUNNEL_REACH / (FUNNEL_POINTS - 1))
    return points, log_density.softmax(0), log_z


def logistic_regression(features: Tensor, labels: Tensor) -> Potential:
    """The posterior of a logistic regression with coefficients N(0, I) a priori: Phi is minus its log likelihood.

    Features are ``(n, D)``, with a column of ones for an intercept, labels 0 or 1, ``(n,)``. Nothing is known in closed
    form; ``tests/inference/reference_moments.json`` has the moments on one data set.
    """
    signs = 2 * labels.to(features) - 1
    signed = (signs.unsqueeze(1) * features).mT
    return lambda position: functional.softplus(-(position @ signed)).sum(-1)


def staircase(noise: Tensor) -> Tensor:
    """Map noise to data coordinate by coordinate, of any shape: monotone, onto, smooth.

    ``slope e + height sum_j Ncdf((e - c_j) / width) - 2 height``: odd, and ``k`` on the middle of landing k.
    """
    centres = _centres(noise)
    steps = torch.special.ndtr((noise.unsqueeze(-1) - centres) / STEP_WIDTH).sum(-1)
    x: Tensor = LANDING_SLOPE * noise + _height(centres) * (steps - 0.5 * len(centres))
    return x


def log_slope(noise: Tensor) -> Tensor:
    """Return the logarithm of the derivative of :func:`staircase`, of the shape of the noise."""
    centres = _centres(noise)
    bells = _log_normal((noise.unsqueeze(-1) - centres) / STEP_WIDTH).exp().sum(-1)
    return (LANDING_SLOPE + _height(centres) / STEP_WIDTH * bells).log()


def inverse_staircase(x: Tensor) -> Tensor:
    """Invert :func:`staircase` by bisection, without a gradient, for x of any shape within 10 of zero."""
    low, high = torch.full_like(x, -BRACKET), torch.full_like(x, BRACKET)
    for _ in range(NUM_BISECTIONS):
        middle = 0.5 * (low + high)
        is_above = staircase(middle) > x
        low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
    return 0.5 * (low + high)


def grid_modes(dtype: torch.dtype = torch.float64) -> Target:
    """25 modes N(m, 0.05^2 I), m on a 5 x 5 grid of spacing 1 around zero, as a target in noise space, D = 2.

    They lie behind a map from noise as those of a VAE that has found the modes: a staircase with a landing for each
    mode and a steep step between neighbours. It covers the modes but joins them by bridges, and its landings are
    several times as wide as a mode; the energy takes both away. ``E(x) = log p(x) - log h(x)`` with p what the
    staircase makes of N(0, I) and h the modes, and ``Phi(eps) = E(x(eps))``, so ``log Z = 0``. Mode ``5 i + j`` is
    i rows and j columns from ``(-2, -2)``.
    """

    def potential(position: Tensor) -> Tensor:
        log_p = _log_normal(position) - log_slope(position)
        return (log_p - _log_modes(staircase(position))).sum(-1)

    def exact(generator: torch.Generator, n: int) -> Tensor:
        mode = torch.randint(NUM_PER_AXIS, (n, 2), generator=generator) - NUM_PER_AXIS // 2
        x = mode + MODE_SCALE * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return inverse_staircase(x).to(dtype)

    def mode(position: Tensor) -> Tensor:
        half = NUM_PER_AXIS // 2
        row, column = staircase(position).round().clamp(-half, half).long().unbind(-1)
        return NUM_PER_AXIS * (row + half) + column + half

    variance = torch.full((2,), _variance(), dtype=dtype)
    return Target("grid_modes", potential, torch.zeros(2, dtype=dtype), variance, 0.0, exact, mode)


def _centres(like: Tensor) -> Tensor:
    centres: Tensor = torch.special.ndtri(like.new_tensor(STEP_QUANTILES))
    return centres


def _height(centres: Tensor) -> Tensor:
    # The inner landings' middles are 0 and the mean of two neighbouring steps; they have to be 1 apart in x.
    height: Tensor = 1 - LANDING_SLOPE * centres[-2:].mean()
    return height


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square() - 0.5 * math.log(2 * math.pi)


def _log_modes(x: Tensor) -> Tensor:
    """Log density of the five modes along one axis."""
    half = NUM_PER_AXIS // 2
    centres = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
    log_modes = _log_normal((x.unsqueeze(-1) - centres) / MODE_SCALE) - math.log(MODE_SCALE * NUM_PER_AXIS)
    return log_modes.logsumexp(-1)


def _variance() -> float:
    """Integrate the square of one coordinate of noise; the mean is zero, for map and modes are odd."""
    points = torch.linspace(-6, 6, GRID_POINTS, dtype=torch.float64)
    density = (_log_modes(staircase(points)) + log_slope(points)).exp()
    return float((density * points.square()).sum() / density.sum())
