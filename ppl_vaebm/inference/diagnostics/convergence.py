"""R-hat and effective sample sizes of all coordinates at once, equal to ArviZ's.

ArviZ takes some milliseconds for each column; here blocks of columns are sorted and transformed together, which makes
150,000 coordinates practical. For a few quantities use ``summary.py``, which calls ArviZ. Rank-normalised split R-hat,
bulk and tail effective sample size are those of Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021),
doi 10.1214/20-BA1221, with ArviZ's details: Blom's offset 3/8, ranks averaged over ties, R's quantiles of type 7, and
ArviZ's truncation of Geyer's initial monotone sequence. The nested R-hat is that of Margossian, Hoffman, Sountsov,
Riou-Durand, Vehtari and Gelman (2024), doi 10.1214/24-BA1453.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft

FloatArray: TypeAlias = NDArray[np.float64]

MIN_DRAWS = 4
"""Each chain is split in two, and a variance needs two draws in each half."""
TAIL_PROBABILITIES = (0.05, 0.95)
"""Quantiles of the tail effective sample size: Vehtari et al. (2021)."""
BLOM = 3 / 8
"""Offset of the normal scores: Blom (1958), as recommended by Vehtari et al. (2021)."""
BLOCK_VALUES = 1 << 15
"""Draws of a block, over its columns; chosen by us: within 3 % of the fastest (``benchmarks/convergence.py``)."""


class Convergence(NamedTuple):
    """Diagnostics of every column; nan for one that never moves, or holds a nan."""

    r_hat: FloatArray
    """Rank-normalised split R-hat, the larger of bulk and tail, ``(D,)``."""
    ess_bulk: FloatArray
    """Independent draws that would estimate the mean as precisely, ``(D,)``."""
    ess_tail: FloatArray
    """Independent draws that would estimate the 5 % and 95 % quantiles as precisely, the smaller, ``(D,)``."""


def diagnose_columns(draws: NDArray[Any]) -> Convergence:
    """Compute the diagnostics of every column.

    Args:
        draws: ``(C, N, D)``, not empty, at least 4 draws per chain, any real dtype (computed in float64). A single
            chain is cut in two for R-hat, which then compares its quarters.

    Raises:
        ValueError: another shape, or fewer draws.
    """
    if draws.ndim != 3 or draws.shape[1] < MIN_DRAWS or not draws.size:
        raise ValueError(f"expected draws (C, N, D) with N at least {MIN_DRAWS}, got shape {draws.shape}")
    parts = [_diagnose_block(block) for block in _blocks(draws)]
    return Convergence(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _blocks(draws: NDArray[Any]) -> Iterator[FloatArray]:
    """Yield columns as ``(B, C, N)``, contiguous float64."""
    num_chains, num_draws, num_columns = draws.shape
    width = max(1, BLOCK_VALUES // (num_chains * num_draws))
    for start in range(0, num_columns, width):
        yield np.ascontiguousarray(draws[:, :, start : start + width].transpose(2, 0, 1), dtype=np.float64)


def _diagnose_block(draws: FloatArray) -> Convergence:
    num_chains, num_draws = draws.shape[1:]
    has_nan = np.isnan(draws).any(axis=(1, 2))
    never_moves = (draws == draws[:, :1, :1]).all(axis=(1, 2))
    draws = np.where(np.expand_dims(has_nan, (1, 2)), 0.0, draws)
    # Infinite draws have ranks but no moments, so some of their diagnostics are nan.
    with np.errstate(invalid="ignore", divide="ignore"):
        halves = _split(draws)
        scores, ordered = _normal_scores(halves)
        if num_chains > 1:
            r_hat = _worse_r_hat(halves, scores, ordered)
        elif num_draws >= 2 * MIN_DRAWS:
            r_hat = _rank_r_hat(draws[:, :, : num_draws // 2 * 2].reshape(len(draws), 2, -1))
        else:
            r_hat = np.full(len(draws), np.nan)
        values = r_hat, _ess(scores), _tail_ess(draws, ordered)
    is_void = has_nan | never_moves
    return Convergence(*(np.where(is_void, np.nan, value) for value in values))


def ess_of_means(draws: FloatArray) -> FloatArray:
    """Estimate the effective sample sizes ``(B,)`` of the means of draws ``(B, C, N)``, N at least 4, without ranks.

    The integrated autocorrelation time, in draws, is ``C N`` over it.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return _ess(_split(draws))


def nested_r_hat(draws: FloatArray, superchains: NDArray[np.int64]) -> float:
    """Compute R-hat between groups of chains that share a start: Margossian et al. (2024), equation 8.

    The plain R-hat of many short chains is large however well they mix, because the mean of one chain is uncertain;
    the nested one compares the means of whole groups. It is the larger of the values for normal scores and for folded
    draws, with every chain split in two, as ``rhat_nested`` of ArviZ 1.x; nan where the draws never move or hold a nan.

    Args:
        draws: of one quantity, ``(C, N)``, N at least 4.
        superchains: group of each chain, ``(C,)``; at least two groups, all of the same size.

    Raises:
        ValueError: fewer than two groups, groups of different sizes, or fewer draws.
    """
    groups, sizes = np.unique(superchains, return_counts=True)
    if draws.shape != (len(superchains), draws.shape[-1]) or draws.shape[-1] < MIN_DRAWS:
        raise ValueError(f"expected draws ({len(superchains)}, N) with N at least {MIN_DRAWS}, got {draws.shape}")
    if len(groups) < 2 or len(set(sizes.tolist())) > 1:
        raise ValueError(f"expected at least two groups of one size, got groups of {', '.join(map(str, sizes))} chains")
    if np.isnan(draws).any():
        return float("nan")
    # Both halves of a chain are adjacent, and so are those of a group.
    halves = _split(draws[np.argsort(superchains, kind="stable")][:, None])
    halves = halves.reshape(1, len(superchains) * 2, -1)
    scores, ordered = _normal_scores(halves)
    folded, _ = _normal_scores(_folded(halves, ordered))
    return float(max(_nested_ratio(part.reshape(len(groups), -1, part.shape[2])) for part in (scores, folded)))


def _nested_ratio(scores: FloatArray) -> float:
    """Compute R-hat between the groups of scores ``(groups, chains, draws)``, at least two of each."""
    means = scores.mean(axis=2)
    within = (means.var(axis=1, ddof=1) + scores.var(axis=2, ddof=1).mean(axis=1)).mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sqrt(1 + means.mean(axis=1).var(ddof=1) / within))


# --- ranks -------------------------------------------------------------------------------------------


def _split(draws: FloatArray) -> FloatArray:
    """Split ``(B, C, N)`` into ``(B, 2 C, N // 2)``; of an odd number of draws the middle one is dropped."""
    half = draws.shape[2] // 2
    return np.concatenate([draws[:, :, :half], draws[:, :, -half:]], axis=1)


def _normal_scores(draws: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Replace draws ``(B, M, n)`` by the normal quantiles of their ranks; return them and the ordered draws."""
    rows = draws.reshape(len(draws), -1)
    order = rows.argsort(axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    quantiles = _score_table(rows.shape[1])
    by_rank = np.broadcast_to(quantiles[::2], rows.shape)
    has_ties = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if has_ties.any():
        by_rank = by_rank.copy()
        by_rank[has_ties] = quantiles[_twice_mean_ranks(ordered[has_ties])]
    scores = np.empty_like(rows)
    np.put_along_axis(scores, order, by_rank, axis=1)
    return scores.reshape(draws.shape), ordered


@functools.lru_cache(maxsize=8)
def _score_table(size: int) -> FloatArray:
    """Return the score of every rank 1, 1.5, ..., ``size``."""
    ranks = 1 + np.arange(2 * size - 1) / 2
    table: FloatArray = torch.special.ndtri(torch.from_numpy((ranks - BLOM) / (size - 2 * BLOM + 1))).numpy()
    table.flags.writeable = False  # it is shared
    return table


def _twice_mean_ranks(ordered: FloatArray) -> NDArray[np.int64]:
    """Return twice the rank, from 0 on, of every element of ordered rows; equal elements share their mean rank."""
    size = ordered.shape[1]
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((len(ordered), 1), dtype=bool)
    index = np.arange(size)
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), index, 0), axis=1)
    backwards = np.where(np.hstack([differs, edge]), index, size - 1)[:, ::-1]
    ranks: NDArray[np.int64] = first + np.minimum.accumulate(backwards, axis=1)[:, ::-1]
    return ranks


def _folded(draws: FloatArray, ordered: FloatArray) -> FloatArray:
    """Return the distances from each column's median."""
    middle = ordered.shape[1] // 2  # a column of halves has an even number of draws
    median = (ordered[:, middle - 1] + ordered[:, middle]) / 2
    return np.abs(draws - median[:, None, None])


# --- R-hat -------------------------------------------------------------------------------------------


def _rank_r_hat(draws: FloatArray) -> FloatArray:
    halves = _split(draws)
    return _worse_r_hat(halves, *_normal_scores(halves))


def _worse_r_hat(halves: FloatArray, scores: FloatArray, ordered: FloatArray) -> FloatArray:
    folded = _folded(halves, ordered)
    has_nan = np.isnan(folded).any(axis=(1, 2))  # a median that is infinite
    folded_scores, _ = _normal_scores(np.where(np.expand_dims(has_nan, (1, 2)), 0.0, folded))
    tail = np.where(has_nan, np.nan, _r_hat(folded_scores))
    return np.fmax(_r_hat(scores), tail)  # the tail is nan where all draws are equally far from the median


def _r_hat(scores: FloatArray) -> FloatArray:
    num_draws = scores.shape[2]
    between = num_draws * scores.mean(axis=2).var(axis=1, ddof=1)
    within = scores.var(axis=2, ddof=1).mean(axis=1)
    value: FloatArray = np.sqrt((between / within + num_draws - 1) / num_draws)
    return value


# --- effective sample sizes --------------------------------------------------------------------------


def _tail_ess(draws: FloatArray, ordered: FloatArray) -> FloatArray:
    """Return the smaller effective sample size of the indicators of the two tails."""
    if draws.shape[2] % 2:  # the halves lack the middle draws
        ordered = np.sort(draws.reshape(len(draws), -1), axis=1)
    low, high = (
        _ess(_split((draws <= _quantile(ordered, probability)[:, None, None]).astype(np.float64)))
        for probability in TAIL_PROBABILITIES
    )
    return np.minimum(low, high)


def _quantile(ordered: FloatArray, probability: float) -> FloatArray:
    """Interpolate a quantile of ordered rows, R's type 7, in the order of operations of scipy's ``mquantiles``."""
    size = ordered.shape[1]
    place = size * probability + (1 - probability)
    below = int(np.floor(np.clip(place, 1, size - 1)))
    weight = float(np.clip(place - below, 0, 1))
    return (1 - weight) * ordered[:, below - 1] + weight * ordered[:, below]


def _ess(values: FloatArray) -> FloatArray:
    """Estimate effective sample sizes of ``(B, M, n)``: Vehtari et al. (2021), equations 10 to 14.

    A constant column, which an indicator may be, has as many as draws, as in ArviZ.
    """
    num_chains, num_draws = values.shape[1:]
    correlation = autocorrelation(values)
    pairs = correlation[:, : num_draws // 2 * 2].reshape(len(values), -1, 2)
    last = max(0, (num_draws - 3) // 2)  # the last pair that ArviZ uses
    sums = pairs[:, : last + 1].sum(axis=2)
    # The pair at which the positive sequence ends; its even member still counts once if it is positive.
    is_end = ~(sums > 0)
    is_end[:, last] = True
    end = is_end.argmax(axis=1)
    even, total = pairs[np.arange(len(pairs)), end, 0], sums[np.arange(len(sums)), end]
    remainder = np.where((even > 0) | (total >= 0), even, 0.0)
    monotone = np.minimum.accumulate(sums, axis=1)
    before = np.arange(last + 1) < end[:, None]
    time = -1 + 2 * np.where(before, monotone, 0.0).sum(axis=1) + remainder
    size = num_chains * num_draws
    time = np.maximum(time, 1 / np.log10(size))
    is_constant = np.ptp(values.reshape(len(values), -1), axis=1) < np.finfo(np.float64).resolution
    ess: FloatArray = np.where(is_constant, float(size), size / time)
    return ess


def autocorrelation(values: FloatArray) -> FloatArray:
    """Estimate the autocorrelation of ``(B, M, n)`` from all chains together, ``(B, n)``; 1 at lag 0."""
    num_chains, num_draws = values.shape[1:]
    means = values.mean(axis=2)
    length = fft.next_fast_len(2 * num_draws, real=True)
    spectrum = fft.rfft(values - means[:, :, None], n=length, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=1)
    covariance = fft.irfft(power, n=length, axis=1)[:, :num_draws] / num_draws
    within = covariance[:, :1] * num_draws / (num_draws - 1)
    total = within * (num_draws - 1) / num_draws
    if num_chains > 1:
        total += means.var(axis=1, ddof=1)[:, None]
    correlation: FloatArray = 1 - (within - covariance) / total
    correlation[:, 0] = 1.0
    return correlation
