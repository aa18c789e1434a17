"""What the parts of an evaluation return: tables of numbers with their errors; and how much to spend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.data.splits import Split
from ppl_vaebm.rng import stream
from ppl_vaebm.tables import text_table

Value = float | int | str | dict[str, float]
"""A number, a text, or a number with its ``value`` and ``error``."""
Rows = dict[str, Value]
"""Values by the name of their row."""
Arrays = dict[str, NDArray[np.generic]]


class Section(NamedTuple):
    """One table of an evaluation."""

    title: str
    columns: dict[str, Rows]
    """By name; a single column may have an empty one. A row that a column lacks is empty there."""


class Measured(NamedTuple):
    """Result of one part of an evaluation."""

    sections: list[Section]
    arrays: Arrays
    """Data of the report's pictures; may be empty."""


class Effort(NamedTuple):
    """How much to spend."""

    num_test: int
    """Test points for the likelihood."""
    num_importance: int
    """Draws of the guide per test point."""
    num_z_draws: int
    """VAE samples for log Z."""
    num_samples: int
    """Samples for the metrics of samples."""
    steps: Sequence[int]
    """Chain lengths from fresh noise at which samples are measured."""
    num_reference: int = 50_000
    """Largest number of training images that samples are measured against: that of published distances."""
    num_scored: int = 1_000
    """Images of every set whose log h is compared with that of others."""
    num_score_draws: int = 20
    """Draws of the guide for each of these."""
    num_particles: int = 256
    """Particles for log Z: of each direction of annealing, and of all sequential samplers together."""
    num_temperatures: int | None = None
    """Steps of annealing for log Z; ``None`` follows the pilot."""


def random_order(split: Split, seed: int, name: str) -> Tensor:
    """Shuffle the indices of a split, ``(n,)``, so that the first ones are a fair choice from files sorted by class."""
    return torch.randperm(len(split), generator=stream(seed, "order", name))


def mean_value(values: Tensor, other_error: float = 0.0) -> dict[str, float]:
    """Return the mean of independent values ``(n,)`` and its standard error, joined with another independent one."""
    values = values.double()
    error = math.hypot(float(values.std()) / math.sqrt(len(values)), other_error)
    return {"value": float(values.mean()), "error": error}


def value_text(value: Value) -> str:
    """Format a value with four decimals, and its error after a sign."""
    if isinstance(value, Mapping):
        return f"{_decimals(value['value'])} +- {_decimals(value['error'])}"
    return _decimals(value) if isinstance(value, float) else str(value)


def _decimals(value: float) -> str:
    """Write four decimals, or three digits of a number that they would round to 0."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def table_cells(section: Section, text: Callable[[Value], str] = value_text) -> tuple[list[str], list[list[str]]]:
    """Write a section as a header, empty where the only column has no name, and lines begun by their row's name."""
    columns = section.columns
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    lines = [[name, *(text(rows[name]) if name in rows else "" for rows in columns.values())] for name in names]
    return ["", *columns] if any(columns) else [], lines


def sections_text(sections: Sequence[Section]) -> str:
    """Lay sections out for a terminal, with an empty line between them."""
    tables = []
    for section in sections:
        header, lines = table_cells(section)
        tables.append("\n".join([section.title, *([text_table(lines, header)] if lines else [])]))
    return "\n\n".join(tables)
