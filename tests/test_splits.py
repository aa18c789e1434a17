"""The pixel range can be undone, splits follow their indices, and refuse what no model can use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import stream
from ppl_vaebm.splits import IntegerImages, LazyImages, Points, dequantize
from tests.pixels import noise, pixels, quantized

# --- pixel range ---


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_dequantized_levels_can_be_recovered_and_lie_inside_the_range(levels: int) -> None:
    k = torch.arange(levels).repeat(4000)
    y = dequantize(k, levels, noise())
    assert y.dtype == torch.float32
    assert float(y.min()) > -1 and float(y.max()) < 1
    assert torch.equal(quantized(y, levels), k)


@pytest.mark.parametrize("cell", [0, 2**15 - 1])
def test_extreme_noise_stays_in_its_level(cell: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, cell))
    k = torch.arange(256)
    assert torch.equal(quantized(dequantize(k, 256, noise()), 256), k)
    # The float32 noise of torch.rand does not have this property: its largest value rounds level 255 up to y = 1.
    assert 2 * (torch.tensor(255.0) + (1 - 2**-24)) / 256 - 1 == 1


def test_dequantization_noise_is_uniform() -> None:
    num = 200_000
    u = (dequantize(torch.full((num,), 3), 16, noise()).double() + 1) * 8 - 3
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / num))
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / num))


def test_dequantization_is_a_function_of_its_generator() -> None:
    k = torch.zeros(10, dtype=torch.uint8)
    assert torch.equal(dequantize(k, 256, stream(0, "a")), dequantize(k, 256, stream(0, "a")))
    assert not torch.equal(dequantize(k, 256, stream(0, "a")), dequantize(k, 256, stream(0, "b")))


# --- splits in memory ---


def test_flips_mirror_half_of_the_images_and_nothing_else() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    flipping = IntegerImages(image.expand(2000, 1, 3, 4), has_flips=True)
    seen = pixels(flipping)
    is_flipped = (seen == image.flip(-1)).flatten(1).all(1)
    assert (is_flipped | (seen == image).flatten(1).all(1)).all()
    assert float(is_flipped.double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000))
    assert (pixels(IntegerImages(image.expand(50, 1, 3, 4))) == image).all()


def test_batches_follow_their_indices() -> None:
    points = Points(torch.arange(8.0).reshape(4, 2))
    assert torch.equal(points.batch(torch.tensor([3, 0]), noise()), torch.tensor([[6.0, 7.0], [0.0, 1.0]]))
    lazy = LazyImages(lambda key: torch.full((1, 2, 2), key, dtype=torch.uint8), [10, 20, 30])
    batch = quantized(lazy.batch(torch.tensor([2, 0]), noise()), 256)
    assert torch.equal(batch[:, 0, 0, 0], torch.tensor([30, 10]))


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        (torch.zeros(3), r"shape \(n, d\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "must be floats"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, math.inf]]), "2 rows are not, the first of them row 1"),
    ],
)
def test_points_of_wrong_shape_or_not_finite_are_refused(points: Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Points(points)


def test_images_of_wrong_type_range_or_labels_are_refused() -> None:
    images = torch.full((3, 1, 2, 2), 16, dtype=torch.uint8)
    IntegerImages(images, torch.zeros(3, dtype=torch.int64), levels=17)
    with pytest.raises(InputError, match=r"must lie in 0\.\.15, got 16"):
        IntegerImages(images, levels=16)
    with pytest.raises(InputError, match="must be uint8"):
        IntegerImages(images.float())
    with pytest.raises(InputError, match=r"shape \(3,\), got torch.int64 of shape \(2,\)"):
        IntegerImages(images, torch.zeros(2, dtype=torch.int64))
