"""What an evaluation leaves in the run's folder: sections in evaluate.json, and arrays for the report's pictures.

Parts can be measured in different calls. Numbers stay as long as they are of the same weights, and until their part is
measured again; the file says of every section where it comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ppl_vaebm.config.evaluation import PARTS
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.base import Arrays, Measured, Section
from ppl_vaebm.files import write_atomic
from ppl_vaebm.runs.run import Run, from_json, to_json

SOURCES = "where these numbers come from"
"""Title of the section that names part, weights and seed of every other section."""
SOURCE = re.compile(r"(?P<part>[\w-]+), weights (?P<weights>[0-9a-f]+), seed (?P<seed>-?\d+)")


def read_sections(run: Run) -> dict[str, Section]:
    """Read the sections that a run has; none where it has no file.

    Numbers that are not finite come back as such, also from files of earlier versions, which had them as NaN and
    Infinity.

    Raises:
        InputError: the file is not JSON of that form.
    """
    if not run.evaluation_file.exists():
        return {}
    try:
        sections = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    except ValueError:
        sections = None
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise InputError(f"expected sections of numbers in {run.evaluation_file}, found something else; remove it")
    return {title: _mapped(section, from_json) for title, section in sections.items()}


def _mapped(section: Section, change: Callable[[Any], Any]) -> Section:
    """Change every number and text of a section, values and errors too."""
    return {
        name: {key: change(value) for key, value in cell.items()} if isinstance(cell, dict) else change(cell)
        for name, cell in section.items()
    }


def source_of(sections: dict[str, Section], title: str) -> dict[str, str] | None:
    """Say which part, weights and seed a section is of; ``None`` where the file does not tell."""
    found = SOURCE.fullmatch(str(sections.get(SOURCES, {}).get(title, "")))
    return found.groupdict() if found else None


def store(run: Run, part: str, measured: Measured, weights: str, seed: int) -> None:
    """Put a part's numbers in the place of those that it had, and drop all that are of other weights.

    Args:
        run: the run.
        part: one of :data:`~ppl_vaebm.evaluation_base.PARTS`.
        measured: its sections and arrays.
        weights: fingerprint of what was measured.
        seed: of the draws.
    """
    old = read_sections(run)
    sources = {title: source for title in old if (source := source_of(old, title)) is not None}
    kept = {title: s for title, s in sources.items() if s["weights"] == weights and s["part"] != part}
    new = {title: {"part": part, "weights": weights, "seed": str(seed)} for title in measured.sections}
    found = sorted((kept | new).items(), key=lambda item: PARTS.index(item[1]["part"]))
    sections = {title: measured.sections.get(title) or old[title] for title, _ in found}
    sections[SOURCES] = {title: f"{s['part']}, weights {s['weights']}, seed {s['seed']}" for title, s in found}
    # Arrays go before their numbers change and come after, so no picture is of other numbers than its table.
    for other in {*PARTS} - {s["part"] for s in kept.values()}:
        _arrays_file(run, other).unlink(missing_ok=True)
    written = {title: _mapped(section, to_json) for title, section in sections.items()}
    write_atomic(run.evaluation_file, json.dumps(written, indent=2, allow_nan=False) + "\n")
    if measured.arrays:
        run.save_npz(_arrays_file(run, part).stem, **measured.arrays)


def load_arrays(run: Run, part: str) -> Arrays | None:
    """Read a part's arrays; ``None`` where it has none."""
    path = _arrays_file(run, part)
    if not path.exists():
        return None
    with np.load(path) as file:
        return dict(file)


def _arrays_file(run: Run, part: str) -> Path:
    """Say where a part's arrays lie: among the samples, where a new stage clears them away."""
    return run.samples_dir / f"evaluation_{part}.npz"
