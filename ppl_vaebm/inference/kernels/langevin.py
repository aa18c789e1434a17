"""Langevin dynamics: the paper's unadjusted Euler step, and its Metropolis-adjusted form.

One step size h serves both: the paper's ``q - (eta/2) grad U + sqrt(eta) n`` is one leapfrog step with
``h = sqrt(eta)`` and momentum n, so MALA(h) is HMC(h) with one step, and the unadjusted kernel is the
same proposal, always taken.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    acceptance,
    draw_normal,
    hamiltonian,
    init_with_grad,
    select,
    with_grad,
)
from ppl_vaebm.inference.kernels.integrators import Integrator, follow, make_flow

# Roberts and Rosenthal 1998: 0.574 is optimal for MALA as the dimension grows; splitting tolerates more.
MALA_TARGET_ACCEPTANCE = 0.65


def build_langevin(potential: Potential, *, name: str = "langevin") -> Kernel:
    """Make the unadjusted kernel: the paper's Euler step (Xiao et al. 2021, equation 8), always taken.

    It is biased at every step size: on N(0, 1) its stationary variance is ``1 / (1 - h^2/4)``. One evaluation with
    gradient per step; ``acceptance_rate`` is the Metropolis probability that the step would have had. A proposal that
    is not finite is not taken, and flagged divergent.
    """

    def move(
        generator: torch.Generator, state: KernelState, params: KernelParams, evaluates_end: bool
    ) -> tuple[KernelState, KernelInfo]:
        state, fill_evals = with_grad(potential, state)
        momentum = draw_normal(generator, state.position)
        step_sizes = params.step_size * params.inverse_mass.sqrt()
        flow = make_flow("leapfrog", step_sizes)
        end, _, change = follow(potential if evaluates_end else _nowhere, state, momentum, step_sizes, 1, flow)
        rate, is_divergent = acceptance(end, change)
        is_finite = change.isfinite()
        if not evaluates_end:
            end, is_finite = end._replace(grad=None), end.position.sum(-1).isfinite()
            rate, is_divergent = torch.full_like(rate, math.nan), ~is_finite
        energy = hamiltonian(state, momentum)
        num_evals = torch.full_like(is_finite, int(evaluates_end) + fill_evals, dtype=torch.int64)
        return select(is_finite, end, state), KernelInfo(rate, is_finite, is_divergent, energy, num_evals)

    step, last_step = partial(move, evaluates_end=True), partial(move, evaluates_end=False)
    return Kernel(name, init_with_grad(potential), step, None, last_step=last_step)


def _nowhere(position: Tensor) -> Tensor:
    """Phi that was not evaluated."""
    return position.new_full((len(position),), math.nan)


def build_mala(
    potential: Potential,
    *,
    integrator: Integrator = "splitting",
    target_acceptance: float = MALA_TARGET_ACCEPTANCE,
    name: str = "mala",
) -> Kernel:
    """Make the Metropolis-adjusted kernel: HMC with one step, one evaluation with gradient.

    ``splitting`` is infinity-MALA (Cotter, Roberts, Stuart and White 2013), ``leapfrog`` plain MALA.
    """
    return hmc.build(potential, integrator=integrator, num_steps=1, target_acceptance=target_acceptance, name=name)
