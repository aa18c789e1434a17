"""Sections of an evaluation as tables of text, for the terminal and for the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ppl_vaebm.evaluation.base import Cell, Section, cell_text

# "Frechet distance [cnn-digits], 2000 samples": a column of the table of all that follows the column's name.
FAMILY = re.compile(r"(?P<column>[^\[\]]+) (?P<family>\[[^\[\]]+\].*)")
WIDTH = 58
"""Of the names on the terminal, characters."""


class TextTable(NamedTuple):
    """Numbers as text."""

    title: str
    columns: list[str]
    """Their names; empty where there is but one, which the title names."""
    rows: dict[str, list[str]]
    """Texts by the name of the row, as many as there are columns; empty ones where a column has no such row."""


def tables(sections: Mapping[str, Section], text: Callable[[Cell], str] = cell_text) -> list[TextTable]:
    """Lay sections out; those of one family, whose titles end alike from a bracket on, share a table.

    Args:
        sections: named numbers by their title.
        text: how to write a number.

    Returns:
        A table for each family, and for each section without one, in their order.
    """
    families: dict[str, dict[str, Section]] = {}
    for title, section in sections.items():
        found = FAMILY.fullmatch(title)
        column, family = (found["column"], found["family"]) if found else ("", title)
        families.setdefault(family, {})[column] = section
    return [_table(family, columns, text) for family, columns in families.items()]


def _table(family: str, columns: Mapping[str, Section], text: Callable[[Cell], str]) -> TextTable:
    (first, *others) = columns
    names = list(dict.fromkeys(name for section in columns.values() for name in section))
    texts = {name: [text(section[name]) if name in section else "" for section in columns.values()] for name in names}
    if others:
        return TextTable(family.replace("[", "").replace("]", ""), list(columns), texts)
    return TextTable(f"{first} {family}".strip(), [], texts)


def lines(sections: Mapping[str, Section]) -> list[str]:
    """Format sections as aligned text.

    Args:
        sections: named numbers by their title.

    Returns:
        A line for each heading and for each row, with an empty one between tables.
    """
    text: list[str] = []
    for table in tables(sections):
        text += ["", *_lines(table)]
    return text[1:]


def _lines(table: TextTable) -> list[str]:
    width = WIDTH if not table.columns else max(map(len, table.rows), default=0)
    rows = {"": table.columns, **table.rows} if table.columns else table.rows
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    if not table.columns:
        widths = [0]
    return [table.title] + [
        f"  {name:<{width}} " + "  ".join(f"{text:<{w}}" for text, w in zip(texts, widths, strict=True)).rstrip()
        for name, texts in rows.items()
    ]
