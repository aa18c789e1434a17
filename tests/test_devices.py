"""Checks of a device before anything runs on it; several processes train as one does with all of their data."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ppl_vaebm import devices, fit
from ppl_vaebm.devices import (
    FIRST_ALONE,
    Process,
    check_bfloat16,
    current_process,
    has_bfloat16,
    joined,
    own_device,
    without_tf32,
)
from ppl_vaebm.errors import InputError
from ppl_vaebm.runs.run import Run
from tests.two_processes import CONFIG

ROOT = Path(__file__).parents[1]


def test_without_tf32_all_products_are_in_float32() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        without_tf32()
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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


def test_a_lone_process_is_the_first() -> None:
    with joined({}, "cpu") as process:
        assert process == Process(0, 1) == current_process()
        assert process.is_first and process.key == ()
    assert Process(3, 4).key == (3,) and not Process(3, 4).is_first


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", "cpu"), ("meta", "meta:5"), ("cpu:0", "cpu:0")],
    ids=["cpu", "accelerator", "named"],
)
def test_every_process_has_a_device(device: str, expected: str) -> None:
    environment = {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}
    assert own_device(environment, device) == expected
    assert own_device({}, device) == device


def test_one_named_accelerator_for_all_is_refused() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    with pytest.raises(InputError, match="expected a device for every process, found 'meta:1'.*--device meta"):
        own_device(environment, "meta:1")
    assert own_device(environment | {"WORLD_SIZE": "1"}, "meta:1") == "meta:1"


def test_processes_wait_for_the_first_longer_than_pytorch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one validates and writes alone; on accelerators PyTorch gives up after 10 minutes."""
    given: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda: None)
    with joined({"RANK": "0"}, "cpu"):
        pass
    assert given["timeout"] == FIRST_ALONE > timedelta(hours=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    for num in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
        command = [*torchrun, "-m", "tests.two_processes", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=300, capture_output=True)
    return folder


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(results: Path) -> None:
    alone, *together = (torch.load(results / f"gradients-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert max(float(value.abs().max()) for value in alone.values()) > 1
    for found in together:
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_half_a_batch_has_another_gradient(results: Path) -> None:
    """Negative control: what one process finds on its own share is not what the two agree on."""
    from tests.two_processes import gradients

    alone, half = torch.load(results / "gradients-1-0.pt"), gradients(Process(0, 2))
    gaps = [float((half[name] - alone[name]).abs().max() / alone[name].abs().max()) for name in alone]
    assert max(gaps) > 0.1


@pytest.mark.slow
def test_every_process_draws_noise_of_its_own(results: Path) -> None:
    noise = [torch.load(results / f"noise-2-{rank}.pt")["noise"] for rank in (0, 1)]
    assert noise[0].shape == noise[1].shape and not torch.equal(noise[0], noise[1])
    # The first process's are those of a lone one.
    assert torch.equal(noise[0], torch.load(results / "noise-1-0.pt")["noise"])


@pytest.mark.slow
def test_the_first_process_writes_the_run(results: Path) -> None:
    run = Run(results / "run-2")
    steps = [record["step"] for record in run.metrics("svi") if "loss" in record]
    assert steps == [CONFIG.svi.steps]
    assert [path.name for path in run.checkpoints("svi").iterdir()] == [f"step-{CONFIG.svi.steps:08d}"]
