"""Chains of the first latent under the energy's own term of it: draws of a VAE whose first prior is corrected.

The term's density ``exp(-E_1(z_1)) N(eps_1; 0, I)`` needs neither decoder nor image, so its chains cost next to
nothing, and they take the slowest noise, which every pixel depends on, nearly to where the VAEBM wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vaebm.inference.adaptation import follow_acceptance, warm_up, with_step_size
from ppl_vaebm.inference.base import Kernel, KernelInfo, KernelParams, init_params
from ppl_vaebm.inference.langevin import build_mala
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.replay import Replay
from ppl_vaebm.models.vaebm import VAEBM

TARGET_ACCEPTANCE = 0.75
NUM_TUNING_STEPS = 200
"""The step size of chains from fresh noise is tuned on their first steps, at most so many. Chosen by us."""
FIRST_STEP_SIZE = 0.5


class LatentPotential:
    """Phi of the first latent's own term, as a function of that latent's noise.

    Args:
        vaebm: with an energy that has the term.
    """

    def __init__(self, vaebm: VAEBM) -> None:
        self.vaebm = vaebm
        self.shape = next(iter(vaebm.vae.noise_shapes.values()))

    def __call__(self, position: Tensor) -> Tensor:
        """Evaluate ``E_1(z_1(eps_1))``: ``(C, d)`` to ``(C,)``, nats relative to N(0, I)."""
        return self.vaebm.energy.latent_term(self.vaebm.vae.first_latent(position.unflatten(1, self.shape)))


def build_latent_kernel(vaebm: VAEBM) -> Kernel:
    """Make the kernel of these chains: MALA in noise space."""
    return build_mala(LatentPotential(vaebm), target_acceptance=TARGET_ACCEPTANCE)


def num_first(potential: NoisePotential) -> int:
    """Return the number of columns that the first latent's noise has; they are the first ones."""
    return next(iter(potential.packing.sizes.values()))


def move_first_latent(
    potential: NoisePotential, generator: torch.Generator, position: Tensor, num_steps: int
) -> Tensor:
    """Move the first latent's noise by chains of its own, and leave the rest.

    Args:
        potential: of the VAEBM.
        generator: source of the chains' randomness; on the position's device.
        position: all noises, ``(C, D)``, from N(0, I).
        num_steps: of the chains; the step size is tuned on the first half of them at most.

    Returns:
        The noises, ``(C, D)``; as they were for an energy without the term, or no steps.
    """
    if potential.vaebm.energy.latent_net is None or not num_steps:
        return position
    size = num_first(potential)
    kernel = build_latent_kernel(potential.vaebm)
    state = kernel.init(position[:, :size])
    num_tuning = min(NUM_TUNING_STEPS, num_steps // 2)
    state, params, _ = warm_up(kernel, generator, state, init_params(state.position, FIRST_STEP_SIZE), num_tuning)
    for _ in range(num_steps - num_tuning):
        state, _ = kernel.step(generator, state, params)
    return torch.cat([state.position, position[:, size:]], dim=1)


class LatentStore:
    """Persistent chains of the first latent, for training: draws of the corrected prior as it is at the moment.

    Args:
        vaebm: with the energy in training.
        position: starts, ``(num, d)``, from N(0, I).
    """

    def __init__(self, vaebm: VAEBM, position: Tensor) -> None:
        self.kernel = build_latent_kernel(vaebm)
        self.replay = Replay(position)
        self.params: KernelParams = init_params(position, FIRST_STEP_SIZE)

    def advance(
        self, generator: torch.Generator, num: int, num_steps: int, replay_probability: float = 1.0
    ) -> tuple[Tensor, list[KernelInfo]]:
        """Move some of the chains, with a step size that follows their acceptance.

        Args:
            generator: source of randomness, on the chains' device.
            num: chains to move, of those that there are.
            num_steps: of each.
            replay_probability: that a chain goes on; otherwise it starts again from N(0, I).

        Returns:
            Where they are, ``(num, d)``, and the reports of their steps.
        """
        start, slots = self.replay.take(generator, num, replay_probability)
        state, infos = self.kernel.init(start), []
        for _ in range(num_steps):
            state, info = self.kernel.step(generator, state, self.params)
            infos.append(info)
        self.replay.put(slots, state.position)
        rate = torch.stack([info.acceptance_rate for info in infos]).mean()
        self.params = follow_acceptance(self.params, float(rate), TARGET_ACCEPTANCE)
        return state.position, infos

    def state(self) -> dict[str, Any]:
        """Return positions and step size, for a checkpoint."""
        return {"positions": self.replay.positions, "step_size": float(self.params.step_size)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        self.replay.positions.copy_(state["positions"])
        self.params = with_step_size(self.params, state["step_size"])
