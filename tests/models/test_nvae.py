"""NVAE has the official sizes, and is one model with its guide, its transport and its objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import NvaeConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.layers import spectral_layers
from ppl_vaebm.models.nvae import AutoregressiveShift, LatentGrids, NVAEGenerator, NVAEGuide, build_nvae
from ppl_vaebm.models.nvae_cells import BatchNorm2d, Conv2d
from ppl_vaebm.models.vae import HierarchicalVAE, OnePass, Prior
from ppl_vaebm.rng import global_rng
from tests.inference import test_elbo
from tests.inference.test_elbo import annealed, loss_and_grads
from tests.models import test_vae
from tests.small_models import (
    NVAES,
    QUANTILE_NVAES,
    draw_noise,
    nvae_on_meta,
    nvae_options,
    shipped_vae,
    sites_of,
    strengthen,
    unsettle,
)
from tests.tiny import needs_bfloat16

TWO_SCALES, ONE_GROUP = NVAES
MIXTURE, PADDED = QUANTILE_NVAES
EVERY_NVAE = [*NVAES, *QUANTILE_NVAES]


# --- the official sizes --------------------------------------------------------------------------


class Recipe(NamedTuple):
    """A published model, and its sizes."""

    config: NvaeConfig
    event_shape: tuple[int, int, int]
    levels: int
    total: int
    generator: int
    millions: tuple[float, float]
    """The two as the paper's code gives them, REFERENCE.md section 3.5."""
    num_latents: int
    num_convs: int
    num_norms: int


MNIST = NvaeConfig(
    num_scales=2, adaptive_groups=True, num_pre_blocks=2, pre_cells=3, post_cells=3, padding=2, decoder="bernoulli"
)
CIFAR10 = NvaeConfig(channels=128, groups_per_scale=30, num_flows=1)
CELEBA = NvaeConfig(channels=64, num_scales=3, groups_per_scale=20, adaptive_groups=True, num_flows=1)
HQ = NvaeConfig(
    channels=30, num_scales=5, groups_per_scale=16, adaptive_groups=True, min_groups_per_scale=4, num_flows=2
)
PIXELS_64 = NvaeConfig(channels=48, num_scales=3, groups_per_scale=5, num_flows=1)
PIXELS_256 = NvaeConfig(channels=32, num_scales=5, groups_per_scale=4, num_flows=2)
IMAGENET = NvaeConfig(channels=192, groups_per_scale=28, num_flows=1)


def mixture(config: NvaeConfig) -> NvaeConfig:
    return replace(config, decoder="logistic-mixture")


RECIPES = {
    "VAEBM CIFAR-10": Recipe(CIFAR10, (3, 32, 32), 256, 130_744_004, 51_718_860, (130.7, 51.7), 153_600, 610, 364),
    "VAEBM 64": Recipe(PIXELS_64, (3, 64, 64), 256, 65_005_372, 24_078_330, (65.0, 24.1), 134_400, 330, 196),
    "VAEBM 256": Recipe(PIXELS_256, (3, 256, 256), 32, 365_372_032, 132_288_928, (365.4, 132.3), 1_745_920, 570, 268),
    "NVAE MNIST": Recipe(MNIST, (1, 28, 28), 2, 33_363_134, 12_672_258, (33.4, 12.7), 14_400, 255, 214),
    "NVAE CIFAR-10": Recipe(
        mixture(CIFAR10), (3, 32, 32), 256, 130_852_480, 51_827_336, (130.9, 51.8), 153_600, 610, 364
    ),
    "NVAE CelebA-64": Recipe(
        mixture(CELEBA), (3, 64, 64), 256, 153_281_364, 58_061_448, (153.3, 58.1), 467_200, 730, 436
    ),
    "NVAE ImageNet-32": Recipe(
        mixture(IMAGENET), (3, 32, 32), 256, 268_509_444, 106_333_664, (268.5, 106.3), 143_360, 570, 340
    ),
    "NVAE CelebA-HQ": Recipe(
        mixture(HQ), (3, 256, 256), 32, 330_798_664, 119_540_884, (330.8, 119.5), 6_005_760, 986, 460
    ),
}


def on_meta(name: str) -> HierarchicalVAE:
    recipe = RECIPES[name]
    return nvae_on_meta(recipe.config, recipe.event_shape, recipe.levels)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Formulas:
    """The numbers of parameters of REFERENCE.md section 2.2, written out."""

    def __init__(self, config: NvaeConfig, num_channels: int) -> None:
        self.config, self.num_channels = config, num_channels
        self.groups = [
            (config.channels << (config.num_pre_blocks + scale), num) for scale, num in enumerate(config.groups)
        ]
        """Width and groups of every scale, finest first."""

    def excite(self, c: int) -> int:
        q = max(c // 16, 4)
        return 2 * c * q + q + c if self.config.squeeze_excite else 0

    def encoder_cell(self, c: int) -> int:
        return 18 * c**2 + 4 * c + 4 * c + self.excite(c)

    def down_cell(self, c: int) -> int:
        convs, skip = 9 * c * 2 * c + 4 * c + 9 * (2 * c) ** 2 + 4 * c, c * 2 * c + 4 * c
        return convs + skip + 2 * c + 4 * c + self.excite(2 * c)

    def bottleneck(self, c: int, e: int) -> int:
        h = e * c
        return 2 * c * h + 25 * h + 4 * h + 4 * c + self.excite(c)

    def up_cell(self, c: int, e: int) -> int:
        h, out = e * c, c // 2
        return c * h + 25 * h + h * out + 2 * c + 4 * h + 2 * out + c * out + out + self.excite(out)

    def conv(self, num_in: int, num_out: int, size: int) -> int:
        return size**2 * num_in * num_out + 2 * num_out

    def flows(self) -> int:
        n = self.config.num_latents
        return 2 * self.config.num_flows * (9 * n * 6 * n + 25 * 6 * n + 6 * n * n + 2 * 6 * n + 2 * n)

    def generator(self, side: int, num_outputs: int) -> dict[str, int]:
        """Count the parts of the generator; side is that of the coarsest grid."""
        config, n = self.config, self.config.num_latents
        after_first = [(c, num - (c == self.groups[-1][0])) for c, num in self.groups]
        blocks = [config.channels << block for block in range(config.num_pre_blocks)]
        tower = sum(num * config.decoder_cells * self.bottleneck(c, 6) for c, num in after_first)
        return {
            "h": self.groups[-1][0] * side**2,
            "cells": tower + sum(self.up_cell(c, 6) for c, _ in self.groups[1:]),
            "priors": sum(num * self.conv(c, 2 * n, 1) for c, num in after_first),
            "combiners": sum(num * self.conv(c + n, c, 1) for c, num in self.groups),
            "post": sum(self.up_cell(2 * c, 3) + (config.post_cells - 1) * self.bottleneck(c, 3) for c in blocks),
            "head": self.conv(config.channels, num_outputs, 3),
        }

    def guide(self) -> dict[str, int]:
        """Count the parts of the guide."""
        config, n = self.config, self.config.num_latents
        after_last = [(c, num - (c == self.groups[-1][0])) for c, num in self.groups]
        blocks = [config.channels << block for block in range(config.num_pre_blocks)]
        tower = sum(num * config.encoder_cells * self.encoder_cell(c) for c, num in self.groups)
        return {
            "stem": self.conv(self.num_channels, config.channels, 3),
            "pre": sum((config.pre_cells - 1) * self.encoder_cell(c) + self.down_cell(c) for c in blocks),
            "tower": tower + sum(self.down_cell(c) for c, _ in self.groups[:-1]),
            "combiners": sum(num * self.conv(c, c, 1) for c, num in after_last),
            "top": self.conv(self.groups[-1][0], self.groups[-1][0], 1),
            "heads": sum(num * self.conv(c, 2 * n, 3) for c, num in self.groups),
            "flows": sum(num for _, num in self.groups) * self.flows(),
        }


OUTPUTS = {"bernoulli": 1, "normal": 6, "logistic-mixture": 100}


def parts_of(program: nn.Module) -> dict[str, int]:
    counts = {name: count(module) for name, module in program.named_children()}
    return {**counts, **{name: parameter.numel() for name, parameter in program.named_parameters(recurse=False)}}


EVERY_RECIPE = pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("VAEBM") or "MNIST" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)


@EVERY_RECIPE
def test_it_has_the_official_sizes(name: str) -> None:
    vae, recipe = on_meta(name), RECIPES[name]
    assert (count(vae), count(vae.model)) == (recipe.total, recipe.generator)
    assert tuple(round(number / 1e6, 1) for number in (count(vae), count(vae.model))) == recipe.millions
    assert sum(shape.numel() for shape in vae.model.latent_shapes.values()) == recipe.num_latents
    assert len(spectral_layers(vae, has_linear=False)) == recipe.num_convs
    assert len([module for module in vae.modules() if isinstance(module, BatchNorm2d)]) == recipe.num_norms


@EVERY_RECIPE
def test_every_part_has_the_size_of_its_formula(name: str) -> None:
    vae, recipe = on_meta(name), RECIPES[name]
    formulas = Formulas(recipe.config, recipe.event_shape[0])
    side = next(iter(vae.model.latent_shapes.values()))[-1]
    assert parts_of(vae.model) == formulas.generator(side, OUTPUTS[recipe.config.decoder])
    assert parts_of(vae.guide) == formulas.guide()


@pytest.mark.parametrize(
    "change",
    [{"squeeze_excite": False}, {"num_flows": 1}, {"encoder_cells": 1}, {"decoder_cells": 1}, {"channels": 31}],
)
def test_another_configuration_has_another_size(change: dict[str, Any]) -> None:
    """Negative control; the formulas follow it."""
    config = replace(MNIST, **change)
    vae = nvae_on_meta(config, (1, 28, 28), 2)
    formulas = Formulas(config, 1)
    assert parts_of(vae.model) == formulas.generator(4, 1)
    assert parts_of(vae.guide) == formulas.guide()
    assert abs(count(vae) - RECIPES["NVAE MNIST"].total) > 100_000


def test_values_have_the_worked_shapes() -> None:
    vae = on_meta("VAEBM CIFAR-10")
    assert isinstance(vae.model, NVAEGenerator) and isinstance(vae.guide, NVAEGuide)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    watched = {
        "stem": vae.guide.stem,
        "pre": vae.guide.pre,
        "tower": vae.guide.tower,
        "combiners": vae.model.combiners,
        "cells": vae.model.cells,
        "post": vae.model.post,
    }
    modules = {name: [part] if name == "stem" else [*part.children()] for name, part in watched.items()}
    modules["head"] = [vae.model.head]
    cells = {"hidden": vae.model.cells.modules(), "post hidden": vae.model.post.modules()}
    for name, found in cells.items():
        modules[name] = [module for module in found if isinstance(module, Conv2d) and module.groups > 1]
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, out, name=name: shapes.setdefault(name, []).append(tuple(out.shape[1:]))
        )
        for name, found in modules.items()
        for module in found
    ]
    with torch.device("meta"):
        features = vae.guide.encode(torch.zeros(2, 3, 32, 32))
        eps = {name: torch.zeros(2, *shape) for name, shape in vae.noise_shapes.items()}
        vae.transport(eps)
    for hook in hooks:
        hook.remove()
    wide = (256, 16, 16)
    assert shapes == {
        "stem": [(128, 32, 32)],
        "pre": [(128, 32, 32), wide],
        "tower": [wide] * 30,
        "combiners": [wide] * 30,
        "cells": [wide] * 29,
        "hidden": [(1536, 16, 16)] * 58,
        "post": [(128, 32, 32)] * 2,
        "post hidden": [(768, 32, 32), (384, 32, 32)],
        "head": [(6, 32, 32)],
    }
    assert vae.model.h.shape == wide and vae.model.get_parameter("combiners.0.weight").shape[1] == 276
    assert {tuple(shape) for shape in vae.model.latent_shapes.values()} == {(20, 16, 16)}
    assert list(features) == list(vae.model.latent_shapes) == [f"z_{group}" for group in range(1, 31)]
    assert {tuple(value.shape[1:]) for value in features.values()} == {wide}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_scales": 3, "groups_per_scale": 5}, (5, 5, 5)),
        ({"num_scales": 3, "groups_per_scale": 20, "adaptive_groups": True}, (20, 10, 5)),
        (
            {"num_scales": 5, "groups_per_scale": 16, "adaptive_groups": True, "min_groups_per_scale": 4},
            (16, 8, 4, 4, 4),
        ),
        ({"num_scales": 3, "groups_per_scale": 5, "adaptive_groups": True}, (5, 2, 1)),
    ],
)
def test_groups_lie_on_their_grids_coarsest_first(options: dict[str, Any], expected: tuple[int, ...]) -> None:
    layout = LatentGrids(NvaeConfig(**options), torch.Size([3, 64, 64]))
    assert layout.groups == expected
    assert layout.sides == [32 >> scale for scale in range(len(expected))]
    assert layout.widths == [64 << scale for scale in range(len(expected))]
    assert [layout.scale_of.count(scale) for scale in range(len(expected))] == list(expected)
    assert layout.scale_of == sorted(layout.scale_of, reverse=True)
    assert not layout.is_plain


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 8, 16), {}, r"takes square images, got data of shape \(3, 8, 16\)"),
        ((8,), {}, r"takes square images, got data of shape \(8,\)"),
        (
            (1, 28, 28),
            {"num_pre_blocks": 2, "num_scales": 2},
            "3 halving.*multiple of 8, got 28: set model.nvae.padding to 2, or use fewer scales",
        ),
        (
            (1, 28, 28),
            {"num_pre_blocks": 2, "num_scales": 2, "padding": 1},
            "got 30: set model.nvae.padding to 2, or use fewer scales",
        ),
        ((1, 9, 9), {}, "multiple of 2, got 9: set data.image-size to a multiple, or use fewer scales"),
    ],
)
def test_images_that_the_grids_do_not_divide_are_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LatentGrids(NvaeConfig(**options), torch.Size(shape))


def test_the_padding_that_the_message_names_works() -> None:
    layout = LatentGrids(NvaeConfig(num_pre_blocks=2, num_scales=2, padding=2), torch.Size([1, 28, 28]))
    assert layout.sides == [8, 4]


@pytest.mark.parametrize(
    ("decoder", "levels", "message"),
    [
        ("bernoulli", 256, "bernoulli does not fit images that are not binarised"),
        ("bernoulli", None, "bernoulli does not fit images that are not binarised"),
        ("normal", 2, "normal does not fit binarised images: bernoulli and data.binarize go together"),
        ("logistic", 2, "logistic does not fit binarised images"),
        ("logistic", None, "logistic scores levels of pixels, which these data lack: use normal"),
        ("logistic-mixture", None, "logistic-mixture scores levels of pixels"),
    ],
)
def test_decoders_that_do_not_fit_the_pixels_are_refused(decoder: Any, levels: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_nvae(NvaeConfig(decoder=decoder), torch.Size([1, 8, 8]), levels)


@pytest.mark.parametrize(("decoder", "levels"), [("bernoulli", 2), ("normal", None), ("normal", 32), ("logistic", 32)])
def test_those_that_fit_are_not(decoder: Any, levels: int | None) -> None:
    with torch.device("meta"):
        assert build_nvae(NvaeConfig(decoder=decoder, channels=4), torch.Size([1, 8, 8]), levels)


# --- one model with its guide and transport ------------------------------------------------------


def small_nvae(shape: tuple[int, ...] = (3, 8, 8), levels: int | None = None, **options: Any) -> HierarchicalVAE:
    """Make a small NVAE of float64 whose outputs vary, evaluation mode."""
    config = nvae_options(**options)["nvae"]
    with global_rng(0):
        vae = build_nvae(config, torch.Size(shape), levels).double()
    strengthen(vae, 1.5)
    unsettle(vae)
    return vae.eval()


def data_for(vae: HierarchicalVAE, num: int) -> Tensor:
    with torch.no_grad():
        return vae.transport(draw_noise(vae, num, seed=2))[0].clamp(-1, 1)


GENERIC: list[Callable[[str], None]] = [
    test_vae.test_heads_of_zero_make_the_posterior_the_prior,
    test_vae.test_weights_are_stored_once,
    test_vae.test_a_deep_copy_is_independent_and_its_guide_walks_its_own_model,
    test_vae.test_pyro_reads_the_structure_of_the_program,
    test_vae.test_pyro_draws_the_program,
    test_vae.test_the_elbo_as_a_module_reaches_every_parameter,
    test_vae.test_svi_with_an_optimizer_of_pyro_moves_every_parameter,
    test_vae.test_every_group_matters_to_x,
]


@pytest.mark.parametrize("check", GENERIC, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NVAES)
def test_it_is_a_hierarchical_vae_like_the_others(name: str, check: Callable[[str], None]) -> None:
    check(name)


@pytest.mark.parametrize("name", QUANTILE_NVAES)
def test_the_transport_is_the_program_with_its_noise_fixed(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    sites = sites_of(test_vae.model_trace(vae, seed, 5))
    eps = {}
    for site in vae.model.latent_shapes:
        normal = sites[site]["fn"].base_dist
        eps[f"eps_{site}"] = (sites[site]["value"] - normal.loc) / normal.scale
    # The distribution function of what Pyro drew; without its cache, which holds the noise itself.
    eps["eps_x"] = sites["x"]["fn"].transforms[0].with_cache(0).inv(sites["x"]["value"])
    with torch.no_grad():
        x, z = vae.transport(eps)
    # Two root searches lie between the noise and x, each to the precision of the dtype times the slope of the other.
    torch.testing.assert_close(x, sites["x"]["value"], rtol=0, atol=1e-8)
    assert test_vae.largest_difference(z, {site: sites[site]["value"] for site in z}) < 1e-10
    shifted = vae.transport({**eps, "eps_x": eps["eps_x"] + 1e-3})[0]
    assert (shifted - x).abs().min() > 1e-7  # negative control


@pytest.mark.parametrize("name", QUANTILE_NVAES)
def test_the_transport_inverts(name: str) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 5)
    with torch.no_grad():
        x, z = vae.transport(eps)
        back, elsewhere = vae.noise_of(x, z), vae.noise_of(x + 1, z)
    # As above: the distribution function in a tail amplifies the rounding of x.
    assert test_vae.largest_difference(back, eps) < 1e-8
    assert test_vae.largest_difference(elsewhere, eps) > 0.1


@pytest.mark.parametrize("name", QUANTILE_NVAES)
def test_rows_are_independent(name: str) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 4)
    changed = {site: torch.cat([noise[:1] + 3, noise[1:]]) for site, noise in eps.items()}
    with torch.no_grad():
        one, other = vae.transport(eps)[0], vae.transport(changed)[0]
    assert (one - other)[0].abs().max() > 0.1
    assert (one - other)[1:].abs().max() < 1e-12

    def log_posterior(x: Tensor) -> Tensor:
        with torch.no_grad(), global_rng(0):
            trace = poutine.trace(poutine.condition(vae.guide, data=z)).get_trace(x)
        trace.compute_log_prob()
        return torch.stack([sites_of(trace)[site]["log_prob"] for site in vae.model.latent_shapes])

    with torch.no_grad():
        z = vae.transport(eps)[1]
    x = data_for(vae, 4)
    gap = log_posterior(x) - log_posterior(torch.cat([-x[:1], x[1:]]))
    assert gap[:, 0].abs().min() > 1e-3 and gap[:, 1:].abs().max() < 1e-10


def test_in_training_mode_they_are_not() -> None:
    """Negative control: there a batch has one normalisation."""
    vae = shipped_vae(MIXTURE).train()
    eps = draw_noise(vae, 4)
    changed = {site: torch.cat([noise[:1] + 3, noise[1:]]) for site, noise in eps.items()}
    with torch.no_grad():
        assert (vae.transport(eps)[0] - vae.transport(changed)[0])[1:].abs().max() > 1e-3


# --- priors and posteriors -----------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_NVAE)
def test_the_first_prior_has_raw_zeros(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    first = sites_of(test_vae.model_trace(vae, seed, 3))["z_1"]["fn"].base_dist
    assert (first.loc == 0).all()
    assert first.scale.unique().tolist() == pytest.approx([1.01], rel=1e-15)
    for site in [*vae.model.latent_shapes][1:]:
        assert sites_of(test_vae.model_trace(vae, seed, 3))[site]["fn"].base_dist.scale.std(0).min() > 1e-4


class Watched:
    """One walk of a guide, with what its heads and those of the priors gave."""

    def __init__(self, vae: HierarchicalVAE, x: Tensor) -> None:
        assert isinstance(vae.model, NVAEGenerator) and isinstance(vae.guide, NVAEGuide)
        self.raw: dict[str, Tensor] = {}
        heads = {f"q_{site}": head for site, head in vae.guide.heads.items()}
        heads |= {f"p_z_{index}": head for index, head in enumerate(vae.model.priors, 2)}
        hooks = [
            head.register_forward_hook(lambda _module, _inputs, out, name=name: self.raw.update({name: out}))
            for name, head in heads.items()
        ]
        with torch.no_grad(), global_rng(0):
            self.sites = sites_of(poutine.trace(vae.guide).get_trace(x))
        for hook in hooks:
            hook.remove()

    def normal(self, site: str, is_residual: bool) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of a posterior from the heads, by hand."""
        raw = self.raw[f"q_{site}"]
        if is_residual and site != "z_1":
            raw = raw + self.raw[f"p_{site}"]
        loc, log_scale = (5 * (half / 5).tanh() for half in raw.chunk(2, dim=1))
        return loc, log_scale.exp() + 0.01


@pytest.mark.parametrize("is_residual", [False, True])
def test_raw_outputs_are_added_and_then_clamped(is_residual: bool) -> None:
    vae = small_nvae(num_scales=2, groups_per_scale=2, residual_posterior=is_residual)
    for part in (vae.guide.heads, vae.model.priors):
        strengthen(part, 5.0)  # so that the clamp is felt
    watched = Watched(vae, data_for(vae, 3))
    for site in vae.model.latent_shapes:
        found = watched.sites[site]["fn"].base_dist
        loc, scale = watched.normal(site, is_residual)
        torch.testing.assert_close(found.loc, loc)
        torch.testing.assert_close(found.scale, scale)
        if site != "z_1":
            other, _ = watched.normal(site, not is_residual)
            assert (other - loc).abs().max() > 0.1
            # Negative control: clamped first and then added it is another.
            one, two = (watched.raw[f"{density}_{site}"].chunk(2, dim=1)[0] for density in "pq")
            assert (5 * (one / 5).tanh() + 5 * (two / 5).tanh() - loc).abs().max() > 0.1


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x.exp() - 1)


def test_the_way_up_and_down_is_that_of_the_paper(seed: int) -> None:
    """The towers written out; their cells and heads have tests of their own."""
    vae = small_nvae((3, 16, 16), num_scales=2, groups_per_scale=2)
    assert isinstance(vae.model, NVAEGenerator) and isinstance(vae.guide, NVAEGuide)
    up, down, x = vae.guide, vae.model, data_for(vae, 3)
    with torch.no_grad(), global_rng(seed):
        sites = sites_of(poutine.trace(vae.guide).get_trace(x))
    z = [sites[site]["value"] for site in vae.model.latent_shapes]
    with torch.no_grad():
        kept = [up.tower[0](up.pre(up.stem(x)))]
        for cells in [*up.tower][1:]:
            kept.append(cells(kept[-1]))
        raw = [up.heads["z_1"](elu(up.top(elu(kept[-1]))))]
        state = down.combiners[0](torch.cat([down.h.expand(3, -1, -1, -1), z[0]], dim=1))
        for group in (1, 2, 3):
            state = down.cells[group - 1](state)
            merged = kept[3 - group] + up.combiners[3 - group](state)
            raw.append(up.heads[f"z_{group + 1}"](merged) + down.priors[group - 1](elu(state)))
            state = down.combiners[group](torch.cat([state, z[group]], dim=1))
        out = down.head(elu(down.post(state)))
        for site, value in zip(vae.model.latent_shapes, raw, strict=True):
            loc, log_scale = (5 * (half / 5).tanh() for half in value.chunk(2, dim=1))
            torch.testing.assert_close(sites[site]["fn"].base_dist.loc, loc)
            torch.testing.assert_close(sites[site]["fn"].base_dist.scale, log_scale.exp() + 0.01)
        eps = vae.noise_of(x, dict(zip(vae.model.latent_shapes, z, strict=True)))
        torch.testing.assert_close(vae.decode_noise(eps)[0].mean(), 5 * (out[:, :3] / 5).tanh())
        # Negative control: without one of its activations it is another.
        assert (down.head(down.post(state)) - out).abs().max() > 1e-2
        assert (up.heads["z_1"](up.top(kept[-1])) - raw[0]).abs().max() > 1e-2


def test_a_residual_posterior_needs_what_the_prior_said() -> None:
    vae = small_nvae(groups_per_scale=2)
    prior = Prior(torch.zeros(1, 2, 4, 4).double(), torch.ones(1, 2, 4, 4).double())
    with pytest.raises(AssertionError):
        vae.guide.posterior("z_1", prior, torch.zeros(1, 4, 4, 4).double(), torch.zeros(1, 4, 4, 4).double())


def test_the_kl_to_itself_is_zero_where_the_heads_are(seed: int) -> None:
    """A residual posterior of zeros is the prior, one that stands alone is not."""
    for is_residual in (True, False):
        vae = small_nvae(groups_per_scale=3, residual_posterior=is_residual)
        for parameter in vae.guide.heads.parameters():
            nn.init.zeros_(parameter)
        elbo = annealed(1.0)
        with torch.no_grad(), global_rng(seed):
            elbo.loss(vae.model, vae.guide, data_for(vae, 3))
        kl = {site: float(value) for site, value in elbo.kl_nats.items()}
        assert kl["z_1"] == 0
        assert all((kl[site] == 0) == is_residual for site in ("z_2", "z_3"))


def test_a_group_sees_the_tower_up_to_its_own_depth() -> None:
    """Features are kept on the way up, and used in reverse order on the way down."""
    vae = small_nvae((3, 16, 16), num_scales=2, groups_per_scale=2)
    assert isinstance(vae.guide, NVAEGuide)
    features = vae.guide.encode(data_for(vae, 2))
    shapes = {"z_1": (8, 4, 4), "z_2": (8, 4, 4), "z_3": (4, 8, 8), "z_4": (4, 8, 8)}
    assert {site: tuple(value.shape[1:]) for site, value in features.items()} == shapes
    weights = [next(p for p in cells.parameters() if p.dim() == 4) for cells in vae.guide.tower]
    for site, value in features.items():
        grads = torch.autograd.grad(value.square().sum(), weights, retain_graph=True, allow_unused=True)
        # z_4 has what the first cells made, z_1 what all four made.
        assert [grad is not None for grad in grads] == [depth + int(site[-1]) <= 5 for depth in range(1, 5)]
        if site == "z_1":
            continue
        zeros = torch.zeros(2, 2, *shapes[site][1:]).double()
        posterior = vae.guide.posterior(site, Prior(zeros, zeros + 1, (zeros, zeros)), value, torch.zeros_like(value))
        parameters = dict(vae.guide.combiners.named_parameters())
        grads = torch.autograd.grad(posterior.mean.sum(), [*parameters.values()], allow_unused=True)
        used = {name.split(".")[0] for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        assert used == {str(4 - int(site[-1]))}


def test_padding_is_black_and_the_decoder_leaves_it_out() -> None:
    padded, whole = small_nvae((1, 6, 6), padding=1, groups_per_scale=2), small_nvae((1, 8, 8), groups_per_scale=2)
    whole.load_state_dict(padded.state_dict())
    x = data_for(padded, 3)
    black, grey = (whole.guide.encode(functional.pad(x, (1, 1, 1, 1), value=level)) for level in (-1.0, 0.0))
    for site, value in padded.guide.encode(x).items():
        assert torch.equal(value, black[site])
        assert (value - grey[site]).abs().max() > 1e-3  # negative control
    eps = draw_noise(whole, 3)
    one, other = padded.decode_noise(eps)[0].mean(), whole.decode_noise(eps)[0].mean()
    assert one.shape == (3, 1, 6, 6)
    assert torch.equal(one, other[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("temperature", [0.3, 0.7])
def test_a_temperature_is_a_factor_on_the_noise(temperature: float) -> None:
    vae = small_nvae(num_scales=2, groups_per_scale=2)
    eps = draw_noise(vae, 3)

    def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
        """Sample at a temperature as NVAE does: the standard deviation, after its floor is added, times t."""
        return prior.loc + (temperature * prior.scale) * eps[f"eps_{name}"]

    with torch.no_grad():
        z, state = vae.model.walk(choose, 3)
        ours, found = vae.decode_noise({name: temperature * noise for name, noise in eps.items()})
        assert test_vae.largest_difference(found, z) < 1e-12
        torch.testing.assert_close(ours.mean(), vae.model.decode(state).mean())
        assert test_vae.largest_difference(vae.decode_noise(eps)[1], z) > 0.1  # negative control


# --- the objective -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NVAES)
def test_the_elbo_is_pyros_own_to_the_last_bit(name: str, seed: int) -> None:
    test_elbo.test_with_weight_one_it_is_pyros_own_to_the_last_bit(name, seed)


def vae_with(decoder: str, num_flows: int) -> HierarchicalVAE:
    levels = {"bernoulli": 2, "normal": None}.get(decoder, 16)
    return small_nvae((3, 8, 8), levels, groups_per_scale=2, decoder=decoder, num_flows=num_flows)


def observed(decoder: str, num: int, generator: torch.Generator) -> Tensor:
    x = 2 * torch.rand(num, 3, 8, 8, generator=generator, dtype=torch.float64) - 1
    return x.sign() if decoder == "bernoulli" else x


DECODERS = ["normal", "bernoulli", "logistic", "logistic-mixture"]


@pytest.mark.parametrize("num_flows", [0, 1])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_elbo_in_one_walk_is_pyros_in_two(
    decoder: str, num_flows: int, seed: int, generator: torch.Generator
) -> None:
    vae, x = vae_with(decoder, num_flows), observed(decoder, 3, generator)
    expected, expected_grads = loss_and_grads(TraceMeanField_ELBO(), vae, x, seed)
    loss, grads = loss_and_grads(annealed(1.0), vae, x, seed)
    if num_flows:  # the sampled terms are added in another order: a unit in the last place at some seeds
        torch.testing.assert_close(loss, expected, rtol=1e-15, atol=0)
    else:
        assert torch.equal(loss, expected)
    scale = max(float(grad.abs().max()) for grad in expected_grads)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * scale)
    # Pyro's other estimator samples the KL term, as this one does where there is a flow.
    sampled, sampled_grads = loss_and_grads(Trace_ELBO(), vae, x, seed)  # type: ignore[arg-type]
    gap = abs(float(loss - sampled)) / abs(float(sampled))
    grad_gap = max(float((a - b).abs().max()) for a, b in zip(grads, sampled_grads, strict=True)) / scale
    if num_flows:
        assert gap < 1e-12 and grad_gap < 1e-10
    else:
        assert gap > 1e-6 and grad_gap > 1e-6
    # Negative control: with another weight on the KL term it is none of them.
    less, _ = loss_and_grads(annealed(0.9), vae, x, seed)
    assert abs(float(less - expected)) > 1e-3


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_scores_levels_and_draws_what_the_transport_gives(
    decoder: str, seed: int, generator: torch.Generator
) -> None:
    vae, x = vae_with(decoder, 0), observed(decoder, 3, generator)
    with torch.no_grad(), global_rng(seed):
        one = poutine.trace(vae.model).get_trace(x)
    with torch.no_grad(), global_rng(seed):
        other = poutine.trace(vae.model).get_trace(x, is_discretized=False)
    with torch.no_grad(), global_rng(seed):
        drawn = poutine.trace(vae.model).get_trace(num=3)
    is_same = type(sites_of(one)["x"]["fn"]) is type(sites_of(other)["x"]["fn"])
    assert is_same == (decoder in ("normal", "bernoulli"))
    assert type(sites_of(drawn)["x"]["fn"]) is type(sites_of(other)["x"]["fn"])


def test_a_posterior_with_flows_is_a_transformed_normal(seed: int) -> None:
    vae = shipped_vae(MIXTURE)
    x = data_for(vae, 3)
    with torch.no_grad(), global_rng(seed):
        guide = poutine.trace(vae.guide).get_trace(x)
    for site in vae.model.latent_shapes:
        posterior = sites_of(guide)[site]["fn"]
        assert isinstance(posterior, TransformedDistribution)
        assert [type(transform) for transform in posterior.transforms] == [AutoregressiveShift] * 2
        # Every group has flows of its own, each the opposite order of the one before.
        assert [*posterior.transforms] == [*vae.guide.get_submodule(f"flows.{site}").children()]
        value = sites_of(guide)[site]["value"]
        torch.testing.assert_close(posterior.log_prob(value), posterior.log_prob(value.clone()), rtol=1e-10, atol=1e-10)
        assert (posterior.log_prob(value) - posterior.base_dist.log_prob(value)).abs().min() > 1e-3  # negative control


@pytest.mark.parametrize(
    "name",
    [
        "guide.flows.z_1.0.last.log_gain",
        "guide.flows.z_1.0.first.weight",
        "guide.flows.z_1.1.mix.log_gain",
        "guide.heads.z_1.bias",
        "model.priors.0.bias",
    ],
)
def test_gradients_through_flows_are_those_of_finite_differences(name: str, seed: int) -> None:
    vae = shipped_vae(MIXTURE)
    x, parameter = data_for(vae, 2), vae.get_parameter(name)
    (grad,) = [
        grad
        for (other, _), grad in zip(vae.named_parameters(), loss_and_grads(annealed(1.0), vae, x, seed)[1], strict=True)
        if other == name
    ]
    index, losses = int(grad.abs().argmax()), []
    for shift in (-1e-5, 1e-5):
        with torch.no_grad():
            parameter.view(-1)[index] += shift
            with global_rng(seed):
                losses.append(annealed(1.0).loss(vae.model, vae.guide, x))
            parameter.view(-1)[index] -= shift
    assert (losses[1] - losses[0]) / 2e-5 == pytest.approx(float(grad.flatten()[index]), rel=1e-5)
    assert float(grad.flatten()[index]) != 0


def test_several_draws_share_the_tower(seed: int) -> None:
    vae = shipped_vae(MIXTURE)
    x, calls = data_for(vae, 2), []
    hook = vae.guide.get_submodule("stem").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), global_rng(seed):
        values = OnePass(vae.guide, num_draws=3)(x)
    hook.remove()
    assert values["z_1"].shape[0] == 6 and len(calls) == 1


@needs_bfloat16
@pytest.mark.parametrize("decoder", DECODERS)
def test_in_half_precision_densities_stay_in_single(decoder: str, seed: int, generator: torch.Generator) -> None:
    vae, x = vae_with(decoder, 1).float(), observed(decoder, 3, generator).float()
    dtypes = set()
    for head in vae.guide.get_submodule("heads").children():
        head.register_forward_hook(lambda _module, _inputs, out: dtypes.add(out.dtype))
    full, _ = loss_and_grads(annealed(1.0), vae, x, seed)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with global_rng(seed):
            guide = poutine.trace(vae.guide).get_trace(x)
        with global_rng(seed):
            half = annealed(1.0).differentiable_loss(vae.model, vae.guide, x)
    assert dtypes == {torch.float32, torch.bfloat16}
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert float(half) == pytest.approx(float(full), rel=0.05)
    guide.compute_log_prob()
    for site in vae.model.latent_shapes:
        assert sites_of(guide)[site]["value"].dtype == sites_of(guide)[site]["log_prob"].dtype == torch.float32


# --- training mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_flows", [0, 1])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("batch", ["identical", "black", "one"])
def test_any_batch_can_be_trained_on(
    batch: str, decoder: str, num_flows: int, seed: int, generator: torch.Generator
) -> None:
    vae, x = vae_with(decoder, num_flows).train().float(), observed(decoder, 1, generator).float()
    x = {"identical": x.expand(4, -1, -1, -1), "black": torch.full((4, 3, 8, 8), -1.0), "one": x}[batch]
    before = {name: buffer.clone() for name, buffer in vae.named_buffers() if "running" in name}
    loss, grads = loss_and_grads(annealed(1.0), vae, x, seed)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert max(float(grad.abs().max()) for grad in grads) > 0
    moved = [
        name for name, buffer in vae.named_buffers() if "running" in name and not torch.equal(buffer, before[name])
    ]
    assert len(moved) == len(before)


def test_evaluation_leaves_the_statistics_alone(seed: int) -> None:
    vae = shipped_vae(TWO_SCALES)
    before = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    loss_and_grads(annealed(1.0), vae, data_for(vae, 3), seed)
    assert all(torch.equal(buffer, before[name]) for name, buffer in vae.named_buffers())


def test_one_group_is_a_plain_vae() -> None:
    vae = shipped_vae(ONE_GROUP)
    assert isinstance(vae.model, NVAEGenerator) and isinstance(vae.guide, NVAEGuide)
    assert vae.model.layout.is_plain and not hasattr(vae.model, "h")
    assert not len(vae.model.cells) + len(vae.model.priors) + len(vae.model.combiners)
    assert not len(vae.guide.tower) + len(vae.guide.combiners)
    eps = draw_noise(vae, 2)
    with torch.no_grad():
        state = vae.model.stem(1.01 * eps["eps_z_1"])
        torch.testing.assert_close(vae.decode_noise(eps)[0].mean(), vae.model.decode(state).mean())
