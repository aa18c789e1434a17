"""Stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ppl_vaebm.config.checks import require, require_loop

Objective = Literal["mle", "ratio", "ladder"]
Negatives = Literal["chains", "importance"]


@dataclass(frozen=True)
class LatentTermConfig:
    """Stage 2's first part: the first latent's own term, by maximum likelihood, with chains that decode nothing."""

    steps: int = 0
    """Optimiser steps before all others, which then leave that term as it is; needs energy.latent-term. 0 trains it
    with the rest."""
    batch_size: int = 512
    """Data points per step."""
    num_chains: int = 128
    """Chains that a step moves, by replica exchange."""
    store_size: int = 256
    """Chains that there are. The more, the later they follow the term from one mode to another."""
    num_sweeps: int = 4
    """Sweeps of the chains per step, two at least."""
    learning_rate: float = 2e-3
    """Adam's, at the start of a cosine that ends at a hundredth of it."""
    ema_decay: float = 0.998
    """Of the average of the weights that is the result."""
    energy_l2: float = 1e-5
    """Weight of mean E^2 over data and negatives."""
    balance_steps: int = 400
    """With energy.latent-balance: optimiser steps of that term, after all others. Each decodes as many draws as there
    are chains."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("batch_size", "num_chains", "store_size", "learning_rate", "balance_steps"):
            require(getattr(self, name) > 0, f"ebm.latent.{name.replace('_', '-')}", "positive", getattr(self, name))
        for name in ("steps", "energy_l2"):
            require(getattr(self, name) >= 0, f"ebm.latent.{name.replace('_', '-')}", "0 or more", getattr(self, name))
        require(self.num_sweeps >= 2, "ebm.latent.num-sweeps", "2 or more", self.num_sweeps)
        require(0 <= self.ema_decay < 1, "ebm.latent.ema-decay", "in [0, 1)", self.ema_decay)
        expected = f"at most ebm.latent.store-size ({self.store_size})"
        require(self.num_chains <= self.store_size, "ebm.latent.num-chains", expected, self.num_chains)


@dataclass(frozen=True)
class EbmConfig:
    """Stage 2: learning the energy."""

    objective: Annotated[Objective, tyro.conf.arg(aliases=["--objective"])] = "ratio"
    """mle: contrastive maximum likelihood; ratio: logistic density ratio of data against draws of the VAE; ladder: such
    ratios one upon the other, each against chains of the density of the one before (Rhodes et al. 2020)."""
    negatives: Annotated[Negatives, tyro.conf.arg(aliases=["--negatives"])] = "chains"
    """Where mle's negatives come from: the kernel's chains, or self-normalised weights over draws of the VAE."""
    ratio_steps: Annotated[int, tyro.conf.arg(aliases=["--ratio-steps"])] = 0
    """Steps of the ratio objective before mle starts."""
    rung_steps: int = 500
    """Steps on each rung of the ladder, of which the first is the ratio."""
    latent: LatentTermConfig = field(default_factory=LatentTermConfig)
    steps: int = 2_000
    """Optimiser steps."""
    batch_size: int = 256
    """Data points, and chains, per step."""
    num_importance: int = 2_048
    """Draws of the VAE per step for importance negatives and for the ratio."""
    num_transitions: int = 10
    """Kernel steps per optimiser step, for chain negatives."""
    replay_probability: float = 0.0
    """Probability that a chain continues from the replay buffer; otherwise it starts from N(0, I)."""
    replay_anneal_steps: int = 0
    """Steps over which that probability rises from 0."""
    replay_size: int = 2_000
    """Positions (of every noise, eps_x included) that the replay buffer holds."""
    learning_rate: float = 2e-3
    """Adam's, at the start of the cosine."""
    final_learning_rate: float = 2e-5
    """At its end."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient, as Adam itself has it."""
    energy_l2: float = 0.0
    """Weight of mean E^2 over data and negatives."""
    spectral_penalty: float = 0.0
    """Weight of the sum of the weight matrices' largest singular values."""
    spectral_head: bool = True
    """Count the last layer, which gives the energy, in that sum."""
    negative_image: Literal["draw", "mean"] = "draw"
    """What the loss takes the energy of where a chain ends: the x that it moved, or the decoder's mean at its latents.
    The chain itself always moves the draw."""
    temperature: float = 1.0
    """Factor on the standard deviation of every latent's prior in the VAE that the energy is learned for, and that the
    fitted density then has."""
    prior_statistics: bool = False
    """Take the VAE with the batch statistics of prior draws (svi.norm-temperature), not with those of training; log p
    of the data is lower with them."""
    clip: Literal["norm", "adam-moments"] = "norm"
    """How gradients are clipped: norm scales a larger one down to grad-clip; adam-moments bounds every element by
    3 sqrt(v) + 0.1 from the second step on, v being Adam's estimate of its mean square."""
    grad_clip: float = 100.0
    """Largest gradient norm of clip norm."""
    guard: bool = True
    """Watch the training: when one of the averages below passes its limit, go back to the last checkpoint, with a lower
    learning rate."""
    guard_patience: int = 20
    """Steps that those averages look back on, exponentially."""
    max_energy_gap: float = 100.0
    """Limit of the mean energy of data minus that of chains, either way, nats."""
    max_energy_sd: float = 1_000.0
    """Limit of the standard deviation of the energies of data or negatives, nats."""
    max_grad_norm: float = 1e6
    """Limit of the gradient's norm before it is clipped."""
    min_acceptance: float | None = None
    """Limit of the chains' Metropolis acceptance, for langevin that which its steps would have had. If not given, 0.4
    for langevin, whose step does not follow the energy, and 0.01 for the others."""
    min_exchange: float = 0.1
    """Limit of the acceptance with which chains exchange their first latent, where its term is held. Below it the rest
    of the energy has grown beyond what those chains can follow."""
    max_saturation: float = 0.9
    """Limit of the share of the negatives' pixels beyond [-1, 1]."""
    max_rollbacks: int = 3
    """How often to go back; after that the stage stops, with the last checkpoint as its result."""
    rollback_factor: float = 0.3
    """What going back multiplies the learning rate by."""
    tune: Annotated[bool, tyro.conf.arg(aliases=["--tune"])] = False
    """Before training, find the kernel's step size and the number of transitions: the largest fall of the energy per
    gradient, on a copy of the energy that the ratio has trained for a while."""
    tune_rejection: float = 0.25
    """Largest Metropolis rejection that the step found may have, or would have had."""
    tune_steps: int = 500
    """Steps of the ratio that train that copy; after few the energy is flat, and the step found too large."""
    bf16: bool = False
    """Run the networks of training's chains and losses in bfloat16; energies stay in float32. The chains are then
    adjusted to the energy as it rounds. Sampling and evaluation are in float32 all the same."""
    ema_decay: float = 0.999
    """Of the averaged energy, which validation and sampling use."""
    validate_every: int = 500
    """Steps between validations."""
    num_validation_draws: int = 20_000
    """Draws of the VAE behind each validation's log Z."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        require_loop("ebm", self)
        require(0 <= self.replay_probability <= 1, "ebm.replay-probability", "in [0, 1]", self.replay_probability)
        for name in ("ratio_steps", "replay_anneal_steps", "energy_l2", "spectral_penalty", "weight_decay"):
            flag = f"ebm.{name.replace('_', '-')}"
            require(getattr(self, name) >= 0, flag, "0 or more", getattr(self, name))
        require(all(0 <= beta < 1 for beta in self.adam_betas), "ebm.adam-betas", "two in [0, 1)", self.adam_betas)
        limits = ("max_energy_gap", "max_energy_sd", "max_grad_norm", "max_saturation", "guard_patience")
        counts = ("num_importance", "num_transitions", "num_validation_draws", "rung_steps", "temperature")
        for name in (*counts, *limits):
            flag = f"ebm.{name.replace('_', '-')}"
            require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        rate = self.min_acceptance
        require(rate is None or 0 <= rate < 1, "ebm.min-acceptance", "in [0, 1)", rate)
        require(0 <= self.min_exchange < 1, "ebm.min-exchange", "in [0, 1)", self.min_exchange)
        require(self.max_rollbacks >= 0, "ebm.max-rollbacks", "0 or more", self.max_rollbacks)
        require(0 < self.rollback_factor < 1, "ebm.rollback-factor", "in (0, 1)", self.rollback_factor)
        require(0 < self.tune_rejection < 1, "ebm.tune-rejection", "in (0, 1)", self.tune_rejection)
        require(self.tune_steps > 0, "ebm.tune-steps", "positive", self.tune_steps)
        require(self.has_chains or not self.tune, "ebm.tune", "off where no chains are run", self.tune)
        # Its trials are on an energy that the ratio has trained, which does not reach the first latent's term.
        expected = "off with ebm.latent.steps, whose term is learnt after the step would be found"
        require(not (self.tune and self.latent.steps), "ebm.tune", expected, self.tune)
        require(
            self.replay_size >= self.batch_size,
            "ebm.replay-size",
            f"at least ebm.batch-size ({self.batch_size})",
            self.replay_size,
        )

    @property
    def has_chains(self) -> bool:
        """Whether the objective takes its negatives from chains; the ladder does whatever ``negatives`` says."""
        return self.objective == "ladder" or (self.objective == "mle" and self.negatives == "chains")
