"""The arrays behind the pictures of stage 1, into files of the run's samples folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import Split, random_subset
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.batch_norm import norms_of
from ppl_vaebm.inference.svi.svi import mean_elbo
from ppl_vaebm.inference.vae_draws import prior_draws, prior_means, reconstructions, traversal
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.reports.samples import save_grid_png
from ppl_vaebm.reports.vae import (
    GROUP_KL,
    LARGE_SIDE,
    PRIOR,
    RECONSTRUCTIONS,
    TRAVERSAL,
    Arrays,
    gallery_grids,
    images_per_row,
    side_by_side,
)
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.fitted_vae import FittedVAE
from ppl_vaebm.runs.run import Run
from ppl_vaebm.runs.tensorboard import StageBoards

TEMPERATURES = (0.6, 0.7, 0.8, 1.0)
NUM_KL_POINTS = 500
NUM_POINTS = 2_000
"""Draws shown of a VAE of points."""
MAX_ANGLE = 2.0  # radians, to both sides


class Choices(NamedTuple):
    """What a user may choose of the gallery."""

    temperatures: Sequence[float] = TEMPERATURES
    """Of the draws of the prior."""
    group: str | None = None
    """Latent group of the traversal; the one with the largest KL if not given."""


DEFAULT = Choices()


def check_group(vae: HierarchicalVAE, group: str | None) -> None:
    """Refuse a latent group that the VAE does not have.

    Raises:
        InputError: naming those that it has.
    """
    names = list(vae.model.latent_shapes)
    if group is not None and group not in names:
        raise InputError(f"expected a latent group of this VAE, {names[0]} to {names[-1]}, found {group!r}; name one")


def gallery(fitted: FittedVAE, split: Split, seed: int, choices: Choices = DEFAULT) -> dict[str, Arrays]:
    """Take the pictures of a VAE as arrays.

    Args:
        fitted: the VAE; draws of the prior are its sampler's.
        split: held-out data, for reconstructions and KL.
        seed: of all draws, and of the choice of data where there are more than are shown.
        choices: of the user.

    Returns:
        File names to arrays: for images reconstructions, draws of the prior, the traversal of one group; for points
        draws; for both the groups' KL.

    Raises:
        InputError: a latent group that the VAE does not have.
    """
    check_group(fitted.vae, choices.group)
    kl = _group_kl(fitted.vae, split, seed)
    shape = fitted.vae.model.event_shape
    if len(shape) != 3:
        return {PRIOR: _point_draws(fitted, split, seed), GROUP_KL: kl} if tuple(shape) == (2,) else {GROUP_KL: kl}
    largest = str(kl["names"][np.argmax(kl["kl_nats"])])
    return {
        RECONSTRUCTIONS: _reconstructions(fitted.vae, split, seed),
        PRIOR: _prior(fitted, seed, choices.temperatures),
        TRAVERSAL: _traversal(fitted, choices.group or largest, seed),
        GROUP_KL: kl,
    }


def write_gallery(
    fitted: FittedVAE, seed: int, choices: Choices = DEFAULT, board: StageBoards | None = None, step: int = 0
) -> list[Path]:
    """Write the pictures of a fitted VAE into its run's samples folder, as arrays and images.

    Args:
        fitted: the VAE.
        seed: of all draws.
        choices: of the user.
        board: to show the grids on too.
        step: of the stage, for the board.

    Returns:
        The files of arrays.

    Raises:
        InputError: a latent group that the VAE does not have.
    """
    paths = []
    for name, arrays in gallery(fitted, fitted.data.test, seed, choices).items():
        paths.append(fitted.run.save_npz(name, **arrays))
        grids = gallery_grids(name, arrays)
        if grids:
            save_grid_png(paths[-1].with_suffix(".png"), side_by_side(grids))
        if board is not None:
            # Apart from those of show_gallery, which are of other data and weights.
            board.images({f"test/{label}": grid for label, grid in grids.items()}, step)
    return paths


def show_gallery(run: Run, config: Config, data: Data, board: StageBoards, vae: HierarchicalVAE, step: int) -> None:
    """Show the pictures of a VAE in training, of validation data, on a board.

    Args:
        run: the run; nothing else is written into it.
        config: its configuration; the seed is that of all draws, so that the pictures of different steps compare.
        data: its data.
        board: where to show them.
        vae: as it is, in evaluation mode; draws of the prior have the batch statistics of training.
        step: of the stage.
    """
    for name, arrays in gallery(FittedVAE(run, config, data, vae), data.validation, config.seed).items():
        board.images(gallery_grids(name, arrays), step)


def _chosen(split: Split, num: int, seed: int) -> Split:
    return random_subset(split, num, stream(seed, "gallery", "order"))


def _some(split: Split, num: int, seed: int) -> Tensor:
    chosen = _chosen(split, num, seed)
    return chosen.batch(torch.arange(len(chosen)), stream(seed, "gallery", "dequantise"))


def _reconstructions(vae: HierarchicalVAE, split: Split, seed: int) -> Arrays:
    x = _some(split, 2 * images_per_row(vae.model.event_shape[-1]), seed)
    return {"x": _array(reconstructions(vae, x, seed_for(seed, "gallery"))), "data": _array(x)}


def _prior(fitted: FittedVAE, seed: int, temperatures: Sequence[float]) -> Arrays:
    num = images_per_row(fitted.vae.model.event_shape[-1]) ** 2
    means = [prior_means(fitted.sampler, num, seed_for(seed, "gallery"), t) for t in temperatures]
    return {
        "x": _array(torch.stack(means, 1)),
        "temperatures": np.array(temperatures),
        "statistics": np.array(_statistics(fitted)),
    }


def _statistics(fitted: FittedVAE) -> str:
    """Say which batch statistics draws of the prior are made with, if any."""
    if fitted.norm_temperature is not None:
        return f"batch statistics of prior draws at t = {fitted.norm_temperature:g}"
    return "batch statistics of training" if norms_of(fitted.vae.model) else ""


def _point_draws(fitted: FittedVAE, split: Split, seed: int) -> Arrays:
    x = prior_draws(fitted.sampler, NUM_POINTS, seed_for(seed, "gallery"))
    return {
        "x": _array(x.unsqueeze(1)),
        "temperatures": np.ones(1),
        "statistics": np.array(""),
        "data": _array(_some(split, NUM_POINTS, seed)),
    }


def _traversal(fitted: FittedVAE, group: str, seed: int) -> Arrays:
    is_large = fitted.vae.model.event_shape[-1] > LARGE_SIDE
    angles = torch.linspace(-MAX_ANGLE, MAX_ANGLE, 5 if is_large else 9)
    temperature = fitted.norm_temperature or 1.0
    x = traversal(fitted.sampler, group, 3 if is_large else 6, seed_for(seed, "gallery"), angles, temperature)
    return {
        "x": _array(x),
        "angles": angles.numpy(),
        "group": np.array(group),
        "temperature": np.array(temperature),
    }


def _group_kl(vae: HierarchicalVAE, split: Split, seed: int) -> Arrays:
    chosen = _chosen(split, NUM_KL_POINTS, seed)
    estimate = mean_elbo(vae, chosen, seed_for(seed, "gallery"), NUM_KL_POINTS)
    shapes = vae.model.latent_shapes
    return {
        "kl_nats": np.array([estimate.kl_nats[name] for name in shapes]),
        "names": np.array(list(shapes)),
        "sides": np.array([shape[-1] if len(shape) == 3 else 0 for shape in shapes.values()]),
        "num_points": np.array(len(chosen)),
    }


def _array(x: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.float().numpy()
    return array
