from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from ppl_vaebm.errors import InputError
from ppl_vaebm.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_of_a_run() -> None:
    run = Run(Path("r"))
    assert (run.config_file, run.metrics_file) == (Path("r/config.yaml"), Path("r/metrics.jsonl"))
    assert run.checkpoints("ebm") == Path("r/checkpoints/ebm")
    assert (run.samples_dir, run.chains_file) == (Path("r/samples"), Path("r/chains.nc"))
    assert (run.report_file, run.evaluation_file) == (Path("r/report.html"), Path("r/evaluate.json"))
    assert run.comparison_file == Path("r/compare.csv")


def test_create_makes_an_empty_folder_and_takes_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    assert Run.create(str(path)) == Run(path)
    assert entries(path) == []
    (path / "config.yaml").write_text("seed: 0\n")
    assert Run.create(path) == Run(path)
    assert (path / "config.yaml").read_text() == "seed: 0\n"


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_create_refuses_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="found a file; name another folder"):
        Run.create(tmp_path / name)
    assert (tmp_path / "file").read_text() == "text"


def test_create_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    # Too long a name fails for every user; a test as root could not lack a permission.
    with pytest.raises(InputError, match="found: File name too long; name another folder"):
        Run.create(tmp_path / ("x" * 300))


def test_create_refuses_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with pytest.raises(InputError, match="found that .* cannot; change its permissions"):
        Run.create(tmp_path)
    assert Run.create(tmp_path / "other") == Run(tmp_path / "other")


def test_open_takes_a_folder_with_a_configuration(run: Run) -> None:
    run.config_file.write_text("seed: 0\n")
    assert Run.open(run.path) == run
    assert Run.open(str(run.path)) == run


@pytest.mark.parametrize(("name", "found"), [("none", "nothing"), ("file", "a file"), ("run", "a folder without one")])
def test_open_says_what_is_missing_and_how_to_make_it(run: Run, name: str, found: str) -> None:
    folder = run.path.parent
    (folder / "file").write_text("text")
    with pytest.raises(InputError) as caught:
        Run.open(folder / name)
    assert str(caught.value) == (
        f"expected a run, that is a folder with config.yaml, at {folder / name}, found {found}; "
        f"make one with: python -m ppl_vaebm.fit --stage svi --run {folder / name}"
    )
    assert entries(folder) == ["file", "run"]


def test_open_quotes_the_path_in_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--run '.*/my run'$"):
        Run.open(tmp_path / "my run")


def test_metrics_come_back_exactly(run: Run) -> None:
    first: dict[str, float | int | str] = {"stage": "svi", "step": 1, "loss": 0.1 + 0.2, "note": 'a "b"\nc ä'}
    second: dict[str, float | int | str] = {"stage": "ebm", "step": 1, "tiny": 5e-324, "big": 10**20}
    assert run.metrics() == []
    run.log(first)
    run.log(second)
    assert run.metrics() == [first, second]
    assert run.metrics("ebm") == [second]
    assert run.metrics("none") == []
    assert isinstance(run.metrics()[0]["step"], int)
    assert run.metrics_file.read_bytes().count(b"\n") == 2


def test_numbers_that_are_not_finite_are_strings_in_the_file_and_numbers_again_when_read(run: Run) -> None:
    run.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float64("nan"), "e": 1.5})
    text = run.metrics_file.read_text()
    assert text == '{"a": "nan", "b": "inf", "c": "-inf", "d": "nan", "e": 1.5}\n'
    assert json.loads(text)["a"] == "nan"
    (record,) = run.metrics()
    assert math.isnan(record["a"]) and math.isnan(record["d"])
    assert (record["b"], record["c"], record["e"]) == (math.inf, -math.inf, 1.5)


def test_torn_last_line_is_ignored_and_does_not_spoil_the_next_record(run: Run) -> None:
    run.log({"step": 1})
    with run.metrics_file.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.log({"step": 3})
    assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_torn_only_line_is_ignored_and_replaced(run: Run) -> None:
    run.metrics_file.write_bytes(b'{"st')
    assert run.metrics() == []
    run.log({"step": 3})
    assert run.metrics_file.read_bytes() == b'{"step": 3}\n'


@pytest.mark.parametrize("bad", [b'{"step": 2, "lo', b"", b"[1]", b'{"a": NaN}', b'{"a": "\xff"}'])
def test_any_other_bad_line_is_refused_with_its_number(run: Run, bad: bytes) -> None:
    content = b'{"step": 1}\n' + bad + b'\n{"step": 3}\n'
    run.metrics_file.write_bytes(content)
    with pytest.raises(InputError, match="in line 2; correct or delete that line"):
        run.metrics()
    with pytest.raises(InputError, match="in line 2"):
        run.rewind_metrics("svi", 0)
    assert run.metrics_file.read_bytes() == content


def test_bad_last_line_that_is_not_torn_is_refused(run: Run) -> None:
    run.metrics_file.write_bytes(b'{"step": 1}\n{"step"\n')
    with pytest.raises(InputError, match="in line 2"):
        run.metrics()


def test_rewinding_drops_the_later_records_of_that_stage_only(run: Run) -> None:
    kept = b'{"stage":"svi","step":10,"x":1e0}\n'
    run.metrics_file.write_bytes(
        kept
        + b'{"stage": "svi", "step": 11}\n'
        + b'{"stage": "ebm", "step": 11}\n'
        + b'{"stage": "svi"}\n'
        + b'{"stage": "svi", "step": 12'
    )
    run.rewind_metrics("svi", 10)
    expected = kept + b'{"stage": "ebm", "step": 11}\n{"stage": "svi"}\n'
    assert run.metrics_file.read_bytes() == expected
    assert entries(run.path) == ["metrics.jsonl"]


def test_interrupted_and_resumed_record_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = Run.create(tmp_path / "whole"), Run.create(tmp_path / "resumed")
    for step in range(1, 6):
        whole.log({"stage": "svi", "step": step, "loss": 1 / step})
    for step in (1, 2, 3):
        resumed.log({"stage": "svi", "step": step, "loss": 1 / step})
    resumed.rewind_metrics("svi", 2)
    for step in (3, 4, 5):
        resumed.log({"stage": "svi", "step": step, "loss": 1 / step})
    assert resumed.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_rewinding_without_a_record_makes_none(run: Run) -> None:
    run.rewind_metrics("svi", 0)
    assert entries(run.path) == []


def test_rewinding_that_fails_keeps_the_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log({"stage": "svi", "step": 1})
    before = run.metrics_file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        run.rewind_metrics("svi", 0)
    assert run.metrics_file.read_bytes() == before


def test_arrays_come_back_exactly(run: Run) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = run.save_npz("step-8", x=x, seed=np.array([1, 2], dtype=np.int64))
    assert path == run.samples_dir / "step-8.npz"
    with np.load(path) as stored:
        assert sorted(stored.files) == ["seed", "x"]
        assert stored["x"].dtype == np.float32 and np.array_equal(stored["x"], x)
        assert stored["seed"].dtype == np.int64 and stored["seed"].tolist() == [1, 2]
    before = path.read_bytes()
    run.save_npz("step-8", x=x, seed=np.array([1, 2], dtype=np.int64))
    assert path.read_bytes() == before
    assert entries(run.samples_dir) == ["step-8.npz"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "."])
def test_arrays_are_refused_outside_the_folder_of_samples(run: Run, name: str) -> None:
    with pytest.raises(InputError, match="expected a plain name"):
        run.save_npz(name, x=np.zeros(1))
    assert entries(run.path) == []


def test_arrays_of_objects_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        run.save_npz("a", x=np.array([{}], dtype=object))
    assert entries(run.path) == []
