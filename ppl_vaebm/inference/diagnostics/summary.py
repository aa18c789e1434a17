"""From chains to a verdict: ArviZ containers and files, R-hat, effective sample sizes, BFMI, divergences.

R-hat and effective sample sizes are those of Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021),
doi 10.1214/20-BA1221, as ArviZ computes them; ArviZ 0.23 and 1.x are both served. Nothing is averaged
over chains before it is compared across them. ``convergence.py`` serves all coordinates at once, ``text.py`` turns the
numbers into sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.arviz_io import (
    InferenceData,
    arviz,
    cut,
    load_netcdf,
    save_netcdf,
    scalar_draws,
    scalar_elements,
    stat,
    to_inference_data,
)
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, TAIL_PROBABILITIES, FloatArray, nested_r_hat

__all__ = [
    "MIN_DRAWS",
    "FunctionalSummary",
    "InferenceData",
    "bfmi",
    "cut",
    "is_converged",
    "load_netcdf",
    "num_divergent",
    "save_netcdf",
    "scalar_draws",
    "stat",
    "summarize",
    "to_inference_data",
    "worst",
]

MAX_R_HAT = 1.01
"""Chains whose R-hat is above this disagree: Vehtari et al. (2021)."""
MIN_ESS = 400.0
"""With fewer effective draws R-hat and the errors are themselves noisy: Vehtari et al. (2021)."""
MIN_CHAINS = 4
"""Chains needed for R-hat to see modes that some of them miss: Vehtari et al. (2021)."""
MIN_BFMI = 0.3
"""A smaller BFMI means that the energy diffuses: Stan's threshold, after Betancourt (2016), arXiv 1604.00695."""

_NAN = float("nan")


class FunctionalSummary(NamedTuple):
    """What the chains say about one number per draw."""

    name: str
    """The functional; elements of a vector are ``name[0]``, ``name[1]``, ..."""
    mean: float
    """Mean over all draws of all chains, in the functional's own unit; so are the next two."""
    sd: float
    """Standard deviation over all draws of all chains."""
    mcse_mean: float
    """Monte Carlo standard error of the mean."""
    r_hat: float
    """Rank-normalised split R-hat; 1 when the chains agree, nan when the functional never moves."""
    r_hat_nested: float
    """The same between groups of chains that share a start, nan where there are none: Margossian et al. (2024)."""
    ess_bulk: float
    """Independent draws that would fix the mean as well."""
    ess_tail: float
    """Independent draws that would fix the 5 % and 95 % quantiles as well, the worse of the two."""
    autocorrelation_time: float
    """Integrated, of the values themselves: draws per independent draw of the mean."""
    ess_per_1000_evals: float
    """``ess_bulk`` per 1000 evaluations of the potential; the warm-up is not counted."""
    ess_per_second: float
    """``ess_bulk`` per second; the warm-up is not counted."""


def summarize(idata: InferenceData) -> list[FunctionalSummary]:
    """Judge every scalar element of every posterior variable.

    A functional that never moves gets nan for R-hat, effective sample sizes and error (ArviZ would credit
    it with all draws, which rewards a sampler that is stuck); draws that are not numbers give nan too.
    With one chain R-hat compares the quarters of it; the text of a run marks any R-hat of few chains.

    Args:
        idata: at least 4 draws per chain. With an attribute ``chains_per_start`` above 1, so many neighbouring
            chains began at one start, and the nested R-hat compares the starts.

    Returns:
        One summary per functional, in the order of the file.

    Raises:
        InputError: fewer than 4 draws per chain.
    """
    posterior = idata["posterior"]
    if posterior.sizes["draw"] < MIN_DRAWS:
        raise InputError(
            f"expected at least {MIN_DRAWS} draws per chain, found {posterior.sizes['draw']}: draw longer chains"
        )
    evals, seconds = (float(posterior.attrs.get(key, _NAN)) for key in ("num_evals", "seconds"))
    superchains = np.arange(posterior.sizes["chain"]) // int(posterior.attrs.get("chains_per_start", 1))
    # Moments of infinite draws are nan, and chains that each stand still somewhere else have an infinite R-hat.
    with np.errstate(invalid="ignore", divide="ignore"):
        return [_summary(name, draws, evals, seconds, superchains) for name, draws in scalar_elements(idata)]


def _summary(
    name: str, draws: FloatArray, evals: float, seconds: float, superchains: NDArray[np.int64]
) -> FunctionalSummary:
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    if (draws == draws[0, 0]).all():
        return FunctionalSummary(name, mean, 0.0, *[_NAN] * (len(FunctionalSummary._fields) - 3))
    if np.isnan(draws).any():
        return FunctionalSummary(name, mean, sd, *[_NAN] * (len(FunctionalSummary._fields) - 3))
    ess_bulk, mcse = float(arviz().ess(draws, method="bulk")), float(arviz().mcse(draws, method="mean"))
    is_nested = 1 < superchains[-1] + 1 < len(superchains)
    return FunctionalSummary(
        name=name,
        mean=mean,
        sd=sd,
        mcse_mean=mcse,
        r_hat=_r_hat(draws),
        r_hat_nested=nested_r_hat(draws, superchains) if is_nested else _NAN,
        ess_bulk=ess_bulk,
        # ArviZ 1.x would take the quantiles of its interval setting.
        ess_tail=float(arviz().ess(draws, method="tail", prob=TAIL_PROBABILITIES)),
        autocorrelation_time=draws.size * (mcse / sd) ** 2,
        ess_per_1000_evals=1000 * ess_bulk / evals if evals else _NAN,
        ess_per_second=ess_bulk / seconds if seconds else _NAN,
    )


def _r_hat(draws: FloatArray) -> float:
    num_chains, num_draws = draws.shape
    if num_chains == 1:
        draws = draws[:, : num_draws // 2 * 2].reshape(2, -1)  # ArviZ refuses a single chain
    return float(arviz().rhat(draws, method="rank")) if draws.shape[1] >= MIN_DRAWS else _NAN


def bfmi(idata: InferenceData) -> FloatArray:
    """Estimate the Bayesian fraction of missing information of every chain: Betancourt (2016), arXiv 1604.00695.

    It is the mean square of the change of energy per draw over the variance of the energy: 2 for independent
    energies, near 1 for HMC that explores well, near 0 for energies that diffuse.

    Args:
        idata: with ``energy`` in group ``sample_stats``.

    Returns:
        ``(C,)``; nan for a chain whose energy never moves.
    """
    energy = stat(idata, "energy")
    with np.errstate(invalid="ignore", divide="ignore"):
        values: FloatArray = np.square(np.diff(energy, axis=1)).mean(axis=1) / energy.var(axis=1, ddof=1)
    return values


def num_divergent(idata: InferenceData) -> int:
    """Count the divergent draws of all chains."""
    return int(stat(idata, "diverging").sum())


def worst(summaries: Sequence[FunctionalSummary]) -> tuple[FunctionalSummary, FunctionalSummary]:
    """Find the functionals with the worst R-hat and with the worst bulk effective sample size.

    Args:
        summaries: at least one.

    Returns:
        The one with the largest R-hat and the one with the smallest ``ess_bulk``; one that has nan there comes first,
        for that is worse than any number. Ask ``r_hat <= limit`` rather than ``r_hat > limit``, and nan fails as it
        should.
    """
    return (
        max(summaries, key=lambda summary: math.inf if math.isnan(summary.r_hat) else summary.r_hat),
        min(summaries, key=lambda summary: -math.inf if math.isnan(summary.ess_bulk) else summary.ess_bulk),
    )


def is_converged(summary: FunctionalSummary) -> bool:
    """Ask whether R-hat is at most 1.01 and both effective sample sizes are at least 400; nan is a no."""
    return summary.r_hat <= MAX_R_HAT and min(summary.ess_bulk, summary.ess_tail) >= MIN_ESS
