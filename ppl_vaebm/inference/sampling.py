"""Samples by chains from fresh noise: many short independent chains rather than few long ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, KernelState
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.latent_exchange import run_first_latent, with_first, with_partners, with_swaps
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vae import ACCELERATOR_FACTOR
from ppl_vaebm.rng import stream

BLOCK = 500
"""Chains that run side by side on a CPU, fewer for large models, more on an accelerator. A block's randomness is keyed
by its number, so on one kind of device sample i depends neither on how many are asked for nor on any other block."""
NUM_PILOT_STEPS = 200
"""Warm-up steps of the pilot block that tunes the step size, which the samples then share."""


class ChainSamples(NamedTuple):
    """Where chains from fresh noise stood after given numbers of steps."""

    positions: dict[int, Tensor]
    """Steps to noise, ``(num, D)``."""
    acceptance_rate: float
    """Mean over chains and steps."""
    step_size: float
    num_evals: float
    """Evaluations of the potential per chain, the pilot's not included."""


def tuned_params(potential: NoisePotential, config: KernelConfig, seed: int, latent_steps: int = 0) -> KernelParams:
    """Tune a kernel's step size on a pilot block, which is then thrown away; the first latent's ladder too.

    The arguments are those of :func:`chain_blocks`.
    """
    kernel, partners = build_kernel(config, potential), None
    generator = stream(seed, "pilot", device=_device(potential))
    position = potential.draw_reference(generator, max(2, _block(potential) // 10))
    if potential.vaebm.energy.latent_net is not None and latent_steps > 0:
        first, partners = run_first_latent(potential, generator, position, latent_steps)
        position = with_first(position, first.position)
    params = start_params(config, position)
    if kernel.target_acceptance is not None:
        params = warm_up(kernel, generator, kernel.init(position), params, NUM_PILOT_STEPS)[1]
    return params._replace(partners=partners)


class ChainBlock(NamedTuple):
    """Where the chains of one block stood after given numbers of steps, and what they had cost until there."""

    positions: dict[int, Tensor]
    """Steps to noise, ``(block, D)``; the last block has as many rows as are still asked for."""
    acceptance_rate: Tensor
    """Mean over the block's chains, ``(steps,)``."""
    num_divergent: Tensor
    """Divergent moves of all its chains, ``(steps,)``."""
    num_evals: dict[int, float]
    """Steps to evaluations of the potential per chain."""
    seconds: dict[int, float]
    """Steps to seconds since the block's noise was drawn."""
    size: int
    """Chains that ran, those that nobody asked for included."""
    step_size: float
    report: dict[str, float | list[float]]
    """Numbers of the whole run: the ladder of a tempered kernel, ``exchange_rate`` of one with swaps."""


def chain_blocks(
    potential: NoisePotential,
    config: KernelConfig,
    *,
    num: int,
    steps: Sequence[int],
    seed: int,
    latent_steps: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[ChainBlock]:
    """Run independent chains from N(0, I) block by block, for samples that do not fit in memory together.

    Args:
        config: the kernel; its step size is tuned by :func:`tuned_params`.
        num: samples.
        steps: numbers of steps after which to note the positions; 0 is the VAE itself, fresh noise.
        seed: of everything.
        latent_steps: sweeps of the first latent's own chains before, which then stand behind the others
            (:func:`with_swaps`); 0, and for an energy without that term, does without.
        on_step: called after every step of a block.

    Yields:
        Blocks, ``num_blocks(potential, num)`` of them.
    """
    kernel, params = build_kernel(config, potential), tuned_params(potential, config, seed, latent_steps)
    if params.partners is not None:
        kernel = with_swaps(kernel, potential)
    size = _block(potential)
    for block in range(num_blocks(potential, num)):
        start = time.perf_counter()
        generator = stream(seed, "block", block, device=_device(potential))
        fresh = potential.draw_reference(generator, size)
        positions = {0: fresh[: num - block * size]} if 0 in steps else {}
        evals, seconds = dict.fromkeys(positions, 0.0), dict.fromkeys(positions, time.perf_counter() - start)
        state = _start(kernel, potential, generator, fresh, latent_steps, params)
        acceptance, divergent, num_evals = [], [], 0.0
        for step in range(1, max(steps) + 1):
            state, info = kernel.step(generator, state, params)
            acceptance.append(float(info.acceptance_rate.mean()))
            divergent.append(int(info.is_divergent.sum()))
            num_evals += float(info.num_evals.double().mean())
            on_step()
            if step in steps:
                positions[step] = state.position[: num - block * size]
                evals[step], seconds[step] = num_evals, time.perf_counter() - start
        rates = torch.tensor(acceptance, dtype=torch.float64)
        report = kernel.report(state, params) if kernel.report else {}
        step_size = float(params.step_size)
        yield ChainBlock(positions, rates, torch.tensor(divergent), evals, seconds, size, step_size, dict(report))


def num_blocks(potential: NoisePotential, num: int) -> int:
    """Count the blocks of chains behind a number of samples."""
    return -(-num // _block(potential))


def sample_by_chains(
    potential: NoisePotential, config: KernelConfig, *, num: int, steps: list[int], seed: int, latent_steps: int = 0
) -> ChainSamples:
    """Run independent chains from N(0, I), and return where they stand after each number of steps.

    The arguments are those of :func:`chain_blocks`.
    """
    blocks = list(chain_blocks(potential, config, num=num, steps=steps, seed=seed, latent_steps=latent_steps))
    rates = torch.cat([block.acceptance_rate for block in blocks])
    return ChainSamples(
        positions={count: torch.cat([block.positions[count] for block in blocks]) for count in steps},
        acceptance_rate=float(rates.mean()) if len(rates) else 1.0,
        step_size=blocks[0].step_size,
        num_evals=sum(block.num_evals[max(steps)] for block in blocks) / len(blocks),
    )


def decode_in_blocks(potential: NoisePotential, position: Tensor) -> Tensor:
    """Map noise ``(num, D)`` to x, ``(num, *event_shape)``, on the CPU, a block at a time."""
    size = _block(potential)
    # A last block that is not full is filled up, for products of matrices round otherwise with fewer rows.
    blocks = [pad(rows, (0, 0, 0, size - len(rows))) for rows in position.split(size)]
    return torch.cat([potential.decode(rows).cpu() for rows in blocks])[: len(position)]


def _start(
    kernel: Kernel,
    potential: NoisePotential,
    generator: torch.Generator,
    fresh: Tensor,
    latent_steps: int,
    params: KernelParams,
) -> KernelState:
    """Place a block's chains: the first latent where its own chains take it, the rest fresh."""
    if params.partners is None:
        return kernel.init(fresh)
    first, _ = run_first_latent(potential, generator, fresh, latent_steps, params.partners)
    return with_partners(kernel.init(with_first(fresh, first.position)), first)


def _block(potential: NoisePotential) -> int:
    size = BLOCK if _device(potential).type == "cpu" else BLOCK * ACCELERATOR_FACTOR
    return min(size, potential.rows_per_block)


def _device(potential: NoisePotential) -> torch.device:
    return next(potential.vaebm.parameters()).device
