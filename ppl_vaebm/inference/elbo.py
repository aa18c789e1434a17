"""Pyro's mean-field ELBO with a weight on the KL term, and the KL of every group on record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence


class AnnealedELBO(TraceMeanField_ELBO):
    """``log p(x | z) - kl_weight * KL``; with weight one it is Pyro's own estimate, to the last bit.

    Attributes:
        kl_weight: weight of the KL term, 0 to 1 while it warms up.
        kl_nats: KL of each latent group in the last evaluation, summed over the batch.
    """

    kl_weight: float = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kl_nats: dict[str, float] = {}

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        priors: Mapping[str, Any] = model_trace.nodes
        posteriors: Mapping[str, Any] = guide_trace.nodes
        kl = {
            name: scale_and_mask(
                kl_divergence(site["fn"], priors[name]["fn"]), scale=site["scale"], mask=site["mask"]
            ).sum()
            for name, site in posteriors.items()
            if site["type"] == "sample" and name in priors
        }
        self.kl_nats = {name: float(value.detach()) for name, value in kl.items()}
        if self.kl_weight == 1.0:
            return loss, surrogate
        excess = (self.kl_weight - 1.0) * torch.stack(list(kl.values())).sum()
        return loss + float(excess.detach()), surrogate + excess
