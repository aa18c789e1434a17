"""The chapters of a run's report, each from the files that it is about; ``None`` where they are missing."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.evaluation.kernel_table import with_spread
from ppl_vaebm.evaluation.sections import table_cells
from ppl_vaebm.evaluation.store import load_arrays, read_parts
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import load_netcdf
from ppl_vaebm.inference.diagnostics.coordinates import load_coordinates
from ppl_vaebm.reports import chains, evaluation, figures, gallery, samples
from ppl_vaebm.reports.html import Contents, Table
from ppl_vaebm.runs.run import Run

SAMPLE_SETS = {"data": "data", "vae": "VAE", "vaebm": "VAEBM"}
"""Files of the samples folder, with their titles."""
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


def svi_contents(run: Run) -> Contents | None:
    """Show the curves of stage 1, and reconstructions and samples of its VAE."""
    records = run.metrics("svi")
    title = "curves of stage 1 over optimiser steps"
    pictures = [figures.curves_picture(title, records, figures.SVI_PANELS)] if records else []
    for name in gallery.GALLERY:
        if (file := run.samples_dir / f"{name}.npz").exists():
            pictures += gallery.gallery_pictures(name, _arrays(file))
    return Contents(pictures) if pictures else None


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def ebm_contents(run: Run) -> Contents | None:
    """Show the curves of stage 2, and count failures."""
    records = run.metrics("ebm")
    if not records:
        return None
    picture = figures.curves_picture("curves of stage 2 over optimiser steps", records, figures.EBM_PANELS)
    # Records count skipped updates in all, and divergent moves per step.
    num_skipped = max(record.get("num_skipped", 0) for record in records)
    num_divergent = sum(record.get("num_divergent", 0) for record in records)
    failures = (
        f"Updates skipped because their gradient was not finite: {num_skipped}. Divergent moves: {num_divergent}."
    )
    return Contents([picture], notes=[failures, *_returns(records)])


def _returns(records: Sequence[figures.Record]) -> list[str]:
    """Describe where the training passed a limit and returned to a checkpoint, or stopped."""
    ends = {"rollback": "back to", "stop": "stopped, with the result of"}
    return [
        f"Step {record['step']}: {record['reason']}: {ends[record['event']]} step {record['to_step']}."
        for record in records
        if record.get("event") in ends
    ]


def samples_contents(run: Run) -> Contents | None:
    """Show the files of ``sample``."""
    files = {title: run.samples_dir / f"{name}.npz" for name, title in SAMPLE_SETS.items()}
    sets = {title: _arrays(file)["x"] for title, file in files.items() if file.exists()}
    return Contents(samples.sample_pictures(sets)) if sets else None


def evaluation_contents(run: Run) -> Contents | None:
    """Show the numbers and the pictures of ``evaluate``."""
    parts = read_parts(run)
    if not parts:
        return None
    pictures = []
    for part, draw in evaluation.PICTURES.items():
        arrays = load_arrays(run, part)
        pictures += draw(arrays) if arrays is not None else []
    tables = [
        Table(section.title, *table_cells(section, _measured_text))
        for part in parts.values()
        for section in part.sections
    ]
    origins = [f"{name}: seed {part.seed}, weights {part.weights}" for name, part in parts.items() if part.weights]
    return Contents(pictures, tables, origins)


def _measured_text(value: object) -> str:
    """Write a number to five digits, or to those that its error determines; anything else as it is."""
    if isinstance(value, Mapping):
        if 0 < value.get("error", 0) < math.inf:
            return with_spread(value["value"], value["error"])
        value = value["value"]
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


def chains_contents(run: Run) -> Contents | None:
    """Show the chains of ``diagnose``."""
    if not run.chains_file.exists():
        return None
    idata = load_netcdf(run.chains_file)
    summaries = diagnostics.summarize(idata)
    pictures, lines = chains.chain_pictures(idata, summaries), diagnostics.run_lines(idata)
    if run.positions_file.exists():
        coordinates = load_coordinates(run.positions_file)
        pictures.append(chains.coordinates_picture(coordinates.convergence))
        lines += coordinates.lines
    return Contents(pictures, [_diagnostics_table(summaries)], lines)


def conditioning_contents(run: Run) -> Contents | None:
    """Show the posterior that ``sample --given`` drew from."""
    file = run.samples_dir / "conditional.npz"
    if not file.exists():
        return None
    idata = load_netcdf(file.with_suffix(".nc"))
    table = _diagnostics_table(diagnostics.summarize(idata))
    return Contents([samples.conditional_picture(_arrays(file))], [table], diagnostics.run_lines(idata))


def _diagnostics_table(summaries: Sequence[diagnostics.QuantitySummary]) -> Table:
    """Make the table of all quantities, with the R-hats and ESS that miss their threshold marked."""
    header = ["\n".join(column).strip() for column in diagnostics.TABLE_HEADER]
    rows = list(map(diagnostics.table_cells, summaries))
    header, *rows = diagnostics.without_empty_columns([header, *rows], num_header=1)
    misses = {
        (place, header.index(title))
        for place, summary in enumerate(summaries)
        for title, is_good in (
            ("R-hat", summary.r_hat <= diagnostics.MAX_R_HAT),
            ("ESS bulk\ndraws", summary.ess_bulk >= diagnostics.MIN_ESS),
            ("ESS tail\ndraws", summary.ess_tail >= diagnostics.MIN_ESS),
        )
        if not is_good
    }
    num_converged = sum(map(diagnostics.is_converged, summaries))
    caption = f"{num_converged} of {len(summaries)} quantities meet the thresholds of R-hat and ESS"
    return Table(caption, header, rows, frozenset(misses))


def comparison_contents(run: Run) -> Contents | None:
    """Show the table of ``compare``; columns that its version did not have are left out."""
    if not run.comparison_file.exists():
        return None
    with run.comparison_file.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file, strict=True))
    header = [title for name, title in COMPARED.items() if lines and name in lines[0]]
    rows = [[_compared_text(name, line) for name in COMPARED if name in line] for line in lines]
    header, *rows = diagnostics.without_empty_columns([header, *rows], num_header=1)
    misses = {
        (i, header.index(COMPARED["max_r_hat"]))
        for i, line in enumerate(lines)
        if "max_r_hat" in line and not float(line["max_r_hat"]) <= diagnostics.MAX_R_HAT
    }
    notes = [f"{line['kernel']}: {line['note']}" for line in lines if line.get("note")]
    link = run.comparison_page.relative_to(run.path).as_posix() if run.comparison_page.exists() else ""
    return Contents(tables=[Table("kernels", header, rows, frozenset(misses))], notes=notes, link=link)


def _compared_text(name: str, line: dict[str, str]) -> str:
    """Write a cell of the comparison; an unknown number is empty."""
    if name in ("kernel", "adjusted"):
        return line[name]
    value = float(line[name])
    if name == "max_r_hat":
        return diagnostics.r_hat_text(value)
    return "" if math.isnan(value) else with_spread(value, float(line.get(f"{name}_sd", "nan")))
