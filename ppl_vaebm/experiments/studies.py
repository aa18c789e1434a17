"""Parts that the studies share: folder, recipe, VAE, results and the distance of samples to data."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import from_dict, to_dict
from ppl_vaebm.config.recipes import load_yaml, recipe_path
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import without_noise
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classifier import load_or_train
from ppl_vaebm.evaluation.metrics.features_base import FeatureNet, network_outputs
from ppl_vaebm.evaluation.metrics.frechet import frechet_distance
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.sampling import decode_in_blocks
from ppl_vaebm.inference.svi.svi import fit_svi
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import stream
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.loading import load_vae
from ppl_vaebm.runs.run import Run

RESULTS = Path(__file__).parent / "results"


def folder_of(argv: list[str] | None) -> Path:
    """Return the folder that is the only argument of a study, or of the process; InputError for none or several."""
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 1:
        raise InputError(f"expected one folder to write to, found {len(given)} arguments: name one")
    return Path(given[0])


def run_of(folder: Path, setting: str) -> Run:
    """Make the run of a setting in the folder of a study."""
    return Run.create(folder / re.sub(r"[^a-z0-9]+", "-", setting).strip("-"))


def recipe(name: str) -> Config:
    """Read a recipe."""
    return from_dict(load_yaml(recipe_path(name)), f"the recipe {name}")


def with_options(base: Config, *settings: Mapping[str, Mapping[str, Any]]) -> Config:
    """Replace options of a configuration, by section and name; ``None`` restores the default."""
    tree = to_dict(base)
    for section, options in (item for setting in settings for item in setting.items()):
        changed = {**tree[section], **options}
        tree[section] = {name: value for name, value in changed.items() if value is not None or name not in options}
    return from_dict(tree, "a setting of a study")


def load_results(file: Path) -> dict[str, Any]:
    """Read the results that a study stored earlier; none where it stored none."""
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return results


def save_results(file: Path, results: Mapping[str, Any]) -> None:
    """Store the results of a study as JSON."""
    write_atomic(file, json.dumps(results, indent=2) + "\n")


def shared_vae(folder: Path, config: Config, data: Data) -> HierarchicalVAE:
    """Fit the VAE of all settings into ``folder/vae``, or load it from there, in evaluation mode."""
    run = Run.create(folder / "vae")
    if checkpoints.available(run.checkpoints("svi"))[-1:] != [config.svi.steps]:
        fit_svi(run, config, data)
    return load_vae(run, config, data, config.ebm.prior_statistics)


def load_vaebm(folder: Path, config: Config, vae: HierarchicalVAE, step: int | None = None) -> VAEBM:
    """Load the averaged energy of a folder's checkpoint at ``step``, or of its last one, on a fitted VAE."""
    vaebm = build_vaebm(config, vae)
    vaebm.energy.load_state_dict(checkpoints.load(folder, "last" if step is None else step).weights["energy_average"])
    return vaebm.requires_grad_(False)


class DataDistance:
    """Frechet distance of samples to the training data, in features of the classifier in ``folder``.

    Args:
        folder: with the weights of the classifier, which is trained where they are missing.
        data: images; data and samples are rounded to 8 bits.
        seed: of the training and of the dequantisation, which the rounding undoes.
    """

    def __init__(self, folder: Path, data: Data, seed: int) -> None:
        self.data = data
        self.net: FeatureNet = load_or_train(folder / "features.safetensors", data, seed)
        self.real = self._features(
            without_noise(data.train).batch(torch.arange(len(data.train)), stream(seed, "judge"))
        )

    def __call__(self, potential: NoisePotential, position: Tensor) -> float | None:
        """Return the distance of samples with noise ``(n, D)``; ``None`` where a sample is not finite."""
        x = decode_in_blocks(potential, position)
        return frechet_distance(self._features(x), self.real) if bool(x.isfinite().all()) else None

    def of_data(self, num: int) -> float:
        """Return the distance of ``num`` training images to the others, a lower bound for samples of this size."""
        return frechet_distance(self.real[:num], self.real[num:])

    def _features(self, x: Tensor) -> Tensor:
        return network_outputs(self.net, quantised_as(x, self.data)).features
