"""Stage 1 of a run, loaded: what ``sample`` and ``evaluate`` take where there is no energy, or none is asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.devices import check_device
from ppl_vaebm.inference.svi.batch_norm import set_statistics
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.loading import load_vae, run_config
from ppl_vaebm.runs.run import Run

Stage = Literal["svi", "ebm"]


@dataclass(frozen=True)
class FittedVAE:
    """A fitted VAE and what it was fitted to."""

    run: Run
    config: Config
    data: Data
    vae: HierarchicalVAE
    """With the batch statistics of training, which the posterior's draws have."""
    prior_vae: HierarchicalVAE | None = None
    """With the batch statistics of prior draws; ``None`` where the checkpoint has none."""
    norm_temperature: float | None = None
    """Temperature of those draws."""

    @property
    def sampler(self) -> HierarchicalVAE:
        """The one to draw from the prior with."""
        return self.vae if self.prior_vae is None else self.prior_vae


def load_fitted_vae(run: Run, config: Config, data: Data) -> FittedVAE:
    """Load stage 1's best weights, with the statistics of training and with those of prior draws.

    Args:
        run: the run.
        config: its configuration.
        data: its data.

    Returns:
        The VAEs, in evaluation mode.

    Raises:
        InputError: no checkpoint of stage svi, or one of another model.
    """
    vae = load_vae(run, config, data, has_prior_statistics=False).requires_grad_(False)
    saved = checkpoints.load(run.checkpoints("svi"), "best")
    statistics = saved.weights.get("prior_statistics")
    if not statistics:
        return FittedVAE(run, config, data, vae)
    prior_vae = copy.deepcopy(vae)
    set_statistics(prior_vae.model, statistics)
    return FittedVAE(run, config, data, vae, prior_vae, saved.state["norm_temperature"])


def open_fitted_vae(path: str) -> FittedVAE:
    """Load stage 1 of a run from its folder alone.

    Args:
        path: the run's folder.

    Returns:
        As :func:`load_fitted_vae`.

    Raises:
        InputError: not a run, or as :func:`load_fitted_vae`.
    """
    run = Run.open(path)
    config = run_config(run)
    check_device(config.device)
    return load_fitted_vae(run, config, load_data(config.data, config.seed))


def stage_of(run: Run, asked: Stage | None) -> Stage:
    """Choose the stage to work on.

    Args:
        run: the run.
        asked: by the user, if at all.

    Returns:
        What was asked for; else ebm where the run has a checkpoint of it, and svi where not.
    """
    return asked or ("ebm" if checkpoints.available(run.checkpoints("ebm")) else "svi")
