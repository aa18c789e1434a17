"""A run as one HTML file that a stranger can read: curves, samples, numbers, chains.

Every section is built from files of the run's folder, and left out where they are missing. Pictures are
embedded, so the file can be mailed; it needs no network and no JavaScript.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jinja2
import numpy as np
from numpy.typing import NDArray

from ppl_vaebm import figures, figures_chains, figures_conditional, figures_samples, figures_svi
from ppl_vaebm.comparison_text import with_spread
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference import diagnostics, diagnostics_text
from ppl_vaebm.inference.coordinates import load_coordinates
from ppl_vaebm.run import Run
from ppl_vaebm.version import __version__

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
    link: str = ""
    """Path, from the run's folder, of a page with more; none if empty."""


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
    page = render(
        name=run.path.name,
        subtitle="Report of a run.",
        config=run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else None,
        sections=[(part, section) for part, section in sections if section is not None],
        missing=[part for part, section in sections if section is None],
    )
    write_atomic(run.report_file, page)
    return run.report_file


class Heading(Protocol):
    """What a page says of a section before its contents: a :class:`Part`, or something like it."""

    @property
    def anchor(self) -> str:
        """Its name in links."""
        ...

    @property
    def title(self) -> str:
        """Its title."""
        ...

    @property
    def lead(self) -> str:
        """What is shown and what good looks like."""
        ...


def render(
    name: str,
    subtitle: str,
    sections: Sequence[tuple[Heading, Section]],
    missing: Sequence[Part] = (),
    config: str | None = None,
) -> str:
    """Make a page.

    Args:
        name: its title.
        subtitle: one line on what it is.
        sections: in their order.
        missing: those that the page says how to get.
        config: the run's configuration, to unfold.

    Returns:
        HTML.
    """
    return _template().render(
        name=name, subtitle=subtitle, version=__version__, config=config, sections=sections, missing=missing
    )


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
    header = [_header_cell(*column) for column in diagnostics_text.TABLE_HEADER]
    pictures, lines = figures_chains.chain_pictures(idata, summaries), diagnostics_text.run_lines(idata)
    if run.positions_file.exists():
        coordinates = load_coordinates(run.positions_file)
        pictures.append(figures_chains.coordinates_picture(coordinates.found))
        lines += coordinates.lines
    return Section(pictures, [_without_empty_columns(Table(caption, header, list(map(_row, summaries))))], lines)


def _conditioning_section(run: Run) -> Section | None:
    file = run.samples_dir / "conditional.npz"
    if not file.exists():
        return None
    idata = diagnostics.load_netcdf(file.with_suffix(".nc"))
    summaries = diagnostics.summarize(idata)
    caption = f"{sum(map(diagnostics.is_converged, summaries))} of {len(summaries)} functionals meet the thresholds"
    header = [_header_cell(*column) for column in diagnostics_text.TABLE_HEADER]
    table = _without_empty_columns(Table(caption, header, list(map(_row, summaries))))
    return Section([figures_conditional.conditional_picture(_arrays(file))], [table], diagnostics_text.run_lines(idata))


def _without_empty_columns(table: Table) -> Table:
    kept = [index for index in range(len(table.header)) if any(row[index].text for row in table.rows)]
    rows = [[row[index] for index in kept] for row in table.rows]
    return Table(table.caption, [table.header[index] for index in kept], rows)


def _comparison_section(run: Run) -> Section | None:
    if not run.comparison_file.exists():
        return None
    with run.comparison_file.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    link = run.comparison_page.relative_to(run.path).as_posix() if run.comparison_page.exists() else ""
    if not {*COMPARED, "note"} <= set(header):  # a file of an earlier version, or of somebody else
        table = Table("kernels", [Cell(name) for name in header], [list(map(_csv_cell, row)) for row in rows])
        return Section(tables=[table], link=link)
    lines = [dict(zip(header, row, strict=True)) for row in rows]
    titles = [Cell(title, "" if name in ("kernel", "adjusted") else "number") for name, title in COMPARED.items()]
    table = Table("kernels", titles, [[_compared_cell(name, line) for name in COMPARED] for line in lines])
    notes = [f"{line['kernel']}: {line['note']}" for line in lines if line["note"]]
    return Section(tables=[_without_empty_columns(table)], notes=notes, link=link)


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
        "conditioning",
        "Conditioning",
        "python -m ppl_vaebm.sample RUN --given IMAGE --mask MASK",
        _conditioning_section,
        "The posterior of x given a part of it, exactly or with noise, or given a blurred or coarser x: the mean, the "
        "standard deviation and the R-hat of every value, and draws. Good: R-hat at most "
        f"{diagnostics.MAX_R_HAT} everywhere; until then mean and standard deviation are those of the chains and not "
        "of the posterior. In the table, energy is E(x), misfit is minus the log-likelihood of what was observed, and "
        "value is a value of x that was not.",
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
        "Several kernels drew from the same target, each with the same evaluations of the energy. More effective "
        "draws (ESS) per evaluation and per second are better, but only among kernels whose R-hat is close to 1: one "
        "that misses a mode can look fast. A kernel that is not exact has no Metropolis test, and its step biases its "
        "draws. After the sign ± stands the standard deviation over seeds.",
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


def _compared_cell(name: str, line: Mapping[str, str]) -> Cell:
    """Make a cell of the comparison; what is not known of a kernel is empty."""
    if name in ("kernel", "adjusted"):
        return Cell(line[name], "name")
    value = float(line[name])
    if name == "max_r_hat":
        return Cell(diagnostics_text.r_hat_text(value), "number" if value <= diagnostics.MAX_R_HAT else "number bad")
    return Cell("" if math.isnan(value) else with_spread(value, float(line[f"{name}_sd"])), "number")


def _header_cell(title: str, unit: str) -> Cell:
    return Cell(f"{title}\n{unit}".strip(), "" if title == "functional" else "number")


def _row(summary: diagnostics.FunctionalSummary) -> list[Cell]:
    bad = {
        "r_hat": not summary.r_hat <= diagnostics.MAX_R_HAT,
        "ess_bulk": not summary.ess_bulk >= diagnostics.MIN_ESS,
        "ess_tail": not summary.ess_tail >= diagnostics.MIN_ESS,
    }
    name, *numbers = diagnostics_text.table_cells(summary)
    fields = summary._fields[1:]
    return [
        Cell(name),
        *(Cell(text, "number bad" if bad.get(f) else "number") for f, text in zip(fields, numbers, strict=True)),
    ]
