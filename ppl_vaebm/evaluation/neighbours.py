"""The training images nearest to samples, in pixels and in features: whether a model repeats what it was shown."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.evaluation.base import Cell, Effort, Measured, Section, random_order
from ppl_vaebm.evaluation.image_metrics import Judge, image_blocks
from ppl_vaebm.evaluation.metrics.classification import nearest_neighbours

NUM_SHOWN = 10
"""Samples that are shown with their neighbours."""
COPY_QUANTILE = 0.01
"""About the share of test images that lie nearer to a training image than what is called near here. Chosen by us."""


class Nearest(NamedTuple):
    """The training image nearest to each of some images."""

    distance: Tensor
    """Euclidean, ``(n,)``."""
    place: Tensor
    """Its place in the order in which training images are read, ``(n,)``."""


def measure_neighbours(data: Data, samples: Tensor, judge: Judge | None, effort: Effort, seed: int) -> Measured:
    """Find the training images nearest to samples, and nearest to as many test images.

    Training images are as training sees them, each mirrored at random where the data set is. Half of all mirrored
    copies are found then.

    Args:
        data: images.
        samples: rounded to levels, ``(n, C, H, W)``, on the CPU.
        judge: its network makes the features; ``None`` leaves these out.
        effort: training images to look at.
        seed: of their order.

    Returns:
        A section for pixels and one for features; the first samples and their neighbours as images.
    """
    order = random_order(data.train, seed, "train")[: effort.num_reference]
    test_order = random_order(data.test, seed, "test")[: len(samples)]
    test = torch.cat(list(image_blocks(data, "test", test_order, seed)))
    sections: dict[str, Section] = {}
    shown = {}
    of_samples, of_test = (_nearest_pixels(data, order, images, seed) for images in (samples, test))
    family = f"[nearest training images], {len(samples)} samples and {len(test)} test images"
    sections[f"in pixels {family}"] = _section(of_samples, of_test)
    shown["pixels"] = of_samples.place[:NUM_SHOWN]
    if judge is not None:
        of_samples, of_test = (_nearest_features(judge, images) for images in (samples, test))
        sections[f"in features of {judge.net.name} {family}"] = _section(of_samples, of_test)
        shown["features"] = of_samples.place[:NUM_SHOWN]
    images = {name: _picked(data, order, places, seed).numpy() for name, places in shown.items()}
    return Measured(sections, {"samples": samples[:NUM_SHOWN].numpy(), **images})


def _nearest_pixels(data: Data, order: Tensor, images: Tensor, seed: int) -> Nearest:
    """Search the training images block by block, for all together may not fit in memory."""
    points = images.flatten(1)
    distance = torch.full((len(images),), math.inf, dtype=torch.float64)
    place = torch.zeros(len(images), dtype=torch.long)
    start = 0
    for block in image_blocks(data, "train", order, seed):
        found = nearest_neighbours(points, block.flatten(1))
        is_nearer = found.distance[:, 0] < distance
        distance = torch.where(is_nearer, found.distance[:, 0], distance)
        place = torch.where(is_nearer, found.indices[:, 0] + start, place)
        start += len(block)
    return Nearest(distance, place)


def _nearest_features(judge: Judge, images: Tensor) -> Nearest:
    found = nearest_neighbours(judge.describe(images).features, judge.reference.features)
    return Nearest(found.distance[:, 0], found.indices[:, 0])


def _picked(data: Data, order: Tensor, places: Tensor, seed: int) -> Tensor:
    """Read training images by their place, as the search saw them, random flips included."""
    picked: dict[int, Tensor] = {}
    start = 0
    for block in image_blocks(data, "train", order, seed):
        picked |= {place: block[place - start] for place in places.tolist() if 0 <= place - start < len(block)}
        start += len(block)
    return torch.stack([picked[place] for place in places.tolist()])


def _section(samples: Nearest, test: Nearest) -> Section:
    medians = [float(nearest.distance.median()) for nearest in (samples, test)]
    ratio: Cell = "none: half of the test images are copies of training images"
    if medians[1] > 0:
        ratio = medians[0] / medians[1]
    return {
        "median distance, samples": medians[0],
        "median distance, test images": medians[1],
        "samples over test images": ratio,
        "least distance, samples": float(samples.distance.min()),
        "least distance, test images": float(test.distance.min()),
        **near_shares(samples.distance, test.distance),
    }


def near_shares(samples: Tensor, test: Tensor) -> Section:
    """Count the samples that are nearer to training images than nearly all test images are.

    What is near is the k-th least of m distances of test images. Independent draws of the data's law fall below it with
    probability Beta(k, m + 1 - k), which is ``k / (m + 1)`` on average; k is where that is nearest to
    :data:`COPY_QUANTILE`, and 1 where the test images are few.

    Args:
        samples: distances, ``(n,)``, n >= 1.
        test: distances of test images, ``(m,)``, m >= 1.

    Returns:
        The share of samples, and what it is on average for draws of the data's own law. The share's error joins the
        binomial one of the samples and that of the quantile, ``q (1 - q) / (m + 2)`` with ``q = k / (m + 1)``, which is
        exact for such draws; so it tells how far these may lie from their average.
    """
    num_test = len(test)
    rank = max(1, round(COPY_QUANTILE * (num_test + 1)))
    name = f"share of samples nearer than {COPY_QUANTILE:.0%} of test images"
    near = test.kthvalue(rank).values
    if not bool(near > 0):
        return {name: f"none: {int((test == 0).sum())} of {num_test} test images are copies of training images"}
    share = float((samples < near).double().mean())
    expected = rank / (num_test + 1)
    error = math.sqrt(share * (1 - share) / len(samples) + expected * (1 - expected) / (num_test + 2))
    return {name: {"value": share, "error": error}, "the same, expected of draws of the data's law": expected}
