"""Data sets that need no files: 25 Gaussians in the plane, and the digits of scikit-learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data.splits import Data, IntegerImages, Points, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import seed_for, stream

DIGIT_SIDE = 8
NUM_DIGIT_LEVELS = 17  # sklearn's digits count the dark ones of 4x4 binary pixels: 0 to 16
# Beyond 10 standard deviations the neighbours of a mode change its log density by less than 1e-5 nats on average.
MIN_SEPARATION = 10.0


def gaussians25_modes(spacing: float) -> Tensor:
    """Return the centres of a 5 x 5 grid around 0 with this distance between neighbours, ``(25, 2)``, float32."""
    axis = spacing * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(axis, axis)


def gaussians25_log_prob(x: Tensor, spacing: float, std: float) -> Tensor:
    """Return the exact log density of the mixture at points ``(n, 2)``: ``(n,)``, float64, nats.

    Neighbouring modes are ``spacing`` apart, and each has the standard deviation ``std`` along both axes.
    """
    modes = gaussians25_modes(spacing).to(x.device)
    squares = (x.double().unsqueeze(-2) - modes.double()).square().sum(-1)
    return (-0.5 * squares / std**2).logsumexp(-1) - math.log(25 * 2 * math.pi * std**2)


def load_gaussians25(config: DataConfig, seed: int) -> Data:
    """Draw the points of a mixture of 25 Gaussians of equal weight: a fifth as many for validation and for test."""
    modes = gaussians25_modes(config.spacing)

    def draw(split: str, num_points: int) -> Points:
        generator = stream(seed, "data", split)
        centres = modes[torch.randint(len(modes), (num_points,), generator=generator)]
        return Points(centres + config.std * torch.randn(num_points, 2, generator=generator))

    is_separated = config.spacing >= MIN_SEPARATION * config.std
    return Data(
        "gaussians25",
        torch.Size([2]),
        draw("train", config.num_points),
        draw("validation", config.num_points // 5),
        draw("test", config.num_points // 5),
        modes=modes,
        mode_std=config.std,
        is_dequantized=False,
        max_log_density_nats=-math.log(25 * 2 * math.pi * config.std**2) - 1 if is_separated else None,
    )


def load_digits(config: DataConfig) -> Data:
    """Load sklearn's 1,797 digits: 1,260 train, 140 validation, 397 test, by a fixed permutation."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            "data set digits needs the package scikit-learn; install it with pip install scikit-learn"
        ) from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    # Ordering by a hash, not by a generator, keeps the split the same in every version of torch.
    order = torch.tensor(sorted(range(len(images)), key=lambda index: seed_for(0, "digits", index)))

    def part(indices: Tensor) -> IntegerImages:
        return IntegerImages(images[indices], labels[indices], NUM_DIGIT_LEVELS)

    return image_data("digits", images.shape[1:], [part(order[:1260]), part(order[1260:1400]), part(order[1400:])])
