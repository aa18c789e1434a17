"""A small classifier trained on the data themselves, whose last hidden layer gives features."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.data.splits import without_noise
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.features_base import Outputs
from ppl_vaebm.evaluation.metrics.inputs import Estimate
from ppl_vaebm.files import write_atomic
from ppl_vaebm.rng import global_rng, seed_for, stream

NUM_NORM_GROUPS = 8
# The image is halved until this side; the last layer has weights for every position that is left.
FINAL_SIDE = 4
# Images of this side and more are halved by the first convolution already. Chosen by us: on Fashion-MNIST a step then
# takes a third of the time, and 1,400 steps (47 s on one thread) come to 91 %, 600 without it (64 s) to 88 %.
MIN_HALVED_SIDE = 16
NUM_STEPS = 1_400
# Number of the version of network and training, so that a file of an older one is refused.
RECIPE = "2"


class Classifier(nn.Module):
    """A convolutional classifier of images in [-1, 1]."""

    num_features = 64

    def __init__(self, name: str, event_shape: torch.Size, num_classes: int) -> None:
        """Draw the weights from the global generator; the name, such as ``cnn-digits``, is that of the results."""
        super().__init__()
        self.name, self.event_shape, self.num_classes = name, event_shape, num_classes
        channels, height, width = event_shape
        stride = 2 if min(height, width) >= MIN_HALVED_SIDE else 1
        layers = _block(channels, 32, stride)
        channels, height, width = 32, -(-height // stride), -(-width // stride)
        while min(height, width) >= 2 * FINAL_SIDE:
            layers += _block(channels, 64, stride=2)
            channels, height, width = 64, (height + 1) // 2, (width + 1) // 2
        layers += _block(channels, 64, stride=1)
        linear = nn.Linear(64 * height * width, self.num_features)
        self.body = nn.Sequential(*layers, nn.Flatten(), linear, nn.GELU())
        self.head = nn.Linear(self.num_features, num_classes)

    def outputs(self, x: Tensor) -> Outputs:
        """Map images ``(n, C, H, W)`` to the last hidden layer, ``(n, 64)``, and the logits, ``(n, num_classes)``."""
        features = self.body(x)
        return Outputs(features, self.head(features))


def _block(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1),
        nn.GroupNorm(NUM_NORM_GROUPS, out_channels),
        nn.GELU(),
    ]


def train_classifier(
    data: Data, seed: int, *, steps: int = NUM_STEPS, batch_size: int = 128, learning_rate: float = 3e-3
) -> Classifier:
    """Train a classifier on the training split: AdamW, cosine decay to 0, shifts by up to one pixel.

    Batches hold all images if there are fewer. The classifier is in evaluation mode and frozen, on the CPU.

    Raises:
        InputError: the data are not images, or have no labels.
    """
    labels = _labels(data)
    with global_rng(seed_for(seed, "classifier")):
        classifier = Classifier(f"cnn-{data.name}", data.event_shape, _num_classes(data))
    sampler = KeyedSampler(len(data.train), min(batch_size, len(data.train)), seed_for(seed, "classifier-order"))
    generator = stream(seed, "classifier-noise")
    optimizer = torch.optim.AdamW(classifier.parameters(), learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        indices = sampler.indices(step)
        x = quantised_as(shifted(without_noise(data.train).batch(indices, generator), generator), data)
        loss = functional.cross_entropy(classifier.outputs(x).logits, labels[indices])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move images ``(n, C, H, W)`` by -1, 0 or 1 pixels along both axes; the border is black, -1."""
    num, _, height, width = x.shape
    moves = torch.randint(3, (2, num, 1), generator=generator)
    rows, columns = moves[0] + torch.arange(height), moves[1] + torch.arange(width)
    padded = functional.pad(x, (1, 1, 1, 1), value=-1.0).movedim(1, -1)
    return padded[torch.arange(num)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def accuracy(logits: Tensor, labels: Tensor) -> Estimate:
    """Estimate the fraction of images with logits ``(n, k)`` and classes ``(n,)`` that are classified correctly.

    The error is the binomial one.
    """
    fraction = float((logits.argmax(-1) == labels).double().mean())
    return Estimate(fraction, math.sqrt(fraction * (1 - fraction) / len(labels)))


def load_or_train(path: Path, data: Data, seed: int, *, steps: int = NUM_STEPS) -> Classifier:
    """Read a trained classifier from a safetensors file, whatever its seed was, or train one and write the file.

    It is in evaluation mode and frozen, on the CPU.

    Raises:
        InputError: the data are not labelled images, or the file holds something else.
    """
    _labels(data)
    if path.exists():
        return _load(path, data)
    classifier = train_classifier(data, seed, steps=steps)
    write_atomic(path, save(classifier.state_dict(), metadata=_description(classifier)))
    return classifier


def _load(path: Path, data: Data) -> Classifier:
    with global_rng(0):
        classifier = Classifier(f"cnn-{data.name}", data.event_shape, _num_classes(data))
    expected = _description(classifier)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = file.metadata()
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"the classifier in {path} cannot be read ({error}); name another file, or delete it if it is the run's "
            "own, to train anew"
        ) from error
    if description != expected:
        raise InputError(
            f"expected a classifier {expected} in {path}, found {description}; name another file, or delete it if it "
            "is the run's own, to train anew"
        )
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


def _description(classifier: Classifier) -> dict[str, str]:
    return {
        "name": classifier.name,
        "event_shape": "x".join(map(str, classifier.event_shape)),
        "num_classes": str(classifier.num_classes),
        "recipe": RECIPE,
    }


def _labels(data: Data) -> Tensor:
    if len(data.event_shape) != 3 or data.train.labels is None:
        raise InputError(
            f"a classifier needs images with labels, and data set {data.name} has none; choose a labelled data set"
        )
    return data.train.labels


def _num_classes(data: Data) -> int:
    """Count the classes of all parts, for training may lack one."""
    parts = [_labels(data), data.validation.labels, data.test.labels]
    return 1 + max(int(labels.max()) for labels in parts if labels is not None)
