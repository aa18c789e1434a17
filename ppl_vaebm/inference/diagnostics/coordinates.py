"""Every coordinate of the noise by itself: positions and what their chains say, in one file; and in words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.files import TEMPORARY_PREFIX, replace, sync
from ppl_vaebm.inference.diagnostics.convergence import Convergence, FloatArray
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT, MIN_ESS
from ppl_vaebm.inference.kernels.packing import Packing

GROUP = "posterior"  # where ArviZ looks for draws
QUANTILES = (0.5, 0.95, 0.99)
NUM_NAMED = 3  # coordinates with the largest R-hat that are named


@dataclass(frozen=True)
class Coordinates:
    """What the chains say about every coordinate."""

    found: Convergence
    names: NDArray[np.str_]
    """Of the coordinates, ``(D,)``: noise and place in it."""
    num_chains: int
    num_draws: int
    """Positions of each chain that were kept."""
    stride: int
    """Draws of the chain per kept one."""

    @property
    def lines(self) -> list[str]:
        """Say in plain text how R-hat and effective sample sizes spread, and where they are worst."""
        found, total = self.found, len(self.names)
        every = "every draw" if self.stride == 1 else f"one of every {self.stride} draws"
        lines = [
            f"all {total} coordinates, {self.num_chains} chains of {self.num_draws} positions ({every}):",
            f"R-hat {_spread(found.r_hat, QUANTILES)}, largest {_worst(found.r_hat, np.max):.4g}; "
            f"above {MAX_R_HAT}: {int((~(found.r_hat <= MAX_R_HAT)).sum())}",
        ]
        for label, ess in (("bulk", found.ess_bulk), ("tail", found.ess_tail)):
            lines.append(
                f"ESS {label} {_spread(ess, [round(1 - share, 2) for share in QUANTILES])}, smallest "
                f"{_worst(ess, np.min):.4g}; below {MIN_ESS:.0f}: {int((~(ess >= MIN_ESS)).sum())}"
            )
        order = np.argsort(-np.nan_to_num(found.r_hat, nan=np.inf), kind="stable")[:NUM_NAMED]
        lines.append("largest R-hat: " + ", ".join(f"{self.names[i]} {found.r_hat[i]:.4g}" for i in order))
        num_void = int(np.isnan(found.r_hat).sum())
        if num_void:
            lines.append(f"note: {num_void} coordinates never moved or are not finite, and have no R-hat")
        return lines


def _spread(values: FloatArray, shares: tuple[float, ...] | list[float]) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "unknown"
    return ", ".join(f"{share:.0%} {np.quantile(known, share):.4g}" for share in shares)


def _worst(values: FloatArray, pick: np.ufunc | object) -> float:
    known = values[~np.isnan(values)]
    return float(pick(known)) if len(known) else float("nan")  # type: ignore[operator]


def coordinate_names(packing: Packing) -> NDArray[np.str_]:
    """Name every coordinate by its noise and its place there, ``(D,)``."""
    names = [
        f"{site}[{','.join(map(str, index))}]" for site, shape in packing.shapes.items() for index in np.ndindex(*shape)
    ]
    return np.array(names)


def save_coordinates(path: Path, positions: NDArray[np.float32], coordinates: Coordinates) -> None:
    """Write positions and diagnostics to a NetCDF file, whole or not at all.

    Args:
        path: the file; an older one is replaced in one step.
        positions: what was kept, ``(C, N, D)``.
        coordinates: what it says.
    """
    found = {name: ("coordinate", values) for name, values in coordinates.found._asdict().items()}
    dataset = xarray.Dataset(
        {"position": (("chain", "draw", "coordinate"), positions), **found},
        coords={"coordinate": coordinates.names.astype(object)},
        attrs={"stride": coordinates.stride},
    )
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        dataset.to_netcdf(temporary, group=GROUP, engine="h5netcdf")
        sync(temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_coordinates(path: Path) -> Coordinates:
    """Read the diagnostics of every coordinate back, and leave the positions on the disk.

    Args:
        path: a file of :func:`save_coordinates`.

    Returns:
        What it says.

    Raises:
        InputError: the file is damaged, or of something else.
    """
    try:
        with xarray.open_dataset(path, group=GROUP, engine="h5netcdf") as file:
            return Coordinates(
                Convergence(*(file[name].to_numpy() for name in Convergence._fields)),
                file["coordinate"].to_numpy().astype(str),
                file.sizes["chain"],
                file.sizes["draw"],
                int(file.attrs["stride"]),
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a readable file of positions ({error}); remove it, or make it again with "
            "diagnose --all-coordinates"
        ) from error
