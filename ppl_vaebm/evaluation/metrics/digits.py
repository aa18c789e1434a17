"""A classifier of StackedMNIST: one network reads the digit of each channel.

A network with an output for each of the 1,000 classes would see every class some 60 times. One of single digits sees
each 18,000 times, and as the channels are independent, the product of its three answers is the answer for the class
(Metz et al. 2017, arXiv:1611.02163, count modes so).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, Split, without_noise
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classifier import NUM_STEPS, Classifier, load_or_train
from ppl_vaebm.evaluation.metrics.features_base import Outputs

NUM_CHANNELS = 3
NUM_DIGITS = 10


class StackedDigits(nn.Module):
    """Features and class of three digits stacked as channels, by a classifier of single digits, ``(n, 1, H, W)``."""

    num_features = NUM_CHANNELS * Classifier.num_features

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.name, self.classifier = classifier.name, classifier

    def outputs(self, x: Tensor) -> Outputs:
        """Return the three channels' features side by side, ``(n, 192)``, and logits of the classes, ``(n, 1000)``.

        The images are ``(n, 3, H, W)`` in [-1, 1]; the class of digits a, b and c is ``100 a + 10 b + c``.
        """
        features, logits = self.classifier.outputs(x.flatten(0, 1).unsqueeze(1))
        first, second, third = logits.log_softmax(-1).unflatten(0, (len(x), NUM_CHANNELS)).unbind(1)
        joint = first[:, :, None, None] + second[:, None, :, None] + third[:, None, None, :]
        return Outputs(features.unflatten(0, (len(x), NUM_CHANNELS)).flatten(1), joint.flatten(1))


def load_or_train_digits(path: Path, data: Data, seed: int, *, steps: int = NUM_STEPS) -> StackedDigits:
    """Read a trained classifier of digits from a file, or train one on the channels of the data and write the file.

    For arguments and result see :func:`ppl_vaebm.evaluation.metrics.classifier.load_or_train`.

    Raises:
        InputError: the data are not StackedMNIST or lack a digit in training, or the file holds something else.
    """
    return StackedDigits(load_or_train(path, _single_digits(data), seed, steps=steps)).eval()


def _single_digits(data: Data) -> Data:
    """Turn triples into single digits with their labels."""
    train, validation, test = (_channels(data, split) for split in (data.train, data.validation, data.test))
    assert train.labels is not None
    missing = sorted(set(range(NUM_DIGITS)) - set(train.labels.tolist()))
    if missing:
        raise InputError(
            f"the training images of data set {data.name} have no digit {', '.join(map(str, missing))}, so no "
            "classifier can learn it; if MNIST's file is sorted, hold out fewer images with --data.num-validation, or "
            "shuffle it"
        )
    name, event_shape = f"{data.name}-digits", torch.Size([1, *data.event_shape[1:]])
    return replace(data, name=name, event_shape=event_shape, train=train, validation=validation, test=test)


def _channels(data: Data, split: Split) -> IntegerImages:
    split = without_noise(split)
    if not isinstance(split, IntegerImages) or split.labels is None or split.images.shape[1] != NUM_CHANNELS:
        raise InputError(f"a classifier of stacked digits needs StackedMNIST, got data set {data.name}; choose another")
    digits = torch.stack([split.labels // NUM_DIGITS**place % NUM_DIGITS for place in (2, 1, 0)], dim=1)
    return replace(split, images=split.images.flatten(0, 1).unsqueeze(1), labels=digits.flatten())
