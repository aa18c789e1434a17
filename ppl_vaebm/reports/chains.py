"""Pictures of chains: traces, ranks, autocorrelations, energies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, scalar_draws
from ppl_vaebm.inference.diagnostics.convergence import Convergence, autocorrelation
from ppl_vaebm.reports.figures import TITLE_POINTS, FloatArray, Picture, axes_grid, picture

MAX_QUANTITIES = 4  # drawn per report, worst effective sample size first
MAX_TRACE_DRAWS = 500  # per chain; longer traces are thinned
MAX_LAG = 200  # of the autocorrelations
NUM_RANK_BINS = 20  # Vehtari et al. (2021), doi 10.1214/20-BA1221


def chain_pictures(idata: InferenceData, summaries: Sequence[diagnostics.QuantitySummary]) -> list[Picture]:
    """Draw the quantities with the fewest effective draws, and the energies."""
    return [
        picture("quantities with the fewest effective draws", _quantities_figure(idata, summaries)),
        picture("energies, and every chain on its own", _energy_figure(idata)),
    ]


def _quantities_figure(idata: InferenceData, summaries: Sequence[diagnostics.QuantitySummary]) -> Figure:
    by_ess = sorted(summaries, key=lambda s: math.inf if math.isnan(s.ess_bulk) else s.ess_bulk)
    draws = scalar_draws(idata)
    shown = [summary.name for summary in by_ess[:MAX_QUANTITIES]]
    figure, axes = axes_grid(len(shown), 3, height=1.9)
    for (trace, ranks, correlation), name in zip(axes, shown, strict=True):
        draw_trace(trace, draws[name])
        trace.set_title(f"{name}: trace of every chain", fontsize=TITLE_POINTS)
        draw_ranks(ranks, draws[name])
        ranks.set_title(f"{name}: ranks of every chain", fontsize=TITLE_POINTS)
        correlation.plot(autocorrelation_curve(draws[name]), linewidth=1.2)
        correlation.axhline(0, color="black", linestyle="--", linewidth=0.8)
        correlation.set_title(f"{name}: autocorrelation by lag", fontsize=TITLE_POINTS)
    return figure


def draw_trace(ax: Axes, draws: FloatArray, scale: float = 1.0) -> None:
    """Draw the trace of every chain, ``(C, N)``, with ``scale`` units of the axis per draw."""
    num_chains, num_draws = draws.shape
    shown = np.arange(0, num_draws, math.ceil(num_draws / MAX_TRACE_DRAWS))
    ax.plot(scale * shown, draws[:, shown].T, linewidth=0.6, alpha=_alpha(num_chains))


def _alpha(num_chains: int) -> float:
    return max(0.15, min(0.8, 4 / num_chains))


def draw_ranks(ax: Axes, draws: FloatArray) -> None:
    """Draw the ranks of each chain's draws, ``(C, N)``, among all draws, over the band of independent draws."""
    counts = _rank_counts(draws)
    num_chains, num_draws = draws.shape
    centre = counts.mean(axis=0)
    spread = 2 * np.sqrt(centre * (1 - centre / num_draws))
    edges = np.linspace(0, 1, NUM_RANK_BINS + 1)
    ax.stairs(centre + spread, edges, baseline=centre - spread, fill=True, color="lightgrey")
    for row in counts:
        ax.stairs(row, edges, baseline=None, linewidth=0.8, alpha=_alpha(num_chains))
    ax.set_ylim(bottom=0)


def _rank_counts(draws: FloatArray) -> FloatArray:
    """Count each chain's draws by their rank among all chains' draws, ``(C, bins)``; equal draws share a rank."""
    _, inverse, counts = np.unique(draws, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse].reshape(draws.shape)
    bins = (ranks / draws.size * NUM_RANK_BINS).astype(int)
    return np.stack([np.bincount(row, minlength=NUM_RANK_BINS) for row in bins]).astype(np.float64)


def autocorrelation_curve(draws: FloatArray, max_lag: int = MAX_LAG) -> FloatArray:
    """Return the autocorrelation ``(lags,)`` of chains ``(C, N)``; chains that disagree stay correlated."""
    with np.errstate(invalid="ignore", divide="ignore"):  # draws that never move or are not finite get no curve
        return autocorrelation(draws[None])[0, : min(draws.shape[1] // 2, max_lag) + 1]


def _energy_figure(idata: InferenceData) -> Figure:
    stats = idata["sample_stats"]
    energy = stats["energy"].transpose("chain", "draw").to_numpy().astype(np.float64)
    figure, ((histogram, bfmi, acceptance),) = axes_grid(1, 3)
    finite = energy[np.isfinite(energy)]
    with np.errstate(invalid="ignore"):
        changes = np.diff(energy, axis=1)
    histogram.hist(finite - finite.mean(), bins=40, density=True, histtype="step", label="energy - mean")
    histogram.hist(changes[np.isfinite(changes)], bins=40, density=True, histtype="step", label="change per draw")
    histogram.set_title("energy (nats)", fontsize=TITLE_POINTS)
    histogram.legend(fontsize=7)
    _per_chain(bfmi, diagnostics.bfmi(idata), "BFMI of every chain")
    bfmi.axhline(diagnostics.MIN_BFMI, color="black", linestyle="--", linewidth=0.8)
    rates = stats["acceptance_rate"].transpose("chain", "draw").to_numpy()
    _per_chain(acceptance, rates.mean(axis=1), "acceptance rate of every chain")
    return figure


def _per_chain(ax: Axes, values: FloatArray, title: str) -> None:
    ax.plot(np.arange(len(values)), values, linestyle="none", marker=".")
    ax.set_ylim(0, 1.1 * values[np.isfinite(values)].max(initial=0) or 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(title, fontsize=TITLE_POINTS)


def coordinates_picture(convergence: Convergence) -> Picture:
    """Draw histograms of R-hat and effective sample sizes over all coordinates."""
    figure, ((r_hat, ess),) = axes_grid(1, 2)
    r_hat.hist(convergence.r_hat[np.isfinite(convergence.r_hat)], bins=60, log=True)
    r_hat.axvline(diagnostics.MAX_R_HAT, color="black", linestyle="--", linewidth=0.8)
    r_hat.set_title(f"R-hat of all {len(convergence.r_hat)} coordinates", fontsize=TITLE_POINTS)
    for values, label in ((convergence.ess_bulk, "bulk"), (convergence.ess_tail, "tail")):
        ess.hist(values[np.isfinite(values)], bins=60, log=True, histtype="step", label=label)
    ess.axvline(diagnostics.MIN_ESS, color="black", linestyle="--", linewidth=0.8)
    ess.set_title("effective draws of all coordinates", fontsize=TITLE_POINTS)
    ess.legend(fontsize=7)
    note = (
        f"Good: no R-hat beyond the dashed line at {diagnostics.MAX_R_HAT}, and no effective number of draws to the "
        f"left of the one at {diagnostics.MIN_ESS:.0f}. Among thousands of coordinates a few R-hats lie just beyond it "
        "by chance; a separate group of them does not."
    )
    return picture("every coordinate of the noise", figure, note)
