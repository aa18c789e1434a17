"""The sections of the report, each from the files of a run that it is about; none where they are missing."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.evaluation.base import Section as Numbers
from ppl_vaebm.evaluation.kernel_text import with_spread
from ppl_vaebm.evaluation.store import SOURCES, load_arrays, read_sections, source_of
from ppl_vaebm.evaluation.tables import TextTable, tables
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import load_netcdf
from ppl_vaebm.inference.diagnostics.coordinates import load_coordinates
from ppl_vaebm.reports import chains as figures_chains
from ppl_vaebm.reports import conditional as figures_conditional
from ppl_vaebm.reports import evaluation as figures_evaluation
from ppl_vaebm.reports import figures
from ppl_vaebm.reports import gallery as figures_svi
from ppl_vaebm.reports import samples as figures_samples
from ppl_vaebm.reports.cells import Cell, Section, Table, number_cell, value_text, without_empty_columns
from ppl_vaebm.runs.run import Run

SAMPLE_SETS = {"data": "data", "vae": "VAE", "vaebm": "VAEBM"}
"""Files of the samples folder and what to call them."""
COMPARED = {
    "kernel": "kernel",
    "adjusted": "exact",
    "max_r_hat": "R-hat\nlargest",
    "ess_per_1000_evals": "ESS per\n1000 evals",
    "ess_per_second": "ESS per\nsecond",
    "energy_bias": "bias of E\nnats",
    "modes_found": "modes\nfound",
    "divergences": "divergent\ndraws",
    "seconds": "seconds\nof draws",
    "warmup_seconds": "seconds of\nwarm-up",
}
"""Columns of the comparison that the report shows; the others are on the comparison's own page."""


def svi_section(run: Run) -> Section | None:
    """Show the curves of stage 1, and what its VAE draws."""
    records = run.metrics("svi")
    gallery = _gallery_pictures(run)
    if not records:
        return Section(gallery) if gallery else None
    curves = figures.curves_picture("curves of stage 1 over optimiser steps", records, figures.SVI_PANELS)
    return Section([curves, *gallery])


def _gallery_pictures(run: Run) -> list[figures.Picture]:
    files = {name: run.samples_dir / f"{name}.npz" for name in figures_svi.GALLERY}
    drawn = [figures_svi.gallery_pictures(name, _arrays(file)) for name, file in files.items() if file.exists()]
    return [picture for pictures in drawn for picture in pictures]


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def ebm_section(run: Run) -> Section | None:
    """Show the curves of stage 2, and count what failed."""
    records = run.metrics("ebm")
    if not records:
        return None
    picture = figures.curves_picture("curves of stage 2 over optimiser steps", records, figures.EBM_PANELS)
    return Section([picture], notes=[_failures(records), *_returns(records)])


def _failures(records: Sequence[figures.Record]) -> str:
    """Say how often numbers failed, from records that count skipped updates in all and divergent moves per step."""
    num_skipped = max(record.get("num_skipped", 0) for record in records)
    num_divergent = sum(record.get("num_divergent", 0) for record in records)
    return f"Updates skipped because their gradient was not finite: {num_skipped}. Divergent moves: {num_divergent}."


def _returns(records: Sequence[figures.Record]) -> list[str]:
    """Say where the training passed a limit and went back to a checkpoint, or stopped."""
    ends = {"rollback": "back to", "stop": "stopped, with the result of"}
    return [
        f"Step {record['step']}: {record['reason']}: {ends[record['event']]} step {record['to_step']}."
        for record in records
        if record.get("event") in ends
    ]


def samples_section(run: Run) -> Section | None:
    """Show the files of ``sample``."""
    files = {title: run.samples_dir / f"{name}.npz" for name, title in SAMPLE_SETS.items()}
    sets = {title: _arrays(file)["x"] for title, file in files.items() if file.exists()}
    if not sets:
        return None
    return Section(figures_samples.sample_pictures(sets))


def evaluation_section(run: Run) -> Section | None:
    """Show the numbers of ``evaluate``, and what its parts left to be drawn."""
    sections = read_sections(run)
    if not sections:
        return None
    shown = {title: section for title, section in sections.items() if title != SOURCES}
    pictures = []
    for part, draw in figures_evaluation.PICTURES.items():
        arrays = load_arrays(run, part)
        pictures += draw(arrays) if arrays is not None else []
    return Section(pictures, list(map(_text_table, tables(shown, value_text))), _origins(sections))


def _text_table(table: TextTable) -> Table:
    header = [Cell(""), *(Cell(name, "number") for name in table.columns)] if table.columns else []
    rows = [
        [Cell(name), *(Cell(text, "number" if _is_number(text) else "") for text in texts)]
        for name, texts in table.rows.items()
    ]
    return Table(table.title, header, rows)


def _is_number(text: str) -> bool:
    try:
        float(text.partition(" ± ")[0])
    except ValueError:
        return False
    return True


def _origins(sections: dict[str, Numbers]) -> list[str]:
    """Say with which seed which part was measured, and on which weights."""
    sources = [source_of(sections, title) for title in sections]
    found = dict.fromkeys((s["part"], s["seed"], s["weights"]) for s in sources if s is not None)
    return [f"{part}: seed {seed}, weights {weights}" for part, seed, weights in found]


def chains_section(run: Run) -> Section | None:
    """Show what ``diagnose`` found."""
    if not run.chains_file.exists():
        return None
    idata = load_netcdf(run.chains_file)
    summaries = diagnostics.summarize(idata)
    num_converged = sum(map(diagnostics.is_converged, summaries))
    caption = f"{num_converged} of {len(summaries)} functionals meet the thresholds of R-hat and ESS"
    header = [_header_cell(*column) for column in diagnostics.TABLE_HEADER]
    pictures, lines = figures_chains.chain_pictures(idata, summaries), diagnostics.run_lines(idata)
    if run.positions_file.exists():
        coordinates = load_coordinates(run.positions_file)
        pictures.append(figures_chains.coordinates_picture(coordinates.convergence))
        lines += coordinates.lines
    return Section(pictures, [without_empty_columns(Table(caption, header, list(map(_row, summaries))))], lines)


def conditioning_section(run: Run) -> Section | None:
    """Show the posterior that ``sample --given`` drew from."""
    file = run.samples_dir / "conditional.npz"
    if not file.exists():
        return None
    idata = load_netcdf(file.with_suffix(".nc"))
    summaries = diagnostics.summarize(idata)
    caption = f"{sum(map(diagnostics.is_converged, summaries))} of {len(summaries)} functionals meet the thresholds"
    header = [_header_cell(*column) for column in diagnostics.TABLE_HEADER]
    table = without_empty_columns(Table(caption, header, list(map(_row, summaries))))
    return Section([figures_conditional.conditional_picture(_arrays(file))], [table], diagnostics.run_lines(idata))


def comparison_section(run: Run) -> Section | None:
    """Show the table of ``compare``."""
    if not run.comparison_file.exists():
        return None
    with run.comparison_file.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    link = run.comparison_page.relative_to(run.path).as_posix() if run.comparison_page.exists() else ""
    if not {*COMPARED, "note"} <= set(header):  # a file of an earlier version, or of somebody else
        table = Table("kernels", [Cell(name) for name in header], [list(map(number_cell, row)) for row in rows])
        return Section(tables=[table], link=link)
    lines = [dict(zip(header, row, strict=True)) for row in rows]
    titles = [Cell(title, "" if name in ("kernel", "adjusted") else "number") for name, title in COMPARED.items()]
    table = Table("kernels", titles, [[_compared_cell(name, line) for name in COMPARED] for line in lines])
    notes = [f"{line['kernel']}: {line['note']}" for line in lines if line["note"]]
    return Section(tables=[without_empty_columns(table)], notes=notes, link=link)


def _compared_cell(name: str, line: Mapping[str, str]) -> Cell:
    """Make a cell of the comparison; what is not known of a kernel is empty."""
    if name in ("kernel", "adjusted"):
        return Cell(line[name], "name")
    value = float(line[name])
    if name == "max_r_hat":
        return Cell(diagnostics.r_hat_text(value), "number" if value <= diagnostics.MAX_R_HAT else "number bad")
    return Cell("" if math.isnan(value) else with_spread(value, float(line[f"{name}_sd"])), "number")


def _header_cell(title: str, unit: str) -> Cell:
    return Cell(f"{title}\n{unit}".strip(), "" if title == "functional" else "number")


def _row(summary: diagnostics.QuantitySummary) -> list[Cell]:
    bad = {
        "r_hat": not summary.r_hat <= diagnostics.MAX_R_HAT,
        "ess_bulk": not summary.ess_bulk >= diagnostics.MIN_ESS,
        "ess_tail": not summary.ess_tail >= diagnostics.MIN_ESS,
    }
    name, *numbers = diagnostics.table_cells(summary)
    fields = summary._fields[1:]
    return [
        Cell(name),
        *(Cell(text, "number bad" if bad.get(f) else "number") for f, text in zip(fields, numbers, strict=True)),
    ]
