"""From a run's folder back to the model, its data and its potential."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppl_vaebm import checkpoint as checkpoints
from ppl_vaebm.config import Config, differences, from_dict, load_yaml, to_dict
from ppl_vaebm.data import Data, load_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm import new_vaebm
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.svi import new_vae
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.run import Run

# What a checkpoint's weights depend on; the other options may change between stages.
BINDING = {"svi": ("seed", "data", "model"), "ebm": ("seed", "data", "model", "energy")}


@dataclass(frozen=True)
class LoadedRun:
    """A fitted VAEBM and what it was fitted to."""

    run: Run
    config: Config
    data: Data
    vaebm: VAEBM
    potential: NoisePotential


def run_config(run: Run) -> Config:
    """Read a run's configuration.

    Args:
        run: the run.

    Returns:
        The configuration.

    Raises:
        InputError: an unknown key, a wrong value, or not YAML.
    """
    return from_dict(load_yaml(run.config_file), str(run.config_file))


def load_vae(run: Run, config: Config, data: Data) -> HierarchicalVAE:
    """Load stage 1's best weights.

    Args:
        run: the run.
        config: its configuration.
        data: its data.

    Returns:
        The VAE with averaged weights, in evaluation mode.

    Raises:
        InputError: no checkpoint of stage svi, or one of another model.
    """
    if not checkpoints.available(run.checkpoints("svi")):
        raise InputError(
            f"expected a checkpoint of stage svi in {run.path}, found none; "
            f"fit it first: python -m ppl_vaebm.fit --stage svi --run {run.path}"
        )
    saved = checkpoints.load(run.checkpoints("svi"), "best")
    check_same(saved.config, config, BINDING["svi"], f"stage svi in {run.path}")
    vae = new_vae(config, data)
    vae.load_state_dict(saved.weights["vae_average"])
    return vae.eval()


def load_run(path: Path | str) -> LoadedRun:
    """Load a run with both stages fitted.

    Args:
        path: the run's folder.

    Returns:
        Model, data and potential.

    Raises:
        InputError: not a run, or a stage is missing or of another model.
    """
    run = Run.open(path)
    config = run_config(run)
    data = load_data(config.data, config.seed)
    vae = load_vae(run, config, data)
    if not checkpoints.available(run.checkpoints("ebm")):
        raise InputError(
            f"expected a checkpoint of stage ebm in {run.path}, found none; "
            f"fit it first: python -m ppl_vaebm.fit --stage ebm --run {run.path}"
        )
    saved = checkpoints.load(run.checkpoints("ebm"), "best")
    check_same(saved.config, config, BINDING["ebm"], f"stage ebm in {run.path}")
    vaebm = new_vaebm(config, vae)
    vaebm.energy.load_state_dict(saved.weights["energy_average"])
    vaebm.requires_grad_(False)
    return LoadedRun(run, config, data, vaebm, noise_potential(vaebm))


def check_same(saved: dict[str, Any], config: Config, sections: tuple[str, ...], what: str) -> None:
    """Refuse options that differ from those a checkpoint was made with.

    Args:
        saved: the checkpoint's configuration.
        config: the one asked for.
        sections: the options that must agree.
        what: names the checkpoint in the message.

    Raises:
        InputError: naming every option that differs.
    """
    asked = to_dict(config)
    changed = differences({name: saved.get(name) for name in sections}, {name: asked.get(name) for name in sections})
    if changed:
        raise InputError(
            f"{what} was fitted with other values of {', '.join(changed)}; "
            "leave these options out, or fit another --run with them"
        )
