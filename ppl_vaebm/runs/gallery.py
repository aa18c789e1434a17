"""The arrays behind the pictures of stage 1: reconstructions, draws of the prior, a traversal, KL of every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.data.splits import Split, random_subset
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.batch_norm import norms_of
from ppl_vaebm.inference.svi.svi import mean_elbo
from ppl_vaebm.inference.vae_samples import reconstructions, traversal, vae_samples
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.loading import FittedVAE
from ppl_vaebm.runs.run import GROUP_KL, PRIOR, RECONSTRUCTIONS, TRAVERSAL

Arrays: TypeAlias = Mapping[str, NDArray[Any]]

TEMPERATURES = (0.6, 0.7, 0.8, 1.0)
NUM_KL_POINTS = 500
NUM_POINTS = 2_000
"""Draws of a VAE of points."""
LARGE_SIDE = 64
"""Side in pixels above which there are fewer images."""
MAX_ANGLE = 2.0  # radians, to both sides


class Choices(NamedTuple):
    """Options of the gallery."""

    temperatures: Sequence[float] = TEMPERATURES
    """Temperatures of prior samples."""
    group: str | None = None
    """Latent group of the traversal; the default is the one with the largest KL."""


DEFAULT = Choices()


def check_group(vae: HierarchicalVAE, group: str | None) -> None:
    """Refuse a latent group that the VAE does not have, as InputError."""
    names = list(vae.model.latent_shapes)
    if group is not None and group not in names:
        raise InputError(f"expected a latent group of this VAE, {names[0]} to {names[-1]}, found {group!r}; name one")


def gallery(fitted: FittedVAE, split: Split, seed: int, choices: Choices = DEFAULT) -> dict[str, Arrays]:
    """Compute the arrays of the pictures of a VAE, by file name.

    They are for images reconstructions, prior samples and the traversal of one group; for points samples; for both the
    KL of every group. Reconstructions and KL are of held-out data, chosen from ``split``.

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


def write_gallery(fitted: FittedVAE, seed: int, choices: Choices = DEFAULT) -> dict[str, Arrays]:
    """Write :func:`gallery` of test data into the run's samples folder, a file for each entry, and return it."""
    files = gallery(fitted, fitted.data.test, seed, choices)
    for name, arrays in files.items():
        fitted.run.save_npz(name, **arrays)
    return files


def images_per_row(side: int) -> int:
    """Return how many images of this side, in pixels, stand side by side."""
    return 8 if side <= LARGE_SIDE else 4


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
    means = [vae_samples(fitted.sampler, num, seed_for(seed, "gallery"), t, is_mean=True) for t in temperatures]
    return {
        "x": _array(torch.stack(means, 1)),
        "temperatures": np.array(temperatures),
        "statistics": np.array(_statistics(fitted)),
    }


def _statistics(fitted: FittedVAE) -> str:
    """Describe the batch statistics of prior samples, if there are any."""
    if fitted.norm_temperature is not None:
        return f"batch statistics of prior samples at t = {fitted.norm_temperature:g}"
    return "batch statistics of training" if norms_of(fitted.vae.model) else ""


def _point_draws(fitted: FittedVAE, split: Split, seed: int) -> Arrays:
    x = vae_samples(fitted.sampler, NUM_POINTS, seed_for(seed, "gallery"))
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
    return {"x": _array(x), "angles": angles.numpy(), "group": np.array(group), "temperature": np.array(temperature)}


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
