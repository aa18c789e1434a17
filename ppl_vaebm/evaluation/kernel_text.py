"""The table of a comparison as CSV, and as two tables that a person reads: whether to trust a kernel, and its cost."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ppl_vaebm.evaluation.kernel_table import Measures, Row
from ppl_vaebm.evaluation.kernels import Budget, Reference
from ppl_vaebm.inference.diagnostics.summary import digits, r_hat_text, without_empty_columns
from ppl_vaebm.tables import text_table

NUM_DIGITS = 4  # of a mean with a spread, at most


class Column(NamedTuple):
    """A column of a table for people."""

    title: str
    unit: str
    text: Callable[[Row, Reference], str]
    """Empty for what nothing is known of, such as modes of images; nan is a number that the chains could not give."""
    is_number: bool = True


def to_csv(rows: Sequence[Row]) -> str:
    """Format lines as CSV with a header; ``..._sd`` is the standard deviation over seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [column for name in Measures._fields for column in (name, f"{name}_sd")]
    writer.writerow(
        ["kernel", "adjusted", "seeds", *columns, "bias_sigmas", "worst_functional", "slowest_functional", "note"]
    )
    for row in rows:
        numbers = [_short(value) for pair in zip(row.mean, row.sd, strict=True) for value in pair]
        last = [_short(row.bias_sigmas), row.worst_functional, row.slowest_functional, row.note]
        writer.writerow([row.kernel, _adjusted(row), row.num_seeds, *numbers, *last])
    return text.getvalue()


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _adjusted(row: Row) -> str:
    return {True: "yes", False: "no", None: ""}[row.is_adjusted]


def _measure(title: str, unit: str, name: str) -> Column:
    """Make a column of a measure with its spread, empty where none of the kernels can have it."""

    def text(row: Row, reference: Reference) -> str:
        mean = getattr(row.mean, name)
        if name == "energy_bias" and math.isnan(mean) and math.isnan(reference.energy):
            return ""
        return with_spread(mean, getattr(row.sd, name))

    return Column(title, unit, text)


def _modes(row: Row, reference: Reference) -> str:
    return "" if reference.modes is None else f"{row.mean.modes_found:.3g} of {len(reference.modes)}"


def _mode_kl(row: Row, reference: Reference) -> str:
    return "" if reference.modes is None else with_spread(row.mean.mode_kl, row.sd.mode_kl)


KERNEL = Column("kernel", "", lambda row, reference: row.kernel, is_number=False)
TRUST = (
    KERNEL,
    Column("exact", "by test", lambda row, reference: _adjusted(row), is_number=False),
    Column("step", "h", lambda row, reference: digits(row.mean.step_size, 3)),
    Column("acceptance", "", lambda row, reference: digits(row.mean.acceptance, 2)),
    Column("R-hat", "largest", lambda row, reference: r_hat_text(row.mean.max_r_hat)),
    Column("R-hat", "largest of", lambda row, reference: row.worst_functional, is_number=False),
    _measure("bias of E", "nats", "energy_bias"),
    Column("bias", "sigmas", lambda row, reference: _known(f"{row.bias_sigmas:+.1f}")),
    Column("modes", "found", _modes),
    Column("KL of modes", "nats", _mode_kl),
    Column("divergent", "draws", lambda row, reference: digits(row.mean.divergences, 3)),
)


def cost(budget: Budget) -> tuple[Column, ...]:
    """Return the columns on what effective draws cost."""
    return (
        KERNEL,
        Column("draws", "per chain", lambda row, reference: digits(row.mean.draws, 3)),
        _measure("ESS per", "1000 evals", "ess_per_1000_evals"),
        Column("ESS", "fewest of", lambda row, reference: row.slowest_functional, is_number=False),
        _measure("ESS per s", "draws", "ess_per_second"),
        _measure("ESS per s", "with warm-up", "ess_per_second_with_warmup"),
        *([_measure("ESS", f"at {budget.num_seconds:g} s", "ess_at_equal_seconds")] if budget.num_seconds else []),
        _measure("seconds", "draws", "seconds"),
        _measure("seconds", "warm-up", "warmup_seconds"),
    )


def _known(text: str) -> str:
    return "" if text == "+nan" else text


def with_spread(mean: float, sd: float) -> str:
    """Write a mean with as many decimals as its spread, which has one digit, or two that begin with 1."""
    if not (0 < sd < math.inf and math.isfinite(mean)):
        return digits(mean, 3)
    exponent = math.floor(math.log10(sd))
    first, largest = sd / 10**exponent, max(abs(mean), sd)
    decimals = max(0, min((first < 2) - exponent, NUM_DIGITS - 1 - math.floor(math.log10(largest))))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def table_of(
    columns: Sequence[Column], rows: Sequence[Row], reference: Reference
) -> tuple[list[Column], list[list[str]]]:
    """Write lines as text.

    Args:
        columns: of the table.
        rows: the lines; one of a kernel that never ran is left out.
        reference: what is known of the target.

    Returns:
        The columns that are not empty, and the text of every line in them.
    """
    body = [[column.text(row, reference) for column in columns] for row in rows if row.num_seeds]
    indices = [str(index) for index in range(len(columns))]
    kept, *body = without_empty_columns([indices, *body], num_header=1)
    return [columns[int(index)] for index in kept], body


def to_text(rows: Sequence[Row], budget: Budget, reference: Reference) -> str:
    """Lay lines out for a terminal: what to trust, then what it costs, then what has to be known."""
    blocks = []
    for columns in (TRUST, cost(budget)):
        kept, body = table_of(columns, rows, reference)
        head = [[column.title for column in kept], [column.unit for column in kept]]
        blocks.append(text_table([*head, *body], numbers=range(1, len(kept))))
    notes = [f"{row.kernel}: {row.note}" for row in rows if row.note]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def reference_text(reference: Reference) -> str:
    """Say what is known of the target without chains, in one sentence without its full stop."""
    if math.isnan(reference.energy):
        return "no exact draws to compare with: E is not finite, or the target is too far from the VAE for rejection"
    return f"mean energy of exact draws: {reference.energy:.4g} ± {reference.energy_error:.2g} nats"
