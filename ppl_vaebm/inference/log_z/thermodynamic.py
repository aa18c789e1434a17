"""Thermodynamic integration: ``log Z = -int_0^1 E_b[Phi] db`` from chains at every level of a ladder.

``d E_b[Phi] / db = -Var_b(Phi)``, so both ends of every interval have a slope as well, and the trapezoids are corrected
by it: ``h (f_0 + f_1) / 2 + h^2 (f'_0 - f'_1) / 12``, the integral of the cubic through both values and slopes (Friel,
Hurn and Wyse 2014, doi 10.1007/s11222-013-9397-1, and Oates, Papamarkou and Girolami 2016). The third cumulant is the
second derivative; what the quintic that meets it too would add stands for the error of the cubic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.log_z.base import LogZ, chain_mean
from ppl_vaebm.inference.log_z.bridge import bridge


class Integral(NamedTuple):
    """log Z by thermodynamic integration."""

    log_z: LogZ
    """Its error is that of the chains only; its effective size the smallest of E_b[Phi] over the levels."""
    discretisation: float
    """Sum over intervals of what the next order would change, nats, each taken as positive."""
    mean_energy: Tensor
    """E_b[Phi] at every level, ``(K + 1,)``, nats."""
    mean_energy_error: Tensor
    """Its Monte Carlo standard error, ``(K + 1,)``."""


def integrate(inverse_temperatures: Tensor, energy: Tensor) -> Integral:
    """Integrate the mean energy over the levels of a ladder.

    Args:
        inverse_temperatures: b, increasing from 0 to 1, ``(K + 1,)``.
        energy: Phi, not multiplied by b, of the draws at every level: ``(C, N, K + 1)``, nats; levels may depend on
            each other, as those of replica exchange do, but chains may not.

    Returns:
        The integral. Every draw's part in it, to first order in the means and variances, is averaged as one number
        per chain, so correlations in time and between levels are in the error.

    Raises:
        InputError: levels that do not increase from 0 to 1 or do not fit the draws, or fewer than two chains.
    """
    levels = inverse_temperatures.double()
    _check(levels, energy)
    mean = chain_mean(energy)
    deviation = energy.double() - mean.value
    variance, third = deviation.square().mean((0, 1)), deviation.pow(3).mean((0, 1))
    widths = levels.diff()
    of_mean, of_variance = _node_weights(widths)
    value = -float(of_mean @ mean.value + of_variance @ variance)
    influence = chain_mean(deviation @ of_mean + deviation.square() @ of_variance)
    return Integral(
        LogZ(value, float(influence.error), float(mean.ess.nan_to_num(torch.inf).min())),
        float(_next_order(widths, variance, third).abs().sum()),
        mean.value,
        mean.error,
    )


def ladder_bridge(inverse_temperatures: Tensor, energy: Tensor) -> LogZ:
    """Add up the bridges between neighbours of a ladder (Bennett 1976), which no discretisation error spoils.

    Arguments and errors as in :func:`integrate`. The chains' spread gives the error, correlations between levels
    included; the effective size is the smallest of those behind the bridges.
    """
    levels = inverse_temperatures.double()
    _check(levels, energy)
    energy = energy.double()
    value, influence, ess = 0.0, torch.zeros_like(energy[:, :, 0]), torch.inf
    for index, rise in enumerate(levels.diff()):
        between = bridge(-rise * energy[:, :, index], -rise * energy[:, :, index + 1])
        value += between.log_z.value
        influence = influence + between.influence_reference + between.influence_target
        ess = min(ess, between.log_z.ess)
    return LogZ(value, float(chain_mean(influence).error), ess)


def _check(levels: Tensor, energy: Tensor) -> None:
    rises = len(levels) >= 2 and float(levels[0]) == 0 and float(levels[-1]) == 1 and bool((levels.diff() > 0).all())
    if not rises or energy.dim() != 3 or energy.shape[2] != len(levels):
        raise InputError(
            "expected inverse temperatures that increase from 0 to 1 and energies (chains, draws, levels), found "
            f"{levels.tolist()} and energies of shape {tuple(energy.shape)}: give draws at every level of a ladder"
        )


def _node_weights(widths: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the means and of the variances at the nodes in the integral, each ``(K + 1,)``."""
    zero = widths.new_zeros(1)
    left, right = torch.cat([zero, widths]), torch.cat([widths, zero])
    # The slope is minus the variance: an interval gives h^2 / 12 times (variance at its end - variance at its start).
    return 0.5 * (left + right), (left.square() - right.square()) / 12


def _next_order(widths: Tensor, variance: Tensor, third: Tensor) -> Tensor:
    """What the quintic through two derivatives adds to the cubic's integral over every interval, ``(K,)``."""
    slopes = (variance[1:] - variance[:-1]) * widths.square()
    return slopes * (1 / 10 - 1 / 12) + (third[1:] + third[:-1]) * widths.pow(3) / 120
