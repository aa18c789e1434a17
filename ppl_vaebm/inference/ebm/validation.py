"""Likelihood gain of an energy on held-out data, by which stage 2 is validated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.config import Config
from ppl_vaebm.data.splits import Split
from ppl_vaebm.inference.likelihood import CERTIFIED_ESS, log_z_from_vae
from ppl_vaebm.inference.log_z.base import LogZ
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import global_rng, seed_for, stream

MAX_GAIN_POINTS = 10_000
"""Held-out points that the gain is measured on, at most."""
GAIN_BLOCK = 1_000
"""Held-out points whose latents share a random stream."""


class Gain(NamedTuple):
    """How much an energy adds to the VAE's log-likelihood on held-out data."""

    nats: float
    """``mean(-E) - log Z``, nats per data point."""
    error: float
    """Standard error over data and VAE samples."""
    log_z: LogZ

    @property
    def score(self) -> float | None:
        """The gain as a checkpoint's score, if log Z is certified and it is finite."""
        return self.nats if self.log_z.ess >= CERTIFIED_ESS and math.isfinite(self.nats) else None


def likelihood_gain(config: Config, potential: NoisePotential, split: Split, seed: int) -> Gain:
    """Estimate ``E_data[log h - log p]``; for an energy of x and z a lower bound of it, tight where the guide is exact.

    The first :data:`MAX_GAIN_POINTS` points of the split count. The seed is of dequantisation, the data's latents and
    the VAE samples.
    """
    num = min(MAX_GAIN_POINTS, len(split))
    vaebm = potential.vaebm
    device = next(vaebm.parameters()).device
    x, parts = split.batch(torch.arange(num), stream(seed, "dequantise")), []
    for index, block in enumerate(x.split(GAIN_BLOCK)):
        rows = block.to(device)
        z = data_latents(config, vaebm.vae, rows, seed_for(seed, "posterior", index))
        for part in torch.arange(len(rows), device=device).split(potential.rows_per_pass):
            with torch.no_grad():
                parts.append(vaebm.energy(rows[part], z and {name: value[part] for name, value in z.items()}))
    energy = torch.cat(parts).double()
    log_z = log_z_from_vae(potential, stream(seed, "log_z", device=device), config.ebm.num_validation_draws)
    error = math.hypot(float(energy.std()) / math.sqrt(num), log_z.error)
    return Gain(-float(energy.mean()) - log_z.value, error, log_z)


def data_latents(config: Config, vae: HierarchicalVAE, x: Tensor, seed: int) -> dict[str, Tensor] | None:
    """Draw each latent of data ``(n, *event_shape)`` from the guide, once and without a gradient.

    Returns ``None`` for an energy of x alone.
    """
    if config.energy.inputs == "x":
        return None
    with torch.no_grad(), global_rng(seed):
        z: dict[str, Tensor] = vae.guide(x)
    return z
