"""Observations of x: their options, and their reading as tensors. Only the reading imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ppl_vaebm.errors import InputError, shown

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vaebm.config import DataConfig
    from ppl_vaebm.data.splits import Data
    from ppl_vaebm.inference.observations import Operator

BYTE_LEVELS = 256
MIN_DRAWS = 4
"""Draws per chain that R-hat needs, as in ``inference/diagnostics/convergence.py``, which imports torch."""
MAX_GREY = 64
"""Lightest pixel of a mask, of 255, that counts as black, for the errors of JPEG. Chosen by us."""
MIN_WHITE = BYTE_LEVELS - 1 - MAX_GREY
"""Darkest that counts as white."""


@dataclass(frozen=True)
class GivenOptions:
    """What was observed, and how to sample the posterior."""

    given: str | None = None
    """Condition on this image: an image file, or .npy with values in [-1, 1]. Brought to the size of the data as they
    are."""
    mask: str | None = None
    """Image of the size of the given one: white where it is observed, black where it is not."""
    given_values: str | None = None
    """Condition on values of a point, nan where it is not observed: "0.5,nan"."""
    noise_sd: float | None = None
    """The given values have Normal noise of this standard deviation, in units of x, whose pixels lie in [-1, 1]; if not
    given they are exact."""
    blur: float | None = None
    """The given image was blurred by a Gaussian of this standard deviation, in pixels, before the noise."""
    subsample: int | None = None
    """Every pixel of the given image is the average of a square with this side, before the noise."""
    num_chains: int = 8
    """given: chains."""
    num_warmup: int = 300
    """given: steps of warm-up, after the start that tempering finds."""
    num_draws: int = 1_000
    """given: draws of every chain."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, as InputError: of a nested group the parser passes other errors on."""
        for name, least in (("num_chains", 1), ("num_warmup", 1), ("num_draws", MIN_DRAWS), ("subsample", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"expected {name.replace('_', '-')} of at least {least}, got {value}: raise it")
        for name in ("noise_sd", "blur"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"expected {name.replace('_', '-')} positive and finite, got {value}: change it")
        expected, values = 'numbers with commas in --given-values, such as "0.5,nan"', self.given_values or "0"
        try:
            numbers = [float(word) for word in values.split(",")]
        except ValueError:
            raise InputError(f"expected {expected}, found {shown(values)}") from None
        if all(map(math.isnan, numbers)):
            raise InputError(f"expected {expected}, found no number in {shown(values)}: give one that was observed")

    @property
    def is_conditional(self) -> bool:
        """Whether anything was observed; InputError for an option of the posterior without."""
        if self.given is not None or self.given_values is not None:
            return True
        for name in ("mask", "noise_sd", "blur", "subsample", "num_chains", "num_warmup", "num_draws"):
            if getattr(self, name) != getattr(GivenOptions, name):
                raise InputError(f"--{name.replace('_', '-')} expects --given or --given-values, found neither")
        return False


class Given(NamedTuple):
    """Arguments of :func:`ppl_vaebm.inference.conditioning.condition`."""

    given: Tensor
    """The observation; coordinates of a point that are not observed are nan."""
    mask: Tensor | None
    """Of the shape of x; ``None`` if all of x, or its image under an operator, is observed."""
    noise_sd: float | None
    operator: Operator | None


def read_given(options: GivenOptions, data: Data, config: DataConfig) -> Given:
    """Read an observation with the preprocessing of the data; exact pixels get the centers of their levels.

    Raises:
        InputError: options that do not go together or do not fit the data; files that cannot be read.
    """
    _check_together(options, data)
    if options.given_values is not None:
        return _read_point(options.given_values, options.noise_sd, data)
    assert options.given is not None
    from ppl_vaebm.inference.observations import average_pooling, gaussian_blur

    operator = None
    if options.blur is not None:
        operator = gaussian_blur(options.blur)
    elif options.subsample is not None:
        operator = average_pooling(options.subsample)
    side = data.event_shape[-1] // (options.subsample or 1)
    given = _read_pixels(Path(options.given), side, data, config, is_exact=options.noise_sd is None)
    mask = None if options.mask is None else _read_mask(Path(options.mask), Path(options.given), data, config)
    if mask is not None and options.noise_sd is None and not (given[mask].abs() <= 1).all():
        raise InputError(f"expected observed values in [-1, 1], found others in {options.given}: rescale them")
    return Given(given, mask, options.noise_sd, operator)


def _check_together(options: GivenOptions, data: Data) -> None:
    is_image = len(data.event_shape) == 3
    expected, other = ("given", "given-values") if is_image else ("given-values", "given")
    if (options.given_values if is_image else options.given) is not None:
        what = "images" if is_image else "points"
        raise InputError(f"data set {data.name} holds {what}, expected --{expected}, found --{other}: change it")
    for name in () if is_image else ("mask", "blur", "subsample"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for images, found it for data set {data.name}: leave it out")
    named = [name for name in ("mask", "blur", "subsample") if getattr(options, name) is not None]
    if len(named) > 1:
        raise InputError(f"expected one of mask, blur and subsample, found {' and '.join(named)}: leave out the others")
    if is_image and options.noise_sd is None and named != ["mask"]:
        raise InputError(
            "expected --mask, for pixels that were observed exactly, or --noise-sd, found neither: give one of them"
        )
    if options.subsample is not None and any(side % options.subsample for side in data.event_shape[-2:]):
        raise InputError(
            f"expected --subsample to divide the side {data.event_shape[-1]} of the images, got {options.subsample}: "
            "give a divisor"
        )


def _read_point(text: str, noise_sd: float | None, data: Data) -> Given:
    import torch

    (dim,) = data.event_shape
    values = torch.tensor([float(word) for word in text.split(",")], dtype=torch.float64)
    if values.shape != (dim,):
        raise InputError(f'expected {dim} numbers with commas in --given-values, such as "0.5,nan", found {text!r}')
    mask = ~values.isnan()
    if noise_sd is None:
        seen = data.train.batch(torch.arange(len(data.train)), torch.Generator()).double()
        low, high = seen.amin(0), seen.amax(0)
        margin = high - low
        is_far = mask & ~((values > low - margin) & (values < high + margin))
        if is_far.any():
            index = int(is_far.nonzero()[0])
            raise InputError(
                f"expected values near the data, which lie in [{float(low[index]):.3g}, {float(high[index]):.3g}] "
                f"along coordinate {index + 1}, found {float(values[index]):g}: give one within the range of the data"
            )
    return Given(values, mask, noise_sd, None)


def _read_pixels(path: Path, side: int, data: Data, config: DataConfig, *, is_exact: bool) -> Tensor:
    """Read an image as values of x, ``(C, side, side)``."""
    if path.suffix == ".npy":
        return _read_array(path, (data.event_shape[0], side, side))
    levels = data.levels if is_exact and data.levels is not None else BYTE_LEVELS
    k = _read_bytes(path, data.event_shape[0], side, config).double() * levels / BYTE_LEVELS
    if is_exact and not data.is_dequantized:
        return 2 * k.floor() - 1  # binarised
    return (2 * k.floor() + 1) / levels - 1


def _read_bytes(path: Path, channels: int, side: int, config: DataConfig) -> Tensor:
    """Read an image as the data set reads its own, ``(channels, side, side)``, uint8."""
    from ppl_vaebm.data.archives import padding_of
    from ppl_vaebm.data.decoding import GREY_MODES, ImageForm, decode, header

    mode, size = header(path)
    padding = 0 if size == (side, side) else padding_of(config)
    pixels = decode(path, ImageForm(1 if mode in GREY_MODES else 3, side, padding))
    if channels == 1 and (pixels != pixels[:1]).any():
        raise InputError(f"expected a grey image, as the run's data are, found colours in {path}: convert it")
    if channels == 3 and len(pixels) == 1:
        raise InputError(f"expected an image in colour, as the run's data are, found a grey one in {path}: convert it")
    return pixels[:channels]


def _read_array(path: Path, shape: tuple[int, int, int]) -> Tensor:
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the array {path} cannot be read ({' '.join(str(error).split())}); name another") from None
    if array.shape == shape[1:] and shape[0] == 1:
        array = array[None]
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise InputError(
            f"expected an array of real numbers of shape {shape} in {path}, found {array.dtype} of shape "
            f"{array.shape}: bring it to that shape"
        )
    return torch.from_numpy(array.astype(np.float64))


def _read_mask(path: Path, given: Path, data: Data, config: DataConfig) -> Tensor:
    """Read a mask, ``(C, H, W)``, boolean; a resized pixel is observed where all of it is."""
    from ppl_vaebm.data.archives import padding_of
    from ppl_vaebm.data.decoding import ImageForm, decode, header

    side = data.event_shape[-1]
    size = header(path)[1]
    expected = (side, side) if given.suffix == ".npy" else header(given)[1]
    if size not in (expected, (side, side)):
        raise InputError(
            f"expected a mask of {expected[0]} x {expected[1]} pixels, the size of what is given, found {size[0]} x "
            f"{size[1]} in {path}: make it of that size"
        )
    raw = decode(path, ImageForm(1, min(size)))
    if ((raw > MAX_GREY) & (raw < MIN_WHITE)).any():
        raise InputError(f"expected a mask of black and white, found greys in {path}: white marks what is observed")
    padding = 0 if size == (side, side) else padding_of(config)
    return (decode(path, ImageForm(1, side, padding)) >= MIN_WHITE).expand(data.event_shape).clone()
