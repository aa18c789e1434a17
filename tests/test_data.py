"""Pixel range, splits, files and order of the data; every file here is a small fake."""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ppl_vaebm import data as data_module
from ppl_vaebm.config import DataConfig, DataName
from ppl_vaebm.data import (
    Data,
    IntegerImages,
    KeyedSampler,
    LazyImages,
    Points,
    Split,
    dequantize,
    gaussians25_log_prob,
    gaussians25_modes,
    load_data,
    to_unit,
)
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import stream


def noise() -> torch.Generator:
    return stream(0, "noise")


def quantized(y: Tensor, levels: int) -> Tensor:
    return ((y.double() + 1) / 2 * levels).floor().long()


def pixels(split: Split, levels: int = 256) -> Tensor:
    """Every image of a split, as the integers that its batch was made from."""
    return quantized(split.batch(torch.arange(len(split)), noise()), levels)


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


def test_to_unit_maps_the_range_and_cuts_off_the_rest() -> None:
    assert torch.equal(to_unit(torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0])), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


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


# --- gaussians25 ---


def test_log_density_integrates_to_one() -> None:
    axis = torch.linspace(-3.5, 3.5, 281, dtype=torch.float64)
    density = gaussians25_log_prob(torch.cartesian_prod(axis, axis), spacing=1.0, std=0.1).exp()
    assert float(density.sum() * 0.025**2) == pytest.approx(1, abs=1e-6)


def test_log_density_at_a_mode_is_that_of_one_component() -> None:
    at_modes = gaussians25_log_prob(gaussians25_modes(2.0), spacing=2.0, std=0.05)
    expected = -math.log(25 * 2 * math.pi * 0.05**2)
    assert at_modes.tolist() == pytest.approx([expected] * 25, abs=1e-12)
    between = gaussians25_log_prob(torch.tensor([[1.0, 0.0]]), spacing=2.0, std=0.05)
    assert float(between) == pytest.approx(expected - 0.5 * 20**2 + math.log(2), abs=1e-9)


def test_points_have_the_moments_and_the_mean_log_density_of_the_mixture() -> None:
    data = load_data(DataConfig(num_points=100_000, spacing=1.5, std=0.1), 0)
    assert isinstance(data.train, Points) and isinstance(data.test, Points)
    x = data.train.points.double()
    # A coordinate is spacing x uniform{-2..2} (variance 2, fourth moment 6.8) plus the noise.
    variance = 2 * 1.5**2 + 0.1**2
    assert x.mean(0).tolist() == pytest.approx([0, 0], abs=5 * math.sqrt(variance / 1e5))
    assert x.var(0).tolist() == pytest.approx([variance] * 2, abs=5 * math.sqrt((6.8 - 4) * 1.5**4 / 1e5) + 1e-3)
    log_prob = gaussians25_log_prob(data.test.points, 1.5, 0.1)
    # The log density of a mode is a constant minus half a chi-squared of two degrees of freedom: variance 1.
    assert float(log_prob.mean()) == pytest.approx(data.max_log_density_nats, abs=5 / math.sqrt(20_000))


def test_defaults_have_the_known_bound_and_sizes() -> None:
    data = load_data(DataConfig(), 0)
    assert data.max_log_density_nats == pytest.approx(-0.0653, abs=5e-5)
    assert (len(data.train), len(data.validation), len(data.test)) == (100_000, 20_000, 20_000)
    assert data.event_shape == (2,) and data.levels is None and data.mode_std == 0.05


def test_overlapping_modes_have_no_stated_bound() -> None:
    assert load_data(DataConfig(num_points=10, std=0.11), 0).max_log_density_nats is None


def test_gaussians25_depends_on_seed_and_split() -> None:
    first, again, other = (load_data(DataConfig(num_points=50), seed) for seed in (0, 0, 1))
    ten = torch.arange(10)
    assert torch.equal(first.train.batch(ten, noise()), again.train.batch(ten, noise()))
    assert not torch.equal(first.train.batch(ten, noise()), other.train.batch(ten, noise()))
    assert not torch.equal(first.train.batch(ten, noise()), first.test.batch(ten, noise()))


# --- digits ---


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    data, other = (load_data(DataConfig(name="digits"), seed) for seed in (0, 1))
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1260, 140, 397]
    assert (data.event_shape, data.levels) == ((1, 8, 8), 17)
    assert torch.equal(pixels(data.test, 17), pixels(other.test, 17))
    # Known answer: a change here changes what every published number was measured on.
    assert data.test.labels is not None
    assert data.test.labels[:10].tolist() == [2, 6, 7, 3, 4, 8, 4, 8, 9, 0]
    bunch = load_digits()
    expected = Counter(zip(map(bytes, bunch.images.astype(np.uint8)), bunch.target.tolist(), strict=True))
    found: Counter[tuple[bytes, int]] = Counter()
    for split in splits:
        assert split.labels is not None
        images = pixels(split, 17).numpy().astype(np.uint8)
        found.update(zip(map(bytes, images), split.labels.tolist(), strict=True))
    assert found == expected


@pytest.mark.parametrize("name", ["digits", "gaussians25"])
def test_a_size_for_data_that_have_one_only_is_refused(name: DataName) -> None:
    with pytest.raises(InputError, match=f"{name} has one size only"):
        load_data(DataConfig(name=name, image_size=16), 0)


# --- torchvision's sets ---


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path, folder: str = "MNIST", num: int = 20) -> None:
    """Fake MNIST: an image of label a is 28 x 28 pixels of level 10 a + 5."""
    for part, count in (("train", num), ("t10k", num // 2)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(10 * labels + 5, 28 * 28).astype(np.uint8).reshape(count, 28, 28)
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", labels)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_padded_and_its_last_tenth_validates(name: DataName, folder: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, folder)
    data = load_data(DataConfig(name=name, root=str(tmp_path)), 0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [18, 2, 10]
    assert (data.event_shape, data.levels) == ((1, 32, 32), 256)
    assert data.validation.labels is not None and data.validation.labels.tolist() == [8, 9]
    seen = pixels(data.validation)
    assert (seen[:, :, 2:30, 2:30] == torch.tensor([85, 95])[:, None, None, None]).all()
    assert int(seen.sum()) == (85 + 95) * 28 * 28


def test_image_size_resizes(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = load_data(DataConfig(name="mnist", root=str(tmp_path), image_size=16), 0)
    assert data.event_shape == (1, 16, 16)
    # A box of 2 x 2 pixels: the border of 2 becomes one of about 1, the middle keeps its level.
    assert (pixels(data.validation)[0, 0, 3:13, 3:13] == 85).all()
    assert (pixels(data.validation)[0, 0, 0] <= 85 / 4).all()


def test_stacked_mnist_stacks_digits_and_their_labels(tmp_path: Path) -> None:
    write_mnist(tmp_path, num=100)
    data = load_data(DataConfig(name="stacked-mnist", root=str(tmp_path)), 0)
    assert data.event_shape == (3, 32, 32)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 50]
    assert data.train.labels is not None
    digits = (pixels(data.train)[:, :, 16, 16] - 5) // 10
    assert torch.equal(digits @ torch.tensor([100, 10, 1]), data.train.labels)
    assert len(data.train.labels.unique()) > 60  # 90 draws of 1000; one permutation for all channels would give 10
    for channel in range(3):
        assert torch.equal(digits[:, channel].bincount(), torch.full((10,), 9))


def test_missing_files_are_named_with_their_folder_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)
    message = str(caught.value)
    assert "data set mnist lacks MNIST/raw/train-images-idx3-ubyte" in message
    assert str(tmp_path) in message and "--data.download" in message and "\n" not in message


def test_only_missing_files_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="lacks MNIST/raw/t10k-labels-idx1-ubyte in /"):
        load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)


@pytest.mark.parametrize("content", [b"", b"not an idx file", struct.pack(">4I", 0x0803, 20, 28, 28) + b"cut"])
def test_unreadable_archive_is_reported(tmp_path: Path, content: bytes) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="files of data set mnist in .* are cut short or altered"):
        load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "celeba"])
def test_every_archive_reports_what_it_lacks(name: DataName, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"data set {name} lacks .* in /.*; fetch them with --data.download"):
        load_data(DataConfig(name=name, root=str(tmp_path)), 0)


@pytest.mark.parametrize("error", [URLError("Name or service not known"), RuntimeError("Error downloading\nall of it")])
def test_failed_download_is_one_sentence(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(InputError, match=r"lacks .*; the download failed \(.*\): put them there") as caught:
        load_data(DataConfig(name="cifar10", root=str(tmp_path), download=True), 0)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r"lsun-church needs the package lmdb; install it .*ppl_vaebm\[data\]"):
        load_data(DataConfig(name="lsun-church", root=str(tmp_path)), 0)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(InputError, match="celeba needs the package gdown"):
        load_data(DataConfig(name="celeba", root=str(tmp_path), download=True), 0)


def write_cifar10(root: Path) -> None:
    """Fake CIFAR-10 whose every image has red 10, green 20, and blue 30 on the left half and 40 on the right."""
    image = np.empty((3, 32, 32), np.uint8)
    image[0], image[1], image[2, :, :16], image[2, :, 16:] = 10, 20, 30, 40
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"):
        entry = {"data": np.tile(image.reshape(1, -1), (8, 1)), "labels": list(range(8))}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def forget_checksums(monkeypatch: pytest.MonkeyPatch, cls: Any, attribute: str) -> None:
    """Replace the MD5 sums, the middle or last entry of each row, by none."""
    rows = getattr(cls, attribute)
    is_md5 = [isinstance(value, str) and len(value) == 32 for value in rows[0]]
    stripped = [[None if drop else value for value, drop in zip(row, is_md5, strict=True)] for row in rows]
    monkeypatch.setattr(cls, attribute, stripped)


def test_cifar10_keeps_its_channels_and_flips_in_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    write_cifar10(tmp_path)
    config = DataConfig(name="cifar10", root=str(tmp_path))
    with pytest.raises(InputError, match="cut short or altered"):  # the sums of the fakes are wrong, of course
        load_data(config, 0)
    forget_checksums(monkeypatch, datasets.CIFAR10, "train_list")
    forget_checksums(monkeypatch, datasets.CIFAR10, "test_list")
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    data = load_data(config, 0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [36, 4, 8]
    seen = pixels(data.train)
    assert (seen[:, 0] == 10).all() and (seen[:, 1] == 20).all()
    is_flipped = seen[:, 2, 0, 0] == 40
    assert 0 < int(is_flipped.sum()) < 36
    for split in (data.validation, data.test):
        assert (pixels(split)[:, 2, :, :16] == 30).all() and (pixels(split)[:, 2, :, 16:] == 40).all()


def test_svhn_keeps_its_layout_and_calls_zero_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat  # type: ignore[import-untyped, unused-ignore]
    from torchvision import datasets

    images = np.zeros((32, 32, 3, 20), np.uint8)
    images[:, :, 0], images[:16, :, 2] = 7, 9
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.full((20, 1), 10, np.uint8)})
    lists = {part: [*row[:2], None] for part, row in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    data = load_data(DataConfig(name="svhn", root=str(tmp_path)), 0)
    seen = pixels(data.train)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 20)
    assert (seen[:, 0] == 7).all() and (seen[:, 1] == 0).all()
    assert (seen[:, 2, :16] == 9).all() and (seen[:, 2, 16:] == 0).all()
    assert data.train.labels is not None and (data.train.labels == 0).all()


# --- image files ---


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def write_celeba(root: Path) -> None:
    """Fake CelebA, two images per part: white inside the crop, black outside."""
    folder = root / "celeba"
    image = np.zeros((218, 178, 3), np.uint8)
    image[40:188, 15:163] = 255
    names = [f"{index:06d}.png" for index in range(6)]
    for name in names:
        save(folder / "img_align_celeba" / name, image)
    rows = "\n".join(f"{name} 1" for name in names)
    for file in ("list_attr_celeba.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (folder / file).write_text(f"6\nheader\n{rows}\n")
    (folder / "identity_CelebA.txt").write_text(f"{rows}\n")
    partition = "\n".join(f"{name} {index // 2}" for index, name in enumerate(names))
    (folder / "list_eval_partition.txt").write_text(f"{partition}\n")


def test_celeba_is_cropped_where_the_faces_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    write_celeba(tmp_path)
    rows = [(key, None, file) for key, _, file in datasets.CelebA.file_list]
    monkeypatch.setattr(datasets.CelebA, "file_list", rows)
    config = DataConfig(name="celeba", root=str(tmp_path))
    data = load_data(config, 0)
    assert data.event_shape == (3, 64, 64)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [2, 2, 2]
    assert all((pixels(split) == 255).all() for split in (data.train, data.validation, data.test))
    monkeypatch.setattr(data_module, "_CELEBA_CROP", (slice(39, 187), slice(15, 163)))
    assert not (pixels(load_data(config, 0).test) == 255).all()


class FakeDatabase:
    """As much of an LMDB environment as the reader uses; it is its own transaction and cursor."""

    def __init__(self, entries: dict[bytes, bytes]) -> None:
        self.get, self.entries = entries.get, entries

    def begin(self) -> FakeDatabase:
        return self

    cursor = __enter__ = begin

    def __exit__(self, *_: object) -> None:
        pass

    def iternext(self, keys: bool, values: bool) -> list[bytes]:
        assert keys and not values
        return sorted(self.entries)


def test_lsun_reads_its_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(level: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (80, 70), (level, 0, 0)).save(buffer, "png")
        return buffer.getvalue()

    config = DataConfig(name="lsun-church", root=str(tmp_path), image_size=8)
    databases = {
        str(tmp_path / "church_outdoor_train_lmdb"): {b"%02d" % index: png(index) for index in range(20)},
        str(tmp_path / "church_outdoor_val_lmdb"): {b"a": png(99), b"b": b"broken"},
    }
    fake = types.SimpleNamespace(open=lambda path, **_: FakeDatabase(databases[path]))
    monkeypatch.setitem(sys.modules, "lmdb", fake)
    with pytest.raises(InputError, match="lacks church_outdoor_train_lmdb, .*--data.download cannot fetch them"):
        load_data(config, 0)
    for folder in databases:
        Path(folder).mkdir()
    data = load_data(config, 0)
    assert data.event_shape == (3, 8, 8)
    assert pixels(data.train)[:, 0, 0, 0].tolist() == list(range(18))
    assert pixels(data.validation)[:, 0, 0, 0].tolist() == [18, 19]
    assert (quantized(data.test.batch(torch.tensor([0]), noise()), 256)[0, 0] == 99).all()
    with pytest.raises(InputError, match="image b in .*church_outdoor_val_lmdb cannot be read"):
        data.test.batch(torch.tensor([1]), noise())


def write_folder(root: Path, num: int = 60, channels: int = 3) -> None:
    for index in range(num):
        shape = (6, 6, 3) if channels == 3 else (6, 6)
        save(root / f"class{index % 3}" / f"{index:03d}.png", np.full(shape, index, np.uint8))


def levels_of(data: Data) -> list[list[int]]:
    return [pixels(split)[:, 0, 0, 0].tolist() for split in (data.train, data.validation, data.test)]


def test_image_folder_splits_every_image_once_and_stays_put(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "class0" / "._000.png").write_bytes(b"left by another system")
    config = DataConfig(name="image-folder", root=str(tmp_path))
    data = load_data(config, 0)
    assert (data.event_shape, data.levels) == ((3, 6, 6), 256)
    splits = levels_of(data)
    assert sorted(sum(splits, [])) == list(range(60))
    assert len(splits[0]) > 36 and min(map(len, splits)) >= 1
    assert levels_of(load_data(config, 1)) == splits
    removed = splits[0][0]
    (tmp_path / f"class{removed % 3}" / f"{removed:03d}.png").unlink()
    assert levels_of(load_data(config, 0)) == [splits[0][1:], splits[1], splits[2]]


def test_grey_folder_has_one_channel_and_refuses_a_later_colour(tmp_path: Path) -> None:
    write_folder(tmp_path, num=130, channels=1)
    config = DataConfig(name="image-folder", root=str(tmp_path))
    data = load_data(config, 0)
    assert data.event_shape == (1, 6, 6)
    assert sorted(sum(levels_of(data), [])) == list(range(130))
    odd = sorted(tmp_path.rglob("*.png"))[1]  # every third file is looked at
    save(odd, np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(InputError, match=f"{odd.name} is in colour"):
        levels_of(load_data(config, 0))


def test_images_are_resized_then_cropped_in_the_middle(tmp_path: Path) -> None:
    write_folder(tmp_path, num=30)
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    for file in tmp_path.rglob("*.png"):
        save(file, wide)
    config = DataConfig(name="image-folder", root=str(tmp_path))
    with pytest.raises(InputError, match=r"not all squares of one size, from \(12, 4\).*--data.image-size"):
        load_data(config, 0)
    data = load_data(DataConfig(name="image-folder", root=str(tmp_path), image_size=4), 0)
    assert (pixels(data.train) == 200).all()


def test_folder_without_images_or_with_too_few_is_refused(tmp_path: Path) -> None:
    config = DataConfig(name="image-folder", root=str(tmp_path / "none"))
    with pytest.raises(InputError, match="expected a folder of images at /.*none.*--data.root"):
        load_data(config, 0)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="found no images .* in /.*none.*--data.root"):
        load_data(config, 0)
    write_folder(tmp_path / "none", num=2)
    with pytest.raises(InputError, match="has 2 images, too few"):
        load_data(config, 0)


def test_unreadable_image_is_named_whenever_it_is_met(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config = DataConfig(name="image-folder", root=str(tmp_path))
    data = load_data(config, 0)
    index = pixels(data.train)[5, 0, 0, 0].item()
    victim = tmp_path / f"class{index % 3}" / f"{index:03d}.png"
    victim.write_bytes(victim.read_bytes()[:45])  # the header is whole, the pixels are not
    with pytest.raises(InputError, match=f"{victim.name} cannot be read .*remove or replace"):
        data.train.batch(torch.tensor([5]), noise())
    victim.write_bytes(b"no image at all")
    with pytest.raises(InputError, match=f"{victim.name} cannot be read"):
        load_data(config, 0)


def test_sixteen_bit_images_are_refused_rather_than_cut_to_white(tmp_path: Path) -> None:
    write_folder(tmp_path, num=30)
    for file in tmp_path.rglob("*.png"):
        save(file, np.full((6, 6), 4000, np.uint16))
    data = load_data(DataConfig(name="image-folder", root=str(tmp_path)), 0)
    with pytest.raises(InputError, match="pixels of mode I;16, expected 8 bits"):
        data.train.batch(torch.tensor([0]), noise())


def test_every_name_of_the_configuration_has_a_loader() -> None:
    assert set(get_args(DataName)) == {"gaussians25", *data_module._IMAGE_SETS}


# --- order ---


def epoch_of(sampler: KeyedSampler, epoch: int) -> Tensor:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return torch.cat([sampler.indices(step) for step in steps])


def test_an_epoch_has_every_index_once_and_another_order_each_time() -> None:
    sampler = KeyedSampler(100, 10, seed=0)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(second.sort().values, torch.arange(100))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_of(KeyedSampler(100, 10, seed=1), 0))
    assert torch.equal(first, epoch_of(sampler, 0))  # going back is possible too


def test_a_remainder_is_left_out_of_the_epoch() -> None:
    sampler = KeyedSampler(23, 5, seed=0)
    assert sampler.steps_per_epoch == 4
    assert len(epoch_of(sampler, 0).unique()) == 20
    left_out = {tuple(sorted(set(range(23)) - set(epoch_of(sampler, epoch).tolist()))) for epoch in range(5)}
    assert len(left_out) > 1


@pytest.mark.parametrize("step", [0, 3, 4, 17, 40])
def test_jumping_to_a_step_equals_walking_there(step: int) -> None:
    walker = KeyedSampler(23, 5, seed=0)
    for before in range(step):
        walker.indices(before)
    assert torch.equal(walker.indices(step), KeyedSampler(23, 5, seed=0).indices(step))


def test_ranks_share_the_batch_of_one_process() -> None:
    whole = KeyedSampler(40, 12, seed=0)
    ranks = [KeyedSampler(40, 4, seed=0, rank=rank, world=3) for rank in range(3)]
    for step in (0, 2, 5):
        parts = torch.cat([rank.indices(step) for rank in ranks])
        assert len(parts.unique()) == 12
        assert torch.equal(parts, whole.indices(step))


@pytest.mark.parametrize(("batch_size", "world"), [(11, 1), (6, 2), (0, 1)])
def test_a_step_larger_than_the_split_is_refused(batch_size: int, world: int) -> None:
    with pytest.raises(InputError, match=f"{batch_size} x {world} elements .* the 10 of .*change the batch size"):
        KeyedSampler(10, batch_size, seed=0, world=world)
    assert KeyedSampler(10, 5, seed=0, world=2).steps_per_epoch == 1
