"""Image files, and the integers that a batch of images was made from, for the tests of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppl_vaebm.data.splits import Split
from ppl_vaebm.rng import stream


def noise() -> torch.Generator:
    return stream(0, "noise")


def quantized(y: Tensor, levels: int) -> Tensor:
    return ((y.double() + 1) / 2 * levels).floor().long()


def pixels(split: Split, levels: int = 256) -> Tensor:
    """Every image of a split, as the integers that its batch was made from."""
    return quantized(split.batch(torch.arange(len(split)), noise()), levels)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
