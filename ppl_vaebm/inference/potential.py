"""From the model to the kernels: named noises as flat rows, and Phi(eps) = E(x(eps)).

In noise space the Normals' scales cancel against the Jacobian of the transport, so the density of VAEBM is
``exp(-E(x(eps))) N(eps; 0, I)`` exactly (Xiao et al. 2021, section 3.2), with no log-scale term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_vaebm.models.vaebm import VAEBM


class Packing:
    """The only translator between named sites and the flat rows that kernels move.

    Args:
        shapes: event shape of every site, in the order of the columns.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self.dim = sum(self.sizes.values())

    def ravel(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Lay sites ``(C, *shape)`` side by side as ``(C, D)``."""
        return torch.cat([sites[name].flatten(1) for name in self.shapes], dim=1)

    def unravel(self, position: Tensor) -> dict[str, Tensor]:
        """Cut ``(C, D)`` into sites ``(C, *shape)``.

        Raises:
            ValueError: another number of columns than the sites have.
        """
        if position.dim() != 2 or position.shape[1] != self.dim:
            raise ValueError(f"expected positions of shape (chains, {self.dim}), got {tuple(position.shape)}")
        parts = position.split(list(self.sizes.values()), dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def mean_square(self, position: Tensor) -> dict[str, Tensor]:
        """Return the mean square of each site's noise per chain, ``(C,)`` each; 1 on average under N(0, I)."""
        return {name: site.flatten(1).square().mean(1) for name, site in self.unravel(position).items()}


class NoisePotential:
    """Phi of a VAEBM as a batched function of flat noise. Made by :func:`noise_potential`."""

    def __init__(self, vaebm: VAEBM) -> None:
        self.vaebm = vaebm
        self.packing = Packing(vaebm.vae.noise_shapes)
        self.rows_per_pass = vaebm.vae.rows_per_pass

    def __call__(self, position: Tensor) -> Tensor:
        """Evaluate ``E(x(eps))``: ``(C, D)`` to ``(C,)``, nats relative to N(0, I)."""
        x, z = self.vaebm.vae.transport(self.packing.unravel(position))
        energy: Tensor = self.vaebm.energy(x, z)
        return energy

    def decode(self, position: Tensor) -> Tensor:
        """Map noise ``(C, D)`` to the x that it stands for, ``(C, *event)``, without a gradient."""
        with torch.no_grad():
            x: Tensor = self.vaebm.vae.transport(self.packing.unravel(position))[0]
        return x

    def draw_reference(self, generator: torch.Generator, num: int) -> Tensor:
        """Draw positions from N(0, I), ``(num, D)``: draws of the VAE, once decoded."""
        like = next(self.vaebm.parameters())
        return torch.randn(num, self.packing.dim, generator=generator, dtype=like.dtype, device=like.device)


def noise_potential(vaebm: VAEBM) -> NoisePotential:
    """Make the potential that every kernel samples.

    Up to the Gaussian constant, ``Phi(eps) + |eps|^2 / 2`` is minus the log density of the program
    :class:`~ppl_vaebm.models.vaebm.VAEBM` with all its sites decentred.

    Args:
        vaebm: the model; its VAE must be in evaluation mode, or rows would depend on each other.

    Returns:
        The potential.

    Raises:
        ValueError: the model is in training mode.
    """
    if vaebm.vae.training:
        raise ValueError("the VAE is in training mode, where batch statistics tie chains together: call vaebm.eval()")
    return NoisePotential(vaebm)
