"""The balance of an energy's joint term: a term of the first latent that leaves that latent's density alone.

``exp(-E_1(z_1)) p(z_1)`` is fitted to the guide's law of the first latent over the data, and then multiplied by
``exp(-J(x, z))``, which changes it by the factor ``E[exp(-J) | z_1]`` over the VAE's draws given z_1. Chains of images
are too few and too slow to teach J that this factor should be constant, and it is not. With
``B(z_1) = log E[exp(-J) | z_1]`` in the energy it is 1: under ``exp(-E_1 - J - B)`` the first latent has the density
that its own term gives it, and J says what x is like given it. Given J, that is the B of the greatest likelihood.

B is the minimiser of the convex ``E[exp(-J - B) + B]``, an average over pairs of z_1 and one draw each, without the
bias of the logarithm of a mean of few.
"""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from tqdm import tqdm

from ppl_vaebm.config import Config
from ppl_vaebm.inference.latent_chains import SWEEPS_PER_EXCHANGE, LatentStore, with_first
from ppl_vaebm.inference.optim import CosineAdam, DivergedError
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.run import Run

STAGE = "ebm-balance"
"""Stage of this part's lines in metrics.jsonl."""
LEARNING_RATE = 2e-3
"""Adam's, at the start of a cosine. Chosen by us."""


def fit_latent_balance(run: Run, config: Config, potential: NoisePotential, store: LatentStore, step: int) -> None:
    """Fit the balance, in place; the rest of the energy stays as it is.

    Args:
        run: whose metrics are written.
        config: the run's configuration.
        potential: of the VAEBM, whose energy has the balance.
        store: chains of the first latent under its own term, which are moved.
        step: steps of stage 2 that are done; names the streams.

    Raises:
        DivergedError: the joint term's range is so large that the balance is not finite.
    """
    energy, vae = potential.vaebm.energy, potential.vaebm.vae
    net = energy.balance_net
    assert net is not None
    last = net[-1]
    assert isinstance(last, nn.Linear)
    net.requires_grad_(True)
    run.rewind_metrics(STAGE, 0)  # of an attempt that came to nothing
    num_steps, start = config.ebm.latent.balance_steps, time.perf_counter()
    optimizer = CosineAdam(net.parameters(), LEARNING_RATE, num_steps)
    for index in tqdm(range(num_steps), "stage ebm, balance", disable=None, mininterval=1):
        generator = stream(config.seed, "balance", step, index, device=config.device)
        noise, _, _ = store.advance(generator, len(store.positions), SWEEPS_PER_EXCHANGE)
        with torch.no_grad():
            draws = with_first(potential.draw_reference(generator, len(noise)), noise)
            rest = potential(draws) - store.potential(noise)
            z = vae.first_latent(noise.unflatten(1, store.potential.shape))
            if index == 0:  # the best constant, so that no step begins with an exponential far from 1
                shift = torch.logsumexp(-rest, 0) - math.log(len(rest))
                last.bias.add_(shift)
                rest = rest + shift
            joint = rest - energy.balance_term(z)
        balance = energy.balance_term(z)
        ratio = (-joint - balance).exp()
        loss = (ratio + balance).mean()
        if not bool(loss.isfinite()):
            found = f"the loss of the joint term's balance is {float(loss.detach())} in its step {index + 1}"
            raise DivergedError(step - 1, found)
        optimizer.step(loss)
        if (index + 1) % config.ebm.log_every == 0:
            run.log(
                {
                    "stage": STAGE,
                    "step": index + 1,
                    "seconds": time.perf_counter() - start,
                    "balance_sd": float(balance.detach().std()),
                    "joint_sd": float(joint.std()),
                    "mean_ratio": float(ratio.detach().mean()),
                }
            )
    net.requires_grad_(False)
