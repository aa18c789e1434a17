"""NumPyro's HMC and NUTS (Phan, Pradhan and Jankowiak 2019, arXiv:1912.11554), vectorized over chains.

Each chain adapts its step and diagonal mass alone, as in NumPyro. Its energy is the Hamiltonian of the selected
point, not of the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ppl_vaebm.inference.bridges.jax_sampler import JaxSampler, Tuned, potential_energy
from ppl_vaebm.inference.bridges.transitions import SamplerOptions, Transition

if TYPE_CHECKING:
    from jax import Array

NumpyroKernelName = Literal["numpyro-hmc", "numpyro-nuts"]

# NumPyro's default, which is Stan's.
NUMPYRO_TARGET_ACCEPTANCE = 0.8


def build_numpyro(name: NumpyroKernelName, options: SamplerOptions) -> JaxSampler:
    """Make NumPyro's HMC, which takes ``ceil(trajectory_length / step_size)`` steps, or its NUTS."""
    import jax
    from jax import numpy as jnp
    from numpyro.infer.hmc import hmc

    init_kernel, sample_kernel = hmc(potential_fn_gen=potential_energy, algo="HMC" if name == "numpyro-hmc" else "NUTS")

    def init(phi: Any, key: Array, position: Array) -> Any:
        return init_kernel(
            position,
            options.num_warmup,
            step_size=options.step_size,
            adapt_step_size=options.num_warmup > 0,
            adapt_mass_matrix=options.num_warmup > 0,
            target_accept_prob=options.target_acceptance,
            trajectory_length=options.trajectory_length if name == "numpyro-hmc" else None,
            max_tree_depth=options.max_tree_depth,
            model_args=(phi,),
            rng_key=key,
        )

    move = jax.vmap(lambda state, phi: sample_kernel(state, (phi,)), in_axes=(0, None))

    def start(phi: Any, keys: Array, position: Array) -> tuple[Any, Array]:
        state = jax.vmap(init, in_axes=(None, 0, 0))(phi, keys, position)
        return state, jnp.ones(len(position), int)

    def step(phi: Any, state: Any) -> tuple[Any, Transition]:
        state = move(state, phi)
        draw = Transition(
            position=state.z,
            potential_energy=state.potential_energy,
            acceptance_rate=state.accept_prob,
            is_divergent=state.diverging,
            energy=state.energy,
            num_evals=state.num_steps,
        )
        return state, draw

    def tuned(state: Any) -> Tuned:
        adapted = state.adapt_state
        length = jnp.full_like(adapted.step_size, options.trajectory_length)
        return Tuned(adapted.step_size, adapted.inverse_mass_matrix, length)

    return JaxSampler(start, step, tuned, num_warm_steps=options.num_warmup)
