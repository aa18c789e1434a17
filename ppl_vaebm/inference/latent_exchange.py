"""Exchange of the first latent with chains of its own term: a global move for any kernel in noise space.

Behind every chain of h stands one of ``exp(-E_1(z_1)) N(eps_1; 0, I)``, the VAE with its first prior corrected, which
moves by replica exchange and decodes nothing. Every few steps of the chain the two propose to swap their noises of the
first latent. Under the product of the two densities E_1 cancels, so the swap is accepted with probability
``min(1, exp(J(eps) - J(eps')))`` for the rest ``J = E - E_1`` of the energy, and both densities are left as they are.
It is one more rung of replica exchange, on top of that latent's ladder; a chain that only walks stays in the mode of
the first latent in which it began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import adaptation
from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Partners,
    Potential,
    init_params,
    init_with_grad,
    init_without_grad,
    metropolis,
    select,
)
from ppl_vaebm.inference.latent_chains import (
    FIRST_STEP_SIZE,
    SWEEPS_PER_EXCHANGE,
    LatentPotential,
    build_latent_kernel,
    num_first,
    with_first,
)
from ppl_vaebm.inference.potential import NoisePotential

STEPS_PER_EXCHANGE = 5
"""An exchange costs about as much as a step, and most are accepted. Chosen by us."""


def with_exchange(kernel: Kernel, potential: NoisePotential) -> Kernel:
    """Let a kernel exchange the first latent with chains of its own term, every :data:`STEPS_PER_EXCHANGE` steps.

    ``init`` puts all replicas of a chain's partner at the chain's own first latent, which they forget within a few
    round trips; ``warm_up`` tunes them over as many sweeps as draws give them. :func:`with_partners` puts others there.

    Args:
        kernel: local moves on the potential.
        potential: of the VAEBM.

    Returns:
        The kernel itself for an energy without that term. Else one of which an exchange costs one evaluation more.
        Acceptance rate, energy and divergences are those of the local moves; the report of a run adds
        ``exchange_rate``, and what the partners' ladder reports, as ``first_latent_...``.
    """
    if potential.vaebm.energy.latent_net is None:
        return kernel
    size, own = num_first(potential), LatentPotential(potential.vaebm)
    latent = build_latent_kernel(own)

    def init(position: Tensor) -> KernelState:
        return with_partners(kernel.init(position), latent.init(position[:, :size]))

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        partners, partner_params = _partners(state), _partner_params(state, params)
        moved, info = kernel.step(generator, state, params)
        num_steps = partners.num_steps + 1
        if num_steps < STEPS_PER_EXCHANGE:
            return moved._replace(partners=partners._replace(num_steps=num_steps)), info
        other = partners.state
        for _ in range(SWEEPS_PER_EXCHANGE):
            other, _ = latent.step(generator, other, partner_params)
        found = exchange(generator, potential, own, moved, other)
        partners = Partners(found.other, partners.rate_sum + found.acceptance_rate, partners.num_exchanges + 1, 0)
        info = info._replace(is_accepted=info.is_accepted | found.is_accepted, num_evals=info.num_evals + 1)
        return found.state._replace(partners=partners), info

    def warm_up(
        generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
    ) -> tuple[KernelState, KernelParams, int]:
        assert latent.warm_up is not None
        other, partner_params = _partners(state).state, _partner_params(state, params)
        num_sweeps = SWEEPS_PER_EXCHANGE * num_steps // STEPS_PER_EXCHANGE
        other, partner_params, _ = latent.warm_up(generator, other, partner_params, num_sweeps)
        state, params, num_evals = adaptation.warm_up(kernel, generator, state, params, num_steps)
        return with_partners(state, other), params._replace(partners=partner_params), num_evals

    def tell(state: KernelState, params: KernelParams) -> dict[str, float | list[float]]:
        partners, own_params = _partners(state), _partner_params(state, params)
        assert latent.report is not None
        return {
            **(kernel.report(state, params) if kernel.report else {}),
            "exchange_rate": float(partners.rate_sum.mean()) / max(1, partners.num_exchanges),
            **{f"first_latent_{name}": value for name, value in latent.report(partners.state, own_params).items()},
        }

    return Kernel(kernel.name, init, step, kernel.target_acceptance, warm_up, tell)


def with_partners(state: KernelState, partners: KernelState) -> KernelState:
    """Put chains of the first latent behind others, and begin to count their exchanges.

    Args:
        state: of a kernel's chains, ``(C, D)``.
        partners: of as many chains of the first latent, from that latent's kernel.

    Returns:
        A state for the exchanging kernel.
    """
    rate_sum = torch.zeros(len(state.position), dtype=torch.float64, device=state.position.device)
    return state._replace(partners=Partners(partners, rate_sum, 0, 0))


class Exchange(NamedTuple):
    """What one exchange has led to."""

    state: KernelState
    """The chains, ``(C, D)``, with their replicas and with a gradient if they had one."""
    other: KernelState
    """Their partners, ``(C, d)``, with their replicas."""
    acceptance_rate: Tensor
    """``(C,)``, float64."""
    is_accepted: Tensor
    """``(C,)``."""


def exchange(
    generator: torch.Generator, potential: Potential, own: Potential, state: KernelState, other: KernelState
) -> Exchange:
    """Propose to every chain to swap its first latent with its partner.

    Args:
        generator: source of one uniform per chain.
        potential: Phi of the chains.
        own: the first latent's own term, Phi of the partners.
        state: the chains, ``(C, D)``.
        other: the partners, ``(C, d)``.

    Returns:
        Both afterwards. A proposal whose energy or gradient is not finite is rejected.
    """
    mine, position = state.position[:, : other.position.shape[1]], with_first(state.position, other.position)
    back, proposal = _like(other, own)(mine), _like(state, potential)(position)
    # E_1 is in both, and what is left is J.
    after, before = (
        phi.potential.double() - term.potential.double() for phi, term in ((proposal, other), (state, back))
    )
    chosen, rate, is_accepted, _ = metropolis(generator, state, proposal, after - before)
    new = select(is_accepted, back, other)
    return Exchange(chosen._replace(replicas=state.replicas), new._replace(replicas=other.replicas), rate, is_accepted)


def _partners(state: KernelState) -> Partners:
    assert state.partners is not None
    return state.partners


def _partner_params(state: KernelState, params: KernelParams) -> KernelParams:
    return params.partners or init_params(_partners(state).state.position, FIRST_STEP_SIZE)


def _like(state: KernelState, potential: Potential) -> Callable[[Tensor], KernelState]:
    """Make the ``init`` that gives states a gradient if that one has it."""
    return init_without_grad(potential) if state.grad is None else init_with_grad(potential)
