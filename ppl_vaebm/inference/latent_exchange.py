"""Chains of the first latent under its own term of the energy, and their swaps with chains of h.

Chains of ``exp(-E_1(z_1)) N(eps_1; 0, I)`` need neither decoder nor image, and replica exchange joins its modes. Each
chain of h has one as its partner. Every few steps the two propose to swap their noises of the first latent, which is
accepted with probability ``min(1, exp(J(eps) - J(eps')))``, ``J = E - E_1``, and preserves both densities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import adaptation, tempered
from ppl_vaebm.inference.kernels.base import (
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Partners,
    Potential,
    draw_normal,
    init_params,
    init_with_grad,
    init_without_grad,
    metropolis,
    run_steps,
    select,
)
from ppl_vaebm.inference.kernels.ladder import follow_rates, start_ladder, stored_ladder
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vaebm import VAEBM

LATENT_TARGET_ACCEPTANCE = 0.75
LATENT_NUM_LEVELS = 9
"""About ``2 barrier + 1`` are best; the barrier of Fashion-MNIST's term is 3.7 to 4.6. Chosen by us."""
LATENT_STEP_SIZE = 0.5
"""Where the step size starts."""
SWEEPS_PER_SWAP = 10
"""Sweeps of the first latent's chains before each swap or restart from them, in training as in sampling. Chosen by us.
"""
STEPS_PER_SWAP = 5
"""A swap costs about as much as a step, and most are accepted. Chosen by us."""


class LatentPotential:
    """Phi of the first latent's own term, as a function of that latent's noise."""

    def __init__(self, vaebm: VAEBM) -> None:
        self.vaebm = vaebm
        self.shape = next(iter(vaebm.vae.noise_shapes.values()))

    def __call__(self, position: Tensor) -> Tensor:
        """Evaluate ``E_1(z_1(eps_1))``: ``(C, d)`` to ``(C,)``, nats relative to N(0, I)."""
        return self.vaebm.energy.latent_term(self.vaebm.vae.first_latent(position.unflatten(1, self.shape)))


def build_latent_kernel(potential: LatentPotential) -> Kernel:
    """Make the kernel of the first latent's chains: replica exchange from N(0, I) up, by steps of MALA."""
    return tempered.build(potential, num_levels=LATENT_NUM_LEVELS, target_acceptance=LATENT_TARGET_ACCEPTANCE)


def num_first(potential: NoisePotential) -> int:
    """Return the number of columns of the first latent's noise; they are the first ones."""
    return next(iter(potential.packing.sizes.values()))


def with_first(position: Tensor, first: Tensor) -> Tensor:
    """Replace the first latent's noise: ``(C, D)`` and ``(C, d)`` to ``(C, D)``."""
    return torch.cat([first, position[:, first.shape[1] :]], dim=1)


def run_first_latent(
    potential: NoisePotential,
    generator: torch.Generator,
    position: Tensor,
    num_steps: int,
    params: KernelParams | None = None,
) -> tuple[KernelState, KernelParams]:
    """Run chains of the first latent by ``num_steps`` sweeps, from its part of all noises ``(C, D)``, from N(0, I).

    Without ``params`` of an earlier run they are tuned on the first half of the sweeps.
    """
    kernel = build_latent_kernel(LatentPotential(potential.vaebm))
    state, num_warmup = kernel.init(position[:, : num_first(potential)]), 0
    if params is None:
        start, num_warmup = init_params(state.position, LATENT_STEP_SIZE), num_steps // 2
        state, params, _ = adaptation.warm_up(kernel, generator, state, start, num_warmup)
    return run_steps(kernel, generator, state, params, num_steps - num_warmup)[0], params


class LatentStore:
    """Persistent chains of the first latent for training, ``num`` from N(0, I), with a replica at each level."""

    def __init__(self, vaebm: VAEBM, generator: torch.Generator, num: int) -> None:
        self.potential = LatentPotential(vaebm)
        self.kernel = build_latent_kernel(self.potential)
        like = next(vaebm.energy.parameters())
        self.positions = draw_normal(generator, like.new_empty(num, LATENT_NUM_LEVELS, self.potential.shape.numel()))
        """``(num, LATENT_NUM_LEVELS, d)``, hottest first."""
        params = init_params(self.positions[:, -1], LATENT_STEP_SIZE)
        self.params: KernelParams = params._replace(ladder=start_ladder(LATENT_NUM_LEVELS, params, 1))

    def advance(self, generator: torch.Generator, num: int, num_sweeps: int) -> tuple[Tensor, Tensor, list[KernelInfo]]:
        """Move some of the chains by at least 2 sweeps, with a ladder that follows their acceptance and swaps.

        Returns positions at b = 1, ``(num, d)``, their slots ``(num,)``, and the reports of their sweeps.
        """
        slots = torch.randperm(len(self.positions), generator=generator, device=self.positions.device)[:num]
        start = self.positions[slots]
        state = tempered.with_replicas(self.potential, self.kernel.init(start[:, -1]), start[:, :-1])
        state, infos = run_steps(self.kernel, generator, state, self.params, num_sweeps)
        self.positions[slots] = tempered.all_positions(state)
        assert state.replicas is not None and self.params.ladder is not None
        ladder = follow_rates(self.params.ladder, state.replicas.counts, LATENT_TARGET_ACCEPTANCE)
        self.params = self.params._replace(step_size=ladder.step_sizes[-1], ladder=ladder)
        return state.position, slots, infos

    def put(self, slots: Tensor, first: Tensor) -> None:
        """Set the positions at b = 1, ``(num, d)``, of chains that swapped, by their slots ``(num,)``."""
        self.positions[slots, -1] = first

    def state(self) -> dict[str, Any]:
        """Return positions and ladder, for a checkpoint."""
        assert self.params.ladder is not None
        return {"positions": self.positions, **self.params.ladder._asdict()}

    def load(self, state: Mapping[Any, Any]) -> None:
        """Restore what :meth:`state` returned; raise InputError if it is of other chains."""
        stored = state["positions"]
        if stored.shape != self.positions.shape:
            raise InputError(
                f"expected chains of the first latent of {tuple(self.positions.shape)}, found {tuple(stored.shape)}: "
                "they are of another model or another version; start the stage again with --overwrite"
            )
        self.positions.copy_(stored)
        ladder = stored_ladder(state, like=self.positions)
        self.params = self.params._replace(step_size=ladder.step_sizes[-1], ladder=ladder)


def with_swaps(kernel: Kernel, potential: NoisePotential) -> Kernel:
    """Let a kernel swap the first latent with chains of its own term, every :data:`STEPS_PER_SWAP` steps.

    ``init`` starts a chain's partner at the chain's own first latent, :func:`with_partners` at another place. A swap
    costs one evaluation more. Acceptance rate, energy and divergences are those of the local moves; the report of a run
    adds ``exchange_rate``, and the report of the partners as ``first_latent_...``. An energy without that term gives
    the kernel itself.
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
        if num_steps < STEPS_PER_SWAP:
            return moved._replace(partners=partners._replace(num_steps=num_steps)), info
        other, _ = run_steps(latent, generator, partners.state, partner_params, SWEEPS_PER_SWAP)
        swapped = swap(generator, potential, own, moved, other)
        rate_sum = partners.rate_sum + swapped.acceptance_rate
        info = info._replace(is_accepted=info.is_accepted | swapped.is_accepted, num_evals=info.num_evals + 1)
        partners = Partners(swapped.other, rate_sum, partners.num_exchanges + 1, 0)
        return swapped.state._replace(partners=partners), info

    def warm_up(
        generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
    ) -> tuple[KernelState, KernelParams, int]:
        assert latent.warm_up is not None
        other, partner_params = _partners(state).state, _partner_params(state, params)
        num_sweeps = SWEEPS_PER_SWAP * num_steps // STEPS_PER_SWAP
        other, partner_params, _ = latent.warm_up(generator, other, partner_params, num_sweeps)
        state, params, num_evals = adaptation.warm_up(kernel, generator, state, params, num_steps)
        return with_partners(state, other), params._replace(partners=partner_params), num_evals

    def report(state: KernelState, params: KernelParams) -> dict[str, float | list[float]]:
        partners, own_params = _partners(state), _partner_params(state, params)
        assert latent.report is not None
        return {
            **(kernel.report(state, params) if kernel.report else {}),
            "exchange_rate": float(partners.rate_sum.mean()) / max(1, partners.num_exchanges),
            **{f"first_latent_{name}": value for name, value in latent.report(partners.state, own_params).items()},
        }

    return Kernel(kernel.name, init, step, kernel.target_acceptance, warm_up, report)


def with_partners(state: KernelState, partners: KernelState) -> KernelState:
    """Put chains of the first latent, ``(C, d)``, behind as many others, ``(C, D)``, and start to count their swaps."""
    rate_sum = torch.zeros(len(state.position), dtype=torch.float64, device=state.position.device)
    return state._replace(partners=Partners(partners, rate_sum, 0, 0))


class Swap(NamedTuple):
    """Result of one proposed swap for each chain."""

    state: KernelState
    """The chains, ``(C, D)``, with their replicas, and with a gradient if they had one."""
    other: KernelState
    """Their partners, ``(C, d)``, with their replicas."""
    acceptance_rate: Tensor
    """``(C,)``, float64."""
    is_accepted: Tensor
    """``(C,)``."""


def swap(
    generator: torch.Generator, potential: Potential, own: Potential, state: KernelState, other: KernelState
) -> Swap:
    """Propose to swap the first latents of chains ``(C, D)`` with their partners ``(C, d)``, on the potential ``own``.

    A proposal whose energy or gradient is not finite is rejected.
    """
    mine, position = state.position[:, : other.position.shape[1]], with_first(state.position, other.position)
    back, proposal = _init_like(other, own)(mine), _init_like(state, potential)(position)
    # The joint term before and after the swap.
    before, after = state.potential.double() - back.potential, proposal.potential.double() - other.potential
    chosen, rate, is_accepted, _ = metropolis(generator, state, proposal, after - before)
    new = select(is_accepted, back, other)
    return Swap(chosen._replace(replicas=state.replicas), new._replace(replicas=other.replicas), rate, is_accepted)


def _partners(state: KernelState) -> Partners:
    assert state.partners is not None
    return state.partners


def _partner_params(state: KernelState, params: KernelParams) -> KernelParams:
    return params.partners or init_params(_partners(state).state.position, LATENT_STEP_SIZE)


def _init_like(state: KernelState, potential: Potential) -> Callable[[Tensor], KernelState]:
    """Return the ``init`` that evaluates a gradient if a state has one."""
    return init_without_grad(potential) if state.grad is None else init_with_grad(potential)
