"""Convergence of every coordinate of the noise, as text, and its file with the positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.arviz_io import save_netcdf
from ppl_vaebm.inference.diagnostics.convergence import Convergence, FloatArray
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT, MIN_ESS
from ppl_vaebm.inference.kernels.packing import Packing

GROUP = "posterior"  # where ArviZ expects draws
QUANTILES = (0.5, 0.95, 0.99)
NUM_NAMED = 3  # number of coordinates that the text names, those with the largest R-hat


@dataclass(frozen=True)
class Coordinates:
    """Diagnostics of every coordinate, and the kept positions that they are of."""

    convergence: Convergence
    names: NDArray[np.str_]
    """Noise and index of each coordinate, ``(D,)``."""
    num_chains: int
    num_draws: int
    """Kept positions of each chain."""
    stride: int
    """Draws per kept position."""

    @property
    def lines(self) -> list[str]:
        """Quantiles of R-hat and effective sample sizes, and the coordinates with the largest R-hat, as text."""
        r_hat = self.convergence.r_hat
        draws = "every draw" if self.stride == 1 else f"one of every {self.stride} draws"
        lines = [
            f"all {len(self.names)} coordinates, {self.num_chains} chains of {self.num_draws} positions ({draws}):",
            f"R-hat {_quantiles(r_hat, QUANTILES)}, largest {_extreme(r_hat, max):.4g}; "
            f"above {MAX_R_HAT}: {int((~(r_hat <= MAX_R_HAT)).sum())}",
        ]
        for label, ess in (("bulk", self.convergence.ess_bulk), ("tail", self.convergence.ess_tail)):
            lines.append(
                f"ESS {label} {_quantiles(ess, [round(1 - quantile, 2) for quantile in QUANTILES])}, smallest "
                f"{_extreme(ess, min):.4g}; below {MIN_ESS:.0f}: {int((~(ess >= MIN_ESS)).sum())}"
            )
        order = np.argsort(-np.nan_to_num(r_hat, nan=np.inf), kind="stable")[:NUM_NAMED]
        lines.append("largest R-hat: " + ", ".join(f"{self.names[i]} {r_hat[i]:.4g}" for i in order))
        num_void = int(np.isnan(r_hat).sum())
        if num_void:
            lines.append(f"note: {num_void} coordinates never moved or are not finite, and have no R-hat")
        return lines


def _quantiles(values: FloatArray, probabilities: Iterable[float]) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "unknown"
    return ", ".join(f"{probability:.0%} {np.quantile(finite, probability):.4g}" for probability in probabilities)


def _extreme(values: FloatArray, pick: Callable[..., float]) -> float:
    return float(pick(values[~np.isnan(values)], default=np.nan))


def coordinate_names(packing: Packing) -> NDArray[np.str_]:
    """Name every coordinate by its noise and its index there, ``(D,)``."""
    names = [
        f"{site}[{','.join(map(str, index))}]" for site, shape in packing.shapes.items() for index in np.ndindex(*shape)
    ]
    return np.array(names)


def save_coordinates(path: Path, positions: NDArray[np.float32], coordinates: Coordinates) -> None:
    """Write positions ``(C, N, D)`` and their diagnostics to a NetCDF file; an older file is replaced in one step."""
    diagnostics = {name: ("coordinate", values) for name, values in coordinates.convergence._asdict().items()}
    dataset = xarray.Dataset(
        {"position": (("chain", "draw", "coordinate"), positions), **diagnostics},
        coords={"coordinate": coordinates.names.astype(object)},
        attrs={"stride": coordinates.stride},
    )
    save_netcdf(dataset, path, group=GROUP)


def load_coordinates(path: Path) -> Coordinates:
    """Read the diagnostics of a file of :func:`save_coordinates`, without its positions.

    Raises:
        InputError: the file is damaged, or no such file.
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
