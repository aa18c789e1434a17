"""An energy whose term of the first latent has two wells, of known masses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ppl_vaebm.models.energy import Energy

PLACE, SPREAD = 2.5, 0.3
WEIGHT = 0.1
"""Mass of the well at ``-PLACE``; the other one is at ``PLACE``."""


class Wells(Energy):
    """Two narrow wells of the noise of z_1, which is z_1, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.first_latent, self.latent_net = "z_1", nn.Sequential()

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        return torch.zeros_like(x[:, 0])

    def latent_term(self, z: Mapping[str, Tensor]) -> Tensor:
        first = z["z_1"].squeeze(-1)
        parts = ((WEIGHT, -PLACE), (1 - WEIGHT, PLACE))
        wells = torch.stack([math.log(mass) - ((first - place) / SPREAD).square() / 2 for mass, place in parts])
        return -wells.logsumexp(0) - first.square() / 2
