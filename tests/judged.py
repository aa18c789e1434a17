"""Image runs without training, and a network whose features are pixels, for the tests of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config, KernelConfig, ModelConfig, SamplingConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, image_data
from ppl_vaebm.evaluation.metrics.features_base import Outputs
from ppl_vaebm.evaluation.sections import Rows, Section
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run

LEVELS = 17
SIDE = 8


class PixelNet(nn.Module):
    """The first pixels of an image as features, and three classes by its brightness."""

    name = "pixels"

    def __init__(self, num_features: int = 6) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def outputs(self, x: Tensor) -> Outputs:
        brightness = x.flatten(1).mean(1, keepdim=True)
        return Outputs(
            x.flatten(1)[:, : self.num_features] * self.scale,
            20 * torch.cat([brightness, -brightness, 0 * brightness], 1),
        )


class Brightness(Energy):
    """``E = factor * mean pixel``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return self.factor * x.flatten(1).mean(1)


def columns_of(sections: Sequence[Section], title: str) -> dict[str, Rows]:
    """Return the columns of the only section of a title."""
    (section,) = (section for section in sections if section.title == title)
    return section.columns


def image_levels(num: int, low: int = 0, high: int = LEVELS, name: str = "images") -> Tensor:
    """Draw images of independent uniform levels in {low, ..., high - 1}."""
    shape = (num, 1, SIDE, SIDE)
    return torch.randint(low, high, shape, generator=stream(0, name), dtype=torch.uint8)


def level_data(train: Tensor, test: Tensor, name: str = "levels") -> Data:
    splits = [IntegerImages(images, None, LEVELS) for images in (train, test, test)]
    return image_data(name, train.shape[1:], splits)


def image_run(folder: Path, data: Data, energy: Energy | None = None) -> LoadedRun:
    """Make a run of a small VAE, not trained, times an energy; E = 0 unless told otherwise."""
    model = ModelConfig(latents=(2,), channels=2, x_scale="local", init_x_scale=0.3)
    config = Config(model=model, sampling=SamplingConfig(KernelConfig("mala", step_size=0.3), num_steps=2))
    with global_rng(0):
        vae = new_vae(config, data).eval()
    vaebm = VAEBM(vae, Brightness(0.0) if energy is None else energy)
    vaebm.requires_grad_(False)
    return LoadedRun(Run(folder), config, data, vaebm, noise_potential(vaebm))
