"""Image sets from files, every one a small fake."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vaebm.config import DataConfig, DataName
from ppl_vaebm.data import archives as image_sets
from ppl_vaebm.data.load import form_without_files, load_data
from ppl_vaebm.data.splits import without_augmentation
from ppl_vaebm.errors import InputError
from tests.pixels import noise, pixels, quantized, save

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


def test_images_sorted_by_class_are_mixed_before_they_are_divided(tmp_path: Path) -> None:
    write_mnist(tmp_path, num=200)
    file = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(file, np.repeat(np.arange(10, dtype=np.uint8), 20))
    data = load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)
    assert data.validation.labels is not None and data.train.labels is not None
    assert len(data.validation.labels.unique()) > 3  # the last tenth as it lies has one class
    assert len(data.train.labels.unique()) == 10
    # Images that are mixed already keep their order: the last tenth validates.
    write_idx(file, np.concatenate([np.arange(10, 0, -1), np.zeros(170), np.full(20, 7)]).astype(np.uint8))
    last = load_data(DataConfig(name="mnist", root=str(tmp_path)), 0).validation.labels
    assert last is not None and last.tolist() == [7] * 20


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


def parts_of(config: DataConfig) -> list[int]:
    data = load_data(config, 0)
    return [len(split) for split in (data.train, data.validation, data.test)]


def test_the_number_of_validation_images_can_be_said(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    config = DataConfig(name="mnist", root=str(tmp_path))
    assert parts_of(config) == [18, 2, 10]
    assert parts_of(replace(config, num_validation=5)) == [15, 5, 10]
    validation = load_data(replace(config, num_validation=5), 0).validation
    assert validation.labels is not None and validation.labels.tolist() == [5, 6, 7, 8, 9]  # the last ones
    assert parts_of(replace(config, num_validation=19)) == [1, 19, 10]
    with pytest.raises(InputError, match="mnist has 20 training images, expected more than the 20 that"):
        load_data(replace(config, num_validation=20), 0)
    assert parts_of(replace(config, name="stacked-mnist", num_validation=3)) == [17, 3, 10]


def test_too_few_images_for_three_parts_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, num=9)
    with pytest.raises(InputError, match="mnist needs elements for training, validation and test, found 9, 0 and 4"):
        load_data(DataConfig(name="mnist", root=str(tmp_path)), 0)
    assert parts_of(DataConfig(name="mnist", root=str(tmp_path), num_validation=1)) == [8, 1, 4]


@pytest.mark.parametrize(("padding", "side"), [(None, 32), (0, 28), (3, 34)])
@pytest.mark.parametrize("name", ["mnist", "stacked-mnist"])
def test_padding_is_the_sets_own_or_what_is_asked_for(
    name: DataName, padding: int | None, side: int, tmp_path: Path
) -> None:
    write_mnist(tmp_path)
    config = DataConfig(name=name, root=str(tmp_path), padding=padding)
    data = load_data(config, 0)
    seen = pixels(data.test)
    assert data.event_shape == seen.shape[1:] == (3 if name == "stacked-mnist" else 1, side, side)
    assert (seen > 0).sum((-2, -1)).unique().tolist() == [28 * 28]  # every pixel of the fakes is at least 5


def test_bits_are_dropped_from_below(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = load_data(DataConfig(name="mnist", root=str(tmp_path), num_bits=5), 0)
    assert (data.levels, data.is_dequantized) == (32, True)
    seen = pixels(data.validation, 32)[:, 0, 16, 16]
    assert seen.tolist() == [85 >> 3, 95 >> 3] == [10, 11]
    # Uniform noise fills each of the 32 levels, so that no value lies outside of [-1, 1).
    y = data.train.batch(torch.arange(18), noise())
    assert float(y.min()) < -1 + 0.9 / 16 and (y.unique().numel() > 10_000)
    stacked = load_data(DataConfig(name="stacked-mnist", root=str(tmp_path), num_bits=1), 0)
    assert stacked.levels == 2 and stacked.is_dequantized
    assert (pixels(stacked.test, 2) == 0).all()  # no fake is as bright as 128


def test_binarised_digits_are_drawn_anew_with_the_right_odds(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = load_data(DataConfig(name="mnist", root=str(tmp_path), binarize=True, padding=0), 0)
    assert (data.levels, data.is_dequantized, data.event_shape) == (2, False, (1, 28, 28))
    for split in (data.train, data.validation, data.test):
        assert split.batch(torch.arange(2), noise()).unique().tolist() == [-1, 1]
    generator = noise()
    once, again = (data.train.batch(torch.arange(18), generator) for _ in range(2))
    assert not torch.equal(once, again)
    assert torch.equal(once, data.train.batch(torch.arange(18), noise()))
    share = (once > 0).double().mean((1, 2, 3))
    assert data.train.labels is not None
    odds = (10 * data.train.labels + 5).double() / 255
    assert ((share - odds).abs() < 5 * (odds * (1 - odds) / 28**2).sqrt()).all()


@pytest.mark.parametrize("options", [{}, {"padding": 1, "num_bits": 3}, {"image_size": 16}, {"flips": "random"}])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "stacked-mnist"])
def test_form_is_known_before_the_files_are(name: DataName, options: dict[str, Any], tmp_path: Path) -> None:
    config = DataConfig(name=name, root=str(tmp_path), **options)
    form = form_without_files(config)
    write_mnist(tmp_path, "FashionMNIST" if name == "fashion-mnist" else "MNIST")
    data = load_data(config, 0)
    assert form == (data.event_shape, data.levels, data.is_dequantized)
    assert data.train.batch(torch.arange(2), noise()).shape[1:] == data.event_shape


def test_digits_are_mirrored_only_if_asked_for(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    images = np.zeros((20, 28, 28), np.uint8)
    images[:, :, :14] = 200
    write_idx(raw, images)
    for flips, is_flipping in (("auto", False), ("never", False), ("random", True)):
        data = load_data(DataConfig(name="mnist", root=str(tmp_path), flips=flips), 0)  # type: ignore[arg-type]
        is_flipped = pixels(data.train)[:, 0, 16, 4] == 0
        assert (0 < int(is_flipped.sum()) < 18) is is_flipping
        assert (pixels(data.validation)[:, 0, 16, 4] == 200).all()


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
    with pytest.raises(InputError, match=r"lsun-church needs the package lmdb; .*pip install -e '\.\[data\]'"):
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
    assert form_without_files(config) == (data.event_shape, data.levels, data.is_dequantized)
    never = load_data(replace(config, flips="never"), 0)
    assert (pixels(never.train)[:, 2, :, :16] == 30).all()


def test_svhn_keeps_its_layout_and_calls_zero_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
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
    assert form_without_files(DataConfig(name="svhn")) == (data.event_shape, data.levels, data.is_dequantized)
    assert (seen[:, 0] == 7).all() and (seen[:, 1] == 0).all()
    assert (seen[:, 2, :16] == 9).all() and (seen[:, 2, 16:] == 0).all()
    assert data.train.labels is not None and (data.train.labels == 0).all()


# --- image files ---


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
    assert form_without_files(config) == (data.event_shape, data.levels, data.is_dequantized)
    small = replace(config, image_size=16, num_bits=5, padding=10)
    data = load_data(small, 0)
    assert form_without_files(small) == (data.event_shape, data.levels, data.is_dequantized) == ((3, 16, 16), 32, True)
    seen = pixels(data.test, 32)
    assert (seen[:, :, 4:12, 4:12] == 31).all() and (seen[:, :, 0, 0] < 31).all()  # 10 of 168 pixels are the frame
    monkeypatch.setattr(image_sets, "_CELEBA_CROP", (slice(39, 187), slice(15, 163)))
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


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def fake_lsun(
    root: Path, monkeypatch: pytest.MonkeyPatch, train: dict[bytes, bytes], test: dict[bytes, bytes]
) -> list[Path]:
    """Put databases behind the two folders, which are not made."""
    folders = [root / f"church_outdoor_{part}_lmdb" for part in ("train", "val")]
    databases = dict(zip(map(str, folders), (train, test), strict=True))
    monkeypatch.setitem(
        sys.modules, "lmdb", types.SimpleNamespace(open=lambda path, **_: FakeDatabase(databases[path]))
    )
    return folders


def test_lsun_reads_its_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(name="lsun-church", root=str(tmp_path), image_size=8)
    train = {b"%02d" % index: png(Image.new("RGB", (80, 70), (index, 0, 0))) for index in range(20)}
    test = {b"a": png(Image.new("RGB", (80, 70), (99, 0, 0))), b"b": b"broken"}
    folders = fake_lsun(tmp_path, monkeypatch, train, test)
    with pytest.raises(InputError, match="lacks church_outdoor_train_lmdb, .*--data.download cannot fetch them"):
        load_data(config, 0)
    for folder in folders:
        folder.mkdir()
    data = load_data(config, 0)
    assert form_without_files(config) == (data.event_shape, data.levels, data.is_dequantized) == ((3, 8, 8), 256, True)
    assert pixels(data.train)[:, 0, 0, 0].tolist() == list(range(18))
    assert pixels(data.validation)[:, 0, 0, 0].tolist() == [18, 19]
    assert (quantized(data.test.batch(torch.tensor([0]), noise()), 256)[0, 0] == 99).all()
    with pytest.raises(InputError, match="image b in .*church_outdoor_val_lmdb cannot be read"):
        data.test.batch(torch.tensor([1]), noise())
    assert parts_of(replace(config, num_validation=5)) == [15, 5, 2]


def test_lsun_is_cropped_anywhere_in_training_and_in_the_middle_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Columns count up from left to right, so the first one tells where the crop begins.
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8)[None, :, None], (8, 1, 3)))
    same = {b"%03d" % index: png(ramp) for index in range(200)}
    for folder in fake_lsun(tmp_path, monkeypatch, same, same):
        folder.mkdir()
    data = load_data(DataConfig(name="lsun-church", root=str(tmp_path), image_size=8, flips="never"), 0)
    for split in (data.validation, data.test):
        assert (pixels(split)[:, :, :, 0] == 4).all() and (pixels(split)[:, :, :, 7] == 11).all()
    seen = pixels(data.train)
    starts = seen[:, 0, 0, 0]
    assert starts.unique().tolist() == list(range(9))  # 180 draws miss one of 9 with probability 6e-9
    assert (seen == starts[:, None, None, None] + torch.arange(8)).all()
    assert torch.equal(pixels(data.train), seen)  # a function of its generator


def test_lsun_without_augmentation_is_read_as_held_out_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the pixel, through the resize: a square that is cut out after it would be another."""
    rng = np.random.default_rng(0)
    same = {
        b"%03d" % index: png(Image.fromarray(rng.integers(256, size=(20, 37, 3), dtype=np.uint8)))
        for index in range(40)
    }
    for folder in fake_lsun(tmp_path, monkeypatch, same, same):
        folder.mkdir()
    data = load_data(DataConfig(name="lsun-church", root=str(tmp_path), image_size=8), 0)
    held_out = pixels(data.test)[: len(data.train)]
    assert torch.equal(pixels(without_augmentation(data.train)), held_out)
    assert not torch.equal(pixels(data.train), held_out)
    assert without_augmentation(data.test) is data.test
