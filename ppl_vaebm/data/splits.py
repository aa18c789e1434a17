"""The pixel range, and the splits of a data set, which make batches.

An integer level k in {0, ..., levels - 1} becomes ``y = 2 * (k + u) / levels - 1`` with u uniform on [0, 1) (uniform
dequantisation, Theis et al. 2016, arXiv:1511.01844), so y lies in [-1, 1). A log density of y in nats plus
``log(2 / levels)`` per coordinate is a lower bound on the log probability of the levels. The values of binarised images
are exactly -1 and 1, and their model gives a log probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError

NUM_BYTE_LEVELS = 256
# u has this many bits: then 8 bits of level and u fit float32's 24, so no pixel rounds up into the next level.
NUM_NOISE_BITS = 15

# --- pixel range ---------------------------------------------------------------------------------


def dequantize(k: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Map integer levels k in {0, ..., levels - 1} of any shape to ``2 * (k + u) / levels - 1``, float32, in (-1, 1).

    ``u`` is uniform over the midpoints of 2**15 equal cells of [0, 1), so that k can be recovered exactly. ``levels``
    is at most 256; the generator is on the device of ``k``.
    """
    cell = torch.randint(2**NUM_NOISE_BITS, k.shape, generator=generator, device=k.device)
    u = (cell.float() + 0.5) / 2**NUM_NOISE_BITS
    y: Tensor = (k.float() + u) * (2 / levels) - 1
    return y


def binarize(k: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Draw 1 with probability exactly ``k / (levels - 1)``, else -1, for integer levels k of any shape; float32.

    This is dynamic binarisation, Salakhutdinov and Murray 2008. The generator is on the device of ``k``.
    """
    is_white = torch.randint(levels - 1, k.shape, generator=generator, device=k.device) < k
    return is_white.float() * 2 - 1


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
        """Make a batch ``(b, *event_shape)``, float32, of elements ``(b,)``, int64.

        The generator, on the CPU, draws crops, flips and noise or binarisation.
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
    is_binarized: bool = False
    """Whether a batch is drawn by :func:`binarize`; else by :func:`dequantize`."""

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
        return _image_batch(self, self.images[indices], generator)


K = TypeVar("K")


@dataclass(frozen=True, eq=False)
class LazyImages(Generic[K]):
    """Integer images read one by one when a batch asks for them."""

    load: Callable[[K], Tensor]
    """From a key to an image ``(C, H, W)``, uint8, in {0, ..., levels - 1}, always of the same shape but for crops."""
    keys: Sequence[K]
    labels: Tensor | None = None
    levels: int = NUM_BYTE_LEVELS
    has_flips: bool = False
    """As in :class:`IntegerImages`."""
    is_binarized: bool = False
    """As in :class:`IntegerImages`."""
    random_crop: int | None = None
    """Side of the square to cut out of each image of a batch, anywhere in it; ``None`` for images of one shape."""
    load_middle: Callable[[K], Tensor] | None = None
    """Like :attr:`load`, but the middle square, as parts without random crops have it; for those with."""

    def __post_init__(self) -> None:
        """Refuse labels that do not fit."""
        _check_labels(self.labels, len(self))

    def __len__(self) -> int:
        """Count the images."""
        return len(self.keys)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        images = [self.load(self.keys[index]) for index in indices.tolist()]
        if self.random_crop is not None:
            images = [_random_square(image, self.random_crop, generator) for image in images]
        return _image_batch(self, torch.stack(images), generator)


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A split with Gaussian noise added to every batch: its distribution is a smoothed one."""

    clean: Split
    """Without the noise."""
    noise_sd: float
    """Its standard deviation, positive."""

    @property
    def labels(self) -> Tensor | None:
        """Classes; see :attr:`Split.labels`."""
        return self.clean.labels

    def __len__(self) -> int:
        """Count the elements."""
        return len(self.clean)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        return smoothed(self.clean.batch(indices, generator), self.noise_sd, generator)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some elements of a split."""

    whole: Split
    """All elements."""
    places: Tensor
    """Which of them are in it, ``(n,)``, int64."""

    @property
    def labels(self) -> Tensor | None:
        """Classes; see :attr:`Split.labels`."""
        return None if self.whole.labels is None else self.whole.labels[self.places]

    def __len__(self) -> int:
        """Count the elements."""
        return len(self.places)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Make a batch; see :meth:`Split.batch`."""
        return self.whole.batch(self.places[indices], generator)


def random_subset(split: Split, num: int, generator: torch.Generator) -> Split:
    """Choose ``num`` elements at random and keep their order, because files may be sorted by class.

    A split of at most ``num`` elements is returned as it is. The generator is on the CPU; ``stream(seed, "order",
    name)`` chooses the first elements of ``random_order`` in ``evaluation``.
    """
    if num >= len(split):
        return split
    return Subset(split, torch.randperm(len(split), generator=generator)[:num].sort().values)


def smoothed(x: Tensor, noise_sd: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of this standard deviation to images of any shape on the CPU; 0 draws nothing."""
    return x + noise_sd * torch.randn(x.shape, generator=generator) if noise_sd else x


def without_noise(split: Split) -> Split:
    """Return a split without the noise of :class:`Smoothed`."""
    if isinstance(split, Subset):
        return replace(split, whole=without_noise(split.whole))
    return split.clean if isinstance(split, Smoothed) else split


def without_augmentation(split: Split) -> Split:
    """Return a split without mirroring and with middle crops, as held-out images are read."""
    if isinstance(split, Smoothed):
        return replace(split, clean=without_augmentation(split.clean))
    if isinstance(split, Subset):
        return replace(split, whole=without_augmentation(split.whole))
    if isinstance(split, LazyImages) and split.random_crop is not None:
        assert split.load_middle is not None
        split = replace(split, load=split.load_middle, random_crop=None)
    if isinstance(split, (IntegerImages, LazyImages)) and split.has_flips:
        return replace(split, has_flips=False)
    return split


def _random_square(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


def _image_batch(split: IntegerImages | LazyImages[Any], images: Tensor, generator: torch.Generator) -> Tensor:
    if split.has_flips:
        is_flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(is_flipped, images.flip(-1), images)
    return (binarize if split.is_binarized else dequantize)(images, split.levels, generator)


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
    is_dequantized: bool = True
    """Whether ``log(2 / levels)`` per coordinate turns a log density in nats into a bound on the log probability of the
    levels; not so for binarised images, whose values are the levels themselves, nor for points."""
    modes: Tensor | None = None
    """Centres of a known mixture, ``(m, d)``."""
    mode_std: float | None = None
    """Standard deviation of each of its components, along every axis."""
    max_log_density_nats: float | None = None
    """Mean log density of the data under their own distribution; ``None`` if unknown."""
    skipped: tuple[str, ...] = ()
    """Files that could not be read and were left out, for the entry point to report."""
    noise_sd: float = 0.0
    """Of the Gaussian noise that every image of a batch has; its log density then bounds no log probability."""

    def __post_init__(self) -> None:
        """Refuse a part without elements."""
        train, validation, test = len(self.train), len(self.validation), len(self.test)
        if not (train and validation and test):
            raise InputError(
                f"data set {self.name} needs elements for training, validation and test, found {train}, {validation} "
                f"and {test}; add more"
            )


def image_data(
    name: str, event_shape: torch.Size, splits: Sequence[IntegerImages | LazyImages[Any]], skipped: tuple[str, ...] = ()
) -> Data:
    """Make a data set of integer images from train, validation and test, which have the same levels."""
    train, validation, test = splits
    return Data(
        name,
        event_shape,
        train,
        validation,
        test,
        levels=2 if train.is_binarized else train.levels,
        is_dequantized=not train.is_binarized,
        skipped=skipped,
    )
