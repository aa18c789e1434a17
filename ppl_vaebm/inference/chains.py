"""Running chains: warm-up, then draws, with what a diagnostician wants of every draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_vaebm.inference.adaptation import warm_up
from ppl_vaebm.inference.base import Kernel, KernelInfo, KernelParams, KernelState, log_density_energy

Functionals = Callable[[KernelState], Mapping[str, Tensor]]
"""What to store of a state: names to tensors whose first axis is the chain."""


@dataclass(frozen=True)
class Chains:
    """Draws of several chains and their cost. ``C`` chains, ``N`` draws; nothing is averaged over chains."""

    kernel: str
    """The kernel's name."""
    draws: dict[str, Tensor]
    """Functionals of the draws, each ``(C, N, ...)``."""
    stats: dict[str, Tensor]
    """``lp``, ``acceptance_rate``, ``diverging``, ``energy``, ``n_steps``, each ``(C, N)``, named as in ArviZ."""
    position: Tensor
    """Where the chains ended, ``(C, D)``."""
    params: KernelParams
    """The parameters of the draws, after warm-up."""
    seconds: float
    """Time of the draws."""
    warmup_seconds: float = 0.0
    """Time of the warm-up."""
    warmup_evals: int = 0
    """Evaluations of the potential in the warm-up, over all chains."""
    attrs: dict[str, str | float | int] = field(default_factory=dict)
    """Whatever else identifies the chains: seed, thinning, versions."""

    @property
    def num_evals(self) -> int:
        """Evaluations of the potential behind the draws, over all chains."""
        return int(self.stats["n_steps"].sum())


def run_chains(
    kernel: Kernel,
    generator: torch.Generator,
    position: Tensor,
    params: KernelParams,
    *,
    num_draws: int,
    num_warmup: int = 0,
    thin: int = 1,
    functionals: Functionals,
    max_evals: int | None = None,
) -> Chains:
    """Warm a kernel up, freeze its parameters, and draw.

    Args:
        kernel: the transition.
        generator: source of all randomness of the chains.
        position: starts, ``(C, D)``.
        params: parameters to start the warm-up from.
        num_draws: draws to store per chain, at least 1; with ``max_evals``, the most of them.
        num_warmup: steps of dual averaging before them, not stored; 0 keeps ``params``.
        thin: steps per stored draw.
        functionals: what to store of each draw.
        max_evals: stop after the draw with which the evaluations per chain, on average over chains and warm-up not
            counted, reach this number.

    Returns:
        The chains; ``n_steps`` of a draw counts the evaluations of all its ``thin`` steps, its
        acceptance rate is their mean, and it is ``diverging`` if any of them was.
    """
    start = time.perf_counter()
    state, params, warmup_evals = warm_up(kernel, generator, kernel.init(position), params, num_warmup)
    warmup_seconds = time.perf_counter() - start

    start = time.perf_counter()
    rows: list[Mapping[str, Tensor]] = []
    stats: list[dict[str, Tensor]] = []
    num_evals = 0.0
    for _ in range(num_draws):
        infos: list[KernelInfo] = []
        for _ in range(thin):
            state, info = kernel.step(generator, state, params)
            infos.append(info)
        rows.append(functionals(state))
        stats.append(_stats(state, infos))
        num_evals += float(stats[-1]["n_steps"].double().mean())
        if max_evals is not None and num_evals >= max_evals:
            break
    seconds = time.perf_counter() - start
    return Chains(
        kernel=kernel.name,
        draws={name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]},
        stats={name: torch.stack([row[name] for row in stats], dim=1) for name in stats[0]},
        position=state.position,
        params=params,
        seconds=seconds,
        warmup_seconds=warmup_seconds,
        warmup_evals=warmup_evals,
        attrs={"thin": thin},
    )


def _stats(state: KernelState, infos: list[KernelInfo]) -> dict[str, Tensor]:
    return {
        "lp": -log_density_energy(state),
        "acceptance_rate": torch.stack([info.acceptance_rate for info in infos]).mean(0),
        "diverging": torch.stack([info.is_divergent for info in infos]).any(0),
        "energy": infos[-1].energy,
        "n_steps": torch.stack([info.num_evals for info in infos]).sum(0),
    }
