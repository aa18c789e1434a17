"""Stage 2's objectives against closed forms: a Gaussian VAE times ``exp(-w x^2 / 2)`` is a Gaussian for every w."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig, KernelConfig, KernelName, TrainingKernelConfig
from ppl_vaebm.data.splits import Points
from ppl_vaebm.inference.ebm.negatives import NegativePhase, replay_probability
from ppl_vaebm.inference.ebm.train import likelihood_gain
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import VARIANCE, linear_vae

W = 1.3
MODEL_VARIANCE = VARIANCE / (1 + W * VARIANCE)
"""Of x under h at that weight."""
DATA = torch.tensor([[0.5], [-1.0], [2.0], [0.25]], dtype=torch.float64)


class WeightedSquare(Energy):
    """``E = w x^2 / 2``."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * self.weight * x.square().sum(-1)


def negatives(weight: float, kernel: TrainingKernelConfig | None = None, **options: object) -> NegativePhase:
    ebm = EbmConfig(**{"objective": "mle", "batch_size": 4, **options})  # type: ignore[arg-type]
    config = Config(ebm=ebm, kernel=kernel or TrainingKernelConfig("independence"))
    return NegativePhase(config, noise_potential(VAEBM(linear_vae(), WeightedSquare(weight))))


def loss_and_gradient(phase_of: NegativePhase, data: Tensor = DATA) -> tuple[float, float]:
    """Evaluate the loss of the first step and its derivative by w."""
    energy = phase_of.potential.vaebm.energy
    loss = phase_of(data, 0).loss
    (gradient,) = torch.autograd.grad(loss, energy.get_parameter("weight"))
    return float(loss.detach()), float(gradient)


def half_mean_square(x: Tensor) -> float:
    return 0.5 * float(x.square().mean())


def test_importance_weights_give_the_gradient_of_maximum_likelihood() -> None:
    num = 200_000
    _, gradient = loss_and_gradient(negatives(W, negatives="importance", num_importance=num))
    expected = half_mean_square(DATA) - 0.5 * MODEL_VARIANCE
    # x^2 / 2 has standard deviation MODEL_VARIANCE / sqrt(2); the weights leave more than half of the draws effective.
    assert abs(gradient - expected) < 4 * MODEL_VARIANCE / math.sqrt(2) / math.sqrt(num / 2)
    assert abs(0.5 * VARIANCE - 0.5 * MODEL_VARIANCE) > 0.1  # draws of the VAE without weights would fail


@pytest.mark.parametrize("kernel", ["independence", "hmc", "elliptical"])
def test_chains_give_the_gradient_of_maximum_likelihood(kernel: KernelName) -> None:
    num = 20_000
    phase_of = negatives(W, TrainingKernelConfig(kernel), batch_size=num, replay_size=num, num_transitions=12)
    _, gradient = loss_and_gradient(phase_of, DATA.repeat(num // 4, 1))
    expected = half_mean_square(DATA) - 0.5 * MODEL_VARIANCE
    assert abs(gradient - expected) < 4 * MODEL_VARIANCE / math.sqrt(2 * num) + 0.002


@pytest.mark.parametrize("kernel", ["langevin", "mala", "pcn"])
def test_no_gradient_flows_through_the_chains(kernel: KernelName) -> None:
    """With a replay as large as the batch, the stored positions are the negatives."""
    phase_of = negatives(W, TrainingKernelConfig(kernel), replay_size=4, num_transitions=3)
    _, gradient = loss_and_gradient(phase_of)
    ends = phase_of.potential.decode(phase_of.replay.positions)
    assert gradient == pytest.approx(half_mean_square(DATA) - half_mean_square(ends), rel=1e-12)
    assert all(parameter.requires_grad for parameter in phase_of.potential.vaebm.energy.parameters())
    assert not any(parameter.requires_grad for parameter in phase_of.potential.vaebm.vae.parameters())


def test_the_ratio_starts_at_two_log_two() -> None:
    loss, gradient = loss_and_gradient(negatives(0.0, objective="ratio", num_importance=100_000))
    assert loss == pytest.approx(2 * math.log(2), rel=1e-12)
    assert gradient == pytest.approx(0.5 * (half_mean_square(DATA) - 0.5 * VARIANCE), abs=0.005)


def test_the_ratio_has_no_gradient_where_h_is_the_data() -> None:
    """The classifier is right at ``E = log(p / h)``, which is a weighted square up to a constant."""
    num = 200_000
    data = math.sqrt(VARIANCE) * torch.randn(num, 1, dtype=torch.float64, generator=stream(0, "data"))
    _, at_optimum = loss_and_gradient(negatives(0.0, objective="ratio", num_importance=num), data)
    _, elsewhere = loss_and_gradient(negatives(0.2, objective="ratio", num_importance=num), data)
    assert abs(at_optimum) < 4 * 0.5 * VARIANCE / math.sqrt(num)
    assert elsewhere > 0.02


def test_the_ratio_comes_first_where_it_is_asked_for() -> None:
    phase_of = negatives(W, ratio_steps=2, replay_size=4)
    has_chains = ["acceptance_rate" in phase_of(DATA, step).monitors for step in range(4)]
    assert has_chains == [False, False, True, True]


@pytest.mark.parametrize("asked", [None, 0.9])
def test_the_step_follows_the_acceptance_rate(asked: float | None) -> None:
    config = TrainingKernelConfig("mala", step_size=0.5, target_acceptance=asked)
    phase_of = negatives(W, config, replay_size=4)
    rate = float(phase_of(DATA, 0).monitors["acceptance_rate"])
    target = asked or build_kernel(KernelConfig("mala"), phase_of.potential).target_acceptance
    assert target is not None and rate != target
    assert float(phase_of.params.step_size) == pytest.approx(0.5 * math.exp(0.05 * (rate - target)))


def test_the_step_of_an_unadjusted_kernel_stays() -> None:
    phase_of = negatives(W, TrainingKernelConfig("langevin", step_size=0.5), replay_size=4)
    phase_of(DATA, 0)
    assert float(phase_of.params.step_size) == 0.5


def test_the_replay_is_annealed() -> None:
    loop = EbmConfig(replay_probability=0.8, replay_anneal_steps=10)
    assert [replay_probability(loop, step) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 0.4, 0.8, 0.8])
    assert replay_probability(EbmConfig(replay_probability=0.8), 0) == 0.8


def test_the_gain_is_that_of_the_closed_form() -> None:
    """On data from h the gain is ``KL(h, p)``."""
    num = 10_000
    x = math.sqrt(MODEL_VARIANCE) * torch.randn(num, 1, dtype=torch.float64, generator=stream(1, "data"))
    potential = noise_potential(VAEBM(linear_vae(), WeightedSquare(W).requires_grad_(False)))
    gain = likelihood_gain(Config(ebm=EbmConfig(num_validation_draws=40_000)), potential, Points(x), seed=0)
    ratio = MODEL_VARIANCE / VARIANCE
    expected = 0.5 * (ratio - 1 - math.log(ratio))
    assert abs(gain.nats - expected) < 4 * gain.error
    assert gain.log_z.value == pytest.approx(0.5 * math.log(ratio), abs=4 * gain.log_z.error)
    assert 0 < gain.error < 0.02 < expected
