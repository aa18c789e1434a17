"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data import archives, toys
from ppl_vaebm.data.splits import Data, Smoothed
from ppl_vaebm.errors import InputError

__all__ = ["Data", "DataForm", "form_without_files", "load_data"]


def load_data(config: DataConfig, seed: int) -> Data:
    """Load or draw a data set; only ``gaussians25`` depends on the seed of the run.

    Raises:
        InputError: files or a package are missing, or an option does not fit the data set.
    """
    _refuse_unused(config)
    if config.name == "gaussians25":
        return toys.load_gaussians25(config, seed)
    data = _IMAGE_SETS[config.name](config)
    if not config.noise_sd:
        return data
    train, validation, test = (Smoothed(part, config.noise_sd) for part in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test, noise_sd=config.noise_sd)


class DataForm(NamedTuple):
    """What models need to know of a data set; the fields are those of :class:`Data`."""

    event_shape: torch.Size
    levels: int | None
    is_dequantized: bool


def form_without_files(config: DataConfig) -> DataForm | None:
    """Return the form of a data set without loading it; ``None`` for an image folder, whose files decide.

    Raises:
        InputError: an option does not fit the data set.
    """
    _refuse_unused(config)
    if config.name == "gaussians25":
        return DataForm(torch.Size([2]), None, False)
    if config.name == "digits":
        return DataForm(torch.Size([1, toys.DIGIT_SIDE, toys.DIGIT_SIDE]), toys.NUM_DIGIT_LEVELS, True)
    shape = archives.shape_without_files(config)
    return None if shape is None else DataForm(shape, 2 if config.binarize else 2**config.num_bits, not config.binarize)


_IMAGE_SETS: dict[str, Callable[[DataConfig], Data]] = {"digits": toys.load_digits, **archives.LOADERS}
_BYTE_SETS = tuple(archives.LOADERS)
_APPLIES_TO = {
    "image_size": _BYTE_SETS,
    "padding": _BYTE_SETS,
    "num_bits": _BYTE_SETS,
    "noise_sd": ("digits", *_BYTE_SETS),
    "flips": _BYTE_SETS,
    "binarize": archives.BINARIZABLE,
    "num_validation": archives.DIVISIBLE,
    "skip_unreadable": archives.FOLDERS,
}


def _refuse_unused(config: DataConfig) -> None:
    """Refuse an option that would have no effect."""
    for option, names in _APPLIES_TO.items():
        value = getattr(config, option)
        if value != getattr(DataConfig, option) and config.name not in names:
            raise InputError(
                f"--data.{option.replace('_', '-')} is for {', '.join(names)}, got {value} for {config.name}; "
                "leave it out"
            )
