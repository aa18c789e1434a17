"""Bounds of stage 1 alone, against models whose likelihood, posterior and KL are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, ModelConfig, NvaeConfig
from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, Points, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation import evaluation as evaluation_plan
from ppl_vaebm.evaluation import vae as evaluation_svi
from ppl_vaebm.evaluation.evaluation import Plan
from ppl_vaebm.evaluation.sections import Effort, Section
from ppl_vaebm.evaluation.vae import _test_blocks, bounds, evaluate_vae
from ppl_vaebm.inference.elbo import BalancedELBO
from ppl_vaebm.inference.likelihood import elbo_rows
from ppl_vaebm.inference.svi.batch_norm import norms_of
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs.loading import FittedVAE
from ppl_vaebm.runs.run import Run
from tests.judged import PixelNet, columns_of
from tests.small_models import POSTERIOR_SLOPE, POSTERIOR_SPREAD, VARIANCE, linear_vae, log_normal, shipped_vae

EFFORT = Effort(num_test=400, num_importance=20, num_z_draws=2, num_samples=50, steps=())


def linear(folder: Path, slope: float = POSTERIOR_SLOPE, modes: Tensor | None = None) -> FittedVAE:
    """Make a run of the linear model, with test points of its law."""
    x = math.sqrt(VARIANCE) * torch.randn(EFFORT.num_test, 1, generator=stream(0, "test"))
    split = Points(x)
    std = None if modes is None else math.sqrt(VARIANCE)
    data = Data("one", torch.Size([1]), split, split, split, modes=modes, mode_std=std, is_dequantized=False)
    return FittedVAE(Run(folder), Config(), data, linear_vae(slope))


def images(decoder: str = "logistic", levels: int = 17, labels: Tensor | None = None) -> tuple[Config, Data]:
    shape = (30, 1, 8, 8)
    split = IntegerImages(
        torch.randint(levels, shape, generator=stream(0, "images"), dtype=torch.uint8),
        labels,
        levels,
        is_binarized=decoder == "bernoulli",
    )
    nvae = NvaeConfig(channels=4, num_latents=2, groups_per_scale=2, encoder_cells=1, decoder_cells=1, decoder=decoder)  # type: ignore[arg-type]
    return Config(model=ModelConfig(kind="nvae", nvae=nvae)), image_data("noise", torch.Size(shape[1:]), [split] * 3)


def sections_of(fitted: FittedVAE, *parts: Part, effort: Effort = EFFORT) -> list[Section]:
    return [section for _, measured in evaluate_vae(fitted, Plan(effort, parts)) for section in measured.sections]


def value(section: object, name: str) -> tuple[float, float]:
    assert isinstance(section, dict)
    return section[name]["value"], section[name]["error"]


def test_with_the_exact_posterior_both_bounds_are_the_evidence(tmp_path: Path) -> None:
    fitted = linear(tmp_path)
    section = bounds(fitted, fitted.vae, EFFORT, seed=0)
    log_p = log_normal(fitted.data.test.batch(torch.arange(400), stream(0, "unused")).double(), 0.0, VARIANCE)
    expected = float(log_p.mean()), float(log_p.std()) / math.sqrt(400)
    assert value(section, "importance-weighted bound, 20 draws (nats per point)") == pytest.approx(expected, abs=1e-2)
    # One draw of z: its own noise is in the ELBO's error.
    elbo, error = value(section, "ELBO (nats per point)")
    assert abs(elbo - expected[0]) < 4 * error
    x = fitted.data.test.batch(torch.arange(400), stream(0, "unused"))
    ratio = POSTERIOR_SPREAD**2
    kl = 0.5 * ((POSTERIOR_SLOPE * x.double()).square() + ratio - 1 - math.log(ratio))
    assert value(section, "KL of z_1 (nats per point)")[0] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert not any("bits" in name for name in section)


def test_test_points_of_a_sorted_file_are_a_fair_choice(tmp_path: Path) -> None:
    fitted, num = linear(tmp_path), 100
    x = fitted.data.test.batch(torch.arange(400), stream(0, "unused")).sort(dim=0).values
    fitted = replace(fitted, data=replace(fitted.data, test=Points(x)))
    section = bounds(fitted, fitted.vae, EFFORT._replace(num_test=num), seed=0)
    elbo, error = value(section, "importance-weighted bound, 20 draws (nats per point)")
    of_all, of_first = (float(log_normal(rows.double(), 0.0, VARIANCE).mean()) for rows in (x, x[:num]))
    assert abs(elbo - of_all) < 4 * error < abs(of_first - of_all)
    # Of all points the numbers are what they were before there was a choice.
    unsorted = linear(tmp_path)
    every = [bounds(unsorted, unsorted.vae, EFFORT._replace(num_test=count), seed=0) for count in (400, 5_000)]
    assert every[0] == every[1]
    blocks = list(_test_blocks(unsorted, 5_000, seed=0))
    assert torch.equal(torch.cat(blocks), unsorted.data.test.batch(torch.arange(400), stream(0, "unused")))


def test_a_wrong_posterior_loosens_the_elbo_more_than_the_other_bound(tmp_path: Path) -> None:
    exact, wrong = linear(tmp_path), linear(tmp_path, slope=0.2)
    sections = [bounds(fitted, fitted.vae, EFFORT, seed=0) for fitted in (exact, wrong)]
    elbo, best = "ELBO (nats per point)", "importance-weighted bound, 20 draws (nats per point)"
    loss = [value(sections[0], name)[0] - value(sections[1], name)[0] for name in (elbo, best)]
    assert loss[0] > 0.3 and loss[0] > 3 * loss[1]


@pytest.mark.parametrize("name", ["vector, 3 groups, local scale", "image (1, 8, 8), 3 groups, local scale"])
def test_rows_of_the_elbo_add_up_to_pyros(name: str) -> None:
    vae = shipped_vae(name).eval()
    x = torch.randn(5, *vae.model.event_shape, generator=stream(0, "x"), dtype=torch.float64)
    elbo, kl = elbo_rows(vae, x, seed=3)
    reference = BalancedELBO()
    with torch.no_grad(), global_rng(3):
        loss = reference.loss(vae.model, vae.guide, x)
    assert elbo.shape == (5,) and float(elbo.sum()) == pytest.approx(-loss)
    assert {name: float(rows.sum()) for name, rows in kl.items()} == pytest.approx(
        {name: float(total) for name, total in reference.kl_nats.items()}
    )


@pytest.mark.parametrize(("decoder", "volume"), [("normal", math.log2(17 / 2)), ("bernoulli", 0.0)])
def test_bits_are_the_nats_in_another_unit(tmp_path: Path, decoder: str, volume: float) -> None:
    config, data = images(decoder, 256 if decoder == "bernoulli" else 17)
    fitted = FittedVAE(Run(tmp_path), config, data, new_vae(config, data).eval())
    section = columns_of(sections_of(fitted, "likelihood"), "stage 1, test data")[""]
    for name in ("ELBO", "importance-weighted bound, 20 draws"):
        nats, error = value(section, f"{name} (nats per image)")
        expected = volume - nats / (64 * math.log(2)), error / (64 * math.log(2))
        assert value(section, f"{name} (bits per dimension)") == pytest.approx(expected)


def test_a_checkpoint_with_two_statistics_has_a_column_for_each(tmp_path: Path) -> None:
    config, data = images()
    vae, prior_vae = (new_vae(config, data).eval() for _ in range(2))
    for layer in norms_of(prior_vae.model).values():
        assert layer.running_var is not None
        layer.running_var.fill_(4.0)
    (section,) = sections_of(FittedVAE(Run(tmp_path), config, data, vae, prior_vae, 0.7), "likelihood")
    training, prior = section.columns.values()
    assert list(section.columns) == ["training statistics", "prior statistics at temperature 0.7"]
    assert training.keys() == prior.keys() and training != prior
    (same,) = sections_of(FittedVAE(Run(tmp_path), config, data, vae, vae, 0.7), "likelihood")
    assert list(same.columns.values()) == [training, training]


def test_modes_of_points_are_those_of_the_draws(tmp_path: Path) -> None:
    fitted = linear(tmp_path, modes=torch.zeros(1, 1))
    section = columns_of(sections_of(fitted, "samples", effort=EFFORT._replace(num_samples=4_000)), "modes")["VAE"]
    share = math.erf(3 / math.sqrt(2))
    assert value(section, "share within 3 std of a mode")[0] == pytest.approx(
        share, abs=4 * math.sqrt(share * 0.0027 / 4_000)
    )


def test_images_get_metrics_with_each_set_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def feature_net(choice: str, *others: Any) -> PixelNet:
        asked.append(choice)
        return PixelNet()

    monkeypatch.setattr(evaluation_plan, "feature_net", feature_net)
    config, data = images(labels=torch.arange(30) % 3)
    vae = new_vae(config, data).eval()
    sections = sections_of(FittedVAE(Run(tmp_path), config, data, vae, vae, 0.7), "samples")
    assert asked == ["classifier"]
    columns = columns_of(sections, "pixels, 50 samples")
    section = columns["Frechet distance"]
    assert list(section) == [
        "training data, 15 images against 15 others",
        "held-out data, 30 images",
        "VAE, temperature 1",
        "VAE, temperature 1, prior statistics at 0.7",
        "VAE, temperature 0.7, prior statistics at 0.7",
    ]
    assert section["VAE, temperature 1"] == section["VAE, temperature 1, prior statistics at 0.7"]
    assert section["VAE, temperature 0.7, prior statistics at 0.7"] != section["VAE, temperature 1"]
    assert "recall" in columns and sections[-1].title == "about the metrics of pixels"


def test_images_without_labels_say_what_to_do(tmp_path: Path) -> None:
    config, data = images()
    fitted = FittedVAE(Run(tmp_path), config, data, new_vae(config, data).eval())
    assert "--features inception" in str(sections_of(fitted, "samples"))


def test_parts_that_need_an_energy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ood, histograms not"):
        sections_of(linear(tmp_path), "likelihood", "ood", "histograms")


@pytest.mark.parametrize("option", ["features", "feature_weights"])
def test_a_network_for_points_is_refused_before_anything_is_measured(tmp_path: Path, option: str) -> None:
    asked: dict[str, Any] = {option: "inception" if option == "features" else tmp_path / "weights"}
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} are those of images.*are points"):
        next(evaluate_vae(linear(tmp_path), Plan(EFFORT, ("likelihood", "samples"), **asked)))


def test_a_network_that_cannot_be_had_is_refused_before_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounds_too_early(*options: object) -> Section:
        raise AssertionError("the bounds come after the network")

    monkeypatch.setattr(evaluation_svi, "bounds", bounds_too_early)
    config, data = images(labels=torch.arange(30) % 3)
    fitted = FittedVAE(Run(tmp_path), config, data, new_vae(config, data).eval())
    parts: tuple[Part, ...] = ("likelihood", "samples")
    with pytest.raises(InputError, match="found no file"):
        next(evaluate_vae(fitted, Plan(EFFORT, parts, feature_weights=tmp_path / "none")))
    with pytest.raises(InputError, match="at least 10 samples.*leave samples out with --only"):
        next(evaluate_vae(fitted, Plan(EFFORT._replace(num_samples=9), parts)))
    with pytest.raises(AssertionError, match="after the network"):  # without samples no network is looked for
        next(evaluate_vae(fitted, Plan(EFFORT._replace(num_samples=9), ("likelihood",))))
    unlabelled = FittedVAE(Run(tmp_path), *images(), fitted.vae)
    with pytest.raises(InputError, match="have no labels.*--features inception"):
        next(evaluate_vae(unlabelled, Plan(EFFORT, parts, feature_weights=tmp_path / "none")))
