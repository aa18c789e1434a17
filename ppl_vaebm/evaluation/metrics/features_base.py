"""What every network is whose features and logits metrics of images are taken from, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a network says of images."""

    features: Tensor
    """``(n, d)``."""
    logits: Tensor
    """``(n, k)``."""


class FeatureNet(Protocol):
    """A network that metrics of images are named after; images are in [-1, 1] and rounded to levels."""

    @property
    def name(self) -> str:
        """What results are named after, such as ``cnn-digits``."""
        ...

    @property
    def num_features(self) -> int:
        """Return the width d of the features."""
        ...

    def outputs(self, x: Tensor) -> Outputs:
        """Return features ``(n, d)`` and logits ``(n, k)`` of images ``(n, C, H, W)`` in one pass."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights, whose device is where it runs."""
        ...


def network_outputs(net: FeatureNet, x: Tensor, batch_size: int = 500) -> Outputs:
    """Run a network on many images.

    Args:
        net: the network, on any device.
        x: images, ``(n, C, H, W)``, in [-1, 1], rounded to levels, n >= 1.
        batch_size: images at once; of Inception-v3 on a CPU 50 take 0.8 GB and 8.6 s on one thread.

    Returns:
        Features and logits, on the CPU.
    """
    device = next(net.parameters()).device
    with torch.no_grad():
        blocks = [net.outputs(rows.to(device)) for rows in x.split(batch_size)]
    return Outputs(*(torch.cat([rows.cpu() for rows in column]) for column in zip(*blocks, strict=True)))
