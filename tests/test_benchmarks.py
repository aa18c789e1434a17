"""Every benchmark imports and describes itself; none is run."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_benchmark_is_its_docstring(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # batched_vs_pyro sets it for its process
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert not stop.value.code
    assert module.__doc__ and module.__doc__.strip() in capsys.readouterr().out


def test_make_bench_runs_the_scripts_and_none_of_their_parts() -> None:
    dry_run = subprocess.run(["make", "-n", "bench"], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    (loop,) = (line for line in dry_run.stdout.splitlines() if "for name in" in line)
    assert loop.partition(" in ")[2].partition(";")[0].split() == SCRIPTS


def test_readme_lists_every_benchmark() -> None:
    rows = [line.split("`")[1] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"{script}.py" for script in SCRIPTS]
