"""A copy of a run's metrics for TensorBoard; ``metrics.jsonl`` stays the record."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.runs.run import NON_FINITE, Run

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def check_installed() -> None:
    """Refuse, as InputError, to start without the package tensorboard."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "option tensorboard needs the package tensorboard, which is not installed; "
            "install it with pip install -e '.[log]', or leave the option out"
        )


class StageBoards:
    """Event files of a stage and of its parts, each in a folder of its own, because the steps of each begin at 0.

    A part is a stage whose name begins with the stage's and a hyphen. As a context manager it closes the files.

    TensorBoard ignores what the folder holds of steps after ``first_step``, the number of steps done, so that a resumed
    stage leaves no duplicates; 0 makes it ignore all.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self, run: Run, stage: str, first_step: int = 0) -> None:
        check_installed()
        self.run, self.stage = run, stage
        self._writers: dict[str, SummaryWriter] = {}
        self._open(stage, first_step)

    def _open(self, stage: str, first_step: int = 0) -> None:
        # Imported here, because the package is optional and slow to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        purge_step = first_step + 1 if first_step else 0
        self._writers[stage] = SummaryWriter(str(self.run.tensorboard_dir / stage), purge_step=purge_step)

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Write the numbers of one record of metrics; records of other stages are ignored."""
        stage, step = str(record.get("stage")), int(record.get("step", 0))
        if stage.startswith(f"{self.stage}-") and stage not in self._writers:
            self._open(stage)
        if stage not in self._writers:
            return
        for name, value in record.items():
            number = NON_FINITE.get(value) if isinstance(value, str) else value
            if name != "step" and number is not None:
                self._writers[stage].add_scalar(name, number, step)
        # A checkpoint may follow, and its records must survive a killed process.
        self._writers[stage].flush()

    def rewind(self, stage: str, step: int) -> None:
        """Remove a stage's records after a step; 0 or less removes all."""
        if stage in self._writers:
            self._writers[stage].close()
            self._open(stage, max(0, step))

    def images(self, grids: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        """Write RGB pictures ``(height, width, 3)`` of the stage by their names."""
        for name, grid in grids.items():
            self._writers[self.stage].add_image(name, grid, step, dataformats="HWC")
        self._writers[self.stage].flush()

    def __enter__(self) -> StageBoards:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()


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
