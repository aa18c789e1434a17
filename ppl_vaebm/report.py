"""A run as one HTML file that a stranger can read: curves, samples, numbers, chains.

Every section is built from files of the run's folder, and left out where they are missing. Pictures are
embedded, so the file can be mailed; it needs no network and no JavaScript.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from ppl_vaebm import figures, figures_chains, figures_samples, figures_svi
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference import diagnostics
from ppl_vaebm.run import Run
from ppl_vaebm.version import __version__

SAMPLE_SETS = {"data": "data", "vae": "VAE", "vaebm": "VAEBM"}
"""Files of the samples folder and what to call them."""


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

    pictures: Sequence[figures.Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


class Part(NamedTuple):
    """A place for a section, and how it comes about."""

    anchor: str
    title: str
    command: str
    """What to run to get it."""
    build: Callable[[Run], Section | None]
    """Returns ``None`` where the files are missing."""
    lead: str
    """What is shown and what good looks like."""


def write_report(run: Run) -> Path:
    """Write the report of a run from whatever files it has.

    Args:
        run: the run's folder.

    Returns:
        The path of the report.

    Raises:
        InputError: a file that the report cannot show.
    """
    sections = [(part, _built(part, run)) for part in PARTS]
    page = _template().render(
        name=run.path.name,
        version=__version__,
        config=run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else None,
        sections=[(part, section) for part, section in sections if section is not None],
        missing=[part for part, section in sections if section is None],
    )
    write_atomic(run.report_file, page)
    return run.report_file


def _built(part: Part, run: Run) -> Section | None:
    try:
        return part.build(run)
    except InputError:
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # what damaged JSON, CSV and NPZ files raise
        raise InputError(
            f"the file behind the report's section {part.title!r} in {run.path} cannot be read ({error}); "
            f"remove it, or make it again: {part.command}"
        ) from None


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


# Sections


def _svi_section(run: Run) -> Section | None:
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


def _ebm_section(run: Run) -> Section | None:
    records = run.metrics("ebm")
    if not records:
        return None
    picture = figures.curves_picture("curves of stage 2 over optimiser steps", records, figures.EBM_PANELS)
    return Section([picture], notes=[_failures(records)])


def _failures(records: Sequence[figures.Record]) -> str:
    """Say how often numbers failed, from records that count skipped updates in all and divergent moves per step."""
    num_skipped = max(record.get("num_skipped", 0) for record in records)
    num_divergent = sum(record.get("num_divergent", 0) for record in records)
    return f"Updates skipped because their gradient was not finite: {num_skipped}. Divergent moves: {num_divergent}."


def _samples_section(run: Run) -> Section | None:
    files = {title: run.samples_dir / f"{name}.npz" for name, title in SAMPLE_SETS.items()}
    sets = {title: _arrays(file)["x"] for title, file in files.items() if file.exists()}
    if not sets:
        return None
    return Section(figures_samples.sample_pictures(sets))


def _evaluation_section(run: Run) -> Section | None:
    if not run.evaluation_file.exists():
        return None
    evaluation = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    tables = [
        Table(title, [], [[Cell(name), Cell(_value_text(value), "number")] for name, value in values.items()])
        for title, values in evaluation.items()
    ]
    return Section(tables=tables)


def _chains_section(run: Run) -> Section | None:
    if not run.chains_file.exists():
        return None
    idata = diagnostics.load_netcdf(run.chains_file)
    summaries = diagnostics.summarize(idata)
    num_converged = sum(map(diagnostics.is_converged, summaries))
    caption = f"{num_converged} of {len(summaries)} functionals meet the thresholds of R-hat and ESS"
    return Section(
        figures_chains.chain_pictures(idata, summaries),
        [Table(caption, [_header_cell(*column) for column in diagnostics.TABLE_HEADER], list(map(_row, summaries)))],
        diagnostics.run_lines(idata),
    )


def _comparison_section(run: Run) -> Section | None:
    if not run.comparison_file.exists():
        return None
    with run.comparison_file.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = Table("kernels", [Cell(name) for name in header], [list(map(_csv_cell, row)) for row in rows])
    return Section(tables=[table])


PARTS = (
    Part(
        "svi",
        "Stage 1: the VAE",
        "python -m ppl_vaebm.fit --stage svi --run RUN",
        _svi_section,
        "Stage 1 fits the VAE by maximising the ELBO, a lower bound on the log-likelihood. Good: the validation "
        "curve rises, levels off and stays close to the training curve. The KL term, in all and of each latent "
        "group, is what the latents tell about x; near 0 the decoder ignores them. While the weight of the KL "
        "term warms up, the loss may rise. Under the curves stands what the fitted VAE makes of held-out data and of "
        "its prior.",
    ),
    Part(
        "ebm",
        "Stage 2: the energy",
        "python -m ppl_vaebm.fit --stage ebm --run RUN",
        _ebm_section,
        "Stage 2 learns the energy E. Good: the validation gain, which is the held-out log-likelihood of the "
        "VAEBM minus that of the VAE, rises above 0 and stays there; data and model samples get the same mean "
        "energy, so that their gap hovers around 0; the effective number of draws behind log Z does not collapse "
        "(below about 100 the gain cannot be trusted); chains accept more than half of their moves, and their "
        "noise keeps a mean square near 1. A gap that runs off is a run that blows up.",
    ),
    Part(
        "samples",
        "Samples",
        "python -m ppl_vaebm.sample RUN",
        _samples_section,
        "Data, samples of the VAE alone, and, of a run with stage 2, samples of the VAEBM; none are selected. Good: "
        "the VAEBM's cannot be told from the data, and what the VAE puts where no data are is gone.",
    ),
    Part(
        "evaluation",
        "Evaluation",
        "python -m ppl_vaebm.evaluate RUN",
        _evaluation_section,
        "What the evaluation measured on samples and held-out data. After the sign ± stands the error of a "
        "number; a difference of two numbers means something when it is several times larger than their errors.",
    ),
    Part(
        "chains",
        "Chains",
        "python -m ppl_vaebm.diagnose RUN",
        _chains_section,
        "Several chains from different starts draw from the trained VAEBM; each row of the table is one number "
        f"per draw. Good: R-hat at most {diagnostics.MAX_R_HAT} (the chains agree), effective sample sizes (ESS) "
        f"of at least {diagnostics.MIN_ESS:.0f}, no divergent draw, BFMI above {diagnostics.MIN_BFMI}; an R-hat or"
        " ESS that misses its threshold is marked. In the pictures: traces that look alike and do not drift, "
        "ranks of every chain within the grey band (it is for independent draws, so autocorrelated ones leave it "
        "now and then), autocorrelation that falls to 0, and changes of energy about as wide as the energies.",
    ),
    Part(
        "comparison",
        "Comparison of kernels",
        "python -m ppl_vaebm.compare RUN",
        _comparison_section,
        "Several kernels drew from the same target. More effective draws (ESS) per evaluation of the potential "
        "and per second are better, but only among kernels whose R-hat is close to 1: one that misses a mode can "
        "look fast.",
    ),
)
"""The sections in the order of the page."""


# Cells


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return " ± ".join(_value_text(value[key]) for key in ("value", "error") if key in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


def _csv_cell(text: str) -> Cell:
    try:
        number = float(text)
    except ValueError:
        return Cell(text)
    return Cell(text if text.lstrip("-").isdigit() else _value_text(number), "number")


def _header_cell(title: str, unit: str) -> Cell:
    return Cell(f"{title}\n{unit}".strip(), "" if title == "functional" else "number")


def _row(summary: diagnostics.FunctionalSummary) -> list[Cell]:
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
