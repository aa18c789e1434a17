"""The classifier: what it learns, what it refuses, and its file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import IntegerImages
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classifier import Classifier, accuracy, load_or_train, shifted, train_classifier
from ppl_vaebm.evaluation.metrics.features_base import network_outputs
from ppl_vaebm.evaluation.metrics.frechet import frechet_distance
from ppl_vaebm.rng import global_rng, stream


def halves(num: int, key: str, *, is_swapped: bool = False) -> IntegerImages:
    """Noise images with a bright left (class 0) or right (class 1) half."""
    generator = stream(0, "halves", key)
    labels = torch.randint(2, (num,), generator=generator)
    images = torch.randint(100, (num, 1, 8, 8), generator=generator)
    images[labels == 0, :, :, :4] += 100
    images[labels == 1, :, :, 4:] += 100
    return IntegerImages(images.to(torch.uint8), 1 - labels if is_swapped else labels)


def data_of(train: IntegerImages, name: str = "halves") -> Data:
    validation, test = halves(20, "validation"), halves(200, "test")
    return Data(name, torch.Size([1, 8, 8]), train, validation, test, levels=256)


def untrained(event_shape: torch.Size, num_classes: int) -> Classifier:
    with global_rng(0):
        return Classifier("untrained", event_shape, num_classes).eval()


@pytest.mark.parametrize(("side", "final"), [(4, 4), (8, 4), (12, 6), (16, 4), (28, 7), (32, 4), (65, 5)])
def test_sides_are_halved_to_what_the_last_layer_reads(side: int, final: int) -> None:
    classifier = untrained(torch.Size([2, side, side]), 3)
    assert classifier.body(torch.zeros(1, 2, side, side)).shape == (1, 64)
    linear = classifier.body[-2]
    assert isinstance(linear, torch.nn.Linear) and linear.in_features == 64 * final**2


def noise() -> torch.Generator:
    return stream(0, "noise")


def share_right(classifier: Classifier, data: Data) -> float:
    """Return the accuracy on the test images."""
    assert data.test.labels is not None
    x = quantised_as(data.test.batch(torch.arange(len(data.test)), noise()), data)
    return accuracy(network_outputs(classifier, x).logits, data.test.labels).value


def test_accuracy_is_counted_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 3.0], [5.0, 4.0, 4.5]])
    assert accuracy(logits, torch.tensor([0, 1, 2, 2])) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 4)))
    assert accuracy(logits, torch.tensor([1, 0, 0, 1])) == (0.0, 0.0)


def test_classifier_learns_classes_that_differ() -> None:
    data = data_of(halves(200, "train"))
    classifier = train_classifier(data, 0, steps=30, batch_size=50)
    assert share_right(classifier, data) > 0.99


def test_classifier_of_swapped_labels_is_always_wrong() -> None:
    data = data_of(halves(200, "train", is_swapped=True))
    classifier = train_classifier(data, 0, steps=30, batch_size=50)
    assert share_right(classifier, data) < 0.01


def test_training_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    data = data_of(halves(40, "train"))
    before = torch.get_rng_state()
    first, again, other = (train_classifier(data, seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    x = data.test.batch(torch.arange(5), noise())
    assert torch.equal(first.outputs(x).features, again.outputs(x).features)
    assert not torch.allclose(first.outputs(x).features, other.outputs(x).features, atol=1e-3)


def test_features_are_what_the_head_reads_and_rows_are_independent() -> None:
    classifier = untrained(torch.Size([3, 28, 28]), 7)
    x = torch.rand(4, 3, 28, 28, generator=noise()) * 2 - 1
    features = classifier.outputs(x).features
    assert features.shape == (4, 64)
    assert torch.equal(classifier.head(features), classifier.outputs(x).logits)
    assert classifier.outputs(x)[0].shape == (4, classifier.num_features)
    torch.testing.assert_close(classifier.outputs(x[2:3]).features, features[2:3], rtol=1e-4, atol=1e-5)


def test_shifts_reach_all_nine_neighbours_and_fill_with_black() -> None:
    x = torch.full((2000, 2, 4, 5), -1.0)
    x[:, 1, 2, 2] = 1.0
    moved = shifted(x, noise())
    assert (moved[:, 0] == -1).all()
    spots = moved[:, 1].sum(0) + 2000
    assert (moved[:, 1] == 1).flatten(1).sum(1).eq(1).all()
    expected = torch.zeros(4, 5)
    expected[1:4, 1:4] = 2 * 2000 / 9
    assert (spots - expected).abs().max() < 2 * 5 * (2000 * 8 / 81) ** 0.5
    assert (spots[expected == 0] == 0).all()


def test_classes_of_all_parts_are_counted(tmp_path: Path) -> None:
    data = data_of(halves(40, "train"))
    assert isinstance(data.train, IntegerImages) and data.train.labels is not None
    lacking = IntegerImages(data.train.images[data.train.labels == 0], data.train.labels[data.train.labels == 0])
    classifier = load_or_train(tmp_path / "c.safetensors", data_of(lacking), 0, steps=1)
    assert classifier.num_classes == 2


def without_labels(data: Data) -> Data:
    assert isinstance(data.train, IntegerImages)
    train = IntegerImages(data.train.images)
    return Data(data.name, data.event_shape, train, data.validation, train, levels=256)


def test_data_without_labels_are_refused(tmp_path: Path) -> None:
    data = without_labels(data_of(halves(40, "train")))
    with pytest.raises(InputError, match="needs images with labels, and data set halves has none"):
        train_classifier(data, 0, steps=1)
    with pytest.raises(InputError, match="choose a labelled data set"):
        load_or_train(tmp_path / "c.safetensors", data, 0)
    with pytest.raises(InputError, match="gaussians25 has none"):
        train_classifier(load_data(DataConfig(num_points=50), 0), 0, steps=1)


def logits(classifier: Classifier) -> Tensor:
    return classifier.outputs(halves(5, "probe").batch(torch.arange(5), noise())).logits


def test_file_gives_the_same_network_back(tmp_path: Path) -> None:
    data, path = data_of(halves(40, "train")), tmp_path / "deep" / "c.safetensors"
    trained = load_or_train(path, data, 0, steps=3)
    assert trained.name == "cnn-halves"
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]
    assert torch.equal(logits(load_or_train(path, data, 0, steps=3)), logits(trained))
    assert torch.equal(logits(load_or_train(path, data, 5, steps=3)), logits(trained))
    assert not torch.equal(logits(train_classifier(data, 5, steps=3)), logits(trained))


def test_file_of_another_data_set_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    load_or_train(path, data_of(halves(40, "train")), 0, steps=1)
    with pytest.raises(InputError, match="expected a classifier .*cnn-other.* found .*cnn-halves.*delete it"):
        load_or_train(path, data_of(halves(40, "train"), "other"), 0)
    tensors = load_file(path)
    description = {"name": "cnn-halves", "event_shape": "1x8x8", "num_classes": "2"}
    save_file(tensors, path, metadata=description)  # as before the networks had a recipe
    with pytest.raises(InputError, match="expected a classifier .*'recipe': '2'.* found .*delete it"):
        load_or_train(path, data_of(halves(40, "train")), 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"c\.safetensors cannot be read"):
        load_or_train(path, data_of(halves(40, "train")), 0)


@pytest.mark.slow
def test_digits_are_classified_and_their_distance_orders_samples() -> None:
    data = load_data(DataConfig(name="digits"), 0)
    classifier = train_classifier(data, 0)
    assert share_right(classifier, data) >= 0.97
    everything = torch.arange(len(data.train))
    train = classifier.outputs(quantised_as(data.train.batch(everything, noise()), data)).features
    test = classifier.outputs(quantised_as(data.test.batch(torch.arange(len(data.test)), noise()), data)).features
    random = classifier.outputs(quantised_as(torch.rand(400, 1, 8, 8, generator=noise()) * 2 - 1, data)).features
    assert frechet_distance(train, test) < 0.1 * frechet_distance(train, random)
