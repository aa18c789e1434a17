"""What is stored of every draw of a VAEBM chain: few numbers that between them see the whole state."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.inference.base import KernelState
from ppl_vaebm.inference.chains import Functionals
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream

NUM_PROJECTIONS = 4
NUM_COORDINATES = 4
MAX_STORED_X = 4
"""Largest number of values in x for which every draw's x itself is stored."""
PROJECTION_SEED = 0  # fixed, so that chains of different runs and kernels are compared on the same functionals


def noise_functionals(potential: NoisePotential) -> Functionals:
    """Make the functionals of a VAEBM's chains.

    Args:
        potential: of the VAEBM.

    Returns:
        A function of a state: ``energy`` E(x), ``(C,)``; ``mean_square_<site>`` of each noise, ``(C,)``;
        ``projection``, :data:`NUM_PROJECTIONS` fixed directions of unit length, ``(C, P)``; ``coordinate``, evenly
        spaced coordinates, ``(C, Q)``; and ``x``, ``(C, d)``, where it has at most :data:`MAX_STORED_X` values.
    """
    dim = potential.packing.dim
    like = next(potential.vaebm.parameters())
    directions = torch.randn(dim, NUM_PROJECTIONS, generator=stream(PROJECTION_SEED, "projections"))
    directions = (directions / directions.norm(dim=0)).to(like)
    coordinates = torch.linspace(0, dim - 1, min(NUM_COORDINATES, dim)).round().long()
    stores_x = potential.vaebm.vae.model.event_shape.numel() <= MAX_STORED_X

    def functionals(state: KernelState) -> dict[str, Tensor]:
        mean_squares = potential.packing.mean_square(state.position)
        stored = {
            "energy": state.potential,
            **{f"mean_square_{name}": value for name, value in mean_squares.items()},
            "projection": state.position @ directions,
            "coordinate": state.position[:, coordinates],
        }
        if stores_x:
            stored["x"] = potential.decode(state.position).flatten(1)
        return stored

    return functionals
