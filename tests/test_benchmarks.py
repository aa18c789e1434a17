"""Every benchmark imports and describes itself; none is run."""

from __future__ import annotations

import importlib
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


def test_readme_lists_every_benchmark() -> None:
    rows = [line.split("`")[1] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"{script}.py" for script in SCRIPTS]
