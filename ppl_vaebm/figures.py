"""Pictures of a run as PNGs: what they share, curves of training, and samples."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic

FloatArray: TypeAlias = NDArray[np.float64]
Record: TypeAlias = Mapping[str, Any]

PIXELS_PER_INCH = 96  # of CSS; a figure of w inches is shown this many times w wide
DPI = 144  # one and a half stored pixels per shown one, for sharp screens
FIGURE_WIDTH = 10.4  # inches: the width of the page
PANEL_HEIGHT = 2.5  # inches
PANELS_PER_ROW = 3
TITLE_POINTS = 9
GRID_SIDE = 10  # images per row and per column
GRID_PIXELS = 320  # smallest side of a saved grid; smaller images are enlarged by whole factors
NOT_FINITE_RGB = (1.0, 0.0, 1.0)  # magenta: seen at once among images
MAX_POINTS = 5_000  # drawn per scatter plot
EARLY_PART = 0.1  # of a run; curves may leave the frame in it
SMOOTH_ABOVE = 200  # records; a longer curve is drawn faint, with its moving average over 1/50 of the run


class Picture(NamedTuple):
    """A picture of the page."""

    title: str
    """What it shows; also the text for those who cannot see it."""
    png: str
    """The PNG file in base64."""
    width: int
    """Width on the page, CSS pixels."""


class Panel(NamedTuple):
    """One set of axes of a figure of curves."""

    title: str
    """With the unit."""
    keys: tuple[str, ...]
    """Keys of the records, one curve each; one that ends in ``/`` stands for every key that starts with it."""
    level: float | None = None
    """Where to draw a dashed line."""


SVI_PANELS = (
    Panel("ELBO (nats per data point)", ("elbo_nats", "validation_elbo_nats")),
    Panel("loss", ("loss",)),
    Panel("KL (nats per data point)", ("kl_nats", "kl_nats/")),
)
EBM_PANELS = (
    Panel("validation gain (nats per data point)", ("validation_gain_nats",), 0.0),
    Panel("log Z (nats)", ("log_z",)),
    Panel("effective draws behind log Z", ("log_z_ess",)),
    Panel("mean energy (nats)", ("energy_data", "energy_model")),
    Panel("energy gap, data minus model (nats)", ("energy_gap",), 0.0),
    Panel("effective draws among a step's weights", ("weight_ess",)),
    Panel("acceptance rate", ("acceptance_rate",)),
    Panel("step size h (angle)", ("step_size",)),
    Panel("mean square of the noise", ("eps_mean_square/",), 1.0),
    Panel("loss", ("loss",)),
    Panel("gradient norm", ("grad_norm",)),
)


def picture(title: str, figure: Figure) -> Picture:
    return Picture(title, encode(_png(figure)), round(figure.get_figwidth() * PIXELS_PER_INCH))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def encode(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def panels(num_rows: int, num_columns: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list[list[Axes]]]:
    # A Figure without pyplot draws with Agg and is forgotten when it goes out of scope.
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(FIGURE_WIDTH, height * num_rows), layout=layout, facecolor="white")
    axes: list[list[Axes]] = figure.subplots(num_rows, num_columns, squeeze=False).tolist()
    for ax in itertools.chain.from_iterable(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


# Training


def curves_picture(title: str, records: Sequence[Record], panels: Sequence[Panel]) -> Picture:
    """Draw the curves of a stage over its optimiser steps, without those that the records lack.

    Args:
        title: what the picture shows.
        records: of ``metrics.jsonl``, each with its ``step``.
        panels: what to draw where.

    Returns:
        The picture.
    """
    return picture(title, _curves(records, panels))


def _curves(records: Sequence[Record], panels: Sequence[Panel]) -> Figure:
    drawn = [(panel, keys) for panel in panels if (keys := _present_keys(records, panel))]
    figure, rows = panels(max(1, math.ceil(len(drawn) / PANELS_PER_ROW)), PANELS_PER_ROW)
    axes = list(itertools.chain.from_iterable(rows))
    for ax, (panel, keys) in zip(axes, drawn, strict=False):
        ax.set_title(panel.title, fontsize=TITLE_POINTS)
        ax.grid(alpha=0.3)
        curves = {key: _series(records, key) for key in keys}
        for key, series in curves.items():
            _curve(ax, series, key)
        if panel.level is not None:
            ax.axhline(panel.level, color="black", linestyle="--", linewidth=0.8)
        if len(keys) > 1:
            ax.legend(fontsize=7)
        _frame_late_values(ax, np.concatenate(list(curves.values())), panel.level)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    return figure


def _present_keys(records: Sequence[Record], panel: Panel) -> list[str]:
    known = {key: None for record in records for key, value in record.items() if value is not None}
    return [key for key in known if key in panel.keys or any(w.endswith("/") and key.startswith(w) for w in panel.keys)]


def _series(records: Iterable[Record], key: str) -> FloatArray:
    """Collect ``(n, 2)``: step and value of the records that have the key."""
    return np.array([(r["step"], r[key]) for r in records if r.get(key) is not None], dtype=np.float64)


def _curve(ax: Axes, series: FloatArray, label: str) -> None:
    steps, values = series.T
    if len(series) <= SMOOTH_ABOVE:
        ax.plot(steps, values, linewidth=1, marker="." if len(series) <= 50 else None, label=label)
        return
    window = len(series) // 50
    (line,) = ax.plot(steps, values, linewidth=0.5, alpha=0.3)
    box = np.full(window, 1 / window)
    average = [np.convolve(column, box, mode="valid") for column in (steps, values)]
    ax.plot(*average, linewidth=1.2, color=line.get_color(), label=label)


def _frame_late_values(ax: Axes, series: FloatArray, level: float | None) -> None:
    """Fit the frame to all but the first tenth of the run, whose values would flatten the rest."""
    steps, values = series.T
    late = values[(steps > EARLY_PART * steps.max()) & np.isfinite(values)]
    shown = late if level is None else np.append(late, level)
    if len(late) and np.ptp(shown) > 0:
        margin = 0.05 * np.ptp(shown)
        ax.set_ylim(shown.min() - margin, shown.max() + margin)


# Samples


def sample_pictures(sets: Mapping[str, ArrayLike]) -> list[Picture]:
    """Draw sets of samples: points side by side in one picture, images in one grid for each set.

    Args:
        sets: points ``(n, 2)`` or images ``(n, C, H, W)`` in [-1, 1], C 1 or 3, by what to call them.

    Returns:
        The pictures.

    Raises:
        InputError: not such arrays.
    """
    samples = {title: _checked_samples(x) for title, x in sets.items()}
    if all(map(_are_points, samples.values())):
        return [picture("samples side by side", scatters(samples))]
    return [Picture(title, encode(_grid_png(x)), GRID_PIXELS) for title, x in samples.items()]


def save_samples_png(path: str | Path, x: ArrayLike) -> None:
    """Draw samples to a PNG file: points as a scatter plot, images as a grid.

    Args:
        path: of the file.
        x: ``(n, 2)`` points, or ``(n, C, H, W)`` images in [-1, 1].

    Raises:
        ValueError: neither points nor images.
    """
    draw = save_points_png if _are_points(_checked_samples(x)) else save_image_grid_png
    draw(path, x)


def save_points_png(path: str | Path, x: ArrayLike) -> None:
    """Save a scatter plot on equal axes.

    Args:
        path: the PNG file.
        x: points ``(n, 2)``; at most 5,000 are drawn.

    Raises:
        InputError: not such an array.
    """
    points = _checked_samples(x)
    if not _are_points(points):
        raise InputError(f"expected points of shape (n, 2), found {points.shape}: use save_image_grid_png for images")
    figure = Figure(figsize=(5, 5), layout="constrained", facecolor="white")
    _scatter(figure.subplots(), "samples", points[:MAX_POINTS], _frame(points))
    write_atomic(Path(path), _png(figure))


def save_image_grid_png(path: str | Path, x: ArrayLike) -> None:
    """Save the first 100 images as a grid of 10 by 10, pixels exact, small ones enlarged by a whole factor.

    Args:
        path: the PNG file.
        x: images ``(n, C, H, W)`` in [-1, 1], C 1 or 3; values outside are cut off, values that are not
            finite are magenta.

    Raises:
        InputError: not such an array.
    """
    images = _checked_samples(x)
    if images.ndim != 4:
        raise InputError(f"expected images of shape (n, C, H, W), found {images.shape}: use save_points_png for points")
    write_atomic(Path(path), _grid_png(images))


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


def scatters(sets: Mapping[str, FloatArray]) -> Figure:
    num_points = min(MAX_POINTS, min(map(len, sets.values())))
    frame = _frame(next(iter(sets.values())))
    figure, (axes,) = panels(1, PANELS_PER_ROW, height=3.6)
    for ax, (title, points) in zip(axes, sets.items(), strict=False):
        _scatter(ax, title, points[:num_points], frame)
    for ax in axes[len(sets) :]:
        ax.set_axis_off()
    return figure


def _frame(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the lower and the upper corner of a box around the finite points, with a margin."""
    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        return np.full(2, -1.0), np.full(2, 1.0)
    low, high = finite.min(axis=0), finite.max(axis=0)
    margin = 0.08 * (high - low).max() or 1.0
    return low - margin, high + margin


def _scatter(ax: Axes, title: str, points: FloatArray, frame: tuple[FloatArray, FloatArray]) -> None:
    low, high = frame
    num_outside = len(points) - int(((points >= low) & (points <= high)).all(axis=1).sum())
    ax.plot(*points.T, linestyle="none", marker=".", markersize=2, alpha=0.5, markeredgewidth=0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_title(
        f"{title}: {len(points)} points" + (f", {num_outside} of them outside" if num_outside else ""),
        fontsize=TITLE_POINTS,
    )


def _grid_png(images: FloatArray) -> bytes:
    buffer = io.BytesIO()
    image.imsave(buffer, _grid(images), format="png")
    return buffer.getvalue()


def _grid(images: FloatArray) -> NDArray[np.uint8]:
    """Arrange images ``(n, C, H, W)`` as RGB ``(H', W', 3)``, one white pixel apart, then enlarge."""
    shown = images[: GRID_SIDE**2].transpose(0, 2, 3, 1)
    is_finite = np.isfinite(shown).all(axis=-1, keepdims=True)
    pixels = np.where(is_finite, ((shown + 1) / 2).clip(0, 1), NOT_FINITE_RGB)
    num, height, width = pixels.shape[:3]
    columns = min(num, GRID_SIDE)
    rows = math.ceil(num / columns)
    grid = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    for index in range(num):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[top : top + height, left : left + width] = pixels[index]
    factor = math.ceil(GRID_PIXELS / max(grid.shape))
    return (grid * 255).round().astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
