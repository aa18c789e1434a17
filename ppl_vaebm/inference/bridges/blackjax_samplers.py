"""BlackJAX's samplers (Cabezas et al. 2024, arXiv:2402.10797) with its own adaptation, vectorised over chains.

NUTS adapts step and diagonal mass of each chain alone, as Stan does. ChEES-HMC (Hoffman, Radul and Sountsov 2021)
tunes step and trajectory over all chains together, and all of them take the same number of steps. Microcanonical
Langevin (MCLMC; Robnik, De Luca, Silverstein and Seljak 2023, arXiv:2212.08549) has no Metropolis test, so its draws
are biased by its step; the adjusted one has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges.jax_sampler import Draw, Options, Sampler, Tuned, log_density
from ppl_vaebm.inference.kernels.base import DIVERGENCE_THRESHOLD_NATS

if TYPE_CHECKING:
    from jax import Array

BlackjaxKernelName = Literal["blackjax-nuts", "blackjax-chees", "blackjax-mclmc", "blackjax-adjusted-mclmc"]

# BlackJAX's defaults. Adjusted MCLMC has none: this one is BlackJAX's example's. Unadjusted MCLMC rejects nothing.
TARGET_ACCEPTANCE = {
    "blackjax-nuts": 0.8,
    "blackjax-chees": 0.651,
    "blackjax-mclmc": 1.0,
    "blackjax-adjusted-mclmc": 0.9,
}
# Of Adam on the log of ChEES's trajectory: Hoffman, Radul and Sountsov (2021), section 4.
CHEES_LEARNING_RATE = 0.025
# Of the Halton sequence that jitters ChEES's trajectories: it repeats after 2^20 steps.
CHEES_BITS = 20
# McLachlan's integrator evaluates the gradient twice a step.
EVALS_PER_MCLMC_STEP = 2
# The searches for MCLMC's step and length have three phases; each is this part of the warm-up.
MCLMC_PHASE = 1 / 3
# The second phase estimates variances, from a third of these.
MIN_MCLMC_WARMUP = 30
# Chosen by us: noise space is white already. On 25 Gaussians, with variances of single chains from 60 steps for a
# preconditioner, some of 64 chains stayed where they were after the warm-up; without, none did (3 seeds each).
HAS_PRECONDITIONER = False


class State(NamedTuple):
    """What the next step of any of them needs."""

    keys: Array
    """Random keys, ``(C,)``."""
    chain: Any
    """BlackJAX's state of all chains."""
    tuned: Tuned


def build_blackjax(name: BlackjaxKernelName, options: Options) -> Sampler:
    """Make BlackJAX's sampler.

    Args:
        name: of the sampler.
        options: what it is told. MCLMC moves the whole position by a given length: here, and in what it reports as
            tuned, that length is divided by ``sqrt(D)``, which makes it comparable with a leapfrog step.

    Returns:
        The sampler.

    Raises:
        InputError: a warm-up of MCLMC that is too short for its phases.
    """
    if "mclmc" in name and 0 < options.num_warmup < MIN_MCLMC_WARMUP:
        raise InputError(
            f"expected 0 or at least {MIN_MCLMC_WARMUP} warm-up steps for {name}, which tunes in three phases, "
            f"found {options.num_warmup}: give it more"
        )
    builders: dict[BlackjaxKernelName, Callable[[Options], Sampler]] = {
        "blackjax-nuts": _nuts,
        "blackjax-chees": _chees,
        "blackjax-mclmc": _mclmc,
        "blackjax-adjusted-mclmc": _adjusted_mclmc,
    }
    return builders[name](options)


def _nuts(options: Options) -> Sampler:
    import blackjax
    import jax
    from jax import numpy as jnp

    kernel = blackjax.nuts.build_kernel()

    def start(phi: Any, key: Array, position: Array) -> tuple[State, Array]:
        key, warm_key = jax.random.split(key)
        if not options.num_warmup:
            chain = blackjax.nuts.init(position, log_density(phi))
            return State(key, chain, _untuned(options, position)), jnp.int32(1)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts,
            log_density(phi),
            initial_step_size=options.step_size,
            target_acceptance_rate=options.target_acceptance,
            adaptation_info_fn=lambda state, info, adapted: info.num_integration_steps,
            max_num_doublings=options.max_tree_depth,
        )
        (chain, params), num_steps = adaptation.run(warm_key, position, options.num_warmup)
        tuned = _untuned(options, position)._replace(
            step_size=params["step_size"], inverse_mass=params["inverse_mass_matrix"]
        )
        return State(key, chain, tuned), 1 + num_steps.sum()

    def step(phi: Any, state: State) -> tuple[State, Draw]:
        key, step_key = jax.random.split(state.keys)
        step_size, inverse_mass, _ = state.tuned
        chain, info = kernel(step_key, state.chain, log_density(phi), step_size, inverse_mass, options.max_tree_depth)
        return State(key, chain, state.tuned), _hamiltonian_draw(state, chain, info)

    return _over_chains(start, step)


def _chees(options: Options) -> Sampler:
    import blackjax
    import jax
    import optax
    from blackjax.mcmc import dynamic_hmc
    from jax import numpy as jnp

    class Spent(NamedTuple):  # BlackJAX returns it in a wrapper that has its fields and no other use
        num_steps: Array

    # The jitter of BlackJAX's adaptation, whose own closure belongs to the trace that it ran in.
    def draw_num_steps(index: Array, average: Array) -> Array:
        return jnp.ceil(dynamic_hmc.halton_sequence(index, CHEES_BITS) * average).astype(int)

    kernel = dynamic_hmc.build_kernel(next_random_arg_fn=lambda index: index + 1, integration_steps_fn=draw_num_steps)

    def start(phi: Any, keys: Array, position: Array) -> tuple[State, Array]:
        keys, warm_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        untuned = _untuned(options, position)
        if not options.num_warmup:
            chain = jax.vmap(lambda row: dynamic_hmc.init(row, log_density(phi), 0))(position)
            return State(keys, chain, untuned), jnp.ones(len(position), int)
        adaptation = blackjax.chees_adaptation(
            log_density(phi),
            len(position),
            target_acceptance_rate=options.target_acceptance,
            adaptation_info_fn=lambda state, info, adapted: Spent(info.num_integration_steps),
        )
        optimizer = optax.adam(CHEES_LEARNING_RATE)
        (chain, params), spent = adaptation.run(
            warm_keys[0], position, options.step_size, optimizer, options.num_warmup, max_sampling_steps=2**CHEES_BITS
        )
        step_size = jnp.full_like(untuned.step_size, params["step_size"])
        length = params["integration_steps_params"][0] * step_size
        tuned = untuned._replace(step_size=step_size, trajectory_length=length)  # the mass stays unit
        return State(keys, chain, tuned), 1 + spent.num_steps.sum(0)

    def step(phi: Any, state: State) -> tuple[State, Draw]:
        key, step_key = jax.random.split(state.keys)
        step_size, inverse_mass, length = state.tuned
        average = length / step_size
        chain, info = kernel(step_key, state.chain, log_density(phi), step_size, inverse_mass, (average,))
        return State(key, chain, state.tuned), _hamiltonian_draw(state, chain, info)

    return _over_chains(None, step)._replace(start=start)


def _mclmc(options: Options) -> Sampler:
    import blackjax
    import jax
    from blackjax.mcmc import mclmc
    from jax import numpy as jnp

    kernel = mclmc.build_kernel()

    def start(phi: Any, key: Array, position: Array) -> tuple[State, Array]:
        key, init_key, tune_key = jax.random.split(key, 3)
        chain = mclmc.init(position, log_density(phi), init_key)
        root = math.sqrt(position.size)
        if not options.num_warmup:
            return State(key, chain, _untuned(options, position)), jnp.int32(1)
        chain, params, num_steps = blackjax.mclmc_find_L_and_step_size(
            mclmc_kernel=kernel,
            num_steps=options.num_warmup,
            state=chain,
            rng_key=tune_key,
            logdensity_fn=log_density(phi),
            frac_tune1=MCLMC_PHASE,
            frac_tune2=MCLMC_PHASE,
            frac_tune3=MCLMC_PHASE,
            diagonal_preconditioning=HAS_PRECONDITIONER,
        )
        tuned = Tuned(params.step_size / root, params.inverse_mass_matrix, params.L / root)
        return State(key, chain, tuned), jnp.int32(1 + EVALS_PER_MCLMC_STEP * num_steps)

    def step(phi: Any, state: State) -> tuple[State, Draw]:
        key, step_key = jax.random.split(state.keys)
        root = math.sqrt(state.chain.position.size)
        step_size, inverse_mass, length = state.tuned
        chain, info = kernel(step_key, state.chain, log_density(phi), inverse_mass, length * root, step_size * root)
        draw = Draw(
            position=chain.position,
            potential_energy=-chain.logdensity,
            acceptance_rate=jnp.clip(jnp.exp(-info.energy_change), max=1.0) * info.nonans,
            is_divergent=~info.nonans | (info.energy_change > DIVERGENCE_THRESHOLD_NATS),
            energy=-chain.logdensity,
            num_evals=jnp.int32(EVALS_PER_MCLMC_STEP),
        )
        return State(key, chain, state.tuned), draw

    return _over_chains(start, step)._replace(is_adjusted=False)


def _adjusted_mclmc(options: Options) -> Sampler:
    import blackjax
    import jax
    from blackjax.mcmc import adjusted_mclmc_dynamic as dynamic
    from jax import numpy as jnp

    kernel = dynamic.build_kernel(integration_steps_fn=dynamic.make_random_trajectory_length_fn(True))

    def start(phi: Any, key: Array, position: Array) -> tuple[State, Array]:
        key, init_key, tune_key = jax.random.split(key, 3)
        chain = dynamic.init(position, log_density(phi), init_key)
        root = math.sqrt(position.size)
        if not options.num_warmup:
            return State(key, chain, _untuned(options, position)), jnp.int32(1)
        chain, params, num_steps = blackjax.adjusted_mclmc_find_L_and_step_size(
            mclmc_kernel=kernel,
            logdensity_fn=log_density(phi),
            num_steps=options.num_warmup,
            state=chain,
            rng_key=tune_key,
            target=options.target_acceptance,
            frac_tune1=MCLMC_PHASE,
            frac_tune2=MCLMC_PHASE,
            diagonal_preconditioning=HAS_PRECONDITIONER,
        )
        tuned = Tuned(params.step_size / root, params.inverse_mass_matrix, params.L / root)
        return State(key, chain, tuned), 1 + EVALS_PER_MCLMC_STEP * num_steps

    def step(phi: Any, state: State) -> tuple[State, Draw]:
        key, step_key = jax.random.split(state.keys)
        step_size, inverse_mass, length = state.tuned
        chain, info = kernel(
            step_key,
            state.chain,
            log_density(phi),
            step_size * math.sqrt(state.chain.position.size),
            inverse_mass_matrix=inverse_mass,
            integration_steps_params=(length / step_size,),
        )
        draw = Draw(
            position=chain.position,
            potential_energy=-chain.logdensity,
            acceptance_rate=info.acceptance_rate,
            is_divergent=info.is_divergent,
            energy=-chain.logdensity,
            num_evals=EVALS_PER_MCLMC_STEP * info.num_integration_steps,
        )
        return State(key, chain, state.tuned), draw

    return _over_chains(start, step)


def _untuned(options: Options, position: Array) -> Tuned:
    """Make the parameters without a warm-up, of one chain ``(D,)`` or of all ``(C, D)``."""
    from jax import numpy as jnp

    scalar = jnp.zeros_like(position[..., 0])
    return Tuned(scalar + options.step_size, jnp.ones_like(position), scalar + options.trajectory_length)


def _hamiltonian_draw(before: State, chain: Any, info: Any) -> Draw:
    """Read a transition of HMC or NUTS; its energy is the Hamiltonian that it starts from."""
    from jax import numpy as jnp

    kinetic = 0.5 * jnp.sum(before.tuned.inverse_mass * info.momentum**2)
    return Draw(
        position=chain.position,
        potential_energy=-chain.logdensity,
        acceptance_rate=info.acceptance_rate,
        is_divergent=info.is_divergent,
        energy=kinetic - before.chain.logdensity,
        num_evals=info.num_integration_steps,
    )


def _over_chains(start: Any, step: Callable[[Array, State], tuple[State, Draw]]) -> Sampler:
    """Make a sampler of all chains from functions of one."""
    import jax

    def tuned(state: State) -> Tuned:
        return state.tuned

    return Sampler(
        start=jax.vmap(start, in_axes=(None, 0, 0)) if start else start,
        step=jax.vmap(step, in_axes=(None, 0)),
        tuned=tuned,
    )
