"""A copy of a run's metrics for TensorBoard; ``metrics.jsonl`` stays the record."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.runs.run import NON_FINITE, Run


def check_installed() -> None:
    """Refuse to start without the package.

    Raises:
        InputError: the package tensorboard is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "option tensorboard needs the package tensorboard, which is not installed; "
            "install it with pip install -e '.[log]', or leave the option out"
        )


class Board:
    """Event files in one folder; a context manager that closes them.

    Args:
        folder: of the event files; made if missing.
        first_step: steps already done. TensorBoard ignores later ones in the folder, so that a resumed stage leaves no
            duplicates; 0 makes it ignore all.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        check_installed()
        self.folder = folder
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        # Imported here, because the package is optional and slow to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=first_step + 1 if first_step else 0)

    def rewind(self, step: int) -> None:
        """Remove all that is later than a step; 0 or less removes all."""
        self.close()
        self._open(max(0, step))

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Write the numbers of one record of metrics as scalars."""
        step = int(record.get("step", 0))
        for name, value in record.items():
            number = NON_FINITE.get(value) if isinstance(value, str) else value
            if name != "step" and number is not None:
                self._writer.add_scalar(name, number, step)
        # A checkpoint may follow, and its records must survive a killed process.
        self._writer.flush()

    def images(self, grids: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Write RGB pictures ``(height, width, 3)`` by their names."""
        for name, grid in grids.items():
            self._writer.add_image(name, grid, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StageBoards:
    """Event files of a stage and of its parts, each in a folder of its own, because the steps of each begin at 0.

    A part is a stage whose name begins with the stage's and a hyphen. As a context manager it closes the files.

    Args:
        run: the run.
        stage: its stage.
        first_step: steps of the stage that are done.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self, run: Run, stage: str, first_step: int = 0) -> None:
        self.run, self.stage = run, stage
        self._boards = {stage: Board(run.tensorboard_dir / stage, first_step)}

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Write one record of metrics to the files of its stage; records of other stages are ignored."""
        stage = str(record.get("stage"))
        if stage.startswith(f"{self.stage}-") and stage not in self._boards:
            self._boards[stage] = Board(self.run.tensorboard_dir / stage)
        if stage in self._boards:
            self._boards[stage].log(record)

    def rewind(self, stage: str, step: int) -> None:
        """Remove a stage's records after a step."""
        if stage in self._boards:
            self._boards[stage].rewind(step)

    def images(self, grids: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Write pictures of the stage, as :meth:`Board.images` does."""
        self._boards[self.stage].images(grids, step)

    def __enter__(self) -> StageBoards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for board in self._boards.values():
            board.close()


def open_board(run: Run, stage: str, first_step: int = 0) -> StageBoards:
    """Open the event files of a stage with ``first_step`` steps done, as a :class:`~ppl_vaebm.runs.run.Mirror`.

    If the stage ran without TensorBoard so far, its records are copied.

    Raises:
        InputError: the package tensorboard is missing.
    """
    is_new = not (run.tensorboard_dir / stage).exists()
    boards = StageBoards(run, stage, first_step)
    for record in run.metrics() if is_new and first_step else ():
        if record.get("stage") != stage or record.get("step", 0) <= first_step:
            boards.log(record)
    return boards
