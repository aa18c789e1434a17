"""Samples by chains from fresh noise: many short independent chains rather than few long ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.adaptation import warm_up
from ppl_vaebm.inference.base import KernelParams
from ppl_vaebm.inference.kernels import build_kernel, start_params
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream

BLOCK = 500
"""Chains that run side by side, fewer for large models. A block's randomness is keyed by its number, so sample i
depends neither on how many are asked for nor on any other block."""
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


def tuned_params(potential: NoisePotential, config: KernelConfig, seed: int) -> KernelParams:
    """Tune a kernel's step size on a pilot block, which is then thrown away.

    Args:
        potential: of the VAEBM.
        config: the kernel.
        seed: of the pilot.

    Returns:
        Parameters.
    """
    kernel = build_kernel(config, potential)
    generator = stream(seed, "pilot", device=_device(potential))
    position = potential.draw_reference(generator, max(2, _block(potential) // 10))
    params = start_params(config, position)
    if kernel.target_acceptance is None:
        return params
    return warm_up(kernel, generator, kernel.init(position), params, NUM_PILOT_STEPS)[1]


def sample_by_chains(
    potential: NoisePotential, config: KernelConfig, *, num: int, steps: list[int], seed: int
) -> ChainSamples:
    """Run independent chains from N(0, I) and note where they stand.

    Args:
        potential: of the VAEBM.
        config: the kernel; its step size is tuned by :func:`tuned_params`.
        num: samples.
        steps: numbers of steps after which to note the positions; 0 is the VAE itself.
        seed: of everything.

    Returns:
        The positions after each number of steps.
    """
    kernel, params = build_kernel(config, potential), tuned_params(potential, config, seed)
    noted: dict[int, list[Tensor]] = {count: [] for count in steps}
    acceptance, num_evals = [], 0.0
    size = _block(potential)
    num_blocks = -(-num // size)
    for block in range(num_blocks):
        generator = stream(seed, "block", block, device=_device(potential))
        state = kernel.init(potential.draw_reference(generator, size))
        for step in range(max(steps) + 1):
            if step in noted:
                noted[step].append(state.position)
            if step < max(steps):
                state, info = kernel.step(generator, state, params)
                acceptance.append(float(info.acceptance_rate.mean()))
                num_evals += float(info.num_evals.double().mean()) / num_blocks
    positions = {count: torch.cat(blocks)[:num] for count, blocks in noted.items()}
    mean_acceptance = sum(acceptance) / len(acceptance) if acceptance else 1.0
    return ChainSamples(positions, mean_acceptance, float(params.step_size), num_evals)


def decode_in_blocks(potential: NoisePotential, position: Tensor) -> Tensor:
    """Map noise ``(num, D)`` to x, ``(num, *event_shape)``, on the CPU, a block at a time."""
    size = _block(potential)
    # A last block that is not full is filled up, for products of matrices round otherwise with fewer rows.
    blocks = [pad(rows, (0, 0, 0, size - len(rows))) for rows in position.split(size)]
    return torch.cat([potential.decode(rows).cpu() for rows in blocks])[: len(position)]


def _block(potential: NoisePotential) -> int:
    return min(BLOCK, potential.rows_per_pass)


def _device(potential: NoisePotential) -> torch.device:
    return next(potential.vaebm.parameters()).device
