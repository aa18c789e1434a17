"""The energy networks E(x), and the penalty on their spectral norms.

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

# NVAE's schedule of its spectral regularisation: four power iterations a call on vectors that persist.
NUM_POWER_ITERATIONS = 4


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
        check_side(event_shape, num_downs)
        widths = [config.channels << level for level in range(num_downs + 1)]
        self.stem = nn.Conv2d(event_shape[0], widths[0], 3, padding=1)
        self.activation = LipSwish()
        self.blocks = nn.Sequential(
            *(ResidualBlock(widths[i], widths[i + 1], LipSwish, "down") for i in range(num_downs))
        )
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the energy; see :class:`Energy`."""
        features = self.blocks(self.activation(self.stem(x)))
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


class SpectralPenalty(nn.Module):
    """Sum of the largest singular values of a network's weight matrices, by power iteration.

    A convolution counts as its matrix ``(out, in * k * k)``, as in NVAE's spectral regularisation. The vectors are
    buffers, so they are saved with the run and each call refines the last one's.

    Args:
        net: the network; held, not owned.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._weights = tuple(module.weight for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        for index, weight in enumerate(self._weights):
            self.register_buffer(f"u_{index}", torch.randn(weight.shape[0], dtype=weight.dtype))

    def forward(self) -> Tensor:
        """Return the sum, ``()``; its gradient flows through the weights, not through the vectors."""
        total = torch.zeros((), dtype=self._weights[0].dtype, device=self._weights[0].device)
        for index, weight in enumerate(self._weights):
            matrix = weight.flatten(1)
            u = self.get_buffer(f"u_{index}")
            with torch.no_grad():
                for _ in range(NUM_POWER_ITERATIONS):
                    v = nn.functional.normalize(matrix.mT @ u, dim=0)
                    u.copy_(nn.functional.normalize(matrix @ v, dim=0))
            total = total + u.clone() @ matrix @ v
        return total
