"""Parts of an evaluation on disk: they replace their own numbers, keep others', and nothing stale stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.sections import Measured, Rows, Section, sections_text
from ppl_vaebm.evaluation.store import StoredPart, load_arrays, read_parts, store
from ppl_vaebm.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def listed(title: str, rows: Rows) -> Section:
    return Section(title, {"": rows})


DISTANCE = listed("distance", {"VAE": 3.0})
AREAS = Section("areas", {"log h": {"noise": 1.0}, "log p": {"noise": 0.5}})


def test_a_part_replaces_its_own_numbers_and_leaves_those_of_others(run: Run) -> None:
    store(run, "samples", Measured([DISTANCE, listed("old", {"a": 1})], {"x": np.arange(3.0)}), "ab", 0)
    log_h, other = listed("log h", {"mean": 1.0}), listed("distance", {"VAE": 2.0})
    store(run, "likelihood", Measured([log_h], {}), "ab", 1)
    assert list(read_parts(run)) == ["likelihood", "samples"]  # in the order of the parts
    store(run, "samples", Measured([other], {"x": np.arange(4.0)}), "ab", 2)
    assert read_parts(run) == {"likelihood": StoredPart("ab", 1, [log_h]), "samples": StoredPart("ab", 2, [other])}
    arrays = load_arrays(run, "samples")
    assert arrays is not None and arrays["x"].tolist() == [0, 1, 2, 3] and load_arrays(run, "ood") is None


def test_nothing_stays_of_other_weights_or_of_unknown_origin(run: Run) -> None:
    run.evaluation_file.write_text(json.dumps({"of an earlier version": {"a": 1}}))
    store(run, "samples", Measured([DISTANCE], {"x": np.zeros(1)}), "ab", 0)
    store(run, "ood", Measured([AREAS], {"y": np.zeros(1)}), "ab", 0)
    assert list(read_parts(run)) == ["samples", "ood"]
    store(run, "ood", Measured([AREAS], {"y": np.ones(1)}), "cd", 0)
    assert list(read_parts(run)) == ["ood"] and load_arrays(run, "samples") is None
    arrays = load_arrays(run, "ood")
    assert arrays is not None and arrays["y"].tolist() == [1]


def test_a_part_without_arrays_takes_the_old_ones_away(run: Run) -> None:
    store(run, "samples", Measured([DISTANCE], {"x": np.zeros(1)}), "ab", 0)
    store(run, "samples", Measured([listed("distance", {"none": "no network"})], {}), "ab", 0)
    assert load_arrays(run, "samples") is None


def test_a_failed_write_leaves_the_numbers_that_were_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store(run, "samples", Measured([DISTANCE], {}), "ab", 0)
    before = run.evaluation_file.read_bytes()
    monkeypatch.setattr("ppl_vaebm.files.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        store(run, "ood", Measured([AREAS], {}), "ab", 0)
    assert run.evaluation_file.read_bytes() == before


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', '{"parts": {"samples": {"seed": 0}}}'])
def test_a_file_of_another_form_is_refused(run: Run, text: str) -> None:
    run.evaluation_file.write_text(text)
    with pytest.raises(InputError, match="evaluate.json"):
        read_parts(run)


def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_are_json_and_come_back_as_numbers(run: Run) -> None:
    rows: Rows = {"a": math.nan, "b": {"value": -math.inf, "error": math.inf}, "c": 1.5, "d": "no: nan nats", "e": 3}
    section = listed("distance", rows)
    store(run, "samples", Measured([section], {}), "ab", 0)
    store(run, "ood", Measured([AREAS], {}), "ab", 0)  # what stays is written anew
    parts = json.loads(run.evaluation_file.read_text(), parse_constant=refuse)["parts"]
    assert parts["samples"]["sections"][0]["columns"][""] == {
        "a": "nan",
        "b": {"value": "-inf", "error": "inf"},
        "c": 1.5,
        "d": "no: nan nats",
        "e": 3,
    }
    (found,) = read_parts(run)["samples"].sections
    assert math.isnan(float(str(found.columns[""]["a"]))) and found.columns[""]["b"] == rows["b"]
    assert [found.columns[""][name] for name in "cde"] == [1.5, "no: nan nats", 3]
    assert sections_text([found]) == sections_text([section])


def test_files_of_earlier_versions_are_read(run: Run) -> None:
    sources = {"distance [net], 9 samples": "samples, weights 1f, seed -3", "areas": "ood, weights 1f, seed 0"}
    old = {"distance [net], 9 samples": {"VAE": 2.0}, "areas": {"noise": 1.0}, "where these numbers come from": sources}
    run.evaluation_file.write_text(json.dumps(old))
    samples = StoredPart("1f", -3, [listed("distance [net], 9 samples", {"VAE": 2.0})])
    assert read_parts(run) == {"samples": samples, "ood": StoredPart("1f", 0, [listed("areas", {"noise": 1.0})])}
    store(run, "ood", Measured([AREAS], {}), "1f", 0)
    assert read_parts(run) == {"samples": samples, "ood": StoredPart("1f", 0, [AREAS])}


def test_results_under_the_old_name_of_a_part_are_read(run: Run) -> None:
    section = {"title": "log Z", "columns": {"": {"middle": 1.5}}}
    old = {"parts": {"normaliser": {"weights": "ab", "seed": 3, "sections": [section]}}}
    run.evaluation_file.write_text(json.dumps(old))
    assert read_parts(run) == {"log-z": StoredPart("ab", 3, [listed("log Z", {"middle": 1.5})])}
    store(run, "ood", Measured([AREAS], {}), "ab", 0)
    assert list(read_parts(run)) == ["log-z", "ood"]


def test_bare_non_finite_numbers_of_earlier_versions_are_read(run: Run) -> None:
    run.evaluation_file.write_text('{"distance": {"a": NaN, "b": {"value": -Infinity, "error": Infinity}}}')
    ((part,),) = (found.sections for found in read_parts(run).values())
    assert math.isnan(float(str(part.columns[""]["a"]))) and part.columns[""]["b"] == {
        "value": -math.inf,
        "error": math.inf,
    }
