"""Decoding of image files to one form."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.config import DataConfig
from ppl_vaebm.errors import InputError

VALIDATION_SHARE = 0.1
OWN_SIZES = {"celeba": 64, "celeba-hq": 256, "lsun-church": 64}
"""Sides that the published models resize these colour sets to."""

GREY_MODES = ("1", "L", "LA")
"""Pillow's modes without colour."""
_COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


class ImageForm(NamedTuple):
    """What a decoded image is brought to."""

    channels: int
    size: int
    """Side after the resize, in pixels."""
    padding: int = 0
    """Black pixels added on each side before it."""
    num_bits: int = 8
    """Bits kept of each channel's 8."""
    crop: tuple[slice, slice] = (slice(None), slice(None))
    """Rows and columns to keep, before everything else."""
    is_square: bool = True
    """Whether the middle square is cut out; else only the shorter side has ``size`` pixels in the end."""


class UnreadableImage(InputError):
    """An image that cannot be decoded, because it is none or is cut short."""

    def __init__(self, name: str, error: Exception) -> None:
        """Name the image, and the reason that the decoder gave."""
        self.name, self.reason = name, " ".join(str(error).split())
        super().__init__(f"the image {name} cannot be read ({self.reason}); remove or replace it")


def decode(file: Path | io.BytesIO, form: ImageForm, name: str | None = None) -> Tensor:
    """Read one image as ``(C, size, size)`` if the form is square, uint8, in {0, ..., 2**num_bits - 1}.

    Palettes and CMYK become RGB. Transparent pixels are blended with black, which is also the level of padding. An
    image smaller than the form is enlarged. ``name`` stands in messages instead of the file's.

    Raises:
        InputError: it cannot be read, or has more than 8 bits per channel.
    """
    from PIL import Image

    name = name or str(file)
    try:
        with Image.open(file) as image:
            _check_mode(image.mode, name)
            opaque: Image.Image = image
            if image.has_transparency_data:
                opaque = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            pixels = torch.from_numpy(np.array(opaque.convert("L" if form.channels == 1 else "RGB")))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(name, error) from error
    pixels = (pixels.unsqueeze(0) if form.channels == 1 else pixels.permute(2, 0, 1))[(..., *form.crop)]
    if form.is_square:
        # Before the resize, which could not hold a long narrow strip.
        height, width = pixels.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    if form.padding:
        pixels = functional.pad(pixels, (form.padding,) * 4)
    if min(pixels.shape[-2:]) != form.size:
        from torchvision.transforms.v2 import functional as transforms

        pixels = transforms.resize(pixels, [form.size], antialias=True)
    return pixels if form.num_bits == 8 else pixels >> (8 - form.num_bits)


def header(file: Path) -> tuple[str, tuple[int, int]]:
    """Return Pillow's mode and ``(width, height)`` of an image file without decoding it.

    Raises:
        InputError: it cannot be read, or has more than 8 bits per channel.
    """
    from PIL import Image

    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("not a file, or a link to none")
        with Image.open(file) as image:
            mode, size = image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(file), error) from error
    _check_mode(mode, str(file))
    return mode, size


def _check_mode(mode: str, name: str) -> None:
    """Refuse what Pillow would convert with silent loss."""
    if mode not in GREY_MODES + _COLOUR_MODES:
        raise InputError(
            f"the image {name} has pixels of mode {mode}, expected grey or colour of 8 bits per channel; convert it"
        )


# --- options of every such set -------------------------------------------------------------------


def root_folder(config: DataConfig) -> Path:
    """Return the absolute folder of a data set's files."""
    return Path(config.root).expanduser().absolute()


def has_flips(config: DataConfig, own: bool) -> bool:
    """Return whether training images are mirrored; ``own`` is the choice of the data set for ``auto``."""
    return {"auto": own, "random": True, "never": False}[config.flips]


def num_train(config: DataConfig, size: int) -> int:
    """Return how many of ``size`` training images are not held out for validation; InputError if none is left."""
    num = int(VALIDATION_SHARE * size) if config.num_validation is None else config.num_validation
    if num >= size:
        raise InputError(
            f"data set {config.name} has {size} training images, expected more than the {num} that "
            "--data.num-validation holds out; lower it"
        )
    return size - num
