"""The temperature of the VAE's latents: program, potential, transport and density agree on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.util import site_is_subsample

from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.inference.likelihood import log_p
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.vaebm import build_vaebm
from ppl_vaebm.rng import stream
from tests.small_models import (
    FEW,
    NVAES,
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

T = 0.7


def is_random(node: dict[str, Any]) -> bool:
    """Return whether a site of a trace is a draw, and not a plate."""
    return node["type"] == "sample" and not site_is_subsample(node)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [T, 1.0])
def test_the_model_takes_the_temperature_of_stage_2(temperature: float) -> None:
    config = Config(ebm=EbmConfig(temperature=temperature))
    assert build_vaebm(config, linear_vae()).vae.model.temperature == temperature


@pytest.mark.parametrize("name", [*FEW, *NVAES])
def test_potential_and_program_agree_at_a_temperature(name: str) -> None:
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
def test_the_transport_inverts_at_a_temperature(name: str) -> None:
    vae = shipped_vae(name)
    vae.model.temperature = T
    noise = draw_noise(vae, 5)
    with torch.no_grad():
        back = vae.noise_of(*vae.transport(noise))
    for site, value in noise.items():
        torch.testing.assert_close(back[site], value, rtol=1e-6, atol=1e-6)


def test_the_density_of_x_at_a_temperature_is_the_closed_form() -> None:
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


def test_latents_of_the_program_have_the_temperature() -> None:
    vae = linear_vae()
    vae.model.temperature = T
    generator = stream(0, "program")
    num, seed = 40_000, int(torch.randint(1 << 30, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z = vae.model(num=num)[1]["z_1"]
    assert abs(float(z.detach().std()) / T - 1) < 5 / math.sqrt(2 * num)
