"""The generator, its guide and its transport are one model, and Pyro's tools work on it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.optim import Adam  # type: ignore[attr-defined]
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vaebm.config import ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import XScale
from ppl_vaebm.models.small_vae import Stem
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.rng import global_rng
from tests.small_models import (
    FEW,
    IMAGES,
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    SHIPPED,
    VARIANCE,
    A,
    S,
    draw_noise,
    linear_vae,
    log_normal,
    shipped_vae,
    sites_of,
)
from tests.tiny import needs_bfloat16

IMAGE = "image (1, 8, 8), 3 groups, local scale"


def model_trace(vae: HierarchicalVAE, seed: int, num: int) -> Trace:
    with global_rng(seed), torch.no_grad():
        return poutine.trace(vae.model).get_trace(num=num)


def data_for(vae: HierarchicalVAE, num: int, seed: int = 5) -> Tensor:
    with torch.no_grad():
        return vae.transport(draw_noise(vae, num, seed))[0]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", SHIPPED)
def test_transport_is_the_program_with_its_noise_fixed(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    trace = model_trace(vae, seed, 5)
    sites = {site: sites_of(trace)[site] for site in (*vae.model.latent_shapes, "x")}
    # What Pyro drew, standardised under the distribution that it drew from.
    eps = {
        f"eps_{site}": (node["value"] - node["fn"].base_dist.loc) / node["fn"].base_dist.scale
        for site, node in sites.items()
    }
    assert {site: noise.shape[1:] for site, noise in eps.items()} == vae.noise_shapes
    with torch.no_grad():
        x, z = vae.transport(eps)
    assert largest_difference({**z, "x": x}, {site: node["value"] for site, node in sites.items()}) < 1e-10


@pytest.mark.parametrize("name", SHIPPED)
def test_transport_inverts(name: str) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 5)
    with torch.no_grad():
        back = vae.noise_of(*vae.transport(eps))
        # Negative control: the noises of another x are others.
        elsewhere = vae.noise_of(vae.transport(eps)[0] + 1, vae.transport(eps)[1])
    assert largest_difference(back, eps) < 1e-10
    assert largest_difference(elsewhere, eps) > 0.1


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_are_independent(name: str) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 4)
    changed = {site: torch.cat([noise[:1] + 3, noise[1:]]) for site, noise in eps.items()}
    with torch.no_grad(), global_rng(0):
        one, other = vae.transport(eps)[0], vae.transport(changed)[0]
        posterior = poutine.trace(vae.guide).get_trace(one)
        other_posterior = poutine.trace(poutine.replay(vae.guide, trace=posterior)).get_trace(other)
    assert (one - other)[0].abs().max() > 0.1
    assert (one - other)[1:].abs().max() < 1e-12
    for site in vae.model.latent_shapes:
        gap = sites_of(posterior)[site]["fn"].base_dist.loc - sites_of(other_posterior)[site]["fn"].base_dist.loc
        assert gap[1:].abs().max() < 1e-12


def test_the_posterior_does_see_its_own_row() -> None:
    vae = shipped_vae(IMAGE)
    x = data_for(vae, 2)
    with torch.no_grad(), global_rng(0):
        one = poutine.trace(vae.guide).get_trace(x)
        other = poutine.trace(poutine.replay(vae.guide, trace=one)).get_trace(x + 1)
    for site in vae.model.latent_shapes:
        assert (sites_of(one)[site]["fn"].base_dist.loc - sites_of(other)[site]["fn"].base_dist.loc).abs().min() > 0


def test_transport_of_the_linear_model_is_its_formula() -> None:
    vae = linear_vae(dim=3)
    eps = draw_noise(vae, 4)
    x, z = vae.transport(eps)
    torch.testing.assert_close(z["z_1"], eps["eps_z_1"])
    torch.testing.assert_close(x, A * eps["eps_z_1"] + S * eps["eps_x"])


@pytest.mark.parametrize(
    ("shape", "latents", "expected"),
    [
        ((2,), (4, 3), {"eps_z_1": (4,), "eps_z_2": (3,), "eps_x": (2,)}),
        ((1, 8, 8), (5, 2, 1), {"eps_z_1": (5,), "eps_z_2": (2, 4, 4), "eps_z_3": (1, 8, 8), "eps_x": (1, 8, 8)}),
        ((3, 32, 32), (5, 2), {"eps_z_1": (5,), "eps_z_2": (2, 8, 8), "eps_x": (3, 32, 32)}),
    ],
)
def test_later_groups_of_images_live_on_finer_grids(
    shape: tuple[int, ...], latents: tuple[int, ...], expected: dict[str, tuple[int, ...]]
) -> None:
    with global_rng(0):
        vae = build_vae(ModelConfig(latents=latents, channels=4, width=8), torch.Size(shape))
    assert vae.noise_shapes == {name: torch.Size(size) for name, size in expected.items()}


@pytest.mark.parametrize("name", FEW)
def test_the_first_group_is_standard_normal_and_later_scales_depend_on_it(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    trace = model_trace(vae, seed, 6)
    first = sites_of(trace)["z_1"]["fn"].base_dist
    assert (first.loc == 0).all() and (first.scale == 1).all()
    for site in [*vae.model.latent_shapes][1:]:
        assert sites_of(trace)[site]["fn"].base_dist.scale.std(0).min() > 0.01


@pytest.mark.parametrize("name", FEW)
def test_the_scale_of_x_starts_where_the_configuration_says(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    scale = sites_of(model_trace(vae, seed, 3))["x"]["fn"].base_dist.scale
    if SHIPPED[name].options["x_scale"] == "global":
        assert scale.unique().item() == pytest.approx(0.08)
    else:  # the same number, times the exponential of what the decoder says of each coordinate
        assert scale.std(0).min() > 0
        assert scale.min() > 0.03
        for parameter in vae.model.get_submodule("decoder" if name.startswith("vector") else "head").parameters():
            nn.init.zeros_(parameter)
        scale = sites_of(model_trace(vae, seed, 3))["x"]["fn"].base_dist.scale
        assert scale.flatten().tolist() == pytest.approx([0.08] * scale.numel())


def test_the_scale_of_a_sample_is_one_function_of_z_for_all_of_its_coordinates(seed: int) -> None:
    with global_rng(seed):
        scales = {kind: XScale(ModelConfig(x_scale=kind)) for kind in ("global", "sample", "local")}
        out = torch.randn(3, 4, 5, 5)
    assert {kind: scale.num_outputs for kind, scale in scales.items()} == {"global": 1, "sample": 2, "local": 2}
    (_, fixed), (loc, scale), (_, local) = (scales[kind](out) for kind in ("global", "sample", "local"))
    assert loc.shape == scale.shape == (3, 2, 5, 5)
    assert fixed.unique().tolist() == pytest.approx([0.08])
    raw = [float(row.mean()) for row in out[:, 2:]]
    expected = [0.03 + 0.05 * math.exp(5 * math.tanh(one / 5)) for one in raw]
    for row, value, by_place in zip(scale, expected, local, strict=True):
        assert row.unique().tolist() == pytest.approx([value])
        assert len(by_place.unique()) == 50


def test_raw_outputs_are_bounded_smoothly(seed: int) -> None:
    vae = shipped_vae("vector, 2 groups, local scale")

    def say(net: str, value: float) -> None:
        """Make a net's last layer give one number whatever it reads."""
        last = [module for module in vae.get_submodule(net).modules() if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, value)

    for net in ("model.priors.0", "model.decoder", "guide.heads.z_2"):
        say(net, 1e9)
    trace = model_trace(vae, seed, 2)
    prior, x = sites_of(trace)["z_2"]["fn"].base_dist, sites_of(trace)["x"]["fn"].base_dist
    assert prior.loc.unique().tolist() == pytest.approx([5.0])
    assert prior.scale.unique().tolist() == pytest.approx([math.exp(5) + 0.01])
    assert x.scale.unique().tolist() == pytest.approx([0.03 + 0.05 * math.exp(5)])
    with torch.no_grad(), global_rng(seed):
        posterior = sites_of(poutine.trace(vae.guide).get_trace(x.loc))["z_2"]["fn"].base_dist
    # The guide's shift and ratio are relative to the prior; a shift is not bounded.
    assert posterior.scale.unique().tolist() == pytest.approx([float(prior.scale.max()) * math.exp(5)])
    assert posterior.loc.unique().tolist() == pytest.approx([5 + float(prior.scale.max()) * 1e9])


def test_a_stem_is_its_linear_map_plus_the_net_beside_it(seed: int) -> None:
    with global_rng(seed):
        stem = Stem(3, ModelConfig(width=7, stem_depth=2), 4)
        plain = Stem(3, ModelConfig(stem_depth=0), 4)
        u = torch.randn(6, 3)
    linear = u @ stem.weight.T + stem.bias
    assert stem.beside is not None
    torch.testing.assert_close(stem(u), linear + stem.beside(u))
    hidden = nn.functional.silu(stem.beside[2](nn.functional.silu(stem.beside[0](u))))
    assert hidden.shape == (6, 7)
    torch.testing.assert_close(stem.beside(u), stem.beside[4](hidden))
    assert dict(plain.named_parameters()).keys() == {"weight", "bias"}  # checkpoints of before have no more
    torch.testing.assert_close(plain(u), u @ plain.weight.T + plain.bias)


@pytest.mark.parametrize("name", FEW)
def test_heads_of_zero_make_the_posterior_the_prior(name: str) -> None:
    vae = shipped_vae(name)
    x = data_for(vae, 4)

    def kl() -> list[float]:
        with torch.no_grad(), global_rng(0):
            guide = poutine.trace(vae.guide).get_trace(x)
            model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
        sites = vae.model.latent_shapes
        return [float(kl_divergence(sites_of(guide)[site]["fn"], sites_of(model)[site]["fn"]).sum()) for site in sites]

    assert min(kl()) > 0.01
    for part in ("heads", "vector_head", "grid_heads"):
        for parameter in getattr(vae.guide, part, nn.Identity()).parameters():
            nn.init.zeros_(parameter)
    assert kl() == [0.0] * len(vae.model.latent_shapes)


def test_a_posterior_is_relative_to_its_prior() -> None:
    vae = linear_vae(slope=0.6, spread=0.4, dim=2)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    with global_rng(0):
        posterior = sites_of(poutine.trace(vae.guide).get_trace(x))["z_1"]["fn"].base_dist
    torch.testing.assert_close(posterior.loc, 0.6 * x)
    torch.testing.assert_close(posterior.scale, torch.full_like(x, 0.4))


@pytest.mark.parametrize("name", FEW)
def test_weights_are_stored_once(name: str) -> None:
    vae = shipped_vae(name)
    state = vae.state_dict(keep_vars=True)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert {key.split(".")[0] for key in state} == {"model", "guide"}
    assert not [key for key in state if "generator" in key]
    assert len([*vae.parameters()]) == len([*vae.model.parameters()]) + len([*vae.guide.parameters()])


@pytest.mark.parametrize("name", FEW)
def test_a_deep_copy_is_independent_and_its_guide_walks_its_own_model(name: str) -> None:
    vae = shipped_vae(name)
    twin = copy.deepcopy(vae)
    x = data_for(vae, 3)

    def loss(one: HierarchicalVAE) -> float:
        with global_rng(0):
            return TraceMeanField_ELBO().loss(one.model, one.guide, x)

    def last_posterior(one: HierarchicalVAE) -> Tensor:
        with torch.no_grad(), global_rng(0):
            return sites_of(poutine.trace(one.guide).get_trace(x))[[*one.model.latent_shapes][-1]]["fn"].base_dist.loc

    before, posterior = loss(vae), last_posterior(vae)
    assert loss(twin) == before
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(0.1)
    assert loss(twin) != before
    assert loss(vae) == before
    assert torch.equal(last_posterior(vae), posterior)
    # A guide that still walked the original's model would not see its weights change. One group has N(0, I) alone.
    if len(vae.model.latent_shapes) > 1:
        assert not torch.equal(last_posterior(twin), posterior)
    twin.load_state_dict(vae.state_dict())
    assert loss(twin) == before


def test_the_log_density_of_the_linear_program_is_the_closed_form() -> None:
    vae = linear_vae(dim=2)
    x = torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=torch.float64)
    z = torch.tensor([[0.5, 0.5], [-1.0, 0.2]], dtype=torch.float64)
    trace = poutine.trace(poutine.condition(vae.model, data={"z_1": z})).get_trace(x)
    trace.compute_log_prob()
    torch.testing.assert_close(sites_of(trace)["z_1"]["log_prob"], log_normal(z, 0.0, 1.0))
    torch.testing.assert_close(sites_of(trace)["x"]["log_prob"], log_normal(x, A * z, S**2))
    assert sites_of(trace)["x"]["is_observed"] and sites_of(trace)["z_1"]["is_observed"]


def test_the_program_samples_what_it_is_not_given(seed: int) -> None:
    vae = shipped_vae(IMAGE)
    x = data_for(vae, 3)
    with global_rng(seed):
        observed, _ = vae.model(x)
        sampled, z = vae.model(num=4)
        with pytest.raises(ValueError, match="the data x, or the number of draws"):
            vae.model()
    assert observed is x
    assert sampled.shape == (4, 1, 8, 8) and z["z_2"].shape == (4, 2, 4, 4)


def test_predictive_draws_from_the_prior(seed: int) -> None:
    vae = linear_vae()
    with global_rng(seed):
        draws = Predictive(vae.model, num_samples=20)(num=1_000)
    x = draws["x"].flatten()
    assert draws["x"].shape == draws["z_1"].shape == (20, 1_000, 1)
    assert float(x.square().mean()) == pytest.approx(VARIANCE, abs=5 * VARIANCE * math.sqrt(2 / len(x)))


def test_predictive_draws_from_the_guide(seed: int) -> None:
    vae = linear_vae()
    x = torch.tensor([[0.7], [-1.5]], dtype=torch.float64)
    with global_rng(seed):
        z = Predictive(vae.model, guide=vae.guide, num_samples=500)(x)["z_1"].squeeze(-1)
    error = POSTERIOR_SPREAD / math.sqrt(500)
    assert z.mean(0).tolist() == pytest.approx((POSTERIOR_SLOPE * x).flatten().tolist(), abs=5 * error)
    assert z.std(0).tolist() == pytest.approx([POSTERIOR_SPREAD] * 2, abs=5 * error / math.sqrt(2))


@pytest.mark.parametrize("name", FEW)
def test_pyro_reads_the_structure_of_the_program(name: str) -> None:
    vae = shipped_vae(name)
    x = data_for(vae, 2)
    with global_rng(0):
        relations: dict[str, Any] = get_model_relations(vae.model, (x,))
        dependencies: dict[str, Any] = get_dependencies(vae.model, (x,))
    sites = [*vae.model.latent_shapes, "x"]
    above = {site: sites[:index] for index, site in enumerate(sites)}
    assert relations["sample_sample"] == above
    assert relations["observed"] == ["x"]
    assert relations["plate_sample"] == {"data": sites}
    assert set(relations["sample_dist"].values()) == {"Normal"}
    # Every site depends on all above it, and under data on all below it too.
    prior = {site: {*above[site], site} for site in sites}
    assert {site: set(parents) for site, parents in dependencies["prior_dependencies"].items()} == prior
    posterior = {site: set(sites) - set(above[site]) for site in sites[:-1]}
    assert {site: set(found) for site, found in dependencies["posterior_dependencies"].items()} == posterior


@pytest.mark.parametrize("name", FEW)
def test_pyro_draws_the_program(name: str) -> None:
    vae = shipped_vae(name)
    with global_rng(0):
        source = pyro.render_model(vae.model, model_args=(data_for(vae, 2),)).source
    sites = [*vae.model.latent_shapes, "x"]
    assert all(f"\t{site} [" in source or f"\t\t{site} [" in source for site in sites)
    assert all(f"{above} -> {below}" in source for above, below in zip(sites[:-1], sites[1:], strict=True))


@pytest.mark.parametrize("name", FEW)
def test_the_elbo_as_a_module_reaches_every_parameter(name: str) -> None:
    vae = shipped_vae(name)
    objective = TraceMeanField_ELBO()(vae.model, vae.guide)
    assert {*objective.parameters()} == {*vae.parameters()}
    with global_rng(0):
        objective(data_for(vae, 3)).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def first_adam_moves(vae: HierarchicalVAE, rate: float) -> dict[str, float]:
    """Take one SVI step with Pyro's own Adam; return the largest move of every parameter."""
    x = data_for(vae, 3)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    # pyro.optim needs the parameters in Pyro's store, where the package's setting does not put them.
    with pyro.settings.context(module_local_params=False), global_rng(0):
        SVI(vae.model, vae.guide, Adam({"lr": rate}), TraceMeanField_ELBO()).step(x)
    return {name: float((p.detach() - before[name]).abs().max()) for name, p in vae.named_parameters()}


@pytest.mark.parametrize("name", FEW)
def test_svi_with_an_optimizer_of_pyro_moves_every_parameter(name: str) -> None:
    # Adam's first step moves a parameter by the rate, whatever its gradient.
    moves = first_adam_moves(shipped_vae(name), 1e-3)
    assert moves == pytest.approx(dict.fromkeys(moves, 1e-3), rel=1e-2)


def test_svi_skips_a_layer_whose_name_model_and_guide_share() -> None:
    """Why the programs have names of their own."""
    vae = shipped_vae(IMAGE)
    vae.model._pyro_name = vae.guide._pyro_name = ""
    moves = first_adam_moves(vae, 1e-3)
    assert [name for name, move in moves.items() if move == 0] == ["model.stem.weight", "model.stem.bias"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2,), {"kind": "image"}, r"model.kind 'image' does not fit data of shape \(2,\): leave it at auto"),
        ((1, 8, 8), {"kind": "vector"}, "model.kind 'vector' does not fit"),
        ((8, 8), {}, r"does not fit data of shape \(8, 8\)"),
        ((1, 8, 16), {}, r"multiple of 4, got shape \(1, 8, 16\)"),
        ((1, 30, 30), {}, r"multiple of 8, got shape \(1, 30, 30\): set data.image-size"),
        ((1, 8, 8), {"latents": (2, 2, 2, 2)}, "model.latents has 4 groups, but images of side 8 have 3 grids"),
    ],
)
def test_data_that_a_model_cannot_take_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message), global_rng(0):
        build_vae(ModelConfig(**options), torch.Size(shape))


@pytest.mark.parametrize("name", [FEW[1], *[name for name in IMAGES if "3 groups" in name]])
def test_every_group_matters_to_x(name: str) -> None:
    vae = shipped_vae(name)
    eps = {site: noise.requires_grad_() for site, noise in draw_noise(vae, 2).items()}
    x, _ = vae.transport(eps)
    for site, grad in zip(eps, torch.autograd.grad(x.square().sum(), [*eps.values()]), strict=True):
        assert grad.abs().amax(dim=tuple(range(1, grad.dim()))).min() > 1e-3, site


@pytest.mark.parametrize(
    "name",
    ["vector, 3 groups, local scale", "vector, 3 groups, global scale", pytest.param(IMAGE, marks=needs_bfloat16)],
)
def test_every_normal_is_formed_in_float32_under_autocast(name: str) -> None:
    vae = shipped_vae(name).float()
    with global_rng(0), torch.no_grad():
        x = torch.randn(64, *vae.model.event_shape)
        guide = poutine.trace(vae.guide).get_trace(x)
        exact = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
        with torch.autocast("cpu", torch.bfloat16):
            half_guide = poutine.trace(poutine.replay(vae.guide, trace=guide)).get_trace(x)
            half = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
            half.compute_log_prob()
    pairs = [(sites_of(half)[site], sites_of(exact)[site]) for site in (*vae.model.latent_shapes, "x")]
    pairs += [(sites_of(half_guide)[site], sites_of(guide)[site]) for site in vae.model.latent_shapes]
    for one, other in pairs:
        for key in ("loc", "scale"):
            value, expected = (getattr(node["fn"].base_dist, key) for node in (one, other))
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected, rtol=0.1, atol=0.1)
    # Values that bfloat16 cannot hold: what follows the networks is computed in float32.
    scale = sites_of(half)["z_2"]["fn"].base_dist.scale
    assert not torch.equal(scale, scale.bfloat16().float())
    assert sites_of(half)["x"]["log_prob"].dtype == torch.float32
