"""Pictures of stage 1, each of one file of the samples folder: reconstructions, prior samples, KL, a traversal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ppl_vaebm.files import write_atomic
from ppl_vaebm.reports.figures import DPI, TITLE_POINTS, Picture, axes_grid, picture
from ppl_vaebm.reports.samples import Arrays, conditional_png, grid_png, image_grid, sample_pictures, samples_png
from ppl_vaebm.runs.run import GROUP_KL, PRIOR, RECONSTRUCTIONS, TRAVERSAL

Grid: TypeAlias = NDArray[np.uint8]

LABELLED_PIXELS = 900  # width that a grid with labels is enlarged to, by a whole factor
LABEL_INCHES, TOP_INCHES, EDGE_INCHES = 0.9, 0.3, 0.05  # left of a grid with labels, above, and elsewhere
_GAP = ((0, 0), (6, 6), (0, 0))  # pixels beside a grid that stands among others
MIN_BARS = 12  # places for bars, so that few are not as wide as the page
MAX_NAMED_BARS = 40  # if there are more groups, only some have their name under their bar


def save_png(path: Path) -> None:
    """Draw a file of arrays of the samples folder beside it; nothing where it holds no images or points."""
    with np.load(path) as file:
        arrays = dict(file)
    if path.stem == "conditional":
        png = conditional_png(arrays)
    elif path.stem not in GALLERY:
        png = samples_png(arrays["x"])
    elif grids := gallery_grids(path.stem, arrays):
        png = grid_png(side_by_side(grids))
    else:
        return
    write_atomic(path.with_suffix(".png"), png)


def gallery_grids(name: str, arrays: Arrays) -> dict[str, Grid]:
    """Arrange the images of a file, by its name without suffix, as RGB grids ``(height, width, 3)`` by their labels."""
    x = arrays.get("x")
    if x is None or x.ndim < 4:
        return {}
    if name == RECONSTRUCTIONS:
        columns = math.ceil(len(x) / 2)
        return {"reconstructions": image_grid(_in_pairs_of_rows(arrays["data"], x, columns), columns)}
    if name == PRIOR:
        columns = math.isqrt(len(x))
        return {f"prior t={t:g}": image_grid(x[:, i], columns) for i, t in enumerate(arrays["temperatures"])}
    return {f"traversal {arrays['group']}": image_grid(x.reshape(-1, *x.shape[2:]), x.shape[1])}


def side_by_side(grids: Mapping[str, Grid]) -> Grid:
    """Put the grids of a file, which have one size, beside each other, with white between them."""
    padded = [np.pad(grid, _GAP if len(grids) > 1 else 0, constant_values=255) for grid in grids.values()]
    return np.concatenate(padded, axis=1)


def gallery_pictures(name: str, arrays: Arrays) -> list[Picture]:
    """Draw a file of the gallery, by its name without suffix."""
    return _DRAW[name](arrays)


def _in_pairs_of_rows(above: NDArray[Any], below: NDArray[Any], columns: int) -> NDArray[Any]:
    """Alternate rows of one set with the matching rows of another."""
    rows = [part[start : start + columns] for start in range(0, len(above), columns) for part in (above, below)]
    return np.concatenate(rows)


def _reconstructions(arrays: Arrays) -> list[Picture]:
    (grid,) = gallery_grids(RECONSTRUCTIONS, arrays).values()
    num = len(arrays["x"])
    labels = ["test image", "mean"] * min(2, num)
    note = (
        f"{num} test images, and under each the decoder's mean for one draw of its latents from the posterior. Good: "
        "the two look alike; details that are lost are not in the latents."
    )
    return [picture("reconstructions", _labelled(grid, labels, []), note)]


def _prior(arrays: Arrays) -> list[Picture]:
    temperatures, statistics = arrays["temperatures"], str(arrays["statistics"])
    if arrays["x"].ndim == 3:
        sets = {"test data": arrays["data"]}
        sets |= {f"VAE, temperature {t:g}": arrays["x"][:, i] for i, t in enumerate(temperatures)}
        note = "Test data and VAE samples. Good: they look the same."
        return [shown._replace(title="prior samples", note=note) for shown in sample_pictures(sets)]
    note = (
        "The decoder's means for latents from the prior, whose noise is multiplied by the temperature t; the same "
        f"noise in every grid{statistics and '; '}{statistics}. Good: at t = 1 the images are plausible and as varied "
        "as the data; if only a low t looks right, the prior covers more than the posteriors do."
    )
    grid = side_by_side(gallery_grids(PRIOR, arrays))
    labels = [f"t = {t:g}" for t in temperatures]
    return [picture("prior samples by temperature", _labelled(grid, [""], labels), note)]


def _traversal(arrays: Arrays) -> list[Picture]:
    (grid,) = gallery_grids(TRAVERSAL, arrays).values()
    num, group = len(arrays["x"]), arrays["group"]
    note = (
        f"Each row is a prior sample at temperature {float(arrays['temperature']):g}. Along it the noise of {group} is "
        "rotated towards a random direction by the angle above, in radians, and all other noise is fixed; 0 is the "
        "sample. Good: the images change smoothly and stay plausible; if nothing changes, the group is not used."
    )
    figure = _labelled(grid, [f"draw {i}" for i in range(1, num + 1)], [f"{a:g}" for a in arrays["angles"]])
    return [picture(f"traversal of latent group {group}", figure, note)]


def _group_kl(arrays: Arrays) -> list[Picture]:
    note = (
        f"Mean over {int(arrays['num_points'])} held-out data points, from the first group to the last. Each bar is "
        "the information about x that the posterior of a group adds to the groups before it. Good: no long run of bars "
        "at 0, which are groups that the decoder ignores."
    )
    return [picture("KL of every latent group", _bars(arrays), note)]


def _bars(arrays: Arrays) -> Figure:
    kl, sides = arrays["kl_nats"], [int(side) for side in arrays["sides"]]
    figure, ((ax,),) = axes_grid(1, 1)
    colours = {side: f"C{index}" for index, side in enumerate(dict.fromkeys(sides))}
    ax.bar(np.arange(len(kl)), kl, color=[colours[side] for side in sides])
    step = -(-len(kl) // MAX_NAMED_BARS)
    ax.set_xticks(np.arange(0, len(kl), step), arrays["names"][::step])
    ax.set_xlim(-0.6, max(len(kl), MIN_BARS) - 0.4)
    ax.set_title(f"KL (nats per data point); in all {float(kl.sum()):.4g}", fontsize=TITLE_POINTS)
    names = {side: f"{side} x {side} grid" if side else "vector" for side in colours}
    ax.legend(handles=[Patch(color=colour, label=names[side]) for side, colour in colours.items()], fontsize=7)
    return figure


def _labelled(grid: Grid, row_labels: Sequence[str], column_labels: Sequence[str]) -> Figure:
    """Draw labels beside the rows and above the columns of a grid, whose pixels stay exact."""
    height, width = grid.shape[:2]
    factor = max(1, LABELLED_PIXELS // width)
    inches = (width * factor / DPI, height * factor / DPI)
    left = LABEL_INCHES if any(row_labels) else EDGE_INCHES
    top = TOP_INCHES if column_labels else EDGE_INCHES
    size = (left + inches[0] + EDGE_INCHES, EDGE_INCHES + inches[1] + top)
    figure = Figure(figsize=size, facecolor="white")
    ax = figure.add_axes((left / size[0], EDGE_INCHES / size[1], inches[0] / size[0], inches[1] / size[1]))
    ax.imshow(grid, interpolation="nearest", aspect="auto", extent=(0, max(1, len(column_labels)), len(row_labels), 0))
    ax.set_yticks(np.arange(len(row_labels)) + 0.5, row_labels)
    ax.set_xticks(np.arange(len(column_labels)) + 0.5, column_labels)
    ax.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return figure


_DRAW: dict[str, Callable[[Arrays], list[Picture]]] = {
    RECONSTRUCTIONS: _reconstructions,
    PRIOR: _prior,
    TRAVERSAL: _traversal,
    GROUP_KL: _group_kl,
}
GALLERY = tuple(_DRAW)
"""Names of the gallery's files, in the order of the page."""
