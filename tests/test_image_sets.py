"""Image sets from files, every one a small fake."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vaebm import image_sets
from ppl_vaebm.config import DataConfig, DataName
from ppl_vaebm.data import Data, load_data
from ppl_vaebm.errors import InputError
from tests.pixels import noise, pixels, quantized

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
