"""Write files so that a crash leaves either the old content or the new, never a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppl_vaebm.errors import InputError

TEMPORARY_PREFIX = ".tmp-"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a synced file or folder within its folder, and wait until the new name is on the disk.

    A file at the new name is replaced; a folder must not be there.
    """
    os.replace(source, target)
    sync(target.parent)


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file in an existing folder, text as UTF-8, and wait until its content is on the disk."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file to write, which replaces ``path`` in one step after the block.

    Readers see the old content or the new one; after a failure the old content is still there.
    """
    # The process is part of the name so that two writers of one file cannot mix their bytes.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write or replace a file in one step, text as UTF-8; missing parent folders are made.

    Raises:
        InputError: a file is where a folder belongs, or a folder where the file belongs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"expected a folder at {path.parent}, found a file; move it away") from None
    except IsADirectoryError:
        raise InputError(f"expected a file or nothing at {path}, found a folder; move it away") from None
