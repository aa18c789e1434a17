"""Data sets that are a folder of images: files, splits and labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data.decoding import (
    GREY_MODES,
    OWN_SIZES,
    ImageForm,
    UnreadableImage,
    decode,
    has_flips,
    header,
    num_train,
    root_folder,
)
from ppl_vaebm.data.splits import Data, IntegerImages, LazyImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import seed_for

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A folder that decodes to no more is kept in memory; while it is split there are two copies (chosen by us: it holds
# 350,000 images of 3 x 32 x 32).
MAX_CACHED_BYTES = 2**30
_NUM_NAMED = 5

T = TypeVar("T")
_Parts = tuple[list[int], list[int], list[int]]
"""Positions of the images for training, validation and test."""


def load_image_folder(config: DataConfig) -> Data:
    """Load any nested folder of images, into memory if it decodes to at most ``MAX_CACHED_BYTES``.

    Folders ``train``, ``test`` and ``validation`` or ``val`` at its top are the splits; without one for validation,
    part of ``train`` is held out. Without these folders the images are split 80/10/10. Both choices, and the order
    within a split, are by a hash of each path, so that adding or removing a file moves at most one other. If every
    image lies in a folder of its class, and there are several such folders, their order by name gives the labels.

    Every header is read at the start; whole files are if the folder is kept in memory or bad files may be skipped.
    Only ``celeba-hq`` is mirrored by default, because other pictures may hold letters and digits. The published models
    train on 27,000 of its 30,000 images and are measured on the others: put them in folders ``train`` and ``test``.

    Raises:
        InputError: no images, too few or unreadable ones, or an option that does not fit them.
    """
    root = root_folder(config)
    files = list(_image_files(root))
    bad: list[UnreadableImage] = []
    # No threads, here and below: opening holds the interpreter's lock, and a pool made small files slower.
    headers = dict(_readable(files, header, bad))
    if not headers:
        raise _unreadable_files(root, bad, len(files))
    form = _common_form(config, root, list(headers.values()))
    shape = (form.channels, form.size, form.size)
    is_cached = len(headers) * math.prod(shape) <= MAX_CACHED_BYTES
    images = torch.empty(len(headers) if is_cached else 0, *shape, dtype=torch.uint8)
    good = list(headers)
    if is_cached or config.skip_unreadable:
        good = []
        for file, image in _readable(headers, partial(decode, form=form), bad):
            if is_cached:
                images[len(good)] = image
            good.append(file)
    if bad and not (config.skip_unreadable and good):
        raise _unreadable_files(root, bad, len(files))
    skipped = tuple(sorted(Path(error.name).relative_to(root).as_posix() for error in bad))
    splits = _splits(config, form, root, good, images if is_cached else None)
    return image_data(config.name, torch.Size(shape), splits, skipped)


def _splits(
    config: DataConfig, form: ImageForm, root: Path, files: Sequence[Path], images: Tensor | None
) -> list[IntegerImages | LazyImages[Path]]:
    """Make the splits of the files, or of their decoded images."""
    paths = [file.relative_to(root) for file in files]
    has_parts = _has_parts(root)
    labels = _labels([path.relative_to(path.parts[0]) if has_parts else path for path in paths])
    parts = (_own_parts if has_parts else _hashed_parts)(config, root, paths)
    # Not by path, or the first images of a part would all be of the first class.
    train, validation, test = (sorted(part, key=lambda index: _hash(paths[index])) for part in parts)
    load = partial(decode, form=form)

    def split(part: list[int], is_flipping: bool = False) -> IntegerImages | LazyImages[Path]:
        pixels = (None if labels is None else labels[part], 2**form.num_bits, is_flipping, config.binarize)
        if images is None:
            return LazyImages(load, [files[index] for index in part], *pixels)
        return IntegerImages(images[part], *pixels)

    return [split(train, has_flips(config, own=config.name == "celeba-hq")), split(validation), split(test)]


def _image_files(root: Path) -> list[Path]:
    """List the images, sorted; links are followed, but not to a folder already seen or above the root."""
    if not root.is_dir():
        raise InputError(f"expected a folder of images at {root}, found none; set --data.root")

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read ({error.strerror}); change its permissions")

    files = []
    seen = set(root.resolve().parents)
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        place = Path(folder).resolve()
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # A name that starts with a dot is a hidden file, or one that another system left beside the true one.
        files += [
            Path(folder, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    if not files:
        raise InputError(f"found no images ({', '.join(IMAGE_SUFFIXES)}) in {root} or below it; set --data.root")
    return sorted(files)


def _readable(files: Iterable[Path], read: Callable[[Path], T], bad: list[UnreadableImage]) -> Iterator[tuple[Path, T]]:
    """Read files, and append those that cannot be read to ``bad``."""
    for file in files:
        try:
            yield file, read(file)
        except UnreadableImage as error:
            bad.append(error)


def _unreadable_files(root: Path, bad: Sequence[UnreadableImage], num_files: int) -> InputError:
    named = [f"{Path(error.name).relative_to(root)} ({error.reason})" for error in bad[:_NUM_NAMED]]
    others = f" and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
    skip = ", or leave them out with --data.skip-unreadable" if len(bad) < num_files else ""
    return InputError(
        f"{len(bad)} of the {num_files} images in {root} cannot be read: {', '.join(named)}{others}; "
        f"remove or replace them{skip}"
    )


def _common_form(config: DataConfig, root: Path, headers: Sequence[tuple[str, tuple[int, int]]]) -> ImageForm:
    """Choose grey if all images are grey, and their size if all have the same square one."""
    is_grey = config.name != "celeba-hq" and all(mode in GREY_MODES for mode, _ in headers)
    if config.binarize and not is_grey:
        raise InputError(
            f"--data.binarize expects grey images, found some in colour in {root}; convert them, or leave it out"
        )
    padding = config.padding or 0
    size = config.image_size or OWN_SIZES.get(config.name)
    if size is None:
        sizes = sorted({size for _, size in headers})
        if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
            raise InputError(
                f"the images in {root} are not all squares of one size, from {sizes[0]} to {sizes[-1]}; "
                "say what to resize them to with --data.image-size"
            )
        size = sizes[0][0] + 2 * padding
    return ImageForm(1 if is_grey else 3, size, padding, config.num_bits)


# --- its parts and labels ------------------------------------------------------------------------

_PART_FOLDERS = {"train": 0, "validation": 1, "val": 1, "test": 2}


def _has_parts(root: Path) -> bool:
    folders = {path.name for path in root.iterdir() if path.is_dir()} & set(_PART_FOLDERS)
    if "train" in folders and folders & {"validation", "val"} and "test" not in folders:
        raise InputError(
            f"the image folder {root} has parts {', '.join(sorted(folders))}, expected test as well; add it, or "
            "rename the one for validation to it, for part of train can be held out"
        )
    return {"train", "test"} <= folders


def _own_parts(config: DataConfig, root: Path, paths: Sequence[Path]) -> _Parts:
    """Split by the folders at the top; without one for validation, the smallest hashes in train are held out."""
    astray = [path for path in paths if path.parts[0] not in _PART_FOLDERS]
    if astray:
        raise InputError(
            f"the image folder {root} has parts train and test, and {len(astray)} images outside of them, first "
            f"{astray[0]}; move or remove them"
        )
    parts: _Parts = ([], [], [])
    for index, path in enumerate(paths):
        parts[_PART_FOLDERS[path.parts[0]]].append(index)
    train, validation, test = parts
    if validation:
        _refuse_num_validation(config, f"the image folder {root} has a part for validation")
        return parts
    num_held_out = len(train) - num_train(config, len(train))
    held_out = set(sorted(train, key=lambda index: _hash(paths[index]))[:num_held_out])
    return [index for index in train if index not in held_out], list(held_out), test


def _hashed_parts(config: DataConfig, root: Path, paths: Sequence[Path]) -> _Parts:
    _refuse_num_validation(config, f"the image folder {root} has no folders train and test and is split 80/10/10")
    parts: _Parts = ([], [], [])
    for index, path in enumerate(paths):
        parts[max(0, _hash(path) % 10 - 7)].append(index)
    return parts


def _refuse_num_validation(config: DataConfig, because: str) -> None:
    if config.num_validation is not None:
        raise InputError(f"{because}, so --data.num-validation has no use; leave it out")


def _hash(path: Path) -> int:
    return seed_for(0, "image-folder", path.as_posix())


def _labels(paths: Sequence[Path]) -> Tensor | None:
    """Number the classes, ``(n,)``, int64, if every path is that of a file in one of several folders."""
    classes = sorted({path.parent for path in paths})
    if len(classes) < 2 or any(len(path.parts) != 2 for path in paths):
        return None
    numbers = {folder: number for number, folder in enumerate(classes)}
    return torch.tensor([numbers[path.parent] for path in paths])
