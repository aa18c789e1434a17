"""Everything that a step of stage 2 changes, from a fresh start or a checkpoint, and the step itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.inference.ebm.guard import STAGE, Guard
from ppl_vaebm.inference.ebm.latent_balance import fit_latent_balance
from ppl_vaebm.inference.ebm.latent_term import fit_latent_term
from ppl_vaebm.inference.ebm.negatives import Latents, NegativePhase, Phase
from ppl_vaebm.inference.optim import AveragedWeights, GuardedOptimizer
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import initialise_from_data
from ppl_vaebm.models.layers import SpectralPenalty
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs.checkpoint import Checkpoint
from ppl_vaebm.runs.run import Run

NUM_FIRST_BATCHES = 5
"""Batches of data that an energy initialised by data sees, as in the code of VAEBM (Xiao et al. 2021)."""


class EnergyLearner:
    """The energy in training, its average, and the rest of a step's state.

    Args:
        config: the run's configuration.
        data: the data.
        vaebm: with the energy as it was made; its VAE is frozen.
        guard: says which attempt this is.
        saved: checkpoint to take up.

    Raises:
        InputError: the checkpoint's replay is of another model.
    """

    def __init__(self, config: Config, data: Data, vaebm: VAEBM, guard: Guard, saved: Checkpoint | None = None) -> None:
        self.config, self.train, self.guard = config, data.train, guard
        self.vaebm, self.energy = vaebm, vaebm.energy
        self.sampler = KeyedSampler(len(data.train), config.ebm.batch_size, seed_for(guard.seed, "order", STAGE))
        if saved is None:
            self._initialise_from_data()
        self._hold_latent_term()
        with global_rng(seed_for(config.seed, "spectral")):
            self.spectral = SpectralPenalty(self._penalised_layers()).to(config.device)
        self.average = AveragedWeights(self.energy, config.ebm.ema_decay)
        self.optimizer = GuardedOptimizer(self.energy.parameters(), config.ebm)
        self.negatives = NegativePhase(config, noise_potential(vaebm))
        self.num_done = 0
        if saved is not None:
            self._load(saved)

    def learn_latent_term(self, run: Run) -> None:
        """Learn the first latent's own term, before the first step, and let all chains begin where it puts them.

        Args:
            run: whose metrics are written.

        Raises:
            DivergedError: the energies stopped being finite.
        """
        assert self.negatives.latents is not None
        store, factor, seed = self.negatives.latents, self.guard.rate_factor, self.guard.seed
        fit_latent_term(run, self.config, self.train, self.vaebm, store, rate_factor=factor, seed=seed)
        self._hold_latent_term()
        self.negatives.restart_chains(seed)
        self.average = AveragedWeights(self.energy, self.config.ebm.ema_decay)

    @property
    def lacks_balance(self) -> bool:
        """Whether the energy is configured with a balance of its joint term that is not fitted yet."""
        net = self.average.module.balance_net
        return net is not None and not any(bool(each.any()) for each in net[-1].parameters())

    def balance_latent(self, run: Run) -> None:
        """Fit the balance of the averaged energy's joint term, after the last step; without one do nothing.

        Args:
            run: whose metrics are written.

        Raises:
            DivergedError: the joint term's range is too large.
        """
        energy = self.average.module
        if energy.balance_net is None:
            return
        assert self.negatives.latents is not None and self.energy.balance_net is not None
        potential = noise_potential(VAEBM(self.vaebm.vae, energy))
        fit_latent_balance(run, self.config, potential, self.negatives.latents, self.num_done)
        self.energy.balance_net.load_state_dict(energy.balance_net.state_dict())

    def step(self, step: int, is_logged: bool) -> tuple[Phase, dict[str, float]]:
        """Update the energy once.

        Args:
            step: number of this step.
            is_logged: whether the phase's record is wanted.

        Returns:
            The negative phase, and the monitors' values.

        Raises:
            DivergedError: a monitor passed its limit, or gradients stopped being finite.
        """
        loop, seed = self.config.ebm, self.guard.seed
        x, z = self.batch(step)
        # Half precision is for the networks; energies and what kernels make of them stay in float32.
        half = torch.autocast(x.device.type, torch.bfloat16) if loop.bf16 else nullcontext()
        with half:
            phase = self.negatives(x, step, z, seed=seed, is_logged=is_logged)
        loss = phase.loss
        if loop.energy_l2:
            loss = loss + loop.energy_l2 * phase.energy_square
        if loop.spectral_penalty:
            loss = loss + loop.spectral_penalty * self.spectral()
        grad_norm = self.optimizer.step(loss, step, self.guard.rate_factor)
        self.average.update(self.energy)
        self.num_done = step + 1
        # One transfer from the device for all of them.
        values = torch.stack([value.float() for value in phase.monitors.values()]).tolist()
        monitors = dict(zip(phase.monitors, values, strict=True)) | {"grad_norm": grad_norm}
        self.guard.watch(monitors, step)
        return phase, monitors

    def batch(self, step: int) -> tuple[Tensor, Latents | None]:
        """Take the data of a step, and their latents where the energy reads them."""
        seed = self.guard.seed
        generator = stream(seed, "dequantise", STAGE, step)
        x = self.train.batch(self.sampler.indices(step), generator).to(self.config.device)
        return x, data_latents(self.config, self.vaebm.vae, x, seed_for(seed, "posterior", STAGE, step))

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint holds."""
        own = {"energy": self.energy, "energy_average": self.average.module, "spectral": self.spectral}
        return own | self.negatives.weights()

    def state(self) -> dict[str, Any]:
        """Return the rest of what a checkpoint holds."""
        return {"optimizer": self.optimizer.state_dict(), "guard": self.guard.state(), **self.negatives.state()}

    def _load(self, saved: Checkpoint) -> None:
        self.num_done = self.average.num_updates = saved.step
        for name, module in self.modules().items():
            module.load_state_dict(saved.weights[name])
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.negatives.load(saved.state)

    def _hold_latent_term(self) -> None:
        """Keep the first latent's term as its own part leaves it.

        Chains in the joint space hardly go from one mode of the first latent to another. Negatives that never do say
        nothing of the modes' weights, which then drift: trained on, long chains lost whole classes of images.
        """
        if self.config.ebm.latent.steps:
            assert self.energy.latent_net is not None
            self.energy.latent_net.requires_grad_(False)
        if self.energy.balance_net is not None:
            self.energy.balance_net.requires_grad_(False)  # fitted by itself, after the joint term

    def _penalised_layers(self) -> list[nn.Linear | nn.Conv2d]:
        if self.config.ebm.spectral_head:
            return self.energy.layers()
        return self.energy.hidden_layers()

    def _initialise_from_data(self) -> None:
        parts = [self.batch(step) for step in range(NUM_FIRST_BATCHES)]
        x = torch.cat([x for x, _ in parts])
        latents = [z for _, z in parts if z is not None]
        z = {name: torch.cat([part[name] for part in latents]) for name in latents[0]} if latents else None
        initialise_from_data(self.energy, x, z)


def data_latents(config: Config, vae: HierarchicalVAE, x: Tensor, seed: int) -> Latents | None:
    """Draw the data's latents from the guide, for an energy of x and z.

    Args:
        config: the run's configuration.
        vae: the VAE.
        x: ``(n, *event_shape)``.
        seed: of the draws.

    Returns:
        One draw of each latent for every row, without a gradient; ``None`` for an energy of x alone.
    """
    if config.energy.inputs == "x":
        return None
    with torch.no_grad(), global_rng(seed):
        z: Latents = vae.guide(x)
    return z
