"""Objectives of stage 2 against closed forms: a Gaussian VAE times ``exp(-w x^2 / 2)`` is a Gaussian for every w."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, KernelName, TrainingKernelConfig
from ppl_vaebm.inference.ebm import losses
from ppl_vaebm.inference.ebm.negatives import PersistentChains
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.inference.ebm.parabola import Parabola
from tests.small_models import VARIANCE, linear_vae

W = 1.3
MODEL_VARIANCE = VARIANCE / (1 + W * VARIANCE)
"""Of x under h at that weight."""
DATA = torch.tensor([[0.5], [-1.0], [2.0], [0.25]], dtype=torch.float64)


def potential_at(weight: float) -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), Parabola(weight)))


def draws_of(potential: NoisePotential, num: int) -> Tensor:
    return potential(potential.draw_reference(stream(0, "draws"), num))


def by_weight(loss: Tensor, potential: NoisePotential) -> float:
    (gradient,) = torch.autograd.grad(loss, potential.vaebm.energy.get_parameter("weight"))
    return float(gradient)


def half_mean_square(x: Tensor) -> float:
    return 0.5 * float(x.square().mean())


def test_importance_weights_give_the_gradient_of_maximum_likelihood() -> None:
    num, potential = 200_000, potential_at(W)
    loss = losses.importance_weighted(potential.vaebm.energy(DATA), draws_of(potential, num))
    expected = half_mean_square(DATA) - 0.5 * MODEL_VARIANCE
    # x^2 / 2 has standard deviation MODEL_VARIANCE / sqrt(2); the weights leave more than half of the draws effective.
    assert abs(by_weight(loss, potential) - expected) < 4 * MODEL_VARIANCE / math.sqrt(2) / math.sqrt(num / 2)
    assert abs(0.5 * VARIANCE - 0.5 * MODEL_VARIANCE) > 0.1  # VAE samples without weights would fail


@pytest.mark.parametrize("kernel", ["independence", "hmc", "elliptical"])
def test_chains_give_the_gradient_of_maximum_likelihood(kernel: KernelName) -> None:
    num, potential = 20_000, potential_at(W)
    loop = EbmConfig(objective="mle", batch_size=num, replay_size=num, num_transitions=12)
    chains = PersistentChains(Config(ebm=loop, kernel=TrainingKernelConfig(kernel)), potential)
    x, z = chains.negatives(chains.advance(stream(0, "chains"), num, 0.0).end)
    loss = losses.contrastive(potential.vaebm.energy(DATA), potential.vaebm.energy(x, z))
    expected = half_mean_square(DATA) - 0.5 * MODEL_VARIANCE
    assert abs(by_weight(loss, potential) - expected) < 4 * MODEL_VARIANCE / math.sqrt(2 * num) + 0.002


def test_the_ratio_starts_at_two_log_two() -> None:
    potential = potential_at(0.0)
    loss = losses.density_ratio(potential.vaebm.energy(DATA), draws_of(potential, 100_000))
    assert float(loss.detach()) == pytest.approx(2 * math.log(2), rel=1e-12)
    expected = 0.5 * (half_mean_square(DATA) - 0.5 * VARIANCE)
    assert by_weight(loss, potential) == pytest.approx(expected, abs=0.005)


def test_the_ratio_has_no_gradient_where_h_is_the_data_distribution() -> None:
    """The classifier is right at ``E = log(p / h)``, which is a weighted square up to a constant."""
    num = 200_000
    data = math.sqrt(VARIANCE) * torch.randn(num, 1, dtype=torch.float64, generator=stream(0, "data"))
    gradients = []
    for weight in (0.0, 0.2):
        potential = potential_at(weight)
        loss = losses.density_ratio(potential.vaebm.energy(data), draws_of(potential, num))
        gradients.append(by_weight(loss, potential))
    assert abs(gradients[0]) < 4 * 0.5 * VARIANCE / math.sqrt(num)
    assert gradients[1] > 0.02


def test_the_larger_standard_deviation_and_the_mean_square_are_those_of_the_energies() -> None:
    data, negatives = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, 4.0, -4.0])
    assert float(losses.largest_sd(data, negatives)) == pytest.approx(4.0)
    assert not losses.largest_sd(data, negatives).requires_grad
    assert float(losses.mean_square(data, negatives).detach()) == pytest.approx(5 + 32 / 3)
