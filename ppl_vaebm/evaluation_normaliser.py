"""What log h of test data is at least, with log Z estimated in every way.

log h is log p - E - log Z, so a lower bound of log p and an upper bound of log Z make a lower bound of it.
"""

from __future__ import annotations

import math

from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation_base import Section, mean_cell
from ppl_vaebm.evaluation_likelihood import Terms, bits_per_dim, has_bits
from ppl_vaebm.inference.diagnostics import MAX_R_HAT
from ppl_vaebm.inference.likelihood import CERTIFIED_ESS, elbo_rows
from ppl_vaebm.inference.log_z import LogZ
from ppl_vaebm.inference.normaliser import LOWER, UPPER, Effort, Normaliser, estimate_normaliser
from ppl_vaebm.loading import LoadedRun
from ppl_vaebm.rng import seed_for

CERTIFIED_WIDTH_NATS = 0.5
"""Largest distance of the bounds, two standard errors added on either side, at which log Z is certified: an error of
0.25 nats is a hundredth of a bit per dimension on the smallest images here. Chosen by us."""
MAX_ERRORS = 3.0
"""Standard errors by which an estimate may lie outside the bounds and still agree with them."""


def normaliser_sections(loaded: LoadedRun, effort: Effort, terms: Terms, seed: int) -> dict[str, Section]:
    """Estimate log Z in every way, and bound log h of the test data.

    Args:
        loaded: the fitted VAEBM.
        effort: how much to spend.
        terms: of the test data, and energies of draws of the VAE.
        seed: of all draws.

    Returns:
        Three sections: the estimates, how they were made, and log h. Where annealing failed, one that says so.
    """
    try:
        found = estimate_normaliser(loaded.potential, effort, terms.reference_energy, seed)
    except InputError as error:
        return {"log Z by every way (nats)": {"none": str(error)}}
    return {
        "log Z by every way (nats)": estimate_section(found),
        "how log Z was estimated": how_section(found),
        "log h of test data, from bounds (nats per point)": bound_section(loaded, found, terms, seed),
    }


def estimate_section(found: Normaliser) -> Section:
    """List every estimate of log Z with its error, the gap of the bounds, and the verdict."""
    section: Section = {}
    for name, estimate in found.estimates.items():
        section[name] = estimate if isinstance(estimate, str) else _cell(estimate)
    section["mean log weight, forward: a wider lower bound"] = _cell(found.lower.mean_log_weight)
    section["mean log weight, reverse: a wider upper bound"] = _cell(found.upper.mean_log_weight)
    low, high = found.lower.log_z, found.upper.log_z
    gap_error = math.hypot(low.error, high.error)
    section["gap, upper bound less lower"] = {"value": high.value - low.value, "error": gap_error}
    section["middle of the bounds"] = _cell(found.middle)
    section["discretisation of thermodynamic integration"] = found.integral.discretisation
    section["agree with the bounds"] = ", ".join(agreeing(found)) or "none"
    section["log Z certified"] = verdict(found)
    return section


def _cell(estimate: LogZ) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}


def how_section(found: Normaliser) -> Section:
    """Say what stands behind the estimates."""
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
        "effective draws, draws of the VAE": _ess(found.estimates["draws of the VAE"]),
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


def agreeing(found: Normaliser) -> list[str]:
    """Name the other estimates that lie between the bounds, or within their joint error of them.

    Args:
        found: the estimates.

    Returns:
        Names; those with too few effective draws are not asked, nor is one whose error reaches further than
        :data:`CERTIFIED_WIDTH_NATS`, which would agree with anything.
    """
    return [name for name, estimate in _asked(found).items() if _agrees(estimate, found)]


def _asked(found: Normaliser) -> dict[str, LogZ]:
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


def _agrees(estimate: LogZ, found: Normaliser) -> bool:
    low, high = sorted((found.lower.log_z, found.upper.log_z), key=lambda bound: bound.value)
    below = (low.value - estimate.value) / math.hypot(low.error, estimate.error)
    above = (estimate.value - high.value) / math.hypot(high.error, estimate.error)
    return max(below, above) <= MAX_ERRORS


def verdict(found: Normaliser) -> str:
    """Say whether log Z is known, and by what it would be wrong if not."""
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


def bound_section(loaded: LoadedRun, found: Normaliser, terms: Terms, seed: int) -> Section:
    """Put log h of the test data together, every term's error beside it.

    Args:
        loaded: the fitted VAEBM.
        found: estimates of log Z.
        terms: of the test data.
        seed: of the ELBO's draws.

    Returns:
        Bounds from the ELBO and from importance weights, with the upper bound of log Z; the estimate with the middle;
        in nats, and in bits per dimension where these mean something.
    """
    elbo, _ = elbo_rows(loaded.vaebm.vae, terms.x, seed_for(seed, "elbo"), by_level=False)
    high, middle = found.upper.log_z, found.middle
    bounds, estimates = ("log h >=", "bits per dimension, at most by"), ("log h by", "bits per dimension by")
    rows = [
        (bounds, "ELBO - E - log Z (upper bound)", _log_h(elbo, terms.energy, high)),
        (bounds, "IWAE - E - log Z (upper bound)", _log_h(terms.log_p.value, terms.energy, high)),
        (estimates, "IWAE - E - log Z (middle)", _log_h(terms.log_p.value, terms.energy, middle)),
    ]
    num = len(terms.energy)
    draws_error = float(terms.log_p.error.double().square().sum().sqrt()) / num
    section: Section = {
        "ELBO of log p (VAE)": mean_cell(elbo),
        "IWAE bound of log p (VAE)": mean_cell(terms.log_p.value),
        "its error by the guide's draws alone": draws_error,
        "E of test data": mean_cell(terms.energy),
        "log Z, upper bound": _cell(high),
        "log Z, middle of the bounds": _cell(middle),
        **{f"{in_nats} {name}": cell for (in_nats, _), name, cell in rows},
        "error of these by the choice of test points": mean_cell(terms.log_p.value - terms.energy)["error"],
        "error of these by log Z, upper bound": high.error,
        "error of these by log Z, middle": middle.error,
    }
    if has_bits(loaded.config, loaded.data):
        section |= {f"{in_bits} {name}": bits_per_dim(cell, loaded.data) for (_, in_bits), name, cell in rows}
    return section


def _log_h(log_p: Tensor, energy: Tensor, log_z: LogZ) -> dict[str, float]:
    """Average log p - E - log Z; the error joins that over points and that of log Z.

    Over points log p's own Monte Carlo error is part of the spread already.
    """
    return mean_cell(log_p.double() - energy - log_z.value, log_z.error)
