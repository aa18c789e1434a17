"""Image sets by name: torchvision's archives, CelebA and LSUN."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data.decoding import OWN_SIZES, ImageForm, decode, has_flips, num_train, root_folder
from ppl_vaebm.data.image_folder import load_image_folder
from ppl_vaebm.data.splits import Data, IntegerImages, LazyImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import stream


class _Archive(NamedTuple):
    """A data set of torchvision that fits in memory."""

    class_name: str
    files: tuple[str, ...]
    """What must lie under the root."""
    channels: int = 3
    side: int = 32
    """Before padding, in pixels."""
    padding: int = 0
    """Black pixels added on each side, if the configuration does not say."""
    has_flips: bool = False


_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_MNIST_FILES = tuple(f"MNIST/raw/{file}" for file in _IDX_FILES)
_FASHION_FILES = tuple(f"FashionMNIST/raw/{file}" for file in _IDX_FILES)
_CIFAR10_FILES = tuple(
    f"cifar-10-batches-py/{file}" for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
)
_CIFAR100_FILES = tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta"))
_ARCHIVES = {
    "mnist": _Archive("MNIST", _MNIST_FILES, 1, 28, padding=2),
    "fashion-mnist": _Archive("FashionMNIST", _FASHION_FILES, 1, 28, padding=2),
    "cifar10": _Archive("CIFAR10", _CIFAR10_FILES, has_flips=True),
    "cifar100": _Archive("CIFAR100", _CIFAR100_FILES, has_flips=True),
    "svhn": _Archive("SVHN", ("train_32x32.mat", "test_32x32.mat")),
    "stacked-mnist": _Archive("MNIST", _MNIST_FILES, 3, 28, padding=2),
}


_PARTS = ("train", "validation", "test")
_LabelledImages: TypeAlias = tuple[Tensor, Tensor]


def padding_of(config: DataConfig) -> int:
    """Return how many black pixels a data set adds on each side of its images before it resizes them."""
    if config.padding is not None:
        return config.padding
    return _ARCHIVES[config.name].padding if config.name in _ARCHIVES else 0


def _archive(config: DataConfig) -> Data:
    """Load a torchvision set, of which the last training images are for validation."""
    parts = _read_archive(config)
    if config.name == "stacked-mnist":
        parts = [_stacked(part, *labelled) for part, labelled in zip(_PARTS, parts, strict=True)]
    flips = (has_flips(config, _ARCHIVES[config.name].has_flips), False, False)
    splits = [
        IntegerImages(images, labels, 2**config.num_bits, is_flipping, config.binarize)
        for (images, labels), is_flipping in zip(parts, flips, strict=True)
    ]
    return image_data(config.name, splits[0].images.shape[1:], splits)


def _stacked(part: str, images: Tensor, labels: Tensor) -> _LabelledImages:
    """Stack three MNIST digits a, b, c as red, green and blue, with label 100 a + 10 b + c (1,000 modes).

    Metz et al. 2017, arXiv:1611.02163. Each channel of a split is a fixed permutation of that split of MNIST, so no
    digit is in two splits.
    """
    generators = [stream(0, "stacked-mnist", part, channel) for channel in range(3)]
    triples = torch.stack([torch.randperm(len(images), generator=generator) for generator in generators], dim=1)
    return images[triples].squeeze(2), labels[triples] @ torch.tensor([100, 10, 1])


def _read_archive(config: DataConfig) -> list[_LabelledImages]:
    archive = _ARCHIVES[config.name]

    def read(part: str) -> _LabelledImages:
        which: dict[str, Any] = {"split": part} if archive.class_name == "SVHN" else {"train": part == "train"}
        dataset = _open(config, archive.class_name, archive.files, **which)
        images, labels = _arrays(dataset)
        images = functional.pad(images, (padding_of(config),) * 4)
        if config.image_size not in (None, images.shape[-1]):
            from torchvision.transforms.v2.functional import resize

            images = resize(images, [config.image_size] * 2, antialias=True)
        return images >> (8 - config.num_bits), labels

    images, labels = read("train")
    if bool((labels.diff() >= 0).all()):
        # Some copies of these sets come sorted by class, and their last tenth would be one class.
        order = torch.randperm(len(images), generator=stream(0, "unsort"))
        images, labels = images[order], labels[order]
    num = num_train(config, len(images))
    return [(images[:num], labels[:num]), (images[num:], labels[num:]), read("test")]


def _arrays(dataset: Any) -> _LabelledImages:
    """Bring torchvision's three layouts, ``(n, H, W)``, ``(n, H, W, 3)`` and ``(n, 3, H, W)``, to one."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return images.contiguous(), torch.as_tensor(labels).long()


_CELEBA_TABLES = ("attr_celeba", "bbox_celeba", "landmarks_align_celeba", "eval_partition")
_CELEBA_FILES = (
    "celeba/img_align_celeba",
    "celeba/identity_CelebA.txt",
    *(f"celeba/list_{table}.txt" for table in _CELEBA_TABLES),
)
_CHURCH_FILES = ("church_outdoor_train_lmdb", "church_outdoor_val_lmdb")
# The customary CelebA-64 crop, left 15, top 40, right 163, bottom 188 (Larsen et al. 2016; NVAE uses it too).
_CELEBA_CROP = (slice(40, 188), slice(15, 163))


def _form(config: DataConfig) -> ImageForm:
    return ImageForm(3, config.image_size or OWN_SIZES[config.name], config.padding or 0, config.num_bits)


def _celeba(config: DataConfig) -> Data:
    """Load CelebA's own three parts, cropped to 148 x 148 and resized to 64."""
    form = _form(config)._replace(crop=_CELEBA_CROP)
    folder = root_folder(config) / "celeba" / "img_align_celeba"

    def split(part: str, flips: bool = False) -> LazyImages[Path]:
        dataset = _open(config, "CelebA", _CELEBA_FILES, split=part)
        keys = [folder / file for file in dataset.filename]
        return LazyImages(partial(decode, form=form), keys, levels=2**config.num_bits, has_flips=flips)

    splits = [split("train", has_flips(config, own=True)), split("valid"), split("test")]
    return image_data(config.name, torch.Size([3, form.size, form.size]), splits)


def _lsun_church(config: DataConfig) -> Data:
    """Load LSUN's outdoor churches, with random square crops in training and the middle square elsewhere.

    LSUN's validation images are the test split here, for LSUN has no other.
    """
    form = _form(config)
    root = root_folder(config)
    databases = {file: _open_lmdb(config, root / file) for file in _CHURCH_FILES}
    train, test = ([(file, key) for key in _lmdb_keys(databases[file])] for file in _CHURCH_FILES)
    num = num_train(config, len(train))

    def load(entry: tuple[str, bytes], form: ImageForm) -> Tensor:
        file, key = entry
        with databases[file].begin() as transaction:
            return decode(io.BytesIO(transaction.get(key)), form, f"{key.decode()} in {root / file}")

    levels = 2**config.num_bits
    whole, square = (partial(load, form=form._replace(is_square=is_square)) for is_square in (False, True))
    flips = has_flips(config, own=True)
    splits = [
        LazyImages(whole, train[:num], levels=levels, has_flips=flips, random_crop=form.size, load_middle=square),
        LazyImages(square, train[num:], levels=levels),
        LazyImages(square, test, levels=levels),
    ]
    return image_data(config.name, torch.Size([3, form.size, form.size]), splits)


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


def _open(config: DataConfig, class_name: str, files: Sequence[str], **options: Any) -> Any:
    try:
        from torchvision import datasets

        return getattr(datasets, class_name)(root_folder(config), download=config.download, **options)
    # torchvision raises RuntimeError and OSError (URLError, FileNotFoundError) when files are missing or a download
    # fails, and the other two for files that are cut short.
    except (RuntimeError, ModuleNotFoundError, OSError, ValueError, AssertionError) as error:
        raise _unusable(config, files, error) from error


def _unusable(config: DataConfig, files: Sequence[str], error: Exception) -> InputError:
    """Make the error that says why a data set cannot be opened."""
    root = root_folder(config)
    missing = [file for file in files if not (root / file).exists()]
    reason = " ".join(str(error).split())
    package = error.name if isinstance(error, ModuleNotFoundError) else "gdown" if "gdown" in reason else None
    if package is not None:
        return InputError(
            f"data set {config.name} needs the package {package}; install it with pip install {package} "
            "(lmdb and gdown come with pip install -e '.[data]')"
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


def shape_without_files(config: DataConfig) -> torch.Size | None:
    """Return the shape ``(C, H, W)`` of a set's images, or ``None`` if only its files determine it."""
    if config.name in _ARCHIVES:
        archive = _ARCHIVES[config.name]
        side = config.image_size or archive.side + 2 * padding_of(config)
        return torch.Size([archive.channels, side, side])
    if config.name in OWN_SIZES:
        side = config.image_size or OWN_SIZES[config.name]
        return torch.Size([3, side, side])
    return None


FOLDERS = ("image-folder", "celeba-hq")
"""Sets that are any folder of images."""
BINARIZABLE = (*(name for name, archive in _ARCHIVES.items() if archive.channels == 1), "image-folder")
"""Sets that are or may be grey."""
DIVISIBLE = (*_ARCHIVES, "lsun-church", *FOLDERS)
"""Sets that come, or may come, without a part for validation."""

LOADERS: dict[str, Callable[[DataConfig], Data]] = {
    "image-folder": load_image_folder,
    "celeba-hq": load_image_folder,
    **dict.fromkeys(_ARCHIVES, _archive),
    "celeba": _celeba,
    "lsun-church": _lsun_church,
}
"""The loader of each set by its name; it raises InputError where files or a package are missing."""
