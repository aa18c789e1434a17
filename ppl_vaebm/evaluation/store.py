"""Results of an evaluation in the run's folder: sections in evaluate.json, and arrays for the report's pictures.

Results stay until the weights change or their part is measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppl_vaebm.config.evaluation import OLD_NAMES, PARTS
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.sections import Arrays, Measured, Section
from ppl_vaebm.files import write_atomic
from ppl_vaebm.runs.run import Run, from_json, to_json

OLD_SOURCES = "where these numbers come from"
"""Key of the sources in files that were written before sections had parts."""


class StoredPart(NamedTuple):
    """Sections of one part, and what they were measured with."""

    weights: str
    """Fingerprint of the weights; empty where an old file does not have it."""
    seed: int
    sections: list[Section]


def read_parts(run: Run) -> dict[str, StoredPart]:
    """Read the results of a run by part; none where it has no file.

    Numbers that are not finite come back as such.

    Raises:
        InputError: the file has another form.
    """
    if not run.evaluation_file.exists():
        return {}
    try:
        stored = _map_leaves(json.loads(run.evaluation_file.read_text(encoding="utf-8")), from_json)
        parts = stored["parts"] if "parts" in stored else _parts_of_old_file(stored)
        return {OLD_NAMES.get(name, name): _part(**part) for name, part in parts.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"expected sections of numbers in {run.evaluation_file}, found something else; remove it"
        ) from error


def _part(weights: str, seed: int, sections: list[dict[str, Any]]) -> StoredPart:
    return StoredPart(weights, seed, [Section(**section) for section in sections])


def _parts_of_old_file(stored: dict[str, Any]) -> dict[str, Any]:
    """Convert ``{title: rows}`` with sources such as ``samples, weights 1f, seed 0``; every section has one column."""
    parts: dict[str, Any] = {}
    sources = stored.pop(OLD_SOURCES, {})
    for title, rows in stored.items():
        name, weights, seed = [
            *sources.get(title, "").replace(" weights ", "").replace(" seed ", "").split(","),
            *"  ",
        ][:3]
        part = parts.setdefault(name, {"weights": weights.strip(), "seed": int(seed.strip() or 0), "sections": []})
        part["sections"].append({"title": title, "columns": {"": dict(rows)}})
    return parts


def _map_leaves(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_leaves(inner, change) for key, inner in value.items()}
    return [_map_leaves(inner, change) for inner in value] if isinstance(value, list) else change(value)


def store(run: Run, part: str, measured: Measured, weights: str, seed: int) -> None:
    """Replace a part's results, and drop all that are of other weights."""
    kept = {name: old for name, old in read_parts(run).items() if old.weights == weights and name != part}
    parts = kept | {part: StoredPart(weights, seed, measured.sections)}
    written = {
        name: {**parts[name]._asdict(), "sections": [section._asdict() for section in parts[name].sections]}
        for name in PARTS
        if name in parts
    }
    # Arrays go before their numbers change and come after, so that no picture is of other numbers than its table.
    for other in {*PARTS} - {*kept}:
        _arrays_file(run, other).unlink(missing_ok=True)
    text = json.dumps({"parts": _map_leaves(written, to_json)}, indent=2, allow_nan=False)
    write_atomic(run.evaluation_file, text + "\n")
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
    """Return the file of a part's arrays; it lies among the samples, which a new stage removes."""
    return run.samples_dir / f"evaluation_{part}.npz"
