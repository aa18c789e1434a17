"""Pictures of kernels side by side: efficiency, effective draws by cost, energies, ranks and paths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from ppl_vaebm.evaluation.kernel_table import Row, draws_within_evals, draws_within_seconds, elapsed_seconds, mean_evals
from ppl_vaebm.evaluation.kernels import Reference
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, cut, scalar_draws
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, Convergence, diagnose_columns
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT
from ppl_vaebm.reports.chains import autocorrelation_curve, draw_ranks, draw_trace
from ppl_vaebm.reports.figures import PANELS_PER_ROW, TITLE_POINTS, FloatArray, Picture, axes_grid, panel_axes, picture
from ppl_vaebm.reports.samples import GRID_PIXELS, grid_picture, image_grid, with_margin

NUM_POINTS = 8  # of a curve over cost
FIRST_FRACTION = 0.05  # of the budget: where such a curve begins
MAX_SHOWN_R_HAT = 10
MAX_LAG_EVALS = 400  # of the autocorrelations
MAX_PATH_DRAWS = 400  # of each chain in the plane
NUM_PATHS = 4  # chains in the plane
PATH_MAP = "viridis"

Colours = Mapping[str, tuple[str, str]]
"""Colour and line style of every kernel, the same in all pictures."""


class Shown(NamedTuple):
    """The chains of one kernel that the pictures show: those of the first seed that has some."""

    idata: InferenceData
    """All its draws."""
    within: InferenceData
    """Those within the budget's evaluations."""


def shown_of(idata: InferenceData, num_evals: int) -> Shown:
    """Cut chains at the budget's evaluations."""
    return Shown(idata, cut(idata, draws_within_evals(idata, num_evals)))


def colours_of(kernels: Sequence[str]) -> Colours:
    """Choose a colour and a line style for each kernel."""
    styles = itertools.product(("-", "--", ":"), (f"C{index}" for index in range(10)))
    return {kernel: (colour, style) for kernel, (style, colour) in zip(kernels, styles, strict=False)}


BARS = {
    "ess_per_1000_evals": "ESS per 1000 evaluations",
    "ess_per_second": "ESS per second of draws",
    "ess_per_second_with_warmup": "ESS per second, warm-up included",
}
"""Titles of the quantities of a row that are drawn as bars."""


def bars_picture(rows: Sequence[Row], colours: Colours) -> Picture:
    """Draw the efficiency of every kernel with its spread over seeds; kernels that did not run are marked."""
    figure, (axes,) = axes_grid(1, len(BARS), height=0.6 + 0.24 * max(4, len(rows)))
    places = np.arange(len(rows))
    for ax, (name, title) in zip(axes, BARS.items(), strict=True):
        lengths = np.array([getattr(row.mean, name) for row in rows])
        spreads = np.nan_to_num([getattr(row.sd, name) for row in rows])
        colors = [colours[row.kernel][0] for row in rows]
        ax.barh(places, np.nan_to_num(lengths), xerr=spreads, color=colors, error_kw={"linewidth": 0.8})
        ax.set_title(title, fontsize=TITLE_POINTS)
        ax.set_yticks(places, [row.kernel + _mark(row) for row in rows] if ax is axes[0] else [""] * len(rows))
        ax.invert_yaxis()
        _scale_bars(ax, lengths)
    note = (
        "Effective draws of the quantity that has the fewest, mean over seeds; the line is one standard deviation over "
        f"seeds. Good: long bars, among kernels without a mark. (*) R-hat above {MAX_R_HAT}: the chains do not agree "
        "within the budget, and their effective numbers mean little. (u) no Metropolis test: the step biases the draws "
        "by the amount in the table. (-) did not run."
    )
    return picture("efficiency", figure, note)


def _scale_bars(ax: Axes, lengths: FloatArray) -> None:
    """Make the axis of bars logarithmic, from a power of ten, if they differ by more than that factor."""
    positive = lengths[lengths > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        ax.set_xscale("log")
        ax.set_xlim(left=10 ** (math.ceil(math.log10(positive.min())) - 1))
        ax.xaxis.set_minor_formatter(NullFormatter())


def _mark(row: Row) -> str:
    if not row.num_seeds:
        return " (-)"
    return ("" if row.is_adjusted else " (u)") + ("" if row.mean.max_r_hat <= MAX_R_HAT else " (*)")


def cost_picture(shown: Mapping[str, Shown], colours: Colours, num_seconds: float) -> Picture:
    """Draw effective draws and R-hat by evaluations, and effective draws by time if ``num_seconds`` is not 0."""
    figure, (axes,) = axes_grid(1, PANELS_PER_ROW, height=3.4)
    titles = (
        "effective draws by evaluations per chain",
        "R-hat - 1 by evaluations per chain",
        "effective draws by seconds",
    )
    for kernel, (idata, within) in shown.items():
        colour, style = colours[kernel]
        counts, parts = _growth(idata, within["posterior"].sizes["draw"])
        evals = mean_evals(idata)[counts - 1]
        r_hat = np.minimum([part.r_hat.max() for part in parts], MAX_SHOWN_R_HAT)
        curves = [(evals, _worst_ess(parts)), (evals, r_hat - 1)]
        if num_seconds:
            counts, parts = _growth(idata, draws_within_seconds(idata, num_seconds))
            curves.append((elapsed_seconds(idata)[counts - 1] if len(counts) else np.empty(0), _worst_ess(parts)))
        for ax, curve in zip(axes, curves, strict=False):
            ax.plot(*curve, color=colour, linestyle=style, marker=".", markersize=3, linewidth=1, label=kernel)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=TITLE_POINTS)
        # A logarithmic axis needs a positive number.
        if any((np.asarray(line.get_ydata()) > 0).any() for line in ax.lines):
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    axes[1].set_ylim(0.2 * (MAX_R_HAT - 1), 1.3 * (MAX_SHOWN_R_HAT - 1))
    axes[1].axhline(MAX_R_HAT - 1, color="black", linestyle="--", linewidth=0.8)
    axes[2].set_visible(bool(num_seconds))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    note = (
        "Of the worst quantity at each time, first seed. Good: effective draws that grow in proportion to the cost, "
        f"and an R-hat that falls below the dashed line; {MAX_SHOWN_R_HAT} stands for any larger one. Effective draws "
        "that become fewer are a sign of chains that begin to disagree."
    )
    return picture("effective draws and R-hat by cost", figure, note)


def _growth(idata: InferenceData, num_draws: int) -> tuple[NDArray[np.int64], list[Convergence]]:
    """Diagnose growing fractions of the draws: their numbers, and the convergence of each."""
    if num_draws < MIN_DRAWS:
        return np.empty(0, dtype=np.int64), []
    first = max(MIN_DRAWS, int(FIRST_FRACTION * num_draws))
    counts = np.unique(np.geomspace(first, num_draws, NUM_POINTS).round().astype(np.int64))
    columns = np.stack(list(scalar_draws(idata).values()), axis=-1)
    return counts, [diagnose_columns(columns[:, :count]) for count in counts]


def _worst_ess(parts: Sequence[Convergence]) -> FloatArray:
    return np.array([part.ess_bulk.min() for part in parts])


def _kernel_panels(shown: Mapping[str, Shown], height: float) -> tuple[Figure, list[tuple[Axes, str, Shown]]]:
    """Make a figure with a panel for every kernel."""
    figure, axes = panel_axes(len(shown), height)
    return figure, [(ax, kernel, run) for ax, (kernel, run) in zip(axes, shown.items(), strict=True)]


def energy_picture(shown: Mapping[str, Shown], reference: Reference) -> Picture:
    """Draw the energies of every kernel's chains by evaluations; the exact mean energy is dashed."""
    figure, panels = _kernel_panels(shown, height=1.9)
    energies = {kernel: scalar_draws(run.within)["energy"] for kernel, run in shown.items()}
    finite = np.concatenate([values[np.isfinite(values)] for values in energies.values()])
    for ax, kernel, run in panels:
        values = energies[kernel]
        draw_trace(ax, values, scale=mean_evals(run.within)[-1] / values.shape[1])
        if math.isfinite(reference.energy):
            ax.axhline(reference.energy, color="black", linestyle="--", linewidth=0.8)
        if len(finite):
            ax.set_ylim(*np.quantile(finite, [0.001, 0.995]))
        ax.set_title(f"{kernel}: E (nats) by evaluations", fontsize=TITLE_POINTS)
    note = (
        "Every chain of the first seed, one scale for all kernels. Good: chains that look alike, without drift, around "
        "the mean of exact draws (dashed, where it is known)."
    )
    return picture("energy of every chain", figure, note)


def ranks_picture(shown: Mapping[str, Shown]) -> Picture:
    """Draw the ranks of the energies of every kernel's chains."""
    figure, panels = _kernel_panels(shown, height=1.7)
    for ax, kernel, run in panels:
        draw_ranks(ax, scalar_draws(run.within)["energy"])
        ax.set_title(f"{kernel}: ranks of E, every chain", fontsize=TITLE_POINTS)
    note = (
        "Histogram of the ranks of each chain's energies among those of all chains. Good: flat lines in the grey band "
        "(it is for independent draws; autocorrelated ones leave it now and then)."
    )
    return picture("ranks of the energy", figure, note)


def correlation_picture(shown: Mapping[str, Shown], colours: Colours) -> Picture:
    """Draw the autocorrelation of the energy, and of the squared noise, by evaluations."""
    figure, (axes,) = axes_grid(1, 2, height=3.2)
    for kernel, run in shown.items():
        colour, style = colours[kernel]
        draws = scalar_draws(run.within)
        per_draw = mean_evals(run.within)[-1] / next(iter(draws.values())).shape[1]
        slow = next(name for name in draws if name.startswith("projection"))
        for ax, name in zip(axes, ("energy", slow), strict=True):
            values = autocorrelation_curve(draws[name], max(1, int(MAX_LAG_EVALS / per_draw)))
            ax.plot(per_draw * np.arange(len(values)), values, color=colour, linestyle=style, linewidth=1, label=kernel)
    for ax, title in zip(axes, ("E", "a random direction of the noise"), strict=True):
        ax.axhline(0, color="black", linestyle="--", linewidth=0.8)
        ax.set_title(f"autocorrelation of {title} by evaluations", fontsize=TITLE_POINTS)
        ax.set_xlim(left=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    note = "About the mean of all chains, first seed. Good: a curve that falls to 0 early and stays there."
    return picture("autocorrelation", figure, note)


def path_picture(shown: Mapping[str, Shown], reference: Reference) -> Picture:
    """Draw the paths of a few chains of every kernel in the plane, dark at their start and bright at their end."""
    figure, panels = _kernel_panels(shown, height=3.3)
    paths = {kernel: run.within["posterior"]["x"].to_numpy()[:NUM_PATHS] for kernel, run in shown.items()}
    points = np.concatenate([path.reshape(-1, 2) for path in paths.values()])
    points = points[np.isfinite(points).all(axis=1)]
    frame = with_margin(*np.quantile(points, [0.002, 0.998], axis=0)) if len(points) else None
    for ax, kernel, _ in panels:
        path = paths[kernel][:, :: math.ceil(paths[kernel].shape[1] / MAX_PATH_DRAWS)]
        if reference.modes is not None:
            ax.plot(*reference.modes.T, linestyle="none", marker="+", color="lightgrey", markersize=5, zorder=0)
        for chain in path:
            ax.plot(*chain.T, color="grey", linewidth=0.2, alpha=0.5, zorder=1)
            ax.scatter(
                chain[:, 0], chain[:, 1], c=np.linspace(0, 1, len(chain)), cmap=PATH_MAP, s=4, linewidths=0, zorder=2
            )
        if frame is not None:
            ax.set(xlim=frame[:, 0], ylim=frame[:, 1])
        ax.set_aspect("equal")
        ax.set_title(f"{kernel}: {len(path)} chains over time", fontsize=TITLE_POINTS)
    note = (
        f"x of the first {NUM_PATHS} chains, dark at the start and bright at the end. Good: every chain visits all "
        "modes, so that colours are mixed everywhere; a mode of one colour was visited once."
    )
    return picture("chains over time", figure, note)


def images_picture(kernel: str, images: NDArray[np.float32], stride: int) -> Picture:
    """Draw the images ``(chains, times, C, H, W)`` of chains of one kernel, ``stride`` draws apart."""
    num_chains, num_times = images.shape[:2]
    grid = image_grid(images.reshape(-1, *images.shape[2:]), columns=num_times)
    note = (
        f"Each row is a chain, from its first draw on, one image every {stride} draws. Good: plausible images that "
        "change along the row; a row that keeps its image is a chain that does not move."
    )
    return grid_picture(f"{kernel}: {num_chains} chains over time", grid, GRID_PIXELS * 2, note)
