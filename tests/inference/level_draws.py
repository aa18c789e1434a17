"""Exact draws from the levels of a tempered target, which its own draws say nothing about."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import value_and_grad, value_only
from ppl_vaebm.inference.kernels.targets import Target

# The grid of a one-dimensional target: its reach in noise, and its number of cells.
REACH, NUM_CELLS = 8.0, 40_000


def level_draws(target: Target, inverse_temperatures: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Draw from ``exp(-b Phi) N(q; 0, I)`` at several b.

    Args:
        target: a Gaussian, or of one dimension.
        inverse_temperatures: b, ``(K,)``.
        num: draws per level.
        generator: source of the draws.

    Returns:
        ``(num, K, D)``, independent.
    """
    draw = _draw_on_grid if target.mean.numel() == 1 else _draw_gaussian
    return torch.stack([draw(target, float(b), num, generator) for b in inverse_temperatures], dim=1)


def _draw_gaussian(target: Target, b: float, num: int, generator: torch.Generator) -> Tensor:
    dim = len(target.mean)
    # The gradient of a quadratic Phi is linear: at zero and at the unit vectors it gives everything.
    points = torch.cat([torch.zeros_like(target.mean)[None], torch.eye(dim, dtype=target.mean.dtype)])
    grads = value_and_grad(target.potential, points)[1].double()
    precision = torch.eye(dim, dtype=torch.float64) + b * (grads[1:] - grads[0])
    mean = -torch.linalg.solve(precision, b * grads[0])
    noise = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    draws = mean + torch.linalg.solve_triangular(torch.linalg.cholesky(precision).mT, noise.mT, upper=True).mT
    return draws.to(target.mean.dtype)


def _draw_on_grid(target: Target, b: float, num: int, generator: torch.Generator) -> Tensor:
    width = 2 * REACH / NUM_CELLS
    middles = (torch.arange(NUM_CELLS, dtype=torch.float64) + 0.5) * width - REACH
    log_density = -b * value_only(target.potential, middles[:, None]) - 0.5 * middles.square()
    cells = torch.multinomial(log_density.softmax(0), num, replacement=True, generator=generator)
    within = torch.rand(num, generator=generator, dtype=torch.float64) - 0.5
    return (middles[cells] + width * within)[:, None].to(target.mean.dtype)
