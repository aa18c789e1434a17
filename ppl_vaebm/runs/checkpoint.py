"""Checkpoints: written atomically, checked before use, and without a pickle that could run code.

A checkpoint is a folder ``step-00001000`` with ``weights.safetensors`` (named sets of weights, flattened to
"set/param"), ``state.pt`` (plain types and tensors, read with ``weights_only=True``) and ``manifest.json``.
It gets its name when all of it is on the disk. One process writes; any may read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ppl_vaebm import __version__
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import TEMPORARY_PREFIX, replace, sync, write_synced

# Raised by one when checkpoints of the version before can no longer be read.
SCHEMA = 2

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"

MANIFEST_TYPES = {"stage": str, "step": int, "score": float | None, "sets": list, "sha256": dict, "config": dict}

# A checkpoint that is being replaced waits under this name until the new one has taken its place.
REPLACED_PREFIX = ".old-"

ALLOWED_IN_STATE = "only dict with str or int keys, list, tuple, str, number, bool, None and Tensor"

# Whose versions the manifest records, beside Python's and this package's.
RECORDED_LIBRARIES = ("torch", "pyro-ppl", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint; every tensor is contiguous and on the CPU."""

    path: Path
    stage: str
    step: int
    """Updates before it."""
    score: float | None
    """Higher is better; ``None`` if not evaluated."""
    weights: dict[str, dict[str, Tensor]]
    """Named sets of named weights."""
    state: dict[str | int, Any]
    """All else that resuming needs: plain types and tensors."""
    config: dict[str, Any]
    """The resolved configuration as JSON, where tuples are lists."""


def save(
    folder: Path,
    *,
    stage: str,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: dict[Any, Any],
    config: dict[str, Any],
    score: float | None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint atomically, delete those that are no longer needed, and return its folder.

    The last ``keep`` readable checkpoints, the best and the new one stay. The same content gives the same bytes, as
    long as the dictionaries of the state have the same order.

    Args:
        folder: of the checkpoints of this stage; made if missing.
        stage: name of the stage, svi or ebm or a part of one.
        step: updates done, at least 0; a checkpoint of the same step is replaced.
        weights: named sets ("model", "ema") of named weights; the name of a set has no "/".
        state: plain types and tensors, :data:`ALLOWED_IN_STATE`.
        config: the resolved configuration, as JSON can hold it.
        score: higher is better, finite; ``None`` if not evaluated.
        keep: how many of the last checkpoints to keep, at least 1.

    Raises:
        TypeError: the state holds something else; the message names where.
        ValueError: ``step``, ``keep``, ``score`` or the name of a set is out of range.
    """
    if step < 0 or keep < 1 or not (score is None or math.isfinite(score)):
        raise ValueError(f"expected step >= 0, keep >= 1 and a finite score or none, got {step}, {keep}, {score}")
    contents = {WEIGHTS_FILE: _weights_bytes(weights), STATE_FILE: _state_bytes(state)}
    manifest = {
        "schema": SCHEMA,
        "stage": stage,
        "step": step,
        "score": None if score is None else float(score),
        "sets": sorted(weights),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "config": config,
        "versions": {"python": platform.python_version(), "ppl_vaebm": __version__}
        | {name: metadata.version(name) for name in RECORDED_LIBRARIES},
    }
    contents[MANIFEST_FILE] = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()

    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    path = folder / _name(step)
    temporary = folder / (TEMPORARY_PREFIX + path.name)
    temporary.mkdir()
    for name, data in contents.items():
        write_synced(temporary / name, data)
    sync(temporary)
    _put(temporary, path)
    _prune(folder, keep, step)
    return path


def load(folder: Path, which: Literal["last", "best"] | int = "last") -> Checkpoint:
    """Read a checkpoint and check that it is complete. Nothing is written or deleted.

    ``which`` is the last, the best (highest score, of equals the later; the last if none has a score) or a step.

    Raises:
        InputError: no such checkpoint, or it has another schema, is damaged, or holds a pickle that could run code.
    """
    path = _path(folder, _choose(folder, which))
    manifest = _read_manifest(path)
    try:
        flat = safetensors.torch.load(_checked_bytes(path / WEIGHTS_FILE, manifest))
    except SafetensorError as error:
        raise _damaged(path / WEIGHTS_FILE, "in the safetensors format", str(error)) from None
    # An empty set has no flat names, so the manifest names the sets.
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in manifest["sets"]}
    for key in sorted(flat):
        name, _, parameter = key.partition("/")
        weights[name][parameter] = flat[key]
    archive = io.BytesIO(_checked_bytes(path / STATE_FILE, manifest))
    try:
        state = torch.load(archive, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        kind = "another format, or a pickle that could run code"
        raise _damaged(path / STATE_FILE, "an archive of plain types and tensors", kind) from None
    return Checkpoint(
        path, weights=weights, state=state, **{name: manifest[name] for name in ("stage", "step", "score", "config")}
    )


def available(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, ascending; the folder need not exist."""
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix(REPLACED_PREFIX) for path in folder.iterdir()]
    return sorted({int(match[1]) for match in (re.fullmatch(r"step-(\d{8,})", name) for name in names) if match})


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of steps after ``step``, the last first."""
    for other in reversed(available(folder)):
        if other > step:
            _delete(folder, other)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _path(folder: Path, step: int) -> Path:
    path = folder / _name(step)
    # A crash between the two renames of _put leaves only the old one.
    replaced = folder / (REPLACED_PREFIX + path.name)
    return replaced if replaced.exists() and not path.exists() else path


def _put(temporary: Path, path: Path) -> None:
    replaced = path.with_name(REPLACED_PREFIX + path.name)
    if path.exists():
        replace(path, replaced)
    replace(temporary, path)
    if replaced.exists():
        shutil.rmtree(replaced)


def _tidy(folder: Path) -> None:
    """Remove the remains of a crash."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path)
    for path in folder.glob(f"{REPLACED_PREFIX}*"):
        target = folder / path.name.removeprefix(REPLACED_PREFIX)
        if target.exists():
            shutil.rmtree(path)
        else:
            replace(path, target)


def _prune(folder: Path, keep: int, step: int) -> None:
    """Delete all but the last ``keep``, the best and ``step``; unreadable ones do not count and stay."""
    scores: dict[int, float | None] = {}
    for other in available(folder):
        try:
            scores[other] = _read_manifest(_path(folder, other))["score"]
        except InputError:
            continue
    kept = {step, _best(scores), *sorted(scores)[-keep:]}
    for other in sorted(set(scores) - kept):
        _delete(folder, other)


def _delete(folder: Path, step: int) -> None:
    path = _path(folder, step)
    # Renamed first: a crash during the deletion must not leave half a checkpoint under a valid name.
    doomed = folder / (TEMPORARY_PREFIX + path.name)
    replace(path, doomed)
    shutil.rmtree(doomed)


def _best(scores: Mapping[int, float | None]) -> int:
    """Return the step with the highest score, of equals the later; the last if none has a score."""
    return max(scores, key=lambda step: (-math.inf if scores[step] is None else scores[step], step))


def _choose(folder: Path, which: Literal["last", "best"] | int) -> int:
    steps = available(folder)
    if not steps:
        raise InputError(f"expected a checkpoint in {folder}, found none; train that stage first")
    if which == "last":
        return steps[-1]
    if which == "best":
        return _best({step: _read_manifest(_path(folder, step))["score"] for step in steps})
    if which not in steps:
        raise InputError(f"expected a checkpoint of step {which} in {folder}, found {steps}; choose one of these")
    return which


def _weights_bytes(weights: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    if any("/" in name for name in weights):
        raise ValueError(f"expected names of sets of weights without '/', got {list(weights)}")
    flat = {f"{name}/{parameter}": tensor for name, params in weights.items() for parameter, tensor in params.items()}
    # Without metadata the bytes depend on the sorted tensors alone.
    return safetensors.torch.save({key: _own(flat[key]) for key in sorted(flat)})


def _state_bytes(state: dict[Any, Any]) -> bytes:
    # Saving to a path would write the file's name into the archive.
    buffer = io.BytesIO()
    torch.save(_plain(state, "state"), buffer)
    return buffer.getvalue()


def _own(tensor: Tensor) -> Tensor:
    """Copy a tensor: safetensors refuses shared storage, and torch stores all of it for a view."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _plain(value: Any, where: str) -> Any:
    """Copy a state, and refuse types that ``weights_only=True`` would not read back.

    Pickle writes the second occurrence of an object as a reference; new containers and interned strings make the bytes
    depend on content alone.
    """
    if value is None or type(value) in (bool, int, float, complex):
        return value
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, Tensor):
        return _own(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"expected {ALLOWED_IN_STATE} in a checkpoint, found {kind} at {where}")


def _key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"expected {ALLOWED_IN_STATE} in a checkpoint, found the key {key!r} in {where}")
    return sys.intern(key) if isinstance(key, str) else key


def _damaged(path: Path, expected: str, found: str) -> InputError:
    return InputError(
        f"expected {path} to be {expected}, found {found}; "
        f"delete the folder {path.parent} to continue from the checkpoint before it"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, "readable", str(error.strerror)) from None


def _checked_bytes(path: Path, manifest: dict[str, Any]) -> bytes:
    # Read once, so that the checked bytes are those that are used.
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    expected = manifest["sha256"].get(path.name)
    if digest != expected:
        raise _damaged(path, f"whole (sha256 {expected})", f"{len(data)} bytes with sha256 {digest}")
    return data


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, or raise :class:`InputError`."""
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(_read(file))
    except ValueError:
        raise _damaged(file, "JSON", "something else") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise _damaged(file, "the manifest of a checkpoint", "no schema number in it")
    if manifest["schema"] != SCHEMA:
        raise InputError(
            f"expected {file} to have schema {SCHEMA}, found {manifest['schema']!r}; read it with the version of "
            f"ppl_vaebm that wrote it, or delete the folder {path} to continue from the checkpoint before it"
        )
    is_complete = all(isinstance(manifest.get(name), kind) for name, kind in MANIFEST_TYPES.items())
    if not is_complete or _name(manifest["step"]) != path.name.removeprefix(REPLACED_PREFIX):
        raise _damaged(file, f"the complete manifest of {path.name}", "a missing or wrong entry")
    return manifest
