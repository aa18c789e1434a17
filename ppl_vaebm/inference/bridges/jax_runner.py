"""NumPyro's and BlackJAX's samplers on this package's potentials: torch evaluates Phi, JAX moves the chains.

They sample ``U = Phi + |q|^2 / 2`` and are otherwise unchanged. Chains are vectorized: the loop of a transition runs
until the chain with the longest trajectory is done, and evaluates Phi for all chains until then. ``n_steps`` counts
each chain's own trajectory, the attribute ``num_evals_computed`` all evaluations.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges.blackjax_samplers import BLACKJAX_TARGET_ACCEPTANCE, BlackjaxKernelName, build_blackjax
from ppl_vaebm.inference.bridges.jax_potential import (
    NUMPY_DTYPES,
    JaxPotential,
    jax_precision,
    numbered_potential,
    require,
)
from ppl_vaebm.inference.bridges.jax_sampler import JaxSampler
from ppl_vaebm.inference.bridges.numpyro_samplers import NUMPYRO_TARGET_ACCEPTANCE, NumpyroKernelName, build_numpyro
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions, Transition, states, tensor, to_chains
from ppl_vaebm.inference.kernels.base import KernelParams, Potential, value_only
from ppl_vaebm.inference.kernels.chains import Chains, Functionals
from ppl_vaebm.rng import seed_for

if TYPE_CHECKING:
    from jax import Array

JaxKernelName = Literal[NumpyroKernelName, BlackjaxKernelName]

# Most draws of one call of a compiled block, and most numbers in their positions (32 MiB of float64). Chosen by us:
# with a call for every draw of one step, a Gaussian took 1.3 to 3 times as long as with 64.
MAX_BLOCK, MAX_BLOCK_VALUES = 64, 2**22
NUM_PROGRAMS = 16
"""Compiled programs that are kept."""

_TARGETS = {name: NUMPYRO_TARGET_ACCEPTANCE for name in get_args(NumpyroKernelName)} | dict(BLACKJAX_TARGET_ACCEPTANCE)


class Program(NamedTuple):
    """A sampler, compiled for one shape of positions and every potential."""

    start: Callable[[Any, Array, NDArray[Any]], tuple[Any, Array]]
    """As :attr:`JaxSampler.start`."""
    block: Callable[[Any, Any, np.int32], tuple[Any, Transition]]
    """From phi, a state and a number of draws to the next state and rows of draws, of which so many are filled."""
    block_size: int
    """Most draws of one call."""
    sampler: JaxSampler


class _Block(NamedTuple):
    """Draws of one call of a program, ``n`` of them; rows are draws."""

    draws: Transition
    """``(n, C, ...)``."""
    rows: list[Mapping[str, Tensor]]
    """Scalar summaries of each draw."""
    end_times: NDArray[np.float64]
    """Seconds from the start of all draws, ``(n,)``."""
    num_computed: float
    """Evaluations that were computed for them, over all chains."""


def run_jax(
    kernel: JaxKernelName,
    potential: Potential,
    position: Tensor,
    options: SamplerOptions,
    limits: Limits,
    *,
    seed: int,
    functionals: Functionals,
) -> Chains:
    """Sample with NumPyro or BlackJAX, all chains at once, each from its own random keys.

    Args:
        potential: Phi, relative to N(0, I).
        position: starts, ``(C, D)``, float32 or float64.
        functionals: as in :func:`~ppl_vaebm.inference.kernels.chains.run_chains`. Phi is U, which the libraries keep,
            less ``|q|^2 / 2``, with rounding errors.

    Returns:
        The chains. In ``params`` the step is ``(C,)``, the inverse mass ``(C, D)``, the trajectory ``(C,)``. Draws are
        computed in blocks: ``elapsed``, functionals included, is measured at the end of a block and divided within it
        in proportion to evaluations; compilation counts as warm-up. ``attrs`` has ``is_adjusted`` (0 where the step
        biases the draws), ``compile_seconds`` (0 if an earlier call has compiled the program), and all evaluations of
        torch over all chains, ``num_evals_computed`` of the draws and ``warmup_evals_computed``. Draws of a block
        after the last one are discarded, with their fraction of time and evaluations.

    Raises:
        InputError: an unknown kernel, an extra that is not installed, positions that JAX does not accept, a start where
            U is not finite, or too short a warm-up.
        ValueError: the potential does not return one number per chain.
    """
    position = position.detach()
    _check(kernel, potential, position)
    options = options._replace(target_acceptance=options.target_acceptance or _TARGETS[kernel])
    host = JaxPotential(potential, position)
    with jax_precision(position.dtype), host.own_errors():
        began = time.perf_counter()
        phi, program = _numbered(host.number), _compile(kernel, *position.shape, position.dtype, options)
        compiled = time.perf_counter()
        state, warmup_evals = _start(program, phi, _keys(kernel, seed, len(position)), position)
        warmed, warmup_computed = time.perf_counter(), host.num_rows
        blocks = _draw(program, phi, host, state, limits, functionals, position)
        step_sizes, inverse_mass, lengths = (tensor(part, position) for part in program.sampler.tuned(state))
    return to_chains(
        kernel,
        Transition(*(np.concatenate(parts) for parts in zip(*(block.draws for block in blocks), strict=True))),
        [row for block in blocks for row in block.rows],
        np.concatenate([block.end_times for block in blocks]),
        KernelParams(step_sizes, inverse_mass, lengths),
        position,
        warmup_seconds=warmed - began,
        # _check has evaluated the starts once more.
        warmup_evals=warmup_evals + len(position),
        attrs={
            "thin": 1,
            "seed": seed,
            "is_adjusted": int(program.sampler.is_adjusted),
            "compile_seconds": compiled - began,
            "warmup_evals_computed": warmup_computed + len(position),
            "num_evals_computed": round(sum(block.num_computed for block in blocks)),
        },
    )


def _check(kernel: str, potential: Potential, position: Tensor) -> None:
    if kernel not in _TARGETS:
        raise InputError(f"expected one of the kernels {', '.join(_TARGETS)}, found {kernel!r}: choose one of them")
    require("jax", kernel.partition("-")[0])
    if position.dim() != 2 or position.dtype not in NUMPY_DTYPES:
        raise InputError(
            f"expected starts of shape (chains, D) and float32 or float64, found {tuple(position.shape)} and "
            f"{position.dtype}: convert them"
        )
    if "mclmc" in kernel and position.shape[1] < 2:
        raise InputError(f"expected two or more dimensions for {kernel}, found 1: take another kernel")
    is_finite = (value_only(potential, position) + position.square().sum(1)).isfinite()
    if not is_finite.all():
        raise InputError(
            f"expected a finite U where every chain starts, found {int((~is_finite).sum())} of {len(position)} chains "
            "where it is not: start them elsewhere"
        )


def _keys(kernel: str, seed: int, num_chains: int) -> Array:
    """Make one random key per chain, which does not depend on the number of chains."""
    import jax
    from jax import numpy as jnp

    seeds = [seed_for(seed, "jax", kernel, chain) for chain in range(num_chains)]
    halves = [[number >> 32, number & 0xFFFFFFFF] for number in seeds]
    keys: Array = jax.random.wrap_key_data(jnp.array(halves, jnp.uint32), impl="threefry2x32")
    return keys


def _numbered(number: int) -> Any:
    """Make Phi of one position from its number, which is an argument of the compiled program."""
    from jax import tree_util

    return tree_util.Partial(numbered_potential(), np.int32(number))


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def _compile(kernel: str, num_chains: int, dim: int, dtype: torch.dtype, options: SamplerOptions) -> Program:
    import jax
    from jax import numpy as jnp

    if kernel in get_args(NumpyroKernelName):
        sampler = build_numpyro(cast(NumpyroKernelName, kernel), options)
    else:
        sampler = build_blackjax(cast(BlackjaxKernelName, kernel), options)
    block_size = max(1, min(MAX_BLOCK, MAX_BLOCK_VALUES // (num_chains * dim)))

    def block(phi: Any, state: Any, length: Array) -> tuple[Any, Transition]:
        one: Any = jax.eval_shape(sampler.step, phi, state)[1]
        empty = Transition(*[jnp.zeros((block_size, *part.shape), part.dtype) for part in one])

        def body(index: Array, carry: tuple[Any, Transition]) -> tuple[Any, Transition]:
            state, draw = sampler.step(phi, carry[0])
            return state, Transition(*(rows.at[index].set(row) for rows, row in zip(carry[1], draw, strict=True)))

        state, draws = jax.lax.fori_loop(0, length, body, (state, empty))
        return state, draws

    phi = _numbered(0)
    start_of = (phi, _keys(kernel, 0, num_chains), np.zeros((num_chains, dim), NUMPY_DTYPES[dtype]))
    start: Any = jax.jit(sampler.start).lower(*start_of).compile()
    state, _ = jax.eval_shape(sampler.start, *start_of)
    compiled_block: Any = jax.jit(block).lower(phi, state, np.int32(1)).compile()
    return Program(start, compiled_block, block_size, sampler)


def _start(program: Program, phi: Any, keys: Array, position: Tensor) -> tuple[Any, int]:
    """Run the warm-up; return the state and the evaluations of the chains' own trajectories."""
    state, evals = program.start(phi, keys, position.cpu().numpy())
    num_evals = int(np.asarray(evals).sum())
    for first in range(0, program.sampler.num_warm_steps, program.block_size):
        length = min(program.block_size, program.sampler.num_warm_steps - first)
        state, draws = program.block(phi, state, np.int32(length))
        num_evals += int(np.asarray(draws.num_evals)[:length].sum())
    return state, num_evals


def _draw(
    program: Program, phi: Any, host: JaxPotential, state: Any, limits: Limits, functionals: Functionals, like: Tensor
) -> list[_Block]:
    """Draw blocks until the limits are reached; the last block ends with the draw that reaches them."""
    began = time.perf_counter()
    blocks: list[_Block] = []
    num_draws, num_evals, elapsed, length, is_spent = 0, 0.0, 0.0, 1, False
    while num_draws < limits.num_draws and not is_spent:
        rows_before = host.num_rows
        state, draws = program.block(phi, state, np.int32(length))
        draws = Transition(*(np.asarray(part)[:length] for part in draws))
        rows = [functionals(state) for state in states(draws, like)]
        now = time.perf_counter() - began
        fraction = draws.num_evals.max(1).cumsum()  # a transition lasts until the last chain is done
        fraction = fraction / fraction[-1]
        block = _Block(draws, rows, elapsed + (now - elapsed) * fraction, host.num_rows - rows_before)
        spent = num_evals + draws.num_evals.mean(1).cumsum()
        if limits.max_evals is not None:
            is_enough = (spent >= limits.max_evals) & (block.end_times >= limits.min_seconds)
            is_spent = bool(is_enough.any())
            if is_spent:
                block = _cut(block, fraction, int(is_enough.argmax()) + 1)
        blocks.append(block)
        num_draws += len(block.rows)
        num_evals, elapsed = float(spent[-1]), now
        length = _next_length(limits, num_draws, num_evals, elapsed, program.block_size)
    return blocks


def _cut(block: _Block, fraction: NDArray[np.float64], length: int) -> _Block:
    """Keep the first draws of a block."""
    draws = Transition(*(part[:length] for part in block.draws))
    return _Block(draws, block.rows[:length], block.end_times[:length], block.num_computed * fraction[length - 1])


def _next_length(limits: Limits, num_draws: int, num_evals: float, elapsed: float, block_size: int) -> int:
    """Estimate the number of draws until the limits are reached, at most a block."""
    left = float(limits.num_draws - num_draws)
    if limits.max_evals is not None:
        left_of_evals = (limits.max_evals / num_evals - 1) * num_draws
        left_of_time = (limits.min_seconds / elapsed - 1) * num_draws
        left = min(left, max(left_of_evals, left_of_time))
    return max(1, min(int(left), block_size))
