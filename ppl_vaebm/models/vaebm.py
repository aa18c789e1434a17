"""VAEBM as one Pyro program, ``h(x, z) = p(x, z) exp(-E(x)) / Z`` (Xiao et al. 2021, eq. 3), and how to build it."""

from __future__ import annotations

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from ppl_vaebm.config import Config, ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.nvae import build_nvae
from ppl_vaebm.models.small_vae import build_small_vae
from ppl_vaebm.models.vae import HierarchicalVAE, num_rows
from ppl_vaebm.rng import global_rng, seed_for


class VAEBM(PyroModule):
    """The product density, unnormalised: the VAE's model and one factor, ``-E(x)``.

    Decentring every site, ``poutine.reparam(vaebm, LocScaleReparam(0.0))``, gives the program of the noises, whose
    log density is minus the potential of :func:`ppl_vaebm.inference.potential.noise_potential`, up to a constant. The
    VAE is frozen and put in evaluation mode.
    """

    def __init__(self, vae: HierarchicalVAE, energy: Energy) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.energy = energy

    def forward(self, x: Tensor | None = None, num: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program, and return ``x`` and the latents.

        Args:
            x: data to observe, ``(n, *event_shape)``; ``None`` samples it.
            num: rows to sample where ``x`` is not given; ValueError if neither is.
        """
        rows = num_rows(x, num)
        with pyro.plate("data", rows):
            x, z = self.vae.model.sites(x, rows)
            pyro.factor("energy", -self.energy(x, z))
        return x, z


def build_vae(
    config: ModelConfig, event_shape: torch.Size, levels: int | None = None, is_dequantized: bool = False
) -> HierarchicalVAE:
    """Make the VAE that fits the data, initialised from the global generator.

    Args:
        event_shape: ``(d,)`` for points, ``(channels, side, side)`` for images.
        levels: number of values of a pixel: 2 for binarised images, ``None`` where x is continuous.
        is_dequantized: whether noise fills the levels up, so that two levels are not the signs of binarised images.

    Raises:
        InputError: a kind, a size or a decoder that does not fit the data.
    """
    if config.kind == "nvae":
        if levels == 2 and is_dequantized:
            raise InputError(
                "model.kind nvae takes images of at least 2 bits, got 1: set data.binarize for black and white"
            )
        return build_nvae(config.nvae, event_shape, levels)
    return build_small_vae(config, event_shape)


def build_vaebm(config: Config, vae: HierarchicalVAE) -> VAEBM:
    """Make the product density of stage 1's result, which takes stage 2's temperature, and a new energy.

    Raises:
        InputError: the energy does not fit the data, or x is discrete.
    """
    check_continuous_x(config)
    vae.model.temperature = config.ebm.temperature
    with global_rng(seed_for(config.seed, "energy")):
        energy = build_energy(config.energy, vae.model.event_shape, vae.model.latent_shapes)
    return VAEBM(vae, energy.to(config.device))


def has_discrete_x(config: Config) -> bool:
    """Return whether x has a discrete distribution given the latents."""
    return config.model.kind == "nvae" and config.model.nvae.decoder == "bernoulli"


def check_continuous_x(config: Config) -> None:
    """Raise InputError for a discrete x, which has no gradient in noise space."""
    if has_discrete_x(config):
        raise InputError(
            "stage ebm moves in the noise of x, which a Bernoulli decoder does not have: fit stage svi with "
            "--model.nvae.decoder logistic-mixture or normal, without --data.binarize"
        )
