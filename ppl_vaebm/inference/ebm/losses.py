"""Objectives of stage 2, as functions of energies: tensors in, tensors out, nats.

All have the optimum ``E = -log(p_data / p_vae)`` up to a constant, where h is the data distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def contrastive(energy_data: Tensor, energy_chains: Tensor) -> Tensor:
    """Maximum likelihood with chains of h as negatives (Hinton 2002): energies ``(n,)`` and ``(m,)`` to ``()``.

    The gradient is that of ``-log h`` where the chains are draws of h. The value is no measure of convergence.
    """
    return energy_data.mean() - energy_chains.mean()


def importance_weighted(energy_data: Tensor, energy_draws: Tensor) -> Tensor:
    """Maximum likelihood with weighted VAE samples as negatives; arguments as :func:`density_ratio`."""
    return energy_data.mean() - weighted_mean(energy_draws)


def density_ratio(energy_data: Tensor, energy_draws: Tensor) -> Tensor:
    """Logistic regression of data against VAE samples, with logit ``-E`` (Gutmann and Hyvarinen 2010).

    Takes energies ``(n,)`` and ``(m,)`` to ``()``, which is ``2 log 2`` at ``E = 0``.
    """
    return softplus(energy_data).mean() + softplus(-energy_draws).mean()


def weighted_mean(energy_draws: Tensor) -> Tensor:
    """Estimate the mean energy under h, ``()``, by self-normalised weights ``exp(-E)`` over VAE samples."""
    return (-energy_draws.detach()).softmax(0) @ energy_draws


def mean_square(energy_data: Tensor, energy_negatives: Tensor) -> Tensor:
    """Return the L2 penalty on energies (Du and Mordatch 2019), nats^2, ``()``."""
    return energy_data.square().mean() + energy_negatives.square().mean()


def largest_sd(energy_data: Tensor, energy_negatives: Tensor) -> Tensor:
    """Return the larger standard deviation of the two sets, nats, ``()``, without a gradient."""
    return torch.stack([energy_data.detach().std(), energy_negatives.detach().std()]).max()
