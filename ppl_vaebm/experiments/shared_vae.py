"""The VAE that an experiment's settings share, and the folder that it writes to."""

from __future__ import annotations

import sys
from pathlib import Path

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.svi import fit_svi
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.loading import load_vae
from ppl_vaebm.runs.run import Run


def folder_of(argv: list[str] | None) -> Path:
    """Read an experiment's command line, which is one folder.

    Args:
        argv: tokens; ``None`` takes those of the process.

    Returns:
        The folder.

    Raises:
        InputError: none or several.
    """
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 1:
        raise InputError(f"expected one folder to write to, found {len(given)} arguments: name one")
    return Path(given[0])


def shared_vae(folder: Path, config: Config, data: Data) -> HierarchicalVAE:
    """Fit the VAE into ``folder/vae``, unless it lies there already.

    Args:
        folder: of the experiment.
        config: the recipe.
        data: its data.

    Returns:
        The VAE, in evaluation mode.
    """
    run = Run.create(folder / "vae")
    if checkpoints.available(run.checkpoints("svi"))[-1:] != [config.svi.steps]:
        fit_svi(run, config, data)
    return load_vae(run, config, data, config.ebm.prior_statistics)
