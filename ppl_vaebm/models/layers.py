"""Building blocks of the networks: fully connected stacks, Fourier features, small convolutional blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.errors import InputError

LEAK = 0.1  # of LeakyReLU: with SiLU the VAE of a staircase-like density reached -2.5 nats, with this -0.7
LIPSWISH_SCALE = 1.1  # swish(u) / 1.1 has a Lipschitz constant of about 1 (Chen et al. 2019, residual flows)


class LipSwish(nn.Module):
    """``u * sigmoid(u) / 1.1``, the energy network's activation (Xiao et al. 2021, appendix C)."""

    def forward(self, u: Tensor) -> Tensor:
        """Apply it elementwise."""
        return functional.silu(u) / LIPSWISH_SCALE


class FourierFeatures(nn.Module):
    """Random Fourier features (Tancik et al. 2020), so that a small net can follow a density with narrow modes.

    Args:
        dim: size of the input vectors.
        num: number of frequencies; the output has twice as many numbers, cosines and sines.
        scale: standard deviation of the frequencies, radians per unit of input.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(dim, num))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, dim)`` to ``(n, 2 num)``."""
        angles = x @ self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def mlp(num_in: int, width: int, depth: int, num_out: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Stack linear layers.

    Args:
        num_in: size of the input.
        width: hidden units.
        depth: hidden layers.
        num_out: size of the output, which has no activation.
        activation: makes the activation.

    Returns:
        The network, ``(..., num_in)`` to ``(..., num_out)``.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(width if index else num_in, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width if depth else num_in, num_out))


def leaky_relu() -> nn.Module:
    """Make the activation of the fully connected nets."""
    return nn.LeakyReLU(LEAK)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, without normalisation, so rows of a batch stay independent.

    Args:
        num_in: channels in.
        num_out: channels out.
        activation: makes the activation.
        resample: ``same``; ``down``, a 2x2 mean at the end; or ``up``, nearest neighbour x2 at the start.
    """

    def __init__(self, num_in: int, num_out: int, activation: Callable[[], nn.Module], resample: str = "same") -> None:
        super().__init__()
        assert resample in ("same", "down", "up")
        self.resample = resample
        self.first = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.second = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.skip = nn.Conv2d(num_in, num_out, 1, bias=False) if num_in != num_out else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, num_in, s, s)`` to ``(n, num_out, s', s')`` with s' = s, s/2 or 2s."""
        if self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        out = self.skip(x) + self.second(self.activation(self.first(x)))
        if self.resample == "down":
            out = functional.avg_pool2d(out, 2)
        activated: Tensor = self.activation(out)
        return activated


def num_halvings(side: int) -> int:
    """Return how often the small convolutional nets halve an image: down to 2 pixels for 8, to 4 for 32.

    Args:
        side: of the square image, in pixels.

    Returns:
        The number of halvings, at least 1.
    """
    return max(1, round(math.log2(side)) - (1 if side < 16 else 2))


def check_side(event_shape: torch.Size, halvings: int) -> None:
    """Refuse images that are not square or cannot be halved that often.

    Raises:
        InputError: with the shape and the multiple that it takes.
    """
    multiple = 1 << halvings
    if event_shape[-1] != event_shape[-2] or event_shape[-1] % multiple:
        raise InputError(
            f"the small convolutional nets take square images whose side is a multiple of {multiple}, "
            f"got shape {tuple(event_shape)}: set data.image-size"
        )


def net_kind(kind: str, event_shape: torch.Size, option: str) -> str:
    """Resolve ``auto`` and refuse a kind that does not fit the data.

    Args:
        kind: ``auto``, ``vector`` or ``image``.
        event_shape: of the data.
        option: the option's name, for the message.

    Returns:
        ``vector`` or ``image``.

    Raises:
        InputError: the kind does not fit.
    """
    fitting = {1: "vector", 3: "image"}.get(len(event_shape))
    if fitting is None or kind not in ("auto", fitting):
        raise InputError(f"{option} {kind!r} does not fit data of shape {tuple(event_shape)}: leave it at auto")
    return fitting
