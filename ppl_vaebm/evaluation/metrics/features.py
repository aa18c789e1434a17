"""Choice of the network whose features and logits metrics of images use.

Such a metric is comparable only with others of the same network, so results carry its name: ``FD[cnn-digits]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classifier import load_or_train
from ppl_vaebm.evaluation.metrics.digits import load_or_train_digits
from ppl_vaebm.evaluation.metrics.features_base import FeatureNet
from ppl_vaebm.evaluation.metrics.inception import load_inception

FeatureChoice = Literal["classifier", "inception"]


def feature_net(
    choice: FeatureChoice, path: Path | None, data: Data, seed: int, cache: Path, device: torch.device | str = "cpu"
) -> FeatureNet:
    """Load or train the network of a run's metrics, in evaluation mode and frozen.

    Args:
        choice: ``classifier``, trained on the run's own data (of StackedMNIST, on its single digits), or ``inception``,
            Inception-v3.
        path: file of its weights, which must be there; ``None`` for the cache, or for Inception-v3's file in PyTorch's
            cache, which is fetched if it is not there.
        cache: file of the classifier, which is written if it is not there.

    Raises:
        InputError: the data are not labelled images, torch-fidelity is not installed, or the file is missing, cut short
            or of another network.
    """
    if choice == "inception":
        return load_inception(path).to(device)
    if path is not None and not path.is_file():
        raise InputError(
            f"expected the weights of a classifier in {path}, found no file; name another, or leave the option out to "
            "train one"
        )
    load = load_or_train_digits if data.name == "stacked-mnist" else load_or_train
    net: FeatureNet = load(path or cache, data, seed).to(device)
    return net
