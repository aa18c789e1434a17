"""The pixel range can be undone, splits follow their indices, and refuse what no model can use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.data.splits import (
    Data,
    IntegerImages,
    LazyImages,
    Points,
    Smoothed,
    Split,
    Subset,
    binarize,
    dequantize,
    image_data,
    random_subset,
    smoothed,
    without_augmentation,
    without_noise,
)
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.sections import random_order
from ppl_vaebm.rng import stream
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


# --- binarisation ---


def test_pixels_are_white_with_the_odds_of_their_level() -> None:
    num = 20_000
    k = torch.tensor([0, 1, 64, 200, 254, 255], dtype=torch.uint8)
    y = binarize(k.expand(num, 6), 256, noise())
    assert y.dtype == torch.float32 and y.unique().tolist() == [-1, 1]
    assert (y[:, 0] == -1).all() and (y[:, 5] == 1).all()  # black and white stay what they are
    odds = k.double() / 255
    error = (y > 0).double().mean(0) - odds
    assert (error.abs() <= 5 * (odds * (1 - odds) / num).sqrt()).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_binarised_images_are_exact_and_their_data_say_so(lazy: bool) -> None:
    images = torch.tensor([0, 255, 100], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)

    def split(is_binarized: bool) -> IntegerImages | LazyImages[int]:
        if lazy:
            return LazyImages(lambda key: images[key], range(3), is_binarized=is_binarized)
        return IntegerImages(images, is_binarized=is_binarized)

    y = split(True).batch(torch.arange(3), noise())
    assert (y[0] == -1).all() and (y[1] == 1).all() and y[2].unique().tolist() == [-1, 1]
    binary = image_data("x", torch.Size([1, 4, 4]), [split(True)] * 3)
    assert (binary.levels, binary.is_dequantized) == (2, False)
    assert split(False).batch(torch.arange(3), noise()).unique().numel() == 3 * 16
    grey = image_data("x", torch.Size([1, 4, 4]), [split(False)] * 3)
    assert (grey.levels, grey.is_dequantized) == (256, True)


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


def test_random_crops_are_squares_of_the_image() -> None:
    image = torch.arange(6 * 9, dtype=torch.uint8).reshape(1, 6, 9)
    split = LazyImages(lambda _: image, range(400), random_crop=4)
    seen = pixels(split)
    corners = seen[:, 0, 0, 0]
    assert corners.unique().tolist() == [9 * row + column for row in range(3) for column in range(6)]
    inside = 9 * torch.arange(4)[:, None] + torch.arange(4)
    assert (seen[:, 0] == corners[:, None, None] + inside).all()


def test_lazy_images_have_as_many_labels_as_keys() -> None:
    labels = torch.tensor([1, 0])
    assert LazyImages(lambda _: torch.empty(0), "ab", labels).labels is labels
    with pytest.raises(InputError, match=r"shape \(3,\), got torch.int64 of shape \(2,\)"):
        LazyImages(lambda _: torch.empty(0), "abc", labels)


def test_a_part_without_elements_is_refused() -> None:
    some, none = Points(torch.zeros(3, 2)), Points(torch.zeros(0, 2))
    assert Data("x", torch.Size([2]), some, some, some).skipped == ()
    for parts in ((none, some, some), (some, none, some), (some, some, none)):
        with pytest.raises(InputError, match="data set x needs elements .* found .*0.*; add more"):
            Data("x", torch.Size([2]), *parts)


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


# --- smoothing ---


def test_noise_on_images_is_gaussian_and_can_be_left_out() -> None:
    images = torch.full((500, 1, 8, 8), 200, dtype=torch.uint8)
    clean = IntegerImages(images, torch.zeros(500, dtype=torch.int64))
    noisy = Smoothed(clean, 0.05)
    indices = torch.arange(500)
    assert len(noisy) == 500 and noisy.labels is clean.labels and without_noise(noisy) is clean
    # The clean images come first from the generator, so the same one gives them again.
    z = ((noisy.batch(indices, noise()) - clean.batch(indices, noise())) / 0.05).double().flatten()
    num = len(z)
    assert abs(float(z.mean())) < 5 / math.sqrt(num)
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / num))
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / num))


def test_no_noise_draws_nothing() -> None:
    x, generator = torch.zeros(3, 4), noise()
    before = generator.get_state()
    assert smoothed(x, 0.0, generator) is x
    assert torch.equal(generator.get_state(), before)


# --- a choice of elements ---


def sorted_by_class(num: int = 300, num_classes: int = 10) -> IntegerImages:
    """Images whose level is their class, class after class."""
    labels = torch.arange(num) * num_classes // num
    return IntegerImages(labels.to(torch.uint8).reshape(num, 1, 1, 1).expand(num, 1, 2, 2), labels)


def test_a_random_subset_of_a_sorted_file_has_every_class() -> None:
    split = sorted_by_class()
    chosen = random_subset(split, 150, stream(3, "order", "test"))
    assert isinstance(chosen, Subset) and len(chosen) == 150 and chosen.labels is not None
    assert chosen.labels.unique().tolist() == list(range(10))
    assert split.labels is not None and split.labels[:150].unique().tolist() == list(range(5))  # the first ones do not
    assert torch.equal(pixels(chosen)[:, 0, 0, 0], chosen.labels)
    # The order of the file is kept, and the choice is that of the other parts of an evaluation.
    assert torch.equal(chosen.places, random_order(split, 3, "test")[:150].sort().values)
    other = random_subset(split, 150, stream(4, "order", "test"))
    assert isinstance(other, Subset) and not torch.equal(other.places, chosen.places)


@pytest.mark.parametrize("num", [300, 301, 5_000])
def test_a_subset_of_all_is_the_split_itself(num: int) -> None:
    split = sorted_by_class()
    assert random_subset(split, num, noise()) is split
    assert random_subset(split, 299, noise()) is not split


def test_a_subset_without_noise_is_one_of_whole_levels() -> None:
    split = sorted_by_class()
    noisy = random_subset(Smoothed(split, 0.5), 20, noise())
    clean = without_noise(noisy)
    assert isinstance(noisy, Subset) and torch.equal(pixels(clean), pixels(Subset(split, noisy.places)))
    assert not torch.equal(pixels(noisy), pixels(clean))
    points = random_subset(Points(torch.arange(8.0).reshape(4, 2)), 2, noise())
    assert points.labels is None and len(points.batch(torch.arange(2), noise())) == 2


# --- augmentation ---


def ramps(num: int = 200) -> Tensor:
    """Levels that count up from left to right."""
    return torch.arange(4, dtype=torch.uint8).expand(num, 1, 4, 4).contiguous()


def test_without_augmentation_no_image_is_mirrored() -> None:
    flipping, plain = IntegerImages(ramps(), has_flips=True), IntegerImages(ramps())
    lazy = LazyImages(lambda key: ramps(1)[0], range(200), has_flips=True)
    expected = plain.batch(torch.arange(200), noise())
    subset = torch.arange(0, 200, 2)
    for split in (flipping, lazy):
        assert not torch.equal(pixels(split), pixels(plain))
        assert torch.equal(without_augmentation(split).batch(torch.arange(200), noise()), expected)  # to the last bit
        assert torch.equal(pixels(without_augmentation(Subset(split, subset))), pixels(plain)[subset])
    noisy = without_augmentation(Smoothed(flipping, 0.1))
    assert torch.equal(noisy.batch(torch.arange(200), noise()), Smoothed(plain, 0.1).batch(torch.arange(200), noise()))


def test_without_augmentation_crops_are_the_middle() -> None:
    image = torch.arange(6 * 9, dtype=torch.uint8).reshape(1, 6, 9)
    split = LazyImages(
        lambda _: image, range(400), has_flips=True, random_crop=4, load_middle=lambda _: image[:, 1:5, 2:6]
    )
    assert len(pixels(split)[:, 0, 0, 0].unique()) > 18
    assert (pixels(without_augmentation(split)) == image[:, 1:5, 2:6]).all()


def test_what_is_not_augmented_stays_itself() -> None:
    splits: tuple[Split, ...] = (
        Points(torch.zeros(3, 2)),
        IntegerImages(ramps()),
        LazyImages(lambda key: ramps(1)[0], range(3)),
    )
    assert all(without_augmentation(split) is split for split in splits)
