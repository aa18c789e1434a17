"""NumPyro's and BlackJAX's samplers on our potentials, as yardsticks: torch evaluates Phi, JAX moves the chains.

They see the whole ``U = Phi + |q|^2 / 2`` and are otherwise unchanged. Chains are vectorised: a loop of one transition
runs until the chain that needs most steps has done them, and evaluates Phi for all chains until then. ``n_steps`` is
what a chain's own trajectory used; the attribute ``num_evals_computed`` is what was evaluated.

Small potentials can be translated to JAX instead, so that XLA compiles them together with the sampler.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges import blackjax_samplers as blackjax_kernels
from ppl_vaebm.inference.bridges import numpyro_samplers as numpyro_kernels
from ppl_vaebm.inference.bridges.jax_potential import (
    NUMPY_DTYPES,
    JaxPotential,
    jax_precision,
    numbered_potential,
    require,
)
from ppl_vaebm.inference.bridges.jax_sampler import Draw, Options, Sampler
from ppl_vaebm.inference.kernels.base import KernelParams, KernelState, Potential, value_only
from ppl_vaebm.inference.kernels.chains import Chains, Functionals
from ppl_vaebm.rng import seed_for

if TYPE_CHECKING:
    from jax import Array

JaxKernelName = Literal[numpyro_kernels.NumpyroKernelName, blackjax_kernels.BlackjaxKernelName]

MAX_TREE_DEPTH = 10  # NumPyro's and BlackJAX's default, which is Stan's
STEP_SIZE = 0.1  # where our kernels' warm-up starts too
TRAJECTORY_LENGTH = math.pi / 2  # a quarter turn, as in base.init_params
# Draws of one call of a compiled block: at most so many, and at most so many numbers in their positions, 32 MiB of
# float64. Chosen by us: with a call for every draw of one step, a Gaussian took 1.3 to 3 times as long as with 64.
MAX_BLOCK, MAX_BLOCK_VALUES = 64, 2**22
# Compiled programs that are kept.
NUM_PROGRAMS = 16

_TARGETS = {name: numpyro_kernels.TARGET_ACCEPTANCE for name in get_args(numpyro_kernels.NumpyroKernelName)} | dict(
    blackjax_kernels.TARGET_ACCEPTANCE
)


class Program(NamedTuple):
    """A sampler, compiled for one shape; Phi is the one it was compiled with, or has other arrays bound in it."""

    start: Callable[[Any, Array, NDArray[Any]], tuple[Any, Array]]
    """As :attr:`Sampler.start`."""
    block: Callable[[Any, Any, np.int32], tuple[Any, Draw]]
    """From a state and a number of draws to the next state, and to draws of which only so many rows are filled."""
    block_size: int
    """The most draws of one call."""
    sampler: Sampler


class _Budget(NamedTuple):
    """When the draws end."""

    num_draws: int
    max_evals: int | None
    min_seconds: float


class _Block(NamedTuple):
    """Draws of one call of a program, ``n`` of them; rows are draws."""

    draw: Draw
    """``(n, C, ...)``."""
    rows: list[Mapping[str, Tensor]]
    """Functionals of each draw."""
    end_times: NDArray[np.float64]
    """Seconds from the start of all draws, ``(n,)``."""
    num_computed: float
    """Evaluations that were computed for them, over all chains."""


def run_jax(
    kernel: JaxKernelName,
    potential: Potential,
    position: Tensor,
    *,
    seed: int,
    num_draws: int,
    num_warmup: int,
    functionals: Functionals,
    step_size: float = STEP_SIZE,
    trajectory_length: float = TRAJECTORY_LENGTH,
    target_acceptance: float | None = None,
    max_tree_depth: int = MAX_TREE_DEPTH,
    max_evals: int | None = None,
    min_seconds: float = 0.0,
) -> Chains:
    """Sample with NumPyro or BlackJAX, all chains at once, each from its own random keys.

    Args:
        kernel: name of the sampler.
        potential: Phi, relative to N(0, I).
        position: starts, ``(C, D)``, float32 or float64.
        seed: the run's seed.
        num_draws: draws per chain, at least 1; with ``max_evals``, the most of them.
        num_warmup: steps in which the library adapts; 0 keeps ``step_size`` and unit mass.
        functionals: what to store of each draw. Phi is U, which the libraries keep, less ``|q|^2 / 2``, and so rounded.
        step_size: leapfrog step, or where its adaptation starts.
        trajectory_length: of NumPyro's HMC; of ChEES and MCLMC where they do not tune it.
        target_acceptance: what the adaptation aims at; ``None`` for the library's own, nothing for MCLMC.
        max_tree_depth: bound on NUTS's doublings.
        max_evals: stop after the draw with which the evaluations per chain, on average over chains and warm-up not
            counted, reach this number.
        min_seconds: draws go on beyond ``max_evals`` until so much time has passed; ``num_draws`` bounds both.

    Returns:
        The chains. In ``params`` the step is ``(C,)``, the inverse mass ``(C, D)``, the trajectory ``(C,)``. Draws
        come in blocks: ``elapsed``, functionals included, is measured where blocks end, and divided by evaluations
        within them; compilation counts as warm-up.
        ``attrs`` has ``is_adjusted`` (0 where the step biases the draws), ``compile_seconds`` (0 where an earlier call
        has left its program), and ``num_evals_computed`` of the draws and ``warmup_evals_computed``, over all chains:
        what torch was called for.
        Where the budget ends within a block, its other draws are thrown away, with their share of time and evaluations.

    Raises:
        InputError: an unknown kernel, an extra that is not installed, positions that JAX cannot take, a start where U
            is not finite, or too short a warm-up.
        ValueError: the potential does not return one number per chain.
    """
    position = position.detach()
    _check(kernel, potential, position)
    options = Options(num_warmup, step_size, trajectory_length, target_acceptance or _TARGETS[kernel], max_tree_depth)
    host = JaxPotential(potential, position)
    with jax_precision(position.dtype), host.own_errors():
        began = time.perf_counter()
        phi, program = _numbered(host.number), _compile_for_all(kernel, *position.shape, position.dtype, options)
        compiled = time.perf_counter()
        state, warmup_evals = _start(program, phi, _keys(kernel, seed, len(position)), position)
        warmed, warmup_computed = time.perf_counter(), host.num_rows
        budget = _Budget(num_draws, max_evals, min_seconds)
        blocks = _draw(program, phi, host, state, budget, functionals, position)
        step_sizes, inverse_mass, lengths = (_tensor(part, position) for part in program.sampler.tuned(state))
    attrs: dict[str, str | float | int | list[float]] = {
        "thin": 1,
        "seed": seed,
        "is_adjusted": int(program.sampler.is_adjusted),
        "compile_seconds": compiled - began,
        # The start has been evaluated once more, to check it.
        "warmup_evals_computed": warmup_computed + len(position),
    }
    return replace(
        _collect(kernel, blocks, KernelParams(step_sizes, inverse_mass, lengths), position),
        warmup_seconds=warmed - began,
        warmup_evals=warmup_evals + len(position),
        attrs=attrs | {"num_evals_computed": round(sum(block.num_computed for block in blocks))},
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
    """Make one random key per chain, which does not depend on how many there are."""
    import jax
    from jax import numpy as jnp

    seeds = [seed_for(seed, "jax", kernel, chain) for chain in range(num_chains)]
    halves = [[whole >> 32, whole & 0xFFFFFFFF] for whole in seeds]
    keys: Array = jax.random.wrap_key_data(jnp.array(halves, jnp.uint32), impl="threefry2x32")
    return keys


def _numbered(number: int) -> Any:
    """Make Phi from its number, such that one program serves them all."""
    from jax import tree_util

    return tree_util.Partial(numbered_potential(), np.int32(number))


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def _compile_for_all(kernel: str, num_chains: int, dim: int, dtype: torch.dtype, options: Options) -> Program:
    """Compile a sampler of every potential that torch evaluates."""
    return _compile(kernel, num_chains, dim, dtype, options, _numbered(0))


def _compile(kernel: str, num_chains: int, dim: int, dtype: torch.dtype, options: Options, phi: Any) -> Program:
    import jax
    from jax import numpy as jnp

    if kernel in get_args(numpyro_kernels.NumpyroKernelName):
        sampler = numpyro_kernels.build_numpyro(cast(numpyro_kernels.NumpyroKernelName, kernel), options)
    else:
        sampler = blackjax_kernels.build_blackjax(cast(blackjax_kernels.BlackjaxKernelName, kernel), options)
    block_size = max(1, min(MAX_BLOCK, MAX_BLOCK_VALUES // (num_chains * dim)))

    def block(phi: Any, state: Any, length: Array) -> tuple[Any, Draw]:
        one: Any = jax.eval_shape(sampler.step, phi, state)[1]
        empty = Draw(*[jnp.zeros((block_size, *part.shape), part.dtype) for part in one])

        def body(index: Array, carry: tuple[Any, Draw]) -> tuple[Any, Draw]:
            state, draw = sampler.step(phi, carry[0])
            return state, Draw(*(rows.at[index].set(row) for rows, row in zip(carry[1], draw, strict=True)))

        state, draws = jax.lax.fori_loop(0, length, body, (state, empty))
        return state, draws

    start_of = (phi, _keys(kernel, 0, num_chains), np.zeros((num_chains, dim), NUMPY_DTYPES[dtype]))
    start: Any = jax.jit(sampler.start).lower(*start_of).compile()
    state, _ = jax.eval_shape(sampler.start, *start_of)
    compiled_block: Any = jax.jit(block).lower(phi, state, np.int32(1)).compile()
    return Program(start, compiled_block, block_size, sampler)


def _start(program: Program, phi: Any, keys: Array, position: Tensor) -> tuple[Any, int]:
    """Run the warm-up; return also the evaluations that the chains' own trajectories took."""
    state, evals = program.start(phi, keys, position.cpu().numpy())
    num_evals = int(np.asarray(evals).sum())
    for first in range(0, program.sampler.num_warm_steps, program.block_size):
        length = min(program.block_size, program.sampler.num_warm_steps - first)
        state, draw = program.block(phi, state, np.int32(length))
        num_evals += int(np.asarray(draw.num_evals)[:length].sum())
    return state, num_evals


def _draw(
    program: Program,
    phi: Any,
    host: JaxPotential,
    state: Any,
    budget: _Budget,
    functionals: Functionals,
    like: Tensor,
) -> list[_Block]:
    """Draw blocks until the budget is spent; the last one is cut after the draw that spent it. The host counts."""
    began = time.perf_counter()
    blocks: list[_Block] = []
    num_draws, num_evals, elapsed, length, is_spent = 0, 0.0, 0.0, 1, False
    while num_draws < budget.num_draws and not is_spent:
        rows_before = host.num_rows
        state, draw = program.block(phi, state, np.int32(length))
        draw = Draw(*(np.asarray(part)[:length] for part in draw))
        rows = [functionals(state) for state in _states(draw, like)]
        now = time.perf_counter() - began
        share = draw.num_evals.max(1).cumsum()  # a transition goes on until the last chain is done
        share = share / share[-1]
        block = _Block(draw, rows, elapsed + (now - elapsed) * share, host.num_rows - rows_before)
        spent = num_evals + draw.num_evals.mean(1).cumsum()
        if budget.max_evals is not None:
            is_enough = (spent >= budget.max_evals) & (block.end_times >= budget.min_seconds)
            is_spent = bool(is_enough.any())
            if is_spent:
                block = _cut(block, share, int(is_enough.argmax()) + 1)
        blocks.append(block)
        num_draws += len(block.rows)
        num_evals, elapsed = float(spent[-1]), now
        length = _next_length(budget, num_draws, num_evals, elapsed, program.block_size)
    return blocks


def _cut(block: _Block, share: NDArray[np.float64], length: int) -> _Block:
    """Keep the first draws of a block."""
    draw = Draw(*(part[:length] for part in block.draw))
    return _Block(draw, block.rows[:length], block.end_times[:length], block.num_computed * share[length - 1])


def _next_length(budget: _Budget, num_draws: int, num_evals: float, elapsed: float, block_size: int) -> int:
    """Choose how many draws to ask for next: those that the budget seems to leave."""
    left = float(budget.num_draws - num_draws)
    if budget.max_evals is not None:
        left_of_evals = (budget.max_evals / num_evals - 1) * num_draws
        left_of_time = (budget.min_seconds / elapsed - 1) * num_draws
        left = min(left, max(left_of_evals, left_of_time))
    return max(1, min(int(left), block_size))


def _states(draw: Draw, like: Tensor) -> list[KernelState]:
    phi = draw.potential_energy.astype(np.float64) - 0.5 * np.square(draw.position, dtype=np.float64).sum(-1)
    pairs = zip(draw.position, phi, strict=True)
    return [KernelState(_tensor(rows, like), _tensor(values, like).to(like.dtype), None) for rows, values in pairs]


def _tensor(values: Any, like: Tensor) -> Tensor:
    # JAX does not let its memory be written to.
    return torch.from_numpy(np.array(values)).to(like.device)


def _collect(kernel: str, blocks: list[_Block], params: KernelParams, like: Tensor) -> Chains:
    def column(field: str, dtype: type) -> Tensor:
        values: NDArray[Any] = np.concatenate([getattr(block.draw, field) for block in blocks]).astype(dtype)
        return _tensor(values, like).transpose(0, 1)

    rows = [row for block in blocks for row in block.rows]
    elapsed = torch.from_numpy(np.concatenate([block.end_times for block in blocks]))
    return Chains(
        kernel=kernel,
        draws={name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]},
        stats={
            "lp": -column("potential_energy", np.float64),
            "acceptance_rate": column("acceptance_rate", np.float64),
            "diverging": column("is_divergent", np.bool_),
            "energy": column("energy", np.float64),
            "n_steps": column("num_evals", np.int64),
        },
        position=_tensor(blocks[-1].draw.position[-1], like),
        params=params,
        seconds=float(elapsed[-1]),
        elapsed=elapsed,
    )
