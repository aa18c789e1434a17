"""The energy networks E(x).

An energy is called as ``energy(x, z)`` and returns nats per row. The networks here read x alone; an
energy of both is any module with the same call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.models.cells import (
    FourierFeatures,
    LipSwish,
    ResidualBlock,
    check_side,
    mlp,
    net_kind,
    num_halvings,
)


class Energy(nn.Module):
    """What every energy has: a call with x and the latents, and no batch statistics."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the energy.

        Args:
            x: ``(n, *event_shape)``.
            z: the latents; ignored by an energy of x alone.

        Returns:
            ``(n,)``, nats.
        """
        raise NotImplementedError


class VectorEnergy(Energy):
    """Fourier features into a fully connected net.

    Args:
        config: sizes.
        dim: of x.
    """

    def __init__(self, config: EnergyConfig, dim: int) -> None:
        super().__init__()
        self.fourier = FourierFeatures(dim, config.num_fourier, config.fourier_scale) if config.num_fourier else None
        self.net = mlp(2 * config.num_fourier or dim, config.width, config.depth, 1, nn.SiLU)

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the energy; see :class:`Energy`."""
        out: Tensor = self.net(self.fourier(x) if self.fourier is not None else x)
        return out.squeeze(-1)


class ImageEnergy(Energy):
    """Residual blocks down to a small grid, summed over pixels, into one linear unit.

    Args:
        config: sizes; channels double at every halving.
        event_shape: ``(channels, side, side)``.
    """

    def __init__(self, config: EnergyConfig, event_shape: torch.Size) -> None:
        super().__init__()
        num_downs = num_halvings(event_shape[-1])
        missing = -event_shape[-1] % (1 << num_downs)
        check_side(torch.Size([*event_shape[:-2], *(side + missing for side in event_shape[-2:])]), num_downs)
        # Black on all sides, so that the grid can be halved that often.
        self.padding = (missing // 2, missing - missing // 2) * 2
        widths = [config.channels << level for level in range(num_downs + 1)]
        self.stem = nn.Conv2d(event_shape[0], widths[0], 3, padding=1)
        self.activation = LipSwish()
        self.blocks = nn.Sequential(
            *(ResidualBlock(widths[i], widths[i + 1], LipSwish, "down") for i in range(num_downs))
        )
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the energy; see :class:`Energy`."""
        padded = nn.functional.pad(x, self.padding, value=-1.0) if any(self.padding) else x
        features = self.blocks(self.activation(self.stem(padded)))
        out: Tensor = self.head(features.sum(dim=(-2, -1)))
        return out.squeeze(-1)


def build_energy(config: EnergyConfig, event_shape: torch.Size) -> Energy:
    """Make the energy network that fits the data.

    Args:
        config: kind and sizes.
        event_shape: ``(d,)`` for points, ``(channels, side, side)`` for images.

    Returns:
        The network, freshly initialised from the global generator.

    Raises:
        InputError: a kind that does not fit the data's shape.
    """
    if net_kind(config.kind, event_shape, "energy.kind") == "vector":
        return VectorEnergy(config, event_shape[0])
    return ImageEnergy(config, event_shape)
