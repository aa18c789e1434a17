"""A random VAEBM of images, for benchmarks in noise spaces of any size: no training, no checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import global_rng

ENERGY_SD_NATS = 3.0


class Sizes(NamedTuple):
    """What decides the dimension of noise space."""

    groups: tuple[tuple[int, int], ...]
    """Latent groups as (channels, side), top first."""
    x_channels: int = 3
    x_side: int = 32
    channels: int = 12
    """Width of the decoder."""


class RandomVAEBM(nn.Module):
    """Latent groups on growing grids, each normal given those before, then x given all, and its energy.

    The energy's standard deviation under N(0, I) is :data:`ENERGY_SD_NATS` at every size.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        groups, channels, self.sizes = sizes.groups, sizes.channels, sizes
        shapes = {f"z{i}": torch.Size([depth, side, side]) for i, (depth, side) in enumerate(groups)}
        self.packing = Packing(shapes | {"x": torch.Size([sizes.x_channels, sizes.x_side, sizes.x_side])})
        self.start = nn.Parameter(torch.randn(1, channels, groups[0][1], groups[0][1]))
        self.priors = nn.ModuleList(nn.Conv2d(channels, 2 * depth, 1) for depth, _ in groups)
        self.embeddings = nn.ModuleList(nn.Conv2d(depth, channels, 3, padding=1) for depth, _ in groups)
        self.cells = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in groups)
        self.decoder = nn.Conv2d(channels, 2 * sizes.x_channels, 3, padding=1)
        widths = (sizes.x_channels, 16, 32, 32)
        self.energy = nn.ModuleList(
            nn.Conv2d(one, other, 3, stride=2, padding=1) for one, other in zip(widths, widths[1:], strict=False)
        )
        # Three layers halve the side, and what is left of an odd one counts.
        self.readout = nn.Linear(widths[-1] * math.ceil(sizes.x_side / 8) ** 2, 1)
        self.requires_grad_(False)
        self.mean, self.scale = 0.0, 1.0
        energies = self(torch.randn(512, self.packing.dim))
        self.mean, self.scale = float(energies.mean()), ENERGY_SD_NATS / float(energies.std())

    def transport(self, position: Tensor) -> Tensor:
        """Decode noise ``(C, D)`` to x ``(C, channels, side, side)``."""
        *noises, x_noise = self.packing.unravel(position).values()
        state: Tensor = self.start
        for noise, prior, embedding, cell in zip(noises, self.priors, self.embeddings, self.cells, strict=True):
            state = functional.interpolate(state, size=noise.shape[-1])
            mean, log_scale = prior(state).chunk(2, dim=1)
            latent = mean + _scale(log_scale) * noise
            state = state + cell(functional.silu(state + embedding(latent)))
        state = functional.interpolate(state, size=self.sizes.x_side)
        mean, log_scale = self.decoder(functional.silu(state)).chunk(2, dim=1)
        x: Tensor = mean + _scale(log_scale) * x_noise
        return x

    def forward(self, position: Tensor) -> Tensor:
        """Evaluate Phi: ``(C, D)`` to ``(C,)``, nats."""
        features = self.transport(position)
        for layer in self.energy:
            features = functional.silu(layer(features))
        energy: Tensor = self.readout(features.flatten(1)).squeeze(1)
        return (energy - self.mean) * self.scale


def random_vaebm(sizes: Sizes, seed: int = 0) -> RandomVAEBM:
    """Make the model of given sizes and seed, in float32."""
    with global_rng(seed):
        return RandomVAEBM(sizes)


def _scale(log_scale: Tensor) -> Tensor:
    # Bounded, or a chain of exponentials could outgrow |q|^2 / 2 and the target would not be proper.
    return log_scale.tanh().exp()
