"""Lower bounds on log h of test data, with log Z estimated by several methods.

With an energy of x alone, ``log h = log p - E - log Z``: a lower bound on log p and an upper bound on log Z give a
lower bound on log h. With an energy of x and z, ``log h + log Z`` is the log of the integral over z of
``p(x, z) exp(-E(x, z))``. Importance weights of that product bound it from below on average, and so does the ELBO minus
E at draws of the guide; the importance-weighted log p minus that E does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.likelihood import Terms, bits_per_dim, has_bits
from ppl_vaebm.evaluation.sections import Effort, Rows, Section, mean_value
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT
from ppl_vaebm.inference.likelihood import BATCH, CERTIFIED_ESS, LogLikelihood, elbo_rows, log_mean_weights
from ppl_vaebm.inference.log_z.base import LogZ
from ppl_vaebm.inference.normalizing_constant import LOWER, UPPER, LogZEstimates, estimate_log_z
from ppl_vaebm.models.vae import OnePass
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, seed_for
from ppl_vaebm.runs.loading import LoadedRun

CERTIFIED_WIDTH_NATS = 0.5
"""Largest distance of the bounds, two standard errors added on either side, at which log Z is certified. Chosen by us:
0.25 nats are 0.01 bits per dimension of the smallest images here."""
MAX_ERRORS = 3.0
"""Standard errors by which an estimate may lie outside the bounds and still agree with them."""
NUM_JOINT_DRAWS = 100
"""Draws of the guide per test point for the bound with an energy of x and z. More give a tighter bound. Chosen by us:
fewer than those for log p, because each needs a pass of the energy too."""


def log_z_sections(loaded: LoadedRun, effort: Effort, terms: Terms, seed: int) -> list[Section]:
    """Estimate log Z by all methods, and bound log h of the test data.

    Returns:
        Three sections: the estimates, how they were made, and log h. One with the reason where annealing failed.
    """
    try:
        found = estimate_log_z(
            loaded.potential, terms.reference_energy, seed, effort.num_particles, effort.num_temperatures
        )
    except InputError as error:
        return [Section("log Z by all methods (nats)", {"": {"none": str(error)}})]
    return [
        Section("log Z by all methods (nats)", {"": estimate_section(found)}),
        Section("how log Z was estimated", {"": how_section(found)}),
        Section("log h of test data, from bounds (nats per point)", {"": bound_section(loaded, found, terms, seed)}),
    ]


def estimate_section(found: LogZEstimates) -> Rows:
    """List all estimates of log Z with their errors, the gap of the bounds, and the verdict."""
    low, high = found.lower.log_z, found.upper.log_z
    gap = LogZ(high.value - low.value, math.hypot(low.error, high.error), math.nan)
    return {
        **{name: value if isinstance(value, str) else _cell(value) for name, value in found.estimates.items()},
        "mean log weight, forward: a wider lower bound": _cell(found.lower.mean_log_weight),
        "mean log weight, reverse: a wider upper bound": _cell(found.upper.mean_log_weight),
        "gap, upper bound less lower": _cell(gap),
        "middle of the bounds": _cell(found.middle),
        "discretisation of thermodynamic integration": found.integral.discretisation,
        "agree with the bounds": ", ".join(agreeing(found)) or "none",
        "log Z certified": verdict(found),
    }


def _cell(estimate: LogZ) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}


def how_section(found: LogZEstimates) -> Rows:
    """Report the diagnostics of the estimates."""
    down, up = found.down, found.up
    ladder = found.ladder_report
    return {
        "barrier of the path (nats)": found.pilot.barrier,
        "temperatures": len(down.acceptance_rate) + 1,
        "particles": len(down.log_weights),
        "effective particles, forward": found.lower.log_z.ess,
        "effective particles, reverse": found.upper.log_z.ess,
        "acceptance over temperatures, least": float(down.acceptance_rate.min()) if len(down.acceptance_rate) else 1.0,
        "divergent moves, forward and reverse": down.num_divergent + up.num_divergent,
        "particles without a finite weight": found.lower.num_not_finite + found.upper.num_not_finite,
        "evaluations, forward and reverse": down.num_evals + up.num_evals,
        "reverse starts": found.target.source,
        "R-hat of these": "none: they are independent" if found.target.r_hat is None else found.target.r_hat,
        "unique ancestors of the sequential samplers": ", ".join(str(p.num_ancestors) for p in found.populations),
        "their resamplings": ", ".join(str(p.num_resamplings) for p in found.populations),
        "effective draws, bridge": _ess(found.estimates["bridge from the VAE to h"]),
        "effective draws, VAE samples": _ess(found.estimates["VAE samples"]),
        "levels of the ladder": ", ".join(f"{b:.3f}" for b in _numbers(ladder.get("inverse_temperatures"))),
        "swap rates of its neighbours": ", ".join(f"{rate:.2f}" for rate in _numbers(ladder.get("swap_rates"))),
        "its round trips": int(sum(_numbers(ladder.get("num_round_trips")))),
        "R-hat of the energies at its levels": found.ladder_r_hat,
        "mean energy at its levels (nats)": _listed(found.integral.mean_energy),
        "their Monte Carlo errors": _listed(found.integral.mean_energy_error),
    }


def _ess(estimate: LogZ | str) -> float | str:
    return estimate if isinstance(estimate, str) else estimate.ess


def _numbers(value: float | list[float] | None) -> list[float]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())


def agreeing(found: LogZEstimates) -> list[str]:
    """Name the other estimates that lie between the bounds, or within their joint error of them.

    Estimates with few effective draws, or with an error above :data:`CERTIFIED_WIDTH_NATS`, are left out.
    """
    return [name for name, estimate in _asked(found).items() if _agrees(estimate, found)]


def _asked(found: LogZEstimates) -> dict[str, LogZ]:
    asked = {}
    for name, estimate in found.estimates.items():
        if name in (LOWER, UPPER) or isinstance(estimate, str):
            continue
        if name == "thermodynamic integration":
            error = math.hypot(estimate.error, found.integral.discretisation)
            estimate = estimate._replace(error=error)
        # A sequential sampler's effective size counts populations.
        has_draws = name == "sequential samplers" or estimate.ess >= CERTIFIED_ESS
        if has_draws and MAX_ERRORS * estimate.error <= CERTIFIED_WIDTH_NATS:
            asked[name] = estimate
    return asked


def _agrees(estimate: LogZ, found: LogZEstimates) -> bool:
    low, high = sorted((found.lower.log_z, found.upper.log_z), key=lambda bound: bound.value)
    # Products, for the errors may be 0: that of an energy which does not vary.
    is_above_low = low.value - estimate.value <= MAX_ERRORS * math.hypot(low.error, estimate.error)
    is_below_high = estimate.value - high.value <= MAX_ERRORS * math.hypot(high.error, estimate.error)
    return is_above_low and is_below_high


def verdict(found: LogZEstimates) -> str:
    """Say whether log Z is certified, with the reason."""
    low, high = found.lower.log_z, found.upper.log_z
    num_bad = found.lower.num_not_finite + found.upper.num_not_finite
    if num_bad:
        return f"no: {num_bad} annealed particles have no finite weight"
    width = high.value - low.value + 2 * (low.error + high.error)
    if not width <= CERTIFIED_WIDTH_NATS:
        return f"no: the bounds leave {width:.2g} nats, two errors included, where {CERTIFIED_WIDTH_NATS:g} are allowed"
    if (low.value - high.value) > MAX_ERRORS * math.hypot(low.error, high.error):
        return "no: the lower bound is above the upper one by more than their errors allow"
    if found.target.r_hat is not None and not found.target.r_hat <= MAX_R_HAT:
        return f"no: the chains behind the upper bound have R-hat {found.target.r_hat:.3f}"
    agree, asked = agreeing(found), _asked(found)
    if not agree:
        return "no: no other estimate agrees with the bounds"
    differ = [name for name in asked if name not in agree]
    if differ:
        return f"no: {', '.join(differ)} differ from the bounds by more than {MAX_ERRORS:g} errors"
    given = "" if found.target.r_hat is None else f", as far as chains of R-hat {found.target.r_hat:.3f} have converged"
    return f"yes: the bounds and {len(agree)} of {len(found.estimates) - 2} other estimates agree{given}"


def bound_section(loaded: LoadedRun, found: LogZEstimates, terms: Terms, seed: int) -> Rows:
    """Compute log h of the test data and the errors of its terms, in nats, and in bits per dimension where defined.

    There are bounds by the ELBO and by importance weights (of :func:`joint_bound` for an energy of x and z) with the
    upper bound on log Z, and the estimate with the middle.
    """
    elbo, _ = elbo_rows(loaded.vaebm.vae, terms.x, seed_for(seed, "elbo"), is_discretized=False)
    high, middle = found.upper.log_z, found.middle
    name, weighted, more = "IWAE - E", terms.log_p.value.double() - terms.energy, Rows()
    if loaded.config.energy.inputs != "x":
        joint = joint_bound(loaded.vaebm, terms.x, seed_for(seed, "joint"), NUM_JOINT_DRAWS)
        name, weighted = "joint IWAE", joint.value
        more = {
            f"joint IWAE bound of log h + log Z, {NUM_JOINT_DRAWS} draws": mean_value(weighted),
            "error of that by the guide's draws alone": _joined_error(joint),
        }
    bounds, estimates = ("log h >=", "bits per dimension, at most by"), ("log h by", "bits per dimension by")
    rows = [
        (bounds, "ELBO - E - log Z (upper bound)", _log_h(elbo - terms.energy, high)),
        (bounds, f"{name} - log Z (upper bound)", _log_h(weighted, high)),
        (estimates, f"{name} - log Z (middle)", _log_h(weighted, middle)),
    ]
    section: Rows = {
        "ELBO of log p (VAE)": mean_value(elbo),
        "IWAE bound of log p (VAE)": mean_value(terms.log_p.value),
        "its error by the guide's draws alone": _joined_error(terms.log_p),
        "E of test data": mean_value(terms.energy),
        **more,
        "log Z, upper bound": _cell(high),
        "log Z, middle of the bounds": _cell(middle),
        **{f"{in_nats} {of}": cell for (in_nats, _), of, cell in rows},
        "error of these by the choice of test points": mean_value(weighted)["error"],
        "error of these by log Z, upper bound": high.error,
        "error of these by log Z, middle": middle.error,
    }
    if has_bits(loaded.config, loaded.data):
        section |= {f"{in_bits} {of}": bits_per_dim(cell, loaded.data) for (_, in_bits), of, cell in rows}
    return section


def _log_h(unnormalised: Tensor, log_z: LogZ) -> dict[str, float]:
    """Return the mean of ``log h + log Z`` minus log Z; its error joins the one over test points and that of log Z."""
    return mean_value(unnormalised - log_z.value, log_z.error)


def _joined_error(rows: LogLikelihood) -> float:
    """Return the standard error of the mean over points by the draws behind each."""
    return float(rows.error.double().square().sum().sqrt()) / len(rows.error)


def joint_bound(vaebm: VAEBM, x: Tensor, seed: int, num_draws: int) -> LogLikelihood:
    """Bound log h + log Z of every point from below, for an energy of x and z or of x alone.

    ``log mean exp(log p(x, z) - log q(z | x) - E(x, z))`` over draws of the guide (Burda et al. 2016, with unnormalized
    h instead of p). Its expectation is at most ``log h + log Z`` with any number of draws, at least 2 (Jensen). x,
    ``(n, *event_shape)``, is on the model's device; the bound and its Monte Carlo error are float64.
    """
    rows_per_block = min(BATCH, vaebm.vae.rows_per_block)
    sizes = [min(rows_per_block, num_draws - start) for start in range(0, num_draws, rows_per_block)]
    with torch.no_grad(), global_rng(seed):
        blocks = x.split(max(1, rows_per_block // num_draws))
        return log_mean_weights(
            torch.cat([_joint_log_weights(vaebm, rows, size) for size in sizes], 1) for rows in blocks
        )


def _joint_log_weights(vaebm: VAEBM, x: Tensor, num_draws: int) -> Tensor:
    """``log p(x, z) - log q(z | x) - E(x, z)`` for draws of the guide, ``(n, num_draws)``, float64."""
    one_pass = OnePass(vaebm.vae.guide, num_draws, is_discretized=False)
    one_pass(x)
    model, guide = one_pass.get_traces()
    model.compute_log_prob()
    guide.compute_log_prob()
    priors, posteriors = dict(model.nodes), dict(guide.nodes)
    z = {name: posteriors[name]["value"] for name in vaebm.vae.model.latent_shapes}
    log_weights: Tensor = priors["x"]["log_prob"].double() - vaebm.energy(priors["x"]["value"], z).double()
    for name in z:
        log_weights = log_weights + (priors[name]["log_prob"] - posteriors[name]["log_prob"]).double()
    return log_weights.reshape(len(x), num_draws)
