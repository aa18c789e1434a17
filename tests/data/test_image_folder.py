"""A folder of images: decoding, parts, labels, and files that are none."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vaebm.config import DataConfig
from ppl_vaebm.data import image_folder
from ppl_vaebm.data.decoding import ImageForm, decode
from ppl_vaebm.data.load import Data, form_without_files, load_data
from ppl_vaebm.data.splits import IntegerImages, LazyImages
from ppl_vaebm.errors import InputError
from tests.pixels import noise, pixels, quantized, save

# --- decoding ---


def decoded(path: Path, *pixel: int, mode: str, form: ImageForm) -> list[int]:
    """Save one colour and read it back."""
    image = Image.new(mode, (4, 4), pixel[0] if len(pixel) == 1 else pixel)
    image.save(path)
    channels = decode(path, form).flatten(1)
    assert (channels == channels[:, :1]).all()
    return channels[:, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "suffix", "pixel", "grey", "colour"),
    [
        ("L", "png", (77,), [77], [77, 77, 77]),
        ("1", "png", (1,), [255], [255, 255, 255]),
        ("LA", "png", (200, 255), [200], [200, 200, 200]),
        ("LA", "png", (200, 0), [0], [0, 0, 0]),
        ("RGB", "png", (10, 20, 30), None, [10, 20, 30]),
        ("RGBA", "png", (10, 20, 30, 255), None, [10, 20, 30]),
        ("RGBA", "png", (100, 200, 50, 51), None, [20, 40, 10]),  # a fifth opaque, over black
        ("RGBA", "png", (100, 200, 50, 0), None, [0, 0, 0]),
        ("CMYK", "tif", (0, 255, 0, 0), None, [255, 0, 255]),
    ],
)
def test_every_mode_becomes_grey_or_colour(
    mode: str, suffix: str, pixel: tuple[int, ...], grey: list[int] | None, colour: list[int], tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    assert decoded(path, *pixel, mode=mode, form=ImageForm(3, 4)) == colour
    if grey is not None:
        assert decoded(path, *pixel, mode=mode, form=ImageForm(1, 4)) == grey


def test_an_opaque_alpha_channel_changes_no_colour(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    save(tmp_path / "rgb.png", colours)
    save(tmp_path / "rgba.png", np.dstack([colours, np.full((16, 16), 255, np.uint8)]))
    form = ImageForm(3, 16)
    assert torch.equal(decode(tmp_path / "rgba.png", form), decode(tmp_path / "rgb.png", form))
    assert torch.equal(decode(tmp_path / "rgb.png", form), torch.from_numpy(colours).permute(2, 0, 1))


def test_palettes_are_looked_up_and_their_transparent_entry_is_black(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", ImageForm(3, 4))[:, 0, 0].tolist() == [40, 50, 60]
    image.save(tmp_path / "x.png", transparency=1)
    assert decode(tmp_path / "x.png", ImageForm(3, 4))[:, 0, 0].tolist() == [0, 0, 0]


def test_the_middle_square_is_padded_then_resized_then_cut_to_its_bits(tmp_path: Path) -> None:
    wide = np.zeros((4, 13, 3), np.uint8)
    wide[:, 4:8] = 200
    save(tmp_path / "wide.png", wide)
    assert (decode(tmp_path / "wide.png", ImageForm(3, 4)) == 200).all()
    save(tmp_path / "tall.png", wide.transpose(1, 0, 2))
    assert (decode(tmp_path / "tall.png", ImageForm(3, 4, num_bits=3)) == 200 >> 5).all()
    assert (decode(tmp_path / "wide.png", ImageForm(3, 16)) == 200).all()  # enlarged
    framed = decode(tmp_path / "wide.png", ImageForm(3, 8, padding=2))
    assert (framed[:, 2:6, 2:6] == 200).all() and int(framed.sum()) == 200 * 3 * 16
    small = decode(tmp_path / "wide.png", ImageForm(3, 4, padding=2))
    assert small.shape == (3, 4, 4) and 100 < int(small[0, 1, 1]) < 200 and int(small[0, 0, 0]) < 50
    assert decode(tmp_path / "wide.png", ImageForm(3, 4, is_square=False)).shape == (3, 4, 13)


def test_a_long_narrow_strip_is_not_blown_up(tmp_path: Path) -> None:
    save(tmp_path / "x.png", np.full((1, 60_000, 3), 9, np.uint8))
    # Resized before the crop it would have 3 x 256 x 15,360,000 pixels, 12 GB.
    assert (decode(tmp_path / "x.png", ImageForm(3, 256)) == 9).all()


# --- parts ---


def write_folder(root: Path, num: int = 60, channels: int = 3, prefix: str = "class") -> None:
    """Fake images in three folders; image i is 6 x 6 pixels of level i."""
    for index in range(num):
        shape = (6, 6, 3) if channels == 3 else (6, 6)
        save(root / f"{prefix}{index % 3}" / f"{index:03d}.png", np.full(shape, index, np.uint8))


def folder_config(root: Path) -> DataConfig:
    return DataConfig(name="image-folder", root=str(root))


def levels_of(data: Data) -> list[list[int]]:
    return [pixels(split)[:, 0, 0, 0].tolist() for split in (data.train, data.validation, data.test)]


def labels_of(data: Data) -> list[list[int] | None]:
    splits = (data.train, data.validation, data.test)
    return [None if split.labels is None else split.labels.tolist() for split in splits]


@pytest.fixture(params=["cached", "lazy"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Run a test with the folder in memory, and with one that is too large for it."""
    if request.param == "lazy":
        monkeypatch.setattr(image_folder, "MAX_CACHED_BYTES", 0)
    return IntegerImages if request.param == "cached" else LazyImages


def test_every_image_is_in_one_part_and_stays_there(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path)
    (tmp_path / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "class0" / "._000.png").write_bytes(b"left by another system")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "000.png").write_bytes(b"hidden")
    config = folder_config(tmp_path)
    data = load_data(config, 0)
    assert isinstance(data.train, storage) and isinstance(data.test, storage)
    assert (data.event_shape, data.levels, data.is_dequantized) == ((3, 6, 6), 256, True)
    splits = levels_of(data)
    assert sorted(sum(splits, [])) == list(range(60))
    assert len(splits[0]) > 36 and min(map(len, splits)) >= 1
    assert labels_of(data) == [[level % 3 for level in levels] for levels in splits]
    assert levels_of(load_data(config, 1)) == splits
    removed = splits[0][0]
    (tmp_path / f"class{removed % 3}" / f"{removed:03d}.png").unlink()
    assert levels_of(load_data(config, 0)) == [splits[0][1:], splits[1], splits[2]]


def test_the_first_images_of_a_part_are_of_all_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / part)
    for split in (load_data(folder_config(tmp_path), 0).train, load_data(folder_config(tmp_path), 0).test):
        assert split.labels is not None
        assert set(split.labels[:15].tolist()) == {0, 1, 2}  # by path they would all be of class 0
        assert split.labels.tolist() != sorted(split.labels.tolist())


def test_memory_and_files_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    config = replace(folder_config(tmp_path), num_bits=5, flips="random", padding=1)
    cached = load_data(config, 0)
    monkeypatch.setattr(image_folder, "MAX_CACHED_BYTES", 60 * 3 * 8 * 8 - 1)
    lazy = load_data(config, 0)
    assert isinstance(cached.train, IntegerImages) and isinstance(lazy.train, LazyImages)
    assert (cached.event_shape, cached.levels) == (lazy.event_shape, lazy.levels) == ((3, 8, 8), 32)
    indices = torch.arange(len(cached.train))
    assert torch.equal(cached.train.batch(indices, noise()), lazy.train.batch(indices, noise()))
    monkeypatch.setattr(image_folder, "MAX_CACHED_BYTES", 60 * 3 * 8 * 8)
    assert isinstance(load_data(config, 0).train, IntegerImages)


def write_parts(root: Path, *names: str, num: int = 20) -> None:
    """Fake parts; image i of the k-th has level 50 k + i."""
    for part, name in enumerate(names):
        for index in range(num):
            level = 50 * part + index
            save(root / name / "ab"[index % 2] / f"{index:02d}.png", np.full((4, 4, 3), level, np.uint8))


def test_folders_train_and_test_are_the_parts(tmp_path: Path, storage: type) -> None:
    write_parts(tmp_path, "train", "test")
    config = folder_config(tmp_path)
    data = load_data(config, 0)
    assert isinstance(data.train, storage)
    train, validation, test = levels_of(data)
    assert sorted(train + validation) == list(range(20)) and len(validation) == 2
    assert sorted(test) == list(range(50, 70))
    assert labels_of(data) == [[level % 2 for level in levels] for levels in (train, validation, test)]
    more = levels_of(load_data(replace(config, num_validation=7), 0))
    assert set(validation) < set(more[1]) and len(more[1]) == 7
    assert {level % 2 for level in more[1]} == {0, 1}  # not just the first files by name
    assert sorted(more[0] + more[1]) == list(range(20)) and more[2] == test
    with pytest.raises(InputError, match="has 20 training images, expected more than the 20"):
        load_data(replace(config, num_validation=20), 0)


def test_another_file_moves_at_most_one(tmp_path: Path) -> None:
    write_parts(tmp_path, "train", "test", num=29)
    before = set(levels_of(load_data(folder_config(tmp_path), 0))[1])
    save(tmp_path / "train" / "a" / "more.png", np.full((4, 4, 3), 200, np.uint8))
    after = set(levels_of(load_data(folder_config(tmp_path), 0))[1])
    assert (len(before), len(after)) == (2, 3) and before < after


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_folder_for_validation_is_used(name: str, tmp_path: Path) -> None:
    write_parts(tmp_path, "train", name, "test")
    data = load_data(folder_config(tmp_path), 0)
    assert [sorted(levels) for levels in levels_of(data)] == [[50 * k + i for i in range(20)] for k in range(3)]
    with pytest.raises(InputError, match="has a part for validation, so --data.num-validation has no use"):
        load_data(replace(folder_config(tmp_path), num_validation=3), 0)


def test_parts_that_are_incomplete_or_have_others_beside_them_are_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "a", "train", "val")
    with pytest.raises(InputError, match="has parts train, val, expected test as well; add it, or rename"):
        load_data(folder_config(tmp_path / "a"), 0)
    write_parts(tmp_path / "b", "train", "test", "extra", num=3)
    with pytest.raises(InputError, match="parts train and test, and 3 images outside of them, first extra/a/00.png"):
        load_data(folder_config(tmp_path / "b"), 0)
    write_parts(tmp_path / "c", "train", num=5)
    (tmp_path / "c" / "test").mkdir()
    with pytest.raises(InputError, match="found 5, 0 and 0; add more"):
        load_data(folder_config(tmp_path / "c"), 0)
    write_parts(tmp_path / "d", "train", "bus")  # classes, not parts
    assert sorted(sum(levels_of(load_data(folder_config(tmp_path / "d"), 0)), [])) == [*range(20), *range(50, 70)]
    with pytest.raises(InputError, match="is split 80/10/10, so --data.num-validation has no use; leave it out"):
        load_data(replace(folder_config(tmp_path / "d"), num_validation=3), 0)


def test_labels_need_every_image_in_a_folder_of_its_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "flat", prefix="../one")  # three folders beside each other, one image in none
    flat = tmp_path
    assert None not in labels_of(load_data(folder_config(flat), 0))
    save(flat / "stray.png", np.zeros((6, 6, 3), np.uint8))
    assert labels_of(load_data(folder_config(flat), 0)) == [None] * 3
    (flat / "stray.png").unlink()
    save(flat / "one0" / "deeper" / "x.png", np.zeros((6, 6, 3), np.uint8))
    assert labels_of(load_data(folder_config(flat), 0)) == [None] * 3


def test_one_class_is_no_label(tmp_path: Path) -> None:
    for index in range(60):
        save(tmp_path / "all" / f"{index:02d}.png", np.full((4, 4), index, np.uint8))
    assert labels_of(load_data(folder_config(tmp_path), 0)) == [None] * 3


def test_folder_without_images_or_with_too_few_is_refused(tmp_path: Path) -> None:
    config = folder_config(tmp_path / "none")
    with pytest.raises(InputError, match="expected a folder of images at /.*none.*--data.root"):
        load_data(config, 0)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="found no images .* in /.*none.*--data.root"):
        load_data(config, 0)
    write_folder(tmp_path / "none", num=1)
    with pytest.raises(InputError, match="image-folder needs elements .*; add more"):
        load_data(config, 0)


# --- one form ---


def test_grey_folder_has_one_channel_and_one_image_in_colour_makes_it_three(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path, channels=1)
    config = folder_config(tmp_path)
    data = load_data(config, 0)
    assert data.event_shape == (1, 6, 6)
    grey = levels_of(data)
    assert sorted(sum(grey, [])) == list(range(60))
    save(sorted(tmp_path.rglob("*.png"))[31], np.zeros((6, 6, 3), np.uint8))
    mixed = load_data(config, 0)
    assert mixed.event_shape == (3, 6, 6)
    differing = sum(
        a != b for was, now in zip(grey, levels_of(mixed), strict=True) for a, b in zip(was, now, strict=True)
    )
    assert differing == 1
    seen = pixels(mixed.train)
    assert (seen == seen[:, :1]).all()


def test_grey_folder_can_be_binarised_and_one_in_colour_cannot(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path, channels=1)
    config = replace(folder_config(tmp_path), binarize=True)
    data = load_data(config, 0)
    assert isinstance(data.train, storage)
    assert (data.levels, data.is_dequantized) == (2, False)
    assert data.train.batch(torch.arange(20), noise()).unique().tolist() == [-1, 1]
    save(tmp_path / "class0" / "000.png", np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(InputError, match="--data.binarize expects grey images, found some in colour in /"):
        load_data(config, 0)


def test_images_of_other_sizes_need_a_size(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path)
    save(tmp_path / "class0" / "wide.png", np.full((4, 12, 3), 200, np.uint8))
    with pytest.raises(InputError, match=r"not all squares of one size, from \(6, 6\) to \(12, 4\).*--data.image-size"):
        load_data(folder_config(tmp_path), 0)
    data = load_data(replace(folder_config(tmp_path), image_size=5), 0)
    assert data.event_shape == (3, 5, 5)
    assert sorted(sum(levels_of(data), [])) == [*range(60), 200]


@pytest.mark.parametrize(
    ("flips", "is_flipping"), [("auto", (False, True)), ("never", (False, False)), ("random", (True, True))]
)
def test_faces_are_mirrored_and_other_pictures_are_not_unless_asked_for(
    flips: Literal["auto", "random", "never"], is_flipping: tuple[bool, bool], tmp_path: Path
) -> None:
    image = np.zeros((6, 6, 3), np.uint8)
    image[:, :3] = 200
    for index in range(60):
        save(tmp_path / f"{index:02d}.png", image)
    config = replace(folder_config(tmp_path), flips=flips)
    faces = replace(config, name="celeba-hq", image_size=6)
    for options, expected in zip((config, faces), is_flipping, strict=True):
        data = load_data(options, 0)
        is_flipped = pixels(data.train)[:, 0, 0, 0] == 0
        assert (0 < int(is_flipped.sum()) < len(data.train)) is expected
        assert all((pixels(split)[:, 0, 0, 0] == 200).all() for split in (data.validation, data.test))


def test_celeba_hq_is_256_pixels_of_colour(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for index in range(10):
            save(tmp_path / part / f"{index}.png", np.full((6, 6), index, np.uint8))
    config = DataConfig(name="celeba-hq", root=str(tmp_path), num_bits=5)
    data = load_data(config, 0)
    assert form_without_files(config) == (data.event_shape, data.levels, data.is_dequantized)
    assert (data.event_shape, data.levels, data.name) == ((3, 256, 256), 32, "celeba-hq")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [9, 1, 10]


# --- files that are no images ---


def write_bad(root: Path) -> list[str]:
    """Spoil five files in five ways: no bytes, no image, cut short, a link in a circle, and a bomb."""
    names = [f"class0/{index:03d}.png" for index in (0, 3, 6, 9, 12)]
    empty, junk, cut, link, bomb = (root / name for name in names)
    empty.write_bytes(b"")
    junk.write_bytes(b"no image at all")
    cut.write_bytes(cut.read_bytes()[:45])  # the header is whole, the pixels are not
    link.unlink()
    link.symlink_to(link)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    )
    return names


def test_bad_files_are_counted_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    names = write_bad(tmp_path)
    with pytest.raises(
        InputError, match=r"^5 of the 60 images in /.* cannot be read: .*; remove or replace them, or"
    ) as e:
        load_data(folder_config(tmp_path), 0)
    message = str(e.value)
    assert all(name in message for name in names) and "\n" not in message
    assert "--data.skip-unreadable" in message and "decompression bomb" in message
    for index in (1, 4):
        (tmp_path / f"class1/{index:03d}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"^7 of the 60 .* and 2 more; remove"):
        load_data(folder_config(tmp_path), 0)


def test_bad_files_are_left_out_only_if_asked_for(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path)
    whole = levels_of(load_data(folder_config(tmp_path), 0))
    names = write_bad(tmp_path)
    data = load_data(replace(folder_config(tmp_path), skip_unreadable=True), 0)
    assert isinstance(data.train, storage)
    assert data.skipped == tuple(names)
    assert levels_of(data) == [[level for level in part if level not in (0, 3, 6, 9, 12)] for part in whole]
    assert labels_of(data) == [[level % 3 for level in part] for part in levels_of(data)]


def test_nothing_is_skipped_where_nothing_is_bad(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path)
    assert load_data(replace(folder_config(tmp_path), skip_unreadable=True), 0).skipped == ()


@pytest.mark.parametrize("content", [b"", "cut"])
def test_a_folder_of_nothing_but_bad_files_is_refused_even_then(content: bytes | str, tmp_path: Path) -> None:
    write_folder(tmp_path, num=3)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:45] if content == "cut" else b"")
    with pytest.raises(InputError, match=r"^3 of the 3 images .*; remove or replace them$"):
        load_data(replace(folder_config(tmp_path), skip_unreadable=True), 0)


def test_a_large_folder_names_bad_headers_at_once_and_bad_pixels_when_they_are_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "MAX_CACHED_BYTES", 0)
    write_folder(tmp_path)
    data = load_data(folder_config(tmp_path), 0)
    index = int(pixels(data.train)[5, 0, 0, 0])
    victim = tmp_path / f"class{index % 3}" / f"{index:03d}.png"
    victim.write_bytes(victim.read_bytes()[:45])
    with pytest.raises(InputError, match=f"{victim.name} cannot be read .*remove or replace"):
        load_data(folder_config(tmp_path), 0).train.batch(torch.tensor([5]), noise())
    victim.write_bytes(b"no image at all")
    with pytest.raises(InputError, match=f"1 of the 60 .*{victim.name}"):
        load_data(folder_config(tmp_path), 0)


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_more_than_eight_bits_are_refused_rather_than_cut_to_white(
    dtype: type, mode: str, tmp_path: Path, storage: type
) -> None:
    write_folder(tmp_path, num=30, channels=1)
    save(tmp_path / "class0" / "deep.tif", np.full((6, 6), 4000, dtype))
    for skip in (False, True):
        with pytest.raises(InputError, match=rf"deep.tif has pixels of mode {mode}, expected .* 8 bits per channel"):
            load_data(replace(folder_config(tmp_path), skip_unreadable=skip), 0)


def test_names_that_are_no_files_are_told_apart(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "class1").rename(tmp_path / "class1.png")  # a folder, whatever its name says
    assert len(sum(levels_of(load_data(folder_config(tmp_path), 0)), [])) == 60
    os.mkfifo(tmp_path / "class0" / "pipe.png")  # opening it would wait for ever
    (tmp_path / "class0" / "broken.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"^2 of the 62 .*broken.png \(not a file.*pipe.png \(not a file"):
        load_data(folder_config(tmp_path), 0)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    write_folder(elsewhere)
    root.mkdir()
    for index in range(3):
        (root / f"class{index}").symlink_to(elsewhere / f"class{index}")
    save(tmp_path / "outside.png", np.zeros((6, 6, 3), np.uint8))
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root)
    (elsewhere / "class0" / "back").symlink_to(elsewhere / "class0")
    data = load_data(folder_config(root), 0)
    assert sorted(sum(levels_of(data), [])) == list(range(60))
    assert labels_of(data) == [[level % 3 for level in part] for part in levels_of(data)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything (2026-11-24)")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "class0" / "000.png").chmod(0)
    with pytest.raises(InputError, match=r"1 of the 60 .*class0/000.png .*Permission denied"):
        load_data(folder_config(tmp_path), 0)
    (tmp_path / "class1").chmod(0)
    with pytest.raises(InputError, match=r"the folder /.*class1 cannot be read \(Permission denied\)"):
        load_data(folder_config(tmp_path), 0)
    (tmp_path / "class1").chmod(0o700)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("class1"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"the folder /.*class1 cannot be read \(Permission denied\); change its"):
        load_data(folder_config(tmp_path), 0)


def test_one_image_of_a_batch_comes_from_its_file(tmp_path: Path, storage: type) -> None:
    write_folder(tmp_path)
    data = load_data(folder_config(tmp_path), 0)
    all_levels = levels_of(data)[0]
    batch = quantized(data.train.batch(torch.tensor([4, 1]), noise()), 256)
    assert batch[:, 0, 0, 0].tolist() == [all_levels[4], all_levels[1]]
