"""The folder of a run: paths of its files, and the record of metrics."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from ppl_vaebm.errors import InputError, did_you_mean
from ppl_vaebm.files import write_atomic

# JSON cannot hold these numbers; the record holds these strings.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
FEATURES_FILE = "features.safetensors"
RECONSTRUCTIONS, PRIOR, TRAVERSAL, GROUP_KL = "svi_reconstructions", "svi_prior", "svi_traversal", "svi_group_kl"
"""Files of the samples folder that show stage 1."""


class Mirror(Protocol):
    """A copy of the record of metrics."""

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Add a record that has been written to the file."""

    def rewind(self, stage: str, step: int) -> None:
        """Remove a stage's records after a step, as :meth:`Run.rewind_metrics`."""


class _In:
    """A path inside a run's folder, as an attribute of the run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, _: type[Run]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class Run:
    """The files of one run; every command takes this folder."""

    path: Path
    mirror: Mirror | None = field(default=None, compare=False, repr=False)
    """Receives every change of the record of metrics after it is in the file."""

    @staticmethod
    def open(path: Path | str) -> Run:
        """Open the folder of an existing run.

        Raises:
            InputError: the folder does not exist, or holds no configuration.
        """
        run = Run(Path(path))
        if not run.config_file.is_file():
            found = "a folder without one" if run.path.is_dir() else "a file" if run.path.exists() else "nothing"
            command = f"python -m ppl_vaebm.fit --stage svi --run {shlex.quote(str(path))}"
            siblings = [str(file.parent) for file in run.path.parent.glob(f"*/{run.config_file.name}")]
            raise InputError(
                f"expected a run, that is a folder with {run.config_file.name}, at {path}, found {found}; "
                f"make one with: {command}{did_you_mean(str(path), siblings)}"
            )
        return run

    @staticmethod
    def create(path: Path | str) -> Run:
        """Make the folder of a run, and missing parents; an existing folder is not changed.

        Raises:
            InputError: the path is a file, or nothing can be written there.
        """
        run = Run(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"expected a folder for the run at {path}, found a file; name another folder") from None
        except OSError as error:
            raise InputError(
                f"expected to make the folder {path} for the run, found: {error.strerror}; name another folder"
            ) from None
        if not os.access(run.path, os.W_OK | os.X_OK):
            raise InputError(
                f"expected a folder for the run that can be written to, found that {path} cannot; "
                "change its permissions or name another folder"
            )
        return run

    config_file = _In("config.yaml")
    """The resolved configuration."""
    metrics_file = _In("metrics.jsonl")
    """The record of metrics, one JSON object a line."""
    samples_dir = _In("samples")
    """Samples, as arrays and images."""
    chains_file = _In("chains.nc")
    """The chains of ``diagnose``, in ArviZ's format."""
    positions_file = _In("positions.nc")
    """Positions and diagnostics of every coordinate, of ``diagnose --all-coordinates``."""
    tensorboard_dir = _In("tensorboard")
    """Event files for TensorBoard, a folder for each stage."""
    report_file = _In("report.html")
    """The report, one HTML file."""
    evaluation_file = _In("evaluate.json")
    """The numbers of ``evaluate``."""
    features_file = _In(FEATURES_FILE)
    """The weights of the classifier of the data that ``evaluate`` takes features from."""
    comparison_file = _In("compare.csv")
    """The table of ``compare``, one line a kernel."""
    comparison_dir = _In("compare")
    """The chains of every kernel and seed of ``compare``, and its page."""
    comparison_page = _In("compare/compare.html")
    """The pictures of ``compare``, one HTML file."""

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Append one record of metrics, after cutting off a line that a killed process left unfinished.

        Args:
            record: names to values; ``stage`` and ``step`` let :meth:`metrics` and :meth:`rewind_metrics` find it.
                The strings "nan", "inf" and "-inf" stand for those numbers and are read back as such.
        """
        values = {name: to_json(value) for name, value in record.items()}
        line = json.dumps(values, allow_nan=False) + "\n"
        with self.metrics_file.open("a+b") as file:
            _cut_torn_line(file)
            file.write(line.encode())
        if self.mirror is not None:
            self.mirror.log(record)

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Read the records of a stage, or all, in the order of logging; InputError for a line that is no JSON object.

        A last line without its line break, left by a killed process, is ignored.
        """
        return [record for _, record in self._lines() if stage is None or record.get("stage") == stage]

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Remove a stage's records after a step, so that resuming from there leaves no duplicates.

        Records without a ``step`` stay. InputError for a line that is no JSON object; the file is left as it is.
        """
        kept = [
            line + b"\n"
            for line, record in self._lines()
            if record.get("stage") != stage or record.get("step", step) <= step
        ]
        if self.metrics_file.exists():
            write_atomic(self.metrics_file, b"".join(kept))
        if self.mirror is not None:
            self.mirror.rewind(stage, step)

    def save_npz(self, name: str, /, **arrays: np.ndarray) -> Path:
        """Write arrays to ``samples/<name>.npz`` atomically, and return the file; samples are ``x``, draws first.

        InputError for a name with a folder; ValueError for an array of Python objects, which only pickle could store.
        """
        if name in ("", "..") or name != Path(name).name:
            raise InputError(f"expected a plain name for the samples, found {name!r}; leave out any folder")
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        path = self.samples_dir / f"{name}.npz"
        write_atomic(path, buffer.getvalue())
        return path

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield every finished line of the record, as bytes and parsed."""
        if not self.metrics_file.exists():
            return
        # The text after the last line break is empty or an unfinished line.
        for number, line in enumerate(self.metrics_file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line, parse_constant=_refuse_constant)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise InputError(
                    f"expected one JSON object per line in {self.metrics_file}, found {line[:40]!r} in line {number}; "
                    "correct or delete that line"
                )
            yield line, {name: from_json(value) for name, value in record.items()}


def _cut_torn_line(file: io.BufferedRandom) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def to_json(value: float | int | str) -> float | int | str:
    """Return a value as JSON can hold it; see :data:`NON_FINITE`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def from_json(value: Any) -> Any:
    """Return what :func:`to_json` was given."""
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
