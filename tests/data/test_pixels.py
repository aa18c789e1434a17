"""Rounding to levels: exact on data, never stretching, and what is refused before a metric sees it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.data.pixels import check_images, quantised, quantised_as, to_bytes
from ppl_vaebm.data.splits import Data, IntegerImages, Points, binarize, dequantize, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.frechet import frechet_distance
from ppl_vaebm.rng import stream


def images(num: int, *key: str | int, levels: int = 256) -> Tensor:
    return torch.randint(levels, (num, 1, 4, 4), generator=stream(0, *key)).to(torch.uint8)


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_dequantised_levels_come_back_as_their_centres(levels: int) -> None:
    k = torch.arange(levels).repeat(500)
    y = dequantize(k, levels, stream(0, "noise"))
    expected = (2 * k.float() + 1) / levels - 1
    assert torch.equal(quantised(y, levels), expected)
    assert torch.equal(quantised(quantised(y, levels), levels), expected)
    torch.testing.assert_close(quantised(y.double(), levels), (2 * k.double() + 1) / levels - 1, rtol=0, atol=1e-15)
    # The centre is where the noise's mean lies.
    cell = 2 / levels
    assert abs(float((y - expected).mean())) < 5 * cell / math.sqrt(12 * len(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_beyond_the_range_is_clipped_and_nothing_is_stretched(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 0.25, 1.0, 7.0], dtype=dtype)
    expected = torch.tensor([-0.75, -0.75, 0.25, 0.25, 0.75, 0.75], dtype=dtype)
    assert torch.equal(quantised(x, 4), expected)
    # An image of little contrast keeps its contrast, to within one level.
    dull = torch.linspace(-0.1, 0.1, 50, dtype=dtype)
    assert float((quantised(dull) - dull).abs().max()) <= 1 / 256 + 1e-6


def test_binary_values_are_levels_themselves() -> None:
    x = binarize(images(3, "x"), 256, stream(0, "noise"))
    assert torch.equal(quantised(x, 2, is_dequantized=False), x)
    assert quantised(torch.tensor([-9.0, -0.1, 0.1, 9.0]), 2, is_dequantized=False).tolist() == [-1, -1, 1, 1]
    assert quantised(torch.tensor([0.3, 0.6]), 3, is_dequantized=False).tolist() == [0, 1]


def test_noise_of_dequantisation_is_no_part_of_a_distance() -> None:
    k = images(300, "x")
    first, second = (dequantize(k, 256, stream(0, "noise", index)).flatten(1) for index in (0, 1))
    assert frechet_distance(quantised(first), quantised(second)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(first, second) > 1e-9


def test_data_tell_their_levels() -> None:
    split = IntegerImages(images(20, "x", levels=17), levels=17)
    data = image_data("grey", torch.Size([1, 4, 4]), [split] * 3)
    x = quantised_as(split.batch(torch.arange(20), stream(0, "noise")), data)
    torch.testing.assert_close((x + 1) * 17 / 2 - 0.5, split.images.float(), rtol=0, atol=1e-5)
    binary = IntegerImages(images(20, "x"), is_binarized=True)
    batch = binary.batch(torch.arange(20), stream(0, "noise"))
    assert torch.equal(quantised_as(batch, image_data("b", torch.Size([1, 4, 4]), [binary] * 3)), batch)
    points = Points(torch.zeros(3, 2))
    with pytest.raises(InputError, match="is for images, and data set points has none"):
        quantised_as(batch, Data("points", torch.Size([2]), points, points, points))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_refused_not_clipped(value: float) -> None:
    with pytest.raises(InputError, match="must be finite, got 1 pixels"):
        quantised(torch.tensor([0.0, value]))


def test_bytes_of_rounded_images_are_their_levels() -> None:
    k = torch.arange(256).repeat(20)
    assert torch.equal(to_bytes(quantised(dequantize(k, 256, stream(0, "noise")))), k.to(torch.uint8))
    assert to_bytes(torch.tensor([-5.0, -1.0, 1.0, 5.0])).tolist() == [0, 0, 255, 255]


def rounded(num: int, *key: str | int) -> Tensor:
    return quantised(dequantize(images(num, *key), 256, stream(0, "noise")))


def test_sets_of_one_shape_and_range_pass() -> None:
    check_images(rounded(8, "real"), rounded(5, "generated"))
    # Bright sets are no reason to refuse, nor is a dull one.
    check_images(rounded(8, "real").abs(), rounded(5, "generated").abs())
    check_images(rounded(8, "real"), 0.1 * rounded(5, "generated"))


@pytest.mark.parametrize(
    ("real", "generated", "because"),
    [
        (rounded(8, "a"), rounded(8, "b")[..., :3], r"got \(8, 1, 4, 4\) and \(8, 1, 4, 3\)"),
        (rounded(8, "a"), rounded(8, "b")[:0], r"n >= 1.* \(0, 1, 4, 4\)"),
        (rounded(8, "a")[0], rounded(8, "b")[0], r"got \(1, 4, 4\)"),
        (rounded(8, "a"), (rounded(8, "b") + 1) / 2, r"generated ones in \[0, 1\] and real ones in \[-1, 1\]; map"),
        ((rounded(8, "a") + 1) / 2, rounded(8, "b"), r"real ones in \[0, 1\] and generated ones in \[-1, 1\]; map"),
        (rounded(8, "a"), 255 * rounded(8, "b"), r"generated images must lie in \[-1, 1\], got pixels in \[-2"),
        (2 * rounded(8, "a"), rounded(8, "b"), r"real images must lie in \[-1, 1\]"),
        (rounded(8, "a"), torch.full((8, 1, 4, 4), math.nan), r"generated images must lie in .*\[nan, nan\]"),
        (rounded(8, "a"), torch.full((8, 1, 4, 4), -1.0), "generated images must not all be one constant, got -1"),
    ],
)
def test_sets_that_no_metric_should_compare_are_refused(real: Tensor, generated: Tensor, because: str) -> None:
    with pytest.raises(InputError, match=because):
        check_images(real, generated)
