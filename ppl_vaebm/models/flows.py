"""NVAE's autoregressive flow on the posterior of a latent group: pure shifts, so volumes stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from ppl_vaebm.models.nvae_cells import Conv2d

FLOW_EXPANSION = 6  # hidden channels per latent channel
MIX_SIZE = 5
OUTPUT_GAIN = 0.1  # of the last layer's initial weight norm, so that a fresh flow moves little


def autoregressive_mask(num_out: int, num_in: int, size: int, is_strict: bool, mirror: bool) -> Tensor:
    """Say which weights of a convolution look at earlier elements only.

    Elements are ordered by pixel in raster order, and within a pixel by channel; where a layer has several channels
    per latent channel, they come in blocks.

    Args:
        num_out: output channels.
        num_in: input channels.
        size: side of the kernel, odd.
        is_strict: leave out the element itself (the first layer); else it is seen too.
        mirror: reverse the order.

    Returns:
        ``(num_out, num_in, size, size)`` of ones and zeros.
    """
    num_latent = min(num_out, num_in)
    row = torch.arange(num_out)[:, None] // (num_out // num_latent)
    column = torch.arange(num_in)[None, :] // (num_in // num_latent)
    centre = size // 2
    mask = torch.zeros(num_out, num_in, size, size)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    mask[:, :, centre, centre] = (column < row if is_strict else column <= row).float()
    return mask.flip((0, 1, 2, 3)) if mirror else mask


class AutoregressiveShift(TransformModule):
    """``z' = z - m(z)``, where every element of m sees earlier elements of z only (Kingma et al. 2016).

    The Jacobian is triangular with a unit diagonal, so the log determinant is 0.

    Args:
        num_latents: channels of the group.
        mirror: reverse the order of the elements.
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)
    bijective = True
    sign = 1

    def __init__(self, num_latents: int, mirror: bool) -> None:
        # The cache spares Pyro the inverse of a value that this transform has just made.
        super().__init__(cache_size=1)
        hidden = FLOW_EXPANSION * num_latents
        first = autoregressive_mask(hidden, num_latents, 3, is_strict=True, mirror=mirror)
        mix = autoregressive_mask(1, 1, MIX_SIZE, is_strict=False, mirror=mirror)
        last = autoregressive_mask(num_latents, hidden, 1, is_strict=False, mirror=mirror)
        plain: dict[str, Any] = {"bias": False, "weight_norm": False}
        self.first = Conv2d(num_latents, hidden, 3, mask=first, **plain)
        self.mix = Conv2d(hidden, hidden, MIX_SIZE, mask=mix, groups=hidden, **plain)
        self.last = Conv2d(hidden, num_latents, 1, mask=last)
        assert self.last.log_gain is not None
        self.last.log_gain.data += math.log(OUTPUT_GAIN)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached pair: it is part of a graph, which cannot be copied."""
        return {**super().__getstate__(), "_cached_x_y": (None, None)}

    def shift(self, z: Tensor) -> Tensor:
        """Compute m, ``(n, num_latents, h, w)`` to the same shape."""
        hidden = functional.elu(self.mix(functional.elu(self.first(z))))
        shift: Tensor = self.last(functional.elu(hidden))
        return shift

    def _call(self, z: Tensor) -> Tensor:
        return z - self.shift(z)

    def _inverse(self, y: Tensor) -> Tensor:
        """Iterate ``z = y + m(z)``: each round settles at least one more element, so it ends at the exact inverse."""
        with torch.no_grad():
            z = _settled(lambda z: y + self.shift(z), y)
        return self._with_gradient(y, z) if torch.is_grad_enabled() else z

    def _with_gradient(self, y: Tensor, z: Tensor) -> Tensor:
        """Give the inverse its gradient: by y and by m's output it is ``(1 - J)^-T grad``, with J that of m at z."""
        point = z.detach().requires_grad_()
        shift = self.shift(point)

        def solved(grad: Tensor) -> Tensor:
            def pulled_back(value: Tensor) -> Tensor:
                return grad + torch.autograd.grad(shift, point, value, retain_graph=True)[0]

            return _settled(pulled_back, grad)

        out: Tensor = y + self.shift(z)
        if out.requires_grad:
            out.register_hook(solved)
        return out

    def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
        """Return zeros, ``(n,)``."""
        return z.new_zeros(z.shape[:-3])


def _settled(update: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Apply an update of triangular structure until nothing changes."""
    value = start
    for _ in range(start[0].numel()):
        value, before = update(value), value
        if torch.equal(value, before):
            break
    return value


def flow(num_latents: int, num_pairs: int) -> nn.ModuleList:
    """Stack pairs of shifts with opposite orders.

    Args:
        num_latents: channels of the group.
        num_pairs: how many.

    Returns:
        The transforms, first to last.
    """
    return nn.ModuleList(AutoregressiveShift(num_latents, mirror) for _ in range(num_pairs) for mirror in (False, True))
