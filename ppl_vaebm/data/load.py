"""Data sets by name, and the order in which training sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data import archives as image_sets
from ppl_vaebm.data.splits import (
    Data,
    IntegerImages,
    LazyImages,
    Points,
    Smoothed,
    Split,
    dequantize,
    image_data,
    random_subset,
    without_augmentation,
    without_noise,
)
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import seed_for, stream

__all__ = [
    "Data",
    "DataForm",
    "IntegerImages",
    "KeyedSampler",
    "LazyImages",
    "Points",
    "Split",
    "dequantize",
    "form_without_files",
    "gaussians25_log_prob",
    "gaussians25_modes",
    "load_data",
    "random_subset",
    "without_augmentation",
    "without_noise",
]

DIGIT_SIDE = 8
NUM_DIGIT_LEVELS = 17  # sklearn's digits count the dark ones of 4x4 binary pixels: 0 to 16
# Beyond 10 standard deviations the neighbours of a mode change its log density by less than 1e-5 nats on average.
MIN_SEPARATION = 10.0


def load_data(config: DataConfig, seed: int) -> Data:
    """Load or draw a data set.

    Args:
        config: which one, and where it lies.
        seed: the run's seed. Only ``gaussians25`` depends on it; every other split is the same in all runs.

    Returns:
        The data set.

    Raises:
        InputError: files or a package are missing, or an option does not fit the data set.
    """
    _refuse_unused(config)
    if config.name == "gaussians25":
        return _gaussians25(config, seed)
    data = _IMAGE_SETS[config.name](config)
    if not config.noise_sd:
        return data
    train, validation, test = (Smoothed(part, config.noise_sd) for part in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test, noise_sd=config.noise_sd)


class DataForm(NamedTuple):
    """What models have to know of a data set; each is what :class:`Data` says of it."""

    event_shape: torch.Size
    levels: int | None
    is_dequantized: bool


def form_without_files(config: DataConfig) -> DataForm | None:
    """Tell the form of a data set without loading it.

    Args:
        config: which one; its files need not be there.

    Returns:
        The form; ``None`` for an image folder, whose files decide.

    Raises:
        InputError: an option does not fit the data set.
    """
    _refuse_unused(config)
    if config.name == "gaussians25":
        return DataForm(torch.Size([2]), None, False)
    if config.name == "digits":
        return DataForm(torch.Size([1, DIGIT_SIDE, DIGIT_SIDE]), NUM_DIGIT_LEVELS, True)
    shape = image_sets.shape_without_files(config)
    if shape is None:
        return None
    return DataForm(shape, 2 if config.binarize else 2**config.num_bits, not config.binarize)


_BYTE_SETS = tuple(image_sets.LOADERS)
_APPLIES_TO = {
    "image_size": _BYTE_SETS,
    "padding": _BYTE_SETS,
    "num_bits": _BYTE_SETS,
    "noise_sd": ("digits", *_BYTE_SETS),
    "flips": _BYTE_SETS,
    "binarize": image_sets.BINARIZABLE,
    "num_validation": image_sets.DIVISIBLE,
    "skip_unreadable": image_sets.FOLDERS,
}


def _refuse_unused(config: DataConfig) -> None:
    """Refuse an option that would do nothing."""
    for option, names in _APPLIES_TO.items():
        value = getattr(config, option)
        if value != getattr(DataConfig, option) and config.name not in names:
            raise InputError(
                f"--data.{option.replace('_', '-')} is for {', '.join(names)}, got {value} for {config.name}; "
                "leave it out"
            )


# --- gaussians25 ---------------------------------------------------------------------------------


def gaussians25_modes(spacing: float) -> Tensor:
    """Return the centres of the 5 x 5 grid around 0, ``(25, 2)``, float32.

    Args:
        spacing: distance of neighbours.
    """
    axis = spacing * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(axis, axis)


def gaussians25_log_prob(x: Tensor, spacing: float, std: float) -> Tensor:
    """Evaluate the exact log density of the mixture of 25 Gaussians.

    Args:
        x: points, ``(n, 2)``.
        spacing: distance of neighbouring modes.
        std: standard deviation of each mode, along both axes.

    Returns:
        ``(n,)``, float64, nats.
    """
    modes = gaussians25_modes(spacing).to(x.device)
    squares = (x.double().unsqueeze(-2) - modes.double()).square().sum(-1)
    return (-0.5 * squares / std**2).logsumexp(-1) - math.log(25 * 2 * math.pi * std**2)


def _gaussians25(config: DataConfig, seed: int) -> Data:
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


# --- digits --------------------------------------------------------------------------------------


def _digits(config: DataConfig) -> Data:
    """Load sklearn's 1,797 digits: 1,260 train, 140 validation, 397 test, by a permutation fixed for good."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError(
            "data set digits needs the package scikit-learn; install it with pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    # Ordering by a hash, not by a generator, keeps the split the same in every version of torch.
    order = torch.tensor(sorted(range(len(images)), key=lambda index: seed_for(0, "digits", index)))

    def part(indices: Tensor) -> IntegerImages:
        return IntegerImages(images[indices], labels[indices], NUM_DIGIT_LEVELS)

    return image_data("digits", images.shape[1:], [part(order[:1260]), part(order[1260:1400]), part(order[1400:])])


_IMAGE_SETS: dict[str, Callable[[DataConfig], Data]] = {"digits": _digits, **image_sets.LOADERS}


# --- order ---------------------------------------------------------------------------------------


class KeyedSampler:
    """Order of the data as a function of seed and step, so that a resumed run needs no stored position.

    An epoch is one permutation, drawn from the stream of (seed, epoch); each step takes the next
    ``batch_size * world`` elements of it, and rank r the r-th ``batch_size`` of those. What does not fill a
    step is left out of that epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """Fix the order.

        Args:
            size: elements of the split.
            batch_size: elements per rank and step.
            seed: the run's seed.
            rank: which process this is, in {0, ..., world - 1}.
            world: number of processes.

        Raises:
            InputError: one step would need more elements than there are.
        """
        if not 1 <= batch_size * world <= size:
            raise InputError(
                f"a step needs batch size x processes = {batch_size} x {world} elements between 1 and the {size} "
                "of the training split; change the batch size"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = size // (batch_size * world)
        self._size, self._seed, self._rank, self._world = size, seed, rank, world
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Return the elements of one step, ``(batch_size,)``, int64.

        Args:
            step: from 0, over all epochs.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self._size, generator=stream(self._seed, "order", epoch))
            self._epoch = epoch
        start = (position * self._world + self._rank) * self.batch_size
        return self._order[start : start + self.batch_size]
