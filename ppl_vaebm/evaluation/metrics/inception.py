"""Inception-v3 with the weights of the original TensorFlow network: distances comparable with published ones.

The network is torch-fidelity's, an optional dependency, because its resizing and pooling equal TensorFlow's to the bit.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vaebm.data.pixels import to_bytes
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.features_base import Outputs
from ppl_vaebm.rng import global_rng

# The start of the SHA-256 of weights-inception-2015-12-05-6726825d.pth; torch-fidelity has it in the file's name.
WEIGHTS_HASH = "6726825d"


class Inception(nn.Module):
    """Inception-v3 of 2015-12-05, as Frechet distances, kernel distances and Inception Scores use it.

    The extractor is torch-fidelity's network, giving ``2048`` and ``logits_unbiased``.
    """

    num_features = 2048

    def __init__(self, name: str, extractor: nn.Module) -> None:
        super().__init__()
        self.name, self.extractor = name, extractor

    def outputs(self, x: Tensor) -> Outputs:
        """Return the last pooling layer, ``(n, 2048)``, and the scores of the output layer without its bias.

        The images, ``(n, 1 or 3, H, W)`` in [-1, 1], become bytes, and grey is repeated. With the scores, ``(n,
        1008)``, Salimans et al. 2016 and torch-fidelity compute the Inception Score. (Some scripts keep the first
        1,000, whose score is a little higher.) InputError for another number of channels.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(
                f"Inception-v3 needs images of shape (n, 1 or 3, H, W), got {tuple(x.shape)}; "
                "use the features of a classifier"
            )
        return Outputs(*self.extractor(to_bytes(x).expand(-1, 3, -1, -1)))


def load_inception(path: Path | None = None) -> Inception:
    """Load Inception-v3 from the file that torch-fidelity publishes; without a path, from PyTorch's cache, or fetch it.

    It is in evaluation mode and frozen, on the CPU. It is called ``inception-v3`` if the file is that of the original
    weights, whose numbers compare with the literature's, else ``inception-v3-`` and the file's hash.

    Raises:
        InputError: torch-fidelity is not installed, or the file is missing, cut short or of another network.
    """
    module = _torch_fidelity()
    path = _fetched(module.URL_INCEPTION_V3) if path is None else path
    if not path.is_file():
        raise InputError(
            f"expected weights of Inception-v3 in {path}, found no such file; fetch {module.URL_INCEPTION_V3} and name "
            "the place where it lies"
        )
    _check_readable(path, module.URL_INCEPTION_V3)
    try:
        with global_rng(0):  # the network draws weights before it loads them
            extractor = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"expected weights of Inception-v3 in {path}, found those of another network; "
            f"fetch {module.URL_INCEPTION_V3}"
        ) from error
    start = hashlib.sha256(path.read_bytes()).hexdigest()[: len(WEIGHTS_HASH)]
    name = "inception-v3" if start == WEIGHTS_HASH else f"inception-v3-{start}"
    return Inception(name, extractor).eval().requires_grad_(False)


def _torch_fidelity() -> Any:
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ModuleNotFoundError as error:
        raise InputError(
            f"features of Inception-v3 need the package {(error.name or 'torch_fidelity').replace('_', '-')}; "
            "install it with pip install -e '.[metrics]'"
        ) from error
    return feature_extractor_inceptionv3


def _fetched(url: str) -> Path:
    """Return the file in PyTorch's cache, where torch-fidelity keeps it too, after fetching it if need be."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=WEIGHTS_HASH)
    # RuntimeError is what PyTorch raises where the hash is another.
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the weights of Inception-v3 could not be fetched ({' '.join(str(error).split())}); fetch {url} by other "
            f"means, and put it into {path.parent} or name the place where it lies"
        ) from error
    return path


def _check_readable(path: Path, url: str) -> None:
    """Read the file as tensors and nothing else, for torch-fidelity would run whatever code a pickle holds."""
    try:
        # PyTorch warns before it refuses pickles that are not its own.
        with warnings.catch_warnings(action="ignore"):
            torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise InputError(
            f"the weights of Inception-v3 in {path} are cut short or no file of PyTorch tensors; fetch {url} again"
        ) from error
