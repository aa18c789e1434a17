"""The terms of the first latent alone: its own one, fitted before all else, and the joint term's balance, after it.

Most of what is wrong with a small VAE's samples is the prior of that latent. Its own term is fitted by maximum
likelihood: the target is the aggregate posterior, the distribution that the guide gives the first latent over the data,
and the model is ``exp(-E_1(z_1)) p(z_1)``, a learned prior (Pang et al. 2020). Stage 2's loop leaves the term as it is.

The joint term J multiplies that density by ``E[exp(-J) | z_1]`` over VAE samples given z_1. Chains of images are too
few and too slow to teach J that this factor should be constant. With ``B(z_1) = log E[exp(-J) | z_1]`` in the energy it
is 1: under ``exp(-E_1 - J - B)`` the first latent has the density that its own term gives it. B is the minimiser of the
convex ``E[exp(-J - B) + B]``, an average over pairs of z_1 and one draw each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vaebm.config import Config
from ppl_vaebm.config.parsing import to_dict
from ppl_vaebm.data.splits import Split
from ppl_vaebm.inference.latent_exchange import SWEEPS_PER_SWAP, LatentStore, with_first
from ppl_vaebm.inference.optim import AveragedWeights, DivergedError, GuardedOptimizer, cosine_adam
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

TERM_STAGE, BALANCE_STAGE = "ebm-latent", "ebm-balance"
"""Stages under which the two parts write their records, and the first its checkpoint."""
# Of the term. Chosen by us on Fashion-MNIST; a larger store follows the term later from one mode to another.
BATCH_SIZE, NUM_CHAINS, STORE_SIZE, NUM_SWEEPS = 512, 128, 256, 4
TERM_RATE, TERM_L2 = 2e-3, 1e-5
BALANCE_RATE = 2e-3
"""Chosen by us."""
NUM_POSTERIOR_DRAWS = 3
"""Posterior draws of the first latent that are kept of every data point. Chosen by us."""
POSTERIOR_BLOCK = 1_000
"""Data points whose draws share a random stream, and that the guide reads at once."""

Record = Callable[[], dict[str, float]]


def new_store(config: Config, vaebm: VAEBM) -> LatentStore | None:
    """Make the persistent chains of the first latent, for an energy that has its term."""
    if vaebm.energy.latent_net is None:
        return None
    starts = stream(config.seed, "latent-store", device=config.device)
    return LatentStore(vaebm, starts, max(STORE_SIZE, config.ebm.batch_size))


def load_or_fit_latent_term(run: Run, config: Config, train: Split, vaebm: VAEBM, store: LatentStore) -> None:
    """Give an energy its finished term and the store its chains: from the part's checkpoint, or fitted and saved."""
    net, folder = vaebm.energy.latent_net, run.checkpoints(TERM_STAGE)
    assert net is not None
    if checkpoints.available(folder):
        saved = checkpoints.load(folder)
        net.load_state_dict(saved.weights["latent_net"])
        store.load(saved.state)
        return
    fit_latent_term(run, config, train, vaebm, store)
    weights, step = {"latent_net": net.state_dict()}, config.ebm.latent.steps
    checkpoints.save(
        folder, stage=TERM_STAGE, step=step, weights=weights, state=store.state(), config=to_dict(config), score=None
    )


def fit_latent_term(run: Run, config: Config, train: Split, vaebm: VAEBM, store: LatentStore) -> None:
    """Fit the first latent's own term, in place; the store's chains, which are moved, are its negatives.

    Raises:
        DivergedError: the loss or its gradient stopped being finite.
    """
    loop, net = config.ebm.latent, vaebm.energy.latent_net
    assert net is not None
    average = AveragedWeights(net, loop.ema_decay)
    z = aggregate_posterior(config, train, vaebm)
    name = next(iter(vaebm.vae.model.latent_shapes))

    def evaluate(step: int) -> tuple[Tensor, Record]:
        generator = stream(config.seed, "latent-term", step, device=config.device)
        rows = z[torch.randint(len(z), (BATCH_SIZE,), generator=generator, device=z.device)]
        net.requires_grad_(False)
        noise, _, infos = store.advance(generator, NUM_CHAINS, NUM_SWEEPS)
        net.requires_grad_(True)
        data = vaebm.energy.latent_term({name: rows})
        model = vaebm.energy.latent_term(vaebm.vae.first_latent(noise.unflatten(1, rows.shape[1:])))
        gap = data.mean() - model.mean()
        return gap + TERM_L2 * (data.square().mean() + model.square().mean()), lambda: {
            "energy_gap": float(gap.detach()),
            "energy_sd": float(data.detach().std()),
            "acceptance_rate": float(torch.stack([info.acceptance_rate for info in infos]).mean()),
            "step_size": float(store.params.step_size),
            "eps_mean_square": float(noise.square().mean()),
        }

    optimizer = cosine_adam(net.parameters(), TERM_RATE, loop.steps)
    _minimize(run, config, TERM_STAGE, optimizer, evaluate, 0, after=lambda: average.update(net))
    # Modes gain and lose weight by turns while chains catch up with them; the average has the weights in between.
    net.load_state_dict(average.module.state_dict())
    net.requires_grad_(False)


def aggregate_posterior(config: Config, split: Split, vaebm: VAEBM) -> Tensor:
    """Draw the first latent of every data point from the guide, ``(NUM_POSTERIOR_DRAWS * n, *shape)``."""
    parts = []
    for index, rows in enumerate(torch.arange(len(split)).split(POSTERIOR_BLOCK)):
        x = split.batch(rows, stream(config.seed, "dequantise", TERM_STAGE, index)).to(config.device)
        with torch.no_grad(), global_rng(seed_for(config.seed, "posterior", TERM_STAGE, index)):
            parts.append(vaebm.vae.first_posterior(x).sample((NUM_POSTERIOR_DRAWS,)))
    return torch.cat(parts, dim=1).flatten(0, 1)


def lacks_balance(energy: Energy) -> bool:
    """Return whether an energy is configured with a balance of its joint term that is not fitted yet."""
    net = energy.balance_net
    return net is not None and not any(bool(parameter.any()) for parameter in net[-1].parameters())


def fit_latent_balance(run: Run, config: Config, potential: NoisePotential, store: LatentStore, num_done: int) -> None:
    """Fit the joint term's balance, in place, after ``num_done`` steps of stage 2, which name the random streams.

    The store's chains of the first latent under its own term are moved.

    Raises:
        DivergedError: the joint term's range is so large that the loss is not finite.
    """
    energy, vae = potential.vaebm.energy, potential.vaebm.vae
    net = energy.balance_net
    assert net is not None
    last = net[-1]
    assert isinstance(last, nn.Linear)
    net.requires_grad_(True)

    def evaluate(step: int) -> tuple[Tensor, Record]:
        generator = stream(config.seed, "balance", num_done, step, device=config.device)
        noise, _, _ = store.advance(generator, len(store.positions), SWEEPS_PER_SWAP)
        with torch.no_grad():
            draws = with_first(potential.draw_reference(generator, len(noise)), noise)
            rest = potential(draws) - store.potential(noise)
            z = vae.first_latent(noise.unflatten(1, store.potential.shape))
            if step == 0:  # the best constant, so that no step begins with an exponential far from 1
                shift = torch.logsumexp(-rest, 0) - math.log(len(rest))
                last.bias.add_(shift)
                rest = rest + shift
            joint = rest - energy.balance_term(z)
        balance = energy.balance_term(z)
        ratio = (-joint - balance).exp()
        return (ratio + balance).mean(), lambda: {
            "balance_sd": float(balance.detach().std()),
            "joint_sd": float(joint.std()),
            "mean_ratio": float(ratio.detach().mean()),
        }

    optimizer = cosine_adam(net.parameters(), BALANCE_RATE, config.ebm.latent.balance_steps)
    _minimize(run, config, BALANCE_STAGE, optimizer, evaluate, num_done - 1)
    net.requires_grad_(False)


def _minimize(
    run: Run,
    config: Config,
    stage: str,
    optimizer: GuardedOptimizer,
    evaluate: Callable[[int], tuple[Tensor, Record]],
    step: int,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run a part's optimiser steps and log them under a stage; raise DivergedError if a gradient is not finite.

    ``evaluate`` maps the number of a step to its loss and to what is logged of it, ``after`` is called after each step,
    and ``step`` is of stage 2's loop, for the message of an error.
    """
    name = {TERM_STAGE: "first latent's term", BALANCE_STAGE: "joint term's balance"}[stage]
    run.rewind_metrics(stage, 0)  # of an attempt that was interrupted
    start = time.perf_counter()
    for index in tqdm(range(optimizer.schedule.num_steps), f"stage ebm, {name}", disable=None, mininterval=1):
        loss, record = evaluate(index)
        optimizer.step(loss, index)
        if optimizer.num_bad_in_a_row:
            raise DivergedError(step, f"the loss of the {name} is {float(loss.detach())} in its step {index + 1}")
        after()
        if (index + 1) % config.ebm.log_every == 0:
            run.log({"stage": stage, "step": index + 1, "seconds": time.perf_counter() - start, **record()})
