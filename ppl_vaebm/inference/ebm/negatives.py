"""Persistent chains of h, whose ends are the negatives of maximum likelihood (Du and Mordatch 2019).

The store holds positions, of eps_z and eps_x both, so each is a chain in the joint space. An update takes a random
batch of slots; each chain continues with a given probability and restarts otherwise. Potentials and gradients are not
stored: they are stale once the energy's weights have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels.adaptation import follow_acceptance, with_step_size
from ppl_vaebm.inference.kernels.base import KernelParams, draw_normal, init_without_grad, run_steps
from ppl_vaebm.inference.kernels.ladder import stored_ladder
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.latent_exchange import (
    SWEEPS_PER_SWAP,
    LatentPotential,
    LatentStore,
    num_first,
    swap,
    with_first,
)
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream

Latents = dict[str, Tensor]


class Taken(NamedTuple):
    """A batch of chains."""

    positions: Tensor
    """Where they begin, ``(num, D)``."""
    slots: Tensor
    """Their places in the store, ``(num,)``."""
    is_continued: Tensor
    """Whether a chain continues from the store rather than restarts, ``(num,)``."""


class Moved(NamedTuple):
    """A batch of chains after the transitions of one update."""

    start: Tensor
    """Where they began, ``(num, D)``."""
    end: Tensor
    """Where they are, ``(num, D)``."""
    slots: Tensor
    """Their places in the store, ``(num,)``."""
    acceptance_rate: Tensor
    """Mean over chains and transitions, ``()``."""
    step_size: Tensor
    """Angle h of the transitions, ``()``."""
    num_evals: Tensor
    """Evaluations of the potential over all chains, ``()``."""
    swap_rate: Tensor | None
    """Mean acceptance of the swaps of the first latent, ``()``, over the continued chains: one that restarts already
    has its partner's first latent. ``None`` where there is none."""


class PersistentChains:
    """Chains of the training kernel on the energy in training, their store, and the kernel's parameters.

    ``partners`` are chains of the first latent's own term, from which chains restart; ``None`` for an energy without.
    """

    def __init__(self, config: Config, potential: NoisePotential, partners: LatentStore | None = None) -> None:
        self.config, self.potential, self.partners = config, potential, partners
        start = stream(config.seed, "replay", device=config.device)
        self.positions = potential.draw_reference(start, config.ebm.replay_size)
        """The store, ``(size, D)``."""
        self.kernel = build_kernel(config.kernel, potential)
        self.params: KernelParams = start_params(config.kernel, self.positions)
        self.fixed_term = LatentPotential(potential.vaebm) if config.ebm.latent.steps else None
        """Phi of the first latent's term where training leaves it as it is, so that it has a density to keep."""
        self.num_divergent = torch.zeros((), dtype=torch.int64, device=self.positions.device)
        """Divergent moves since the last record, ``()``."""

    def restart(self, seed: int) -> None:
        """Let all chains begin anew at those of the first latent, with other noises from a seed's stream."""
        generator = stream(seed, "restart", device=self.config.device)
        for rows in self.positions.split(self.config.ebm.batch_size):
            rows.copy_(self._restarts(generator, self._moved_partners(generator, len(rows))[0]))

    def advance(self, generator: torch.Generator, num: int, probability: float) -> Moved:
        """Take ``num`` chains, swap and move them by the transitions of one update, and put them back.

        They are at most the store's size, and each continues from the store with the probability given.
        """
        with frozen(self.potential.vaebm.energy):
            partners = None if self.partners is None else self._moved_partners(generator, num)
            restarts = None if partners is None else self._restarts(generator, partners[0])
            taken = self.take(generator, num, probability, restarts)
            position, swap_rates = taken.positions, None
            if self.fixed_term is not None and partners is not None:
                position, swap_rates = self.swap(generator, position, *partners)
            start = self.kernel.init(position)
            state, infos = run_steps(self.kernel, generator, start, self.params, self.config.ebm.num_transitions)
            end = state.position
        self.num_divergent += torch.stack([info.is_divergent for info in infos]).sum()
        self.put(taken.slots, end)
        acceptance_rate = torch.stack([info.acceptance_rate for info in infos]).nanmean()
        step_size = self.params.step_size
        if self.kernel.target_acceptance is not None:  # the step follows the energy as it changes
            self.params = follow_acceptance(self.params, float(acceptance_rate), self.kernel.target_acceptance)
        swap_rate = None
        if swap_rates is not None and taken.is_continued.any():
            swap_rate = swap_rates[taken.is_continued].mean()
        num_evals = torch.stack([info.num_evals for info in infos]).sum()
        return Moved(taken.positions, end, taken.slots, acceptance_rate, step_size, num_evals, swap_rate)

    def take(self, generator: torch.Generator, num: int, probability: float, restarts: Tensor | None = None) -> Taken:
        """Take a batch of chains from random slots; arguments as for :meth:`advance`.

        Those that restart begin at ``restarts``, ``(num, D)``, or at draws from N(0, I).
        """
        device = self.positions.device
        slots = torch.randperm(len(self.positions), generator=generator, device=device)[:num]
        stored = self.positions[slots]
        is_continued = torch.rand((num, 1), generator=generator, device=device) < probability
        fresh = draw_normal(generator, stored) if restarts is None else restarts
        return Taken(torch.where(is_continued, stored, fresh), slots, is_continued.squeeze(1))

    def swap(self, generator: torch.Generator, position: Tensor, first: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Swap the first latent with partners, at ``first`` ``(num, d)`` and in their slots ``(num,)``.

        Returns positions afterwards, ``(num, D)``, and acceptance rates, ``(num,)``.
        """
        assert self.fixed_term is not None and self.partners is not None
        state, other = init_without_grad(self.potential)(position), init_without_grad(self.fixed_term)(first)
        swapped = swap(generator, self.potential, self.fixed_term, state, other)
        self.partners.put(slots, swapped.other.position)
        return swapped.state.position, swapped.acceptance_rate

    def put(self, slots: Tensor, positions: Tensor) -> None:
        """Return chains, ``(num, D)``, to their slots ``(num,)``."""
        self.positions[slots] = positions.detach()

    def put_back(self, moved: Moved, mask: Tensor) -> None:
        """Set chains where ``mask``, ``(num,)``, holds to where they began the update.

        Kernels do not evaluate the end of their ``last_step``, so the loss is the first to find an energy there that is
        not finite. No chain could move on from such a place.
        """
        self.put(moved.slots, torch.where(mask.unsqueeze(1), moved.start, moved.end))

    def negatives(self, position: Tensor) -> tuple[Tensor, Latents]:
        """Return the x whose energy the loss takes at positions ``(num, D)``, and its latents, without a gradient."""
        sites, vae = self.potential.packing.unravel(position), self.potential.vaebm.vae
        with torch.no_grad():
            if self.config.ebm.negative_image == "draw":
                return vae.transport(sites)
            decoded, z = vae.decode_noise(sites)
            return decoded.mean(), z

    def without_fixed_term(
        self, energy_data: Tensor, z: Latents | None, energy_negatives: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leave the fixed term out of energies of data ``(n,)`` with latents z and of negatives ``(m,)`` at positions.

        An L2 penalty with it would teach the other terms to undo it.
        """
        if self.fixed_term is None:
            return energy_data, energy_negatives
        assert z is not None
        fixed = self.fixed_term(position[:, : num_first(self.potential)])
        return energy_data - self.potential.vaebm.energy.latent_term(z), energy_negatives - fixed

    def record(self, moved: Moved) -> dict[str, float]:
        """Return what is logged of an update's moves beside the monitors; divergences count from the last record."""
        record = {
            "num_divergent": int(self.num_divergent),
            "step_size": float(moved.step_size),
            "num_evals": int(moved.num_evals),
            "rms_move": float((moved.end - moved.start).square().mean().sqrt()),
        }
        self.num_divergent.zero_()
        mean_squares = self.potential.packing.mean_square(moved.end)
        return record | {f"eps_mean_square/{name}": float(value.mean()) for name, value in mean_squares.items()}

    def state(self) -> dict[str, Any]:
        """Return the chains and the kernel's steps, for a checkpoint."""
        state = {
            "replay": self.positions,
            "replay_sites": self._sites(),
            "step_size": float(self.params.step_size),
            "num_divergent": int(self.num_divergent),
        }
        if self.params.ladder is not None:
            state["ladder"] = self.params.ladder._asdict()
        return state if self.partners is None else state | {"latents": self.partners.state()}

    def load(self, state: Mapping[Any, Any]) -> None:
        """Restore what :meth:`state` returned; raise InputError if it is of another number or another model."""
        stored = state["replay"]
        if stored.shape != self.positions.shape or state["replay_sites"] != self._sites():
            raise InputError(
                f"expected a replay of {_form(self.positions)} ({', '.join(self._sites())}), found one of "
                f"{_form(stored)} ({', '.join(state['replay_sites'])}): it is of another model or "
                "another ebm.replay-size; start the stage again with --overwrite"
            )
        self.positions.copy_(stored)
        self.num_divergent.fill_(state["num_divergent"])
        if self.partners is not None:
            self.partners.load(state["latents"])
        self.params = with_step_size(self.params, state["step_size"])
        if "ladder" in state:  # its steps followed acceptance by a product of many rounded factors
            self.params = self.params._replace(ladder=stored_ladder(state["ladder"], like=self.positions))

    def _sites(self) -> list[str]:
        return [f"{name} {tuple(shape)}" for name, shape in self.potential.packing.shapes.items()]

    def _moved_partners(self, generator: torch.Generator, num: int) -> tuple[Tensor, Tensor]:
        """Move chains of the first latent; return where they are, ``(num, d)``, and their slots."""
        assert self.partners is not None
        with frozen(self.potential.vaebm.energy):
            first, slots, _ = self.partners.advance(generator, num, SWEEPS_PER_SWAP)
        return first, slots

    def _restarts(self, generator: torch.Generator, first: Tensor) -> Tensor:
        """Draw where chains restart: the first latent from its own chains, ``(num, d)``, the rest from N(0, I)."""
        return with_first(self.potential.draw_reference(generator, len(first)), first)


def _form(positions: Tensor) -> str:
    return f"{len(positions)} chains of {positions.shape[-1]} noises"


@contextmanager
def frozen(energy: nn.Module) -> Iterator[None]:
    """Freeze an energy, in evaluation mode, while chains move on it; restore it afterwards."""
    was_training, required = energy.training, [parameter.requires_grad for parameter in energy.parameters()]
    energy.eval().requires_grad_(False)
    try:
        yield
    finally:
        energy.train(was_training)
        for parameter, is_required in zip(energy.parameters(), required, strict=True):
            parameter.requires_grad_(is_required)


def replay_probability(loop: EbmConfig, step: int) -> float:
    """Return the probability that a chain continues from the store at a step, after annealing."""
    if not loop.replay_anneal_steps:
        return loop.replay_probability
    return loop.replay_probability * min(1.0, step / loop.replay_anneal_steps)
