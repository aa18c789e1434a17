"""From chains to a verdict: ArviZ containers and files, R-hat, effective sample sizes, BFMI, divergences.

R-hat and effective sample sizes are those of Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021),
doi 10.1214/20-BA1221, as ArviZ computes them; ArviZ 0.23 and 1.x are both served. Nothing is averaged
over chains before it is compared across them.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.files import TEMPORARY_PREFIX, replace, sync
from ppl_vaebm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vaebm.inference.chains import Chains

InferenceData: TypeAlias = Any
"""``arviz.InferenceData`` under ArviZ 0.23, ``xarray.DataTree`` under 1.x, indexed by group in both."""

FloatArray: TypeAlias = NDArray[np.float64]

MIN_DRAWS = 4
"""ArviZ splits every chain in two, and a variance needs two draws in each half."""
MAX_R_HAT = 1.01
"""Chains whose R-hat is above this disagree: Vehtari et al. (2021)."""
MIN_ESS = 400.0
"""With fewer effective draws R-hat and the errors are themselves noisy: Vehtari et al. (2021)."""
MIN_CHAINS = 4
"""Chains needed for R-hat to see modes that some of them miss: Vehtari et al. (2021)."""
MIN_BFMI = 0.3
"""A smaller BFMI means that the energy diffuses: Stan's threshold, after Betancourt (2016), arXiv 1604.00695."""
TAIL_PROBABILITIES = (0.05, 0.95)
"""Quantiles of the tail effective sample size: Vehtari et al. (2021). ArviZ 1.x would follow its interval setting."""

_NAN = float("nan")
_PACKAGES = ("torch", "pyro-ppl", "numpy", "arviz")


class FunctionalSummary(NamedTuple):
    """What the chains say about one number per draw."""

    name: str
    """The functional; elements of a vector are ``name[0]``, ``name[1]``, ..."""
    mean: float
    """Mean over all draws of all chains, in the functional's own unit; so are the next two."""
    sd: float
    """Standard deviation over all draws of all chains."""
    mcse_mean: float
    """Monte Carlo standard error of the mean."""
    r_hat: float
    """Rank-normalised split R-hat; 1 when the chains agree, nan when the functional never moves."""
    ess_bulk: float
    """Independent draws that would fix the mean as well."""
    ess_tail: float
    """Independent draws that would fix the 5 % and 95 % quantiles as well, the worse of the two."""
    ess_per_1000_evals: float
    """``ess_bulk`` per 1000 evaluations of the potential; the warm-up is not counted."""
    ess_per_second: float
    """``ess_bulk`` per second; the warm-up is not counted."""


@functools.cache
def _arviz() -> Any:
    """Import ArviZ when it is needed (it takes seconds), without 0.23's notice that 1.0 will differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _has_inference_data_class() -> bool:
    return int(_arviz().__version__.split(".")[0]) < 1


def to_inference_data(chains: Chains) -> InferenceData:
    """Put chains into ArviZ's container.

    Args:
        chains: draws ``(C, N, ...)`` and statistics ``(C, N)``.

    Returns:
        Groups ``posterior`` and ``sample_stats`` with dimensions ``chain, draw, ...``. The attributes of
        ``posterior`` are ``kernel``, ``num_evals``, ``warmup_evals``, ``seconds``, ``warmup_seconds``,
        ``versions``, and those of the chains (``seed``, ``thin``, ...).
    """
    stats = {name: _array(value) for name, value in chains.stats.items()}
    step_size = _array(chains.params.step_size).reshape(-1, 1)
    groups = {
        "posterior": {name: _array(value) for name, value in chains.draws.items()},
        "sample_stats": {**stats, "step_size": np.broadcast_to(step_size, stats["lp"].shape)},
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
            return _arviz().from_dict(**groups)
        return _arviz().from_dict(groups)


def _versions() -> str:
    found = [f"python {platform.python_version()}", f"ppl_vaebm {__version__}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
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
        idata = _arviz().from_netcdf(str(path), engine="h5netcdf")
        idata.load()
        idata.close()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable NetCDF file ({error}): draw the chains again") from error
    if not hasattr(idata, "posterior"):
        raise InputError(f"expected a group 'posterior' in {path}, found none: give the path of a chains.nc")
    return idata


def scalar_draws(idata: InferenceData) -> dict[str, FloatArray]:
    """Split the posterior into numbers per draw.

    Args:
        idata: a container with group ``posterior``.

    Returns:
        Draws ``(C, N)`` of every scalar element of every variable, float64, by name.
    """
    return dict(_elements(idata))


def _elements(idata: InferenceData) -> Iterator[tuple[str, FloatArray]]:
    for name, variable in idata["posterior"].data_vars.items():
        values = variable.transpose("chain", "draw", ...).to_numpy().astype(np.float64)
        for index in np.ndindex(values.shape[2:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else str(name)
            yield label, values[(slice(None), slice(None), *index)]


def summarize(idata: InferenceData) -> list[FunctionalSummary]:
    """Judge every scalar element of every posterior variable.

    A functional that never moves gets nan for R-hat, effective sample sizes and error (ArviZ would credit
    it with all draws, which rewards a sampler that is stuck); draws that are not numbers give nan too.
    With one chain R-hat compares the quarters of it; :func:`text_table` marks any R-hat of few chains.

    Args:
        idata: at least 4 draws per chain.

    Returns:
        One summary per functional, in the order of the file.

    Raises:
        InputError: fewer than 4 draws per chain.
    """
    posterior = idata["posterior"]
    if posterior.sizes["draw"] < MIN_DRAWS:
        raise InputError(
            f"expected at least {MIN_DRAWS} draws per chain, found {posterior.sizes['draw']}: draw longer chains"
        )
    evals, seconds = (float(posterior.attrs.get(key, _NAN)) for key in ("num_evals", "seconds"))
    # Moments of infinite draws are nan, and chains that each stand still somewhere else have an infinite R-hat.
    with np.errstate(invalid="ignore", divide="ignore"):
        return [_summary(name, draws, evals, seconds) for name, draws in _elements(idata)]


def _summary(name: str, draws: FloatArray, evals: float, seconds: float) -> FunctionalSummary:
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    if (draws == draws[0, 0]).all():
        return FunctionalSummary(name, mean, 0.0, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN)
    arviz = _arviz()
    ess_bulk = float(arviz.ess(draws, method="bulk"))
    return FunctionalSummary(
        name=name,
        mean=mean,
        sd=sd,
        mcse_mean=float(arviz.mcse(draws, method="mean")),
        r_hat=_r_hat(draws),
        ess_bulk=ess_bulk,
        ess_tail=float(arviz.ess(draws, method="tail", prob=TAIL_PROBABILITIES)),
        ess_per_1000_evals=1000 * ess_bulk / evals if evals else _NAN,
        ess_per_second=ess_bulk / seconds if seconds else _NAN,
    )


def _r_hat(draws: FloatArray) -> float:
    num_chains, num_draws = draws.shape
    if num_chains == 1:
        draws = draws[:, : num_draws // 2 * 2].reshape(2, -1)  # ArviZ refuses a single chain
    return float(_arviz().rhat(draws, method="rank")) if draws.shape[1] >= MIN_DRAWS else _NAN


def bfmi(idata: InferenceData) -> FloatArray:
    """Estimate the Bayesian fraction of missing information of every chain: Betancourt (2016), arXiv 1604.00695.

    It is the mean square of the change of energy per draw over the variance of the energy: 2 for independent
    energies, near 1 for HMC that explores well, near 0 for energies that diffuse.

    Args:
        idata: with ``energy`` in group ``sample_stats``.

    Returns:
        ``(C,)``; nan for a chain whose energy never moves.
    """
    energy = _stat(idata, "energy")
    with np.errstate(invalid="ignore", divide="ignore"):
        values: FloatArray = np.square(np.diff(energy, axis=1)).mean(axis=1) / energy.var(axis=1, ddof=1)
    return values


def num_divergent(idata: InferenceData) -> int:
    """Count the divergent draws of all chains."""
    return int(_stat(idata, "diverging").sum())


def _stat(idata: InferenceData, name: str) -> FloatArray:
    values: FloatArray = idata["sample_stats"][name].transpose("chain", "draw").to_numpy().astype(np.float64)
    return values


def worst(summaries: Sequence[FunctionalSummary]) -> tuple[float, float]:
    """Find the worst R-hat and the worst bulk effective sample size.

    Args:
        summaries: at least one.

    Returns:
        The largest R-hat and the smallest ``ess_bulk``; nan where any functional has nan, for that is worse
        than any number. Ask ``r_hat <= limit`` rather than ``r_hat > limit``, and nan fails as it should.
    """
    return (
        float(np.max([summary.r_hat for summary in summaries])),
        float(np.min([summary.ess_bulk for summary in summaries])),
    )


def is_converged(summary: FunctionalSummary) -> bool:
    """Ask whether R-hat is at most 1.01 and both effective sample sizes are at least 400; nan is a no."""
    return summary.r_hat <= MAX_R_HAT and min(summary.ess_bulk, summary.ess_tail) >= MIN_ESS


TABLE_HEADER = (
    ("functional", ""),
    ("mean", "own unit"),
    ("sd", "own unit"),
    ("MCSE", "own unit"),
    ("R-hat", ""),
    ("ESS bulk", "draws"),
    ("ESS tail", "draws"),
    ("ESS rate", "per 1000 evals"),
    ("ESS rate", "per second"),
)
"""Title and unit of every column of :func:`table_cells`."""


def table_cells(summary: FunctionalSummary) -> list[str]:
    """Write a summary as the cells of one table row, in the order of :data:`TABLE_HEADER`."""
    return [
        summary.name,
        _digits(summary.mean, 4),
        _digits(summary.sd, 3),
        _digits(summary.mcse_mean, 2),
        f"{summary.r_hat:#.4g}",
        f"{summary.ess_bulk:.0f}",
        f"{summary.ess_tail:.0f}",
        _digits(summary.ess_per_1000_evals, 3),
        _digits(summary.ess_per_second, 3),
    ]


def _digits(value: float, num_digits: int) -> str:
    text = f"{value:.{num_digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def run_lines(idata: InferenceData) -> list[str]:
    """Say in plain text what made the chains: kernel, step size, acceptance, divergences, BFMI, cost.

    Args:
        idata: of :func:`to_inference_data`.

    Returns:
        A few lines; one that starts with ``note:`` marks an R-hat of fewer than 4 chains.
    """
    attrs, acceptance = idata["posterior"].attrs, _stat(idata, "acceptance_rate").mean(axis=1)
    num_chains, num_draws = _stat(idata, "lp").shape
    lines = [
        f"kernel {attrs['kernel']}, step size {_stat(idata, 'step_size').mean():.4g}, mean acceptance "
        f"{acceptance.mean():.3f} (chains {acceptance.min():.3f} to {acceptance.max():.3f})",
        f"divergent draws {num_divergent(idata)} of {num_chains * num_draws}, BFMI min {bfmi(idata).min():.3g}",
        f"{num_chains} chains of {num_draws} draws: {attrs['num_evals']} evaluations, {attrs['seconds']:.3g} s; "
        f"warm-up: {attrs['warmup_evals']} evaluations, {attrs['warmup_seconds']:.3g} s",
    ]
    if num_chains < MIN_CHAINS:
        lines.append(
            f"note: R-hat of {num_chains} chain{'s' * (num_chains > 1)} cannot see modes that all of them miss; "
            f"use {MIN_CHAINS} or more"
        )
    return lines


def text_table(summaries: Sequence[FunctionalSummary], idata: InferenceData) -> str:
    """Lay summaries out for a terminal.

    Args:
        summaries: of :func:`summarize`.
        idata: what they summarise; the lines below the table come from it.

    Returns:
        Aligned lines: two of header (names, units), one per functional, then :func:`run_lines`.
    """
    titles, units = (list(row) for row in zip(*TABLE_HEADER, strict=True))
    rows = [titles, units, *map(table_cells, summaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", *run_lines(idata)])
