"""The path from N(0, I) to the target: ``exp(-b Phi(q)) N(q; 0, I)`` for b from 0 to 1, and moves at one b.

Kernels are built for ``b * Phi``. Between moves the states hold Phi and its gradient themselves, so that a change of b
costs no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import gradient_free, hmc
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelState, Ladder, Potential, init_params, select
from ppl_vaebm.inference.kernels.cycle import build_mixture

BuildKernel = Callable[[Potential], Kernel]
"""Makes the kernel of one temperature from its ``b * Phi``; one that leaves its target invariant, so not langevin."""

NUM_STEPS = 3
"""Integration steps of the default kernel's trajectories. Chosen by us: with HMC alone, at 600 evaluations on 25
Gaussians, the mean log weight was 1.3, 0.18 and 0.21 nats below log Z with 1, 3 and 5 of them."""


def default_kernel(potential: Potential) -> Kernel:
    """Make a cycle of independence Metropolis and HMC by splitting.

    The first crosses between modes as long as N(0, I) still reaches them, the second moves on within one. At 300
    evaluations the mean log weight fell short of log Z by 0.04 nats on 25 Gaussians where HMC alone fell short by 0.19;
    on digits the two did not differ beyond their errors (``benchmarks/log_z.py``).
    """
    members = [gradient_free.build_independence(potential), hmc.build(potential, num_steps=NUM_STEPS)]
    return build_mixture(members)


class _TemperedPotential:
    """``b * Phi``, with as many rows a pass as Phi."""

    def __init__(self, potential: Potential, inverse_temperature: float) -> None:
        self.potential, self.inverse_temperature = potential, inverse_temperature
        self.rows_per_pass: int | None = getattr(potential, "rows_per_pass", None)
        self.is_by_place: bool = getattr(potential, "is_by_place", False)

    def __call__(self, position: Tensor) -> Tensor:
        return self.inverse_temperature * self.potential(position)


def _scaled(state: KernelState, factor: float) -> KernelState:
    """Turn a state of Phi into the one of ``factor * Phi``."""
    grad = None if state.grad is None else factor * state.grad
    return KernelState(state.position, factor * state.potential, grad)


def move(
    potential: Potential,
    build: BuildKernel,
    generator: torch.Generator,
    state: KernelState,
    inverse_temperature: float,
    step_size: float,
) -> tuple[KernelState, KernelInfo]:
    """Move every particle once at b in (0, 1], by the angle ``step_size``; both states hold Phi, not ``b * Phi``."""
    kernel = build(_TemperedPotential(potential, inverse_temperature))
    params = init_params(state.position, step_size)
    new, info = kernel.step(generator, _scaled(state, inverse_temperature), params)
    # A particle that stayed keeps its numbers: scaled there and back they would be rounded anew at every temperature.
    return select(info.is_accepted, _scaled(new, 1 / inverse_temperature), state), info


def check_ladder(ladder: Ladder) -> None:
    """Raise InputError for a ladder that does not lead from N(0, I) to the target."""
    levels, steps = ladder
    listed = ", ".join(f"{level:g}" for level in levels.tolist()[:8]) + (", ..." if len(levels) > 8 else "")
    if len(levels) < 2 or float(levels[0]) != 0 or float(levels[-1]) != 1 or not bool((levels.diff() > 0).all()):
        raise InputError(f"expected inverse temperatures that increase from 0 to 1, found {listed}: give such a ladder")
    if steps.shape != levels.shape or not bool((steps > 0).all()):
        raise InputError(
            f"expected a positive step size for each of {len(levels)} inverse temperatures, found "
            f"{int((steps > 0).sum())} positive ones of {len(steps)}: give one for each"
        )


def check_particles(position: Tensor) -> None:
    """Raise InputError for fewer than two particles."""
    if position.dim() != 2 or len(position) < 2:
        found = len(position) if position.dim() == 2 else f"a tensor of shape {tuple(position.shape)}"
        raise InputError(
            f"expected positions of at least 2 particles for an error to be known, found {found}: give more particles"
        )


def resample(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Choose particles in proportion to their weights by systematic resampling (Carpenter, Clifford, Fearnhead 1999).

    Of log weights ``(N,)``, finite or minus infinity, particle i occurs ``floor(N W_i)`` times or once more.
    """
    n = len(log_weights)
    cumulative = log_weights.double().softmax(0).cumsum(0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device=log_weights.device)
    points = (torch.arange(n, dtype=torch.float64, device=log_weights.device) + uniform) / n
    # The last one may be 1 - 1e-16, and a point behind it would have no particle.
    return torch.searchsorted(cumulative / cumulative[-1], points, right=True).clamp(max=n - 1)


def take(state: KernelState, index: Tensor) -> KernelState:
    """Return the particles with these indices."""
    grad = None if state.grad is None else state.grad[index]
    return KernelState(state.position[index], state.potential[index], grad)
