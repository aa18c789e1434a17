"""Which residual blocks an image energy has, and the blocks, which keep the rows of a batch independent.

Mean-pooling is linear and the same for all channels, so it may come before a 1x1 convolution instead of after it, and
into the weights of a 3x3 one. Both save work and change nothing but the rounding (``benchmarks/light_energy.py``).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.layers import LipSwish, check_side, num_halvings
from ppl_vaebm.models.nvae_cells import DEPTHWISE_SIZE, MEMORY_FORMAT, Conv2d


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


class PooledConv2d(Conv2d):
    """A 3x3 convolution and then the mean over squares of 2x2 pixels, as one strided convolution.

    That is the mean of the kernel's four shifts, 4x4 with stride 2: 16 products per output where there were 36. The
    weight norm is that of the 3x3 kernel.
    """

    def __init__(self, num_in: int, num_out: int, *, weight_norm: bool) -> None:
        super().__init__(num_in, num_out, 3, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, 2h, 2w)`` to ``(n, out, h, w)``."""
        shifts = functional.avg_pool2d(functional.pad(self.effective_weight(), (1, 1, 1, 1)), 2, stride=1)
        return functional.conv2d(x, shifts.to(memory_format=MEMORY_FORMAT), self.bias, stride=2, padding=1)


class EnergyBlock(nn.Module):
    """``LipSwish(pool(skip(x) + second(LipSwish(first(x)))))`` (Xiao et al. 2021, appendix).

    The branch halves the grid by itself where ``is_down``; the skip takes the mean over squares of 2x2 pixels then.
    """

    def __init__(self, first: nn.Module, second: nn.Module, skip: nn.Module, is_down: bool) -> None:
        super().__init__()
        self.first, self.second, self.skip = first, second, skip
        self.activation = LipSwish()
        self.is_down = is_down

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, s, s)`` to ``(n, out, s', s')`` with s' = s, or s/2 where the block is down."""
        branch = self.second(self.activation(self.first(x)))
        out: Tensor = self.activation(self.skip(functional.avg_pool2d(x, 2) if self.is_down else x) + branch)
        return out


def build_block(config: EnergyConfig, shape: BlockShape) -> EnergyBlock:
    """Make a block.

    The standard one has two 3x3 convolutions. The light one has a single depthwise 5x5, as wide as the two together,
    and two 1x1, and its stride takes the place of the mean; at equal width it has a seventh of the weights. The skip is
    an identity only where neither channels nor grid change.
    """
    num_in, num_out, is_down = shape
    conv = partial(Conv2d, weight_norm=config.weight_norm)
    if config.block == "depthwise":
        # Without a bias, which would do the same as the next one.
        depthwise = conv(num_in, num_in, DEPTHWISE_SIZE, groups=num_in, stride=2 if is_down else 1, bias=False)
        first: nn.Module = nn.Sequential(depthwise, conv(num_in, num_out, 1))
        second: nn.Module = conv(num_out, num_out, 1)
    else:
        first = conv(num_in, num_out, 3)
        pooled = partial(PooledConv2d, weight_norm=config.weight_norm)
        second = pooled(num_out, num_out) if is_down else conv(num_out, num_out, 3)
    skip = conv(num_in, num_out, 1, bias=False) if is_down or num_in != num_out else nn.Identity()
    return EnergyBlock(first, second, skip, is_down)
