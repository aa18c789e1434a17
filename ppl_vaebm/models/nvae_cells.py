"""NVAE's building blocks (Vahdat and Kautz 2020, section 3.1): convolutions, normalisation, residual cells."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.devices import current_process

RESIDUAL_SCALE = 0.1  # of every cell's branch, so that a deep tower starts near the identity
NORM_MOMENTUM = 0.05  # weight of a new batch in the running statistics
NORM_EPSILON = 1e-5
MIN_EXCITE_WIDTH = 4
EXCITE_REDUCTION = 16
TOWER_EXPANSION = 6  # hidden channels per channel of a decoder cell in the tower
POST_EXPANSION = 3  # and in the blocks after it
DEPTHWISE_SIZE = 5
WEIGHT_EPSILON = 1e-5
INIT_GAIN_EPSILON = 1e-2
# Memory format of the convolutions. On a CPU, depthwise ones have a slow backward pass in other formats
# (benchmarks/pyro_overhead.py).
MEMORY_FORMAT = torch.channels_last


class Conv2d(nn.Conv2d):
    """A convolution whose weight is ``exp(log_gain) * v / |v|``, one gain and one norm per output channel.

    Weight normalisation (Salimans and Kingma 2016) as in NVAE: the norm is over inputs and kernel, and the gain starts
    at the norm of PyTorch's initial weights. The kernel's side ``size`` is odd; padding keeps the grid.

    Args:
        weight_norm: whether the weight is normalised; if not, it is v.
        mask: factor on v, broadcastable to ``(out, in / groups, k, k)``.
        options: of :class:`torch.nn.Conv2d`.
    """

    mask: Tensor | None
    folded: Tensor | None = None
    """Weight that :func:`fold_weight_norm` stored; in no state, and dropped where the parameters may change."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        size: int,
        *,
        weight_norm: bool = True,
        mask: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_in, num_out, size, padding=size // 2, **options)
        # Not in checkpoints, because it follows from the sizes.
        self.register_buffer("mask", mask, persistent=False)
        norm = self.direction().detach().flatten(1).norm(dim=1)
        self.log_gain = nn.Parameter((norm + INIT_GAIN_EPSILON).log()) if weight_norm else None

    def direction(self) -> Tensor:
        """Return v, ``(out, in / groups, k, k)``."""
        return self.weight if self.mask is None else self.weight * self.mask

    def effective_weight(self) -> Tensor:
        """Return the weight that the convolution uses, of the same shape."""
        if self.log_gain is None:
            return self.direction()
        if self.folded is not None and not (self.weight.requires_grad or self.log_gain.requires_grad):
            return self.folded
        return normalized(self.direction(), self.log_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` to ``(n, out, h', w')``."""
        # The parameters stay as they are: Pyro's store, which pyro.optim reads, would train copies of others.
        weight = self.effective_weight().to(memory_format=MEMORY_FORMAT)
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training drops the folded weight."""
        if mode:
            self.folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the folded weight out of copies, such as averages."""
        return {**super().__getstate__(), "folded": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self.folded = None
        super()._load_from_state_dict(*args)

    def _apply(self, *args: Any, **options: Any) -> Self:
        """Move or convert the parameters, and drop the folded weight."""
        self.folded = None
        moved: Self = super()._apply(*args, **options)
        return moved


@torch.no_grad()
def fold_weight_norm(net: nn.Module) -> None:
    """Store the normalised weights of a net's frozen convolutions, so that its calls do not compute them again.

    Training mode, ``requires_grad_()``, ``load_state_dict`` and ``to`` end that. Parameters written in place, as an
    average's update does, need another call.
    """
    for conv in net.modules():
        if isinstance(conv, Conv2d) and not any(parameter.requires_grad for parameter in conv.parameters()):
            conv.folded = None
            conv.folded = None if conv.log_gain is None else conv.effective_weight().to(memory_format=MEMORY_FORMAT)


def normalized(v: Tensor, log_gain: Tensor) -> Tensor:
    """Normalise weights ``(..., out, in, k, k)`` by their norm per output channel, and scale by ``exp(log_gain)``."""
    norm = v.flatten(-3).norm(dim=-1)
    weight: Tensor = v * (log_gain.exp() / (norm + WEIGHT_EPSILON))[..., None, None, None]
    return weight


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with NVAE's constants, over the batches of all processes.

    The two moments are reduced here, because PyTorch's SyncBatchNorm takes tensors on an accelerator only, and tests on
    a CPU compare the gradient of several processes with that of one. One process runs PyTorch's own kernel.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(n, channels, h, w)``."""
        # Without a momentum, one process alone computes the statistics of its draws.
        if not self.training or self.momentum is None or current_process().world == 1:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean = _mean_over_processes(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]  # the mean square minus the squared mean would lose a small variance
        var = _mean_over_processes(centred.square().mean((0, 2, 3)))
        self._track(mean.detach(), var.detach(), x.numel() // x.shape[1] * current_process().world)
        return centred * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics as PyTorch does: the variance without its bias."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, NORM_MOMENTUM)
        self.running_var.lerp_(var * count / max(1, count - 1), NORM_MOMENTUM)


class _SumOverProcesses(torch.autograd.Function):
    """A sum whose derivative is the sum of all processes' derivatives; PyTorch's own such function is deprecated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Add up the processes' values."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Add up the processes' gradients."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _mean_over_processes(value: Tensor) -> Tensor:
    """Average over all processes, each of which has as many images; differentiable."""
    total: Tensor = _SumOverProcesses.apply(value)
    return total / current_process().world


class SqueezeExcite(nn.Module):
    """Multiply every channel by a gate that depends on all channels' means (Hu et al. 2018)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        width = max(num_channels // EXCITE_REDUCTION, MIN_EXCITE_WIDTH)
        self.squeeze = nn.Linear(num_channels, width)
        self.excite = nn.Linear(width, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to the same shape."""
        gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        scaled: Tensor = x * gate[:, :, None, None]
        return scaled


class ShiftedDown(nn.Module):
    """Halve the grid without losing a pixel: four 1x1 convolutions, each on another pixel of every square of four.

    Slices pick the pixels, not strides of the convolutions: with strides, oneDNN on AVX2 writes the gradient of 1x1
    weights past its memory (PyTorch 2.14, channels last). There are at least 4 output channels.
    """

    SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        widths = (*[num_out // 4] * 3, num_out - 3 * (num_out // 4))
        self.convs = nn.ModuleList(Conv2d(num_in, width, 1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, 2h, 2w)`` to ``(n, out, h, w)``."""
        x = functional.silu(x)
        shifted = [
            conv(x[:, :, down::2, right::2]) for conv, (down, right) in zip(self.convs, self.SHIFTS, strict=True)
        ]
        return torch.cat(shifted, dim=1)


class SmoothUp(nn.Module):
    """Double the grid by bilinear interpolation, then mix channels."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = Conv2d(num_in, num_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` to ``(n, out, 2h, 2w)``."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))
        return out


class ResidualCell(nn.Module):
    """Residual cell, ``skip(x) + 0.1 * excite(branch(x))``."""

    def __init__(self, skip: nn.Module, branch: nn.Module, excite: nn.Module) -> None:
        super().__init__()
        self.skip, self.branch, self.excite = skip, branch, excite

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` to ``(n, out, h', w')``."""
        out: Tensor = self.skip(x) + RESIDUAL_SCALE * self.excite(self.branch(x))
        return out


def encoder_cell(num_channels: int, is_down: bool, squeeze_excite: bool) -> ResidualCell:
    """Make a cell of the bottom-up tower: twice batch norm, swish, 3x3 convolution (``res_bnswish``).

    It takes ``num_channels``; with ``is_down`` it halves the grid and doubles the channels.
    """
    num_out = 2 * num_channels if is_down else num_channels
    branch = nn.Sequential(
        BatchNorm2d(num_channels),
        nn.SiLU(),
        Conv2d(num_channels, num_out, 3, stride=2 if is_down else 1),
        BatchNorm2d(num_out),
        nn.SiLU(),
        Conv2d(num_out, num_out, 3),
    )
    skip = ShiftedDown(num_channels, num_out) if is_down else nn.Identity()
    return ResidualCell(skip, branch, _excite(num_out, squeeze_excite))


def decoder_cell(
    num_channels: int, is_up: bool, squeeze_excite: bool, expansion: int = TOWER_EXPANSION
) -> ResidualCell:
    """Make a cell of the top-down tower: an inverted bottleneck with a depthwise 5x5 convolution (``mconv_e6k5``).

    The convolutions in it have neither bias nor weight norm, and its first and last batch norm no activation. It takes
    ``num_channels``, and has ``expansion`` times as many inside; ``is_up`` doubles the grid and halves the channels.
    """
    num_out = num_channels // 2 if is_up else num_channels
    hidden = expansion * num_channels
    plain: dict[str, Any] = {"bias": False, "weight_norm": False}
    branch = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest") if is_up else nn.Identity(),
        BatchNorm2d(num_channels),
        Conv2d(num_channels, hidden, 1, **plain),
        BatchNorm2d(hidden),
        nn.SiLU(),
        Conv2d(hidden, hidden, DEPTHWISE_SIZE, groups=hidden, **plain),
        BatchNorm2d(hidden),
        nn.SiLU(),
        Conv2d(hidden, num_out, 1, **plain),
        BatchNorm2d(num_out),
    )
    skip = SmoothUp(num_channels, num_out) if is_up else nn.Identity()
    return ResidualCell(skip, branch, _excite(num_out, squeeze_excite))


def _excite(num_channels: int, squeeze_excite: bool) -> nn.Module:
    return SqueezeExcite(num_channels) if squeeze_excite else nn.Identity()
