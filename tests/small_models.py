"""Small models for the tests of models and inference: one of every kind that ships, and one whose answers are known."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig, ModelConfig
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.small_vae import build_vae
from ppl_vaebm.models.vae import Choose, Generator, Guide, HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, stream


class Shipped(NamedTuple):
    """A shape of data and the options of a VAE for it."""

    event_shape: tuple[int, ...]
    options: dict[str, Any]


VECTORS = {
    f"vector, {len(latents)} groups, {x_scale} scale, {num_fourier} features": Shipped(
        (2,), {"latents": latents, "x_scale": x_scale, "num_fourier": num_fourier, "width": 16, "depth": 2}
    )
    for latents in [(2,), (2, 3), (2, 3, 1)]
    for x_scale in ("global", "local")
    for num_fourier in (0, 8)
}
IMAGES = {
    f"image {shape}, {len(latents)} groups, {x_scale} scale": Shipped(
        shape, {"latents": latents, "x_scale": x_scale, "channels": 4}
    )
    for shape in [(1, 8, 8), (3, 32, 32)]
    for latents in [(5,), (5, 2), (5, 2, 1)]
    for x_scale in ("global", "local")
}
SHIPPED = VECTORS | IMAGES
# Enough of them where every one would take long.
FEW = [
    "vector, 1 groups, global scale, 0 features",
    "vector, 3 groups, local scale, 8 features",
    "image (1, 8, 8), 3 groups, local scale",
    "image (3, 32, 32), 2 groups, global scale",
]


def strengthen(net: nn.Module, gain: float) -> None:
    """Multiply a net's weights, so that fresh nets give outputs that vary."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= gain


def shipped_vae(name: str, gain: float = 1.5) -> HierarchicalVAE:
    """Make a VAE of float64, the same at every call."""
    shape, options = SHIPPED[name]
    with global_rng(0):
        vae = build_vae(ModelConfig(**options), torch.Size(shape)).double()
    strengthen(vae, gain)
    return vae


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
        loc, scale = self._reference("z_1", num)
        z = choose("z_1", loc, scale, loc)
        return {"z_1": z}, z

    def decode(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.a * state, self.s.expand_as(state)


class LinearGuide(Guide):
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
