"""What a gradient costs by each way from JAX to a torch potential, inside a loop of XLA's as samplers have it.

The potential is that of a small fully connected VAEBM of the recipe gaussians25's sizes, with random weights. Its
gradient for 64 chains comes from torch by calls of the host, or from the translation that XLA compiles; torch alone is
the yardstick. A convolution of 96 channels, in a compiled function and in a compiled loop, says why the translation
leaves convolutions out. JAX computes with one thread here, as torch does.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.jax_compiled``.
"""

from __future__ import annotations

import os

# Before the first import of jax: processor time adds up over threads.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import torch
from jax import numpy as jnp
from torch import Tensor

from benchmarks.common import rates, ratio, write
from ppl_vaebm.config import EnergyConfig, ModelConfig
from ppl_vaebm.inference.base import Potential, value_and_grad
from ppl_vaebm.inference.jax_compiled import compiled_potential
from ppl_vaebm.inference.jax_potential import JaxPotential, jax_precision
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.build import build_vae
from ppl_vaebm.models.energy import build_energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, stream

# The recipe gaussians25's networks.
MODEL = ModelConfig(latents=(2, 2), width=128, depth=3)
ENERGY = EnergyConfig(width=128, depth=2, num_fourier=64, fourier_scale=4.0)
NUM_CHAINS, NUM_EVALS, NUM_ROUNDS = 64, 64, 21
TURN = 0.1
"""Angle between the positions of neighbouring evaluations: XLA would take equal ones out of the loop."""
# Images, channels and side; evaluations, few for they are slow.
CONVOLUTION, NUM_CONVOLUTIONS = (1, 96, 16, 16), 4


def _potential() -> tuple[Potential, Tensor]:
    with global_rng(0):
        vae = build_vae(MODEL, torch.Size([2]), None)
        vaebm = VAEBM(vae.eval(), build_energy(ENERGY, torch.Size([2])))
    potential = noise_potential(vaebm.requires_grad_(False))
    return potential, potential.draw_reference(stream(0, "position"), NUM_CHAINS)


def _bare(potential: Potential, batches: Tensor) -> Callable[[], int]:
    def task() -> int:
        for rows in batches:
            value_and_grad(potential, rows)
        return NUM_EVALS * NUM_CHAINS

    return task


def _loop(phi: Callable[[Any], Any], batches: Tensor) -> Callable[[], int]:
    loop = jax.jit(lambda batches: jax.lax.map(jax.vmap(jax.value_and_grad(phi)), batches))
    rows = batches.numpy()

    def task() -> int:
        with jax_precision(batches.dtype):
            jax.block_until_ready(loop(rows))
        return NUM_EVALS * NUM_CHAINS

    return task


def _convolutions() -> dict[str, Callable[[], int]]:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(NUM_CONVOLUTIONS, *CONVOLUTION)).astype(np.float32)
    weight = jnp.asarray(generator.normal(size=(CONVOLUTION[1], CONVOLUTION[1], 3, 3)), np.float32)
    convolve = jax.jit(lambda image: jax.lax.conv(image, weight, (1, 1), "SAME"))
    loop = jax.jit(lambda images: jax.lax.map(lambda image: jax.lax.conv(image, weight, (1, 1), "SAME"), images))

    def by_calls() -> int:
        for image in images:
            jax.block_until_ready(convolve(image))
        return NUM_CONVOLUTIONS

    def by_loop() -> int:
        jax.block_until_ready(loop(images))
        return NUM_CONVOLUTIONS

    return {"convolution, compiled": by_calls, "convolution, in a compiled loop": by_loop}


def main() -> None:
    """Print the table and write ``results/jax_compiled.json``."""
    potential, position = _potential()
    angles = TURN * torch.arange(NUM_EVALS)[:, None, None]
    batches = position * angles.cos() + position.flip(0) * angles.sin()
    began = time.perf_counter()
    translated = compiled_potential(potential, position)
    translation_seconds = time.perf_counter() - began
    bridge = JaxPotential(potential, position)  # kept here, for programs hold only its number
    tasks = {
        "torch alone": _bare(potential, batches),
        "calls of torch in a loop of JAX": _loop(bridge, batches),
        "translated, in a loop of JAX": _loop(translated, batches),
        **_convolutions(),
    }
    found = rates(tasks, NUM_ROUNDS)
    results: dict[str, Any] = {"jax": version("jax"), "translation_seconds": translation_seconds}
    print(f"translated and checked in {translation_seconds:.1f} s; median of {NUM_ROUNDS} rounds of processor time")
    print(f"{'':34}{'microseconds':>14}{'rate over torch alone':>24}{'over calls of torch':>22}")
    for name in list(tasks)[:3]:
        over_torch, over_calls = (ratio(found[name], found[other]) for other in list(tasks)[:2])
        microseconds = 1e6 * NUM_CHAINS / float(torch.tensor(found[name]).median())
        print(f"{name:34}{microseconds:14.0f}{over_torch:23.2f}x{over_calls:21.2f}x")
        row = {"microseconds": microseconds, "over_torch": over_torch, "over_calls": over_calls}
        results[name] = {**row, "rounds": found[name]}
    outside, inside = list(tasks)[3:]
    slowdown = ratio(found[outside], found[inside])
    print(f"a convolution of shape {CONVOLUTION} takes {slowdown:.1f} times as long in a loop")
    results["convolution"] = {"slowdown": slowdown, "rounds": {name: found[name] for name in (outside, inside)}}
    write("jax_compiled", results)


if __name__ == "__main__":
    main()
