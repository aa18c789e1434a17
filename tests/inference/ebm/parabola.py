"""An energy whose product with a Gaussian VAE is a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_vaebm.models.energy import Energy


class Parabola(Energy):
    """``E = w x^2 / 2``."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * self.weight * x.square().sum(-1)
