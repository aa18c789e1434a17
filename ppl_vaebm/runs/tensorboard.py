"""A copy of what a run logs, in the form that TensorBoard reads; ``metrics.jsonl`` stays the record."""

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
    """Refuse to go on without the package, before a training run would find out.

    Raises:
        InputError: the package tensorboard is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "option tensorboard needs the package tensorboard, which is not installed; "
            "install it with pip install 'ppl_vaebm[log]', or leave the option out"
        )


class Board:
    """Event files in one folder; a context manager that closes them.

    Args:
        folder: of the event files; made if missing.
        first_step: steps already done. TensorBoard forgets what the folder says of later ones, so that a resumed stage
            leaves no duplicates; 0 makes it forget all.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        check_installed()
        self.folder = folder
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        # Here, for the package is optional and slow to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=first_step + 1 if first_step else 0)

    def rewind(self, step: int) -> None:
        """Forget what is later than a step; 0 or less forgets all."""
        self.close()
        self._open(max(0, step))

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Write one record of metrics as scalars, each under its own name.

        Args:
            record: as :meth:`~ppl_vaebm.run.Run.log` takes it; its words, such as ``stage``, are left out.
        """
        step = int(record.get("step", 0))
        for name, value in record.items():
            number = NON_FINITE.get(value) if isinstance(value, str) else value
            if name != "step" and number is not None:
                self._writer.add_scalar(name, number, step)
        # A checkpoint may follow at once, and the record before it has to outlive a killed process.
        self._writer.flush()

    def images(self, grids: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Write pictures.

        Args:
            grids: names to RGB pictures ``(height, width, 3)``.
            step: of the stage.
        """
        for name, grid in grids.items():
            self._writer.add_image(name, grid, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StageBoards:
    """The event files of a stage and of its parts, each in a folder of its own, for the steps of each begin at 0.

    A part is a stage whose name begins with the stage's and a hyphen. A context manager that closes the files.

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
        """Write one record of metrics into its stage's files; one of another stage's is left out."""
        stage = str(record.get("stage"))
        if stage.startswith(f"{self.stage}-") and stage not in self._boards:
            self._boards[stage] = Board(self.run.tensorboard_dir / stage)
        if stage in self._boards:
            self._boards[stage].log(record)

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a stage logged after a step."""
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
    """Open the event files of a stage.

    Where the stage ran without TensorBoard so far, what it and its parts logged is copied.

    Args:
        run: the run.
        stage: its stage.
        first_step: steps already done.

    Returns:
        The open files, which :class:`~ppl_vaebm.run.Run` takes as its mirror.

    Raises:
        InputError: the package tensorboard is missing.
    """
    is_new = not (run.tensorboard_dir / stage).exists()
    boards = StageBoards(run, stage, first_step)
    for record in run.metrics() if is_new and first_step else ():
        if record.get("stage") != stage or record.get("step", 0) <= first_step:
            boards.log(record)
    return boards
