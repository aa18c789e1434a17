"""What is asked of a device before anything runs on it."""

from __future__ import annotations

import pytest

from ppl_vaebm import devices, fit
from ppl_vaebm.devices import check_bfloat16, has_bfloat16
from ppl_vaebm.errors import InputError


def test_a_cpu_that_emulates_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: device != "cpu")
    with pytest.raises(InputError, match=r"for ebm.bf16, found a CPU without: set --ebm.no-bf16"):
        check_bfloat16("cpu", "ebm.bf16")
    check_bfloat16("cuda", "ebm.bf16")


def test_accelerators_have_it() -> None:
    assert has_bfloat16("cuda:1") and isinstance(has_bfloat16("cpu"), bool)


@pytest.mark.parametrize("stage", ["svi", "ebm"])
def test_fit_asks_for_the_stage_it_fits(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    with pytest.raises(SystemExit) as stopped:
        fit.main(["--run", str(tmp_path), "--stage", stage, f"--{stage}.bf16"])
    assert stopped.value.code == 2 and f"--{stage}.no-bf16" in capsys.readouterr().err
