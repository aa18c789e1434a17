"""BlackJAX's samplers (Cabezas et al. 2024, arXiv:2402.10797) with its own adaptation, vectorized over chains.

NUTS adapts step and diagonal mass of each chain alone, as Stan does. ChEES-HMC (Hoffman, Radul and Sountsov 2021)
tunes step and trajectory over all chains together, and all of them take the same number of steps. Microcanonical
Langevin (MCLMC; Robnik, De Luca, Silverstein and Seljak 2023, arXiv:2212.08549) has no Metropolis test, so the bias of
its draws depends on its step; the adjusted version has one.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges.jax_sampler import JaxSampler, Tuned, log_density
from ppl_vaebm.inference.bridges.transitions import SamplerOptions, Transition
from ppl_vaebm.inference.kernels.base import DIVERGENCE_THRESHOLD_NATS

if TYPE_CHECKING:
    from jax import Array

BlackjaxKernelName = Literal["blackjax-nuts", "blackjax-chees", "blackjax-mclmc", "blackjax-adjusted-mclmc"]

# BlackJAX's defaults; for adjusted MCLMC, which has none, that of BlackJAX's example. Unadjusted MCLMC has no rate.
BLACKJAX_TARGET_ACCEPTANCE = {
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
# Fraction of the warm-up in each of the three phases of the search for MCLMC's step and length.
MCLMC_PHASE = 1 / 3
# The second phase estimates variances, from a third of these.
MIN_MCLMC_WARMUP = 30
# Chosen by us: noise space is white already. On 25 Gaussians, with a preconditioner from the variances of single chains
# over 60 steps, some of 64 chains stood still after the warm-up; without one, none did (3 seeds each).
HAS_PRECONDITIONER = False

_TUNED = operator.attrgetter("tuned")


class BlackjaxState(NamedTuple):
    """State of all chains between two steps."""

    keys: Array
    """Random keys, ``(C,)``."""
    chain: Any
    """BlackJAX's state."""
    tuned: Tuned


def build_blackjax(name: BlackjaxKernelName, options: SamplerOptions) -> JaxSampler:
    """Make one of BlackJAX's samplers.

    MCLMC's step and trajectory are lengths of the move of the whole position. Here, and in the tuned parameters, they
    are divided by ``sqrt(D)``, which makes them comparable with a leapfrog step.

    Raises:
        InputError: a warm-up of MCLMC that is too short for its phases.
    """
    if "mclmc" in name and 0 < options.num_warmup < MIN_MCLMC_WARMUP:
        raise InputError(
            f"expected 0 or at least {MIN_MCLMC_WARMUP} warm-up steps for {name}, which tunes in three phases, "
            f"found {options.num_warmup}: give it more"
        )
    builders: dict[BlackjaxKernelName, Callable[[SamplerOptions], JaxSampler]] = {
        "blackjax-nuts": _nuts,
        "blackjax-chees": _chees,
        "blackjax-mclmc": _mclmc,
        "blackjax-adjusted-mclmc": _adjusted_mclmc,
    }
    return builders[name](options)


def _nuts(options: SamplerOptions) -> JaxSampler:
    import blackjax
    import jax
    from jax import numpy as jnp

    kernel = blackjax.nuts.build_kernel()

    def start(phi: Any, key: Array, position: Array) -> tuple[BlackjaxState, Array]:
        key, warm_key = jax.random.split(key)
        untuned = _untuned(options, position)
        if not options.num_warmup:
            return BlackjaxState(key, blackjax.nuts.init(position, log_density(phi)), untuned), jnp.int32(1)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts,
            log_density(phi),
            initial_step_size=options.step_size,
            target_acceptance_rate=options.target_acceptance,
            adaptation_info_fn=lambda state, info, adapted: info.num_integration_steps,
            max_num_doublings=options.max_tree_depth,
        )
        (chain, params), num_steps = adaptation.run(warm_key, position, options.num_warmup)
        tuned = untuned._replace(step_size=params["step_size"], inverse_mass=params["inverse_mass_matrix"])
        return BlackjaxState(key, chain, tuned), 1 + num_steps.sum()

    def move(phi: Any, key: Array, chain: Any, tuned: Tuned) -> tuple[Any, Transition]:
        step_size, inverse_mass, _ = tuned
        moved, info = kernel(key, chain, log_density(phi), step_size, inverse_mass, options.max_tree_depth)
        return moved, _hamiltonian_draw(chain, tuned, moved, info)

    return JaxSampler(jax.vmap(start, in_axes=(None, 0, 0)), _step(move), _TUNED)


def _chees(options: SamplerOptions) -> JaxSampler:
    import blackjax
    import jax
    import optax
    from blackjax.mcmc import dynamic_hmc
    from jax import numpy as jnp

    class StepCount(NamedTuple):  # BlackJAX returns it in a wrapper that reads its fields
        num_steps: Array

    # The jitter of BlackJAX's adaptation, whose own closure belongs to the trace that it ran in.
    def draw_num_steps(index: Array, average: Array) -> Array:
        return jnp.ceil(dynamic_hmc.halton_sequence(index, CHEES_BITS) * average).astype(int)

    kernel = dynamic_hmc.build_kernel(next_random_arg_fn=lambda index: index + 1, integration_steps_fn=draw_num_steps)

    def start(phi: Any, keys: Array, position: Array) -> tuple[BlackjaxState, Array]:
        keys, warm_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        untuned = _untuned(options, position)
        if not options.num_warmup:
            chain = jax.vmap(lambda row: dynamic_hmc.init(row, log_density(phi), 0))(position)
            return BlackjaxState(keys, chain, untuned), jnp.ones(len(position), int)
        adaptation = blackjax.chees_adaptation(
            log_density(phi),
            len(position),
            target_acceptance_rate=options.target_acceptance,
            adaptation_info_fn=lambda state, info, adapted: StepCount(info.num_integration_steps),
        )
        optimizer = optax.adam(CHEES_LEARNING_RATE)
        (chain, params), counts = adaptation.run(
            warm_keys[0], position, options.step_size, optimizer, options.num_warmup, max_sampling_steps=2**CHEES_BITS
        )
        step_size = jnp.full_like(untuned.step_size, params["step_size"])
        length = params["integration_steps_params"][0] * step_size
        tuned = untuned._replace(step_size=step_size, trajectory_length=length)  # the mass stays unit
        return BlackjaxState(keys, chain, tuned), 1 + counts.num_steps.sum(0)

    def move(phi: Any, key: Array, chain: Any, tuned: Tuned) -> tuple[Any, Transition]:
        step_size, inverse_mass, length = tuned
        moved, info = kernel(key, chain, log_density(phi), step_size, inverse_mass, (length / step_size,))
        return moved, _hamiltonian_draw(chain, tuned, moved, info)

    return JaxSampler(start, _step(move), _TUNED)


def _mclmc(options: SamplerOptions) -> JaxSampler:
    import blackjax
    from blackjax.mcmc import mclmc
    from jax import numpy as jnp

    kernel = mclmc.build_kernel()

    tune = functools.partial(blackjax.mclmc_find_L_and_step_size, mclmc_kernel=kernel, frac_tune3=MCLMC_PHASE)

    def move(phi: Any, key: Array, chain: Any, tuned: Tuned) -> tuple[Any, Transition]:
        root = math.sqrt(chain.position.size)
        step_size, inverse_mass, length = tuned
        moved, info = kernel(key, chain, log_density(phi), inverse_mass, length * root, step_size * root)
        rate = jnp.clip(jnp.exp(-info.energy_change), max=1.0) * info.nonans
        is_divergent = ~info.nonans | (info.energy_change > DIVERGENCE_THRESHOLD_NATS)
        return moved, _transition(moved, rate, is_divergent, -moved.logdensity, jnp.int32(EVALS_PER_MCLMC_STEP))

    return JaxSampler(_mclmc_start(options, mclmc.init, tune), _step(move), _TUNED, is_adjusted=False)


def _adjusted_mclmc(options: SamplerOptions) -> JaxSampler:
    import blackjax
    from blackjax.mcmc import adjusted_mclmc_dynamic as dynamic

    kernel = dynamic.build_kernel(integration_steps_fn=dynamic.make_random_trajectory_length_fn(True))

    tune = functools.partial(
        blackjax.adjusted_mclmc_find_L_and_step_size, mclmc_kernel=kernel, target=options.target_acceptance
    )

    def move(phi: Any, key: Array, chain: Any, tuned: Tuned) -> tuple[Any, Transition]:
        step_size, inverse_mass, length = tuned
        moved, info = kernel(
            key,
            chain,
            log_density(phi),
            step_size * math.sqrt(chain.position.size),
            inverse_mass_matrix=inverse_mass,
            integration_steps_params=(length / step_size,),
        )
        num_evals = EVALS_PER_MCLMC_STEP * info.num_integration_steps
        return moved, _transition(moved, info.acceptance_rate, info.is_divergent, -moved.logdensity, num_evals)

    return JaxSampler(_mclmc_start(options, dynamic.init, tune), _step(move), _TUNED)


def _mclmc_start(options: SamplerOptions, init: Callable[..., Any], tune: Callable[..., Any]) -> Callable[..., Any]:
    """Make the start of MCLMC, adjusted or not: initialize every chain and tune it alone."""
    import jax
    from jax import numpy as jnp

    def start(phi: Any, key: Array, position: Array) -> tuple[BlackjaxState, Array]:
        key, init_key, tune_key = jax.random.split(key, 3)
        chain = init(position, log_density(phi), init_key)
        if not options.num_warmup:
            return BlackjaxState(key, chain, _untuned(options, position)), jnp.int32(1)
        root = math.sqrt(position.size)
        chain, params, num_steps = tune(
            num_steps=options.num_warmup,
            state=chain,
            rng_key=tune_key,
            logdensity_fn=log_density(phi),
            frac_tune1=MCLMC_PHASE,
            frac_tune2=MCLMC_PHASE,
            diagonal_preconditioning=HAS_PRECONDITIONER,
        )
        tuned = Tuned(params.step_size / root, params.inverse_mass_matrix, params.L / root)
        return BlackjaxState(key, chain, tuned), jnp.int32(1 + EVALS_PER_MCLMC_STEP * num_steps)

    return jax.vmap(start, in_axes=(None, 0, 0))


def _untuned(options: SamplerOptions, position: Array) -> Tuned:
    """Make the parameters without a warm-up, of one chain ``(D,)`` or of all ``(C, D)``."""
    from jax import numpy as jnp

    scalar = jnp.zeros_like(position[..., 0])
    return Tuned(scalar + options.step_size, jnp.ones_like(position), scalar + options.trajectory_length)


def _hamiltonian_draw(chain: Any, tuned: Tuned, moved: Any, info: Any) -> Transition:
    """Describe a transition of HMC or NUTS; its energy is the Hamiltonian at its start."""
    energy = 0.5 * (tuned.inverse_mass * info.momentum**2).sum() - chain.logdensity
    return _transition(moved, info.acceptance_rate, info.is_divergent, energy, info.num_integration_steps)


def _transition(moved: Any, acceptance_rate: Any, is_divergent: Any, energy: Any, num_evals: Any) -> Transition:
    return Transition(moved.position, -moved.logdensity, acceptance_rate, is_divergent, energy, num_evals)


def _step(move: Callable[[Any, Array, Any, Tuned], tuple[Any, Transition]]) -> Callable[..., Any]:
    """Make the step of all chains from the move of one."""
    import jax

    def step(phi: Any, state: BlackjaxState) -> tuple[BlackjaxState, Transition]:
        key, step_key = jax.random.split(state.keys)
        chain, draw = move(phi, step_key, state.chain, state.tuned)
        return BlackjaxState(key, chain, state.tuned), draw

    return jax.vmap(step, in_axes=(None, 0))
