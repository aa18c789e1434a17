"""VAEBM as one Pyro program: ``h(x, z) = p(x, z) exp(-E(x)) / Z`` (Xiao et al. 2021, equation 3)."""

from __future__ import annotations

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vae import HierarchicalVAE, num_rows


class VAEBM(PyroModule):
    """The product density, unnormalised: the VAE's model and one factor, ``-E(x)``.

    Decentring every site, ``poutine.reparam(vaebm, LocScaleReparam(0.0))``, gives the program of the noises, whose
    log density is minus the potential of :func:`ppl_vaebm.inference.potential.noise_potential`, up to a constant.

    Args:
        vae: the VAE; its model is the base measure. It is frozen and put in evaluation mode.
        energy: the energy, ``energy(x, z)`` to ``(n,)`` nats.
    """

    def __init__(self, vae: HierarchicalVAE, energy: Energy) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.energy = energy

    def forward(self, x: Tensor | None = None, num: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program.

        Args:
            x: data to observe, ``(n, *event_shape)``; ``None`` samples it.
            num: rows to sample where ``x`` is not given.

        Returns:
            ``x`` and the latents.

        Raises:
            ValueError: neither ``x`` nor ``num`` was given.
        """
        rows = num_rows(x, num)
        with pyro.plate("data", rows):
            x, z = self.vae.model.sites(x, rows)
            pyro.factor("energy", -self.energy(x, z))
        return x, z
