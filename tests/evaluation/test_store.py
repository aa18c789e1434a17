"""Parts of an evaluation on disk: they replace their own numbers, keep others', and nothing stale stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.base import Measured, Section
from ppl_vaebm.evaluation.store import SOURCES, load_arrays, read_sections, source_of, store
from ppl_vaebm.evaluation.tables import lines
from ppl_vaebm.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def titles(run: Run) -> list[str]:
    return [title for title in read_sections(run) if title != SOURCES]


def test_a_part_replaces_its_own_numbers_and_leaves_those_of_others(run: Run) -> None:
    store(run, "samples", Measured({"distance": {"VAE": 3.0}, "old": {"a": 1}}, {"x": np.arange(3.0)}), "ab", 0)
    store(run, "likelihood", Measured({"log h": {"mean": 1.0}}, {}), "ab", 1)
    assert titles(run) == ["log h", "distance", "old"]  # in the order of the parts
    store(run, "samples", Measured({"distance": {"VAE": 2.0}}, {"x": np.arange(4.0)}), "ab", 2)
    sections = read_sections(run)
    assert titles(run) == ["log h", "distance"] and sections["distance"] == {"VAE": 2.0}
    assert source_of(sections, "distance") == {"part": "samples", "weights": "ab", "seed": "2"}
    assert source_of(sections, "log h") == {"part": "likelihood", "weights": "ab", "seed": "1"}
    arrays = load_arrays(run, "samples")
    assert arrays is not None and arrays["x"].tolist() == [0, 1, 2, 3] and load_arrays(run, "ood") is None


def test_nothing_stays_of_other_weights_or_of_unknown_origin(run: Run) -> None:
    run.evaluation_file.write_text(json.dumps({"of an earlier version": {"a": 1}}))
    store(run, "samples", Measured({"distance": {"VAE": 3.0}}, {"x": np.zeros(1)}), "ab", 0)
    store(run, "ood", Measured({"areas": {"noise": 1.0}}, {"y": np.zeros(1)}), "ab", 0)
    assert titles(run) == ["distance", "areas"]
    store(run, "ood", Measured({"areas": {"noise": 0.5}}, {"y": np.ones(1)}), "cd", 0)
    assert titles(run) == ["areas"] and load_arrays(run, "samples") is None
    arrays = load_arrays(run, "ood")
    assert arrays is not None and arrays["y"].tolist() == [1]


def test_a_part_without_arrays_takes_the_old_ones_away(run: Run) -> None:
    store(run, "samples", Measured({"distance": {"VAE": 3.0}}, {"x": np.zeros(1)}), "ab", 0)
    store(run, "samples", Measured({"distance": {"none": "no network"}}, {}), "ab", 0)
    assert load_arrays(run, "samples") is None


def test_a_failed_write_leaves_the_numbers_that_were_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store(run, "samples", Measured({"distance": {"VAE": 3.0}}, {}), "ab", 0)
    before = run.evaluation_file.read_bytes()
    monkeypatch.setattr("ppl_vaebm.files.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        store(run, "ood", Measured({"areas": {"noise": 1.0}}, {}), "ab", 0)
    assert run.evaluation_file.read_bytes() == before


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}'])
def test_a_file_of_another_form_is_refused(run: Run, text: str) -> None:
    run.evaluation_file.write_text(text)
    with pytest.raises(InputError, match="evaluate.json"):
        read_sections(run)


def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_are_json_and_come_back_as_numbers(run: Run) -> None:
    section: Section = {
        "a": math.nan,
        "b": {"value": -math.inf, "error": math.inf},
        "c": 1.5,
        "d": "no: nan nats",
        "e": 3,
    }
    shown = lines({"distance": section})
    store(run, "samples", Measured({"distance": section}, {}), "ab", 0)
    store(run, "ood", Measured({"areas": {"noise": 1.0}}, {}), "ab", 0)  # what stays is written anew
    written = json.loads(run.evaluation_file.read_text(), parse_constant=refuse)["distance"]
    assert written == {"a": "nan", "b": {"value": "-inf", "error": "inf"}, "c": 1.5, "d": "no: nan nats", "e": 3}
    found = read_sections(run)["distance"]
    assert isinstance(found["a"], float) and math.isnan(found["a"])
    assert found["b"] == {"value": -math.inf, "error": math.inf}
    assert [found[name] for name in "cde"] == [1.5, "no: nan nats", 3]
    assert lines({"distance": found}) == shown


def test_files_of_earlier_versions_have_their_own_word_for_them(run: Run) -> None:
    run.evaluation_file.write_text('{"distance": {"a": NaN, "b": {"value": -Infinity, "error": Infinity}}}')
    found = read_sections(run)["distance"]
    assert isinstance(found["a"], float) and math.isnan(found["a"])
    assert found["b"] == {"value": -math.inf, "error": math.inf}
