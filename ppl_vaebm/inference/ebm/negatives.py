"""The negative phase of stage 2: what the data's energies are held against, at every step of training.

Draws of the VAE for the ratio and for importance weights; chains of the kernel for maximum likelihood; and for the
ladder, chains of the density of the rung below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.replay import Replay
from ppl_vaebm.inference.kernels.adaptation import follow_acceptance, with_step_size
from ppl_vaebm.inference.kernels.base import KernelInfo, KernelParams, init_without_grad, value_only
from ppl_vaebm.inference.kernels.ladder import stored_ladder
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.latent_chains import (
    SWEEPS_PER_EXCHANGE,
    LatentPotential,
    LatentStore,
    num_first,
    with_first,
)
from ppl_vaebm.inference.latent_exchange import exchange
from ppl_vaebm.inference.likelihood import weights_ess
from ppl_vaebm.inference.log_z.base import log_mean_exp
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream

WEIGHT_ESS_EVERY = 50
"""Steps between looks at draws of the VAE where the negatives are chains: they cost a batch of their own. Chosen by
us."""

Latents = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One step's data against its negatives: what the loss needs, and what guard and record are told."""

    loss: Tensor
    """The objective, ``()``."""
    energy_data: Tensor
    """Energies of the data, ``(n,)``."""
    energy_square: Tensor
    """Mean square of the energies that are being learnt, of the data plus of the negatives, nats^2, ``()``: the L2
    penalty. A held term of the first latent is left out, or the penalty would teach the rest to undo it."""
    energy_model: Tensor
    """Mean energy under h as the negatives estimate it, ``()``; at the optimum it equals the data's."""
    monitors: dict[str, Tensor]
    """What the guard watches, ``()`` each."""
    record: dict[str, float]
    """What to log beside the monitors; empty unless asked for."""


class _Moved(NamedTuple):
    """What the chains of one step did."""

    start: Tensor
    """Where they began, ``(n, D)``."""
    end: Tensor
    """Where they are, ``(n, D)``."""
    infos: list[KernelInfo]
    exchange_rate: Tensor | None
    """Acceptance of the first latent's exchange, over those of the chains that went on, ``(m,)``: one that restarts has
    its partner's first latent, and whatever the energy accepts to exchange that. ``None`` where there is none."""


class NegativePhase:
    """The ways to the negative phase.

    Args:
        config: the run's configuration.
        potential: of the VAEBM in training.
    """

    def __init__(self, config: Config, potential: NoisePotential) -> None:
        self.config = config
        self.potential = potential
        self.is_ladder = config.ebm.objective == "ladder"
        below = copy.deepcopy(potential.vaebm.energy).eval().requires_grad_(False) if self.is_ladder else None
        self.sampled = potential if below is None else noise_potential(VAEBM(potential.vaebm.vae, below))
        self.kernel = build_kernel(config.kernel, self.sampled)
        reference = potential.draw_reference(
            stream(config.seed, "replay", device=config.device), config.ebm.replay_size
        )
        self.replay = Replay(reference)
        self.latents: LatentStore | None = None
        if potential.vaebm.energy.latent_net is not None:
            starts, num = stream(config.seed, "latent-store", device=config.device), config.ebm.latent.store_size
            self.latents = LatentStore(potential.vaebm, starts, max(num, config.ebm.batch_size))
        self.held = LatentPotential(potential.vaebm) if config.ebm.latent.steps else None
        self.params: KernelParams = start_params(config.kernel, reference)
        self.num_divergent = torch.zeros((), dtype=torch.int64, device=reference.device)
        """Divergent moves since the last record, ``()``."""

    def __call__(
        self, x: Tensor, step: int, z: Latents | None = None, *, seed: int | None = None, is_logged: bool = True
    ) -> Phase:
        """Run the negative phase of one step.

        Args:
            x: data, ``(n, *event_shape)``.
            step: number of this step.
            z: the data's latents, for an energy that reads them.
            seed: of this step's draws; the run's if not given.
            is_logged: whether the record is wanted.

        Returns:
            Loss, monitors and record.
        """
        loop, energy = self.config.ebm, self.potential.vaebm.energy
        generator = stream(self.config.seed if seed is None else seed, "negatives", step, device=self.config.device)
        if loop.objective == "ratio" or (loop.objective == "mle" and step < loop.ratio_steps):
            return self._ratio(energy(x, z), z, generator)
        if self.is_ladder:
            return self._rung(x, z, step, generator, is_logged)
        if loop.negatives == "importance":
            return self._importance(energy(x, z), z, generator)
        return self._mle(energy(x, z), z, step, generator, is_logged)

    def restart_chains(self, seed: int) -> None:
        """Let all chains begin anew at the first latent's own ones, which have learnt where that belongs.

        Args:
            seed: of the rest of their noise.
        """
        generator = stream(seed, "restart", device=self.config.device)
        for rows in self.replay.positions.split(self.config.ebm.batch_size):
            fresh = self._restarts(generator, self._partners(generator, len(rows)))
            assert fresh is not None
            rows.copy_(fresh)

    def weights(self) -> dict[str, nn.Module]:
        """Return the modules of which a checkpoint needs the weights: the ladder's rung below."""
        return {"rung": self.sampled.vaebm.energy} if self.is_ladder else {}

    def state(self) -> dict[str, Any]:
        """Return the replay and the kernel's steps, for a checkpoint."""
        state = {
            "replay": self.replay.positions,
            "replay_sites": self._replay_sites(),
            "step_size": float(self.params.step_size),
            "num_divergent": int(self.num_divergent),
        }
        if self.params.ladder is not None:
            state["ladder"] = self.params.ladder._asdict()
        return state if self.latents is None else state | {"latents": self.latents.state()}

    def load(self, state: Mapping[Any, Any]) -> None:
        """Take up the replay and the kernel's steps of a checkpoint's state.

        Raises:
            InputError: the replay is of another size, or of another model.
        """
        stored, held = state["replay"], self.replay.positions
        # A state of an earlier version does not name its sites.
        if stored.shape != held.shape or state.get("replay_sites", self._replay_sites()) != self._replay_sites():
            raise InputError(
                f"expected a replay of {_form(held)} ({', '.join(self._replay_sites())}), found one of {_form(stored)} "
                f"({', '.join(state.get('replay_sites', ['unnamed']))}): it is of another model or another "
                "ebm.replay-size; start the stage again with --overwrite"
            )
        held.copy_(stored)
        self.num_divergent.fill_(state.get("num_divergent", 0))
        if self.latents is not None:
            self.latents.load(state["latents"])
        self.params = with_step_size(self.params, state["step_size"])
        if "ladder" in state:  # its steps followed acceptance by a product of many rounded factors
            self.params = self.params._replace(ladder=stored_ladder(state["ladder"], like=held))

    def _replay_sites(self) -> list[str]:
        return [f"{name} {tuple(shape)}" for name, shape in self.potential.packing.shapes.items()]

    def _energy_square(self, energy_data: Tensor, z: Latents | None, energy: Tensor, position: Tensor) -> Tensor:
        if self.held is not None:
            assert z is not None
            energy_data = energy_data - self.potential.vaebm.energy.latent_term(z)
            energy = energy - self.held(position[:, : num_first(self.potential)])
        return energy_data.square().mean() + energy.square().mean()

    def _draws(self, generator: torch.Generator) -> Tensor:
        return self.potential.draw_reference(generator, self.config.ebm.num_importance)

    def _ratio(self, energy_data: Tensor, z: Latents | None, generator: torch.Generator) -> Phase:
        draws = self._draws(generator)
        energy = self.potential(draws)
        loss = softplus(energy_data).mean() + softplus(-energy).mean()
        return self._weighted(loss, energy_data, energy, self._energy_square(energy_data, z, energy, draws))

    def _importance(self, energy_data: Tensor, z: Latents | None, generator: torch.Generator) -> Phase:
        draws = self._draws(generator)
        energy = self.potential(draws)
        loss = energy_data.mean() - _weighted_mean(energy, energy)
        return self._weighted(loss, energy_data, energy, self._energy_square(energy_data, z, energy, draws))

    def _weighted(self, loss: Tensor, energy_data: Tensor, energy: Tensor, energy_square: Tensor) -> Phase:
        """Put together a phase whose negatives are draws of the VAE, with weights ``exp(-E)`` under h."""
        # Where few weights count the gap is noise, so the guard is not told of it.
        monitors = {"energy_sd": _largest_sd(energy_data, energy)}
        record = {"weight_ess": weights_ess(-energy.detach())}
        return Phase(loss, energy_data, energy_square, _weighted_mean(energy, energy), monitors, record)

    def _mle(
        self, energy_data: Tensor, z: Latents | None, step: int, generator: torch.Generator, is_logged: bool
    ) -> Phase:
        moved = self._run_chains(len(energy_data), step, generator)
        x, z_negative = self._image(moved.end)
        energy = self.potential.vaebm.energy(x, z_negative)
        loss = energy_data.mean() - energy.mean()
        energy_square = self._energy_square(energy_data, z, energy, moved.end)
        record = self._chain_record(moved, step) if is_logged else {}
        monitors = self._chain_monitors(energy_data, energy, energy.mean(), x, moved)
        self._adapt(monitors["acceptance_rate"])
        return Phase(loss, energy_data, energy_square, energy.mean(), monitors, record)

    def _rung(self, x: Tensor, z: Latents | None, step: int, generator: torch.Generator, is_logged: bool) -> Phase:
        """Tell data from draws of the rung below, by the logistic regression whose logit is what this rung adds."""
        energy, below = self.potential.vaebm.energy, self.sampled.vaebm.energy
        rung, since = divmod(step, self.config.ebm.rung_steps)
        if rung == 0:  # below the first rung is the VAE
            return self._ratio(energy(x, z), z, generator)
        if since == 0:
            below.load_state_dict(energy.state_dict())
        moved = self._run_chains(len(x), step, generator)
        x_negative, z_negative = self._image(moved.end)
        with torch.no_grad():
            below_data, below_negative = below(x, z), below(x_negative, z_negative)
        energy_data, energy_negative = energy(x, z), energy(x_negative, z_negative)
        rise = energy_negative - below_negative
        loss = softplus(energy_data - below_data).mean() + softplus(-rise).mean()
        model = _weighted_mean(energy_negative, rise)
        log_z = log_mean_exp(-rise.detach())
        record = {"rung": rung + 1, "rung_log_z": log_z.value, "rung_ess": log_z.ess}
        record = record | self._chain_record(moved, step) if is_logged else {}
        monitors = self._chain_monitors(energy_data, energy_negative, model, x_negative, moved)
        self._adapt(monitors["acceptance_rate"])
        energy_square = self._energy_square(energy_data, z, energy_negative, moved.end)
        return Phase(loss, energy_data, energy_square, model, monitors, record)

    def _run_chains(self, num: int, step: int, generator: torch.Generator) -> _Moved:
        """Move chains of the replay."""
        partners = self._partners(generator, num)
        taken = self.replay.take(
            generator, num, replay_probability(self.config.ebm, step), self._restarts(generator, partners)
        )
        infos = []
        with _frozen(self.sampled.vaebm.energy):
            exchanged, rates = self._exchanged(generator, taken.positions, partners)
            state = self.kernel.init(exchanged)
            for _ in range(self.config.ebm.num_transitions):
                state, info = self.kernel.step(generator, state, self.params)
                infos.append(info)
        self.num_divergent += torch.stack([info.is_divergent for info in infos]).sum()
        self.replay.put(taken.slots, state.position)
        rates = None if rates is None or not taken.goes_on.any() else rates[taken.goes_on]
        return _Moved(taken.positions, state.position, infos, rates)

    def _partners(self, generator: torch.Generator, num: int) -> tuple[Tensor, Tensor] | None:
        """Move chains of the first latent, where it has such; return where they are, and their slots."""
        if self.latents is None:
            return None
        with _frozen(self.potential.vaebm.energy):
            first, slots, _ = self.latents.advance(generator, num, SWEEPS_PER_EXCHANGE)
        return first, slots

    def _restarts(self, generator: torch.Generator, partners: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Draw where chains restart from: the first latent from its own chains, where it has such."""
        if partners is None:
            return None
        first, _ = partners
        return with_first(self.potential.draw_reference(generator, len(first)), first)

    def _exchanged(
        self, generator: torch.Generator, start: Tensor, partners: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Exchange the first latent with chains of its own term, where that is held and so has a density to keep.

        Return where the chains are then, and the acceptance rates ``(n,)``, if there was anything to accept.
        """
        if self.held is None or self.latents is None or partners is None:
            return start, None
        first, slots = partners
        state, other = init_without_grad(self.sampled)(start), init_without_grad(self.held)(first)
        found = exchange(generator, self.sampled, self.held, state, other)
        self.latents.put(slots, found.other.position)
        return found.state.position, found.acceptance_rate

    def _image(self, position: Tensor) -> tuple[Tensor, Latents]:
        """Return the x whose energy the loss takes, and its latents, without a gradient."""
        sites = self.potential.packing.unravel(position)
        vae = self.potential.vaebm.vae
        with torch.no_grad():
            if self.config.ebm.negative_image == "draw":
                return vae.transport(sites)
            decoded, z = vae.decode_noise(sites)
            return decoded.mean(), z

    def _chain_monitors(
        self, energy_data: Tensor, energy: Tensor, model: Tensor, x: Tensor, moved: _Moved
    ) -> dict[str, Tensor]:
        monitors = {
            "energy_gap": (energy_data.mean() - model).detach(),
            "energy_sd": _largest_sd(energy_data, energy),
            "acceptance_rate": torch.stack([info.acceptance_rate for info in moved.infos]).mean(),
        }
        if moved.exchange_rate is not None:
            monitors["exchange_rate"] = moved.exchange_rate.mean()
        is_image = x.dim() == 4
        return monitors | ({"saturation": (x.abs() > 1).float().mean()} if is_image else {})

    def _chain_record(self, moved: _Moved, step: int) -> dict[str, float]:
        start, end, infos = moved.start, moved.end, moved.infos
        mean_squares = self.potential.packing.mean_square(end)
        record = {
            "num_divergent": int(self.num_divergent),
            "step_size": float(self.params.step_size),
            "num_evals": int(torch.stack([info.num_evals for info in infos]).sum()),
            "rms_move": float((end - start).square().mean().sqrt()),
            **{f"eps_mean_square/{name}": float(value.mean()) for name, value in mean_squares.items()},
        }
        self.num_divergent.zero_()
        if step and (step + 1) % WEIGHT_ESS_EVERY:  # counted as log-every counts, or the two might never meet
            return record
        generator = stream(self.config.seed, "weight_ess", step, device=self.config.device)
        energy = value_only(self.potential, self.potential.draw_reference(generator, len(start)))
        return record | {"weight_ess": weights_ess(-energy)}

    def _adapt(self, acceptance_rate: Tensor) -> None:
        """Let the step follow the energy as it changes, by its acceptance rate."""
        target = self.kernel.target_acceptance
        if target is None:
            return
        self.params = follow_acceptance(self.params, float(acceptance_rate), target)


def _form(positions: Tensor) -> str:
    return f"{len(positions)} chains of {positions.shape[-1]} noises"


@contextmanager
def _frozen(energy: nn.Module) -> Iterator[None]:
    """Hold an energy still while chains move on it, and put it back as it was."""
    was_training, wanted = energy.training, [parameter.requires_grad for parameter in energy.parameters()]
    energy.eval().requires_grad_(False)
    try:
        yield
    finally:
        energy.train(was_training)
        for parameter, is_wanted in zip(energy.parameters(), wanted, strict=True):
            parameter.requires_grad_(is_wanted)


def _weighted_mean(energy: Tensor, tilt: Tensor) -> Tensor:
    """Estimate the mean energy under a density from draws of another, with weights ``exp(-tilt)``, ``()``."""
    return (-tilt.detach()).softmax(0) @ energy


def _largest_sd(energy_data: Tensor, energy_negatives: Tensor) -> Tensor:
    """Return the larger of the two spreads, nats, ``()``."""
    return torch.stack([energy_data.detach().std(), energy_negatives.detach().std()]).max()


def replay_probability(loop: EbmConfig, step: int) -> float:
    """Return the probability that a chain goes on from the replay at a step, after annealing."""
    if not loop.replay_anneal_steps:
        return loop.replay_probability
    return loop.replay_probability * min(1.0, step / loop.replay_anneal_steps)
