"""A comparison of kernels as one HTML file: two tables, and pictures to judge them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ppl_vaebm.evaluation.kernel_files import Outcome, load_pictures
from ppl_vaebm.evaluation.kernel_table import Row, reference_text, tables
from ppl_vaebm.evaluation.kernels import Budget, Reference
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT
from ppl_vaebm.reports import kernels as figures
from ppl_vaebm.reports.figures import Picture
from ppl_vaebm.reports.html import Chapter, Contents, Table, render
from ppl_vaebm.runs.run import Run

TABLE_LEAD = (
    "Each kernel began at the same places and drew until it had spent the same evaluations of the energy and the same "
    "time. Good: R-hat close to 1, and then many effective draws (ESS) per evaluation or per second, whichever is "
    "scarce. Numbers are means over seeds, with the standard deviation over seeds after the sign ±. R-hat and ESS are "
    "those of the worst quantity, which is named. An R-hat that misses its threshold is marked: such chains have not "
    "agreed, a kernel that misses a mode can look fast, and its ESS means little. The bias is the chains' mean energy "
    "minus that of exact draws, where these exist; beyond about 4 sigmas it is real. Kernels without a Metropolis test "
    "have a bias by construction. The KL divergence compares the fractions of draws in the modes with those "
    "of exact draws; for n independent draws among m modes its expectation is (m - 1) / 2n."
)


def write_comparison(
    run: Run, rows: Sequence[Row], outcomes: Mapping[str, Sequence[Outcome]], budget: Budget, reference: Reference
) -> Path:
    """Write the page of all kernels with their outcomes, seed by seed, and return its path."""
    runs = {name: next((one for one in part if one.idata is not None), None) for name, part in outcomes.items()}
    shown = {name: figures.shown_of(one.idata, budget.num_evals) for name, one in runs.items() if one is not None}
    shown = {name: one for name, one in shown.items() if one.within["posterior"].sizes["draw"] >= MIN_DRAWS}
    colours = figures.colours_of(list(outcomes))
    notes = [f"{reference_text(reference)}.", *(f"{row.kernel}: {row.note}." for row in rows if row.note)]
    chapters = [
        Chapter("table", "The table", TABLE_LEAD, Contents(tables=_tables(rows, budget, reference), notes=notes))
    ]
    if shown:
        chapters += _chapters(rows, shown, colours, budget, reference)
        if places := list(_places(run, runs, shown, reference)):
            lead = "What the chains pass through, as points or images."
            chapters.append(Chapter("places", "Where the chains go", lead, Contents(places)))
    num_seeds = max(map(len, outcomes.values()))
    seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
    seconds = f" and {budget.num_seconds:g} s" if budget.num_seconds else ""
    page = render(
        name=f"{run.path.name}: kernels side by side",
        subtitle=f"{budget.num_chains} chains for each of {seeds}; warm-up {budget.num_warmup} "
        f"steps, then {budget.num_evals} evaluations per chain{seconds}.",
        chapters=chapters,
    )
    write_atomic(run.comparison_page, page)
    return run.comparison_page


def _chapters(
    rows: Sequence[Row],
    shown: Mapping[str, figures.Shown],
    colours: figures.Colours,
    budget: Budget,
    reference: Reference,
) -> list[Chapter]:
    efficiency = [figures.bars_picture(rows, colours), figures.cost_picture(shown, colours, budget.num_seconds)]
    chains = [
        figures.energy_picture(shown, reference),
        figures.correlation_picture(shown, colours),
        figures.ranks_picture(shown),
    ]
    lead = "Which kernel draws most for its cost, and how that grows."
    trust = "Whether the chains can be trusted: an ESS is a number for chains that agree."
    return [
        Chapter("efficiency", "Efficiency", lead, Contents(efficiency)),
        Chapter("chains", "Chains", trust, Contents(chains)),
    ]


def _tables(rows: Sequence[Row], budget: Budget, reference: Reference) -> list[Table]:
    """Make the two tables; an R-hat that misses its threshold is marked."""
    misses = [i for i, row in enumerate(row for row in rows if row.num_seeds) if not row.mean.max_r_hat <= MAX_R_HAT]
    captions = ("whether to trust a kernel", "what its draws cost")
    laid_out = []
    for caption, (titles, units, *body) in zip(captions, tables(rows, budget, reference), strict=True):
        r_hats = [place for place, unit in enumerate(units) if unit == "largest"]
        header = [f"{title}\n{unit}".strip() for title, unit in zip(titles, units, strict=True)]
        laid_out.append(Table(caption, header, body, frozenset((i, place) for i in misses for place in r_hats)))
    return laid_out


def _places(
    run: Run, runs: Mapping[str, Outcome | None], shown: Mapping[str, figures.Shown], reference: Reference
) -> Iterator[Picture]:
    in_plane = {name: one for name, one in shown.items() if one.within["posterior"].get("x", default=None) is not None}
    in_plane = {name: one for name, one in in_plane.items() if one.within["posterior"]["x"].shape[-1] == 2}
    if in_plane:
        yield figures.path_picture(in_plane, reference)
    for name, one in runs.items():
        images = None if one is None else load_pictures(run, name, one.seed)
        if images is not None:
            yield figures.images_picture(name, *images)
