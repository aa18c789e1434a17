"""Stage 2's first part: maximum likelihood of the energy's term of the first latent, before any image is looked at.

The target is the aggregate posterior, the law that the guide gives the first latent over the data, and the model is
``exp(-E_1(z_1)) p(z_1)``: a learned prior (Pang et al. 2020; Aneja et al. 2021 learn such by density ratios, which here
saturate, for the two laws are ten nats apart). Most of what a small VAE's draws have wrong is in that latent.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vaebm.config import Config
from ppl_vaebm.data.splits import Split
from ppl_vaebm.inference.latent_chains import LatentStore
from ppl_vaebm.inference.optim import AveragedWeights, CosineAdam, DivergedError
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs.run import Run

STAGE = "ebm-latent"
"""Stage of this part's lines in metrics.jsonl."""
NUM_DRAWS = 3
"""Posterior draws of the first latent that are kept of every data point. Chosen by us."""
ROWS = 1_000
"""Data points that the guide reads at once, at most."""


def fit_latent_term(
    run: Run,
    config: Config,
    train: Split,
    vaebm: VAEBM,
    store: LatentStore,
    *,
    rate_factor: float = 1.0,
    seed: int | None = None,
) -> None:
    """Learn the term, in place; the chains of the store are its negatives, and stay where they are at the end.

    Args:
        run: whose metrics are written.
        config: the run's configuration.
        train: the data.
        vaebm: with an energy that has the term.
        store: its chains.
        rate_factor: what the learning rate is multiplied by; the guard lowers it where this part has diverged.
        seed: of the steps' noise, which the guard changes there too; the run's if not given.

    Raises:
        DivergedError: the energies stopped being finite.
    """
    loop, net = config.ebm.latent, vaebm.energy.latent_net
    assert net is not None
    seed = config.seed if seed is None else seed
    run.rewind_metrics(STAGE, 0)  # of an attempt that came to nothing
    optimizer = CosineAdam(net.parameters(), rate_factor * loop.learning_rate, loop.steps)
    average = AveragedWeights(net, loop.ema_decay)
    z = aggregate_posterior(config, train, vaebm)
    name, start = next(iter(vaebm.vae.model.latent_shapes)), time.perf_counter()
    for step in tqdm(range(loop.steps), "stage ebm, first latent", disable=None, mininterval=1):
        generator = stream(seed, "latent-term", step, device=config.device)
        rows = z[torch.randint(len(z), (loop.batch_size,), generator=generator, device=z.device)]
        net.requires_grad_(False)
        noise, _, infos = store.advance(generator, loop.num_chains, loop.num_sweeps)
        net.requires_grad_(True)
        data = vaebm.energy.latent_term({name: rows})
        model = vaebm.energy.latent_term(vaebm.vae.first_latent(noise.unflatten(1, rows.shape[1:])))
        gap = data.mean() - model.mean()
        loss = gap + loop.energy_l2 * (data.square().mean() + model.square().mean())
        if not bool(loss.isfinite()):  # before the stage's first step
            found = f"the loss of the first latent's term is {float(loss.detach())} in its step {step + 1}"
            raise DivergedError(0, found)
        optimizer.step(loss)
        average.update(net)
        if (step + 1) % config.ebm.log_every == 0:
            run.log(
                {
                    "stage": STAGE,
                    "step": step + 1,
                    "seconds": time.perf_counter() - start,
                    "energy_gap": float(gap.detach()),
                    "energy_sd": float(data.detach().std()),
                    "acceptance_rate": float(torch.stack([info.acceptance_rate for info in infos]).mean()),
                    "step_size": float(store.params.step_size),
                    "eps_mean_square": float(noise.square().mean()),
                }
            )
    # Modes gain and lose weight by turns while chains catch up with them; the average has the weights in between.
    net.load_state_dict(average.module.state_dict())


def aggregate_posterior(config: Config, split: Split, vaebm: VAEBM) -> Tensor:
    """Draw the first latent of every data point, :data:`NUM_DRAWS` times each.

    Args:
        config: the run's configuration.
        split: the data.
        vaebm: whose guide draws.

    Returns:
        ``(num, *shape)``, on the run's device.
    """
    parts = []
    for index, rows in enumerate(torch.arange(len(split)).split(ROWS)):
        x = split.batch(rows, stream(config.seed, "dequantise", STAGE, index)).to(config.device)
        with torch.no_grad(), global_rng(seed_for(config.seed, "posterior", STAGE, index)):
            parts.append(vaebm.vae.first_posterior(x).sample((NUM_DRAWS,)))
    return torch.cat(parts, dim=1).flatten(0, 1)
