"""Inception Score of logits, and AUROC of scores; everything in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.inputs import Estimate, checked


def inception_score(logits: Tensor, num_splits: int = 10) -> Estimate:
    """Compute the Inception Score, ``exp(mean KL(p(y | x), p(y)))`` (Salimans et al. 2016, arXiv:1606.03498).

    It lies between 1 and the number of classes, and is large where each sample has a clear class and all classes
    occur. It does not depend on the data. Name the result after the network that made the logits ``(n, k)``, which are
    of samples in random order. Returns mean and standard deviation, with divisor ``num_splits``, over parts that are
    scored apart, 10 by custom.

    Raises:
        InputError: fewer rows than splits, or numbers that are not finite.
    """
    logits = checked(logits, "an Inception Score", max(1, num_splits))
    log_p = logits.log_softmax(1)
    scores = []
    for part in log_p.tensor_split(num_splits):
        log_marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def auroc_estimate(inside: Tensor, outside: Tensor) -> Estimate:
    """Estimate the area under the receiver operating characteristic from scores ``(n,)`` and ``(m,)``.

    That is the probability that a point of the distribution scores higher than one from outside: 1 if the scores
    separate the two sets, 1/2 if they are independent of the set. It is Mann and Whitney's statistic, ties counting
    half, with the standard error of DeLong, DeLong and Clarke-Pearson (1988), which takes the two sets as independent
    samples. Where the scores do not overlap, that error is 0 and not informative. Minus infinity, the score of a point
    that is impossible, is allowed.

    Raises:
        InputError: fewer than two scores, or one that is NaN or plus infinity.
    """
    inside, outside = _scores(inside, "inside"), _scores(outside, "outside")
    # For each point, the fraction of the other set with a lower score.
    wins = _fraction_below(inside, outside)
    losses = 1 - _fraction_below(outside, inside)
    error = math.sqrt(float(wins.var() / len(inside) + losses.var() / len(outside)))
    return Estimate(float(wins.mean()), error)


def _scores(scores: Tensor, which: str) -> Tensor:
    is_bad = scores.isnan() | (scores == torch.inf)
    if scores.ndim != 1 or len(scores) < 2 or bool(is_bad.any()):
        raise InputError(
            f"an AUROC needs scores of shape (n,) with n >= 2, none of them NaN or plus infinity, got shape "
            f"{tuple(scores.shape)} with {int(is_bad.sum())} such scores {which} the distribution; look at the model"
        )
    return scores.double()


def _fraction_below(x: Tensor, others: Tensor) -> Tensor:
    """Return the fraction of the others below each of x, ties counting half, ``(n,)``."""
    others = others.sort().values
    below = torch.searchsorted(others, x)
    not_above = torch.searchsorted(others, x, right=True)
    return (below + not_above).double() / (2 * len(others))
