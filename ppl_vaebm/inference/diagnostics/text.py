"""What diagnostics found, in words and tables that a person reads: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ppl_vaebm.inference.diagnostics.arviz_io import attribute_list
from ppl_vaebm.inference.diagnostics.summary import (
    MAX_R_HAT,
    MIN_BFMI,
    MIN_CHAINS,
    FunctionalSummary,
    InferenceData,
    bfmi,
    num_divergent,
    scalar_draws,
    stat,
)

MIN_ACCEPTANCE = 0.01
"""Below this mean acceptance the notes say that nothing is accepted; chosen by us, no tuned kernel here comes near."""

TABLE_HEADER = (
    ("functional", ""),
    ("mean", "own unit"),
    ("sd", "own unit"),
    ("MCSE", "own unit"),
    ("R-hat", ""),
    ("R-hat", "nested"),
    ("ESS bulk", "draws"),
    ("ESS tail", "draws"),
    ("autocorr. time", "draws"),
    ("ESS rate", "per 1000 evals"),
    ("ESS rate", "per second"),
)
"""Title and unit of every column of :func:`table_cells`."""


def table_cells(summary: FunctionalSummary) -> list[str]:
    """Write a summary as the cells of one table row, in the order of :data:`TABLE_HEADER`."""
    return [
        summary.name,
        digits(summary.mean, 4),
        digits(summary.sd, 3),
        digits(summary.mcse_mean, 2),
        r_hat_text(summary.r_hat),
        "" if np.isnan(summary.r_hat_nested) else r_hat_text(summary.r_hat_nested),
        f"{summary.ess_bulk:.0f}",
        f"{summary.ess_tail:.0f}",
        digits(summary.autocorrelation_time, 3),
        digits(summary.ess_per_1000_evals, 3),
        digits(summary.ess_per_second, 3),
    ]


def r_hat_text(value: float) -> str:
    """Write an R-hat; beyond 1000, rounding alone says whether chains that stand still have an infinite one."""
    return "> 1000" if value > 1000 else f"{value:#.4g}"


def digits(value: float, num_digits: int) -> str:
    """Write a number with so many significant digits, and without an exponent below 1e9."""
    text = f"{value:.{num_digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def run_lines(idata: InferenceData) -> list[str]:
    """Say in plain text what made the chains, and what is wrong with them.

    Args:
        idata: of :func:`~ppl_vaebm.inference.containers.to_inference_data`.

    Returns:
        Lines on kernel, step size, acceptance, divergences, BFMI, cost, a tempered kernel's swaps, and exchanges of the
        first latent; then one that starts with ``note:`` for everything that whoever uses the chains has to know.
    """
    attrs, acceptance = idata["posterior"].attrs, stat(idata, "acceptance_rate").mean(axis=1)
    num_chains, num_draws = stat(idata, "lp").shape
    lines = [
        f"kernel {attrs['kernel']}, step size {stat(idata, 'step_size').mean():.4g}, mean acceptance "
        f"{acceptance.mean():.3f} (chains {acceptance.min():.3f} to {acceptance.max():.3f})",
        f"divergent draws {num_divergent(idata)} of {num_chains * num_draws}, BFMI min {bfmi(idata).min():.3g}",
        f"{num_chains} chains of {num_draws} draws: {attrs['num_evals']} evaluations, {attrs['seconds']:.3g} s; "
        f"warm-up: {attrs['warmup_evals']} evaluations, {attrs['warmup_seconds']:.3g} s",
    ]
    lines += _tempering_lines(idata)
    if "exchange_rate" in attrs:
        lines.append(f"exchanges of the first latent with chains of its own accepted {attrs['exchange_rate']:.2f}")
        lines += [f"those chains: {line}" for line in _tempering_lines(idata, "first_latent_")]
    return [*lines, *(f"note: {note}" for note in notes(idata))]


def _tempering_lines(idata: InferenceData, prefix: str = "") -> list[str]:
    """Say how replicas moved along their ladder, which the attributes of that prefix tell; nothing without any."""
    rates, attrs = attribute_list(idata, f"{prefix}swap_rates"), idata["posterior"].attrs
    if not rates:
        return []
    levels = ", ".join(f"{level:.3g}" for level in attribute_list(idata, f"{prefix}inverse_temperatures"))
    line = f"inverse temperatures {levels}; swaps of neighbours accepted {min(rates):.2f} to {max(rates):.2f}"
    if f"{prefix}num_round_trips" in attrs:
        num, per_sweep = attrs[f"{prefix}num_round_trips"], attrs[f"{prefix}round_trips_per_1000_sweeps"]
        line += f"; round trips between the ends {num:.0f}, per 1000 sweeps {per_sweep:.3g}"
    return [line]


def notes(idata: InferenceData, counts_divergences: bool = True) -> list[str]:
    """List what is wrong with chains, one sentence each, the most serious first.

    Args:
        idata: of :func:`~ppl_vaebm.inference.containers.to_inference_data`.
        counts_divergences: whether divergent draws are among it; a table may have a column of them.

    Returns:
        The sentences; none where nothing is.
    """
    return list(_notes(idata, counts_divergences))


def _notes(idata: InferenceData, counts_divergences: bool) -> Iterator[str]:
    num_chains, num_draws = stat(idata, "lp").shape
    acceptance = float(stat(idata, "acceptance_rate").mean())
    bad = [name for name, draws in scalar_draws(idata).items() if not np.isfinite(draws).all()]
    if bad:
        shown = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        yield f"draws of {shown} are not all finite numbers, and nothing is said of what holds a nan"
    if idata["posterior"].attrs.get("is_adjusted", 1) and not acceptance >= MIN_ACCEPTANCE:
        yield (
            f"the step size never accepts: {100 * acceptance:.2g} % of the proposals are, so the chains stand still; "
            "take a smaller step or a longer warm-up"
        )
    elif "note" in idata["posterior"].attrs:  # of run_chains: a mean over all chains hides one that is stuck
        yield str(idata["posterior"].attrs["note"])
    num_bad = num_divergent(idata)
    if num_bad and counts_divergences:
        yield (
            f"{num_bad} of {num_chains * num_draws} draws diverged: the target is steeper there than the step allows, "
            "and the chains may leave those places out; take a smaller step or a higher target acceptance"
        )
    if bfmi(idata).min() < MIN_BFMI:
        yield f"the BFMI of a chain is below {MIN_BFMI}: its energy diffuses slowly, so tails are seldom seen"
    if num_chains < MIN_CHAINS:
        yield (
            f"R-hat of {num_chains} chain{'s' * (num_chains > 1)} cannot see modes that all of them miss; "
            f"use {MIN_CHAINS} or more"
        )


def text_table(summaries: Sequence[FunctionalSummary], idata: InferenceData) -> str:
    """Lay summaries out for a terminal.

    Args:
        summaries: of :func:`~ppl_vaebm.inference.diagnostics.summarize`.
        idata: what they summarise; the lines below the table come from it.

    Returns:
        Aligned lines: two of header (names, units), one per functional, then :func:`run_lines`. The nested R-hat has
        its column only where there is one.
    """
    titles, units = (list(row) for row in zip(*TABLE_HEADER, strict=True))
    rows = without_empty_columns([titles, units, *map(table_cells, summaries)], num_header=2)
    converged = sum(summary.r_hat <= MAX_R_HAT for summary in summaries)
    last = f"R-hat is at most {MAX_R_HAT} for {converged} of {len(summaries)} functionals"
    return "\n".join([*aligned(rows), "", *run_lines(idata), last])


def without_empty_columns(rows: Sequence[Sequence[str]], num_header: int) -> list[list[str]]:
    """Leave out the columns of a table in which every row below the header is empty."""
    body = rows[num_header:]
    kept = [index for index in range(len(rows[0])) if not body or any(row[index] for row in body)]
    return [[row[index] for index in kept] for row in rows]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay a table out for a terminal, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
