"""The choice of the network, and how it is run on many images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics import features
from ppl_vaebm.evaluation.metrics.classifier import Classifier, load_or_train
from ppl_vaebm.evaluation.metrics.digits import StackedDigits, load_or_train_digits
from ppl_vaebm.evaluation.metrics.features import feature_net
from ppl_vaebm.evaluation.metrics.features_base import Outputs, network_outputs
from ppl_vaebm.rng import stream


def data_of(name: str, channels: int, num_classes: int | None) -> Data:
    images = torch.randint(256, (40, channels, 8, 8), generator=stream(0, "images")).to(torch.uint8)
    labels = None if num_classes is None else torch.arange(40) % num_classes
    return image_data(name, torch.Size([channels, 8, 8]), [IntegerImages(images, labels)] * 3)


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for one step."""

    def shortened(function: Any) -> Any:
        return lambda path, data, seed: function(path, data, seed, steps=1)

    monkeypatch.setattr(features, "load_or_train", shortened(load_or_train))
    monkeypatch.setattr(features, "load_or_train_digits", shortened(load_or_train_digits))


def test_classifier_is_cached_in_the_run_and_taken_from_where_it_is_told(tmp_path: Path) -> None:
    data, run, elsewhere = data_of("patterns", 1, 2), tmp_path / "run.safetensors", tmp_path / "shared.safetensors"
    net = feature_net("classifier", None, data, 0, run)
    assert isinstance(net, Classifier) and net.name == "cnn-patterns"
    assert run.is_file()
    x = torch.zeros(1, 1, 8, 8)
    assert torch.equal(feature_net("classifier", None, data, 5, run).outputs(x).logits, net.outputs(x).logits)
    with pytest.raises(InputError, match="expected the weights of a classifier in .*shared.*, found no file"):
        feature_net("classifier", elsewhere, data, 5, run)
    other = load_or_train(elsewhere, data, 5, steps=2)
    found = feature_net("classifier", elsewhere, data, 0, run).outputs(x).logits
    assert torch.equal(found, other.outputs(x).logits) and not torch.equal(found, net.outputs(x).logits)


def test_stacked_digits_have_a_classifier_of_digits(tmp_path: Path) -> None:
    net = feature_net("classifier", None, data_of("stacked-mnist", 3, 1000), 0, tmp_path / "stacked")
    assert isinstance(net, StackedDigits)
    assert isinstance(feature_net("classifier", None, data_of("other", 3, 5), 0, tmp_path / "other"), Classifier)


def test_data_without_labels_have_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs images with labels, and data set folder has none"):
        feature_net("classifier", None, data_of("folder", 3, None), 0, tmp_path)


def test_inception_takes_the_path_and_needs_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: Path | None) -> torch.nn.Module:
        asked.append(path)
        return torch.nn.Identity()

    monkeypatch.setattr(features, "load_inception", load)
    for path in (None, tmp_path / "weights.pth"):
        feature_net("inception", path, data_of("folder", 3, None), 0, tmp_path)
    assert asked == [None, tmp_path / "weights.pth"]
    assert list(tmp_path.iterdir()) == []


class Counting(torch.nn.Module):
    """Says how many images it was shown at once."""

    name, num_features = "counting", 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def outputs(self, x: Tensor) -> Outputs:
        flat = self.scale * x.flatten(1)
        return Outputs(flat[:, :2], torch.full((len(x), 3), float(len(x))))

    def features(self, x: Tensor) -> Tensor:
        return self.outputs(x).features

    def logits(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits


def test_images_are_shown_in_blocks_and_keep_their_order() -> None:
    x = torch.rand(10, 1, 2, 2, generator=stream(0, "x"))
    found = network_outputs(Counting(), x, batch_size=4)
    assert torch.equal(found.features, 2 * x.flatten(1)[:, :2])
    assert found.logits[:, 0].tolist() == [4.0] * 8 + [2.0] * 2
    assert not found.features.requires_grad
