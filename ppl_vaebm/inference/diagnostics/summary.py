"""Convergence diagnostics of chains, one row a quantity: R-hat, effective sample sizes, BFMI, divergences.

A quantity is a scalar summary (a functional) of the state that is stored for every draw. ArviZ (0.23 or 1.x) computes
R-hat and effective sample sizes here; ``convergence.py`` has their source, and computes them for all coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, arviz, attribute_list, scalar_draws, stat
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, TAIL_PROBABILITIES, FloatArray, nested_r_hat
from ppl_vaebm.tables import text_table

MAX_R_HAT = 1.01
"""Chains whose R-hat is above this disagree: Vehtari et al. (2021)."""
MIN_ESS = 400.0
"""With fewer effective draws R-hat and the errors are themselves noisy: Vehtari et al. (2021)."""
MIN_CHAINS = 4
"""Chains needed for R-hat to see modes that some of them miss: Vehtari et al. (2021)."""
MIN_BFMI = 0.3
"""A smaller BFMI means that the energy diffuses: Stan's threshold, after Betancourt (2016), arXiv 1604.00695."""
MIN_ACCEPTANCE = 0.01
"""Below this mean acceptance a note reports chains that stand still; chosen by us, no tuned kernel comes near it."""

TABLE_HEADER = (
    ("quantity", ""),
    ("mean", "own unit"),
    ("sd", "own unit"),
    ("MCSE", "own unit"),
    ("R-hat", ""),
    ("R-hat", "nested"),
    ("ESS bulk", "draws"),
    ("ESS tail", "draws"),
    ("autocorr. time", "draws"),
    ("ESS rate", "per 1000 evals"),
    ("ESS rate", "per second"),
)
"""Title and unit of every column of :func:`table_cells`."""

_NAN = float("nan")


class QuantitySummary(NamedTuple):
    """Mean and diagnostics of one quantity; nan where the chains do not determine a number."""

    name: str
    """Name of the quantity; elements of a vector are ``name[0]``, ``name[1]``, ..."""
    mean: float
    """Mean over all draws of all chains, in the quantity's own unit; so are the next two."""
    sd: float
    mcse_mean: float
    """Monte Carlo standard error of the mean."""
    r_hat: float
    """Rank-normalised split R-hat: 1 when the chains agree."""
    r_hat_nested: float
    """R-hat between groups of chains that share a start, nan where there are none: Margossian et al. (2024)."""
    ess_bulk: float
    """As in :class:`~ppl_vaebm.inference.diagnostics.convergence.Convergence`; so is the next one."""
    ess_tail: float
    autocorrelation_time: float
    """Integrated, of the values themselves: draws per independent draw of the mean."""
    ess_per_1000_evals: float
    """``ess_bulk`` per 1000 evaluations of the potential, without the warm-up."""
    ess_per_second: float
    """``ess_bulk`` per second, without the warm-up."""


def summarize(idata: InferenceData) -> list[QuantitySummary]:
    """Summarize every scalar element of every posterior variable.

    A quantity that never moves, or has a draw that is nan, gets nan for its diagnostics (ArviZ would count every draw
    of a constant as independent). R-hat of a single chain compares its quarters. The attribute ``chains_per_start``,
    where it is above 1, says how many neighbouring chains share a start, and the nested R-hat compares the starts.

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
    # Moments of infinite draws are nan; chains that each stand still at another place have an infinite R-hat.
    with np.errstate(invalid="ignore", divide="ignore"):
        return [_summary(name, draws, evals, seconds, superchains) for name, draws in scalar_draws(idata).items()]


def _summary(
    name: str, draws: FloatArray, evals: float, seconds: float, superchains: NDArray[np.int64]
) -> QuantitySummary:
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    is_constant = (draws == draws[0, 0]).all()
    if is_constant or np.isnan(draws).any():
        unknown = [_NAN] * (len(QuantitySummary._fields) - 3)
        return QuantitySummary(name, mean, 0.0 if is_constant else sd, *unknown)
    ess_bulk, mcse = float(arviz().ess(draws, method="bulk")), float(arviz().mcse(draws, method="mean"))
    is_nested = 1 < superchains[-1] + 1 < len(superchains)
    return QuantitySummary(
        name=name,
        mean=mean,
        sd=sd,
        mcse_mean=mcse,
        r_hat=_r_hat(draws),
        r_hat_nested=nested_r_hat(draws, superchains) if is_nested else _NAN,
        ess_bulk=ess_bulk,
        # The default quantiles of ArviZ 1.x are those of its interval setting.
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

    The mean square of the change of energy per draw over the variance of the energy: 2 for independent energies, near
    1 for HMC that explores well, near 0 for energies that diffuse; ``(C,)``, nan for a chain whose energy never moves.
    """
    energy = stat(idata, "energy")
    with np.errstate(invalid="ignore", divide="ignore"):
        values: FloatArray = np.square(np.diff(energy, axis=1)).mean(axis=1) / energy.var(axis=1, ddof=1)
    return values


def num_divergent(idata: InferenceData) -> int:
    """Count the divergent draws of all chains."""
    return int(stat(idata, "diverging").sum())


def worst(summaries: Sequence[QuantitySummary]) -> tuple[QuantitySummary, QuantitySummary]:
    """Return the summary with the largest R-hat and the one with the smallest bulk ESS, at least one being given.

    A nan counts as worse than any number. Compare ``r_hat <= limit`` rather than ``r_hat > limit``, so that nan fails.
    """
    return (
        max(summaries, key=lambda summary: math.inf if math.isnan(summary.r_hat) else summary.r_hat),
        min(summaries, key=lambda summary: -math.inf if math.isnan(summary.ess_bulk) else summary.ess_bulk),
    )


def is_converged(summary: QuantitySummary) -> bool:
    """Return whether R-hat is at most 1.01 and both effective sample sizes are at least 400; nan gives False."""
    return summary.r_hat <= MAX_R_HAT and min(summary.ess_bulk, summary.ess_tail) >= MIN_ESS


# --- text for the terminal and the report ------------------------------------------------------------


def table_cells(summary: QuantitySummary) -> list[str]:
    """Format a summary as the cells of one table row, in the order of :data:`TABLE_HEADER`."""
    return [
        summary.name,
        digits(summary.mean, 4),
        digits(summary.sd, 3),
        digits(summary.mcse_mean, 2),
        r_hat_text(summary.r_hat),
        "" if np.isnan(summary.r_hat_nested) else r_hat_text(summary.r_hat_nested),
        f"{summary.ess_bulk:.0f}",
        f"{summary.ess_tail:.0f}",
        digits(summary.autocorrelation_time, 3),
        digits(summary.ess_per_1000_evals, 3),
        digits(summary.ess_per_second, 3),
    ]


def r_hat_text(value: float) -> str:
    """Format an R-hat. Chains that stand still have one beyond 1000, which only rounding keeps from infinity."""
    return "> 1000" if value > 1000 else f"{value:#.4g}"


def digits(value: float, num_digits: int) -> str:
    """Format a number with so many significant digits, and without an exponent below 1e9."""
    text = f"{value:.{num_digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def summary_table(summaries: Sequence[QuantitySummary], idata: InferenceData) -> str:
    """Format summaries, and the chains that they are of, for a terminal: a line per quantity, then :func:`run_lines`.

    The nested R-hat has its column only where it is known.
    """
    titles, units = (list(row) for row in zip(*TABLE_HEADER, strict=True))
    rows = without_empty_columns([titles, units, *map(table_cells, summaries)], num_header=2)
    num_agreed = sum(summary.r_hat <= MAX_R_HAT for summary in summaries)
    last = f"R-hat is at most {MAX_R_HAT} for {num_agreed} of {len(summaries)} quantities"
    return "\n".join([text_table(rows, numbers=range(1, len(rows[0]))), "", *run_lines(idata), last])


def without_empty_columns(rows: Sequence[Sequence[str]], num_header: int) -> list[list[str]]:
    """Drop the columns of a table in which every row below the header is empty."""
    body = rows[num_header:]
    kept = [index for index in range(len(rows[0])) if not body or any(row[index] for row in body)]
    return [[row[index] for index in kept] for row in rows]


def run_lines(idata: InferenceData) -> list[str]:
    """Describe how the chains were made; then one line that starts with ``note:`` for each of :func:`notes`."""
    attrs, acceptance = idata["posterior"].attrs, stat(idata, "acceptance_rate").mean(axis=1)
    num_chains, num_draws = stat(idata, "lp").shape
    lines = [
        f"kernel {attrs['kernel']}, step size {stat(idata, 'step_size').mean():.4g}, mean acceptance "
        f"{acceptance.mean():.3f} (chains {acceptance.min():.3f} to {acceptance.max():.3f})",
        f"divergent draws {num_divergent(idata)} of {num_chains * num_draws}, BFMI min {bfmi(idata).min():.3g}",
        f"{num_chains} chains of {num_draws} draws: {attrs['num_evals']} evaluations, {attrs['seconds']:.3g} s; "
        f"warm-up: {attrs['warmup_evals']} evaluations, {attrs['warmup_seconds']:.3g} s",
    ]
    lines += _tempering_lines(idata)
    if "exchange_rate" in attrs:
        lines.append(f"swaps of the first latent with chains of its own accepted {attrs['exchange_rate']:.2f}")
        lines += [f"those chains: {line}" for line in _tempering_lines(idata, "first_latent_")]
    return [*lines, *(f"note: {note}" for note in notes(idata))]


def _tempering_lines(idata: InferenceData, prefix: str = "") -> list[str]:
    """Describe a ladder of temperatures by the attributes with a prefix; no line for a kernel without one."""
    rates, attrs = attribute_list(idata, f"{prefix}swap_rates"), idata["posterior"].attrs
    if not rates:
        return []
    levels = ", ".join(f"{level:.3g}" for level in attribute_list(idata, f"{prefix}inverse_temperatures"))
    line = f"inverse temperatures {levels}; swaps of neighbours accepted {min(rates):.2f} to {max(rates):.2f}"
    if f"{prefix}num_round_trips" in attrs:
        num, per_sweep = attrs[f"{prefix}num_round_trips"], attrs[f"{prefix}round_trips_per_1000_sweeps"]
        line += f"; round trips between the ends {num:.0f}, per 1000 sweeps {per_sweep:.3g}"
    return [line]


def notes(idata: InferenceData, counts_divergences: bool = True) -> list[str]:
    """List what is wrong with chains, one sentence each, the most serious first.

    Divergent draws, which some tables have in a column, are left out unless ``counts_divergences``.
    """
    attrs, sentences = idata["posterior"].attrs, []
    num_chains, num_draws = stat(idata, "lp").shape
    acceptance = float(stat(idata, "acceptance_rate").mean())
    bad = [name for name, draws in scalar_draws(idata).items() if not np.isfinite(draws).all()]
    if bad:
        names = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        sentences.append(f"draws of {names} are not all finite, and a quantity with a nan has no diagnostics")
    if attrs.get("is_adjusted", 1) and not acceptance >= MIN_ACCEPTANCE:
        sentences.append(
            f"the chains stand still: {100 * acceptance:.2g} % of the proposals are accepted; take a smaller step or a "
            "longer warm-up"
        )
    elif "note" in attrs:  # of run_chains: a mean over all chains hides one that is stuck
        sentences.append(str(attrs["note"]))
    num_bad = num_divergent(idata)
    if num_bad and counts_divergences:
        sentences.append(
            f"{num_bad} of {num_chains * num_draws} draws diverged: the target is too steep there for the step, and "
            "the chains may miss those regions; take a smaller step or a higher target acceptance"
        )
    if bfmi(idata).min() < MIN_BFMI:
        sentences.append(f"the BFMI of a chain is below {MIN_BFMI}: its energy diffuses, so it seldom visits the tails")
    if num_chains < MIN_CHAINS:
        sentences.append(
            f"R-hat of {num_chains} chain{'s' * (num_chains > 1)} cannot detect modes that all of them miss; "
            f"use {MIN_CHAINS} or more"
        )
    return sentences
