"""Metrics of image samples: what is measured against what, and numbers that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import IntegerImages, Smoothed, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.image_metrics import (
    METRICS,
    NUM_STACKED,
    Judge,
    class_columns,
    image_blocks,
    metric_arrays,
    metric_rows,
    metric_section,
    new_judge,
    remarks,
)
from ppl_vaebm.evaluation.metrics.classifier import train_classifier
from ppl_vaebm.evaluation.metrics.features_base import Outputs
from ppl_vaebm.evaluation.metrics.frechet import frechet_bias, frechet_distance
from ppl_vaebm.evaluation.samples import Samples, draw_samples, measure_samples
from ppl_vaebm.evaluation.sections import Effort, Rows, random_order
from ppl_vaebm.inference import sampling
from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun
from tests.judged import LEVELS, Brightness, PixelNet, columns_of, image_levels, image_run, level_data

EFFORT = Effort(2, 2, 2, num_samples=60, steps=(2, 4), num_reference=200)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return new_judge(PixelNet(), level_data(image_levels(240), image_levels(80, name="test")), EFFORT, seed=0)


def images(num: int, high: int = LEVELS) -> Tensor:
    return (image_levels(num, high=high, name="drawn").float() + 0.3) * (2 / LEVELS) - 1


def cells(section: Rows) -> dict[str, float]:
    return {name: cell["value"] if isinstance(cell, dict) else float(cell) for name, cell in section.items()}


# --- metrics -------------------------------------------------------------------------------------


def test_draws_of_the_datas_law_are_as_good_as_data_and_others_are_not(judge: Judge) -> None:
    sets = {"alike": judge.describe(images(60)), "dark": judge.describe(images(60, high=9))}
    section = metric_section(judge, metric_rows(judge, sets, 60), 60, {})
    assert section.title == "pixels, 60 samples" and list(section.columns) == list(METRICS)
    found = {metric: cells(rows) for metric, rows in section.columns.items()}
    names = ["training data, 60 images against 140 others", "held-out data, 60 images", "alike", "dark"]
    assert all(list(section) == names for section in found.values())
    for metric in ("Frechet distance", "KID"):
        assert found[metric]["dark"] > 3 * max(abs(found[metric][name]) for name in names[:3])
    for metric in ("precision", "recall"):
        assert min(found[metric][name] for name in names[:3]) > 0.6
    assert found["recall"]["dark"] < 0.1
    # One class of the two is covered.
    assert min(found["coverage"][name] for name in names[:3]) > 0.8 > 0.6 > found["coverage"]["dark"] > 0.2
    assert min(found["density"][name] for name in names[:3]) > 0.6
    # One class is left of two.
    assert found["Inception Score"]["alike"] > 1.15 > found["Inception Score"]["dark"]


def test_the_reference_is_not_mirrored_as_training_is() -> None:
    train, test = image_levels(240), image_levels(80, name="test")
    train[..., :4] //= 4  # dark on the left
    test[..., :4] //= 4
    plain = level_data(train, test)
    flipping = replace(plain, train=IntegerImages(train, None, LEVELS, has_flips=True))
    noisy = replace(flipping, train=Smoothed(flipping.train, 0.1), noise_sd=0.1)
    order = random_order(plain.train, 0, "train")
    expected = torch.cat(list(image_blocks(plain, "train", order, 0)))
    seen = quantised_as(flipping.train.batch(order, stream(0, "dequantise", "train")), plain)
    assert not torch.equal(seen, expected)  # so a batch of training would have been
    judged = new_judge(PixelNet(), plain, EFFORT, seed=0)
    for data in (flipping, noisy):
        assert torch.equal(torch.cat(list(image_blocks(data, "train", order, 0))), expected)
        assert torch.equal(new_judge(PixelNet(), data, EFFORT, seed=0).reference.features, judged.reference.features)
    mirrored = frechet_distance(judged.held_out.features, PixelNet().outputs(seen).features)
    assert mirrored > 3 * frechet_distance(judged.held_out.features, judged.reference.features)


def test_images_are_clipped_and_rounded_and_never_stretched(judge: Judge) -> None:
    x = images(20)
    beyond = torch.where(x > 0.9, x + 3, x) + 0.2 / LEVELS  # within the level, or beyond white
    torch.testing.assert_close(judge.describe(beyond).features, judge.describe(x).features)
    assert not torch.equal(judge.describe(0.5 * x).features, judge.describe(x).features)


def test_the_reference_is_training_data_in_random_order(judge: Judge) -> None:
    every = quantised_as(judge.data.train.batch(torch.arange(240), stream(0, "any")), judge.data)
    features = PixelNet().outputs(every).features
    assert len(judge.reference.features) == 200
    nearest = torch.cdist(judge.reference.features, features).min(1)
    assert float(nearest.values.max()) < 1e-2  # levels are 0.1 apart
    assert len(nearest.indices.unique()) == 200 and nearest.indices.tolist() != sorted(nearest.indices.tolist())
    distance = frechet_distance(judge.held_out.features, judge.reference.features)
    (_, row) = metric_rows(judge, {}, 60)
    assert row.cells["Frechet distance"] == distance


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(12, 1, 4, 4), "one shape"),
        (torch.full((12, 1, 8, 8), torch.nan), "finite"),
        (image_levels(12).float() / (LEVELS - 1), r"\[0, 1\]"),
    ],
    ids=["size", "not finite", "range"],
)
def test_images_that_do_not_compare_are_refused(judge: Judge, x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge.describe(x)


def test_too_few_samples_are_refused_and_few_come_with_a_warning(judge: Judge) -> None:
    with pytest.raises(InputError, match="at least 10 samples"):
        new_judge(PixelNet(), judge.data, EFFORT._replace(num_samples=9), seed=0)
    wide = new_judge(PixelNet(20), judge.data, EFFORT, seed=0)
    for num, is_warned in ((19, True), (20, False)):
        (section,) = remarks(wide, wide.held_out, num).columns.values()
        assert ("warning" in section) == is_warned
        if is_warned:
            found = frechet_bias(wide.reference.features, wide.held_out.features, stream(0, "bias"))
            assert "19 samples are fewer than the 20 features" in str(section["warning"])
            assert f"by {found.low:.4g} to {found.high:.4g}: take at least 40" in str(section["warning"])


def brightness_data(*, is_swapped: bool = False, has_labels: bool = True) -> Data:
    """Dark images (class 0) and bright ones (class 1), the test images sorted by class."""
    splits = []
    for num, name in ((60, "train"), (60, "test")):
        levels = torch.cat([image_levels(num, 0, 8, f"{name} dark"), image_levels(num, 9, LEVELS, f"{name} bright")])
        labels = torch.arange(2).repeat_interleave(num)
        labels = 1 - labels if is_swapped and name == "test" else labels
        splits.append(IntegerImages(levels, labels if has_labels else None, LEVELS))
    return image_data("brightness", splits[0].images.shape[1:], [splits[0], splits[1], splits[1]])


@pytest.mark.parametrize("is_swapped", [False, True])
def test_the_accuracy_of_a_classifier_of_the_data_is_told(is_swapped: bool) -> None:
    data = brightness_data(is_swapped=is_swapped)
    net = train_classifier(data, 0, steps=30, batch_size=40)
    found = new_judge(net, data, EFFORT._replace(num_samples=40), seed=0)  # some test images, in random order
    (section,) = remarks(found, found.held_out, 100).columns.values()
    assert section["accuracy on 40 test images"] == {"value": 0.0 if is_swapped else 1.0, "error": 0.0}


def test_other_networks_and_data_without_labels_have_no_accuracy(judge: Judge) -> None:
    labelled, unlabelled = brightness_data(), brightness_data(has_labels=False)
    net = train_classifier(labelled, 0, steps=1)
    for found in (judge, new_judge(PixelNet(), labelled, EFFORT, 0), new_judge(net, unlabelled, EFFORT, 0)):
        (section,) = remarks(found, found.held_out, 60).columns.values()
        assert not any("accuracy" in name for name in section)


def test_classes_of_stacked_digits_are_counted(judge: Judge) -> None:
    labels = torch.cat([torch.arange(600), torch.zeros(600, dtype=torch.long)])
    logits = torch.nn.functional.one_hot(labels, NUM_STACKED).float()
    outputs = Outputs(torch.zeros(1_200, 6), logits)
    stacked = Judge(
        judge.net, level_data(image_levels(9), image_levels(9), "stacked-mnist"), outputs, outputs, images(2), 0
    )
    counted, divergence = class_columns(stacked, {"VAE": outputs}, 1_200).values()
    assert counted["VAE"] == 600
    expected = 599 / 1_200 * math.log(1_000 / 1_200) + 601 / 1_200 * math.log(601_000 / 1_200)
    assert divergence["VAE"] == pytest.approx(expected)
    even = "independent draws of even classes"
    assert counted[even] == pytest.approx(1_000 * (1 - 0.999**1_200))
    # The exact mean, by the law of one class's count; its limit for many draws is 999 / 2,400 = 0.416.
    count = np.arange(1, 1_201)
    law = stats.binom.pmf(count, 1_200, 0.001)
    assert divergence[even] == pytest.approx(1_000 * float((law * count / 1_200 * np.log(count / 1.2)).sum()))
    assert divergence[even] == pytest.approx(0.482, abs=1e-3)
    assert class_columns(judge, {"VAE": outputs}, 1_200) == {}


# --- chains --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, judge: Judge) -> tuple[LoadedRun, Samples]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", 40)
        patch.setattr(sampling, "NUM_PILOT_STEPS", 3)
        loaded = image_run(tmp_path_factory.mktemp("run"), judge.data, Brightness(40.0))
        return loaded, draw_samples(loaded, judge, EFFORT.num_samples, EFFORT.steps, seed=0)


def test_samples_are_those_of_sample_by_chains(
    measured: tuple[LoadedRun, Samples], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 40)
    monkeypatch.setattr(sampling, "NUM_PILOT_STEPS", 3)
    loaded, samples = measured
    chains = sample_by_chains(loaded.potential, loaded.config.sampling.kernel, num=60, steps=[0, 2, 4], seed=0)
    assert list(samples.after) == [0, 2, 4] and [block.size for block in samples.blocks] == [40, 40]
    for count, drawn in samples.after.items():
        x = decode_in_blocks(loaded.potential, chains.positions[count])
        torch.testing.assert_close(drawn.images, quantised_as(x, loaded.data))
        torch.testing.assert_close(drawn.energy, 40 * x.flatten(1).mean(1))
        mean_squares = loaded.potential.packing.mean_square(chains.positions[count])
        torch.testing.assert_close(drawn.mean_squares, mean_squares)
        assert drawn.described is not None
        torch.testing.assert_close(drawn.described.features, judge.describe(x).features)
    rates = torch.cat([block.acceptance_rate for block in samples.blocks])
    assert float(rates.mean()) == pytest.approx(chains.acceptance_rate) and len(rates) == 8


def test_every_length_stands_beside_the_vae(measured: tuple[LoadedRun, Samples], judge: Judge) -> None:
    loaded, samples = measured
    sections, arrays = measure_samples(loaded, judge, samples, EFFORT)
    metrics = columns_of(sections, "pixels, 60 samples")
    distances = cells(metrics["Frechet distance"])
    assert list(distances)[2:] == ["VAE", "VAEBM, 2 mala steps", "VAEBM, 4 mala steps"]
    ratios = cells(metrics["Frechet distance over the VAE's"])
    assert ratios == {
        name: pytest.approx(value / distances["VAE"]) for name, value in distances.items() if name != "VAE"
    }
    assert arrays["steps"].tolist() == [0, 2, 4] and arrays["value"].shape == arrays["error"].shape == (5, 7)
    assert arrays["value"][:, 0].tolist() == list(distances.values())
    vae, short, long = columns_of(sections, "chains of mala, 60 samples").values()
    assert "acceptance" not in vae and short["evaluations per image"] == 2 and long["evaluations per image"] == 4
    for section in (vae, short, long):
        mean_square = section["mean square of eps_x"]
        assert isinstance(mean_square, dict)
        assert abs(mean_square["value"] - 1) < 5 * mean_square["error"] < 0.2
    speeds = [cells(section)["images per second"] for section in (vae, short, long)]
    assert speeds[0] > speeds[1] > speeds[2] > 0


def test_samples_without_a_network_have_no_metrics(measured: tuple[LoadedRun, Samples], judge: Judge) -> None:
    loaded, samples = measured
    blind = samples._replace(after={n: drawn._replace(described=None) for n, drawn in samples.after.items()})
    with pytest.raises(ValueError, match="give draw_samples a judge"):
        measure_samples(loaded, judge, blind, EFFORT)


def test_arrays_keep_what_has_no_error_apart(judge: Judge) -> None:
    arrays = metric_arrays(metric_rows(judge, {}, 60), net="pixels")
    assert arrays["metrics"].tolist() == list(METRICS) and arrays["net"].item() == "pixels"
    assert [bool(math.isnan(error)) for error in arrays["error"][0]] == [True, False, False, False, False, True, True]
