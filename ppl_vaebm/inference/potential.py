"""From the model to the kernels: named noises as flat rows, and Phi(eps) = E(x(eps)).

In noise space the Normals' scales cancel against the Jacobian of the transport, so the density of VAEBM is
``exp(-E(x(eps))) N(eps; 0, I)`` exactly (Xiao et al. 2021, section 3.2), with no log-scale term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.devices import without_tf32
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.models.saved_bytes import rows_that_fit
from ppl_vaebm.models.vaebm import VAEBM


class NoisePotential:
    """Phi of a VAEBM as a batched function of flat noise. Made by :func:`noise_potential`."""

    def __init__(self, vaebm: VAEBM) -> None:
        self.vaebm = vaebm
        self.packing = Packing(vaebm.vae.noise_shapes)
        self.x_shape = vaebm.vae.model.event_shape
        self.rows_per_block = vaebm.vae.rows_per_block
        self._rows_per_pass: int | None = None

    @property
    def rows_per_pass(self) -> int:
        """Rows whose gradient fits in the memory that was free when this was first asked; kernels split by it.

        It changes no random number, for positions are drawn in blocks of ``rows_per_block``.
        """
        if self._rows_per_pass is None:
            like = next(self.vaebm.parameters())
            self._rows_per_pass = rows_that_fit(self.vaebm, self._evaluate, like.new_zeros(1, self.packing.dim))
        return self._rows_per_pass

    @rows_per_pass.setter
    def rows_per_pass(self, value: int) -> None:
        self._rows_per_pass = value

    def __call__(self, position: Tensor) -> Tensor:
        """Evaluate Phi: ``(C, D)`` to ``(C,)``, nats relative to N(0, I)."""
        return self._evaluate(position)

    def _evaluate(self, position: Tensor) -> Tensor:
        x, z = self.vaebm.vae.transport(self.packing.unravel(position))
        energy: Tensor = self.vaebm.energy(x, z)
        return energy

    def decode(self, position: Tensor) -> Tensor:
        """Map noise ``(C, D)`` to the x that it stands for, ``(C, *event)``, without a gradient."""
        with torch.no_grad():
            x: Tensor = self.vaebm.vae.transport(self.packing.unravel(position))[0]
        return x

    def draw_reference(self, generator: torch.Generator, num: int) -> Tensor:
        """Draw positions from N(0, I), ``(num, D)``: VAE samples, once decoded."""
        like = next(self.vaebm.parameters())
        return torch.randn(num, self.packing.dim, generator=generator, dtype=like.dtype, device=like.device)


def noise_potential(vaebm: VAEBM) -> NoisePotential:
    """Make the potential that every kernel samples.

    Up to the Gaussian constant, ``Phi(eps) + |eps|^2 / 2`` is minus the log density of the program
    :class:`~ppl_vaebm.models.vaebm.VAEBM` with all its sites decentred.

    From then on this process computes convolutions in float32, not in TF32: kernels compare energies. ValueError for a
    model in training mode, in which rows would depend on each other.
    """
    if vaebm.vae.training:
        raise ValueError("the VAE is in training mode, where batch statistics tie chains together: call vaebm.eval()")
    without_tf32()
    return NoisePotential(vaebm)
