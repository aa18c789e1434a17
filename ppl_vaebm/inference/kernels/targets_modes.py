"""Twenty-five even modes behind a map from noise, as a VAE that has found the modes would have them.

The map is a staircase, coordinate by coordinate: a landing for each mode and a steep step between neighbours. What
the staircase makes of N(0, I) covers the modes but joins them by bridges, and its landings are several times as wide
as a mode; the energy takes both away. All of it is explicit, so density, normaliser and draws are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.targets import Target

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
NUM_POINTS = 400_001


def staircase(noise: Tensor) -> Tensor:
    """Map noise to data, each coordinate on its own: monotone, onto, smooth.

    Args:
        noise: any shape.

    Returns:
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
    """Invert :func:`staircase` by bisection, without a gradient.

    Args:
        x: any shape, within 10 of zero.

    Returns:
        The noise.
    """
    low, high = torch.full_like(x, -BRACKET), torch.full_like(x, BRACKET)
    for _ in range(NUM_BISECTIONS):
        middle = 0.5 * (low + high)
        is_above = staircase(middle) > x
        low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
    return 0.5 * (low + high)


def grid_modes(dtype: torch.dtype = torch.float64) -> Target:
    """25 modes N(m, 0.05^2 I), m on a 5 x 5 grid of spacing 1 around zero, as a target in noise space.

    ``E(x) = log p(x) - log h(x)``, where p is what the staircase makes of N(0, I); so ``log Z = 0``, h is what
    E makes of p, and Phi(eps) = E(x(eps)).

    Args:
        dtype: of positions.

    Returns:
        The target, D = 2; the index of a mode is ``5 i + j``, counted from the one at ``(-2, -2)``.
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
    log_each = _log_normal((x.unsqueeze(-1) - centres) / MODE_SCALE) - math.log(MODE_SCALE * NUM_PER_AXIS)
    return log_each.logsumexp(-1)


def _variance() -> float:
    """Integrate the square of one coordinate of noise; the mean is zero, for map and modes are odd."""
    points = torch.linspace(-6, 6, NUM_POINTS, dtype=torch.float64)
    density = (_log_modes(staircase(points)) + log_slope(points)).exp()
    return float((density * points.square()).sum() / density.sum())
