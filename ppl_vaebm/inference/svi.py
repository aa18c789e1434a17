"""Stage 1: fit the VAE by stochastic variational inference."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pyro
import torch
from tqdm import tqdm

from ppl_vaebm import checkpoint as checkpoints
from ppl_vaebm.config import Config
from ppl_vaebm.data import Data, KeyedSampler, Split
from ppl_vaebm.inference.elbo import AnnealedELBO
from ppl_vaebm.inference.training import AveragedWeights, GuardedOptimizer, cosine_rate
from ppl_vaebm.models.small_vae import build_vae
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.options import to_dict
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.run import Run

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
        return build_vae(config.model, data.event_shape).to(config.device)


def mean_elbo(vae: HierarchicalVAE, split: Split, seed: int, limit: int = MAX_VALIDATION_POINTS) -> Elbo:
    """Estimate the mean ELBO of a split's first points, one draw of z each.

    Args:
        vae: the VAE, in evaluation mode.
        split: the data.
        seed: of the dequantisation and of z.
        limit: largest number of points.

    Returns:
        The estimate.
    """
    num = min(limit, len(split))
    device = next(vae.parameters()).device
    x = split.batch(torch.arange(num), stream(seed, "dequantise")).to(device)
    elbo = AnnealedELBO()
    with torch.no_grad(), global_rng(seed_for(seed, "posterior")):
        loss = elbo.loss(vae.model, vae.guide, x)
    return Elbo(-loss / num, {name: value / num for name, value in elbo.kl_nats.items()})


def fit_svi(run: Run, config: Config, data: Data, resume: checkpoints.Checkpoint | None = None) -> HierarchicalVAE:
    """Fit the VAE, writing metrics and checkpoints into the run.

    All randomness of a step is a function of the seed and the step, so a resumed fit repeats an uninterrupted one
    bit for bit on a CPU.

    Args:
        run: folder to write to.
        config: the run's configuration.
        data: the data.
        resume: checkpoint to continue from.

    Returns:
        The VAE with averaged weights, in evaluation mode.

    Raises:
        TrainingError: gradients stopped being finite.
    """
    loop, seed, stage = config.svi, config.seed, "svi"
    vae = new_vae(config, data)
    average = AveragedWeights(vae, loop.ema_decay)
    elbo = AnnealedELBO()
    objective = elbo(vae.model, vae.guide)
    optimizer = GuardedOptimizer(objective.parameters(), loop)
    sampler = KeyedSampler(len(data.train), loop.batch_size, seed_for(seed, "order", stage))
    first = 0
    if resume is not None:
        vae.load_state_dict(resume.weights["vae"])
        average.module.load_state_dict(resume.weights["vae_average"])
        average.num_updates = resume.step
        optimizer.load_state_dict(resume.state["optimizer"])
        first = resume.step
        run.rewind_metrics(stage, first)

    vae.train()
    start = time.perf_counter()
    progress = tqdm(range(first, loop.steps), "stage svi", loop.steps, initial=first, disable=None, mininterval=1)
    for step in progress:
        x = data.train.batch(sampler.indices(step), stream(seed, "dequantise", stage, step)).to(config.device)
        elbo.kl_weight = min(1.0, step / loop.kl_warmup_steps) if loop.kl_warmup_steps else 1.0
        with global_rng(seed_for(seed, "posterior", stage, step)), pyro.validation_enabled(False):
            loss = objective(x) / len(x)
        grad_norm = optimizer.step(loss, step)
        average.update(vae)
        done = step + 1

        if done % loop.log_every == 0 or done == loop.steps:
            kl = {f"kl_nats/{name}": value / len(x) for name, value in elbo.kl_nats.items()}
            total_kl = sum(kl.values())
            record: dict[str, float | int | str] = {
                "stage": stage,
                "step": done,
                "seconds": time.perf_counter() - start,
                "loss": float(loss.detach()),
                "elbo_nats": -float(loss.detach()) - (1 - elbo.kl_weight) * total_kl,
                "kl_nats": total_kl,
                **kl,
                "kl_weight": elbo.kl_weight,
                "lr": cosine_rate(loop, step),
                "grad_norm": grad_norm,
                "num_skipped": optimizer.num_skipped,
            }
            run.log(record)
            progress.set_postfix(elbo=f"{record['elbo_nats']:.3f}", refresh=False)
        if done % loop.checkpoint_every == 0 or done % loop.validate_every == 0 or done == loop.steps:
            validation = mean_elbo(average.module, data.validation, seed_for(seed, "validation"))
            run.log({"stage": stage, "step": done, "validation_elbo_nats": validation.elbo_nats})
            progress.write(f"step {done}: validation ELBO {validation.elbo_nats:.3f} nats")
        if done % loop.checkpoint_every == 0 or done == loop.steps:
            checkpoints.save(
                run.checkpoints(stage),
                stage=stage,
                step=done,
                weights={"vae": vae.state_dict(), "vae_average": average.module.state_dict()},
                state={"optimizer": optimizer.state_dict()},
                config=to_dict(config),
                # While the KL warms up the bound is not what is maximised, so only later steps can be the best.
                score=validation.elbo_nats if elbo.kl_weight == 1.0 and math.isfinite(validation.elbo_nats) else None,
            )
    return average.module
