"""Names of the parts of an evaluation and of the sets that it compares with the data."""

from __future__ import annotations

from typing import Literal, cast, get_args

from ppl_vaebm.config.data import DataName
from ppl_vaebm.config.options import split_names

Part = Literal["likelihood", "log-z", "samples", "ood", "histograms", "neighbours"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of an evaluation, in the order in which they are shown."""
OLD_NAMES: dict[str, Part] = {"normaliser": "log-z"}
"""Names of parts in earlier versions, and their names now."""
SYNTHETIC_SETS = ("rotated", "inverted", "noise", "constant", "interpolation", "vae")
"""Sets of images that are made of the data or of the model, without files."""
OOD_SETS = (*SYNTHETIC_SETS, *get_args(DataName))


def split_parts(text: str) -> tuple[Part, ...]:
    """Split a list of parts, whose old names it knows, as :func:`~ppl_vaebm.config.options.split_names`."""
    names = [name.strip() for name in text.split(",")]
    return cast(tuple[Part, ...], split_names(",".join(OLD_NAMES.get(name, name) for name in names), PARTS, "part"))
