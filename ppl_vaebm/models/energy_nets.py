"""The residual blocks of image energies, without normalisation, so that rows of a batch stay independent.

Mean-pooling is linear and the same for all channels, so it may come before a 1x1 convolution instead of after it, and
into the weights of a 3x3 one. Both save work and change nothing but the rounding (``benchmarks/light_energy.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.models.energy_layouts import BlockShape
from ppl_vaebm.models.layers import LipSwish
from ppl_vaebm.models.nvae_cells import DEPTHWISE_SIZE, MEMORY_FORMAT, Conv2d


class PooledConv2d(Conv2d):
    """A 3x3 convolution and then the mean over squares of 2x2 pixels, as one strided convolution.

    That is the mean of the kernel's four shifts, 4x4 with stride 2: 16 products per output where there were 36.

    Args:
        num_in: input channels.
        num_out: output channels.
        weight_norm: as in :class:`~ppl_vaebm.models.nvae_cells.Conv2d`, of the 3x3 kernel.
    """

    def __init__(self, num_in: int, num_out: int, *, weight_norm: bool) -> None:
        super().__init__(num_in, num_out, 3, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, 2h, 2w)`` to ``(n, out, h, w)``."""
        shifts = functional.avg_pool2d(functional.pad(self.effective_weight(), (1, 1, 1, 1)), 2, stride=1)
        return functional.conv2d(x, shifts.to(memory_format=MEMORY_FORMAT), self.bias, stride=2, padding=1)


class EnergyBlock(nn.Module):
    """``LipSwish(pool(skip(x) + second(LipSwish(first(x)))))`` (Xiao et al. 2021, appendix).

    Args:
        first: the branch before its activation.
        second: the branch after it; what halves the grid, if the block does, is in the branch.
        skip: the way past the branch, pixel by pixel.
        is_down: whether the block takes the mean over squares of 2x2 pixels.
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
    and two 1x1, and its stride takes the place of the mean; at equal width it has a seventh of the weights.

    Args:
        config: kind of block, and weight normalisation.
        shape: its sizes.

    Returns:
        The block; the skip is an identity only where neither channels nor grid change.
    """
    num_in, num_out, is_down = shape
    normed: dict[str, Any] = {"weight_norm": config.weight_norm}
    if config.block == "depthwise":
        # Without a bias, which would do the same as the next one.
        stride = 2 if is_down else 1
        depthwise = Conv2d(num_in, num_in, DEPTHWISE_SIZE, groups=num_in, stride=stride, bias=False, **normed)
        first: nn.Module = nn.Sequential(depthwise, Conv2d(num_in, num_out, 1, **normed))
        second: nn.Module = Conv2d(num_out, num_out, 1, **normed)
    else:
        first = Conv2d(num_in, num_out, 3, **normed)
        second = PooledConv2d(num_out, num_out, **normed) if is_down else Conv2d(num_out, num_out, 3, **normed)
    is_linear = is_down or num_in != num_out
    skip = Conv2d(num_in, num_out, 1, bias=False, **normed) if is_linear else nn.Identity()
    return EnergyBlock(first, second, skip, is_down)
