"""Stage 1: its schedules, its objective, and a fit of NVAE that goes on as if it had not been interrupted."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from ppl_vaebm.config import Config, DataConfig, ModelConfig, NvaeConfig, SviConfig
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.data.splits import IntegerImages, image_data
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.svi.svi import Objective, fit_svi, kl_weight, mean_elbo, new_vae, penalty_weight
from ppl_vaebm.models.layers import norm_gain_penalty, spectral_layers
from ppl_vaebm.models.nvae_cells import Conv2d
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.run import Run
from tests.tiny import needs_bfloat16

NVAE = NvaeConfig(channels=4, num_latents=2, num_scales=2, groups_per_scale=2, pre_cells=1, post_cells=1)
LOOP = SviConfig(
    steps=6,
    batch_size=8,
    optimizer="adamax",
    epsilon=1e-3,
    weight_decay=3e-4,
    learning_rate=1e-2,
    warmup_steps=2,
    kl_warmup_steps=4,
    kl_balance=True,
    spectral_penalty=1e-2,
    spectral_penalty_start=1.0,
    norm_temperature=0.8,
    norm_batches=3,
    checkpoint_every=3,
    validate_every=3,
    log_every=1,
)
CONFIG = Config(data=DataConfig(name="digits"), model=ModelConfig(kind="nvae", nvae=NVAE), svi=LOOP)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(CONFIG.data, 0)


def batch(data: Data, num: int = 8) -> Tensor:
    return data.train.batch(torch.arange(num), stream(0, "batch"))


# --- schedules -------------------------------------------------------------------------------------


def test_the_weight_of_the_kl_rises_from_its_floor_to_one() -> None:
    loop = SviConfig(steps=100, kl_warmup_steps=20, min_kl_weight=0.01)
    assert [kl_weight(loop, step) for step in (0, 5, 10, 20, 99)] == pytest.approx([0.01, 0.25, 0.5, 1.0, 1.0])
    assert kl_weight(replace(loop, kl_warmup_steps=0), 0) == 1.0


def test_the_weight_of_the_penalty_moves_in_log_scale() -> None:
    loop = SviConfig(spectral_penalty=1e-2, spectral_penalty_start=10.0)
    assert [penalty_weight(loop, share) for share in (0.0, 0.5, 1.0)] == pytest.approx([10.0, math.sqrt(0.1), 1e-2])
    assert penalty_weight(replace(loop, spectral_penalty_start=None), 0.3) == 1e-2


def test_epochs_and_shares_become_steps() -> None:
    loop = SviConfig(epochs=400, warmup_epochs=5, kl_warmup_share=0.3).resolved(steps_per_epoch=195)
    assert (loop.steps, loop.warmup_steps, loop.kl_warmup_steps) == (78_000, 975, 23_400)
    assert (loop.epochs, loop.warmup_epochs, loop.kl_warmup_share) == (None, None, None)
    assert SviConfig(steps=7).resolved(100) == SviConfig(steps=7)


# --- the objective ---------------------------------------------------------------------------------


def test_with_everything_off_it_is_pyros_elbo_per_image(digits: Data) -> None:
    vae = new_vae(CONFIG, digits).train()
    objective = Objective(vae, SviConfig(kl_warmup_steps=0), seed=0)
    x = batch(digits)
    with global_rng(1):
        loss = objective(x, 0)
    with global_rng(1):
        expected = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x) / len(x)
    assert torch.equal(loss, expected)


def test_the_penalty_is_added_with_its_weight(digits: Data) -> None:
    vae = new_vae(CONFIG, digits).train()
    x, step = batch(digits), 2

    def loss(loop: SviConfig) -> float:
        with global_rng(1), torch.no_grad():
            return float(Objective(vae, loop, seed=0)(x, step))

    bare = replace(LOOP, spectral_penalty=0.0, spectral_penalty_start=None)
    norms = [torch.linalg.matrix_norm(_weight(layer).flatten(1), 2) for layer in spectral_layers(vae, False)]
    penalty = float((torch.stack(norms).sum() + norm_gain_penalty(vae)).detach())
    # Forty power iterations come within a few per mille of the largest singular values.
    assert loss(LOOP) - loss(bare) == pytest.approx(penalty_weight(LOOP, 0.5) * penalty, rel=5e-3)


def _weight(layer: torch.nn.Module) -> Tensor:
    assert isinstance(layer, Conv2d)
    return layer.effective_weight().detach()


@needs_bfloat16
def test_bfloat16_changes_the_loss_little_and_keeps_densities_in_float32(digits: Data) -> None:
    vae = new_vae(CONFIG, digits).train()
    x = batch(digits)
    losses = []
    for bf16 in (False, True):
        with global_rng(1):
            losses.append(Objective(vae, replace(LOOP, bf16=bf16, spectral_penalty_start=None), seed=0)(x, 4))
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert losses[0] != losses[1]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=0.02)
    losses[1].backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in vae.parameters())


@pytest.mark.parametrize("decoder", ["normal", "logistic", "logistic-mixture"])
def test_images_that_are_all_alike_have_a_finite_loss_and_gradient(decoder: str, digits: Data) -> None:
    nvae = replace(NVAE, decoder=decoder)  # type: ignore[arg-type]
    vae = new_vae(replace(CONFIG, model=ModelConfig(kind="nvae", nvae=nvae)), digits).train()
    x = torch.full((8, 1, 8, 8), -0.97)
    with global_rng(0):
        loss = Objective(vae, LOOP, seed=0)(x, 1)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


# --- the loop --------------------------------------------------------------------------------------


def final_weights(run: Run) -> dict[str, Tensor]:
    saved = checkpoint.load(run.checkpoints("svi"), "last")
    return {f"{name}/{key}": value for name, values in saved.weights.items() for key, value in values.items()}


def test_a_resumed_fit_of_nvae_ends_with_the_same_bits(tmp_path: Path, digits: Data) -> None:
    whole, parted = Run.create(tmp_path / "whole"), Run.create(tmp_path / "parted")
    fit_svi(whole, CONFIG, digits)
    _interrupted(parted, digits)
    fit_svi(parted, CONFIG, digits, checkpoint.load(parted.checkpoints("svi"), "last"))
    one, other = final_weights(whole), final_weights(parted)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert {name.split("/")[0] for name in one} == {"vae", "vae_average", "spectral", "prior_statistics"}


class Interrupted(Exception):
    """What stops the fit."""


def _interrupted(run: Run, data: Data) -> None:
    """Fit until just after the first checkpoint, as if killed there."""
    original = checkpoint.save

    def save_and_stop(*args: object, **options: object) -> None:
        original(*args, **options)  # type: ignore[arg-type]
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint, "save", save_and_stop)
        fit_svi(run, CONFIG, data)
    assert checkpoint.available(run.checkpoints("svi")) == [3]


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_batch_that_overflows_spoils_neither_weights_nor_statistics(tmp_path: Path) -> None:
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    images[:, :, ::2] = 200
    part = IntegerImages(images)
    data = image_data("stripes", torch.Size([1, 8, 8]), [part, part, part])
    config = replace(CONFIG, svi=replace(LOOP, norm_temperature=None))
    bad_step = 2
    original = Objective.forward

    def overflowing(self: Objective, x: Tensor, step: int) -> Tensor:
        return original(self, torch.full_like(x, math.inf) if step == bad_step else x, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", overflowing)
        vae: HierarchicalVAE = fit_svi(Run.create(tmp_path / "run"), config, data)
    records = Run(tmp_path / "run").metrics("svi")
    assert [r["num_skipped"] for r in records if "loss" in r] == [0, 0, 1, 1, 1, 1]
    assert all(value.isfinite().all() for value in vae.state_dict().values())
    assert math.isfinite(mean_elbo(vae, part, seed=0).elbo_nats)


def test_weights_that_ran_away_end_in_one_sentence_and_no_checkpoint(tmp_path: Path, digits: Data) -> None:
    """Too few steps for the gradients to be given up, so that the validation is the first to say so."""
    config = replace(CONFIG, svi=replace(LOOP, learning_rate=1e30, warmup_steps=0, norm_temperature=None))
    run = Run.create(tmp_path / "run")
    with (
        warnings.catch_warnings(),
        pytest.raises(DivergedError, match="step 3: the validation ELBO is (nan|-inf); checkpoints, if there are any"),
    ):
        warnings.simplefilter("ignore", UserWarning)  # Pyro says that the loss is NaN
        fit_svi(run, config, digits)
    assert not run.checkpoints("svi").exists()
    fit_svi(run, replace(config, svi=replace(config.svi, learning_rate=1e-2)), digits)  # negative control


def test_blocks_do_not_change_what_the_mean_elbo_is_of(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = new_vae(CONFIG, digits).eval()
    whole = mean_elbo(vae, digits.validation, seed=0)
    monkeypatch.setattr(HierarchicalVAE, "rows_per_block", 50)
    parts = mean_elbo(vae, digits.validation, seed=0)
    # Other draws of z, so equal but for their Monte Carlo error.
    assert parts.elbo_nats == pytest.approx(whole.elbo_nats, rel=0.02) and parts.elbo_nats != whole.elbo_nats
    assert sum(parts.kl_nats.values()) == pytest.approx(sum(whole.kl_nats.values()), rel=0.02)
