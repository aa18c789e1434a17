"""Starts by tempering: near the posterior, with its modes about as heavy as they should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference import conditioning
from ppl_vaebm.inference.conditioning import ConditionalPotential, annealed_starts, condition
from ppl_vaebm.inference.observations import NoisyValues
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import VARIANCE, ZeroEnergy, linear_vae


def gaussian_posterior(given: Tensor, noise_sd: float) -> ConditionalPotential:
    return condition(VAEBM(linear_vae(dim=2), ZeroEnergy()), given=given, noise_sd=noise_sd)


def moments(y: float, noise_sd: float) -> tuple[float, float]:
    gain = VARIANCE / (VARIANCE + noise_sd**2)
    return gain * y, VARIANCE * (1 - gain)


@pytest.mark.parametrize(("y", "noise_sd"), [(1.0, 0.5), (3.0, 0.02)])
def test_starts_have_the_moments_of_a_gaussian_posterior(y: float, noise_sd: float, seed: int) -> None:
    potential = gaussian_posterior(torch.tensor([y, y]), noise_sd)
    starts, _ = annealed_starts(potential, stream(seed, "starts"), 500)
    x = potential.decode(starts)
    mean, variance = moments(y, noise_sd)
    # Particles share ancestors, so a tenth of them count as independent.
    assert (x.mean(0) - mean).abs().max() < 5 * math.sqrt(variance / 50)
    assert (x.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / 50)
    far = potential.decode(potential.draw_reference(stream(seed, "far"), 500))  # negative control: fresh noise
    assert (far.var(0) / variance - 1).abs().max() > 5 * math.sqrt(2 / 50)


class TwoWells(Energy):
    """Wells of unequal depth, far apart for chains that only descend."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        log_wells = torch.stack([-0.5 * ((x[:, 0] - c) / 0.05).square() + d for c, d in ((-0.9, 0.0), (0.9, 1.5))])
        return -log_wells.logsumexp(0)


def test_modes_have_their_weights(seed: int) -> None:
    vaebm = VAEBM(linear_vae(dim=1), TwoWells())
    potential = condition(vaebm, given=torch.zeros(1), noise_sd=5.0)
    starts, _ = annealed_starts(potential, stream(seed, "starts"), 1_000)
    share = float((potential.decode(starts) > 0).double().mean())
    assert share == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.08)  # 0.82 of the mass


def test_every_observation_gets_its_own_starts(seed: int) -> None:
    y = torch.tensor([[-2.0, -2.0], [0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    potential = ConditionalPotential(VAEBM(linear_vae(dim=2), ZeroEnergy()), NoisyValues(y, 0.1))
    starts, _ = annealed_starts(potential, stream(seed, "starts"), 4, num_particles=40)
    means = potential.decode(starts).view(3, 4, 2).mean((1, 2))
    expected = torch.tensor([moments(value, 0.1)[0] for value in (-2.0, 0.0, 2.0)], dtype=torch.float64)
    assert (means - expected).abs().max() < 5 * 0.1 / math.sqrt(8)


def test_starts_repeat_and_count_their_evaluations() -> None:
    potential = gaussian_posterior(torch.tensor([1.0, 1.0]), 0.3)
    num_rows = 0
    plain = ConditionalPotential.__call__

    def counted(self: ConditionalPotential, position: Tensor) -> Tensor:
        nonlocal num_rows
        num_rows += len(position)
        return plain(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConditionalPotential, "__call__", counted)
        starts, particles = annealed_starts(potential, stream(0, "starts"), 5)
    assert num_rows == particles.num_evals
    again, _ = annealed_starts(potential, stream(0, "starts"), 5)
    assert torch.equal(starts, again) and starts.shape == (5, 4)


def test_what_cannot_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = gaussian_posterior(torch.tensor([1.0, 1.0]), 0.3)
    with pytest.raises(ValueError, match="expected at least 5 particles"):
        annealed_starts(potential, stream(0, "starts"), 5, num_particles=4)
    monkeypatch.setattr(conditioning, "START_SCHEDULE", conditioning.START_SCHEDULE._replace(max_levels=1))
    with pytest.raises(ValueError, match="at most 1 levels, found b = .* state a larger noise-sd"):
        annealed_starts(gaussian_posterior(torch.tensor([4.0, 4.0]), 0.01), stream(0, "starts"), 5)
    monkeypatch.setattr(ConditionalPotential, "__call__", lambda self, position: position.sum(1) * torch.nan)
    with pytest.raises(ValueError, match="energy of some of 20 VAE samples, found none.* check the values given"):
        annealed_starts(potential, stream(0, "starts"), 5)
