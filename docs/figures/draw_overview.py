"""Draw the README's two pictures: ``python docs/figures/draw_overview.py RUN``.

RUN is a fitted gaussians25 with its samples (``make demo`` leaves one). The images are the stored grids of
``ppl_vaebm/experiments/results``, enlarged by two and otherwise unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FIGURES = Path(__file__).parent
RESULTS = FIGURES.parents[1] / "ppl_vaebm" / "experiments" / "results"
TITLES = ("data", "VAE", "VAEBM")
SIDE, TITLE_HEIGHT, GAP = 420, 36, 18
LIMIT = 2.6  # the half width of the points' square
ROWS, CELL = 6, 33  # of a stored grid: rows of images, pixels from one image to the next


def scatter(points: np.ndarray) -> Image.Image:
    """Return a square picture of points, one dark pixel each, drawn at twice the size for soft edges."""
    side = 2 * SIDE
    column, row = ((points[:, i] * (1, -1)[i] / LIMIT + 1) / 2 * side for i in (0, 1))
    pixels = np.full((side, side), 255, np.uint8)
    inside = (column >= 0) & (column < side - 1) & (row >= 0) & (row < side - 1)
    for right, down in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixels[row[inside].astype(int) + down, column[inside].astype(int) + right] = 40
    pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = 160, 160, 160, 160
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def grid(name: str) -> Image.Image:
    """Return the first rows of a stored grid of grey images, enlarged by two."""
    stored = Image.open(RESULTS / f"{name}.png").convert("L")
    cut = stored.crop((0, 0, stored.width, ROWS * CELL))
    return cut.resize((2 * cut.width, 2 * cut.height), Image.Resampling.NEAREST)


def side_by_side(panels: list[Image.Image], path: Path) -> None:
    """Write panels of one size beside each other, with their titles above."""
    width, height = panels[0].size
    page = Image.new("L", (3 * width + 2 * GAP, height + TITLE_HEIGHT), 255)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 24)
    for i, (title, panel) in enumerate(zip(TITLES, panels, strict=True)):
        left = i * (width + GAP)
        ImageDraw.Draw(page).text((left + width / 2, TITLE_HEIGHT / 2), title, 0, font, anchor="mm")
        page.paste(panel, (left, TITLE_HEIGHT))
    page.save(path, optimize=True)


if __name__ == "__main__":
    samples = Path(sys.argv[1]) / "samples"
    side_by_side([scatter(np.load(samples / f"{name.lower()}.npz")["x"]) for name in TITLES], FIGURES / "points.png")
    side_by_side([grid(f"fashion-mnist-small-{name.lower()}") for name in TITLES], FIGURES / "images.png")
