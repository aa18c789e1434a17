"""The conditional distributions of the hierarchy."""

from __future__ import annotations

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor

# NVAE (Vahdat and Kautz 2020): raw outputs u pass through 5 tanh(u / 5), and a standard deviation has a floor of 0.01.
CLAMP = 5.0
MIN_SCALE = 0.01


def soft_clamp(raw: Tensor) -> Tensor:
    """Bound a raw network output smoothly to (-5, 5); near 0 it is the identity."""
    return CLAMP * torch.tanh(raw / CLAMP)


def positive_scale(raw: Tensor) -> Tensor:
    """Turn a raw network output into a standard deviation in (0.0167, 148.4); raw 0 gives 1.01."""
    return soft_clamp(raw).exp() + MIN_SCALE


def diagonal_normal(loc: Tensor, scale: Tensor) -> Independent:
    """Make a diagonal Normal whose first axis is the batch.

    Args:
        loc: ``(n, *event)``.
        scale: positive, broadcastable to ``loc``.

    Returns:
        The distribution, batch shape ``(n,)``.
    """
    return Independent(Normal(loc, scale.expand_as(loc)), loc.dim() - 1)
