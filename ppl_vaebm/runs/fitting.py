"""A stage of a run: checks first, then the loop, then the arrays behind its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import as_yaml
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.devices import Process
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.ebm.step_search import search, with_trial
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.svi.svi import fit_svi
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.runs.checkpoint import Checkpoint
from ppl_vaebm.runs.gallery import Arrays, gallery, write_gallery
from ppl_vaebm.runs.loading import (
    FittedVAE,
    check_absent,
    check_models,
    clear,
    load_finished_vae,
    load_fitted_vae,
    load_to_resume,
)
from ppl_vaebm.runs.run import Run
from ppl_vaebm.runs.tensorboard import StageBoards, check_installed, open_board

GridsOf: TypeAlias = Callable[[str, Arrays], Mapping[str, NDArray[np.uint8]]]
"""From the name and the arrays of a file of the gallery to RGB pictures ``(height, width, 3)`` by their labels."""
MAX_NAMED = 5
"""Skipped images that are named."""


@dataclass(frozen=True)
class Request:
    """Options of ``fit`` beside the configuration."""

    stage: Literal["svi", "ebm"]
    folder: Path
    """Of the run."""
    resume: bool = False
    """Continue from the last checkpoint."""
    overwrite: bool = False
    """Start again where the stage has checkpoints."""


def fit_stage(
    request: Request,
    config: Config,
    process: Process,
    device: str,
    announce: Callable[[Config], str],
    grids_of: GridsOf,
) -> None:
    """Fit a stage; of several processes the first prints and writes.

    ``announce`` prints a configuration with its steps resolved and returns it as it is written to the run, and
    ``grids_of`` draws what TensorBoard shows of stage 1.

    Raises:
        InputError: options, data or the run do not fit; nothing was changed.
        TrainingError: training diverged; the last checkpoint is kept.
    """
    if process.world > 1 and request.stage == "ebm":
        raise InputError("expected one process for stage ebm, found several: run it without torchrun")
    data = load_data(config.data, config.seed)
    config = _with_steps(request, config, data, process)
    resolved = announce(config) if process.is_first else ""
    if process.is_first:
        _print_skipped(data)
    asked, config = config, replace(config, device=device)
    resume, vae = _checked(request, config, data)
    if vae is not None and config.ebm.tune and resume is None:
        trial, text = search(config, data, vae)
        print(text)
        config, resolved = with_trial(config, trial), as_yaml(with_trial(asked, trial))
    run = Run(request.folder)
    if process.is_first:
        run = Run.create(request.folder)
        if resume is None:
            clear(run, request.stage)
        write_atomic(run.config_file, resolved)
    is_mirrored = config.tensorboard and process.is_first
    first_step = resume.step if resume else 0
    with open_board(run, request.stage, first_step) if is_mirrored else nullcontext() as board:
        run = run if board is None else replace(run, mirror=board)
        if vae is None:
            _fit_svi(run, config, data, resume, board, grids_of, process)
        else:
            fit_ebm(run, config, data, vae, resume)


def _with_steps(request: Request, config: Config, data: Data, process: Process) -> Config:
    """Turn stage svi's epochs into steps, and refuse batches that the data do not fill."""
    loop = config.svi if request.stage == "svi" else config.ebm
    sampler = KeyedSampler(len(data.train), loop.batch_size, config.seed, process.rank, process.world)
    return replace(config, svi=config.svi.resolved(sampler.steps_per_epoch)) if request.stage == "svi" else config


def _print_skipped(data: Data) -> None:
    if data.skipped:
        shown = ", ".join(data.skipped[:MAX_NAMED])
        print(f"note: {len(data.skipped)} images could not be read and were skipped: {shown}")


def _checked(request: Request, config: Config, data: Data) -> tuple[Checkpoint | None, HierarchicalVAE | None]:
    """Check everything before anything is changed; return the checkpoint and the VAE that the stage begins from."""
    run, resume = Run(request.folder), None
    if request.resume:
        resume = load_to_resume(run, request.stage, config)
    elif not request.overwrite:
        check_absent(run, request.stage)
    vae = load_finished_vae(run, config, data) if request.stage == "ebm" else None
    check_models(config, data, request.stage)
    if config.tensorboard:
        check_installed()
    return resume, vae


def _fit_svi(
    run: Run,
    config: Config,
    data: Data,
    resume: Checkpoint | None,
    board: StageBoards | None,
    grids_of: GridsOf,
    process: Process,
) -> None:
    """Run stage 1's loop, and write the arrays of its pictures."""

    def show(vae: HierarchicalVAE, step: int) -> None:
        # The seed is always the same, so that the pictures of different steps compare.
        for name, arrays in gallery(FittedVAE(run, config, data, vae), data.validation, config.seed).items():
            board.images(grids_of(name, arrays), step)  # type: ignore[union-attr]

    fit_svi(run, config, data, resume, None if board is None else show)
    if process.is_first:
        files = write_gallery(load_fitted_vae(run, config, data), config.seed)
        if board is not None:
            for name, arrays in files.items():
                # Under other names than those of show, which are of other data and weights.
                grids = {f"test/{label}": grid for label, grid in grids_of(name, arrays).items()}
                board.images(grids, config.svi.steps)
