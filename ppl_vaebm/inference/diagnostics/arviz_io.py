"""Chains in ArviZ's containers and files, under ArviZ 0.23 and 1.x alike."""

from __future__ import annotations

import functools
import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm import __version__
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import TEMPORARY_PREFIX, replace, sync
from ppl_vaebm.inference.diagnostics.convergence import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vaebm.inference.kernels.chains import Chains

InferenceData: TypeAlias = Any
"""``arviz.InferenceData`` under ArviZ 0.23, ``xarray.DataTree`` under 1.x, indexed by group in both."""

_PACKAGES = ("torch", "pyro-ppl", "numpy", "arviz", "jax", "numpyro", "blackjax")


@functools.cache
def arviz() -> Any:
    """Import ArviZ when it is needed (it takes seconds), without 0.23's notice that 1.0 will differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as module
    return module


def _has_inference_data_class() -> bool:
    return int(arviz().__version__.split(".")[0]) < 1


def to_inference_data(chains: Chains) -> InferenceData:
    """Put chains into ArviZ's container.

    Args:
        chains: draws ``(C, N, ...)`` and statistics ``(C, N)``.

    Returns:
        Groups ``posterior`` and ``sample_stats`` with dimensions ``chain, draw, ...``. Beside the chains' own, the
        statistics have ``step_size`` and, where it is known, ``elapsed``, seconds from the start of the draws over
        all chains. The attributes of ``posterior`` are ``kernel``, ``num_evals``, ``warmup_evals``, ``seconds``,
        ``warmup_seconds``, ``versions``, and those of the chains (``seed``, ``thin``, ...).
    """
    stats = {name: _array(value) for name, value in chains.stats.items()}
    shape = stats["lp"].shape
    stats["step_size"] = np.broadcast_to(_array(chains.params.step_size).reshape(-1, 1), shape)
    if chains.elapsed is not None:
        stats["elapsed"] = np.broadcast_to(_array(chains.elapsed), shape)
    groups = {
        "posterior": {name: _array(value) for name, value in chains.draws.items()},
        "sample_stats": stats,
    }
    idata = _container(groups)
    idata["posterior"].attrs.update(
        {
            "versions": _versions(),
            **chains.attrs,
            "kernel": chains.kernel,
            "num_evals": chains.num_evals,
            "warmup_evals": chains.warmup_evals,
            "seconds": chains.seconds,
            "warmup_seconds": chains.warmup_seconds,
        }
    )
    return idata


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _container(groups: dict[str, dict[str, NDArray[Any]]]) -> InferenceData:
    with warnings.catch_warnings():
        # Many short chains are the normal case here; ArviZ guesses that the axes are swapped.
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension", category=UserWarning)
        if _has_inference_data_class():
            return arviz().from_dict(**groups)
        return arviz().from_dict(groups)


def _versions() -> str:
    found = [f"python {platform.python_version()}", f"ppl_vaebm {__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def save_netcdf(idata: InferenceData, path: str | Path) -> None:
    """Write a container to a NetCDF file, whole or not at all.

    Args:
        idata: what to write.
        path: the file; an older one is replaced in one step.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        idata.to_netcdf(str(temporary), engine="h5netcdf")
        sync(temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_netcdf(path: str | Path) -> InferenceData:
    """Read a NetCDF file into memory; one written under either major version of ArviZ will do.

    Args:
        path: a file of :func:`save_netcdf`, or any of ArviZ's.

    Returns:
        The container.

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
            attrs = idata[group].attrs
            attrs.update({name: _plain(value) for name, value in attrs.items()})
    return idata


def _plain(value: Any) -> Any:
    """Turn what NetCDF makes of an attribute back into what it was: a number, a text or a list of numbers."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def attribute_list(idata: InferenceData, name: str) -> list[float]:
    """Return an attribute that is a list of numbers; NetCDF gives one of a single number back as that number.

    Args:
        idata: of :func:`to_inference_data` or :func:`load_netcdf`.
        name: of the attribute.

    Returns:
        The numbers; none where there is no such attribute.
    """
    value = idata["posterior"].attrs.get(name, [])
    return [float(number) for number in np.atleast_1d(value)]


def cut(idata: InferenceData, num_draws: int) -> InferenceData:
    """Keep the first draws of every chain, as if the run had stopped there.

    Args:
        idata: of :func:`to_inference_data`.
        num_draws: draws per chain to keep, at least 1 and at most those there are.

    Returns:
        A container whose ``num_evals`` and ``seconds`` are those of the kept draws; the time only where ``elapsed``
        is known, else the evaluations' share of it.
    """
    whole = idata["posterior"].attrs
    kept = idata.isel(draw=slice(0, num_draws))
    num_evals = int(stat(kept, "n_steps").sum())
    if "elapsed" in kept["sample_stats"]:
        seconds = float(stat(kept, "elapsed")[0, -1])
    else:
        seconds = whole["seconds"] * num_evals / whole["num_evals"]
    # A new dictionary, for the kept group shares that of the whole.
    kept["posterior"].attrs = {**whole, "num_evals": num_evals, "seconds": seconds}
    return kept


def scalar_draws(idata: InferenceData) -> dict[str, FloatArray]:
    """Split the posterior into numbers per draw.

    Args:
        idata: a container with group ``posterior``.

    Returns:
        Draws ``(C, N)`` of every scalar element of every variable, float64, by name.
    """
    return dict(scalar_elements(idata))


def scalar_elements(idata: InferenceData) -> Iterator[tuple[str, FloatArray]]:
    """Yield the items of :func:`scalar_draws` one by one."""
    for name, variable in idata["posterior"].data_vars.items():
        values = variable.transpose("chain", "draw", ...).to_numpy().astype(np.float64)
        for index in np.ndindex(values.shape[2:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else str(name)
            yield label, values[(slice(None), slice(None), *index)]


def stat(idata: InferenceData, name: str) -> FloatArray:
    """Return a statistic of every draw, ``(C, N)``, float64."""
    values: FloatArray = idata["sample_stats"][name].transpose("chain", "draw").to_numpy().astype(np.float64)
    return values
