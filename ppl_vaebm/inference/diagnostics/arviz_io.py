"""Chains in ArviZ's containers and NetCDF files, under ArviZ 0.23 and 1.x alike."""

from __future__ import annotations

import contextlib
import functools
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm import __version__
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import replacing
from ppl_vaebm.inference.diagnostics.convergence import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vaebm.inference.kernels.chains import Chains

InferenceData: TypeAlias = Any
"""``arviz.InferenceData`` under ArviZ 0.23, ``xarray.DataTree`` under 1.x, indexed by group in both."""

_PACKAGES = ("torch", "pyro-ppl", "numpy", "arviz", "jax", "numpyro", "blackjax")


@functools.cache
def arviz() -> Any:
    """Import ArviZ on first use (it takes seconds), without 0.23's notice that 1.0 will differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as module
    return module


def to_inference_data(chains: Chains) -> InferenceData:
    """Convert chains to ArviZ's container, with groups ``posterior`` and ``sample_stats`` of ``chain, draw, ...``.

    The statistics also have ``step_size`` and, where it is known, ``elapsed``, the seconds from the start of the draws.
    The attributes of ``posterior`` are those of the chains (``seed``, ``thin``, ...), ``kernel``, ``num_evals``,
    ``warmup_evals``, ``seconds``, ``warmup_seconds`` and ``versions``.
    """
    stats = {name: _array(value) for name, value in chains.stats.items()}
    shape = stats["lp"].shape
    stats["step_size"] = np.broadcast_to(_array(chains.params.step_size).reshape(-1, 1), shape)
    if chains.elapsed is not None:
        stats["elapsed"] = np.broadcast_to(_array(chains.elapsed), shape)
    idata = _container({name: _array(value) for name, value in chains.draws.items()}, stats)
    costs = ("kernel", "num_evals", "warmup_evals", "seconds", "warmup_seconds")
    attrs = {"versions": _versions(), **chains.attrs, **{name: getattr(chains, name) for name in costs}}
    idata["posterior"].attrs.update(attrs)
    return idata


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _container(draws: dict[str, NDArray[Any]], stats: dict[str, NDArray[Any]]) -> InferenceData:
    groups = {"posterior": draws, "sample_stats": stats}
    with warnings.catch_warnings():
        # ArviZ takes many short chains, which are normal here, for swapped axes.
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension", category=UserWarning)
        is_before_1 = int(arviz().__version__.split(".")[0]) < 1
        return arviz().from_dict(**groups) if is_before_1 else arviz().from_dict(groups)


def _versions() -> str:
    versions = [f"python {platform.python_version()}", f"ppl_vaebm {__version__}"]
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join(versions)


def save_netcdf(data: InferenceData, path: str | Path, **options: str) -> None:
    """Write a container of ArviZ or xarray to a NetCDF file; an older file is replaced in one step.

    The options are those of the container's own ``to_netcdf``, such as ``group``.
    """
    with replacing(Path(path)) as temporary:
        data.to_netcdf(str(temporary), engine="h5netcdf", **options)


def load_netcdf(path: str | Path) -> InferenceData:
    """Read a NetCDF file of chains, written under any version of ArviZ, into memory.

    Raises:
        InputError: the file is missing, damaged, or holds no group ``posterior``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"expected a NetCDF file of chains at {path}, found none: give the path of a chains.nc")
    try:
        idata = arviz().from_netcdf(str(path), engine="h5netcdf")
        idata.load()
        idata.close()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable NetCDF file ({error}): draw the chains again") from error
    if not hasattr(idata, "posterior"):
        raise InputError(f"expected a group 'posterior' in {path}, found none: give the path of a chains.nc")
    for group in ("posterior", "sample_stats"):
        if hasattr(idata, group):
            # NetCDF returns numbers and lists of them as arrays.
            for key, value in idata[group].attrs.items():
                if isinstance(value, np.ndarray | np.generic):
                    idata[group].attrs[key] = value.tolist()
    return idata


def attribute_list(idata: InferenceData, name: str) -> list[float]:
    """Return an attribute that is a list of numbers, empty where it is missing; NetCDF unpacks a list of one."""
    value = idata["posterior"].attrs.get(name, [])
    return [float(number) for number in np.atleast_1d(value)]


def cut(idata: InferenceData, num_draws: int) -> InferenceData:
    """Keep the first draws of every chain, at least one, as if the run had stopped there.

    ``num_evals`` and ``seconds`` are then those of the kept draws. Where ``elapsed`` is missing, the time is in
    proportion to the evaluations.
    """
    attrs = idata["posterior"].attrs
    kept = idata.isel(draw=slice(0, num_draws))
    num_evals = int(stat(kept, "n_steps").sum())
    if "elapsed" in kept["sample_stats"]:
        seconds = float(stat(kept, "elapsed")[0, -1])
    else:
        seconds = attrs["seconds"] * num_evals / attrs["num_evals"]
    # A new dictionary: the kept group shares that of the whole.
    kept["posterior"].attrs = {**attrs, "num_evals": num_evals, "seconds": seconds}
    return kept


def scalar_draws(idata: InferenceData) -> dict[str, FloatArray]:
    """Return the draws ``(C, N)`` of every scalar element of every posterior variable, float64, by name."""
    quantities = {}
    for name, variable in idata["posterior"].data_vars.items():
        values = variable.transpose("chain", "draw", ...).to_numpy().astype(np.float64)
        for index in np.ndindex(values.shape[2:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else str(name)
            quantities[label] = values[(slice(None), slice(None), *index)]
    return quantities


def stat(idata: InferenceData, name: str) -> FloatArray:
    """Return a statistic of every draw, ``(C, N)``, float64."""
    values: FloatArray = idata["sample_stats"][name].transpose("chain", "draw").to_numpy().astype(np.float64)
    return values
