"""The product density as a Pyro program."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations
from torch import Tensor

from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng
from tests.small_models import FEW, A, QuadraticEnergy, S, draw_noise, linear_vae, log_normal, shipped_vaebm, sites_of


def points(vaebm: VAEBM, num: int) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        return vaebm.vae.transport(draw_noise(vaebm.vae, num))


def test_its_log_density_is_that_of_the_vae_minus_the_energy() -> None:
    vaebm = VAEBM(linear_vae(), QuadraticEnergy(0.4, 0.9))
    x = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    z = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    trace = poutine.trace(poutine.condition(vaebm, data={"z_1": z})).get_trace(x)
    expected = log_normal(z, 0.0, 1.0) + log_normal(x, A * z, S**2) - 0.5 * ((x - 0.4) / 0.9).square().squeeze(-1)
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum())
    torch.testing.assert_close(
        sites_of(trace)["energy"]["fn"].log_prob(sites_of(trace)["energy"]["value"]),
        -0.5 * ((x - 0.4) / 0.9).square().squeeze(-1),
    )


@pytest.mark.parametrize("name", FEW)
def test_the_factor_is_the_only_difference_to_the_vae(name: str) -> None:
    vaebm = shipped_vaebm(name)
    x, z = points(vaebm, 4)
    with torch.no_grad():
        product, vae = (
            poutine.trace(poutine.condition(program, data=z)).get_trace(x) for program in (vaebm, vaebm.vae.model)
        )
        gap = float(vae.log_prob_sum() - product.log_prob_sum())
        energy = float(vaebm.energy(x, z).sum())
    samples, vae_samples = (
        {site for site, node in trace.nodes.items() if node["type"] == "sample"} for trace in (product, vae)
    )
    assert samples - vae_samples == {"energy"}
    assert gap == pytest.approx(energy, rel=1e-8, abs=1e-8)
    assert abs(energy) > 1e-3


@pytest.mark.parametrize("name", FEW)
def test_the_vae_is_frozen_and_the_energy_learns(name: str) -> None:
    vaebm = shipped_vaebm(name)
    x, z = points(vaebm, 3)
    assert not vaebm.vae.training
    assert not any(parameter.requires_grad for parameter in vaebm.vae.parameters())
    trace = poutine.trace(poutine.condition(vaebm, data=z)).get_trace(x)
    torch.as_tensor(trace.log_prob_sum()).backward()
    learning = {key.split(".")[0] for key, parameter in vaebm.named_parameters() if parameter.grad is not None}
    assert learning == {"energy"}


@pytest.mark.parametrize("name", FEW)
def test_pyro_reads_its_structure(name: str) -> None:
    """``pyro.render_model`` draws these relations, with the binary of graphviz."""
    vaebm = shipped_vaebm(name)
    sites = [*vaebm.vae.model.latent_shapes, "x"]
    with global_rng(0):
        relations: dict[str, Any] = get_model_relations(vaebm, (), {"num": 2})
        dependencies: dict[str, Any] = get_dependencies(vaebm, (), {"num": 2})
    # The factor reads x alone, which depends on every latent.
    assert relations["sample_sample"]["x"] == sites[:-1]
    assert relations["sample_sample"]["energy"] == ["x"]
    assert relations["observed"] == ["energy"]
    assert relations["plate_sample"] == {"data": [*sites, "energy"]}
    # The factor depends on x, and nothing of the prior depends on it.
    assert set(dependencies["posterior_dependencies"]["x"]) == {"x", "energy"}
    assert set(dependencies["posterior_dependencies"]["z_1"]) == {*sites}
    assert set(dependencies["prior_dependencies"]["z_1"]) == {"z_1"}


@pytest.mark.parametrize("name", FEW)
def test_predictive_and_condition_run_it(name: str, seed: int) -> None:
    vaebm = shipped_vaebm(name)
    with global_rng(seed):
        draws = Predictive(vaebm, num_samples=3)(num=4)
    assert draws["x"].shape == (3, 4, *vaebm.vae.model.event_shape)
    assert len(draws["x"].flatten(2).unique(dim=1)[0]) == 4
    with global_rng(seed):
        x, z = poutine.condition(vaebm, data={"z_1": draws["z_1"][0]})(num=4)
        _, other = vaebm(num=4)
    assert torch.equal(z["z_1"], draws["z_1"][0]) and not torch.equal(other["z_1"], z["z_1"])
    assert x.shape == draws["x"][0].shape


def test_it_wants_data_or_a_number() -> None:
    with pytest.raises(ValueError, match="the data x, or the number of draws"):
        shipped_vaebm(FEW[0])()


@pytest.mark.parametrize("name", FEW)
def test_a_deep_copy_is_independent(name: str) -> None:
    vaebm = shipped_vaebm(name)
    twin = copy.deepcopy(vaebm)
    x, z = points(vaebm, 3)
    before = vaebm.energy(x, z)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(vaebm.energy(x, z), before)
    assert not torch.equal(twin.energy(x, z), before)
    assert not torch.equal(points(twin, 3)[0], x)
    state = vaebm.state_dict(keep_vars=True)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_the_elbo_of_the_product_is_that_of_the_vae_minus_the_mean_energy() -> None:
    """The guide covers every latent of the product, so Pyro's ELBO is defined; log Z is what it leaves out."""
    vaebm = shipped_vaebm(FEW[1])
    x, _ = points(vaebm, 5)
    losses = []
    for program in (vaebm, vaebm.vae.model):
        with torch.no_grad(), global_rng(0):
            losses.append(TraceMeanField_ELBO().loss(program, vaebm.vae.guide, x))
    assert losses[0] - losses[1] == pytest.approx(float(vaebm.energy(x).detach().sum()), rel=1e-8)
