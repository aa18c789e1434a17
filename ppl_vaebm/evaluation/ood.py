"""Detection of images of other distributions by a VAEBM's scores: the area under the ROC curve for each set.

The guide is worse for such images and the bound on log p looser, which lowers log p and log h alike. Therefore all sets
get the same number of draws of the guide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vaebm.config import DataConfig
from ppl_vaebm.config.evaluation import OOD_SETS
from ppl_vaebm.config.options import split_names
from ppl_vaebm.data.archives import FOLDERS
from ppl_vaebm.data.decoding import root_folder
from ppl_vaebm.data.load import Data, form_without_files, load_data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import Split, dequantize, smoothed, without_noise
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.likelihood import SCORES, Scores, score
from ppl_vaebm.evaluation.metrics.classification import auroc_estimate
from ppl_vaebm.evaluation.sections import Arrays, Effort, Measured, Rows, Section, Value, random_order
from ppl_vaebm.inference.vae_samples import vae_samples
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.loading import LoadedRun


def measure_ood(loaded: LoadedRun, inside: Scores, sets: Mapping[str, OodSet], effort: Effort, seed: int) -> Measured:
    """Compare the scores of test data with those of other sets.

    A section has a column of areas for each score, with the standard error of DeLong et al. 1988, and another one
    describes the sets.
    """
    outside, areas = {}, {}
    others: Rows = {}
    for name, other in sets.items():
        scores = outside[name] = score(loaded, other.x, effort.num_score_draws, seed_for(seed, "ood", name))
        flag = f"; log h of {scores.num_not_finite} of them is not finite" if scores.num_not_finite else ""
        others[name] = f"{len(other.x)} images: {other.what}{flag}"
    for score_name in SCORES:
        areas[score_name] = {name: auroc_value(inside, scores, score_name) for name, scores in outside.items()}
    title = f"test data against others, {len(inside.log_p)} test images, {effort.num_score_draws} draws of z"
    sections = [
        Section(title, {f"AUROC of {score_name}": rows for score_name, rows in areas.items()}),
        Section("what the others are", {"": others}),
    ]
    return Measured(sections, _arrays(inside, outside, areas))


def auroc_value(inside: Scores, outside: Scores, score_name: str) -> Value:
    """Estimate the probability that a point of the distribution has a higher score than one from outside.

    Where scores are NaN or plus infinity, a text has their number.
    """
    a, b = inside.by_name()[score_name], outside.by_name()[score_name]
    num_bad = [int((scores.isnan() | scores.isposinf()).sum()) for scores in (a, b)]
    if any(num_bad):
        return f"none: {num_bad[0]} test images and {num_bad[1]} of these have NaN or infinity as their score"
    return auroc_estimate(a, b)._asdict()


def _arrays(inside: Scores, outside: Mapping[str, Scores], areas: Mapping[str, Rows]) -> Arrays:
    """Return the areas as ``(sets, scores)``, for a picture, and all scores."""

    def column(key: str) -> list[list[float]]:
        values = [[rows[name] for rows in areas.values()] for name in outside]
        return [[value[key] if isinstance(value, dict) else math.nan for value in row] for row in values]

    arrays: Arrays = {"sets": np.array(list(outside)), "scores": np.array(SCORES)}
    arrays |= {key: np.array(column(key)) for key in ("value", "error")}
    for set_name, scores in {"test": inside, **outside}.items():
        arrays |= {f"{score_name} of {set_name}": values.numpy() for score_name, values in scores.by_name().items()}
    return arrays


Make = Callable[[LoadedRun, Tensor, int], Tensor]
"""From a run, its test images as levels ``(n, C, H, W)`` and a seed to levels of that shape."""

MIN_IMAGES = 2
"""Images of a set that an area under the ROC curve needs for its error."""


def levels_of(x: Tensor, data: Data) -> Tensor:
    """Return the level of every pixel, int64, clipped to those of the data; InputError if one is not finite."""
    centre = quantised_as(x.double(), data)
    assert data.levels is not None
    if data.is_dequantized:
        return ((centre + 1) * (data.levels / 2)).floor().long()
    return ((centre + 1) * ((data.levels - 1) / 2)).round().long()


def images_of(levels: Tensor, data: Data, generator: torch.Generator) -> Tensor:
    """Turn levels into images as models see the data, float32; the inverse of :func:`levels_of`."""
    assert data.levels is not None
    if data.is_dequantized:
        return smoothed(dequantize(levels, data.levels, generator), data.noise_sd, generator)
    return 2 * levels.float() / (data.levels - 1) - 1


# --- made of the data's own images ---------------------------------------------------------------


def _rotated(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    if levels.shape[-1] != levels.shape[-2]:
        raise InputError(
            f"the set rotated turns square images by 90 degrees, and those of {loaded.data.name} are "
            f"{levels.shape[-2]} x {levels.shape[-1]}; leave it out of --ood"
        )
    return levels.rot90(1, (-2, -1))


def _inverted(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    return _num_levels(loaded) - 1 - levels


def _noise(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    return torch.randint(_num_levels(loaded), levels.shape, generator=stream(seed, "noise"))


def _constant(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    level = torch.randint(_num_levels(loaded), (len(levels), 1, 1, 1), generator=stream(seed, "constant"))
    return level.expand(levels.shape)


def _interpolation(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    """Average each image with the next of a random order, so never with itself; half levels go up or down by chance."""
    generator = stream(seed, "interpolation")
    order = torch.randperm(len(levels), generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    coin = torch.randint(2, levels.shape, generator=generator)
    return (levels + levels[partner] + coin) // 2


def _vae(loaded: LoadedRun, levels: Tensor, seed: int) -> Tensor:
    x = vae_samples(loaded.vaebm.vae, len(levels), seed_for(seed, "vae"))
    return levels_of(x, loaded.data)


def _num_levels(loaded: LoadedRun) -> int:
    assert loaded.data.levels is not None
    return loaded.data.levels


SYNTHETIC: dict[str, tuple[Make, str]] = {
    "rotated": (_rotated, "test images turned by 90 degrees"),
    "inverted": (_inverted, "test images with black and white exchanged"),
    "noise": (_noise, "every value uniform over the levels"),
    "constant": (_constant, "one level all over an image, uniform over the levels"),
    "interpolation": (_interpolation, "means of two test images"),
    "vae": (_vae, "draws of the run's VAE"),
}
"""How each synthetic set is made, and what it is. Xiao et al. 2021 do not give the ratio of their interpolations; 1/2
was chosen by us."""


# --- other data sets -----------------------------------------------------------------------------


def check_sets(names: Sequence[str], loaded: LoadedRun, root: str | None = None) -> None:
    """Refuse sets before anything slow is done; ``root`` is the folder of other data sets, if not the run's own.

    Raises:
        InputError: the run's data are not images; a name is unknown, repeated, or that of the run's own data; or a root
            is given and no set has files. Folders of images are the same if their paths are, other sets if their names.
    """
    if names and loaded.data.levels is None:
        raise InputError(
            f"--ood compares images with other images, and the data of this run, {loaded.data.name}, are points; "
            "leave it out"
        )
    split_names(",".join(names), OOD_SETS, "set")
    own = next((name for name in names if _is_own(name, loaded, root)), None)
    if own is not None:
        instead = "leave it out, or name another folder with --ood-root" if own in FOLDERS else "leave it out"
        raise InputError(
            f"--ood: expected sets of another distribution, found {own}, which the run was fitted to; {instead}"
        )
    if root is not None and all(name in SYNTHETIC for name in names):
        raise InputError(
            f"--ood-root: expected data sets whose files lie in {root}, found only {', '.join(names)}; name one with "
            "--ood, or leave the folder out"
        )


def _is_own(name: str, loaded: LoadedRun, root: str | None) -> bool:
    if name in FOLDERS and loaded.data.name in FOLDERS:
        own = loaded.config.data
        folders = [root_folder(replace(own, root=folder)).resolve() for folder in (own.root, root or own.root)]
        return folders[0] == folders[1]
    return name == loaded.data.name


def load_other(name: str, loaded: LoadedRun, root: str | None) -> tuple[Data, str]:
    """Load another data set at the shape of the run's images, with a description of it.

    Raises:
        InputError: the data are points, or images of other channels or of a size that cannot be changed; or files are
            missing or unreadable.
    """
    shape, own = loaded.data.event_shape, loaded.config.data
    plain = DataConfig(name=name, root=root or own.root, download=own.download, binarize=own.binarize)  # type: ignore[arg-type]
    as_own = replace(plain, image_size=own.image_size, padding=own.padding)
    resized = replace(as_own, image_size=shape[-1])
    for config in dict.fromkeys((as_own, plain, resized)):
        data = _loaded_if(config, shape, loaded.config.seed)
        if data is not None:
            how = ", resized: the blur alone may tell it from the data" if config is resized else ""
            return data, f"test split of {name}{how}"
    form = form_without_files(plain)
    found = "another shape" if form is None else f"shape {_by(form.event_shape)}"
    raise InputError(
        f"--ood {name}: expected images of shape {_by(shape)}, as those of {loaded.data.name}, found {found}; "
        "they cannot be brought to that, so leave the set out"
    )


def _loaded_if(config: DataConfig, shape: torch.Size, seed: int) -> Data | None:
    """Load a data set if it has a shape; ``None`` if not, or if an option does not apply to it."""
    try:
        form = form_without_files(config)
    except InputError:
        return None
    if form is not None and form.event_shape != shape:
        return None
    try:
        data = load_data(config, seed)
    except InputError as error:
        if form is None and config.image_size is None:
            return None  # images of many sizes, it may be; with a size every other fault is found again, and said
        raise InputError(
            f"--ood {config.name}: {error} (options of --data are those of fit; here --ood-root names the folder)"
        ) from error
    return data if data.event_shape == shape else None


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


# --- all of them ---------------------------------------------------------------------------------


class OodSet(NamedTuple):
    """Images of another distribution."""

    x: Tensor
    """As models see the data, ``(n, C, H, W)``."""
    what: str
    """Where they come from."""


def ood_sets(
    loaded: LoadedRun, names: Sequence[str], num: int, seed: int, root: str | None = None
) -> dict[str, OodSet]:
    """Load or make sets of at most ``num`` images each.

    Raises:
        InputError: as :func:`check_sets` and :func:`load_other`, or a set has too few images.
    """
    check_sets(names, loaded, root)
    # From the other end of the order in which test images are scored: images in both only if there are too few.
    own = _some(loaded.data.test, random_order(loaded.data.test, seed, "test").flip(0)[:num], seed)
    found = {}
    for name in names:
        if name in SYNTHETIC:
            make, what = SYNTHETIC[name]
            levels = make(loaded, levels_of(own, loaded.data), seed_for(seed, "ood", name))
        else:
            data, what = load_other(name, loaded, root)
            x = _some(data.test, random_order(data.test, seed, name)[:num], seed)
            levels = levels_of(x, loaded.data)
        if len(levels) < MIN_IMAGES:
            raise InputError(f"--ood {name}: expected at least {MIN_IMAGES} images, found {len(levels)}; leave it out")
        found[name] = OodSet(images_of(levels, loaded.data, stream(seed, "ood", name, "dequantise")), what)
    return found


def _some(split: Split, indices: Tensor, seed: int) -> Tensor:
    # The noise is rounded away, but for binarised images, which are drawn.
    return without_noise(split).batch(indices, stream(seed, "ood", "images"))
