"""Stage 2: learn the energy, by contrastive maximum likelihood or as a density ratio.

Both objectives have the optimum ``E = -log(p_data / p_vae)`` up to a constant, where h is the data's density.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from ppl_vaebm import checkpoint as checkpoints
from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.data import Data, KeyedSampler, Split
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.adaptation import MAX_STEP_SIZE, with_step_size
from ppl_vaebm.inference.base import Kernel, KernelInfo, KernelParams
from ppl_vaebm.inference.kernels import build_kernel, start_params
from ppl_vaebm.inference.likelihood import CERTIFIED_ESS, LogZ, log_z_from_vae, weights_ess
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.replay import Replay
from ppl_vaebm.inference.training import AveragedWeights, GuardedOptimizer, learning_rate
from ppl_vaebm.models.energy import build_energy
from ppl_vaebm.models.spectral import SpectralPenalty, spectral_layers
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.options import to_dict
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.run import Run

# Robbins-Monro gain on log h per training update; the target moves slowly, so the gain is constant. Chosen by us.
STEP_SIZE_GAIN = 0.05
MAX_VALIDATION_POINTS = 10_000


class Gain(NamedTuple):
    """What the energy adds to the VAE's log-likelihood on held-out data."""

    nats: float
    """``mean(-E) - log Z``, nats per data point."""
    error: float
    """Standard error over data and draws of the VAE."""
    log_z: LogZ


@dataclass(frozen=True)
class Phase:
    """The negative phase of one step: what the loss needs, and what the record tells."""

    loss: Tensor
    """The objective, ``()``."""
    energy_model: Tensor
    """Mean energy under h as the negatives estimate it, ``()``; at the optimum it equals the data's."""
    penalty_energies: Tensor
    """Energies of the negatives, for the L2 penalty."""
    record: dict[str, float] = field(default_factory=dict)
    """What to log."""


def has_discrete_x(config: Config) -> bool:
    """Say whether x has a discrete distribution given the latents."""
    return config.model.kind == "nvae" and config.model.nvae.decoder == "bernoulli"


def new_vaebm(config: Config, vae: HierarchicalVAE) -> VAEBM:
    """Make the product density with the run's initial energy.

    Raises:
        InputError: the energy does not fit the data, or x is discrete and so has no gradient in noise space.
    """
    if has_discrete_x(config):
        raise InputError(
            "stage ebm moves in the noise of x, which a Bernoulli decoder does not have: fit stage svi with "
            "--model.nvae.decoder logistic-mixture or normal, without --data.binarize"
        )
    with global_rng(seed_for(config.seed, "energy")):
        return VAEBM(vae, build_energy(config.energy, vae.model.event_shape).to(config.device))


def likelihood_gain(potential: NoisePotential, split: Split, seed: int, num_draws: int) -> Gain:
    """Measure ``E_data[log h - log p]``.

    Args:
        potential: of the VAEBM.
        split: held-out data; at most :data:`MAX_VALIDATION_POINTS` of it.
        seed: of dequantisation and draws.
        num_draws: draws of the VAE for log Z.

    Returns:
        The gain.
    """
    num = min(MAX_VALIDATION_POINTS, len(split))
    device = next(potential.vaebm.parameters()).device
    x = split.batch(torch.arange(num), stream(seed, "dequantise")).to(device)
    with torch.no_grad():
        energy = torch.cat([potential.vaebm.energy(rows) for rows in x.split(1_000)]).double()
    log_z = log_z_from_vae(potential, stream(seed, "log_z", device=device), num_draws)
    error = math.hypot(float(energy.std()) / math.sqrt(num), log_z.error)
    return Gain(-float(energy.mean()) - log_z.value, error, log_z)


class NegativePhase:
    """The three ways to the negative phase: ratio, importance weights, chains.

    Args:
        config: the run's configuration.
        potential: of the VAEBM in training.
    """

    def __init__(self, config: Config, potential: NoisePotential) -> None:
        self.config = config
        self.potential = potential
        self.kernel: Kernel = build_kernel(config.kernel, potential)
        reference = potential.draw_reference(
            stream(config.seed, "replay", device=config.device), config.ebm.replay_size
        )
        self.replay = Replay(reference)
        self.params: KernelParams = start_params(config.kernel, reference)

    def __call__(self, energy_data: Tensor, step: int) -> Phase:
        """Run the negative phase of one step.

        Args:
            energy_data: energies of the data batch, with gradient, ``(n,)``.
            step: number of this step.

        Returns:
            Loss and record.
        """
        loop = self.config.ebm
        generator = stream(self.config.seed, "negatives", step, device=self.config.device)
        if loop.objective == "ratio" or step < loop.ratio_steps:
            return self._ratio(energy_data, generator)
        if loop.negatives == "importance":
            return self._importance(energy_data, generator)
        return self._chains(energy_data, generator, replay_probability(loop, step))

    def state(self) -> dict[str, Any]:
        """Return the replay and the step size, for a checkpoint."""
        return {"replay": self.replay.positions, "step_size": float(self.params.step_size)}

    def load(self, state: Mapping[str | int, Any]) -> None:
        """Take up the replay and the step size of a checkpoint's state."""
        self.replay.positions.copy_(state["replay"])
        self.params = with_step_size(self.params, state["step_size"])

    def _vae_energies(self, generator: torch.Generator, num: int) -> Tensor:
        return self.potential(self.potential.draw_reference(generator, num))

    def _ratio(self, energy_data: Tensor, generator: torch.Generator) -> Phase:
        energy = self._vae_energies(generator, self.config.ebm.num_importance)
        loss = softplus(energy_data).mean() + softplus(-energy).mean()
        return Phase(loss, _weighted_mean(energy), energy, {"weight_ess": weights_ess(-energy.detach())})

    def _importance(self, energy_data: Tensor, generator: torch.Generator) -> Phase:
        energy = self._vae_energies(generator, self.config.ebm.num_importance)
        model = _weighted_mean(energy)
        return Phase(energy_data.mean() - model, model, energy, {"weight_ess": weights_ess(-energy.detach())})

    def _chains(self, energy_data: Tensor, generator: torch.Generator, probability: float) -> Phase:
        start, slots = self.replay.take(generator, len(energy_data), probability)
        self.potential.vaebm.energy.requires_grad_(False)
        state, infos = self.kernel.init(start), []
        for _ in range(self.config.ebm.num_transitions):
            state, info = self.kernel.step(generator, state, self.params)
            infos.append(info)
        with torch.no_grad():
            fresh = self._vae_energies(generator, len(start))
        self.potential.vaebm.energy.requires_grad_(True)
        self.replay.put(slots, state.position)
        energy = self.potential.vaebm.energy(self.potential.decode(state.position))
        record = self._chain_record(start, state.position, infos)
        record["weight_ess"] = weights_ess(-fresh)
        self._adapt(record["acceptance_rate"])
        return Phase(energy_data.mean() - energy.mean(), energy.mean(), energy, record)

    def _chain_record(self, start: Tensor, end: Tensor, infos: list[KernelInfo]) -> dict[str, float]:
        mean_squares = self.potential.packing.mean_square(end)
        return {
            "acceptance_rate": float(torch.stack([info.acceptance_rate for info in infos]).mean()),
            "num_divergent": int(torch.stack([info.is_divergent for info in infos]).sum()),
            "step_size": float(self.params.step_size),
            "num_evals": int(torch.stack([info.num_evals for info in infos]).sum()),
            "rms_move": float((end - start).square().mean().sqrt()),
            **{f"eps_mean_square/{name}": float(value.mean()) for name, value in mean_squares.items()},
        }

    def _adapt(self, acceptance_rate: float) -> None:
        """Let the step follow the energy as it changes, by its acceptance rate."""
        if self.kernel.target_acceptance is None:
            return
        log_step = math.log(self.params.step_size) + STEP_SIZE_GAIN * (acceptance_rate - self.kernel.target_acceptance)
        self.params = with_step_size(self.params, min(MAX_STEP_SIZE, math.exp(log_step)))


def _weighted_mean(energy: Tensor) -> Tensor:
    """Estimate the mean energy under h from draws of the VAE, by self-normalised weights, ``()``."""
    return (-energy.detach()).softmax(0) @ energy


def replay_probability(loop: EbmConfig, step: int) -> float:
    """Return the probability that a chain goes on from the replay at a step, after annealing."""
    if not loop.replay_anneal_steps:
        return loop.replay_probability
    return loop.replay_probability * min(1.0, step / loop.replay_anneal_steps)


def fit_ebm(
    run: Run, config: Config, data: Data, vae: HierarchicalVAE, resume: checkpoints.Checkpoint | None = None
) -> VAEBM:
    """Fit the energy, writing metrics and checkpoints into the run.

    All randomness of a step is a function of the seed and the step, so a resumed fit repeats an uninterrupted one
    bit for bit on a CPU.

    Args:
        run: folder to write to.
        config: the run's configuration.
        data: the data.
        vae: stage 1's result; it is frozen.
        resume: checkpoint to continue from.

    Returns:
        The VAEBM with averaged energy weights.

    Raises:
        TrainingError: gradients stopped being finite.
    """
    loop, seed, stage = config.ebm, config.seed, "ebm"
    vaebm = new_vaebm(config, vae)
    energy = vaebm.energy
    average = AveragedWeights(energy, loop.ema_decay)
    with global_rng(seed_for(seed, "spectral")):
        spectral = SpectralPenalty(spectral_layers(energy, has_linear=True)).to(config.device)
    optimizer = GuardedOptimizer(energy.parameters(), loop)
    negatives = NegativePhase(config, noise_potential(vaebm))
    averaged_potential = noise_potential(VAEBM(vae, average.module))
    sampler = KeyedSampler(len(data.train), loop.batch_size, seed_for(seed, "order", stage))
    first = 0
    if resume is not None:
        first = average.num_updates = resume.step
        energy.load_state_dict(resume.weights["energy"])
        average.module.load_state_dict(resume.weights["energy_average"])
        spectral.load_state_dict(resume.weights["spectral"])
        optimizer.load_state_dict(resume.state["optimizer"])
        negatives.load(resume.state)
        run.rewind_metrics(stage, first)

    start = time.perf_counter()
    progress = tqdm(range(first, loop.steps), "stage ebm", loop.steps, initial=first, disable=None, mininterval=1)
    for step in progress:
        x = data.train.batch(sampler.indices(step), stream(seed, "dequantise", stage, step)).to(config.device)
        energy_data = energy(x)
        phase = negatives(energy_data, step)
        loss = phase.loss
        if loop.energy_l2:
            loss = loss + loop.energy_l2 * (energy_data.square().mean() + phase.penalty_energies.square().mean())
        if loop.spectral_penalty:
            loss = loss + loop.spectral_penalty * spectral()
        grad_norm = optimizer.step(loss, step)
        average.update(energy)
        done = step + 1

        if done % loop.log_every == 0 or done == loop.steps:
            gap = float(energy_data.detach().mean()) - float(phase.energy_model.detach())
            record: dict[str, float | int | str] = {
                "stage": stage,
                "step": done,
                "seconds": time.perf_counter() - start,
                "loss": float(loss.detach()),
                "energy_data": float(energy_data.detach().mean()),
                "energy_model": float(phase.energy_model.detach()),
                "energy_gap": gap,
                "lr": learning_rate(loop, step),
                "grad_norm": grad_norm,
                "num_skipped": optimizer.num_skipped,
            }
            run.log(record | phase.record)
            progress.set_postfix(gap=f"{gap:.3f}", refresh=False)
        is_checkpoint = done % loop.checkpoint_every == 0 or done == loop.steps
        if is_checkpoint or done % loop.validate_every == 0:
            gain = _validate(run, config, averaged_potential, data.validation, done)
            progress.write(f"step {done}: validation gain {gain.nats:.3f} nats, log Z {gain.log_z.value:.3f}")
        if is_checkpoint:
            weights = {"energy": energy, "energy_average": average.module, "spectral": spectral}
            _save(run, config, done, weights, {"optimizer": optimizer.state_dict(), **negatives.state()}, gain)
    return VAEBM(vae, average.module)


def _save(
    run: Run, config: Config, step: int, modules: Mapping[str, nn.Module], state: dict[str, Any], gain: Gain
) -> None:
    """Write a checkpoint; only a certified likelihood gain is a score."""
    is_certified = gain.log_z.ess >= CERTIFIED_ESS and math.isfinite(gain.nats)
    checkpoints.save(
        run.checkpoints("ebm"),
        stage="ebm",
        step=step,
        weights={name: module.state_dict() for name, module in modules.items()},
        state=state,
        config=to_dict(config),
        score=gain.nats if is_certified else None,
    )


def _validate(run: Run, config: Config, potential: NoisePotential, split: Split, step: int) -> Gain:
    """Measure the likelihood gain on held-out data, and log it."""
    gain = likelihood_gain(potential, split, seed_for(config.seed, "validation"), config.ebm.num_validation_draws)
    run.log(
        {
            "stage": "ebm",
            "step": step,
            "validation_gain_nats": gain.nats,
            "validation_gain_error_nats": gain.error,
            "log_z": gain.log_z.value,
            "log_z_ess": gain.log_z.ess,
        }
    )
    return gain
