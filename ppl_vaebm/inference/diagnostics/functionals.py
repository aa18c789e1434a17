"""What is stored of every draw of a VAEBM chain: few numbers that between them see the whole state."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS
from ppl_vaebm.inference.kernels.base import KernelState
from ppl_vaebm.inference.kernels.chains import Functionals
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream

NUM_PROJECTIONS = 4
NUM_COORDINATES = 4
MAX_STORED_X = 4
"""Largest number of values in x for which every draw's x itself is stored."""
PROJECTION_SEED = 0  # fixed, so that chains of different runs and kernels are compared on the same functionals


def noise_functionals(potential: NoisePotential, modes: Tensor | None = None) -> Functionals:
    """Make the functionals of a VAEBM's chains.

    Args:
        potential: of the VAEBM.
        modes: centres of the data's modes, ``(m, d)``, where they are known and x has d values.

    Returns:
        A function of a state: ``energy`` E(x), ``(C,)``; ``mean_square_<site>`` of each noise, ``(C,)``;
        ``projection``, :data:`NUM_PROJECTIONS` fixed directions of unit length, ``(C, P)``; ``coordinate``, evenly
        spaced coordinates, ``(C, Q)``; ``x``, ``(C, d)``, where it has at most :data:`MAX_STORED_X` values or modes
        are given; and with modes ``mode``, the centre of the nearest one, ``(C, d)``: its place among the modes and
        not a number of it, so that ranks of it mean something.
    """
    dim = potential.packing.dim
    like = next(potential.vaebm.parameters())
    directions = torch.randn(dim, NUM_PROJECTIONS, generator=stream(PROJECTION_SEED, "projections"))
    directions = (directions / directions.norm(dim=0)).to(like)
    coordinates = torch.linspace(0, dim - 1, min(NUM_COORDINATES, dim)).round().long()
    stores_x = modes is not None or potential.vaebm.vae.model.event_shape.numel() <= MAX_STORED_X
    centres = None if modes is None else modes.to(like)

    def functionals(state: KernelState) -> dict[str, Tensor]:
        mean_squares = potential.packing.mean_square(state.position)
        stored = {
            "energy": state.potential,
            **{f"mean_square_{name}": value for name, value in mean_squares.items()},
            "projection": state.position @ directions,
            "coordinate": state.position[:, coordinates],
        }
        if stores_x:
            x = stored["x"] = potential.decode(state.position).flatten(1)
            if centres is not None:
                stored["mode"] = _nearest(x, centres)
        return stored

    return functionals


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre of every row, nan where a row is not finite."""
    nearest = centres[torch.cdist(x, centres).argmin(1)]
    return nearest.where(x.isfinite().all(1, keepdim=True), torch.nan)


class PositionRecorder:
    """Functionals that keep whole positions on the side, float32, as many of them as a bound on memory allows.

    When the memory is full, every other position goes, and from then on only every other draw is kept: what is kept is
    every k-th draw from the first one, k a power of two, however long the chains become.

    Args:
        functionals: what is stored of every draw.
        num_chains: the first so many chains are recorded.
        dim: D.
        max_draws: most positions of one chain to keep, at least 2.
    """

    def __init__(self, functionals: Functionals, num_chains: int, dim: int, max_draws: int) -> None:
        self.functionals = functionals
        self.stride = 1
        """Draws per kept position."""
        self._kept = np.empty((num_chains, max_draws // 2 * 2, dim), dtype=np.float32)
        self._num_kept = 0
        self._num_seen = 0

    def __call__(self, state: KernelState) -> dict[str, Tensor]:
        """Record the position of one draw, and return the functionals."""
        if self._num_seen % self.stride == 0:
            self._keep(state.position[: len(self._kept)])
        self._num_seen += 1
        return dict(self.functionals(state))

    def _keep(self, position: Tensor) -> None:
        size = self._kept.shape[1]
        if self._num_kept == size:
            self._kept[:, : size // 2] = self._kept[:, ::2]
            self._num_kept, self.stride = size // 2, 2 * self.stride
            # The size is even, so this draw is one of those that the doubled stride keeps.
        self._kept[:, self._num_kept] = position.detach().float().cpu().numpy()
        self._num_kept += 1

    @property
    def positions(self) -> NDArray[np.float32]:
        """What has been kept, ``(chains, draws, D)``."""
        return self._kept[:, : self._num_kept]


def record_positions(functionals: Functionals, num_chains: int, dim: int, max_bytes: int) -> PositionRecorder:
    """Make functionals that keep whole positions within a bound on memory.

    Args:
        functionals: what is stored of every draw.
        num_chains: C.
        dim: D.
        max_bytes: of all positions that are kept.

    Returns:
        The recorder.

    Raises:
        InputError: the bound leaves too few positions of every chain to judge them by.
    """
    bytes_per_draw = 4 * num_chains * dim
    # When the memory is full, half of what is kept goes.
    if max_bytes // bytes_per_draw < 4 * MIN_DRAWS:
        needed = math.ceil(4 * MIN_DRAWS * bytes_per_draw / 2**20)
        raise InputError(
            f"expected memory for {4 * MIN_DRAWS} positions of {num_chains} chains with {dim} coordinates, found "
            f"{max_bytes / 2**20:.3g} MiB; set --position-mib {needed} or more, or take fewer chains"
        )
    return PositionRecorder(functionals, num_chains, dim, max_bytes // bytes_per_draw)
