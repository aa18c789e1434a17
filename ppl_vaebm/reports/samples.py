"""Pictures of samples: points as scatter plots, images pixel by pixel in grids."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.reports.figures import (
    FIGURE_WIDTH,
    TITLE_POINTS,
    FloatArray,
    Picture,
    axes_grid,
    encoded,
    panel_axes,
    picture,
    png_of,
)

GRID_SIDE = 10  # images per row and per column
GRID_PIXELS = 320  # smallest side of a saved grid; smaller images are enlarged by whole factors
NOT_FINITE_RGB = (1.0, 0.0, 1.0)  # magenta: seen at once among images
MAX_POINTS = 5_000  # drawn per scatter plot
NUM_SHOWN = 40  # draws of an image from a posterior
DRAWS_PER_ROW = 20
NUM_COORDINATE_BINS = 60

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


def sample_pictures(sets: Mapping[str, ArrayLike]) -> list[Picture]:
    """Draw sets of samples by their titles: points side by side in one picture, images in one grid for each set.

    Points are ``(n, 2)``, images ``(n, C, H, W)`` in [-1, 1], C 1 or 3; InputError for other arrays.
    """
    samples = {title: _checked_samples(x) for title, x in sets.items()}
    if all(map(_are_points, samples.values())):
        return [picture("samples side by side", _scatters(samples))]
    return [grid_picture(title, image_grid(x[: GRID_SIDE**2])) for title, x in samples.items()]


def samples_png(x: ArrayLike) -> bytes:
    """Draw samples as a PNG file: points ``(n, 2)`` as a scatter plot, images ``(n, C, H, W)`` as a grid of 10 by 10.

    Images lie in [-1, 1] and have 1 or 3 channels; InputError for other arrays. At most 5,000 points and 100 images are
    drawn.
    """
    samples = _checked_samples(x)
    if not _are_points(samples):
        return grid_png(image_grid(samples[: GRID_SIDE**2]))
    figure = Figure(figsize=(5, 5), layout="constrained", facecolor="white")
    _scatter(figure.subplots(), "samples", samples[:MAX_POINTS], _frame(samples))
    return png_of(figure)


def _checked_samples(x: ArrayLike) -> FloatArray:
    samples = np.asarray(x, dtype=np.float64)
    is_image = samples.ndim == 4 and samples.shape[1] in (1, 3)
    if not len(samples) or not (_are_points(samples) or is_image):
        raise InputError(
            "expected samples to draw: points (n, 2) or images (n, 1 or 3, height, width), n at least 1; "
            f"found shape {samples.shape}: give samples of such a data set"
        )
    return samples


def _are_points(x: FloatArray) -> bool:
    return x.ndim == 2 and x.shape[1] == 2


def _scatters(sets: Mapping[str, FloatArray]) -> Figure:
    num_points = min(MAX_POINTS, min(map(len, sets.values())))
    frame = _frame(next(iter(sets.values())))
    figure, axes = panel_axes(len(sets), height=3.6)
    for ax, (title, points) in zip(axes, sets.items(), strict=True):
        _scatter(ax, title, points[:num_points], frame)
    return figure


def _frame(points: FloatArray) -> FloatArray:
    """Return the lower and the upper corner, ``(2, 2)``, of a box around the finite points, with a margin."""
    finite = points[np.isfinite(points).all(axis=1)]
    return with_margin(finite.min(axis=0), finite.max(axis=0)) if len(finite) else np.array([[-1.0, -1.0], [1.0, 1.0]])


def with_margin(low: FloatArray, high: FloatArray) -> FloatArray:
    """Widen a box in the plane, given by two corners, by 8 % of its longer side; return its corners, ``(2, 2)``."""
    margin = 0.08 * (high - low).max() or 1.0
    return np.stack([low - margin, high + margin])


def _scatter(ax: Axes, title: str, points: FloatArray, frame: FloatArray) -> None:
    low, high = frame
    num_outside = len(points) - int(((points >= low) & (points <= high)).all(axis=1).sum())
    ax.plot(*points.T, linestyle="none", marker=".", markersize=2, alpha=0.5, markeredgewidth=0)
    ax.set(xlim=frame[:, 0], ylim=frame[:, 1], aspect="equal")
    ax.set_title(
        f"{title}: {len(points)} points" + (f", {num_outside} of them outside" if num_outside else ""),
        fontsize=TITLE_POINTS,
    )


def grid_png(grid: NDArray[np.uint8]) -> bytes:
    """Draw a grid of images as a PNG file, pixel by pixel."""
    buffer = io.BytesIO()
    image.imsave(buffer, grid, format="png")
    return buffer.getvalue()


def grid_picture(title: str, grid: NDArray[np.uint8], width: int = GRID_PIXELS, note: str = "") -> Picture:
    """Show a grid of images pixel by pixel, ``width`` CSS pixels wide."""
    return Picture(title, encoded(grid_png(grid)), width, note)


def image_grid(images: ArrayLike, columns: int = GRID_SIDE) -> NDArray[np.uint8]:
    """Arrange images ``(n, C, H, W)``, C 1 or 3, row by row, one white pixel apart: RGB, ``(height, width, 3)``.

    Small ones are enlarged by a whole factor. Values outside of [-1, 1] are clipped, those not finite are magenta.
    """
    shown = np.asarray(images, dtype=np.float64).transpose(0, 2, 3, 1)
    is_finite = np.isfinite(shown).all(axis=-1, keepdims=True)
    pixels = np.where(is_finite, ((shown + 1) / 2).clip(0, 1), NOT_FINITE_RGB)
    num, height, width = pixels.shape[:3]
    columns = min(num, columns)
    rows = math.ceil(num / columns)
    grid = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    for index in range(num):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[top : top + height, left : left + width] = pixels[index]
    factor = math.ceil(GRID_PIXELS / max(grid.shape))
    return (grid * 255).round().astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)


# --- posteriors --------------------------------------------------------------------------------------


def conditional_picture(arrays: Arrays) -> Picture:
    """Draw the posterior in conditional.npz: ``x`` (n, *event), ``mean``, ``sd``, ``r_hat``, ``mask``, ``given``."""
    note = (
        "Good: draws differ where little was observed, and each could be of the data; the standard deviation is large "
        "there and small elsewhere."
    )
    return picture("posterior of x given what was observed", conditional_figure(arrays), note)


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
        # nan, where nothing moves, stays white.
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
            ax.hist(values[np.isfinite(values)], bins=NUM_COORDINATE_BINS, density=True, alpha=0.6)
            ax.axvline(mean, color="black", linewidth=1)
        if arrays["mask"][index]:
            ax.axvline(arrays["given"][index], color="tab:red", linestyle="--", linewidth=1)
        seen = f", given {arrays['given'][index]:.4g} (red)" if arrays["mask"][index] else ""
        ax.set_title(f"coordinate {index + 1}: mean {mean:.4g}, sd {sd:.3g}{seen}", fontsize=TITLE_POINTS)
    return figure
