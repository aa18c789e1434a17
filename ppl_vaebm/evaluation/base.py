"""What the parts of an evaluation share: named numbers with their errors, and how much to spend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.data.splits import Split
from ppl_vaebm.rng import stream

Cell = float | int | str | dict[str, float]
"""A number, a text, or a number with its ``value`` and ``error``."""
Section = dict[str, Cell]
Arrays = dict[str, NDArray[np.generic]]


class Measured(NamedTuple):
    """What one part of an evaluation found."""

    sections: dict[str, Section]
    """Named numbers by their title."""
    arrays: Arrays
    """What the pictures of the report are drawn from; may be empty."""


class Effort(NamedTuple):
    """How much to spend."""

    num_test: int
    """Test points for the likelihood."""
    num_importance: int
    """Draws of the guide per test point."""
    num_z_draws: int
    """Draws of the VAE for log Z."""
    num_samples: int
    """Samples for the metrics of samples."""
    steps: Sequence[int]
    """Chain lengths from fresh noise at which samples are measured."""
    num_reference: int = 50_000
    """Training images, at most, that samples are measured against: as many as published distances use."""
    num_scored: int = 1_000
    """Images of every set whose log h is compared with that of others."""
    num_score_draws: int = 20
    """Draws of the guide for each of these."""


def random_order(split: Split, seed: int, name: str) -> Tensor:
    """Shuffle the indices of a split, ``(n,)``, for files may be sorted by class; first ones are a fair choice then."""
    return torch.randperm(len(split), generator=stream(seed, "order", name))


def mean_cell(values: Tensor, other_error: float = 0.0) -> dict[str, float]:
    """Average independent values.

    Args:
        values: ``(n,)``.
        other_error: an independent standard error to join with theirs.

    Returns:
        The mean and its standard error.
    """
    values = values.double()
    error = math.hypot(float(values.std()) / math.sqrt(len(values)), other_error)
    return {"value": float(values.mean()), "error": error}


def cell_text(cell: Cell) -> str:
    """Format a cell: four decimals, and the error after a sign."""
    if isinstance(cell, Mapping):
        return f"{_decimals(cell['value'])} +- {_decimals(cell['error'])}"
    return _decimals(cell) if isinstance(cell, float) else str(cell)


def _decimals(value: float) -> str:
    """Write four decimals, or three digits of what these would round to nothing."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"
