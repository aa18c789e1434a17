"""A comparison of kernels as one HTML file, of the report's look: the table, and pictures to judge it by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ppl_vaebm.evaluation.kernel_files import Outcome, load_pictures
from ppl_vaebm.evaluation.kernel_table import Row
from ppl_vaebm.evaluation.kernel_text import TRUST, cost, reference_text, table_of
from ppl_vaebm.evaluation.kernels import Budget, Reference
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT
from ppl_vaebm.reports import kernels as figures_compare
from ppl_vaebm.reports.figures import Picture
from ppl_vaebm.reports.html import Cell, Section, Table, render
from ppl_vaebm.runs.run import Run


class Heading(NamedTuple):
    """Where a section stands, and what it is about."""

    anchor: str
    title: str
    lead: str


TABLE_LEAD = (
    "Every kernel began at the same places and drew until it had spent the same evaluations of the energy and the same "
    "time. Good: R-hat close to 1, and then many effective draws (ESS) per evaluation or per second, whichever is "
    "scarce. The numbers are means over seeds; after the sign ± stands the standard deviation over them. R-hat and ESS "
    "are those of the worst functional, which is named. An R-hat that misses its threshold is marked: such chains have "
    "not agreed, one that misses a mode can look fast, and its ESS means little. The bias is the chains' mean energy "
    "minus that of exact draws, where these can be had; beyond about 4 sigmas it is real. A kernel without a "
    "Metropolis test has one by construction. The KL divergence is of the draws' shares of the data's modes from those "
    "of exact draws; n independent draws among m modes have (m - 1) / 2n of it by chance alone."
)
HEADINGS = {
    "table": Heading("table", "The table", TABLE_LEAD),
    "efficiency": Heading("efficiency", "Efficiency", "Which kernel draws most for its cost, and how that grows."),
    "chains": Heading(
        "chains", "Chains", "Whether the chains can be trusted: an ESS is a number for chains that agree."
    ),
    "places": Heading("places", "Where the chains go", "What the chains pass through, as points or images."),
}


def write_comparison(
    run: Run, rows: Sequence[Row], outcomes: Mapping[str, Sequence[Outcome]], budget: Budget, reference: Reference
) -> Path:
    """Write the page.

    Args:
        run: the run's folder.
        rows: the table.
        outcomes: of every kernel, seed by seed.
        budget: what each run was given.
        reference: what is known of the target.

    Returns:
        The path of the page.
    """
    runs = {name: next((one for one in part if one.idata is not None), None) for name, part in outcomes.items()}
    shown = {
        name: figures_compare.shown_of(one.idata, budget.num_evals) for name, one in runs.items() if one is not None
    }
    shown = {name: one for name, one in shown.items() if one.within["posterior"].sizes["draw"] >= MIN_DRAWS}
    colours = figures_compare.colours_of(list(outcomes))
    num_seeds = max(map(len, outcomes.values()))
    sections = {"table": Section(tables=_tables(rows, budget, reference), notes=_notes(rows, reference))}
    efficiency = [figures_compare.bars_picture(rows, colours)]
    if shown:
        efficiency.append(figures_compare.cost_picture(shown, colours, budget.num_seconds))
        sections["efficiency"] = Section(efficiency)
        sections["chains"] = Section(
            [
                figures_compare.energy_picture(shown, reference),
                figures_compare.correlation_picture(shown, colours),
                figures_compare.ranks_picture(shown),
            ]
        )
        places = list(_places(run, runs, shown, reference))
        if places:
            sections["places"] = Section(places)
    seconds = f" and {budget.num_seconds:g} s" if budget.num_seconds else ""
    page = render(
        name=f"{run.path.name}: kernels side by side",
        subtitle=f"{num_seeds} seeds of {budget.num_chains} chains; warm-up {budget.num_warmup} steps, then "
        f"{budget.num_evals} evaluations per chain{seconds}.",
        sections=[(HEADINGS[name], section) for name, section in sections.items()],
    )
    write_atomic(run.comparison_page, page)
    return run.comparison_page


def _tables(rows: Sequence[Row], budget: Budget, reference: Reference) -> list[Table]:
    """Make the two tables; an R-hat that misses its threshold is marked."""
    misses = [not row.mean.max_r_hat <= MAX_R_HAT for row in rows if row.num_seeds]
    tables = []
    for caption, columns in (("whether to trust a kernel", TRUST), ("what its draws cost", cost(budget))):
        kept, body = table_of(columns, rows, reference)
        styles = ["number" if column.is_number else "name" for column in kept]
        header = [
            Cell(f"{column.title}\n{column.unit}".strip(), style) for column, style in zip(kept, styles, strict=True)
        ]
        lines = [
            [
                Cell(text, f"{style} bad" if is_bad and column.unit == "largest" else style)
                for text, style, column in zip(line, styles, kept, strict=True)
            ]
            for line, is_bad in zip(body, misses, strict=True)
        ]
        tables.append(Table(caption, header, lines))
    return tables


def _notes(rows: Sequence[Row], reference: Reference) -> list[str]:
    return [f"{reference_text(reference)}.", *(f"{row.kernel}: {row.note}." for row in rows if row.note)]


def _places(
    run: Run,
    runs: Mapping[str, Outcome | None],
    shown: Mapping[str, figures_compare.Shown],
    reference: Reference,
) -> Iterator[Picture]:
    in_plane = {name: one for name, one in shown.items() if one.within["posterior"].get("x", default=None) is not None}
    in_plane = {name: one for name, one in in_plane.items() if one.within["posterior"]["x"].shape[-1] == 2}
    if in_plane:
        yield figures_compare.path_picture(in_plane, reference)
    for name, one in runs.items():
        images = None if one is None else load_pictures(run, name, one.seed)
        if images is not None:
            yield figures_compare.images_picture(name, *images)
