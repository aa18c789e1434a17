"""Writing files so that a crash leaves either the old content or the new, never half of it."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Args:
        path: an existing file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename, and wait until the new name is on the disk.

    Args:
        source: a file or folder, already synced.
        target: its new name in the same folder; a file there is replaced, a folder must not be there.
    """
    os.replace(source, target)
    sync(target.parent)


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file and wait until its content is on the disk.

    Args:
        path: the file; its folder exists.
        data: its whole content; text becomes UTF-8.
    """
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    sync(path)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write or replace a file in one step.

    Readers see the old content or the new; after a failure the old content is still there. Missing
    parent folders are made.

    Args:
        path: the file.
        data: its whole content; text becomes UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process is part of the name so that two writers of one file cannot mix their bytes.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, data)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
