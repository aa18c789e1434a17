"""Image sets that are read from files: torchvision's archives, CelebA, LSUN, and any folder of images."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.config import DataConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.splits import NUM_BYTE_LEVELS, Data, IntegerImages, LazyImages, image_data

VALIDATION_SHARE = 0.1

K = TypeVar("K")

# --- image sets held in memory -------------------------------------------------------------------


class _Archive(NamedTuple):
    """A data set of torchvision that fits in memory."""

    class_name: str
    files: tuple[str, ...]
    """What must lie under the root."""
    padding: int = 0
    """Black pixels added on each side."""
    has_flips: bool = False


_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_MNIST_FILES = tuple(f"MNIST/raw/{file}" for file in _IDX_FILES)
_CIFAR10_FILES = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch", "batches.meta")
_ARCHIVES = {
    "mnist": _Archive("MNIST", _MNIST_FILES, padding=2),
    "fashion-mnist": _Archive("FashionMNIST", tuple(f"FashionMNIST/raw/{file}" for file in _IDX_FILES), padding=2),
    "cifar10": _Archive("CIFAR10", tuple(f"cifar-10-batches-py/{file}" for file in _CIFAR10_FILES), has_flips=True),
    "cifar100": _Archive(
        "CIFAR100", tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta")), has_flips=True
    ),
    "svhn": _Archive("SVHN", ("train_32x32.mat", "test_32x32.mat")),
    "stacked-mnist": _Archive("MNIST", _MNIST_FILES, padding=2),
}


def _archive(config: DataConfig) -> Data:
    """Load a torchvision set: the last tenth of its training images is the validation split."""
    train, validation, test = _read_archive(config)
    has_flips = _ARCHIVES[config.name].has_flips
    splits = [IntegerImages(*train, has_flips=has_flips), IntegerImages(*validation), IntegerImages(*test)]
    return image_data(config.name, splits)


def _stacked_mnist(config: DataConfig) -> Data:
    """Stack three MNIST digits a, b, c as red, green and blue, with label 100 a + 10 b + c (1,000 modes).

    Metz et al. 2017, arXiv:1611.02163. Each channel of a split is a permutation of that split of MNIST, fixed for
    good, so no digit is in two splits.
    """
    weights = torch.tensor([100, 10, 1])
    splits = []
    for name, (images, labels) in zip(("train", "validation", "test"), _read_archive(config), strict=True):
        triples = torch.stack(
            [
                torch.randperm(len(images), generator=stream(0, "stacked-mnist", name, channel))
                for channel in range(len(weights))
            ],
            dim=1,
        )
        splits.append(IntegerImages(images[triples].squeeze(2), labels[triples] @ weights))
    return image_data(config.name, splits)


_LabelledImages = tuple[Tensor, Tensor]


def _read_archive(config: DataConfig) -> tuple[_LabelledImages, _LabelledImages, _LabelledImages]:
    archive = _ARCHIVES[config.name]

    def read(part: str) -> _LabelledImages:
        which: dict[str, Any] = {"split": part} if archive.class_name == "SVHN" else {"train": part == "train"}
        dataset = _open(config, archive.class_name, archive.files, **which)
        images, labels = _arrays(dataset)
        return _resized(functional.pad(images, (archive.padding,) * 4), config.image_size), labels

    images, labels = read("train")
    num_train = _num_train(len(images))
    return (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:]), read("test")


def _num_train(size: int) -> int:
    return size - int(VALIDATION_SHARE * size)


def _arrays(dataset: Any) -> _LabelledImages:
    """Bring torchvision's three layouts, ``(n, H, W)``, ``(n, H, W, 3)`` and ``(n, 3, H, W)``, to one."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return images.contiguous(), torch.as_tensor(labels).long()


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.v2 import functional as transforms

    resized: Tensor = transforms.resize(images, [size, size], antialias=True)
    return resized


# --- image sets read lazily ----------------------------------------------------------------------

_CELEBA_FILES = tuple(
    f"celeba/{file}"
    for file in (
        "img_align_celeba",
        "list_attr_celeba.txt",
        "identity_CelebA.txt",
        "list_bbox_celeba.txt",
        "list_landmarks_align_celeba.txt",
        "list_eval_partition.txt",
    )
)
_CHURCH_FILES = ("church_outdoor_train_lmdb", "church_outdoor_val_lmdb")
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
# Opening every file of a large folder takes minutes; this many tell its common form (chosen by us).
_NUM_PROBED = 64


class _Form(NamedTuple):
    """What a decoded image is brought to."""

    channels: int
    size: int
    crop: tuple[slice, slice] = (slice(None), slice(None))
    """Rows and columns to keep before the resize."""


# The customary CelebA-64 crop, left 15, top 40, right 163, bottom 188 (Larsen et al. 2016; NVAE uses it too).
_CELEBA_CROP = (slice(40, 188), slice(15, 163))


def _celeba(config: DataConfig) -> Data:
    """Load CelebA's own three parts, cropped to 148 x 148 and resized to 64."""
    form = _Form(3, config.image_size or 64, _CELEBA_CROP)
    load = partial(_load_file, form=form)
    folder = _root(config) / "celeba" / "img_align_celeba"

    def read(part: str) -> list[Path]:
        dataset = _open(config, "CelebA", _CELEBA_FILES, split=part)
        return [folder / file for file in dataset.filename]

    return _lazy_data(config.name, form, load, (read("train"), read("valid"), read("test")), has_flips=True)


def _lsun_church(config: DataConfig) -> Data:
    """Load LSUN's outdoor churches; its validation images are the test split here, for LSUN has no other."""
    form = _Form(3, config.image_size or 64)
    root = _root(config)
    databases = {file: _open_lmdb(config, root / file) for file in _CHURCH_FILES}
    train, test = ([(file, key) for key in _lmdb_keys(databases[file])] for file in _CHURCH_FILES)
    num_train = _num_train(len(train))

    def load(entry: tuple[str, bytes]) -> Tensor:
        file, key = entry
        with databases[file].begin() as transaction:
            return _decode(io.BytesIO(transaction.get(key)), f"{key.decode()} in {root / file}", form)

    return _lazy_data(config.name, form, load, (train[:num_train], train[num_train:], test), has_flips=True)


def _lmdb_keys(database: Any) -> list[bytes]:
    with database.begin() as transaction:
        return list(transaction.cursor().iternext(keys=True, values=False))


def _open_lmdb(config: DataConfig, folder: Path) -> Any:
    # torchvision's reader leaves a pickle in the working directory, so this one is ours.
    try:
        import lmdb

        if not folder.is_dir():
            raise FileNotFoundError(folder)
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise _unusable(config, _CHURCH_FILES, error) from error


def _image_folder(config: DataConfig) -> Data:
    """Load any nested folder of images, split 80/10/10 by a hash of each path below it.

    Adding or removing a file moves no other file to another split. Nothing is mirrored, for letters and digits
    may be in the pictures.
    """
    root = _root(config)
    files = _image_files(root)
    form = _common_form(root, files, config.image_size)
    splits: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for file in files:
        tenth = seed_for(0, "image-folder", file.relative_to(root).as_posix()) % 10
        splits[max(0, tenth - 7)].append(file)
    if not all(splits):
        raise InputError(
            f"the image folder {root} has {len(files)} images, too few for a split in train, validation and test; "
            "add more"
        )
    return _lazy_data(config.name, form, partial(_load_file, form=form), splits)


def _image_files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise InputError(f"expected a folder of images at {root}, found none; set --data.root")
    files = sorted(
        Path(folder, file)
        for folder, _, names in os.walk(root)
        for file in names
        if file.lower().endswith(_IMAGE_SUFFIXES) and not file.startswith(".")
    )
    if not files:
        raise InputError(f"found no images ({', '.join(_IMAGE_SUFFIXES)}) in {root} or below it; set --data.root")
    return files


def _common_form(root: Path, files: Sequence[Path], image_size: int | None) -> _Form:
    """Look at some headers: grey if all are grey; their size if all have the same square one."""
    headers = {_header(file) for file in files[:: math.ceil(len(files) / _NUM_PROBED)]}
    channels = 1 if all(mode in _GREY_MODES for mode, _ in headers) else 3
    sizes = sorted({size for _, size in headers})
    if image_size is None and (len(sizes) > 1 or sizes[0][0] != sizes[0][1]):
        raise InputError(
            f"the images in {root} are not all squares of one size, from {sizes[0]} to {sizes[-1]}; "
            "say what to resize them to with --data.image-size"
        )
    return _Form(channels, image_size or sizes[0][0])


def _lazy_data(
    name: str,
    form: _Form,
    load: Callable[[K], Tensor],
    keys: tuple[Sequence[K], Sequence[K], Sequence[K]],
    has_flips: bool = False,
) -> Data:
    train, validation, test = keys
    return Data(
        name,
        torch.Size([form.channels, form.size, form.size]),
        LazyImages(load, train, has_flips=has_flips),
        LazyImages(load, validation),
        LazyImages(load, test),
        levels=NUM_BYTE_LEVELS,
    )


def _load_file(file: Path, form: _Form) -> Tensor:
    return _decode(file, str(file), form)


def _header(file: Path) -> tuple[str, tuple[int, int]]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(str(file), error) from error


def _decode(file: Path | io.BytesIO, name: str, form: _Form) -> Tensor:
    """Read one image: crop, resize of the shorter side, centre crop; ``(C, size, size)``, uint8."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as transforms

    try:
        with Image.open(file) as image:
            _check_mode(image.mode, name, form)
            pixels = transforms.pil_to_tensor(image.convert("L" if form.channels == 1 else "RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from error
    resized = transforms.resize(pixels[(..., *form.crop)], [form.size], antialias=True)
    cropped: Tensor = transforms.center_crop(resized, [form.size, form.size])
    return cropped


def _check_mode(mode: str, name: str, form: _Form) -> None:
    """Refuse what Pillow would convert with silent loss."""
    if mode not in _GREY_MODES + _COLOUR_MODES:
        raise InputError(f"the image {name} has pixels of mode {mode}, expected 8 bits per channel; convert it")
    if form.channels == 1 and mode not in _GREY_MODES:
        raise InputError(f"the image {name} is in colour while those seen before are grey; convert it or them")


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(f"the image {name} cannot be read ({error}); remove or replace it")


# --- torchvision, and what may be missing --------------------------------------------------------


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().absolute()


def _open(config: DataConfig, class_name: str, files: Sequence[str], **options: Any) -> Any:
    try:
        from torchvision import datasets

        return getattr(datasets, class_name)(_root(config), download=config.download, **options)
    # RuntimeError and OSError (URLError, FileNotFoundError) are what torchvision says when files are missing or
    # a download fails; the other two come from files that are cut short.
    except (RuntimeError, ModuleNotFoundError, OSError, ValueError, AssertionError) as error:
        raise _unusable(config, files, error) from error


def _unusable(config: DataConfig, files: Sequence[str], error: Exception) -> InputError:
    """Say in one sentence why a data set cannot be opened; the only place that does."""
    root = _root(config)
    missing = [file for file in files if not (root / file).exists()]
    reason = " ".join(str(error).split())
    package = error.name if isinstance(error, ModuleNotFoundError) else "gdown" if "gdown" in reason else None
    if package is not None:
        return InputError(
            f"data set {config.name} needs the package {package}; install it with pip install {package} "
            "(lmdb and gdown come with ppl_vaebm[data])"
        )
    if "torchvision::" in reason:
        return InputError(
            f"data set {config.name} needs a torchvision built for torch {torch.__version__}, the installed one is not "
            f"({reason}); install a matching pair"
        )
    if not missing:
        return InputError(
            f"the files of data set {config.name} in {root} are cut short or altered ({reason}); "
            f"delete and fetch them again: {', '.join(files)}"
        )
    if config.name == "lsun-church":
        advice = "unpack the archives of LSUN there or set --data.root; --data.download cannot fetch them"
    elif config.download:
        advice = f"the download failed ({reason}): put them there by other means or set --data.root"
    else:
        advice = "fetch them with --data.download or set --data.root"
    return InputError(f"data set {config.name} lacks {', '.join(missing)} in {root}; {advice}")


LOADERS: dict[str, Callable[[DataConfig], Data]] = {
    "image-folder": _image_folder,
    "mnist": _archive,
    "fashion-mnist": _archive,
    "cifar10": _archive,
    "cifar100": _archive,
    "svhn": _archive,
    "celeba": _celeba,
    "lsun-church": _lsun_church,
    "stacked-mnist": _stacked_mnist,
}
"""The loader of each set by its name; it raises InputError where files or a package are missing."""
