"""Options of stage svi."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ppl_vaebm.config.options import (
    BELOW_ONE,
    FRACTION,
    POSITIVE,
    Checked,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    require,
)


@dataclass(frozen=True)
class SviConfig(Checked):
    """Stage svi: fit the VAE by stochastic variational inference."""

    prefix = "svi."
    steps: Positive = 10_000
    """Optimizer steps."""
    epochs: Annotated[float | None, POSITIVE] = None
    """Passes over the training data; replaces svi.steps."""
    batch_size: Positive = 256
    """Data points per step and process."""
    optimizer: Literal["adam", "adamax"] = "adam"
    """Update rule; NVAE uses adamax."""
    epsilon: PositiveFloat = 1e-8
    """Constant added to the denominator of the update rule."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient."""
    learning_rate: PositiveFloat = 4e-3
    """Learning rate at the start of its cosine schedule."""
    final_learning_rate: NonNegativeFloat = 4e-5
    """Learning rate at the end of the schedule."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from 0 before the cosine."""
    warmup_epochs: Annotated[float | None, POSITIVE] = None
    """The same in passes over the data; replaces svi.warmup-steps."""
    kl_warmup_steps: NonNegative = 5_000
    """Steps over which the weight of the KL term rises from 0 to 1."""
    kl_warmup_share: Annotated[float | None, FRACTION] = None
    """The same as a fraction of all steps; replaces svi.kl-warmup-steps."""
    min_kl_weight: Annotated[float, FRACTION] = 0.0
    """Lower bound of that weight."""
    kl_balance: bool = False
    """While the weight rises, balance the KL of the latent groups by the size of their grids (NVAE)."""
    free_bits: NonNegativeFloat = 0.0
    """KL of each latent group that is not penalized, in nats."""
    spectral_penalty: NonNegativeFloat = 0.0
    """Weight of the sum of the convolutions' largest singular values and the batch normalizations' largest gains
    (NVAE's lambda)."""
    spectral_penalty_start: Annotated[float | None, POSITIVE] = None
    """Initial value of that weight; it moves to the final one in log scale while the KL weight rises."""
    ema_decay: Annotated[float, BELOW_ONE] = 0.999
    """Decay of the averaged weights, which validation and stage ebm use."""
    grad_clip: PositiveFloat = 100.0
    """Largest norm of the gradient; larger ones are scaled down to it."""
    bf16: bool = False
    """Run the networks in bfloat16; log densities stay in float32."""
    norm_temperature: Annotated[float | None, POSITIVE] = None
    """Temperature of VAE samples that give the generator's batch normalizations a second set of statistics at each
    checkpoint, used when the VAE is sampled. Without it only the statistics of training exist."""
    norm_batches: Positive = 500
    """Batches of 16 such samples."""
    validate_every: Positive = 1_000
    """Steps between evaluations of the ELBO on validation data."""
    checkpoint_every: Positive = 2_000
    """Steps between checkpoints."""
    log_every: Positive = 50
    """Steps between lines of metrics.jsonl."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        final = self.final_learning_rate
        require(final <= self.learning_rate, "svi.final-learning-rate", "in [0, learning-rate]", final)
        if self.spectral_penalty_start is not None:
            require(self.spectral_penalty > 0, "svi.spectral-penalty", "positive with a start", self.spectral_penalty)

    def resolved(self, steps_per_epoch: int) -> SviConfig:
        """Turn epochs and fractions into ``steps``, ``warmup_steps`` and ``kl_warmup_steps``."""
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * steps_per_epoch))
        warmup = self.warmup_steps if self.warmup_epochs is None else round(self.warmup_epochs * steps_per_epoch)
        kl_warmup = self.kl_warmup_steps if self.kl_warmup_share is None else round(self.kl_warmup_share * steps)
        counts = replace(self, steps=steps, warmup_steps=warmup, kl_warmup_steps=kl_warmup)
        return replace(counts, epochs=None, warmup_epochs=None, kl_warmup_share=None)
