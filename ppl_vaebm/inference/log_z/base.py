"""Estimates of a log normalizing constant and their errors from weights or chains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError

NUM_BOOTSTRAP = 1_000
"""Resamples behind a bootstrap error, which then is known to within 1 / sqrt(2 * 1000), 2 %."""


class LogZ(NamedTuple):
    """An estimate of the log normalizing constant."""

    value: float
    """Nats."""
    error: float
    """Standard error, nats."""
    ess: float
    """Effective samples of the weights behind it."""


class ChainMean(NamedTuple):
    """The mean of a quantity over chains that know nothing of each other."""

    value: Tensor
    """Over all draws, ``(...)``."""
    error: Tensor
    """Standard error, ``(...)``."""
    ess: Tensor
    """Independent draws that would fix the mean as well, ``(...)``; nan where the quantity does not vary."""


def weights_ess(log_weights: Tensor) -> float:
    """Return the effective sample size ``(sum w)^2 / sum w^2`` of weights ``(n,)`` given by their logs."""
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def log_mean_exp(log_weights: Tensor) -> LogZ:
    """Estimate the log of a mean of independent weights, ``(n,)``, given by their logs in nats.

    The error is that of the weights' mean over that mean, by the delta method.
    """
    log_weights = log_weights.double()
    n = len(log_weights)
    value = float(log_weights.logsumexp(0)) - math.log(n)
    ratios = (log_weights - value).exp()
    return LogZ(value, float(ratios.std()) / math.sqrt(n), weights_ess(log_weights))


def bootstrap_error(log_weights: Tensor, generator: torch.Generator, num: int = NUM_BOOTSTRAP) -> float:
    """Estimate the standard error of the log of a mean of independent weights by resampling them (Efron 1979).

    Nats; nan where a weight is. Where few weights carry the mean it is larger, and more honest, than the delta
    method's.
    """
    log_weights, n = log_weights.double(), len(log_weights)
    # Every resample has the same n, so the log of it drops out. One at a time, for n may be large.
    sums = [
        log_weights[torch.randint(n, (n,), generator=generator, device=log_weights.device)].logsumexp(0)
        for _ in range(num)
    ]
    return float(torch.stack(sums).std())


def chain_mean(draws: Tensor) -> ChainMean:
    """Average draws of several chains, ``(C, N, ...)``, with the error that the spread of the chains' means gives.

    It asks for no autocorrelation time, and a chain that is stuck makes it larger and not smaller. With C chains the
    error is known to within ``1 / sqrt(2 (C - 1))``: 18 % for 16 of them. Independent draws are chains of one draw.

    Raises:
        InputError: fewer than two chains.
    """
    num_chains, num_draws = draws.shape[:2]
    if num_chains < 2:
        raise InputError(
            f"expected draws of at least 2 chains for an error to be known, found {num_chains}: run more chains"
        )
    draws = draws.double()
    error = draws.mean(1).std(0) / math.sqrt(num_chains)
    variance = draws.flatten(0, 1).var(0)
    ess = (variance / error.square()).where(error > 0, math.nan)
    return ChainMean(draws.mean((0, 1)), error, ess.clamp(max=num_chains * num_draws))
