"""Pictures of a posterior: what was given, what the draws say of every value of x, and some of the draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppl_vaebm.reports.figures import FIGURE_WIDTH, TITLE_POINTS, Picture, axes_grid, picture, png_of
from ppl_vaebm.reports.samples import image_grid

Arrays = Mapping[str, NDArray[Any]]

NUM_SHOWN = 40  # draws of an image
DRAWS_PER_ROW = 20
NUM_BINS = 60
TITLE = "posterior of x given what was observed"


def conditional_picture(arrays: Arrays) -> Picture:
    """Draw a posterior for the page.

    Args:
        arrays: ``x`` (n, *event), ``mean``, ``sd`` and ``mask`` (*event), ``given``; those of conditional.npz.

    Returns:
        The picture.
    """
    note = (
        "Good: draws differ where little was observed, and each could be of the data; the standard deviation is large "
        "there and small elsewhere."
    )
    return picture(TITLE, conditional_figure(arrays), note)


def conditional_png(arrays: Arrays) -> bytes:
    """Draw a posterior as a PNG file; see :func:`conditional_picture`."""
    return png_of(conditional_figure(arrays))


def conditional_figure(arrays: Arrays) -> Figure:
    """Draw a posterior; see :func:`conditional_picture`."""
    return _image_figure(arrays) if arrays["mean"].ndim == 3 else _point_figure(arrays)


def _image_figure(arrays: Arrays) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 4.0), layout="constrained", facecolor="white")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2))[:, 0]
    given, mask, mean, sd, r_hat = top.subplots(1, 5)
    observed = np.where(arrays["mask"], arrays["given"], 0.0) if _is_masked(arrays) else arrays["given"]
    _show_image(given, "given" + (" (grey: not observed)" if _is_masked(arrays) else ""), observed)
    _show_image(mask, "mask (white: observed)", 2.0 * arrays["mask"] - 1)
    _show_image(mean, "posterior mean", arrays["mean"])
    for ax, title, values in ((sd, "posterior sd", arrays["sd"]), (r_hat, "R-hat", arrays["r_hat"])):
        ax.set_title(title, fontsize=TITLE_POINTS)
        ax.set(xticks=[], yticks=[])
        # nan, that is nothing moves, stays white.
        shown = ax.imshow(values.mean(0), cmap="viridis")
        top.colorbar(shown, ax=ax, shrink=0.7).ax.tick_params(labelsize=7)
    draws = bottom.subplots()
    chosen = np.linspace(0, len(arrays["x"]) - 1, min(NUM_SHOWN, len(arrays["x"]))).round().astype(int)
    draws.imshow(image_grid(arrays["x"][chosen], DRAWS_PER_ROW), interpolation="nearest")
    draws.set_title("draws", fontsize=TITLE_POINTS)
    draws.set_axis_off()
    return figure


def _is_masked(arrays: Arrays) -> bool:
    return arrays["given"].shape == arrays["mask"].shape and not arrays["mask"].all()


def _show_image(ax: Axes, title: str, x: NDArray[Any]) -> None:
    ax.set_title(title, fontsize=TITLE_POINTS)
    ax.set(xticks=[], yticks=[])
    ax.imshow(((x.transpose(1, 2, 0) + 1) / 2).clip(0, 1).repeat(3 // len(x), axis=2), interpolation="nearest")


def _point_figure(arrays: Arrays) -> Figure:
    """Draw a histogram of every coordinate, with its mean and standard deviation, or where it was observed."""
    dim = len(arrays["mean"])
    figure, (axes,) = axes_grid(1, dim, height=2.8)
    for index, ax in enumerate(axes):
        values, mean, sd = arrays["x"][:, index], arrays["mean"][index], arrays["sd"][index]
        if sd > 0:
            ax.hist(values[np.isfinite(values)], bins=NUM_BINS, density=True, alpha=0.6)
            ax.axvline(mean, color="black", linewidth=1)
        if arrays["mask"][index]:
            ax.axvline(arrays["given"][index], color="tab:red", linestyle="--", linewidth=1)
        seen = f", given {arrays['given'][index]:.4g} (red)" if arrays["mask"][index] else ""
        ax.set_title(f"coordinate {index + 1}: mean {mean:.4g}, sd {sd:.3g}{seen}", fontsize=TITLE_POINTS)
    return figure
