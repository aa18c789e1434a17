"""Small models for the tests of models and inference: one of every kind that ships, and one whose answers are known."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig, ModelConfig, NvaeConfig
from ppl_vaebm.models.decoders import Decoded, DecodedNormal
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.nvae import build_nvae
from ppl_vaebm.models.nvae_cells import BatchNorm2d, Conv2d
from ppl_vaebm.models.vae import Choose, Generator, HierarchicalVAE, RelativeGuide
from ppl_vaebm.models.vaebm import VAEBM, build_vae
from ppl_vaebm.rng import global_rng, stream


class Shipped(NamedTuple):
    """A shape of data and the options of a VAE for it."""

    event_shape: tuple[int, ...]
    options: dict[str, Any]
    levels: int | None = None


def nvae_options(**options: Any) -> dict[str, Any]:
    """Return the options of an NVAE of the smallest sizes that have all its parts."""
    small = {"channels": 2, "num_latents": 2, "num_mixtures": 2, "encoder_cells": 1, "decoder_cells": 1}
    return {"kind": "nvae", "nvae": NvaeConfig(**{**small, **options})}


@cache
def nvae_on_meta(config: NvaeConfig, event_shape: tuple[int, ...], levels: int | None) -> HierarchicalVAE:
    """Build an NVAE without memory for its weights, once for all tests: large ones take a second."""
    with torch.device("meta"):
        return build_nvae(config, torch.Size(event_shape), levels)


VECTORS = {
    "vector, 2 groups, a scale for every sample": Shipped(
        (2,), {"latents": (2, 3), "x_scale": "sample", "width": 16, "depth": 2}
    )
}
VECTORS |= {
    f"vector, {len(latents)} groups, {x_scale} scale": Shipped(
        (2,), {"latents": latents, "x_scale": x_scale, "width": 16, "depth": 2}
    )
    for latents in [(2,), (2, 3), (2, 3, 1)]
    for x_scale in ("global", "local")
}
IMAGES = {
    f"image {shape}, {len(latents)} groups, {x_scale} scale": Shipped(
        shape, {"latents": latents, "x_scale": x_scale, "channels": 4}
    )
    for shape in [(1, 8, 8), (3, 32, 32)]
    for latents in [(5,), (5, 2), (5, 2, 1)]
    for x_scale in ("global", "local")
}
PATCHED = {
    f"image {shape}, patches of {patch}": Shipped(
        shape, {"latents": (5, 2), "x_scale": "local", "channels": 4, "patch": patch}
    )
    for shape, patch in [((1, 8, 8), 2), ((3, 16, 16), 4)]
}
PATCHED["image (1, 8, 8), nets beside the stem, a scale for every sample"] = Shipped(
    (1, 8, 8), {"latents": (5, 2), "x_scale": "sample", "channels": 4, "patch": 2, "stem_depth": 2, "width": 8}
)
NVAES = {
    "nvae, 2 scales of 2 groups, normal": Shipped((3, 8, 8), nvae_options(num_scales=2, groups_per_scale=2)),
    "nvae, one group, normal": Shipped((1, 8, 8), nvae_options(groups_per_scale=1)),
}
SHIPPED = VECTORS | IMAGES | PATCHED | NVAES
# Their x is the quantile transport of its noise, and one has flows on its posteriors, so these are no Normals.
QUANTILE_NVAES = {
    "nvae, flows, logistic mixture": Shipped(
        (3, 8, 8), nvae_options(groups_per_scale=2, num_flows=1, decoder="logistic-mixture"), 256
    ),
    "nvae, padding, logistic": Shipped((1, 6, 6), nvae_options(groups_per_scale=2, padding=1, decoder="logistic"), 16),
}
# Enough of them where every one would take long.
FEW = [
    "vector, 1 groups, global scale",
    "vector, 3 groups, local scale",
    "image (1, 8, 8), 3 groups, local scale",
    "image (3, 32, 32), 2 groups, global scale",
]


def strengthen(net: nn.Module, gain: float) -> None:
    """Multiply a net's weights, so that fresh nets give outputs that vary."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Conv2d) and module.log_gain is not None:
                module.log_gain.add_(math.log(gain))
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= gain


@torch.no_grad()
def unsettle(net: nn.Module, seed: int = 0) -> None:
    """Give batch normalisations statistics, gains and biases as after training, for fresh ones do next to nothing."""
    generator = stream(seed, "norms")
    for module in net.modules():
        if isinstance(module, BatchNorm2d):
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 1.5, generator=generator)
            module.weight.normal_(0.0, 1.5, generator=generator)
            module.bias.normal_(0.0, 0.5, generator=generator)


def shipped_vae(name: str, gain: float = 1.5) -> HierarchicalVAE:
    """Make a VAE of float64, the same at every call; an NVAE in evaluation mode."""
    shape, options, levels = (SHIPPED | QUANTILE_NVAES)[name]
    with global_rng(0):
        vae = build_vae(ModelConfig(**options), torch.Size(shape), levels).double()
    strengthen(vae, gain)
    unsettle(vae)
    return vae.eval()


def shipped_vaebm(name: str, gain: float = 1.5) -> VAEBM:
    """Make the product of such a VAE with an energy net, evaluation mode."""
    vae = shipped_vae(name, gain)
    with global_rng(1):
        energy = build_energy(EnergyConfig(width=16, num_fourier=8, channels=4), vae.model.event_shape).double()
    strengthen(energy, 2 * gain)
    return VAEBM(vae, energy)


def sites_of(trace: Trace) -> dict[str, Any]:
    """Return the sites of a trace by name; Pyro's own types say less of them than is known."""
    return dict(trace.nodes)


def draw_noise(vae: HierarchicalVAE, num: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw every noise of a VAE, ``(num, *shape)`` each."""
    generator = stream(seed, "noise")
    return {
        name: torch.randn(num, *shape, generator=generator, dtype=torch.float64)
        for name, shape in vae.noise_shapes.items()
    }


class LinearGenerator(Generator):
    """``z ~ N(0, I)``, ``x ~ N(a z, s^2 I)``, so ``x ~ N(0, (a^2 + s^2) I)``."""

    def __init__(self, a: float, s: float, dim: int) -> None:
        super().__init__()
        self.event_shape = torch.Size([dim])
        self.latent_shapes = {"z_1": torch.Size([dim])}
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        prior = self.first_prior(num)
        z = choose("z_1", prior, prior.loc)
        return {"z_1": z}, z

    def decode(self, state: Tensor) -> Decoded:
        return DecodedNormal(self.a * state, self.s.expand_as(state))


class LinearGuide(RelativeGuide):
    """``q(z | x) = N(slope x, spread^2 I)``."""

    def __init__(self, generator: LinearGenerator, slope: float, spread: float) -> None:
        super().__init__(generator)
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        # The inverse of the soft clamp that the guide applies to a head's output.
        self.raw = nn.Parameter(torch.tensor(5 * math.atanh(math.log(spread) / 5), dtype=torch.float64))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"z_1": x}

    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        return torch.cat([self.slope * features, self.raw.expand_as(features)], dim=1)


A, S = 0.8, 0.5
VARIANCE = A**2 + S**2
"""Of x under the linear model."""
POSTERIOR_SLOPE, POSTERIOR_SPREAD = A / VARIANCE, S / math.sqrt(VARIANCE)


def linear_vae(slope: float = POSTERIOR_SLOPE, spread: float = POSTERIOR_SPREAD, dim: int = 1) -> HierarchicalVAE:
    """Make the linear model, with its exact posterior as guide unless told otherwise."""
    generator = LinearGenerator(A, S, dim)
    return HierarchicalVAE(generator, LinearGuide(generator, slope, spread)).eval()


def log_normal(x: Tensor, mean: float | Tensor, variance: float) -> Tensor:
    """Log density of ``N(mean, variance I)`` at rows, ``(n,)``, written out."""
    return -0.5 * ((x - mean).square() / variance + math.log(2 * math.pi * variance)).sum(-1)


class QuadraticEnergy(Energy):
    """``E = |x - center|^2 / (2 width^2)``; times N(0, v) in one dimension a Gaussian with known normaliser."""

    def __init__(self, center: float, width: float) -> None:
        super().__init__()
        self.center, self.width = center, width

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * ((x - self.center) / self.width).square().flatten(1).sum(1)


class ZeroEnergy(Energy):
    """``E = 0``: the VAE itself."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.0 * x.flatten(1).sum(1)
