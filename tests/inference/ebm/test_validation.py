"""Likelihood gain of an energy, and the data's latents, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig
from ppl_vaebm.data.splits import Points
from ppl_vaebm.inference.ebm.validation import data_latents, likelihood_gain
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.inference.ebm.parabola import Parabola
from tests.small_models import POSTERIOR_SLOPE, POSTERIOR_SPREAD, VARIANCE, linear_vae

XZ = Config(energy=EnergyConfig(inputs="x-and-z"))
W = 1.3
MODEL_VARIANCE = VARIANCE / (1 + W * VARIANCE)
"""Of x under h at that weight."""


def test_latents_of_the_data_are_draws_of_the_posterior() -> None:
    num = 40_000
    x = torch.full((num, 1), 0.7, dtype=torch.float64)
    assert data_latents(Config(), linear_vae(), x, 0) is None
    z = data_latents(XZ, linear_vae(), x, 0)
    assert z is not None and not z["z_1"].requires_grad
    assert abs(float(z["z_1"].mean()) - POSTERIOR_SLOPE * 0.7) < 5 * POSTERIOR_SPREAD / math.sqrt(num)
    assert abs(float(z["z_1"].std()) / POSTERIOR_SPREAD - 1) < 5 / math.sqrt(2 * num)
    other = data_latents(XZ, linear_vae(), x, 1)
    assert other is not None and not torch.equal(other["z_1"], z["z_1"])


class LinearInZ(Energy):
    """``E = c z``."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        assert z is not None
        return 0.5 * z["z_1"].sum(-1)


def test_the_gain_of_an_energy_of_both_takes_the_posteriors_mean() -> None:
    """With ``E = z / 2`` and ``z ~ N(0, 1)``, ``log Z = 1 / 8``; data at x have ``E[z] = slope x``."""
    x = torch.full((4_000, 1), 1.5, dtype=torch.float64)
    config = Config(energy=XZ.energy, ebm=EbmConfig(num_validation_draws=40_000))
    potential = noise_potential(VAEBM(linear_vae(), LinearInZ()))
    gain = likelihood_gain(config, potential, Points(x), seed=0)
    assert abs(gain.nats - (-0.5 * POSTERIOR_SLOPE * 1.5 - 0.125)) < 5 * gain.error
    assert gain.error < 0.02


def test_the_gain_is_that_of_the_closed_form() -> None:
    """On data from h the gain is ``KL(h, p)``."""
    num = 10_000
    x = math.sqrt(MODEL_VARIANCE) * torch.randn(num, 1, dtype=torch.float64, generator=stream(1, "data"))
    potential = noise_potential(VAEBM(linear_vae(), Parabola(W).requires_grad_(False)))
    gain = likelihood_gain(Config(ebm=EbmConfig(num_validation_draws=40_000)), potential, Points(x), seed=0)
    ratio = MODEL_VARIANCE / VARIANCE
    expected = 0.5 * (ratio - 1 - math.log(ratio))
    assert abs(gain.nats - expected) < 4 * gain.error
    assert gain.log_z.value == pytest.approx(0.5 * math.log(ratio), abs=4 * gain.log_z.error)
    assert 0 < gain.error < 0.02 < expected


def test_the_gain_does_not_depend_on_the_rows_of_a_pass() -> None:
    x = torch.randn(300, 1, dtype=torch.float64, generator=stream(2, "data"))
    gains = []
    for rows_per_pass in (10_000, 7):
        potential = noise_potential(VAEBM(linear_vae(), LinearInZ()))
        potential.rows_per_pass = rows_per_pass
        config = Config(energy=XZ.energy, ebm=EbmConfig(num_validation_draws=5))
        gains.append(likelihood_gain(config, potential, Points(x), seed=0))
    assert gains[0].nats == pytest.approx(gains[1].nats, rel=1e-12)
