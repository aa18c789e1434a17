"""Stage 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ppl_vaebm.config.checks import require, require_loop


@dataclass(frozen=True)
class SviConfig:
    """Stage 1: variational inference."""

    steps: int = 10_000
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the training data; sets the steps, and the options that are shares or epochs of them."""
    batch_size: int = 256
    """Data points per step, and process."""
    optimizer: Literal["adam", "adamax"] = "adam"
    """Update rule; adamax is NVAE's."""
    epsilon: float = 1e-8
    """Added to the update rule's denominator."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    learning_rate: float = 4e-3
    """At the start of the cosine."""
    final_learning_rate: float = 4e-5
    """At its end."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0, before the cosine."""
    warmup_epochs: float | None = None
    """The same in passes over the data."""
    kl_warmup_steps: int = 5_000
    """Steps over which the weight of the KL term rises from 0 to 1."""
    kl_warmup_share: float | None = None
    """The same as a share of all steps."""
    min_kl_weight: float = 0.0
    """Floor of that weight."""
    kl_balance: bool = False
    """While the weight rises, weigh the latent groups so that each takes a share of the KL in proportion to its grid
    (NVAE)."""
    free_bits: float = 0.0
    """Nats of KL that each latent group has for nothing."""
    spectral_penalty: float = 0.0
    """Weight of the convolutions' largest singular values and the normalisations' largest gains (NVAE's lambda)."""
    spectral_penalty_start: float | None = None
    """Its value at the start; it moves to the final one in log scale as the KL's weight rises."""
    ema_decay: float = 0.999
    """Of the averaged weights, which validation and stage 2 use."""
    grad_clip: float = 100.0
    """Largest gradient norm; a larger gradient is scaled down to it."""
    bf16: bool = False
    """Run the networks in bfloat16; log densities stay in float32."""
    norm_temperature: float | None = None
    """Temperature of prior draws, from which a second set of statistics for the generator's batch normalisations is
    taken at every checkpoint; draws of the VAE alone use it. If not given, there are those of training only."""
    norm_batches: int = 500
    """Batches of 16 such draws."""
    validate_every: int = 1_000
    """Steps between validation ELBOs."""
    checkpoint_every: int = 2_000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        require_loop("svi", self)
        for name in ("warmup_steps", "kl_warmup_steps", "weight_decay", "free_bits", "spectral_penalty"):
            require(getattr(self, name) >= 0, f"svi.{name.replace('_', '-')}", "0 or more", getattr(self, name))
        for name in ("epochs", "warmup_epochs", "spectral_penalty_start", "norm_temperature"):
            value = getattr(self, name)
            require(value is None or value > 0, f"svi.{name.replace('_', '-')}", "positive", value)
        share = self.kl_warmup_share
        require(share is None or 0 <= share <= 1, "svi.kl-warmup-share", "in [0, 1]", share)
        require(self.epsilon > 0, "svi.epsilon", "positive", self.epsilon)
        require(0 <= self.min_kl_weight <= 1, "svi.min-kl-weight", "in [0, 1]", self.min_kl_weight)
        require(self.norm_batches > 0, "svi.norm-batches", "positive", self.norm_batches)
        if self.spectral_penalty_start is not None:
            require(self.spectral_penalty > 0, "svi.spectral-penalty", "positive with a start", self.spectral_penalty)

    def resolved(self, steps_per_epoch: int) -> SviConfig:
        """Turn epochs and shares into steps.

        Args:
            steps_per_epoch: steps of one pass over the training data.

        Returns:
            Options in which ``steps``, ``warmup_steps`` and ``kl_warmup_steps`` say it all.
        """
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * steps_per_epoch))
        warmup = self.warmup_steps if self.warmup_epochs is None else round(self.warmup_epochs * steps_per_epoch)
        kl_warmup = self.kl_warmup_steps if self.kl_warmup_share is None else round(self.kl_warmup_share * steps)
        counts = replace(self, steps=steps, warmup_steps=warmup, kl_warmup_steps=kl_warmup)
        return replace(counts, epochs=None, warmup_epochs=None, kl_warmup_share=None)
