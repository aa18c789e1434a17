from __future__ import annotations

import os
from pathlib import Path

import pytest

from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic


def test_write_atomic_replaces_the_content_and_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "längst\n")
    assert path.read_bytes() == b"l\xc3\xa4ngst\n"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_that_fails_leaves_the_old_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.txt": "old"}


def test_write_atomic_syncs_the_content_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(("replace", source.stat().st_ino))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "a.txt", "new")
    file, folder = (tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file), ("fsync", folder)]


@pytest.mark.parametrize("name", ["file/a.txt", "file/b/a.txt"])
def test_write_atomic_refuses_a_file_in_place_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="^expected a folder at .*, found a file; move it away$"):
        write_atomic(tmp_path / name, "new")
    assert (tmp_path / "file").read_text() == "kept"


def test_write_atomic_refuses_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match="^expected a file or nothing at .*, found a folder; move it away$"):
        write_atomic(tmp_path / "a.txt", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
