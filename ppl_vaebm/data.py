"""Data sets, their splits, the pixel range, and the order in which training sees them.

The pixel range is decided here and nowhere else. An integer level k in {0, ..., levels - 1} becomes
``y = 2 * (k + u) / levels - 1`` with u uniform on [0, 1) (uniform dequantisation, Theis et al. 2016,
arXiv:1511.01844), so y lies in [-1, 1). A log density of y in nats turns into a bound on the log probability
of the levels by adding ``log(2 / levels)`` per coordinate.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.config import DataConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import seed_for, stream

NUM_BYTE_LEVELS = 256
NUM_DIGIT_LEVELS = 17  # sklearn's digits count the dark ones of 4x4 binary pixels: 0 to 16
# u has this many bits: then 8 bits of level and u fit float32's 24, so no pixel rounds up into the next level.
NUM_NOISE_BITS = 15
VALIDATION_SHARE = 0.1
# Beyond 10 standard deviations the neighbours of a mode change its log density by less than 1e-5 nats on average.
MIN_SEPARATION = 10.0

# --- pixel range ---------------------------------------------------------------------------------


def dequantize(k: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Turn integer levels into the real numbers that models see.

    Args:
        k: levels in {0, ..., levels - 1}, any shape, integer.
        levels: how many there are, at most 256.
        generator: source of u, on the device of ``k``.

    Returns:
        ``2 * (k + u) / levels - 1``, float32, the shape of ``k``, inside (-1, 1). u is uniform over the midpoints
        of 2**15 equal cells of [0, 1), so that k can be recovered exactly.
    """
    cell = torch.randint(2**NUM_NOISE_BITS, k.shape, generator=generator, device=k.device)
    u = (cell.float() + 0.5) / 2**NUM_NOISE_BITS
    y: Tensor = (k.float() + u) * (2 / levels) - 1
    return y


def to_unit(y: Tensor) -> Tensor:
    """Map the models' range to [0, 1] for pictures.

    Args:
        y: any shape, nominally in [-1, 1); what lies outside is cut off.

    Returns:
        The same shape, in [0, 1].
    """
    return ((y + 1) / 2).clamp(0, 1)


# --- splits --------------------------------------------------------------------------------------


class Split(Protocol):
    """One part of a data set."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each element, ``(n,)``, int64; ``None`` where there is none."""
        ...

    def __len__(self) -> int:
        """Count the elements."""
        ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch.

        Args:
            indices: which elements, ``(b,)``, int64.
            generator: source of the flips and of the dequantisation noise, on the CPU.

        Returns:
            ``(b, *event_shape)``, float32.
        """
        ...


@dataclass(frozen=True, eq=False)
class Points:
    """Real vectors held in memory."""

    points: Tensor
    """``(n, d)``, float32, finite."""
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse points that no density can be fitted to."""
        if self.points.ndim != 2 or not self.points.is_floating_point():
            raise InputError(
                f"points must be floats of shape (n, d), got {self.points.dtype} of shape {tuple(self.points.shape)}; "
                "give one point per row"
            )
        is_bad = ~self.points.isfinite().all(-1)
        if is_bad.any():
            raise InputError(
                f"points must be finite, but {int(is_bad.sum())} rows are not, the first of them row "
                f"{int(is_bad.nonzero()[0])}; remove them"
            )
        _check_labels(self.labels, len(self))

    def __len__(self) -> int:
        """Count the points."""
        return len(self.points)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        return self.points[indices].float()


@dataclass(frozen=True, eq=False)
class IntegerImages:
    """Integer images held in memory."""

    images: Tensor
    """``(n, C, H, W)``, uint8, in {0, ..., levels - 1}."""
    labels: Tensor | None = None
    levels: int = NUM_BYTE_LEVELS
    has_flips: bool = False
    """Whether each image of a batch is mirrored left to right with probability 1/2."""

    def __post_init__(self) -> None:
        """Refuse anything but integer images in range."""
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                f"images must be uint8 of shape (n, C, H, W), got {self.images.dtype} of shape "
                f"{tuple(self.images.shape)}; convert them"
            )
        if len(self.images) and int(self.images.max()) >= self.levels:
            raise InputError(
                f"pixels must lie in 0..{self.levels - 1}, got {int(self.images.max())}; rescale the images"
            )
        _check_labels(self.labels, len(self))

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        return _image_batch(self.images[indices], self.levels, self.has_flips, generator)


K = TypeVar("K")


@dataclass(frozen=True, eq=False)
class LazyImages(Generic[K]):
    """Byte images read one by one when a batch asks for them."""

    load: Callable[[K], Tensor]
    """From a key to an image ``(C, H, W)``, uint8, always of the same shape."""
    keys: Sequence[K]
    labels: Tensor | None = None
    has_flips: bool = False
    """Whether each image of a batch is mirrored left to right with probability 1/2."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.keys)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        images = torch.stack([self.load(self.keys[index]) for index in indices.tolist()])
        return _image_batch(images, NUM_BYTE_LEVELS, self.has_flips, generator)


def _image_batch(images: Tensor, levels: int, has_flips: bool, generator: torch.Generator) -> Tensor:
    if has_flips:
        is_flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(is_flipped, images.flip(-1), images)
    return dequantize(images, levels, generator)


def _check_labels(labels: Tensor | None, size: int) -> None:
    if labels is not None and (labels.shape != (size,) or labels.dtype != torch.int64):
        raise InputError(
            f"labels must be int64 of shape ({size},), got {labels.dtype} of shape {tuple(labels.shape)}; "
            "give one class number per element"
        )


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three disjoint parts."""

    name: str
    event_shape: torch.Size
    """``(d,)`` for points, ``(C, H, W)`` for images."""
    train: Split
    validation: Split
    """For choices made while training."""
    test: Split
    """For numbers that are reported."""
    levels: int | None = None
    """Levels of a pixel; ``None`` for points."""
    modes: Tensor | None = None
    """Centres of a known mixture, ``(m, d)``."""
    mode_std: float | None = None
    """Standard deviation of each of its components, along every axis."""
    max_log_density_nats: float | None = None
    """Mean log density of the data under their own law, which no model can pass but by chance; ``None`` if unknown."""


def load_data(config: DataConfig, seed: int) -> Data:
    """Load or draw a data set.

    Args:
        config: which one, and where it lies.
        seed: the run's seed. Only ``gaussians25`` depends on it; every other split is the same in all runs.

    Returns:
        The data set.

    Raises:
        InputError: files or a package are missing, or an option does not fit the data set.
    """
    if config.name == "gaussians25":
        return _gaussians25(config, seed)
    return _IMAGE_SETS[config.name](config)


# --- gaussians25 ---------------------------------------------------------------------------------


def gaussians25_modes(spacing: float) -> Tensor:
    """Return the centres of the 5 x 5 grid around 0, ``(25, 2)``, float32.

    Args:
        spacing: distance of neighbours.
    """
    axis = spacing * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(axis, axis)


def gaussians25_log_prob(x: Tensor, spacing: float, std: float) -> Tensor:
    """Evaluate the exact log density of the mixture of 25 Gaussians.

    Args:
        x: points, ``(n, 2)``.
        spacing: distance of neighbouring modes.
        std: standard deviation of each mode, along both axes.

    Returns:
        ``(n,)``, float64, nats.
    """
    modes = gaussians25_modes(spacing).to(x.device)
    squares = (x.double().unsqueeze(-2) - modes.double()).square().sum(-1)
    return (-0.5 * squares / std**2).logsumexp(-1) - math.log(25 * 2 * math.pi * std**2)


def _gaussians25(config: DataConfig, seed: int) -> Data:
    _refuse_image_size(config)
    modes = gaussians25_modes(config.spacing)

    def draw(split: str, num_points: int) -> Points:
        generator = stream(seed, "data", split)
        centres = modes[torch.randint(len(modes), (num_points,), generator=generator)]
        return Points(centres + config.std * torch.randn(num_points, 2, generator=generator))

    is_separated = config.spacing >= MIN_SEPARATION * config.std
    return Data(
        "gaussians25",
        torch.Size([2]),
        draw("train", config.num_points),
        draw("validation", config.num_points // 5),
        draw("test", config.num_points // 5),
        modes=modes,
        mode_std=config.std,
        max_log_density_nats=-math.log(25 * 2 * math.pi * config.std**2) - 1 if is_separated else None,
    )


def _refuse_image_size(config: DataConfig) -> None:
    if config.image_size is not None:
        raise InputError(f"data set {config.name} has one size only; leave --data.image-size out")


# --- image sets held in memory -------------------------------------------------------------------


def _digits(config: DataConfig) -> Data:
    """Load sklearn's 1,797 digits: 1,260 train, 140 validation, 397 test, by a permutation fixed for good."""
    _refuse_image_size(config)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError(
            "data set digits needs the package scikit-learn; install it with pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    # Ordering by a hash, not by a generator, keeps the split the same in every version of torch.
    order = torch.tensor(sorted(range(len(images)), key=lambda index: seed_for(0, "digits", index)))

    def part(indices: Tensor) -> IntegerImages:
        return IntegerImages(images[indices], labels[indices], NUM_DIGIT_LEVELS)

    return _image_data("digits", [part(order[:1260]), part(order[1260:1400]), part(order[1400:])])


def _image_data(name: str, splits: Sequence[IntegerImages]) -> Data:
    train, validation, test = splits
    return Data(name, train.images.shape[1:], train, validation, test, levels=train.levels)


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
    return _image_data(config.name, splits)


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
    return _image_data(config.name, splits)


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


_IMAGE_SETS: dict[str, Callable[[DataConfig], Data]] = {
    "digits": _digits,
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


# --- order ---------------------------------------------------------------------------------------


class KeyedSampler:
    """Order of the data as a function of seed and step, so that a resumed run needs no stored position.

    An epoch is one permutation, drawn from the stream of (seed, epoch); each step takes the next
    ``batch_size * world`` elements of it, and rank r the r-th ``batch_size`` of those. What does not fill a
    step is left out of that epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """Fix the order.

        Args:
            size: elements of the split.
            batch_size: elements per rank and step.
            seed: the run's seed.
            rank: which process this is, in {0, ..., world - 1}.
            world: number of processes.

        Raises:
            InputError: one step would need more elements than there are.
        """
        if not 1 <= batch_size * world <= size:
            raise InputError(
                f"a step needs batch size x processes = {batch_size} x {world} elements between 1 and the {size} "
                "of the training split; change the batch size"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = size // (batch_size * world)
        self._size, self._seed, self._rank, self._world = size, seed, rank, world
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Return the elements of one step, ``(batch_size,)``, int64.

        Args:
            step: from 0, over all epochs.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self._size, generator=stream(self._seed, "order", epoch))
            self._epoch = epoch
        start = (position * self._world + self._rank) * self.batch_size
        return self._order[start : start + self.batch_size]
