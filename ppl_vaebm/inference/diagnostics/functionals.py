"""Scalar summaries (functionals) of a chain's state, which are stored for every draw, and recorded positions."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS
from ppl_vaebm.inference.kernels.base import KernelState
from ppl_vaebm.inference.kernels.chains import Functionals
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import stream

NUM_PROJECTIONS = 4
NUM_COORDINATES = 4
MAX_STORED_X = 4
"""Largest number of values in x for which every draw's x itself is stored."""
PROJECTION_SEED = 0  # fixed, so that chains of different runs and kernels are compared on the same quantities


class DecodablePotential(Protocol):
    """A potential of noise that stands for an x, such as ``ppl_vaebm.inference.potential.NoisePotential``."""

    packing: Packing
    x_shape: torch.Size
    """Shape of one x."""

    def decode(self, position: Tensor) -> Tensor:
        """Map noise ``(C, D)`` to x, ``(C, *x_shape)``, without a gradient."""


def noise_functionals(potential: DecodablePotential, modes: Tensor | None = None) -> Functionals:
    """Make the scalar summaries of a VAEBM's chains.

    Args:
        modes: centres of the data's modes, ``(m, d)``, where they are known and x has d values.

    Returns:
        A function of a state to ``energy`` E(x), ``(C,)``; ``mean_square_<site>`` of each noise, ``(C,)``;
        ``projection``, on :data:`NUM_PROJECTIONS` fixed directions of unit length, ``(C, P)``; ``coordinate``, evenly
        spaced coordinates, ``(C, Q)``; ``x``, ``(C, d)``, if it has at most :data:`MAX_STORED_X` values or modes are
        given; and with modes ``mode``, the centre of the nearest one, ``(C, d)``, nan where x is not finite. A centre
        is stored rather than an index, because its ranks have a meaning.
    """
    dim = potential.packing.dim
    directions = torch.randn(dim, NUM_PROJECTIONS, generator=stream(PROJECTION_SEED, "projections"))
    directions = directions / directions.norm(dim=0)
    coordinates = torch.linspace(0, dim - 1, min(NUM_COORDINATES, dim)).round().long()
    stores_x = modes is not None or potential.x_shape.numel() <= MAX_STORED_X

    def functionals(state: KernelState) -> dict[str, Tensor]:
        mean_squares = potential.packing.mean_square(state.position)
        stored = {
            "energy": state.potential,
            **{f"mean_square_{name}": value for name, value in mean_squares.items()},
            "projection": state.position @ directions.to(state.position),
            "coordinate": state.position[:, coordinates],
        }
        if stores_x:
            x = stored["x"] = potential.decode(state.position).flatten(1)
            if modes is not None:
                stored["mode"] = _nearest(x, modes.to(x))
        return stored

    return functionals


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    nearest = centres[torch.cdist(x, centres).argmin(1)]
    return nearest.where(x.isfinite().all(1, keepdim=True), torch.nan)


class PositionRecorder:
    """Scalar summaries that also keep whole positions in float32, at most ``max_draws`` of each chain.

    When the memory is full, every other position is dropped, and from then on only every other draw is kept: the kept
    draws are always every k-th from the first, k a power of two, however long the chains become. The first
    ``num_chains`` chains are recorded.
    """

    def __init__(self, functionals: Functionals, num_chains: int, dim: int, max_draws: int) -> None:
        self.functionals = functionals
        self.stride = 1
        """Draws per kept position."""
        self._kept = np.empty((num_chains, max_draws // 2 * 2, dim), dtype=np.float32)
        self._num_kept = self._num_seen = 0

    def __call__(self, state: KernelState) -> dict[str, Tensor]:
        """Record the position of one draw, and return the scalar summaries."""
        if self._num_seen % self.stride == 0:
            self._keep(state.position[: len(self._kept)])
        self._num_seen += 1
        return dict(self.functionals(state))

    def _keep(self, position: Tensor) -> None:
        size = self._kept.shape[1]
        if self._num_kept == size:
            self._kept[:, : size // 2] = self._kept[:, ::2]
            self._num_kept, self.stride = size // 2, 2 * self.stride
            # The size is even, so the doubled stride keeps this draw too.
        self._kept[:, self._num_kept] = position.detach().float().cpu().numpy()
        self._num_kept += 1

    @property
    def positions(self) -> NDArray[np.float32]:
        """Kept positions, ``(chains, draws, D)``."""
        return self._kept[:, : self._num_kept]


def record_positions(functionals: Functionals, num_chains: int, dim: int, max_bytes: int) -> PositionRecorder:
    """Make a recorder whose positions take at most ``max_bytes``.

    Raises:
        InputError: so little memory keeps too few positions of every chain to diagnose them.
    """
    bytes_per_draw = 4 * num_chains * dim
    min_kept = 4 * MIN_DRAWS  # half of what is kept is dropped when the memory is full
    if max_bytes // bytes_per_draw < min_kept:
        needed = math.ceil(min_kept * bytes_per_draw / 2**20)
        raise InputError(
            f"expected memory for {min_kept} positions of {num_chains} chains with {dim} coordinates, found "
            f"{max_bytes / 2**20:.3g} MiB; set --position-mib {needed} or more, or take fewer chains"
        )
    return PositionRecorder(functionals, num_chains, dim, max_bytes // bytes_per_draw)
