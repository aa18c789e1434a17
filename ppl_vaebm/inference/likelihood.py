"""Normalized likelihoods: log p(x) by importance weighting, log Z from VAE samples, and so log h(x).

``log h(x) = log p(x) - E(x) - log Z`` with ``Z = E_p[exp(-E(x))]``. VAE samples estimate Z well where their weights
exp(-E) have many effective samples, which the estimate reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions import Independent, Normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vaebm.inference.elbo import kl_rows
from ppl_vaebm.inference.kernels.base import value_only
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vae import HierarchicalVAE, OnePass
from ppl_vaebm.rng import global_rng

BATCH = 10_000
"""Rows whose random numbers are drawn together, fewer for large models. The draws depend on it."""
NUM_PILOT = 50_000
"""VAE samples that set the first bound of the rejection sampler, at most."""
PILOT_PER_DRAW = 5
"""VAE samples of that pilot for every draw of h. Chosen by us."""
MIN_PILOT = 2_000
"""VAE samples of that pilot, at least. Chosen by us."""
WIDE_SCALES = (1.0, 2.0, 4.0)
"""Mixture of guides for few latents. On gaussians25 with 500 draws per point it took the bias of the mean log p from
-0.021 to -0.004 nats, against 3,000 draws."""
MAX_WIDE_DIM = 8
"""Latent values d up to which they are used: a guide twice as wide has 2^-d of its mass where the narrow one is."""
CERTIFIED_ESS = 100.0
"""Effective samples below which a log Z from VAE samples is reported as not certified."""


class LogLikelihood(NamedTuple):
    """Log density of every data point."""

    value: Tensor
    """``(n,)``, nats."""
    error: Tensor
    """Monte Carlo standard error of each, ``(n,)``, nats."""


class RejectionError(RuntimeError):
    """Rejection from the VAE cannot draw h: h is too far from the VAE, or the energy is not a number."""


class ExactDraws(NamedTuple):
    """Independent draws of h."""

    position: Tensor
    """Noise, ``(num, D)``."""
    acceptance_rate: float
    """Fraction of the VAE samples that were kept."""
    num_proposals: int
    """VAE samples that it took, those before the bound was last raised included."""


def reference_energies(potential: NoisePotential, generator: torch.Generator, num: int) -> Tensor:
    """Evaluate the energy of VAE samples, ``(num,)``, nats."""
    batch = min(BATCH, potential.rows_per_block)
    sizes = [min(batch, num - start) for start in range(0, num, batch)]
    return torch.cat([value_only(potential, potential.draw_reference(generator, size)) for size in sizes])


def log_z_from_vae(potential: NoisePotential, generator: torch.Generator, num: int) -> LogZ:
    """Estimate log Z from VAE samples; trust it where its ``ess`` is large."""
    return log_mean_exp(-reference_energies(potential, generator, num))


def exact_draws(
    potential: NoisePotential, generator: torch.Generator, num: int, max_proposals: int = 20_000_000
) -> ExactDraws:
    """Draw independently from h by rejection from at most ``max_proposals`` VAE samples.

    A sample is kept with probability ``exp(-E - bound)``. The bound starts as the largest -E of a pilot. A sample
    beyond it raises it, and those kept so far are thinned to match, so that the result is exact if no unseen VAE sample
    has a larger weight.

    Raises:
        RejectionError: not enough were kept, or an energy is NaN or minus infinity.
    """
    num_pilot = min(NUM_PILOT, max(MIN_PILOT, PILOT_PER_DRAW * num))
    pilot = _checked(-reference_energies(potential, generator, num_pilot).double())
    bound = float(pilot.max())
    fraction_kept = float((pilot - bound).exp().mean()) if bound > -math.inf else 0.0
    # Twice over, for the pilot's own chance; it also spares the wait where there is no hope.
    if 2 * max_proposals * fraction_kept < num:
        raise RejectionError(
            f"rejection would keep about {fraction_kept:.2g} of the VAE samples: "
            "h is too far from the VAE to be drawn this way; sample it by chains"
        )
    kept: list[Tensor] = []
    kept_count, proposals = 0, 0
    batch = min(BATCH, potential.rows_per_block)
    for proposals in range(batch, max_proposals + batch, batch):
        position = potential.draw_reference(generator, batch)
        log_weight = _checked(-value_only(potential, position).double())
        largest = float(log_weight.max())
        if largest > bound:
            kept = [_thinned(block, bound - largest, generator) for block in kept]
            bound = largest
        kept.append(_thinned(position, log_weight - bound, generator))
        kept_count = sum(map(len, kept))
        if kept_count >= num:
            return ExactDraws(torch.cat(kept)[:num], kept_count / proposals, proposals)
    raise RejectionError(
        f"rejection kept {kept_count} of {proposals} VAE samples where {num} were asked for: "
        "h is too far from the VAE to be drawn this way; sample it by chains"
    )


def _checked(log_weight: Tensor) -> Tensor:
    num_bad = int((log_weight.isnan() | (log_weight == math.inf)).sum())
    if num_bad:
        raise RejectionError(
            f"expected energies above minus infinity, found {num_bad} of {len(log_weight)} VAE samples whose energy is "
            "NaN or minus infinity: the energy network has diverged, so fit stage ebm anew with a smaller learning rate"
        )
    return log_weight


def _thinned(position: Tensor, log_probability: float | Tensor, generator: torch.Generator) -> Tensor:
    """Keep each row with its probability, given by its log."""
    uniform = torch.rand(len(position), generator=generator, dtype=torch.float64, device=position.device)
    return position[uniform.log() < log_probability]


def elbo_rows(
    vae: HierarchicalVAE, x: Tensor, seed: int, is_discretized: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Estimate the ELBO of data ``(n, *event_shape)`` by one posterior sample of a VAE in evaluation mode.

    ``is_discretized`` is as in :func:`log_p`; the ELBO of stage svi is discretised. Returns the ELBO and the KL of each
    group, ``(n,)`` each, float64, nats.
    """
    with torch.no_grad(), global_rng(seed):
        parts = [_elbo_rows(vae, rows, is_discretized) for rows in x.split(vae.rows_per_block)]
    kl = {name: torch.cat([part[1][name] for part in parts]) for name in vae.model.latent_shapes}
    return torch.cat([elbo for elbo, _ in parts]), kl


def _elbo_rows(vae: HierarchicalVAE, x: Tensor, is_discretized: bool) -> tuple[Tensor, dict[str, Tensor]]:
    one_pass = OnePass(vae.guide, is_discretized=is_discretized)
    one_pass(x)
    model, guide = one_pass.get_traces()
    model.compute_log_prob()
    guide.compute_score_parts()
    priors, posteriors = dict(model.nodes), dict(guide.nodes)
    kl = {name: kl_rows(posteriors[name], priors[name]).double() for name in vae.model.latent_shapes}
    return priors["x"]["log_prob"].double() - torch.stack(list(kl.values())).sum(0), kl


def log_p(
    vae: HierarchicalVAE,
    x: Tensor,
    seed: int,
    num_importance: int,
    scales: Sequence[float] | None = None,
    is_discretized: bool = False,
) -> LogLikelihood:
    """Estimate the VAE's log density by importance weighting (Burda et al. 2016) with its guide.

    A guide is often narrower than the posterior, and then a few draws carry the estimate. Therefore the draws come from
    an equal mixture of the guide and of copies with multiplied standard deviations, and are weighted by its density
    (balance heuristic, Veach and Guibas 1995). The expectation of the estimate is a lower bound that tightens with
    ``num_importance``.

    Args:
        vae: the VAE, in evaluation mode.
        x: ``(n, *event_shape)``.
        num_importance: draws per data point, at least 2; raised to a multiple of the number of scales.
        scales: factors of the mixture; ``None`` takes :data:`WIDE_SCALES` up to :data:`MAX_WIDE_DIM` latent values,
            else the guide alone.
        is_discretized: score x by the decoder's discretised distribution, as stage svi does, and not by the continuous
            one that is VAEBM's base measure; for many decoders the two are one.
    """
    if scales is None:
        latent_dim = sum(shape.numel() for shape in vae.model.latent_shapes.values())
        scales = WIDE_SCALES if latent_dim <= MAX_WIDE_DIM else (1.0,)
    per_scale = -(-num_importance // len(scales))
    estimate = _narrow_log_weights if tuple(scales) == (1.0,) else partial(_wide_log_weights, scales=scales)
    with torch.no_grad(), global_rng(seed):
        blocks = x.split(max(1, min(BATCH, vae.rows_per_block) // (per_scale * len(scales))))
        return log_mean_weights(estimate(vae, rows, per_scale, is_discretized=is_discretized) for rows in blocks)


def log_mean_weights(blocks: Iterable[Tensor]) -> LogLikelihood:
    """Estimate the log of each point's mean weight from blocks of points, their log weights ``(n, num_draws)``."""
    values, errors = [], []
    for log_weights in blocks:
        values.append(log_weights.logsumexp(1) - math.log(log_weights.shape[1]))
        ratios = (log_weights - values[-1].unsqueeze(1)).exp()
        errors.append(ratios.std(1) / math.sqrt(log_weights.shape[1]))
    return LogLikelihood(torch.cat(values), torch.cat(errors))


def _narrow_log_weights(vae: HierarchicalVAE, x: Tensor, num_draws: int, is_discretized: bool) -> Tensor:
    """``log p(x, z) - log q(z | x)`` for draws of the guide, ``(n, num_draws)``, in one walk for model and guide."""
    per_pass = max(1, min(num_draws, min(BATCH, vae.rows_per_block) // len(x)))
    parts = []
    for start in range(0, num_draws, per_pass):
        one_pass = OnePass(vae.guide, min(per_pass, num_draws - start), is_discretized)
        one_pass(x)
        model_trace, guide_trace = one_pass.get_traces()
        parts.append((_log_prob(model_trace) - _log_prob(guide_trace)).double().unflatten(0, (len(x), -1)))
    return torch.cat(parts, dim=1)


def _wide_log_weights(
    vae: HierarchicalVAE, x: Tensor, num_draws: int, is_discretized: bool, scales: Sequence[float]
) -> Tensor:
    """Log weights of as many draws of every component against their mixture, ``(n, scales * num_draws)``."""
    repeated = x.repeat_interleave(num_draws, 0)
    parts = [_component_log_weights(vae, repeated, scale, scales, is_discretized) for scale in scales]
    return torch.cat([part.unflatten(0, (len(x), -1)) for part in parts], dim=1)


def _component_log_weights(
    vae: HierarchicalVAE, x: Tensor, scale: float, scales: Sequence[float], is_discretized: bool
) -> Tensor:
    """Log weight of one draw of z per row from one component, ``(n,)``, by Pyro's own traces."""
    with _Widened(scale):
        guide_trace = poutine.trace(vae.guide).get_trace(x)
    model = partial(vae.model, is_discretized=is_discretized)
    log_joint = _log_prob(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x))
    components = []
    for other in scales:
        with _Widened(other):
            components.append(_log_prob(poutine.trace(poutine.replay(vae.guide, trace=guide_trace)).get_trace(x)))
    return (log_joint - torch.stack(components).logsumexp(0) + math.log(len(scales))).double()


class _Widened(Messenger):
    """Effect handler that multiplies the standard deviation of every Normal site."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Any) -> None:
        posterior = msg["fn"]
        if isinstance(posterior, Independent) and isinstance(posterior.base_dist, Normal):
            wide = Normal(posterior.base_dist.loc, self.factor * posterior.base_dist.scale)
            msg["fn"] = Independent(wide, posterior.reinterpreted_batch_ndims)


def _log_prob(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
    return torch.stack([site["log_prob"] for site in sites]).sum(0)
