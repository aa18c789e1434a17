"""Pictures of an evaluation: metrics by chain length, out-of-distribution scores, histograms, neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppl_vaebm.reports.figures import PANELS_PER_ROW, TITLE_POINTS, FloatArray, Picture, axes_grid, picture
from ppl_vaebm.reports.samples import GRID_PIXELS, Arrays, grid_picture, image_grid

NUM_BINS = 40
CHANCE = 0.5  # area under the ROC curve of random scores
SETS_PER_INCH = 3.5  # rows of the plot of areas


def samples_pictures(arrays: Arrays) -> list[Picture]:
    """Draw the metrics of samples by chain length, from the arrays of ``metric_arrays``; nothing without chains."""
    if "steps" not in arrays:
        return []
    net, num, kernel = (arrays[name].item() for name in ("net", "num", "kernel"))
    note = (
        "Good: far below the VAE, near the held-out data, and no worse at the longer lengths: then the density has "
        "improved, and not only a sampler of one length. Frechet and kernel distance fall, and precision and coverage "
        "rise, as samples become more like the data; recall does so only if the VAE has no outliers, whose large balls "
        "cover much."
    )
    return [picture(f"{num} samples in features of {net}, by steps of {kernel}", _metrics(arrays), note)]


def _metrics(arrays: Arrays) -> Figure:
    figure, (axes,) = axes_grid(1, PANELS_PER_ROW, height=2.9)
    metrics, steps = arrays["metrics"].tolist(), arrays["steps"]
    num_data = len(arrays["rows"]) - len(steps)
    lengths = steps[steps > 0].tolist()
    # Runs measured by an earlier version have no coverage.
    fractions = [metric for metric in ("precision", "recall", "coverage") if metric in metrics]
    panels = {"Frechet distance": ["Frechet distance"], "KID": ["KID"], ", ".join(fractions): fractions}
    for ax, (title, shown) in zip(axes, panels.items(), strict=True):
        ax.set_xscale("log")
        # Set before anything is drawn, because Matplotlib finds no limits around a single length.
        ax.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
        for color, metric in zip(("C0", "C1", "C2"), shown, strict=False):
            value, error = (arrays[key][:, metrics.index(metric)] for key in ("value", "error"))
            _over_steps(ax, steps, value[num_data:], error[num_data:], metric, color)
            # The rows before those of the chains are the held-out data, and the VAE at step 0.
            for row, (label, style) in ((num_data - 1, ("held-out data", "--")), (num_data, ("VAE", ":"))):
                name = label if metric == shown[0] else "_nolegend_"
                ax.axhline(value[row], color=color, linestyle=style, linewidth=1.0, label=name)
        ax.set_xticks(lengths, [str(count) for count in lengths])
        ax.minorticks_off()
        ax.set_title(title, fontsize=TITLE_POINTS)
        ax.set_xlabel("steps from fresh noise", fontsize=8)
        ax.set_ylabel(title, fontsize=8)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
        if len(shown) > 1:
            ax.set_ylim(-0.02, 1.02)
    return figure


def _over_steps(ax: Axes, steps: NDArray[Any], value: FloatArray, error: FloatArray, label: str, color: str) -> None:
    is_chain = steps > 0
    bars = error[is_chain] if np.isfinite(error[is_chain]).all() else None
    ax.errorbar(steps[is_chain], value[is_chain], bars, color=color, marker=".", linewidth=1, label=label)


def ood_pictures(arrays: Arrays) -> list[Picture]:
    """Draw the areas under the ROC curve, ``value`` and ``error`` ``(sets, scores)``, of every set and score."""
    note = (
        "Good: log h near 1 everywhere and nowhere below log p. At one half, the dashed line, a score is as good as "
        "chance; below it the other images score higher than the data. -E alone compares the data with the VAE only."
    )
    return [picture("test images against others", _areas(arrays), note)]


def _areas(arrays: Arrays) -> Figure:
    sets, scores = arrays["sets"].tolist(), arrays["scores"].tolist()
    figure, ((ax,),) = axes_grid(1, 1, height=1.2 + len(sets) / SETS_PER_INCH)
    places = np.arange(len(sets))[::-1]
    for index, (name, marker) in enumerate(zip(scores, "osd", strict=True)):
        height = places + 0.2 * (1 - index)
        value, error = arrays["value"][:, index], arrays["error"][:, index]
        ax.errorbar(value, height, xerr=error, linestyle="none", marker=marker, markersize=5, label=name)
    ax.axvline(CHANCE, color="black", linestyle="--", linewidth=0.8)
    ax.set_yticks(places, sets)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(sets) - 0.4))
    ax.set_xlabel("area under the ROC curve: how often a test image scores higher", fontsize=8)
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def histogram_pictures(arrays: Arrays) -> list[Picture]:
    """Draw histograms of the scores ``(n,)`` of training and test data, by names such as ``train log h``."""
    note = "Good: the two coincide. Training data that are more likely than test data are memorised."
    return [picture("scores of training and test data", _histogram_figure(arrays), note)]


def _histogram_figure(arrays: Arrays) -> Figure:
    scores = [name.removeprefix("train ") for name in arrays if name.startswith("train ")]
    figure, (axes,) = axes_grid(1, PANELS_PER_ROW, height=2.9)
    for ax, name in zip(axes, scores, strict=True):
        sets = {part: arrays[f"{part} {name}"] for part in ("train", "test")}
        _histograms(ax, {part: values[np.isfinite(values)] for part, values in sets.items()})
        ax.set_title(name if name != "log h" else "log h + log Z", fontsize=TITLE_POINTS)
        ax.set_xlabel("nats", fontsize=8)
        ax.set_ylabel("density", fontsize=8)
        ax.legend(fontsize=7)
    return figure


def _histograms(ax: Axes, sets: Mapping[str, FloatArray]) -> None:
    everything = np.concatenate(list(sets.values()))
    if not len(everything):
        return
    # The most extreme hundredths would leave no room for the others.
    low, high = np.quantile(everything, [0.01, 0.99])
    edges = np.linspace(low, high, NUM_BINS + 1).tolist() if high > low else [low - 0.5, low + 0.5]
    for part, values in sets.items():
        # The density counts all points of the set, also those beyond the edges.
        weight = 1 / (max(1, len(values)) * (edges[1] - edges[0]))
        label = f"{part}: {len(values)} points"
        ax.hist(values, edges, weights=np.full(len(values), weight), histtype="stepfilled", alpha=0.45, label=label)


def neighbours_pictures(arrays: Arrays) -> list[Picture]:
    """Show ``samples`` above the training images nearest to them in ``pixels`` and, if given, in ``features``."""
    rows = [name for name in ("samples", "pixels", "features") if name in arrays]
    images = np.concatenate([arrays[name] for name in rows])
    note = (
        "Above: samples of the VAEBM. Below each the training image nearest to it in pixels"
        + (", and the one nearest in features." if "features" in rows else ".")
        + " Good: alike, and not the same."
    )
    grid = image_grid(images, len(arrays["samples"]))
    return [grid_picture("samples and their nearest training images", grid, max(2 * GRID_PIXELS, grid.shape[1]), note)]


PICTURES = {
    "samples": samples_pictures,
    "ood": ood_pictures,
    "histograms": histogram_pictures,
    "neighbours": neighbours_pictures,
}
"""Function that draws the arrays of each part."""
