"""Chains of the first latent under the energy's own term of it: draws of a VAE whose first prior is corrected.

The term's density ``exp(-E_1(z_1)) N(eps_1; 0, I)`` needs neither decoder nor image, so its chains cost next to
nothing, and they take the slowest noise, which every pixel depends on, nearly to where the VAEBM wants it. Replica
exchange joins its modes, which single chains hardly leave: their weights are as right as their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import tempered
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelParams, KernelState, draw_normal, init_params
from ppl_vaebm.inference.kernels.ladder import follow_rates, start_ladder, stored_ladder
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vaebm import VAEBM

TARGET_ACCEPTANCE = 0.75
NUM_LEVELS = 9
"""About ``2 barrier + 1`` are best; the barrier of Fashion-MNIST's term is 3.7 to 4.6. Chosen by us."""
FIRST_STEP_SIZE = 0.5
SWEEPS_PER_EXCHANGE = 10
"""Sweeps before other chains exchange the first latent with these, or restart from them; in training as in sampling.
What the rest of the energy takes from a mode the ladder has to bring there again, in some hundred sweeps. Chosen by
us."""


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


def build_latent_kernel(potential: LatentPotential) -> Kernel:
    """Make the kernel of these chains: replica exchange from N(0, I) up, by steps of MALA in noise space."""
    return tempered.build(potential, num_levels=NUM_LEVELS, target_acceptance=TARGET_ACCEPTANCE)


def num_first(potential: NoisePotential) -> int:
    """Return the number of columns that the first latent's noise has; they are the first ones."""
    return next(iter(potential.packing.sizes.values()))


def run_first_latent(
    potential: NoisePotential,
    generator: torch.Generator,
    position: Tensor,
    num_steps: int,
    params: KernelParams | None = None,
) -> tuple[KernelState, KernelParams]:
    """Run chains of the first latent.

    Args:
        potential: of the VAEBM, whose energy has the term.
        generator: source of the chains' randomness; on the position's device.
        position: all noises, ``(C, D)``, of which the first latent's are the start, from N(0, I).
        num_steps: sweeps of the chains.
        params: of an earlier run; if not given they are tuned on the first half of the sweeps.

    Returns:
        The chains and their parameters.
    """
    kernel = build_latent_kernel(LatentPotential(potential.vaebm))
    state = kernel.init(position[:, : num_first(potential)])
    num_warmup = 0 if params else num_steps // 2
    if params is None:
        start = init_params(state.position, FIRST_STEP_SIZE)
        state, params, _ = warm_up(kernel, generator, state, start, num_warmup)
    for _ in range(num_steps - num_warmup):
        state, _ = kernel.step(generator, state, params)
    return state, params


def with_first(position: Tensor, first: Tensor) -> Tensor:
    """Replace the first latent's noise: ``(C, D)`` and ``(C, d)`` to ``(C, D)``."""
    return torch.cat([first, position[:, first.shape[1] :]], dim=1)


class LatentStore:
    """Persistent chains of the first latent, for training: draws of the corrected prior as it is at the moment.

    Args:
        vaebm: with the energy in training.
        generator: source of the starts, from N(0, I); on the energy's device.
        num: chains, each with a replica at every level.
    """

    def __init__(self, vaebm: VAEBM, generator: torch.Generator, num: int) -> None:
        self.potential = LatentPotential(vaebm)
        self.kernel = build_latent_kernel(self.potential)
        like = next(vaebm.energy.parameters())
        size = self.potential.shape.numel()
        self.positions = draw_normal(generator, like.new_empty(num, NUM_LEVELS, size))
        """``(num, NUM_LEVELS, d)``, hottest first."""
        params = init_params(self.positions[:, -1], FIRST_STEP_SIZE)
        self.params: KernelParams = params._replace(ladder=start_ladder(NUM_LEVELS, params, 1))

    def advance(self, generator: torch.Generator, num: int, num_sweeps: int) -> tuple[Tensor, Tensor, list[KernelInfo]]:
        """Move some of the chains, with a ladder that follows their acceptance and swaps.

        Args:
            generator: source of randomness, on the chains' device.
            num: chains to move, at most those that there are.
            num_sweeps: of each, two at least, so that every pair of neighbours is proposed.

        Returns:
            Where they are at b = 1, ``(num, d)``, their slots ``(num,)``, and the reports of their sweeps.
        """
        slots = torch.randperm(len(self.positions), generator=generator, device=self.positions.device)[:num]
        start = self.positions[slots]
        state, infos = self.kernel.init(start[:, -1]), []
        state = tempered.with_replicas(self.potential, state, start[:, :-1])
        for _ in range(num_sweeps):
            state, info = self.kernel.step(generator, state, self.params)
            infos.append(info)
        self.positions[slots] = tempered.all_positions(state)
        assert state.replicas is not None and self.params.ladder is not None
        ladder = follow_rates(self.params.ladder, state.replicas.counts, TARGET_ACCEPTANCE)
        self.params = self.params._replace(step_size=ladder.step_sizes[-1], ladder=ladder)
        return state.position, slots, infos

    def put(self, slots: Tensor, first: Tensor) -> None:
        """Place chains anew at b = 1, which have exchanged their places with others.

        Args:
            slots: as :meth:`advance` gave them, ``(num,)``.
            first: where the chains are now, ``(num, d)``.
        """
        self.positions[slots, -1] = first

    def state(self) -> dict[str, Any]:
        """Return positions and ladder, for a checkpoint."""
        assert self.params.ladder is not None
        return {"positions": self.positions, **self.params.ladder._asdict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` returned.

        Raises:
            InputError: it is of other chains.
        """
        stored = state["positions"]
        if stored.shape != self.positions.shape:
            raise InputError(
                f"expected chains of the first latent of {tuple(self.positions.shape)}, found {tuple(stored.shape)}: "
                "they are of another model or another version; start the stage again with --overwrite"
            )
        self.positions.copy_(stored)
        ladder = stored_ladder(state, like=self.positions)
        self.params = self.params._replace(step_size=ladder.step_sizes[-1], ladder=ladder)
