"""Loading of models, data and potentials from a run's folder, and the checks before a stage begins."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import differences, from_dict, to_dict
from ppl_vaebm.config.recipes import load_yaml
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.devices import check_device
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.guard import STAGE
from ppl_vaebm.inference.ebm.latent_term import BALANCE_STAGE, TERM_STAGE
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.svi.batch_norm import set_statistics
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.nvae_cells import fold_weight_norm
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm, has_discrete_x
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

Stage = Literal["svi", "ebm"]
# What a checkpoint's weights depend on; the other options may change between stages.
BINDING = {"svi": ("seed", "data", "model"), "ebm": ("seed", "data", "model", "energy")}
FINGERPRINT_DIGITS = 16  # 64 bits: chosen by us, more than enough to tell the checkpoints of a run apart
# What the rest of a stage depends on too.
RESUMING = {"svi": (*BINDING["svi"], "svi"), "ebm": (*BINDING["ebm"], "ebm", "kernel")}
EBM_STAGES = (STAGE, TERM_STAGE, BALANCE_STAGE)
"""Stages under which stage ebm and its parts write their records."""


@dataclass(frozen=True)
class LoadedRun:
    """A fitted VAEBM and what it was fitted to."""

    run: Run
    config: Config
    data: Data
    vaebm: VAEBM
    potential: NoisePotential

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the density; see :func:`fingerprint`."""
        return fingerprint(self.vaebm, self.config)


@dataclass(frozen=True)
class FittedVAE:
    """A fitted VAE and what it was fitted to."""

    run: Run
    config: Config
    data: Data
    vae: HierarchicalVAE
    """With the batch statistics of training, for draws of the posterior."""
    prior_vae: HierarchicalVAE | None = None
    """With the batch statistics of prior samples; ``None`` where the checkpoint has none."""
    norm_temperature: float | None = None
    """Temperature of those samples."""

    @property
    def sampler(self) -> HierarchicalVAE:
        """VAE to sample the prior with."""
        return self.vae if self.prior_vae is None else self.prior_vae


def stage_of(run: Run, asked: Stage | None) -> Stage:
    """Return the stage asked for, else ebm where the run has a checkpoint of it, else svi."""
    return asked or ("ebm" if checkpoints.available(run.checkpoints("ebm")) else "svi")


def fingerprint(vaebm: VAEBM, config: Config) -> str:
    """Hash a density: first :data:`FINGERPRINT_DIGITS` hexadecimal digits of SHA-256.

    Weights and statistics count bit for bit, on any device, and so do the options seed, data, model, energy and
    temperature.
    """
    options = to_dict(config)
    meaning = {name: options[name] for name in BINDING["ebm"]} | {"temperature": config.ebm.temperature}
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name, tensor in sorted(vaebm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def run_config(run: Run) -> Config:
    """Read a run's configuration; InputError for an unknown key, a wrong value, or a file that is not YAML."""
    return from_dict(load_yaml(run.config_file), str(run.config_file))


def load_vae(run: Run, config: Config, data: Data, has_prior_statistics: bool) -> HierarchicalVAE:
    """Load the VAE with stage 1's best averaged weights, frozen, in evaluation mode.

    With ``has_prior_statistics`` batch normalisations of the generator get the statistics of prior samples, in place of
    those of training, which the validation ELBO is measured with.

    Raises:
        InputError: no checkpoint of stage svi, one of another model, or one without statistics of prior samples.
    """
    saved = _fitted(run, "svi", "best", config)
    vae = new_vae(config, data)
    vae.load_state_dict(saved.weights["vae_average"])
    if has_prior_statistics:
        if "prior_statistics" not in saved.weights:
            raise InputError(
                f"expected batch statistics of prior samples in {run.path}, found none: fit stage svi with "
                "--svi.norm-temperature, or leave out ebm.prior-statistics"
            )
        set_statistics(vae.model, saved.weights["prior_statistics"])
    vae.eval().requires_grad_(False)
    fold_weight_norm(vae)
    return vae


def load_fitted_vae(run: Run, config: Config, data: Data) -> FittedVAE:
    """Load stage 1's best weights, with the batch statistics of training and of prior samples; as :func:`load_vae`."""
    vae = load_vae(run, config, data, has_prior_statistics=False)
    saved = checkpoints.load(run.checkpoints("svi"), "best")
    if not saved.weights.get("prior_statistics"):
        return FittedVAE(run, config, data, vae)
    prior_vae = load_vae(run, config, data, has_prior_statistics=True)
    return FittedVAE(run, config, data, vae, prior_vae, saved.state["norm_temperature"])


def open_fitted_vae(path: str) -> FittedVAE:
    """Load stage 1 of a run from its folder, as :func:`load_fitted_vae`."""
    run = Run.open(path)
    config = run_config(run)
    check_device(config.device)
    return load_fitted_vae(run, config, load_data(config.data, config.seed))


def _fitted(run: Run, stage: str, which: Literal["last", "best"], config: Config) -> checkpoints.Checkpoint:
    """Load a stage's checkpoint, or refuse: there is none, or it is of another model."""
    if not checkpoints.available(run.checkpoints(stage)):
        raise InputError(
            f"expected a checkpoint of stage {stage} in {run.path}, found none; "
            f"fit it first: python -m ppl_vaebm.fit --stage {stage} --run {run.path}"
        )
    saved = checkpoints.load(run.checkpoints(stage), which)
    check_same(saved.config, config, BINDING[stage], f"stage {stage} in {run.path}")
    return saved


def load_run(path: Path | str) -> LoadedRun:
    """Load a run with both stages fitted: stage 1's best weights, and stage 2's last ones, averaged.

    Raises:
        InputError: not a run, or a stage is missing or of another model.
    """
    run = Run.open(path)
    config = run_config(run)
    check_device(config.device)
    data = load_data(config.data, config.seed)
    vae = load_vae(run, config, data, config.ebm.prior_statistics)
    # The last, not the best: the score exists only where log Z is certified, so the best may be an early, small energy.
    saved = _fitted(run, "ebm", "last", config)
    temperature = _completed(saved.config)["ebm"]["temperature"]
    if temperature != config.ebm.temperature:
        raise InputError(
            f"expected ebm.temperature {temperature:g} in {run.config_file}, with which its energy was fitted, found "
            f"{config.ebm.temperature:g}; put it back, or fit stage ebm again with --overwrite"
        )
    vaebm = build_vaebm(config, vae)
    vaebm.energy.load_state_dict(saved.weights["energy_average"])
    vaebm.requires_grad_(False)
    fold_weight_norm(vaebm.energy)
    return LoadedRun(run, config, data, vaebm, noise_potential(vaebm))


def check_absent(run: Run, stage: str) -> None:
    """Refuse, as InputError, to start a stage that the run already holds."""
    steps = checkpoints.available(run.checkpoints(stage))
    if steps:
        raise InputError(
            f"{run.path} already holds stage {stage}, {steps[-1]} steps; "
            "continue it with --resume, start it again with --overwrite, or name another --run"
        )


def load_to_resume(run: Run, stage: str, config: Config) -> checkpoints.Checkpoint:
    """Load the last checkpoint of a stage, or refuse, as InputError: there is none, or it has other options."""
    folder = run.checkpoints(stage)
    if not checkpoints.available(folder):
        raise InputError(f"expected a checkpoint of stage {stage} in {run.path}, found none; leave out --resume")
    saved = checkpoints.load(folder, "last")
    check_same(saved.config, config, RESUMING[stage], f"stage {stage} in {run.path}")
    if stage == "ebm" and not {"guard", "replay_sites"} <= saved.state.keys():
        raise InputError(
            f"expected a checkpoint of this version of stage ebm in {run.path}, found one of an earlier version; "
            "sample and evaluate it as it is, or start the stage again with --overwrite"
        )
    return saved


def load_finished_vae(run: Run, config: Config, data: Data) -> HierarchicalVAE:
    """Load the VAE to learn an energy for, as :func:`load_vae`.

    Raises:
        InputError: as :func:`load_vae`, or stage svi is not finished: an energy belongs to the weights of its VAE.
    """
    vae = load_vae(run, config, data, config.ebm.prior_statistics)
    num_done = checkpoints.available(run.checkpoints("svi"))[-1]
    if num_done < config.svi.steps:
        raise InputError(
            f"expected stage svi in {run.path} to be done, found {num_done} of {config.svi.steps} steps; "
            f"finish it with --stage svi --resume, or take it as it is with --svi.steps {num_done}"
        )
    return vae


def check_models(config: Config, data: Data, stage: str) -> None:
    """Refuse networks that do not fit the data, before anything is written; stage ebm also refuses a discrete x."""
    vae = new_vae(config, data)
    if stage == "ebm" or not has_discrete_x(config):
        build_vaebm(config, vae)


def clear(run: Run, stage: Stage) -> None:
    """Remove the results of a stage, and all that depends on them; the configuration stays.

    The energy belongs to its VAE, so a new stage svi removes stage ebm too. Either removes samples and measurements,
    which the report would show as those of the new stage.

    Raises:
        InputError: a line of the record of metrics is not a JSON object; nothing was removed.
    """
    stages = ("svi", *EBM_STAGES) if stage == "svi" else EBM_STAGES
    for void in stages:
        run.rewind_metrics(void, -1)  # validations of step 0 too
    for void in stages:
        shutil.rmtree(run.checkpoints(void), ignore_errors=True)
        shutil.rmtree(run.tensorboard_dir / void, ignore_errors=True)
    for file in run.samples_dir.glob("*"):
        if stage == "svi" or not file.name.startswith("svi_"):  # stage 1's pictures, which stay true
            file.unlink()
    files = [run.chains_file, run.positions_file, run.evaluation_file, run.comparison_file]
    if stage == "svi":
        files.append(run.features_file)  # of the old data's classes, which may be others now
    for file in files:
        file.unlink(missing_ok=True)
    shutil.rmtree(run.comparison_dir, ignore_errors=True)


def check_same(saved: dict[str, Any], config: Config, sections: tuple[str, ...], what: str) -> None:
    """Refuse, as InputError, options in ``sections`` that differ from a checkpoint's; the message calls it ``what``."""
    asked, given = to_dict(config), _completed(saved)
    changed = differences({name: given.get(name) for name in sections}, {name: asked.get(name) for name in sections})
    if changed:
        raise InputError(
            f"{what} was fitted with other values of {', '.join(changed)}; "
            "use those values, or fit another run with these"
        )


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint's options to those of today; new options get their defaults."""
    try:
        return to_dict(from_dict(saved, "a checkpoint's options"))
    except InputError:  # it has options that were removed, so they differ
        return saved
