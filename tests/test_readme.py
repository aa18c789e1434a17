"""The Python examples of the README, then that of choose_a_kernel.md, run as they stand on a tiny run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ppl_vaebm.reports import report
from ppl_vaebm.rng import global_rng
from tests.tiny import fit_run, write_empty_report

ROOT = Path(__file__).parents[1]


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", write_empty_report)
    run = fit_run(tmp_path)
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "choose_a_kernel.md").read_text()
    example = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert '"runs/demo"' in example
    names: dict[str, object] = {}
    with global_rng(0):
        exec(example.replace('"runs/demo"', repr(str(run))), names)
    assert tuple(names["x"].shape) == (100, 2)  # type: ignore[attr-defined]
    assert {"z_1", "z_2", "x", "energy"} <= set(names["trace"].nodes)  # type: ignore[attr-defined]
    draws = names["mcmc"].get_samples(group_by_chain=True)  # type: ignore[attr-defined]
    assert all(site.shape[:2] == (8, 500) for site in draws.values())
    position = names["posterior"].packing.ravel({name: site.flatten(0, 1) for name, site in draws.items()})  # type: ignore[attr-defined]
    assert (names["posterior"].decode(position)[:, 0] == 0.5).all()  # type: ignore[attr-defined]
