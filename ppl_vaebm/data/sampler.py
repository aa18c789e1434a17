"""The order in which training sees the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import stream


class KeyedSampler:
    """Order of the data as a function of seed and step, so that a resumed run needs no stored position.

    An epoch is one permutation, drawn from the stream of (seed, epoch); each step takes the next ``batch_size * world``
    elements of it, and rank r the r-th ``batch_size`` of those. Elements that do not fill a step are left out of that
    epoch.

    ``size`` is the number of elements of the split, ``batch_size`` that per rank and step, and ``world`` is the number
    of processes, with ranks 0 to ``world - 1``.

    Raises:
        InputError: one step would need more elements than there are.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if not 1 <= batch_size * world <= size:
            raise InputError(
                f"a step needs batch size x processes = {batch_size} x {world} elements between 1 and the {size} "
                "of the training split; change the batch size"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = size // (batch_size * world)
        self._size, self._seed, self._rank, self._world = size, seed, rank, world
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Return the indices of one step, ``(batch_size,)``, int64; steps count from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self._size, generator=stream(self._seed, "order", epoch))
            self._epoch = epoch
        start = (position * self._world + self._rank) * self.batch_size
        return self._order[start : start + self.batch_size]
