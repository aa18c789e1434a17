"""Helpers of all pictures, and the curves of training."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Record: TypeAlias = Mapping[str, Any]

PIXELS_PER_INCH = 96  # of CSS; a figure of w inches is shown this many times w wide
DPI = 144  # one and a half stored pixels per shown one, for sharp screens
FIGURE_WIDTH = 10.4  # inches: the width of the page
PANEL_HEIGHT = 2.5  # inches
PANELS_PER_ROW = 3
TITLE_POINTS = 9
MAX_LABELS = 8  # curves named in a legend; if there are more, members of a family of keys are not named
EARLY_PART = 0.1  # of a run; curves may leave the frame in it
SMOOTH_ABOVE = 200  # records; a longer curve is drawn faint, with its moving average over 1/50 of the run


class Picture(NamedTuple):
    """A picture of the page."""

    title: str
    """Also the text for readers who cannot see it."""
    png: str
    """PNG file in base64."""
    width: int
    """Width on the page, CSS pixels."""
    note: str = ""
    """What good looks like."""


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
    Panel("standard deviation of the energies (nats)", ("energy_sd",)),
    Panel("effective draws among a step's weights", ("weight_ess",)),
    Panel("acceptance rate", ("acceptance_rate",)),
    Panel("step size h (angle)", ("step_size",)),
    Panel("mean square of the noise", ("eps_mean_square/",), 1.0),
    Panel("loss", ("loss",)),
    Panel("gradient norm", ("grad_norm",)),
    Panel("learning rate", ("lr",)),
    Panel("fraction of the negatives' pixels beyond the range", ("saturation",)),
)


def picture(title: str, figure: Figure, note: str = "") -> Picture:
    """Make a picture of a figure; the note says what good looks like."""
    return Picture(title, encoded(png_of(figure)), round(figure.get_figwidth() * PIXELS_PER_INCH), note)


def png_of(figure: Figure) -> bytes:
    """Draw a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def encoded(png: bytes) -> str:
    """Return a PNG file as text for the page, in base64."""
    return base64.b64encode(png).decode("ascii")


def axes_grid(num_rows: int, num_columns: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure as wide as the page, with rows of plain axes of some height in inches."""
    # A Figure without pyplot draws with Agg and is forgotten when it goes out of scope.
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(FIGURE_WIDTH, height * num_rows), layout=layout, facecolor="white")
    axes: list[list[Axes]] = figure.subplots(num_rows, num_columns, squeeze=False).tolist()
    for ax in itertools.chain.from_iterable(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def panel_axes(num: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``num`` axes, :data:`PANELS_PER_ROW` side by side."""
    figure, rows = axes_grid(max(1, math.ceil(num / PANELS_PER_ROW)), PANELS_PER_ROW, height)
    axes = list(itertools.chain.from_iterable(rows))
    for ax in axes[num:]:
        ax.set_axis_off()
    return figure, axes[:num]


def curves_picture(title: str, records: Sequence[Record], panels: Sequence[Panel]) -> Picture:
    """Draw the curves of a stage over its optimiser steps; panels without records are left out."""
    return picture(title, _curves(records, panels))


def _curves(records: Sequence[Record], panels: Sequence[Panel]) -> Figure:
    drawn = [(panel, keys) for panel in panels if (keys := _present_keys(records, panel))]
    figure, axes = panel_axes(len(drawn))
    for ax, (panel, keys) in zip(axes, drawn, strict=True):
        ax.set_title(panel.title, fontsize=TITLE_POINTS)
        ax.grid(alpha=0.3)
        curves = {key: _series(records, key) for key in keys}
        for key, series in curves.items():
            _curve(ax, series, key)
        if panel.level is not None:
            ax.axhline(panel.level, color="black", linestyle="--", linewidth=0.8)
        if len(keys) > 1:
            _legend(ax, keys if len(keys) <= MAX_LABELS else panel.keys)
        _frame_late_values(ax, np.concatenate(list(curves.values())), panel.level)
    return figure


def _legend(ax: Axes, keys: Sequence[str]) -> None:
    lines = [line for line in ax.get_lines() if line.get_label() in keys]
    ax.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)


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
    """Fit the frame to all but the first tenth of the run, whose values would flatten the others."""
    steps, values = series.T
    late = values[(steps > EARLY_PART * steps.max()) & np.isfinite(values)]
    shown = late if level is None else np.append(late, level)
    if len(late) and np.ptp(shown) > 0:
        margin = 0.05 * np.ptp(shown)
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
