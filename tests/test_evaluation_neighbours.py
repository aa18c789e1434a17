"""Nearest training images: copies are found, and honest draws are as far from training data as test data are."""

from __future__ import annotations

import torch

from ppl_vaebm.evaluation_base import Effort, Section
from ppl_vaebm.evaluation_metrics import new_judge
from ppl_vaebm.evaluation_neighbours import NUM_SHOWN, measure_neighbours
from ppl_vaebm.pixels import quantised_as
from ppl_vaebm.rng import stream
from tests.judged import PixelNet, image_levels, level_data

EFFORT = Effort(2, 2, 2, num_samples=40, steps=(2,), num_reference=1_000)
DATA = level_data(image_levels(1_100), image_levels(300, name="test"))


def number(section: Section, name: str) -> float:
    cell = section[name]
    return cell["value"] if isinstance(cell, dict) else float(cell)


def test_copies_are_found_and_shown_beside_their_originals() -> None:
    judge = new_judge(PixelNet(), DATA, EFFORT, seed=3)
    copies = quantised_as(DATA.train.batch(torch.arange(100), stream(0, "copies")), DATA)
    sections, arrays = measure_neighbours(DATA, copies, judge, EFFORT, seed=3)
    assert [title.partition(" [")[0] for title in sections] == ["in pixels", "in features of pixels"]
    for section in sections.values():
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
    (section,) = sections.values()
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
