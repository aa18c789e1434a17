"""Stage 2: learn the energy, by contrastive maximum likelihood or as a density ratio.

Both objectives have the optimum ``E = -log(p_data / p_vae)`` up to a constant, where h is the data's density.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import to_dict
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import Split
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.guard import STAGE, Guard, go_back, words
from ppl_vaebm.inference.ebm.learner import EnergyLearner, data_latents
from ppl_vaebm.inference.ebm.negatives import Phase
from ppl_vaebm.inference.likelihood import CERTIFIED_ESS, LogZ, log_z_from_vae
from ppl_vaebm.inference.optim import DivergedError, learning_rate
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

MAX_VALIDATION_POINTS = 10_000
TUNED_KERNELS = ("langevin", "mala", "hmc", "pcn")
"""Kernels whose step ebm.tune finds; a mixture may hold one of them."""


class Gain(NamedTuple):
    """What the energy adds to the VAE's log-likelihood on held-out data."""

    nats: float
    """``mean(-E) - log Z``, nats per data point."""
    error: float
    """Standard error over data and draws of the VAE."""
    log_z: LogZ


def check_kernel(config: Config) -> None:
    """Refuse a kernel that the objective or the tuning cannot do with.

    Args:
        config: the run's configuration.

    Raises:
        InputError: naming the option.
    """
    loop, name = config.ebm, config.kernel.name
    if loop.objective == "ladder" and name == "langevin":
        raise InputError(
            "expected an adjusted kernel with ebm.objective ladder, whose rungs are densities, found langevin; "
            "set --kernel mala or hmc"
        )
    members = config.kernel.members if name == "mixture" else (name,)
    if loop.tune and not set(TUNED_KERNELS) & set(members):
        raise InputError(
            f"expected a kernel with a step that ebm.tune can find ({', '.join(TUNED_KERNELS)}, or a mixture with "
            f"one), found {', '.join(members)}; leave out --tune, or name another --kernel"
        )


def likelihood_gain(config: Config, potential: NoisePotential, split: Split, seed: int) -> Gain:
    """Measure ``E_data[log h - log p]``; for an energy of x and z a lower bound of it, tight where the guide is exact.

    Args:
        config: the run's configuration.
        potential: of the VAEBM.
        split: held-out data; at most :data:`MAX_VALIDATION_POINTS` of it.
        seed: of dequantisation, the data's latents and draws.

    Returns:
        The gain.
    """
    num = min(MAX_VALIDATION_POINTS, len(split))
    vaebm = potential.vaebm
    device = next(vaebm.parameters()).device
    x = split.batch(torch.arange(num), stream(seed, "dequantise")).to(device)
    with torch.no_grad():
        parts = [
            vaebm.energy(rows, data_latents(config, vaebm.vae, rows, seed_for(seed, "posterior", index)))
            for index, rows in enumerate(x.split(1_000))
        ]
    energy = torch.cat(parts).double()
    log_z = log_z_from_vae(potential, stream(seed, "log_z", device=device), config.ebm.num_validation_draws)
    error = math.hypot(float(energy.std()) / math.sqrt(num), log_z.error)
    return Gain(-float(energy.mean()) - log_z.value, error, log_z)


def fit_ebm(
    run: Run, config: Config, data: Data, vae: HierarchicalVAE, resume: checkpoints.Checkpoint | None = None
) -> VAEBM:
    """Fit the energy, writing metrics and checkpoints into the run.

    All randomness of a step is a function of the seed, the step and the times that the guard went back, so a resumed
    fit repeats an uninterrupted one bit for bit on a CPU.

    Args:
        run: folder to write to.
        config: the run's configuration.
        data: the data.
        vae: stage 1's result; it is frozen.
        resume: checkpoint to continue from.

    Returns:
        The VAEBM with averaged energy weights.

    Raises:
        InputError: the checkpoint's replay is of another model, or the kernel does not fit the objective.
        DivergedError: the energy exploded, and there is no guard or it has no checkpoint to go back to.
    """
    check_kernel(config)
    guard = Guard(config)
    if resume is not None:
        if "guard" in resume.state:  # an earlier version had none
            guard.load(resume.state["guard"])
        guard.rewind(run, resume.step)
    saved = resume
    while True:
        learner = EnergyLearner(config, data, build_vaebm(config, vae), guard, saved)
        if guard.is_stopped:
            print(words(guard))
            _finish_stopped(run, config, data, learner)
            break
        try:
            if saved is None and config.ebm.latent.steps:
                _learn_latent_term(run, config, data, learner)
            _attempt(run, config, data, learner)
            break
        except DivergedError as error:
            if not config.ebm.guard:
                raise
            saved = go_back(run, guard, error)
            if not guard.is_stopped:
                print(words(guard))
    return VAEBM(vae, learner.average.module)


def _learn_latent_term(run: Run, config: Config, data: Data, learner: EnergyLearner) -> None:
    """Do stage 2's first part, and write it down as the checkpoint of step 0."""
    learner.learn_latent_term(run)
    potential = noise_potential(VAEBM(learner.vaebm.vae, learner.average.module))
    _save(run, config, learner, _validate(run, config, potential, data.validation, 0))


def _attempt(run: Run, config: Config, data: Data, learner: EnergyLearner) -> None:
    """Train from where the learner stands to the last step, unless the energy explodes on the way."""
    loop, start = config.ebm, time.perf_counter()
    averaged_potential = noise_potential(VAEBM(learner.vaebm.vae, learner.average.module))
    steps = range(learner.num_done, loop.steps)
    progress = tqdm(steps, "stage ebm", loop.steps, initial=steps.start, disable=None, mininterval=1)
    for step in progress:
        done = step + 1
        is_last = done == loop.steps
        is_logged = done % loop.log_every == 0 or is_last
        phase, monitors = learner.step(step, is_logged)
        if is_logged:
            record = _record(phase, learner, step, time.perf_counter() - start)
            run.log(record | monitors | phase.record)
            progress.set_postfix(gap=f"{record['energy_gap']:.3f}", refresh=False)
        if is_last:
            learner.balance_latent(run)
        is_checkpoint = done % loop.checkpoint_every == 0 or is_last
        if is_checkpoint or done % loop.validate_every == 0:
            gain = _validate(run, config, averaged_potential, data.validation, done)
            progress.write(f"step {done}: validation gain {gain.nats:.3f} nats, log Z {gain.log_z.value:.3f}")
        if is_checkpoint:
            _save(run, config, learner, gain)


def _finish_stopped(run: Run, config: Config, data: Data, learner: EnergyLearner) -> None:
    """Do what would have followed the last step, for a result that the guard chose: the balance, if it is missing."""
    if learner.lacks_balance:
        learner.balance_latent(run)
        potential = noise_potential(VAEBM(learner.vaebm.vae, learner.average.module))
        _save(run, config, learner, _validate(run, config, potential, data.validation, learner.num_done))


def _record(phase: Phase, learner: EnergyLearner, step: int, seconds: float) -> dict[str, float | int | str]:
    """Return what is logged of a step whatever the negatives are."""
    energy_data, energy_model = float(phase.energy_data.detach().mean()), float(phase.energy_model.detach())
    return {
        "stage": STAGE,
        "step": step + 1,
        "seconds": seconds,
        "loss": float(phase.loss.detach()),
        "energy_data": energy_data,
        "energy_model": energy_model,
        "energy_gap": energy_data - energy_model,
        "lr": learner.guard.rate_factor * learning_rate(learner.config.ebm, step),
        "num_skipped": learner.optimizer.num_skipped,
        "num_rollbacks": learner.guard.num_rollbacks,
    }


def _save(run: Run, config: Config, learner: EnergyLearner, gain: Gain) -> None:
    """Write a checkpoint; only a certified likelihood gain is a score."""
    is_certified = gain.log_z.ess >= CERTIFIED_ESS and math.isfinite(gain.nats)
    checkpoints.save(
        run.checkpoints(STAGE),
        stage=STAGE,
        step=learner.num_done,
        weights={name: module.state_dict() for name, module in learner.modules().items()},
        state=learner.state(),
        config=to_dict(config),
        score=gain.nats if is_certified else None,
    )


def _validate(run: Run, config: Config, potential: NoisePotential, split: Split, step: int) -> Gain:
    """Measure the likelihood gain on held-out data, and log it."""
    gain = likelihood_gain(config, potential, split, seed_for(config.seed, "validation"))
    run.log(
        {
            "stage": STAGE,
            "step": step,
            "validation_gain_nats": gain.nats,
            "validation_gain_error_nats": gain.error,
            "log_z": gain.log_z.value,
            "log_z_ess": gain.log_z.ess,
        }
    )
    return gain
