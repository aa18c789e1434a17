"""Pyro's mean-field ELBO with a weight on the KL term of every latent group.

NVAE's objective (Vahdat and Kautz 2020, section 3.2 and appendix A) while the KL term warms up:

    loss = -log p(x | z) + beta * sum_l gamma_l KL_l

with gamma_l in proportion to the group's own KL and inversely to the size of its grid, so that no group is given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vaebm.devices import current_process
from ppl_vaebm.models.vae import Guide, OnePass

BALANCE_OFFSET = 0.01  # nats, added to every group's KL in the weights, so that none is zero


def balance_coefficients(latent_shapes: Mapping[str, torch.Size]) -> dict[str, float]:
    """Return NVAE's alpha of every group: the pixels of its grid over the groups of that grid; the smallest is 1.

    The event shapes are by site; a vector counts as one pixel.
    """
    pixels = {name: shape[1:].numel() for name, shape in latent_shapes.items()}
    num_alike = Counter(pixels.values())
    alpha = {name: size / num_alike[size] for name, size in pixels.items()}
    smallest = min(alpha.values())
    return {name: value / smallest for name, value in alpha.items()}


class BalancedELBO(TraceMeanField_ELBO):
    """``log p(x | z) - kl_weight * sum_l gamma_l KL_l``; with weights one it is Pyro's own estimate.

    A group's KL is analytic where Pyro knows it, and else, as with a flow on the posterior, the sample's
    ``log q - log p``: then this is Pyro's ``Trace_ELBO``. Where model and guide belong together and are called as they
    are, both traces come from one walk (:class:`~ppl_vaebm.models.vae.OnePass`).

    Args:
        balance: alpha of every group, as :func:`balance_coefficients` gives it; weighs the groups while ``kl_weight``
            is below 1. ``None`` keeps every gamma at 1.
        free_bits: nats of each group's mean KL that cost nothing (Kingma et al. 2016).
        options: of Pyro's estimator.

    Attributes:
        kl_weight: weight of the KL term, 0 to 1 while it warms up.
        elbo_nats: the ELBO with weights one in the last evaluation, summed over the batch, ``()``.
        kl_nats: KL of each latent group in the last evaluation, summed over the batch.
        gammas: weight of each latent group in the last evaluation.
    """

    kl_weight: float = 1.0

    def __init__(self, balance: Mapping[str, float] | None = None, free_bits: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.balance, self.free_bits = balance, free_bits
        self.elbo_nats = torch.zeros(())
        self.kl_nats: dict[str, Tensor] = {}
        self.gammas: dict[str, Tensor] = {}

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        if isinstance(guide, Guide) and guide.generator is model:
            guide = OnePass(guide)
        traces: tuple[Trace, Trace] = super()._get_trace(model, guide, args, kwargs)
        return traces

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        priors: Mapping[str, Any] = model_trace.nodes
        posteriors: Mapping[str, Any] = guide_trace.nodes
        samples = {name: site for name, site in priors.items() if site["type"] == "sample"}
        kl = {name: kl_rows(posteriors[name], site) for name, site in samples.items() if not site["is_observed"]}
        self.kl_nats = {name: value.detach().sum() for name, value in kl.items()}
        self.gammas = self._gammas(kl)
        plain = elbo = torch.zeros_like(next(iter(kl.values()))[0])
        for name, site in samples.items():  # in Pyro's order, so that the sum is its own to the last bit
            if site["is_observed"]:
                elbo, plain = elbo + site["log_prob_sum"], plain + site["log_prob_sum"].detach()
            else:
                elbo = elbo - self.kl_weight * (self.gammas[name] * self._paid(kl[name]))
                plain = plain - self.kl_nats[name]
        self.elbo_nats = plain
        return float(elbo.detach().neg()), -elbo

    def _gammas(self, kl: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weight of every group, ``()`` each, without a gradient."""
        if self.balance is None or self.kl_weight >= 1.0:
            return {name: torch.ones_like(value[0]) for name, value in kl.items()}
        with torch.no_grad():
            sizes = torch.stack([value.abs().mean() for value in kl.values()]) + BALANCE_OFFSET
            if current_process().world > 1:  # the weights that one process with the whole batch would take
                dist.all_reduce(sizes)
                sizes = sizes / current_process().world
            shares = sizes / torch.tensor([self.balance[name] for name in kl]).to(sizes)
            return dict(zip(kl, shares / shares.mean(), strict=True))

    def _paid(self, kl: Tensor) -> Tensor:
        """Return the part of a group's KL, ``(n,)``, that is above its free nats, summed over the batch, ``()``."""
        return kl.sum() if not self.free_bits else len(kl) * kl.mean().clamp_min(self.free_bits)


def kl_rows(posterior: Mapping[str, Any], prior: Mapping[str, Any]) -> Tensor:
    """Return one group's KL or its estimate per row, ``(n,)``, nats."""
    try:
        kl = kl_divergence(posterior["fn"], prior["fn"])
    except NotImplementedError:
        rows: Tensor = posterior["score_parts"].entropy_term - prior["log_prob"]
        return rows
    scaled: Tensor = scale_and_mask(kl, scale=posterior["scale"], mask=posterior["mask"])
    return scaled
