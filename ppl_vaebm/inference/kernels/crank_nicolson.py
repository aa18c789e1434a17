"""Preconditioned Crank-Nicolson: gradient-free moves that keep N(0, I) by construction.

``q' = q cos h + n sin h`` leaves N(0, I) invariant at every angle h, so the Metropolis ratio holds Phi
alone (Cotter, Roberts, Stuart and White 2013, "MCMC methods for functions"). At its full step, a quarter
turn, it forgets q: independence Metropolis with the VAE itself as proposal.
"""

from __future__ import annotations

import math

import torch

from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    init_without_grad,
    log_density_energy,
    metropolis,
    value_only,
)
from ppl_vaebm.inference.kernels.hmc import draw_normal

FULL_STEP = math.pi / 2
# Near the 0.234 of random-walk Metropolis (Roberts, Gelman and Gilks 1997), which pCN is on the scale of Phi.
TARGET_ACCEPTANCE = 0.25


def build_pcn(
    potential: Potential,
    *,
    step_size: float | None = None,
    target_acceptance: float = TARGET_ACCEPTANCE,
    name: str = "pcn",
) -> Kernel:
    """Make a Crank-Nicolson kernel.

    Args:
        potential: Phi, relative to N(0, I).
        step_size: a fixed angle in (0, pi/2]; ``None`` takes the parameters' step, which warm-up tunes.
        target_acceptance: what warm-up tunes the step to, where it is not fixed.
        name: the kernel's name.

    Returns:
        The kernel, one evaluation without gradient per step.

    Raises:
        ValueError: a step outside (0, pi/2].
    """
    if step_size is not None and not 0 < step_size <= FULL_STEP:
        raise ValueError(f"the angle of a Crank-Nicolson step must be in (0, pi/2], got {step_size}")

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        noise = draw_normal(generator, state.position)
        if step_size == FULL_STEP:
            position = noise  # exactly, where cos(pi/2) would leave 6e-17 of the old position
        else:
            angles = params.inverse_mass.sqrt() * (params.step_size if step_size is None else step_size)
            position = state.position * angles.cos() + noise * angles.sin()
        proposal = KernelState(position, value_only(potential, position), None)
        energy_change = proposal.potential.double() - state.potential.double()
        new, rate, is_accepted, is_divergent = metropolis(generator, state, proposal, energy_change)
        num_evals = torch.ones_like(is_accepted, dtype=torch.int64)
        return new, KernelInfo(rate, is_accepted, is_divergent, log_density_energy(new), num_evals)

    return Kernel(name, init_without_grad(potential), step, target_acceptance if step_size is None else None)


def build_independence(potential: Potential, *, name: str = "independence") -> Kernel:
    """Make the kernel that proposes a fresh draw of the VAE: Crank-Nicolson at its full step.

    Args:
        potential: Phi, relative to N(0, I).
        name: the kernel's name.

    Returns:
        The kernel, one evaluation without gradient per step, nothing to tune.
    """
    return build_pcn(potential, step_size=FULL_STEP, name=name)
