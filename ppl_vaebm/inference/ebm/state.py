"""Everything that a step of stage 2 changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.inference.ebm.guard import STAGE
from ppl_vaebm.inference.ebm.latent_term import fit_latent_balance, new_store
from ppl_vaebm.inference.ebm.negatives import Latents, PersistentChains
from ppl_vaebm.inference.ebm.validation import data_latents
from ppl_vaebm.inference.optim import AveragedWeights, DivergedError, stage_optimizer
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import initialise_from_data
from ppl_vaebm.models.layers import SpectralPenalty
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs.checkpoint import Checkpoint
from ppl_vaebm.runs.run import Run

NUM_FIRST_BATCHES = 5
"""Batches of data that an energy initialised by data sees, as in the code of VAEBM (Xiao et al. 2021)."""


class Training:
    """Everything that a step changes, at the start of an attempt with its seed; the VAE is frozen."""

    def __init__(self, config: Config, data: Data, vae: HierarchicalVAE, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.sampler = KeyedSampler(len(data.train), config.ebm.batch_size, seed_for(seed, "order", STAGE))
        self.vaebm = build_vaebm(config, vae)
        energy = self.vaebm.energy
        if energy.is_initialised is not None:
            self._initialise_from_data()
        # Chains in the joint space hardly go from one mode of the first latent to another. Negatives that never do say
        # nothing of the modes' weights, which drift if the term is trained on with the others.
        if config.ebm.latent.steps and energy.latent_net is not None:
            energy.latent_net.requires_grad_(False)
        if energy.balance_net is not None:
            energy.balance_net.requires_grad_(False)  # fitted after the loop
        with global_rng(seed_for(config.seed, "spectral")):
            layers = energy.layers() if config.ebm.spectral_head else energy.hidden_layers()
            self.spectral = SpectralPenalty(layers).to(config.device)
        self.average = AveragedWeights(energy, config.ebm.ema_decay)
        self.optimizer = stage_optimizer(energy.parameters(), config.ebm)
        self.chains = PersistentChains(config, noise_potential(self.vaebm), new_store(config, self.vaebm))
        self.num_done = 0

    def batch(self, step: int) -> tuple[Tensor, Latents | None]:
        """Return the data of a step, and their latents where the energy reads them."""
        generator = stream(self.seed, "dequantise", STAGE, step)
        x = self.data.train.batch(self.sampler.indices(step), generator).to(self.config.device)
        return x, data_latents(self.config, self.vaebm.vae, x, seed_for(self.seed, "posterior", STAGE, step))

    def averaged(self) -> VAEBM:
        """Return the VAEBM with averaged energy weights, which share their memory with the average."""
        return VAEBM(self.vaebm.vae, self.average.module)

    def fit_balance(self, run: Run) -> str | None:
        """Fit the balance of the averaged energy's joint term, if it has one, and copy it to the energy in training.

        Returns what was found if the fit diverged, else ``None``.
        """
        net, averaged_net, store = self.vaebm.energy.balance_net, self.average.module.balance_net, self.chains.partners
        if net is None:
            return None
        assert averaged_net is not None and store is not None
        try:
            fit_latent_balance(run, self.config, noise_potential(self.averaged()), store, self.num_done)
        except DivergedError as error:
            return error.reason
        net.load_state_dict(averaged_net.state_dict())
        return None

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint holds."""
        return {"energy": self.vaebm.energy, "energy_average": self.average.module, "spectral": self.spectral}

    def state(self) -> dict[str, Any]:
        """Return what else a checkpoint holds."""
        return {"optimizer": self.optimizer.state_dict(), **self.chains.state()}

    def load(self, saved: Checkpoint) -> None:
        """Restore a checkpoint."""
        for name, module in self.modules().items():
            module.load_state_dict(saved.weights[name])
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.chains.load(saved.state)
        self.num_done = self.average.num_updates = saved.step

    def _initialise_from_data(self) -> None:
        batches = [self.batch(step) for step in range(NUM_FIRST_BATCHES)]
        latents = [z for _, z in batches if z is not None]
        z = {name: torch.cat([part[name] for part in latents]) for name in latents[0]} if latents else None
        initialise_from_data(self.vaebm.energy, torch.cat([x for x, _ in batches]), z)
