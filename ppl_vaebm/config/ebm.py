"""Options of stage ebm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ppl_vaebm.config.options import (
    BELOW_ONE,
    FRACTION,
    INSIDE_ONE,
    NOT_NEGATIVE,
    Alias,
    Checked,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    require,
)

Objective = Literal["mle", "ratio"]
Negatives = Literal["chains", "importance"]
TUNED_KERNELS = ("langevin", "mala", "hmc", "pcn")
"""Kernels whose step size ebm.tune finds; a mixture may hold one of them."""


@dataclass(frozen=True)
class LatentTermConfig(Checked):
    """First part of stage ebm: the energy E_1(z_1) of the first latent, by maximum likelihood."""

    prefix = "ebm.latent."
    steps: NonNegative = 0
    """Optimizer steps before all others, after which E_1 is frozen; needs energy.latent-term. With 0 it is trained with
    the rest."""
    ema_decay: Annotated[float, BELOW_ONE] = 0.998
    """Decay of the averaged weights, which are the result."""
    balance_steps: Positive = 400
    """With energy.latent-balance: optimizer steps of that energy, after all others. Each decodes one sample per
    chain."""


@dataclass(frozen=True)
class EbmConfig(Checked):
    """Stage ebm: learn the energy."""

    prefix = "ebm."
    objective: Annotated[Objective, Alias("--objective")] = "ratio"
    """mle: maximum likelihood with negative samples; ratio: logistic density ratio of data and VAE samples."""
    negatives: Annotated[Negatives, Alias("--negatives")] = "chains"
    """Source of mle's negatives: the kernel's chains, or VAE samples with self-normalized importance weights."""
    ratio_steps: Annotated[int, NOT_NEGATIVE, Alias("--ratio-steps")] = 0
    """Steps with the objective ratio before mle starts."""
    latent: LatentTermConfig = field(default_factory=LatentTermConfig)
    steps: Positive = 2_000
    """Optimizer steps."""
    batch_size: Positive = 256
    """Data points, and chains, per step."""
    num_importance: Positive = 2_048
    """VAE samples per step, for importance negatives and for the ratio."""
    num_transitions: Positive = 10
    """Kernel steps per optimizer step, for chain negatives."""
    replay_probability: Annotated[float, FRACTION] = 0.0
    """Probability that a chain continues from the replay buffer; otherwise it starts from N(0, I)."""
    replay_anneal_steps: NonNegative = 0
    """Steps over which that probability rises from 0."""
    replay_size: int = 2_000
    """Positions in the replay buffer, each with the noise of all latents and of x."""
    learning_rate: PositiveFloat = 2e-3
    """Adam's learning rate at the start of its cosine schedule."""
    final_learning_rate: NonNegativeFloat = 2e-5
    """Learning rate at the end of the schedule."""
    adam_betas: Annotated[tuple[float, float], BELOW_ONE] = (0.9, 0.999)
    """Decay of Adam's averages of the gradient and of its square."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient as in Adam."""
    energy_l2: NonNegativeFloat = 0.0
    """Weight of the mean of E^2 over data and negatives."""
    spectral_penalty: NonNegativeFloat = 0.0
    """Weight of the sum of the weight matrices' largest singular values."""
    spectral_head: bool = True
    """Include the last layer, which returns the energy, in that sum."""
    negative_image: Literal["draw", "mean"] = "draw"
    """Image of a negative in the loss: the x that the chain moved, or the decoder's mean at the chain's latents. The
    chain itself always moves x."""
    temperature: PositiveFloat = 1.0
    """Factor on the standard deviation of every latent's prior in the VAE, during the fit and in the fitted density."""
    prior_statistics: bool = False
    """Use the VAE with the batch statistics of its samples (svi.norm-temperature), not with those of training; log p of
    data is lower with them."""
    clip: Literal["norm", "adam-moments"] = "norm"
    """norm: scale gradients down to norm grad-clip; adam-moments: from the second step, bound each element by
    3 sqrt(v) + 0.1, with Adam's estimate v of its mean square."""
    grad_clip: PositiveFloat = 100.0
    """Largest norm of the gradient, with clip norm."""
    guard: bool = True
    """Monitor the training: when an average over about 20 steps exceeds its limit, return to the last checkpoint with a
    lower learning rate. The limits that have no option here are constants."""
    max_energy_gap: PositiveFloat = 100.0
    """Limit of the absolute difference between the mean energies of data and chains, in nats."""
    min_acceptance: Annotated[float | None, BELOW_ONE] = None
    """Lower limit of the chains' Metropolis acceptance (for langevin that of the same steps, adjusted). The default is
    0.4 for langevin, whose step size does not follow the energy, and 0.01 for the others."""
    max_rollbacks: NonNegative = 3
    """Number of returns to a checkpoint, after which the stage stops with the last checkpoint as its result."""
    rollback_factor: Annotated[float, INSIDE_ONE] = 0.3
    """Factor on the learning rate at each return."""
    tune: Annotated[bool, Alias("--tune")] = False
    """Before training, search the kernel's step size and the number of transitions for the largest decrease of energy
    per gradient evaluation, on a copy of the energy that the ratio has trained for a while."""
    bf16: bool = False
    """Run the networks of training's chains and losses in bfloat16; energies stay in float32. The chains then sample
    the rounded energy. Sampling and evaluation always use float32."""
    ema_decay: Annotated[float, BELOW_ONE] = 0.999
    """Decay of the averaged energy, which validation and sampling use."""
    validate_every: Positive = 500
    """Steps between validations."""
    num_validation_draws: Positive = 20_000
    """VAE samples behind the log Z of each validation."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        final = self.final_learning_rate
        require(final <= self.learning_rate, "ebm.final-learning-rate", "in [0, learning-rate]", final)
        require(self.has_chains or not self.tune, "ebm.tune", "off where no chains are run", self.tune)
        # Its trials are on an energy that the ratio has trained, which does not reach E_1(z_1).
        expected = "off with ebm.latent.steps, whose term is learnt after the step would be found"
        require(not (self.tune and self.latent.steps), "ebm.tune", expected, self.tune)
        expected = f"at least ebm.batch-size ({self.batch_size})"
        require(self.replay_size >= self.batch_size, "ebm.replay-size", expected, self.replay_size)

    @property
    def has_chains(self) -> bool:
        """Whether the negatives come from chains."""
        return self.objective == "mle" and self.negatives == "chains"
