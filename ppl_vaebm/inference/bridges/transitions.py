"""Transitions of other libraries' samplers, and their conversion to this package's chains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.inference.kernels.base import KernelParams, KernelState
from ppl_vaebm.inference.kernels.chains import Chains

AnyArray: TypeAlias = Any
"""A torch tensor of Pyro; a JAX array while a function is traced, a numpy array after it has run."""


class Transition(NamedTuple):
    """One transition of every chain; with an axis in front, one for each draw; without a chain axis, of one chain."""

    position: AnyArray  # (C, D)
    potential_energy: AnyArray  # U at the position, (C,), nats
    acceptance_rate: AnyArray  # (C,)
    is_divergent: AnyArray  # (C,)
    energy: AnyArray
    """Hamiltonian of the transition, ``(C,)``, nats; U at its end for a sampler without one."""
    num_evals: AnyArray
    """Evaluations of Phi with gradient in each chain's own trajectory, ``(C,)``."""


class SamplerOptions(NamedTuple):
    """Options of a sampler; of JAX's, each set of them compiles its own program."""

    num_warmup: int
    """Steps of the library's own adaptation; 0 keeps ``step_size`` and unit mass."""
    step_size: float = 0.1
    """Leapfrog step, or where its adaptation starts; by default where this package's kernels start too."""
    trajectory_length: float = math.pi / 2
    """Of HMC, and of ChEES and MCLMC where they do not tune it; by default a quarter turn. Pyro's HMC takes
    ``int(trajectory_length / step_size)`` steps, at least one."""
    target_acceptance: float | None = None
    """Target of the adaptation; ``None`` for the library's default. Unadjusted MCLMC has none."""
    max_tree_depth: int = 10
    """Largest number of NUTS's doublings; the default is Stan's, and that of all three libraries."""


class Limits(NamedTuple):
    """Conditions at which the draws end, as in :func:`~ppl_vaebm.inference.kernels.chains.run_chains`."""

    num_draws: int
    """Draws per chain, at least 1; with ``max_evals``, the most of them."""
    max_evals: int | None = None
    """Evaluations per chain, without the warm-up, after which no draw begins."""
    min_seconds: float = 0.0
    """Draws continue beyond ``max_evals`` until so much time has passed, over all chains."""


def tensor(values: Any, like: Tensor) -> Tensor:
    """Copy an array, for JAX's memory is read-only, to the device of a tensor."""
    return torch.from_numpy(np.array(values)).to(like.device)


def states(draws: Transition, like: Tensor) -> list[KernelState]:
    """Return the state after each of N draws, with Phi as U less ``|q|^2 / 2`` in float64."""
    phi = draws.potential_energy.astype(np.float64) - 0.5 * np.square(draws.position, dtype=np.float64).sum(-1)
    pairs = zip(draws.position, phi, strict=True)
    return [KernelState(tensor(rows, like), tensor(values, like).to(like.dtype), None) for rows, values in pairs]


def to_chains(
    kernel: str,
    draws: Transition,
    rows: Sequence[Mapping[str, Tensor]],
    elapsed: NDArray[np.float64],
    params: KernelParams,
    like: Tensor,
    **options: Any,
) -> Chains:
    """Make chains of N draws.

    Args:
        draws: numpy arrays ``(N, C, ...)``.
        rows: scalar summaries of each draw.
        elapsed: seconds from the start of the draws to the end of each, ``(N,)``.
        params: parameters of the draws.
        like: a tensor on the device of the chains.
        options: other fields of the chains.
    """

    def column(values: NDArray[Any], dtype: type) -> Tensor:
        return tensor(values.astype(dtype), like).transpose(0, 1)

    return Chains(
        kernel=kernel,
        draws={name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]},
        stats={
            "lp": -column(draws.potential_energy, np.float64),
            "acceptance_rate": column(draws.acceptance_rate, np.float64),
            "diverging": column(draws.is_divergent, np.bool_),
            "energy": column(draws.energy, np.float64),
            "n_steps": column(draws.num_evals, np.int64),
        },
        position=tensor(draws.position[-1], like),
        params=params,
        seconds=float(elapsed[-1]),
        elapsed=torch.from_numpy(elapsed),
        **options,
    )
