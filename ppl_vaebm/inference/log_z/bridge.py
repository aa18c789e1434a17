"""Bridge sampling (Meng and Wong 1996): a ratio of normalizing constants from draws of both densities.

With ``l`` the unnormalised density of the target over that of the reference, the ratio r of their constants is the
fixed point of Bennett's (1976) iteration

    r = E_reference[l / (s1 l + s0 r)] / E_target[1 / (s1 l + s0 r)]

with s0 and s1 the fractions of effective draws. Among all bridges between the two it has the least error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.log_z.base import LogZ, chain_mean, weights_ess

TOLERANCE_NATS = 1e-10
MAX_ITERATIONS = 10_000


class Bridge(NamedTuple):
    """The log of a ratio of normalizing constants."""

    log_z: LogZ
    """Target over reference; its effective size is the smaller of those of both means."""
    num_iterations: int
    influence_reference: Tensor
    """What each draw of the reference adds to the error, to first order: ``(C0, N0)``, of mean zero, nats."""
    influence_target: Tensor
    """The same of each draw of the target, ``(C1, N1)``."""


def bridge(log_ratio_reference: Tensor, log_ratio_target: Tensor) -> Bridge:
    """Estimate log Z by the optimal bridge.

    Args:
        log_ratio_reference: ``log l`` at draws of the reference, ``(C0, N0)``, nats: -Phi where the reference is
            N(0, I). Independent draws are chains of one draw.
        log_ratio_target: ``log l`` at draws of the target, ``(C1, N1)``, nats.

    Returns:
        The estimate. Its error is the relative one of the two means (Fruehwirth-Schnatter 2004), each from the spread
        of its chains, so autocorrelation counts; the fractions s0 and s1 count effective draws too. Where the two
        densities hardly overlap it is too small, and the effective size says so.

    Raises:
        InputError: a number that is not finite, or fewer than two chains of either.
    """
    reference, target = log_ratio_reference.double(), log_ratio_target.double()
    num_bad = int((~reference.isfinite()).sum() + (~target.isfinite()).sum())
    if num_bad:
        raise InputError(
            f"expected finite energies of the draws to bridge, found {num_bad} that are not: look for divergent chains"
        )
    effective = [_effective(log_ratio) for log_ratio in (reference, target)]
    log_s0, log_s1 = (math.log(n / sum(effective)) for n in effective)
    value, num_iterations = _fixed_point(reference.flatten(), target.flatten(), log_s0, log_s1)
    log_f0 = reference - torch.logaddexp(log_s1 + reference, torch.full_like(reference, log_s0 + value))
    log_f1 = -torch.logaddexp(log_s1 + target, torch.full_like(target, log_s0 + value))
    parts = [_relative(log_f) for log_f in (log_f0, log_f1)]
    errors = [float(chain_mean(part).error) for part in parts]
    sizes = [_size(log_f, part) for log_f, part in zip((log_f0, log_f1), parts, strict=True)]
    return Bridge(LogZ(value, math.hypot(*errors), min(sizes)), num_iterations, parts[0], -parts[1])


def _effective(draws: Tensor) -> float:
    """Count the effective draws of a quantity; all of them where it does not vary."""
    ess = float(chain_mean(draws).ess)
    return float(draws.numel()) if math.isnan(ess) else max(ess, 1.0)


def _fixed_point(reference: Tensor, target: Tensor, log_s0: float, log_s1: float) -> tuple[float, int]:
    value = 0.5 * float(reference.mean() + target.mean())
    for iteration in range(1, MAX_ITERATIONS + 1):
        old, at = value, log_s0 + value
        numerator = (reference - torch.logaddexp(log_s1 + reference, torch.full_like(reference, at))).logsumexp(0)
        denominator = (-torch.logaddexp(log_s1 + target, torch.full_like(target, at))).logsumexp(0)
        value = float(numerator - denominator) - math.log(len(reference) / len(target))
        if abs(value - old) < TOLERANCE_NATS:
            return value, iteration
    raise InputError(
        f"expected the bridge to settle within {MAX_ITERATIONS} iterations, found it still moving by "
        f"{abs(value - old):.2g} nats: the two densities hardly overlap, so bridge over levels between them"
    )


def _relative(log_f: Tensor) -> Tensor:
    """Each draw's deviation from the mean of f, over that mean, ``(C, N)``."""
    log_mean = log_f.flatten().logsumexp(0) - math.log(log_f.numel())
    return (log_f - log_mean).exp() - 1


def _size(log_f: Tensor, relative: Tensor) -> float:
    """Effective draws behind a mean of positive numbers: those of their weights, shared among correlated draws."""
    return weights_ess(log_f.flatten()) * _effective(relative) / log_f.numel()
