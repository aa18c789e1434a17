"""Conditioning a VAEBM on what was observed of x: the posterior in noise space, for the same kernels.

The noises that the observation leaves free keep their N(0, I), so the posterior is
``exp(-Phi(eps)) N(eps; 0, I)`` with ``Phi(eps) = E(x(eps)) - log p(observation | eps)``.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from pyro.nn import PyroModule
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.inference.log_z.smc import Adaptive, Population, run_smc
from ppl_vaebm.inference.observations import (
    ExactValues,
    NoisyValues,
    Observation,
    Operator,
    check_mask,
    values_at,
    whole,
)
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vaebm import VAEBM

START_SCHEDULE = Adaptive(target_ess=0.5, num_moves=4, max_levels=200)
"""How particles are led to a posterior: half of them effective at every level, the usual choice. Posteriors of digits
take 7 to 10 levels."""
START_STEPS, START_JITTER = 5, 0.2
"""Integration steps of their HMC moves, and the relative spread of the trajectory's angle."""
PARTICLES_PER_CHAIN = 4


class ConditionalProgram(PyroModule):
    """The VAEBM with something observed, as a Pyro program: the specification of :class:`ConditionalPotential`."""

    def __init__(self, vaebm: VAEBM, observation: Observation) -> None:
        super().__init__()
        self.vaebm, self.observation = vaebm, observation

    def forward(self, num: int) -> Tensor:
        """Run the program with ``num`` rows, and return x, ``(num, *event)``."""
        return self.observation.program(self.vaebm, num)


class ConditionalPotential(NoisePotential):
    """Phi of a VAEBM given an observation, as a batched function of the noises that are left free.

    It stands wherever that of the VAEBM does; of several observations each has as many rows as the others, one
    after another. The model is in evaluation mode.

    Raises:
        InputError: an observation that does not fit the model.
    """

    def __init__(self, vaebm: VAEBM, observation: Observation) -> None:
        super().__init__(vaebm)
        observation.check(vaebm.vae)
        self.observation = observation
        self.packing = Packing(observation.noise_shapes(vaebm.vae))
        self.is_by_place = observation.num > 1
        if self.is_by_place:  # a row's place says which observation it is of, so all rows go in one pass
            self.rows_per_pass = sys.maxsize

    def _evaluate(self, position: Tensor) -> Tensor:
        """Evaluate ``E(x(eps)) - log p(observation | eps)``."""
        x, z, loss = self.observation.transport(self.vaebm.vae, self.packing.unravel(position))
        energy: Tensor = self.vaebm.energy(x, z)
        return energy + loss

    def decode(self, position: Tensor) -> Tensor:
        """Map free noise ``(C, D)`` to the x that it stands for, ``(C, *event)``, without a gradient."""
        with torch.no_grad():
            return self.observation.transport(self.vaebm.vae, self.packing.unravel(position)).x


def condition(
    vaebm: VAEBM,
    *,
    given: Tensor,
    mask: Tensor | None = None,
    noise_sd: float | None = None,
    operator: Operator | None = None,
) -> ConditionalPotential:
    """Condition a VAEBM on an observation of x.

    Without ``noise_sd`` the values of ``given`` under the mask are those of x exactly. With it, ``given`` is a
    measurement ``A x`` plus independent Normal noise, where A takes the values under the mask, or is the operator, or
    leaves x as it is. The kernels sample the result, the posterior's potential, as they do the VAEBM's own.

    Args:
        vaebm: the model, in evaluation mode.
        given: what was observed, of the shape of x or of what the operator makes of it, or several of them,
            ``(G, *shape)``: then the chains of each stand one after another.
        mask: of the shape of x, boolean, true where x is observed.
        noise_sd: standard deviation of the noise, in the units of ``given``.
        operator: what is measured of x; see :mod:`ppl_vaebm.inference.observations`.

    Raises:
        InputError: shapes that do not fit, neither a mask nor a noise, or a mask and an operator.
    """
    like = next(vaebm.parameters())
    noise_potential(vaebm)  # refuses one in training mode
    if mask is not None and operator is not None:
        raise InputError("expected a mask or an operator, found both: write an operator that reads the mask")
    if noise_sd is None and (mask is None or operator is not None):
        raise InputError(
            "expected a mask of the values that were observed exactly, or the noise-sd of the observation, found "
            "neither: give one of them"
        )
    shape = vaebm.vae.model.event_shape
    event = shape if mask is not None or operator is None else operator(like.new_zeros(1, *shape)).shape[1:]
    if given.shape[given.dim() - len(event) :] != event or given.dim() - len(event) not in (0, 1) or not given.numel():
        raise InputError(
            f"expected something observed of shape {tuple(event)}, or several of them, found {tuple(given.shape)}: "
            "give it in the shape of what is observed"
        )
    rows = given.to(like).reshape(-1, *event)
    observation: Observation
    if noise_sd is None:
        assert mask is not None
        observation = ExactValues(rows, mask)
    elif mask is not None:
        check_mask(mask, shape)
        observation = NoisyValues(rows[:, mask], noise_sd, values_at(mask))
    else:
        observation = NoisyValues(rows, noise_sd, operator or whole)
    return ConditionalPotential(vaebm, observation)


def annealed_starts(
    potential: ConditionalPotential, generator: torch.Generator, num_chains: int, *, num_particles: int | None = None
) -> tuple[Tensor, Population]:
    """Find ``num_chains`` starts for each observation: particles led to its posterior by tempering (:mod:`smc`).

    The particles end near the posterior with its modes about as heavy as they should be, which chains that descend on
    their own cannot promise; they are starts, not draws. There are ``num_particles`` of each observation, at least
    ``num_chains``, or :data:`PARTICLES_PER_CHAIN` times as many.

    Returns:
        Particles chosen at random, ``(G * num_chains, D)``, those of one observation after another; and the population
        that they come from, with its levels, its last step size and its evaluations.

    Raises:
        InputError: fewer particles than chains, no particle of an observation has a finite Phi, or the posterior is
            too far for the levels of :data:`START_SCHEDULE`.
    """
    size, num_groups = num_particles or PARTICLES_PER_CHAIN * num_chains, potential.observation.num
    if size < num_chains:
        raise InputError(f"expected at least {num_chains} particles, one for each chain, found {size}: give more")
    position = potential.draw_reference(generator, num_groups * size)
    build = partial(hmc.build, num_steps=START_STEPS, jitter=START_JITTER)
    population = run_smc(potential, generator, position, START_SCHEDULE, build=build, num_groups=num_groups)
    order = torch.rand(num_groups, size, generator=generator, device=position.device).argsort(1)[:, :num_chains]
    rows = order + size * torch.arange(num_groups, device=position.device).unsqueeze(1)
    return population.position[rows.flatten()], population
