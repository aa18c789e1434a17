"""Persistent chains for training: a store of positions, a random batch of which each update advances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.base import draw_normal


class Taken(NamedTuple):
    """A batch of chains."""

    positions: Tensor
    """Where they begin, ``(num, D)``."""
    slots: Tensor
    """Their places in the store, ``(num,)``."""
    goes_on: Tensor
    """Whether a chain goes on rather than restarts, ``(num,)``."""


class Replay:
    """As many chains as it holds positions; eps_z and eps_x are both kept, so each is a chain in the joint space.

    An update takes a random batch of slots. Each taken chain goes on with a given probability, and otherwise
    restarts; afterwards it goes back to its own slot. Only positions are stored, since a potential or
    gradient is stale once the energy's weights have moved.

    Args:
        positions: starts, ``(size, D)``, draws from N(0, I).
    """

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def take(self, generator: torch.Generator, num: int, probability: float, restarts: Tensor | None = None) -> Taken:
        """Take a batch of chains.

        Args:
            generator: source of slots, restarts and fresh noise; on the positions' device.
            num: chains, at most the store's size.
            probability: that a chain goes on rather than restarts.
            restarts: where those that restart begin, ``(num, D)``; draws from N(0, I) if not given.

        Returns:
            The chains.
        """
        device = self.positions.device
        slots = torch.randperm(len(self.positions), generator=generator, device=device)[:num]
        stored = self.positions[slots]
        goes_on = torch.rand((num, 1), generator=generator, device=device) < probability
        fresh = draw_normal(generator, stored) if restarts is None else restarts
        return Taken(torch.where(goes_on, stored, fresh), slots, goes_on.squeeze(1))

    def put(self, slots: Tensor, positions: Tensor) -> None:
        """Return a batch of chains to its slots.

        Args:
            slots: as :meth:`take` gave them, ``(num,)``.
            positions: where the chains are now, ``(num, D)``.
        """
        self.positions[slots] = positions.detach()
