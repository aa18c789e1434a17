"""The classifier of stacked digits: its classes, its features, and which data it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import IntegerImages, Smoothed, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classifier import accuracy
from ppl_vaebm.evaluation.metrics.digits import StackedDigits, load_or_train_digits
from ppl_vaebm.evaluation.metrics.features_base import network_outputs
from ppl_vaebm.rng import stream


def stacked(num: int, key: str) -> IntegerImages:
    """Triples of "digits": digit d has its pixel d bright."""
    digits = torch.randint(10, (num, 3), generator=stream(0, "digits", key))
    images = torch.randint(60, (num, 3, 64), generator=stream(0, "noise", key))
    images.scatter_(2, 5 * digits.unsqueeze(2), 200)
    return IntegerImages(images.unflatten(2, (8, 8)).to(torch.uint8), digits @ torch.tensor([100, 10, 1]))


def stacked_data(name: str = "stacked-mnist") -> Data:
    return image_data(
        name, torch.Size([3, 8, 8]), [stacked(700, "train"), stacked(20, "validation"), stacked(200, "test")]
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> StackedDigits:
    return load_or_train_digits(tmp_path_factory.mktemp("net") / "features.safetensors", stacked_data(), 0, steps=60)


def shown(data: Data) -> Tensor:
    return quantised_as(data.test.batch(torch.arange(len(data.test)), stream(0, "x")), data)


def test_classes_are_read_channel_by_channel(net: StackedDigits) -> None:
    data = stacked_data()
    logits, true_labels = network_outputs(net, shown(data)).logits, data.test.labels
    assert true_labels is not None and accuracy(logits, true_labels).value > 0.97
    labels = logits.argmax(-1)
    assert labels.shape == (200,) and labels.dtype == torch.int64
    # Red counts hundreds: with the channels reversed the digits are too.
    reversed_labels = network_outputs(net, shown(data).flip(1)).logits.argmax(-1)
    assert torch.equal(reversed_labels, labels // 100 + labels // 10 % 10 * 10 + labels % 10 * 100)
    assert float(torch.eq(reversed_labels, true_labels).double().mean()) < 0.3


def test_logits_of_classes_are_those_of_their_digits(net: StackedDigits) -> None:
    x = shown(stacked_data())[:6]
    features, logits = network_outputs(net, x, batch_size=4)
    assert features.shape == (6, 192) == (6, net.num_features)
    assert logits.shape == (6, 1000)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(6))
    channels = [net.classifier.outputs(x[:, channel : channel + 1]).logits.log_softmax(-1) for channel in range(3)]
    expected = channels[0][:, 4] + channels[1][:, 0] + channels[2][:, 7]
    torch.testing.assert_close(logits[:, 407], expected)
    torch.testing.assert_close(net.outputs(x).logits, logits)
    torch.testing.assert_close(
        net.outputs(x).features[:, 64:128], net.classifier.outputs(x[:, 1:2]).features, rtol=1e-4, atol=1e-5
    )


def test_the_file_is_that_of_single_digits(net: StackedDigits, tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    trained = load_or_train_digits(path, stacked_data(), 0, steps=1)
    assert trained.name == net.name == "cnn-stacked-mnist-digits"
    assert torch.equal(
        load_or_train_digits(path, stacked_data(), 5).outputs(torch.zeros(1, 3, 8, 8)).logits,
        trained.outputs(torch.zeros(1, 3, 8, 8)).logits,
    )
    with pytest.raises(InputError, match="expected a classifier .*cnn-other-digits.* found .*cnn-stacked-mnist-digits"):
        load_or_train_digits(path, stacked_data("other"), 0)


def test_other_data_are_refused(tmp_path: Path) -> None:
    grey = IntegerImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
    unlabelled = IntegerImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    for split in (grey, unlabelled):
        with pytest.raises(InputError, match="needs StackedMNIST, got data set others"):
            data = image_data("others", split.images.shape[1:], [split] * 3)
            load_or_train_digits(tmp_path / "features.safetensors", data, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_digit_that_training_lacks_is_told(tmp_path: Path) -> None:
    data = stacked_data()
    train = data.train
    assert isinstance(train, IntegerImages) and train.labels is not None
    # Where a file is sorted by digit, its last digits are all held out.
    digits = torch.stack([train.labels // 100, train.labels // 10 % 10, train.labels % 10], 1)
    rows = (digits < 8).all(1)
    lacking = replace(data, train=IntegerImages(train.images[rows], train.labels[rows]))
    with pytest.raises(InputError, match="have no digit 8, 9, so no classifier can learn it; if .* is sorted"):
        load_or_train_digits(tmp_path / "features.safetensors", lacking, 0)


def test_noise_on_the_data_is_left_out(tmp_path: Path) -> None:
    data = stacked_data()
    train, validation, test = (Smoothed(split, 0.5) for split in (data.train, data.validation, data.test))
    noisy = replace(data, train=train, validation=validation, test=test)
    x = torch.zeros(1, 3, 8, 8)
    first, second = (
        load_or_train_digits(tmp_path / name, some, 0, steps=2).outputs(x).logits
        for name, some in (("a", data), ("b", noisy))
    )
    assert torch.equal(first, second)
