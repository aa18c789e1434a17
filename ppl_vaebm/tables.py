"""Rows of text as aligned columns, for every table that a command prints."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def text_table(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), *, numbers: Sequence[int] = ()) -> str:
    """Lay out cells in columns of equal width.

    Args:
        rows: cells, printed as they are.
        headers: of the columns; without them no header is printed.
        numbers: indices of the columns that are aligned to the right; the others are to the left.

    Returns:
        A line for the headers, if there are any, and for each row, without spaces at the ends.
    """
    width = len(headers) or max(map(len, rows), default=0)
    sides = ["right" if index in numbers else "left" for index in range(width)]
    text = tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=sides if rows else None)
    return "\n".join(line.rstrip() for line in text.splitlines())
