"""Energies on a linear VAE whose term of the first latent is known: two wells, wells in a joint term, a slope."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng
from tests.small_models import A, S, linear_vae

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


SLOPE_Z, SLOPE_X = 0.2, 0.3
TILT = SLOPE_Z + SLOPE_X * A
"""Of the noise of z_1."""
WEIGHT_UNDER_H = WEIGHT / (WEIGHT + (1 - WEIGHT) * math.exp(-2 * PLACE * TILT))
"""Mass of the well at ``-PLACE``."""


class Slanted(Wells):
    """The wells, and ``J = SLOPE_Z z_1 + SLOPE_X x``."""

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        assert z is not None
        return SLOPE_Z * z["z_1"].squeeze(-1) + SLOPE_X * x.squeeze(-1)


def slanted() -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), Slanted()).requires_grad_(False))


def draw_wells(num: int, weight: float, shift: float, generator: torch.Generator) -> Tensor:
    """Draw from two wells, ``(num, 1)``, a given mass in the left one."""
    is_left = torch.rand(num, 1, generator=generator, dtype=torch.float64) < weight
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    return torch.where(is_left, -PLACE, PLACE) - shift + SPREAD * noise


def draw_slanted(num: int, generator: torch.Generator) -> Tensor:
    """Draw both noises under h, ``(num, 2)``."""
    first = draw_wells(num, WEIGHT_UNDER_H, TILT * SPREAD**2, generator)
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    return torch.cat([first, noise - SLOPE_X * S], dim=1)


def assert_under_h(position: Tensor) -> None:
    """Compare a column for each noise with h, in four standard errors."""
    num, is_left = len(position), position[:, 0] < 0
    error = math.sqrt(WEIGHT_UNDER_H * (1 - WEIGHT_UNDER_H) / num)
    assert abs(float(is_left.double().mean()) - WEIGHT_UNDER_H) < 4 * error
    assert abs(float(position[:, 1].mean()) + SLOPE_X * S) < 4 / math.sqrt(num)
    assert float(position[:, 1].var()) == pytest.approx(1.0, rel=4 * math.sqrt(2 / num))
    for place, rows in ((-PLACE, position[is_left, 0]), (PLACE, position[~is_left, 0])):
        assert abs(float(rows.mean()) - (place - TILT * SPREAD**2)) < 4 * SPREAD / math.sqrt(len(rows))
        assert float(rows.std()) == pytest.approx(SPREAD, rel=4 / math.sqrt(2 * len(rows)))


FIRST_TILT = 0.7


class Tilted(Energy):
    """``E = FIRST_TILT z_1``, all of it the first latent's own term: its noise is ``N(-FIRST_TILT, 1)`` under h."""

    def __init__(self) -> None:
        super().__init__()
        with global_rng(0):
            layer = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(layer.weight, FIRST_TILT)
        self.first_latent, self.latent_net = "z_1", nn.Sequential(layer)

    def joint_term(self, x: Tensor, z: object) -> Tensor:
        return torch.zeros_like(x[:, 0])


def tilted(temperature: float = 1.0) -> VAEBM:
    vae = linear_vae()
    vae.model.temperature = temperature
    return VAEBM(vae, Tilted()).requires_grad_(False)
