"""Metrics of image samples in the features of a named network, for any set of images of one data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import check_images, quantised_as
from ppl_vaebm.data.splits import (
    IntegerImages,
    LazyImages,
    Smoothed,
    Split,
    Subset,
    without_augmentation,
    without_noise,
)
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classification import inception_score
from ppl_vaebm.evaluation.metrics.classifier import Classifier, accuracy
from ppl_vaebm.evaluation.metrics.digits import StackedDigits
from ppl_vaebm.evaluation.metrics.features_base import FeatureNet, Outputs, network_outputs
from ppl_vaebm.evaluation.metrics.frechet import frechet_bias, frechet_distance, kernel_distance
from ppl_vaebm.evaluation.metrics.inputs import Estimate
from ppl_vaebm.evaluation.metrics.modes import class_coverage, coverage_of_even_draws
from ppl_vaebm.evaluation.metrics.neighbours import (
    Neighbours,
    density_coverage,
    nearest_neighbours,
    precision_recall,
    precision_recall_error,
)
from ppl_vaebm.evaluation.sections import Arrays, Effort, Measured, Rows, Section, Value, random_order
from ppl_vaebm.rng import stream

BLOCK = 500
"""Images read at a time."""
BATCH = 50
"""Images that a network sees at a time: for Inception-v3 on a CPU they take 2 GB."""
NUM_SPLITS = 10
"""Parts of the samples that have an Inception Score each; the custom since Salimans et al. 2016."""
FRECHET = "Frechet distance"
STACKED, NUM_STACKED = "stacked-mnist", 1_000
"""The data set whose classes are counted, and how many it has."""
METRICS = (FRECHET, "KID", "Inception Score", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Judge:
    """A network, and the data that samples are measured against."""

    net: FeatureNet
    data: Data
    reference: Outputs
    """Of training images in random order."""
    held_out: Outputs
    """Of test images in random order, no more than samples are asked for."""
    real: Tensor
    """Some training images, whose size and range samples must have."""
    seed: int

    def describe(self, x: Tensor) -> Outputs:
        """Compute the network's outputs for images ``(n, C, H, W)`` on any device, discretised as the data are.

        InputError for images of another size or range than the data's, or pixels that are not finite.
        """
        images = quantised_as(x.cpu(), self.data)
        check_images(self.real, images)
        return network_outputs(self.net, images, BATCH)


def image_blocks(data: Data, part: str, indices: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield blocks ``(up to BLOCK, C, H, W)`` of the part train or test, discretised and without augmentation."""
    split = without_augmentation(without_noise({"train": data.train, "test": data.test}[part]))
    noise = stream(seed, "dequantise", part)
    for rows in indices.split(BLOCK):
        yield quantised_as(split.batch(rows, noise), data)


def check_sizes(data: Data, effort: Effort, parts: Sequence[Part]) -> None:
    """Raise InputError if there are fewer samples or images than the metrics of the parts need."""
    num_train, num_test = min(effort.num_reference, len(data.train)), len(data.test)
    # The training images are split in halves, for what the metrics say of data.
    if min(num_train // 2, num_test, effort.num_samples) < NUM_SPLITS:
        raise InputError(
            f"metrics of images need at least {NUM_SPLITS} samples, {NUM_SPLITS} test images and {2 * NUM_SPLITS} "
            f"training images, got {effort.num_samples}, {num_test} and {num_train}; ask for more, or leave "
            f"{' and '.join(parts)} out with --only"
        )


def new_judge(net: FeatureNet, data: Data, effort: Effort, seed: int) -> Judge:
    """Compute the features of the data that samples are compared with; InputError as :func:`check_sizes`."""
    check_sizes(data, effort, ("samples",))
    num_train, num_test = min(effort.num_reference, len(data.train)), min(effort.num_samples, len(data.test))
    described = {}
    for part, split, num in (("train", data.train, num_train), ("test", data.test, num_test)):
        indices = random_order(split, seed, part)[:num]
        described[part] = joined(
            [network_outputs(net, images, BATCH) for images in image_blocks(data, part, indices, seed)]
        )
    real = next(image_blocks(data, "train", random_order(data.train, seed, "train")[:BLOCK], seed))
    return Judge(net, data, described["train"], described["test"], real, seed)


def joined(parts: list[Outputs]) -> Outputs:
    """Join blocks of one set."""
    return Outputs(torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts]))


class MetricRow(NamedTuple):
    """The metrics of one set of images."""

    name: str
    cells: dict[str, Value]
    """By the names of :data:`METRICS`."""


def metric_rows(judge: Judge, sets: Mapping[str, Outputs], num: int) -> list[MetricRow]:
    """Measure training images against other training images, held-out data, and each set of samples, in this order."""
    reference = judge.reference
    half = min(num, len(reference.features) // 2)
    some, others = (Outputs(*(part[rows] for part in reference)) for rows in (slice(half), slice(half, None)))
    return [
        MetricRow(
            f"training data, {half} images against {len(others.features)} others", _cells(some, others, judge.seed)
        ),
        MetricRow(
            f"held-out data, {len(judge.held_out.features)} images", _cells(judge.held_out, reference, judge.seed)
        ),
        *(MetricRow(name, _cells(found, reference, judge.seed)) for name, found in sets.items()),
    ]


def _cells(found: Outputs, reference: Outputs, seed: int) -> dict[str, Value]:
    # Both are in random order, so the first ones are a fair choice.
    num = min(len(found.features), len(reference.features))
    pair = (reference.features[:num], found.features[:num])
    shares = zip(precision_recall(*pair), precision_recall_error(*pair), strict=True)
    precision, recall = (Estimate(value, error)._asdict() for value, error in shares)
    kernel = kernel_distance(found.features, reference.features, stream(seed, "kernel distance"))
    score = inception_score(found.logits, NUM_SPLITS)
    distance = frechet_distance(found.features, reference.features)
    values = (distance, kernel._asdict(), score._asdict(), precision, recall, *density_coverage(*pair))
    return dict(zip(METRICS, values, strict=True))


def metric_section(judge: Judge, rows: list[MetricRow], num: int, more: Mapping[str, Rows]) -> Section:
    """Lay the metrics of sets of ``num`` samples out as columns, with others of the same sets beside them."""
    columns = {metric: {row.name: row.cells[metric] for row in rows} for metric in METRICS}
    return Section(f"{judge.net.name}, {num} samples", {**columns, **more})


def remarks(judge: Judge, samples: Outputs, num: int) -> Section:
    """Report sizes, the accuracy of a network trained on the data's labels, and the bias of the Frechet distance.

    The samples, one of the measured sets, determine that bias where they are fewer than features.
    """
    num_reference, num_features = len(judge.reference.features), judge.net.num_features
    section: Rows = {
        "measured against": f"{num_reference} training images, clipped and rounded to {judge.data.levels} levels",
        "features": num_features,
    }
    labels = judge.data.test.labels
    if labels is not None and isinstance(judge.net, (Classifier, StackedDigits)):
        num_test = len(judge.held_out.logits)
        shown = labels[random_order(judge.data.test, judge.seed, "test")[:num_test]]
        section[f"accuracy on {num_test} test images"] = accuracy(judge.held_out.logits, shown)._asdict()
    if num < num_features:
        found = frechet_bias(judge.reference.features, samples.features, stream(judge.seed, "bias"))
        section["warning"] = (
            f"{num} samples are fewer than the {num_features} features, so the Frechet distance is too large, "
            f"by {found.low:.4g} to {found.high:.4g}: take at least {2 * num_features}"
        )
    if num > num_reference:
        section["precision and recall, density and coverage"] = (
            f"of the first {num_reference} samples, for there are no more training images, and sets of one size are due"
        )
    return Section(f"about the metrics of {judge.net.name}", {"": section})


def class_columns(judge: Judge, sets: Mapping[str, Outputs], num: int) -> dict[str, Rows]:
    """Count the classes of StackedMNIST that samples fall in, and how evenly (Metz et al. 2017, arXiv:1611.02163).

    There are two columns, with the averages of independent draws of even classes; none for other data or other logits.
    """
    if judge.data.name != STACKED or judge.held_out.logits.shape[1] != NUM_STACKED:
        return {}
    everything = {f"held-out data, {len(judge.held_out.logits)} images": judge.held_out, **sets}
    found = {name: class_coverage(outputs.logits.argmax(-1), NUM_STACKED) for name, outputs in everything.items()}
    counted: Rows = {name: coverage.num_modes for name, coverage in found.items()}
    divergence: Rows = {name: coverage.kl_to_uniform for name, coverage in found.items()}
    # All sets but the held-out data have one size.
    even, name = coverage_of_even_draws(num, NUM_STACKED), "independent draws of even classes"
    counted[name], divergence[name] = even.num_modes, even.kl_to_uniform
    return {f"classes of {NUM_STACKED}": counted, "KL to even classes (nats)": divergence}


def metric_arrays(rows: list[MetricRow], **others: object) -> Arrays:
    """Lay rows out as arrays, for pictures: ``value`` and ``error``, ``(rows, metrics)``, and the names of both."""

    def part(cell: Value, key: str) -> float:
        if isinstance(cell, dict):
            return cell[key]
        return float(cell) if key == "value" else float("nan")

    values = {key: np.array([[part(row.cells[m], key) for m in METRICS] for row in rows]) for key in ("value", "error")}
    names = {"rows": np.array([row.name for row in rows]), "metrics": np.array(METRICS)}
    return {**values, **names, **{name: np.asarray(value) for name, value in others.items()}}


NUM_SHOWN = 10
"""Samples that are shown with their neighbours."""
COPY_QUANTILE = 0.01
"""About the share of test images that lie nearer to a training image than what is called near here. Chosen by us."""


class Nearest(NamedTuple):
    """The training image nearest to each of some images, as it is or mirrored."""

    distance: Tensor
    """Euclidean, ``(n,)``."""
    place: Tensor
    """Its place in the order in which training images are read, ``(n,)``."""
    is_mirrored: Tensor
    """Whether its mirror image is the nearer one, ``(n,)``."""


def measure_neighbours(data: Data, samples: Tensor, judge: Judge | None, effort: Effort, seed: int) -> Measured:
    """Find the training images nearest to samples, and nearest to as many test images.

    Where training mirrors its images at random, both forms of each are compared. In features, that is the distance of
    the mirrored sample from the training image. The samples are discretised, ``(n, C, H, W)``, on the CPU.

    Returns a section with columns for pixels and, with a judge, for features; and the first samples and their
    neighbours as images.
    """
    order = random_order(data.train, seed, "train")[: effort.num_reference]
    test_order = random_order(data.test, seed, "test")[: len(samples)]
    test = torch.cat(list(image_blocks(data, "test", test_order, seed)))
    searches = {"pixels": ("in pixels", lambda images: _nearest_pixels(data, order, images, seed))}
    if judge is not None:
        searches["features"] = (f"in features of {judge.net.name}", lambda images: _nearest_features(judge, images))
    has_mirrored = has_flips(data.train)
    columns, shown = {}, {"samples": samples[:NUM_SHOWN].numpy()}
    for name, (column, search) in searches.items():
        of_samples, of_test = (_nearest(search, images, has_mirrored) for images in (samples, test))
        columns[column] = _neighbour_rows(of_samples, of_test)
        shown[name] = _picked(data, order, Nearest(*(part[:NUM_SHOWN] for part in of_samples)), seed).numpy()
    title = f"nearest training images, {len(samples)} samples and {len(test)} test images"
    return Measured([Section(title, columns)], {**shown})


def has_flips(split: Split) -> bool:
    """Return whether each image of a batch is mirrored with probability 1/2."""
    while isinstance(split, Smoothed | Subset):
        split = split.clean if isinstance(split, Smoothed) else split.whole
    return isinstance(split, IntegerImages | LazyImages) and split.has_flips


def _nearest(search: Callable[[Tensor], Neighbours], images: Tensor, has_mirrored: bool) -> Nearest:
    found = search(images)
    distance, place = found.distance[:, 0], found.indices[:, 0]
    if not has_mirrored:
        return Nearest(distance, place, torch.zeros_like(place, dtype=torch.bool))
    # An image is as far from a mirrored one as its own mirror image is from that one.
    mirrored = search(images.flip(-1))
    is_nearer = mirrored.distance[:, 0] < distance
    return Nearest(
        torch.where(is_nearer, mirrored.distance[:, 0], distance),
        torch.where(is_nearer, mirrored.indices[:, 0], place),
        is_nearer,
    )


def _nearest_pixels(data: Data, order: Tensor, images: Tensor, seed: int) -> Neighbours:
    """Search the training images block by block, for all together may not fit in memory."""
    points = images.flatten(1)
    distance = torch.full((len(images), 1), math.inf, dtype=torch.float64)
    place = torch.zeros(len(images), 1, dtype=torch.long)
    for index, block in enumerate(image_blocks(data, "train", order, seed)):
        found = nearest_neighbours(points, block.flatten(1))
        is_nearer = found.distance < distance
        distance = torch.where(is_nearer, found.distance, distance)
        place = torch.where(is_nearer, found.indices + index * BLOCK, place)
    return Neighbours(distance, place)


def _nearest_features(judge: Judge, images: Tensor) -> Neighbours:
    return nearest_neighbours(judge.describe(images).features, judge.reference.features)


def _picked(data: Data, order: Tensor, nearest: Nearest, seed: int) -> Tensor:
    """Read training images by their place, as the search saw them, and mirror those whose mirror image is nearer."""
    blocks = enumerate(image_blocks(data, "train", order, seed))
    wanted = {*nearest.place.tolist()}
    picked = {place: block[place % BLOCK] for i, block in blocks for place in wanted if place // BLOCK == i}
    images = torch.stack([picked[place] for place in nearest.place.tolist()])
    return torch.where(nearest.is_mirrored[:, None, None, None], images.flip(-1), images)


def _neighbour_rows(samples: Nearest, test: Nearest) -> Rows:
    medians = [float(nearest.distance.median()) for nearest in (samples, test)]
    ratio: Value = "none: half of the test images are copies of training images"
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


def near_shares(samples: Tensor, test: Tensor) -> Rows:
    """Return the fraction of samples nearer to training images than nearly all test images, and its expectation.

    The threshold is the k-th smallest of m distances of test images. Draws of the data distribution fall below it with
    probability Beta(k, m + 1 - k), of mean ``q = k / (m + 1)``; k >= 1 brings q nearest to :data:`COPY_QUANTILE`. The
    error joins the binomial one of the samples and that of the quantile, ``q (1 - q) / (m + 2)``.

    Args:
        samples: distances, ``(n,)``, n >= 1.
        test: distances of test images, ``(m,)``, m >= 1.
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
    return {name: {"value": share, "error": error}, "the same, expected of draws of the data distribution": expected}
