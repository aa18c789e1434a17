"""NVAE through the commands: both stages, what they write, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vaebm import evaluate, fit, sample
from ppl_vaebm.evaluation.metrics import features
from ppl_vaebm.evaluation.metrics.classifier import load_or_train
from ppl_vaebm.inference import sampling
from ppl_vaebm.models import nvae_cells
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.loading import load_run
from ppl_vaebm.runs.run import Run
from tests.tiny import IMAGES, copy_run, fit_run

MIXTURE = """
threads: 1
data: digits
model:
  kind: nvae
  nvae: {channels: 2, num_latents: 1, num_scales: 2, groups_per_scale: 2, encoder_cells: 1, decoder_cells: 1,
    pre_cells: 1, post_cells: 1, num_flows: 1, decoder: logistic-mixture, num_mixtures: 2}
svi: {epochs: 0.05, batch_size: 16, optimizer: adamax, epsilon: 0.001, warmup_epochs: 0.02, kl_warmup_share: 0.5,
  kl_balance: true, spectral_penalty: 0.01, validate_every: 2, checkpoint_every: 2, norm_temperature: 1.0,
  norm_batches: 2, log_every: 1}
energy: {channels: 2}
ebm: {objective: mle, steps: 3, batch_size: 8, num_importance: 16, replay_size: 16, replay_probability: 0.9,
  num_transitions: 2, energy_l2: 0.01, validate_every: 2, checkpoint_every: 2, num_validation_draws: 200}
kernel: {name: mala}
sampling: {kernel: {name: mala}, num_steps: 3}
"""
NVAE = ["--model.kind", "nvae", "--model.nvae.channels", "2", "--model.nvae.groups-per-scale", "1"]


pytestmark = pytest.mark.usefixtures("blank_pictures", "quick_reports")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("mixture"), MIXTURE)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run fit where it must refuse, with one sentence and status 2."""
    with pytest.raises(SystemExit) as stop:
        fit.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_both_stages_run_on_a_mixture_decoder(mixture: Path) -> None:
    run = Run(mixture)
    records = [record for record in run.metrics("svi") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]  # 0.05 epochs of 78 steps
    assert {f"kl_nats/z_{group}" for group in (1, 2, 3, 4)} <= records[-1].keys()
    gaps = [record["energy_gap"] for record in run.metrics("ebm") if "energy_gap" in record]
    assert len(gaps) == 3 and np.isfinite(gaps).all()


def test_stage_two_takes_the_batch_statistics_that_it_is_told_to(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.load(Run(mixture).checkpoints("svi"), "best")
    of_training = {name: saved.weights["vae_average"][f"model.{name}"] for name in saved.weights["prior_statistics"]}
    assert saved.state["norm_temperature"] == 1.0 and len(of_training) > 10

    def statistics(run: Path) -> dict[str, torch.Tensor]:
        state = load_run(run).vaebm.vae.model.state_dict()
        return {name: state[name] for name in of_training}

    def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert agree(statistics(mixture), of_training)
    run = tmp_path / "run"
    shutil.copytree(mixture, run)
    fit.main(["--stage", "ebm", "--run", str(run), "--overwrite", "--ebm.prior-statistics"])
    assert agree(statistics(run), saved.weights["prior_statistics"])
    assert not agree(statistics(run), of_training)
    without = tmp_path / "without"
    without.mkdir()
    other = str(fit_run(without, IMAGES))
    error = refusal(["--stage", "ebm", "--run", other, "--overwrite", "--ebm.prior-statistics"], capsys)
    assert "batch statistics of prior samples" in error and "--svi.norm-temperature" in error


def test_a_loaded_run_normalises_no_weights(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    potential = load_run(mixture).potential
    monkeypatch.delattr(nvae_cells, "normalized")
    assert potential(torch.zeros(2, potential.packing.dim)).shape == (2,)


def test_it_is_sampled_and_evaluated(
    mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is measured does not matter here, so little is spent on it.
    monkeypatch.setattr(features, "load_or_train", partial(load_or_train, steps=2))
    monkeypatch.setattr(sampling, "NUM_PILOT_STEPS", 3)
    monkeypatch.setattr(sampling, "BLOCK", 20)
    sample.main([str(mixture), "--num", "5"])
    assert np.load(mixture / "samples" / "vaebm.npz")["x"].shape == (5, 1, 8, 8)
    effort = ["--num-test", "10", "--num-importance", "4", "--num-z-draws", "100", "--num-samples", "30"]
    effort += ["--steps", "2"]
    evaluate.main([str(mixture), *effort])
    text = capsys.readouterr().out
    assert "log h - log p" in text and "bits per dimension" in text


def test_a_killed_stage_goes_on_to_the_same_end(mixture: Path, tmp_path: Path) -> None:
    again = copy_run(mixture, tmp_path)
    last = again / "checkpoints" / "svi" / "step-00000004"
    shutil.rmtree(last)
    shutil.rmtree(again / "checkpoints" / "ebm")
    fit.main(["--run", str(again), "--resume"])
    for name in ("weights.safetensors", "state.pt"):
        assert (last / name).read_bytes() == (mixture / "checkpoints/svi/step-00000004" / name).read_bytes()


def test_a_bernoulli_decoder_has_no_stage_ebm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "grey"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    binary = ["--data", "image-folder", "--data.root", str(folder), "--data.binarize", *NVAE]
    run = ["--run", str(tmp_path / "run"), "--svi.steps", "2", "--svi.batch-size", "8"]
    fit.main([*binary, *run, "--model.nvae.decoder", "bernoulli"])
    error = refusal(["--stage", "ebm", *run[:2], "--ebm.batch-size", "8"], capsys)
    assert "Bernoulli decoder does not have" in error and "logistic-mixture or normal" in error
    assert not (tmp_path / "run" / "checkpoints" / "ebm").exists()
    error = refusal([*binary, "--svi.batch-size", "8", "--run", str(tmp_path / "other")], capsys)
    assert "decoder normal does not fit binarised images" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.nvae.num-scales", "4"], "must be a multiple of 16, got 8: set model.nvae.padding to 4"),
        (["--model.nvae.decoder", "bernoulli"], "decoder bernoulli does not fit images that are not binarised"),
        (["--data.binarize"], "binarize"),
        (["--svi.batch-size", "2000"], "a step needs batch size x processes = 2000 x 1"),
        (["--model.nvae.channels", "0"], "model.nvae.channels must be at least 2, got 0"),
        (["--svi.spectral-penalty-start", "1"], "svi.spectral-penalty must be positive"),
        (["--svi.kl-warmup-share", "1.5"], "svi.kl-warmup-share must be in [0, 1], got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert message in refusal(["--data", "digits", *NVAE, *options, "--run", str(run)], capsys)
    assert not run.exists()


@pytest.mark.parametrize("decoder", ["bernoulli", "logistic"])
def test_one_bit_with_noise_is_not_taken_for_signs(
    decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", "fashion-mnist", "--data.padding", "0", *NVAE, "--model.nvae.decoder", decoder, "--dry-run"]
    assert "at least 2 bits, got 1: set data.binarize" in refusal([*common, "--data.num-bits", "1"], capsys)
    fit.main([*common, *(["--data.binarize"] if decoder == "bernoulli" else ["--data.num-bits", "2"])])


def test_points_are_refused_by_nvae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal([*NVAE, "--run", str(tmp_path / "run")], capsys)
    assert "model.kind nvae takes square images, got data of shape (2,)" in error


def test_stage_ebm_refuses_several_processes(
    mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from contextlib import contextmanager

    from ppl_vaebm import devices
    from ppl_vaebm.devices import Process

    @contextmanager
    def two(environment: object, device: str) -> Iterator[Process]:
        yield Process(0, 2)

    monkeypatch.setattr(devices, "joined", two)
    assert "one process for stage ebm, found several" in refusal(["--stage", "ebm", "--run", str(mixture)], capsys)
