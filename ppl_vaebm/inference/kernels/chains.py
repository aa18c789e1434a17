"""Running chains: warm-up, then draws, with what a diagnostician wants of every draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.adaptation import acceptance_note, warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelParams, KernelState, log_density_energy

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
    """Time of the draws, over all chains."""
    elapsed: Tensor | None = None
    """Seconds from the start of the draws to the end of each, ``(N,)``, over all chains; ``None`` if not known."""
    warmup_seconds: float = 0.0
    """Time of the warm-up."""
    warmup_evals: int = 0
    """Evaluations of the potential in the warm-up, over all chains."""
    attrs: dict[str, str | float | int | list[float]] = field(default_factory=dict)
    """Whatever else identifies the chains, and what the kernel reports of the whole run: seed, thinning, swap rates."""

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
    min_seconds: float = 0.0,
) -> Chains:
    """Warm a kernel up, freeze its parameters, and draw.

    Args:
        kernel: the transition.
        generator: source of all randomness of the chains.
        position: starts, ``(C, D)``.
        params: parameters to start the warm-up from.
        num_draws: draws to store per chain, at least 1; with ``max_evals``, the most of them.
        num_warmup: steps of warm-up before them, not stored; 0 keeps ``params``.
        thin: steps per stored draw.
        functionals: what to store of each draw.
        max_evals: stop after the draw at which the mean evaluations per chain, without warm-up, reach this number.
        min_seconds: draws continue beyond ``max_evals`` until so much time has passed; ``num_draws`` bounds both.

    Returns:
        The chains. ``n_steps`` of a draw counts the evaluations of all its ``thin`` steps, its acceptance rate is their
        mean, and it is ``diverging`` if any of them was. ``attrs`` has the kernel's report and a ``note`` where chains
        hardly accept.
    """
    start = time.perf_counter()
    state, params, warmup_evals = warm_up(kernel, generator, kernel.init(position), params, num_warmup)
    warmup_seconds = time.perf_counter() - start

    start = time.perf_counter()
    rows: list[Mapping[str, Tensor]] = []
    stats: list[dict[str, Tensor]] = []
    elapsed: list[float] = []
    num_evals = 0.0
    for _ in range(num_draws):
        infos: list[KernelInfo] = []
        for _ in range(thin):
            state, info = kernel.step(generator, state, params)
            infos.append(info)
        rows.append(functionals(state))
        stats.append(_stats(state, infos))
        num_evals += float(stats[-1]["n_steps"].double().mean())
        elapsed.append(time.perf_counter() - start)
        if max_evals is not None and num_evals >= max_evals and elapsed[-1] >= min_seconds:
            break
    columns = {name: torch.stack([row[name] for row in stats], dim=1) for name in stats[0]}
    note = acceptance_note(kernel, columns["acceptance_rate"])
    return Chains(
        kernel=kernel.name,
        draws={name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]},
        stats=columns,
        position=state.position,
        params=params,
        seconds=elapsed[-1],
        elapsed=torch.tensor(elapsed, dtype=torch.float64),
        warmup_seconds=warmup_seconds,
        warmup_evals=warmup_evals,
        attrs={
            "thin": thin,
            **(kernel.report(state, params) if kernel.report else {}),
            **({"note": note} if note else {}),
        },
    )


def _stats(state: KernelState, infos: list[KernelInfo]) -> dict[str, Tensor]:
    return {
        "lp": -log_density_energy(state),
        "acceptance_rate": torch.stack([info.acceptance_rate for info in infos]).mean(0),
        "diverging": torch.stack([info.is_divergent for info in infos]).any(0),
        "energy": infos[-1].energy,
        "n_steps": torch.stack([info.num_evals for info in infos]).sum(0),
    }
