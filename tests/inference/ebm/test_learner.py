"""A step of stage 2: the data's latents, what the options change, and the temperature of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import load_data
from ppl_vaebm.data.splits import Points
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.inference.ebm.learner import EnergyLearner, data_latents
from ppl_vaebm.inference.ebm.train import likelihood_gain
from ppl_vaebm.inference.likelihood import log_p
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import stream
from tests.small_models import (
    FEW,
    NVAES,
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    QUANTILE_NVAES,
    A,
    S,
    draw_noise,
    linear_vae,
    log_normal,
    shipped_vae,
    shipped_vaebm,
    sites_of,
)
from tests.tiny import IMAGES, POINTS

XZ = Config(energy=EnergyConfig(inputs="x-and-z"))


# --- latents of the data ---------------------------------------------------------------------------


def test_the_datas_latents_are_draws_of_the_posterior() -> None:
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


# --- what the options change -----------------------------------------------------------------------


def learner(text: str, **options: Any) -> EnergyLearner:
    tree = yaml.safe_load(text)
    for section, values in options.items():
        tree[section] = {**tree.get(section, {}), **values}
    config = from_dict(tree, "a test")
    data = load_data(config.data, config.seed)
    return EnergyLearner(config, data, build_vaebm(config, new_vae(config, data).eval()), Guard(config))


@pytest.mark.parametrize("text", [POINTS, IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("objective", ["mle", "ratio", "ladder"])
def test_an_energy_of_both_trains(text: str, objective: str) -> None:
    one = learner(text, energy={"inputs": "x-and-z"}, ebm={"objective": objective, "rung_steps": 1})
    before = [parameter.clone() for parameter in one.energy.parameters()]
    for step in range(2):
        phase, monitors = one.step(step, is_logged=True)
    assert all(math.isfinite(value) for value in monitors.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, one.energy.parameters(), strict=True))
    assert ("saturation" in monitors) == (text == IMAGES and objective != "ratio")
    assert phase.energy_data.shape == (one.config.ebm.batch_size,)


def test_the_head_may_be_left_out_of_the_spectral_penalty() -> None:
    whole, hidden = (learner(IMAGES, ebm={"spectral_head": has_head}) for has_head in (True, False))
    assert float(whole.spectral().detach()) > float(hidden.spectral().detach()) > 0
    head = whole.energy.last_layer()
    assert head is not None
    both = whole._penalised_layers()
    assert [layer for layer in both if layer is not head] and head in both
    assert len(hidden._penalised_layers()) == len(both) - 1


def test_the_energy_is_initialised_from_data_before_it_is_averaged() -> None:
    one = learner(IMAGES, energy={"data_init": True})
    fresh = learner(IMAGES)
    assert bool(one.energy.is_initialised) and bool(one.average.module.is_initialised)
    for name, parameter in one.energy.named_parameters():
        assert torch.equal(parameter, one.average.module.get_parameter(name))
    assert not torch.equal(one.energy.get_parameter("stem.weight"), fresh.energy.get_parameter("stem.weight"))


# --- the temperature -------------------------------------------------------------------------------

T = 0.7


def is_random(node: dict[str, Any]) -> bool:
    """Say whether a site of a trace is a draw, and not a plate."""
    return node["type"] == "sample" and not site_is_subsample(node)  # type: ignore[arg-type]


def test_the_temperature_is_the_models() -> None:
    one = learner(POINTS, ebm={"temperature": T})
    assert one.vaebm.vae.model.temperature == T
    assert learner(POINTS).vaebm.vae.model.temperature == 1.0


@pytest.mark.parametrize("name", [*FEW, *NVAES])
def test_at_a_temperature_potential_and_program_are_one(name: str) -> None:
    vaebm = shipped_vaebm(name)
    vaebm.vae.model.temperature = T
    noise = draw_noise(vaebm.vae, 6)
    sites = [name.removeprefix("eps_") for name in noise]
    data = {f"{site}_decentered": value for site, value in zip(sites, noise.values(), strict=True)}
    program = poutine.condition(poutine.reparam(vaebm, {site: LocScaleReparam(0.0) for site in sites}), data)
    trace = poutine.trace(program).get_trace(num=6)
    trace.compute_log_prob()
    log_prob = torch.stack([node["log_prob"] for node in sites_of(trace).values() if is_random(node)]).sum(0)
    potential = noise_potential(vaebm)
    position = potential.packing.ravel(noise)
    gap = potential(position) + 0.5 * position.square().sum(-1) + log_prob
    assert float((gap.max() - gap.min()).detach()) < 1e-10
    at_one = potential(position).detach()
    vaebm.vae.model.temperature = 1.0
    assert (potential(position).detach() - at_one).abs().max() > 1e-3  # negative control


@pytest.mark.parametrize("name", [*FEW, *NVAES, *QUANTILE_NVAES])
def test_at_a_temperature_the_noise_comes_back(name: str) -> None:
    vae = shipped_vae(name)
    vae.model.temperature = T
    noise = draw_noise(vae, 5)
    with torch.no_grad():
        back = vae.noise_of(*vae.transport(noise))
    for site, value in noise.items():
        torch.testing.assert_close(back[site], value, rtol=1e-6, atol=1e-6)


def test_at_a_temperature_the_density_of_x_is_the_closed_form() -> None:
    vae = linear_vae()
    vae.model.temperature = T
    num = 40_000
    with torch.no_grad():
        x = vae.transport(draw_noise(vae, num))[0]
    variance = (T * A) ** 2 + S**2
    assert abs(float(x.var()) / variance - 1) < 5 * math.sqrt(2 / num)
    points = torch.tensor([[0.3], [-1.8]], dtype=torch.float64)
    estimate = log_p(vae, points, seed=0, num_importance=20_000)
    expected = log_normal(points, 0.0, variance)
    assert ((estimate.value - expected).abs() < 5 * estimate.error).all() and estimate.error.max() < 0.01
    assert (log_normal(points, 0.0, A**2 + S**2) - expected).abs().max() > 0.1


def test_at_a_temperature_draws_of_the_program_are_those_of_the_transport() -> None:
    vae = linear_vae()
    vae.model.temperature = T
    generator = stream(0, "program")
    num, seed = 40_000, int(torch.randint(1 << 30, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z = vae.model(num=num)[1]["z_1"]
    assert abs(float(z.detach().std()) / T - 1) < 5 / math.sqrt(2 * num)
