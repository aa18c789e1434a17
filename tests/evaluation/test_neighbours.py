"""Nearest training images: copies are found, and honest draws are as far from training data as test data are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import IntegerImages, Smoothed
from ppl_vaebm.evaluation.image_metrics import NUM_SHOWN, image_blocks, measure_neighbours, near_shares, new_judge
from ppl_vaebm.evaluation.sections import Effort, Rows
from ppl_vaebm.rng import stream
from tests.judged import LEVELS, PixelNet, image_levels, level_data

EFFORT = Effort(2, 2, 2, num_samples=40, steps=(2,), num_reference=1_000)
DATA = level_data(image_levels(1_100), image_levels(300, name="test"))


def number(section: Rows, name: str) -> float:
    cell = section[name]
    return cell["value"] if isinstance(cell, dict) else float(cell)


def test_copies_are_found_and_shown_beside_their_originals() -> None:
    judge = new_judge(PixelNet(), DATA, EFFORT, seed=3)
    copies = quantised_as(DATA.train.batch(torch.arange(100), stream(0, "copies")), DATA)
    sections, arrays = measure_neighbours(DATA, copies, judge, EFFORT, seed=3)
    assert list(sections[0].columns) == ["in pixels", "in features of pixels"]
    for section in sections[0].columns.values():
        assert number(section, "median distance, samples") == number(section, "samples over test images") == 0
        assert number(section, "share of samples nearer than 1% of test images") > 0.85
    # About 9 of 10 training images are in the reference.
    is_same = (arrays["pixels"] == arrays["samples"]).all(axis=(1, 2, 3))
    assert len(is_same) == NUM_SHOWN and is_same.sum() >= 7
    in_features = (arrays["features"] == arrays["samples"]).all(axis=(1, 2, 3))
    assert (in_features == is_same).all()


def test_draws_of_the_datas_law_are_no_copies() -> None:
    fresh = quantised_as(
        level_data(image_levels(200, name="fresh"), image_levels(9)).train.batch(torch.arange(200), stream(0, "fresh")),
        DATA,
    )
    sections, arrays = measure_neighbours(DATA, fresh, None, EFFORT, seed=0)
    (section,) = sections[0].columns.values()
    assert set(arrays) == {"samples", "pixels"}
    assert abs(number(section, "samples over test images") - 1) < 0.02
    assert number(section, "least distance, samples") > 0
    assert number(section, "share of samples nearer than 1% of test images") < 0.05
    # The one found is the nearest of all.
    every = torch.from_numpy(arrays["pixels"]).flatten(1)
    train = quantised_as(DATA.train.batch(torch.arange(1_100), stream(0, "all")), DATA).flatten(1).double()
    distances = torch.cdist(fresh[:NUM_SHOWN].flatten(1).double(), train)
    found = (fresh[:NUM_SHOWN].flatten(1) - every).double().norm(dim=1)
    assert bool(((distances < found[:, None] - 1e-6).sum(1) <= 3).all())  # but for those left out of the reference


def test_mirrored_copies_of_training_images_are_found_at_distance_zero_where_training_mirrors() -> None:
    train, test = image_levels(300), image_levels(100, name="test")
    plain = level_data(train, test)
    flipping = replace(plain, train=Smoothed(IntegerImages(train, None, LEVELS, has_flips=True), 0.1), noise_sd=0.1)
    samples = torch.cat(list(image_blocks(plain, "train", torch.arange(50), 0))).flip(-1)
    judges = [new_judge(PixelNet(), data, EFFORT, seed=0) for data in (flipping, plain)]
    for data, judge, is_found in zip((flipping, plain), judges, (True, False), strict=True):
        sections, arrays = measure_neighbours(data, samples, judge, EFFORT, seed=0)
        for rows in sections[0].columns.values():
            assert (number(rows, "median distance, samples") == 0) is is_found
            assert number(rows, "least distance, test images") > 0
        assert np.array_equal(arrays["samples"], arrays["pixels"]) is is_found


# --- the share of near samples -------------------------------------------------------------------

SHARE = "share of samples nearer than 1% of test images"
EXPECTED = "the same, expected of draws of the data distribution"


@pytest.mark.parametrize(("num_test", "rank"), [(40, 1), (200, 2), (500, 5)])
def test_draws_of_the_datas_law_have_the_share_and_the_error_that_are_told(num_test: int, rank: int) -> None:
    num, rows = 300, []
    for repeat in range(600):
        drawn = torch.rand(num + num_test, generator=stream(0, "distances", repeat), dtype=torch.float64)
        samples, test = drawn[:num], drawn[num:]
        section = near_shares(samples, test)
        cell = section[SHARE]
        assert isinstance(cell, dict) and section[EXPECTED] == rank / (num_test + 1)
        interpolated = float((samples < np.quantile(test.numpy(), 0.01)).double().mean())
        rows.append([cell["value"], cell["error"], interpolated])
    share, error, by_quantile = torch.tensor(rows, dtype=torch.float64).unbind(1)
    spread = float(share.std())
    assert abs(float(share.mean()) - rank / (num_test + 1)) < 5 * spread / math.sqrt(len(rows))
    assert float(error.square().mean().sqrt()) == pytest.approx(spread, rel=0.2)
    # The samples' own error is half of it, and an interpolated quantile leaves another share than its name says.
    binomial = (share * (1 - share) / num).mean().sqrt()
    assert float(binomial) < 0.8 * spread
    assert float(by_quantile.mean()) - 0.01 > 5 * float(by_quantile.std()) / math.sqrt(len(rows))


def test_the_share_of_copies_is_counted_and_test_images_at_the_limit_are_not_near() -> None:
    test = torch.arange(1, 200, dtype=torch.float64)  # of 199 the second least is 1 % of 200
    section = near_shares(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), test)
    assert number(section, SHARE) == 0.5 and number(section, EXPECTED) == 0.01
    cell = section[SHARE]
    assert isinstance(cell, dict)
    assert cell["error"] == pytest.approx(math.sqrt(0.25 / 4 + 0.01 * 0.99 / 201))


def test_where_test_images_are_copies_of_training_images_the_table_says_so() -> None:
    train = image_levels(300)
    for num_copies, is_half in ((100, True), (30, False)):
        fresh = image_levels(100 - num_copies, name="test") if num_copies < 100 else train[:0]
        data = level_data(train, torch.cat([train[:num_copies], fresh]))
        samples = quantised_as(data.test.batch(torch.arange(100), stream(0, "samples")), data)
        (section,) = measure_neighbours(data, samples, None, EFFORT, seed=0).sections[0].columns.values()
        assert section[SHARE] == f"none: {num_copies} of 100 test images are copies of training images"
        assert EXPECTED not in section
        ratio = section["samples over test images"]
        assert (ratio == "none: half of the test images are copies of training images") is is_half
        assert (ratio == 1.0) is not is_half
