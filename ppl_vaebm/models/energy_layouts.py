"""Which residual blocks an image energy has: the published lists, and one that halves the grid in every block."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.layers import check_side, num_halvings


class BlockShape(NamedTuple):
    """Sizes of a residual block."""

    num_in: int
    """Channels in."""
    num_out: int
    """Channels out."""
    is_down: bool
    """Whether the grid is halved."""


class Layout(NamedTuple):
    """Sizes of an image energy."""

    padding: tuple[int, int]
    """Black pixels before the image and behind it, on either axis."""
    stem_stride: int
    """1, or 2 to halve the grid in the stem."""
    blocks: tuple[BlockShape, ...]
    """From the stem to the head; the first takes the stem's channels."""
    sides: tuple[int, ...]
    """Side of the grid that each block takes, in pixels."""


class _Published(NamedTuple):
    side: int
    blocks: tuple[tuple[int, bool], ...]
    """Channels out, in multiples of the stem's, and whether the grid is halved."""


DOWN, SAME = True, False
# The lists of the code of VAEBM (Xiao et al. 2021); they say which grid is the last one: 4x4, for MNIST 8x8.
PUBLISHED = {
    "cifar10": _Published(32, ((1, DOWN), (1, SAME), (2, DOWN), (2, SAME), (2, DOWN), (2, SAME))),
    "celeba64": _Published(
        64, ((1, DOWN), (1, SAME), (2, DOWN), (2, SAME), (2, DOWN), (4, SAME), (4, DOWN), (4, SAME))
    ),
    "lsun-church64": _Published(
        64,
        (
            *((1, DOWN), (1, SAME), (2, DOWN), (2, SAME), (2, SAME)),
            *((2, DOWN), (4, SAME), (4, SAME), (4, DOWN), (4, SAME)),
        ),
    ),
    "celebahq256": _Published(
        256,
        (
            *((1, DOWN), (1, SAME), (2, DOWN), (2, SAME), (2, DOWN), (2, SAME)),
            *((4, DOWN), (4, SAME), (4, DOWN), (4, SAME), (8, DOWN), (8, SAME)),
        ),
    ),
    "mnist": _Published(32, ((1, DOWN), (1, SAME), (2, DOWN), (2, SAME))),
}


def build_layout(config: EnergyConfig, event_shape: torch.Size) -> Layout:
    """Work out the sizes of an image energy.

    Args:
        config: layout, channels and stride of the stem.
        event_shape: ``(channels, side, side)`` of the images.

    Returns:
        The sizes.

    Raises:
        InputError: images that the layout is not for.
    """
    if config.layout == "halving":
        return _halving(config, event_shape)
    published = PUBLISHED[config.layout]
    side = published.side
    if event_shape[-2:] != (side, side):
        last = side >> sum(is_down for _, is_down in published.blocks)
        raise InputError(
            f"expected images of {side} x {side} pixels for energy.layout {config.layout}, whose last grid is "
            f"{last} x {last}, found shape {tuple(event_shape)}: set data.image-size or data.padding, or "
            "energy.layout halving"
        )
    return _layout(config.channels, side, (0, 0), 1, published.blocks)


def _halving(config: EnergyConfig, event_shape: torch.Size) -> Layout:
    """Halve the grid and double the channels in every block, until 2 to 4 pixels are left."""
    side, num_downs = event_shape[-1], num_halvings(event_shape[-1])
    # Black on all sides, so that the grid can be halved that often.
    missing = -side % (1 << num_downs)
    check_side(torch.Size([*event_shape[:-2], *(each + missing for each in event_shape[-2:])]), num_downs)
    num_blocks = num_downs - (config.stem_stride == 2)
    if not num_blocks:
        raise InputError(
            f"expected images of at least 6 pixels a side for energy.stem-stride 2, found shape {tuple(event_shape)}: "
            "leave it at 1"
        )
    blocks = tuple((2 << index, DOWN) for index in range(num_blocks))
    padding = (missing // 2, missing - missing // 2)
    return _layout(config.channels, side + missing, padding, config.stem_stride, blocks)


def _layout(
    channels: int, side: int, padding: tuple[int, int], stem_stride: int, blocks: tuple[tuple[int, bool], ...]
) -> Layout:
    shapes: list[BlockShape] = []
    sides = [side // stem_stride]
    for multiple, is_down in blocks:
        num_in = shapes[-1].num_out if shapes else channels
        shapes.append(BlockShape(num_in, multiple * channels, is_down))
        sides.append(sides[-1] // 2 if is_down else sides[-1])
    return Layout(padding, stem_stride, tuple(shapes), tuple(sides[:-1]))
