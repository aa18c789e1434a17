"""What a page of the report is made of: sections, tables, cells, and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppl_vaebm.reports.figures import Picture


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    style: str = ""
    """CSS class: ``number`` aligns right, ``bad`` marks a value that misses its threshold."""


class Table(NamedTuple):
    """A table of the page."""

    caption: str
    header: list[Cell]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Section:
    """The contents of a section."""

    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    link: str = ""
    """Path, from the run's folder, of a page with more; none if empty."""


def value_text(value: object) -> str:
    """Write a number to five digits, with its error after a sign where it has one; anything else as it is."""
    if isinstance(value, Mapping):
        return " ± ".join(value_text(value[key]) for key in ("value", "error") if key in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


def number_cell(text: str) -> Cell:
    """Make a cell of a text, which may be a number."""
    try:
        number = float(text)
    except ValueError:
        return Cell(text)
    return Cell(text if text.lstrip("-").isdigit() else value_text(number), "number")


def without_empty_columns(table: Table) -> Table:
    """Leave out the columns in which every cell is empty."""
    kept = [index for index in range(len(table.header)) if any(row[index].text for row in table.rows)]
    rows = [[row[index] for index in kept] for row in table.rows]
    return Table(table.caption, [table.header[index] for index in kept], rows)
