"""Names of the parts of an evaluation and of the sets that it compares with the data."""

from __future__ import annotations

from typing import Literal, get_args

from ppl_vaebm.config.data import DataName

Part = Literal["likelihood", "normaliser", "samples", "ood", "histograms", "neighbours"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of an evaluation, in the order in which they are shown."""
SYNTHETIC_SETS = ("rotated", "inverted", "noise", "constant", "interpolation", "vae")
"""Sets of images that are made of the data or of the model, without files."""
OOD_SETS = (*SYNTHETIC_SETS, *get_args(DataName))
