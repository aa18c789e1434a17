"""Rounding of images to whole levels, real and generated ones alike, for metrics.

Samples of a model are real numbers, also beyond the range of pixels, and data have dequantisation noise. Both are
clipped to [-1, 1] and rounded to the level whose cell they lie in, and never rescaled, so that noise smaller than a
level does not count in a distance. The cells are those of :mod:`ppl_vaebm.data.splits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.data.splits import NUM_BYTE_LEVELS, Data
from ppl_vaebm.errors import InputError


def quantised(x: Tensor, levels: int = NUM_BYTE_LEVELS, *, is_dequantized: bool = True) -> Tensor:
    """Round images of any shape to their levels, of which there are at least 2; beyond [-1, 1] they are clipped.

    With ``is_dequantized`` level k stands for the cell ``[2 k / levels - 1, 2 (k + 1) / levels - 1)``, whose centre,
    ``(2 k + 1) / levels - 1``, is returned; else for the value ``2 k / (levels - 1) - 1`` itself, as in binarised
    images. Dequantised data come back to their levels exactly, and a second rounding changes nothing. InputError for a
    pixel that is not finite.
    """
    if not bool(x.isfinite().all()):
        raise InputError(
            f"images to round must be finite, got {int((~x.isfinite()).sum())} pixels that are not; look at the samples"
        )
    if is_dequantized:
        level = ((x + 1) * (levels / 2)).floor().clamp(0, levels - 1)
        return (2 * level + 1) / levels - 1
    level = ((x + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1)
    return 2 * level / (levels - 1) - 1


def quantised_as(x: Tensor, data: Data) -> Tensor:
    """Round images to the levels of a data set; InputError as :func:`quantised`, or if the data are no images."""
    if data.levels is None:
        raise InputError(f"rounding to levels is for images, and data set {data.name} has none; leave it out")
    return quantised(x, data.levels, is_dequantized=data.is_dequantized)


def to_bytes(x: Tensor) -> Tensor:
    """Return ``floor(128 (x + 1))`` clipped to {0, ..., 255}, uint8: for rounded 8-bit images the level itself."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def check_images(real: Tensor, generated: Tensor) -> None:
    """Refuse sets of images ``(n, C, H, W)`` and ``(m, C, H, W)`` that no metric should compare.

    Raises:
        InputError: no images, different shapes, pixels that are not finite or beyond [-1, 1], a set of one constant
            value, or one set in [0, 1] and the other in [-1, 1].
    """
    if real.ndim != 4 or real.shape[1:] != generated.shape[1:] or not (len(real) and len(generated)):
        raise InputError(
            f"real and generated images must be of one shape (n, C, H, W) with n >= 1, got {tuple(real.shape)} and "
            f"{tuple(generated.shape)}; take both from the same data set"
        )
    ranges = {name: _range(images, name) for name, images in (("real", real), ("generated", generated))}
    for (name, (low, _)), (other, (other_low, _)) in (tuple(ranges.items()), tuple(reversed(ranges.items()))):
        # A set without any pixel darker than middle grey, beside one that has black.
        if low >= 0 and other_low < -0.5:
            raise InputError(
                f"{name} and {other} images must have one range, got {name} ones in [0, 1] and {other} ones in "
                f"[-1, 1]; map the {name} ones to [-1, 1] by 2 x - 1"
            )


def _range(images: Tensor, name: str) -> tuple[float, float]:
    low, high = float(images.min()), float(images.max())
    # Written so that NaN fails it.
    if not (low >= -1 and high <= 1):
        raise InputError(
            f"{name} images must lie in [-1, 1], got pixels in [{low:.4g}, {high:.4g}]; "
            "bring them there with ppl_vaebm.data.pixels.quantised"
        )
    if low == high:
        raise InputError(
            f"{name} images must not all be one constant, got {low:.4g} at every pixel; look at the samples"
        )
    return low, high
