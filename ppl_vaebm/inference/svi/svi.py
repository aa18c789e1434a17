"""Stage 1: fit the VAE by stochastic variational inference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ppl_vaebm.config import Config, SviConfig
from ppl_vaebm.config.parsing import to_dict
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.data.splits import Split
from ppl_vaebm.devices import current_process
from ppl_vaebm.inference.elbo import BalancedELBO, balance_coefficients
from ppl_vaebm.inference.likelihood import elbo_rows
from ppl_vaebm.inference.optim import AveragedWeights, DivergedError, copy_buffers, stage_optimizer
from ppl_vaebm.inference.svi.batch_norm import prior_statistics
from ppl_vaebm.models.layers import SpectralPenalty, norm_gain_penalty, spectral_layers
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

STAGE = "svi"
MAX_VALIDATION_POINTS = 2_000


@dataclass(frozen=True)
class Elbo:
    """A mean ELBO over data."""

    elbo_nats: float
    """Per data point."""
    kl_nats: dict[str, float]
    """Of each latent group, per data point."""


def new_vae(config: Config, data: Data) -> HierarchicalVAE:
    """Make a VAE with the run's initial weights."""
    with global_rng(seed_for(config.seed, "vae")):
        return build_vae(config.model, data.event_shape, data.levels, data.is_dequantized).to(config.device)


def mean_elbo(vae: HierarchicalVAE, split: Split, seed: int, limit: int = MAX_VALIDATION_POINTS) -> Elbo:
    """Estimate the mean ELBO of a split's first points, one draw of z each, by a VAE in evaluation mode."""
    num = min(limit, len(split))
    device = next(vae.parameters()).device
    x = split.batch(torch.arange(num), stream(seed, "dequantise")).to(device)
    elbo, kl = elbo_rows(vae, x, seed_for(seed, "posterior"))
    return Elbo(float(elbo.mean()), {name: float(value.mean()) for name, value in kl.items()})


def kl_weight(loop: SviConfig, step: int) -> float:
    """Return the weight of the KL term at a step: it rises from 0, or its floor, to 1 over the warm-up."""
    risen = step / loop.kl_warmup_steps if loop.kl_warmup_steps else 1.0
    return max(loop.min_kl_weight, min(1.0, risen))


def penalty_weight(loop: SviConfig, kl_weight: float) -> float:
    """Return the weight of the spectral penalty, which moves in log scale as the KL's weight rises from 0 to 1."""
    if loop.spectral_penalty_start is None:
        return loop.spectral_penalty
    start, end = math.log(loop.spectral_penalty_start), math.log(loop.spectral_penalty)
    return math.exp((1 - kl_weight) * start + kl_weight * end)


class Objective(nn.Module):
    """Loss of a step: minus the weighted ELBO per data point, and the penalties; the seed starts power iterations."""

    def __init__(self, vae: HierarchicalVAE, loop: SviConfig, seed: int) -> None:
        super().__init__()
        balance = balance_coefficients(vae.model.latent_shapes) if loop.kl_balance else None
        self.elbo = BalancedELBO(balance, loop.free_bits)
        self.loop = loop
        module = self.elbo(vae.model, vae.guide)
        # DDP averages the processes' gradients, so each one's loss is a mean over its data.
        self.module = DistributedDataParallel(module) if current_process().world > 1 else module
        self.vae = (vae,)  # in a tuple, so that its weights are registered once
        with global_rng(seed_for(seed, "spectral")):
            self.spectral = SpectralPenalty(spectral_layers(vae, has_linear=False) if loop.spectral_penalty else [])

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Evaluate the objective for a batch at a step, ``()``, nats per data point."""
        self.elbo.kl_weight = kl_weight(self.loop, step)
        half = torch.autocast(x.device.type, torch.bfloat16) if self.loop.bf16 else nullcontext()
        with half, pyro.validation_enabled(False):
            loss: Tensor = self.module(x) / len(x)
        if self.loop.spectral_penalty:
            penalty = self.spectral() + norm_gain_penalty(self.vae[0])
            loss = loss + penalty_weight(self.loop, self.elbo.kl_weight) * penalty
        return loss


class Training:
    """Everything that a step of stage 1 changes, at the start of the stage."""

    def __init__(self, config: Config, data: Data) -> None:
        self.config = config
        self.vae = new_vae(config, data)
        self.average = AveragedWeights(self.vae, config.svi.ema_decay)
        self.objective = Objective(self.vae, config.svi, config.seed)
        self.optimizer = stage_optimizer(self.vae.parameters(), config.svi)

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint holds."""
        return {"vae": self.vae, "vae_average": self.average.module, "spectral": self.objective.spectral}

    def load(self, saved: checkpoints.Checkpoint) -> None:
        """Restore a checkpoint."""
        for name, module in self.modules().items():
            module.load_state_dict(saved.weights[name])
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.average.num_updates = saved.state["num_averaged"]

    def save(self, run: Run, step: int, score: float | None) -> None:
        """Write a checkpoint, with the batch statistics of prior samples where they are asked for."""
        weights = {name: module.state_dict() for name, module in self.modules().items()}
        loop, seed = self.config.svi, seed_for(self.config.seed, "prior statistics")
        if loop.norm_temperature is not None:
            weights["prior_statistics"] = prior_statistics(
                self.average.module, loop.norm_temperature, loop.norm_batches, seed
            )
        state = {
            "optimizer": self.optimizer.state_dict(),
            "num_averaged": self.average.num_updates,
            "norm_temperature": loop.norm_temperature,
        }
        config, folder = to_dict(self.config), run.checkpoints(STAGE)
        checkpoints.save(folder, stage=STAGE, step=step, weights=weights, state=state, config=config, score=score)

    def record(self, step: int, num: int, loss: Tensor, grad_norm: float) -> dict[str, float | int | str]:
        """Return a step's line of metrics; ``num`` is the number of its data points."""
        elbo = self.objective.elbo
        kl = {f"kl_nats/{name}": float(value) / num for name, value in elbo.kl_nats.items()}
        return {
            "stage": STAGE,
            "step": step + 1,
            "loss": float(loss.detach()),
            "elbo_nats": float(elbo.elbo_nats) / num,
            "kl_nats": sum(kl.values()),
            **kl,
            "kl_weight": elbo.kl_weight,
            "lr": self.optimizer.learning_rate,
            "grad_norm": grad_norm,
            "num_skipped": self.optimizer.num_skipped,
        }


def fit_svi(
    run: Run,
    config: Config,
    data: Data,
    resume: checkpoints.Checkpoint | None = None,
    at_checkpoint: Callable[[HierarchicalVAE, int], None] | None = None,
) -> HierarchicalVAE:
    """Fit the VAE, writing metrics and checkpoints into the run.

    All randomness of a step is a function of the seed, the step and the process, so a resumed fit repeats an
    uninterrupted one bit for bit on a CPU.

    Of several processes the first writes. ``resume`` is the checkpoint to continue from; ``at_checkpoint`` is called
    after each checkpoint with the averaged VAE and the steps done. Returns the VAE with averaged weights, in evaluation
    mode.

    Raises:
        DivergedError: gradients stopped being finite, or the validation ELBO did.
    """
    loop, seed, process = config.svi, config.seed, current_process()
    training = Training(config, data)
    vae, average, objective, optimizer = training.vae, training.average, training.objective, training.optimizer
    order = seed_for(seed, "order", STAGE)
    sampler = KeyedSampler(len(data.train), loop.batch_size, order, process.rank, process.world)
    first = 0
    if resume is not None:
        first = resume.step
        training.load(resume)
        if process.is_first:
            run.rewind_metrics(STAGE, first)

    vae.train()
    start = time.perf_counter()
    shown = None if process.is_first else True  # None: a progress bar where there is a terminal
    progress = tqdm(range(first, loop.steps), "stage svi", loop.steps, initial=first, disable=shown, mininterval=1)
    for step in progress:
        x = data.train.batch(sampler.indices(step), stream(seed, "dequantise", STAGE, step, *process.key))
        with global_rng(seed_for(seed, "posterior", STAGE, step, *process.key)):
            loss = objective(x.to(config.device), step)
        grad_norm = optimizer.step(loss, step)
        failure = optimizer.failure(loss)
        if failure is not None:
            raise DivergedError(step, failure)
        if optimizer.num_bad_in_a_row:
            copy_buffers(average.module, vae)  # a batch that overflowed may have spoilt the running statistics
        else:
            average.update(vae)
        done = step + 1
        if not process.is_first:
            continue

        is_last = done == loop.steps
        if done % loop.log_every == 0 or is_last:
            seconds = time.perf_counter() - start
            record = training.record(step, len(x), loss, grad_norm) | {"seconds": seconds}
            run.log(record)
            progress.set_postfix(elbo=f"{record['elbo_nats']:.3f}", refresh=False)
        is_checkpoint = done % loop.checkpoint_every == 0 or is_last
        if is_checkpoint or done % loop.validate_every == 0:
            elbo_nats = _validate(run, config, average.module, data.validation, done)
            progress.write(f"step {done}: validation ELBO {elbo_nats:.3f} nats")
        if is_checkpoint:
            # While the KL warms up another bound is maximised, so only later steps can be the best.
            score = elbo_nats if objective.elbo.kl_weight == 1.0 else None
            training.save(run, done, score)
            if at_checkpoint is not None:
                at_checkpoint(average.module, done)
    return average.module


def _validate(run: Run, config: Config, vae: HierarchicalVAE, split: Split, num_done: int) -> float:
    """Log and return the ELBO of held-out data, nats per data point; raise DivergedError if it is not finite."""
    with pyro.validation_enabled(False):  # a value that is not finite is reported below
        elbo_nats = mean_elbo(vae, split, seed_for(config.seed, "validation")).elbo_nats
    run.log({"stage": STAGE, "step": num_done, "validation_elbo_nats": elbo_nats})
    if not math.isfinite(elbo_nats):
        raise DivergedError(num_done - 1, f"the validation ELBO is {elbo_nats}")
    return elbo_nats
