"""The batched HMC against Pyro's HMC on the same chains one after another, and the kernels against the bare gradient.

Rates are per second of processor time, which other programs on the machine disturb less than the clock.
Limit: no kernel makes more evaluations per second than the batched gradient alone, and Pyro no more than the gradient
of a single chain; both are printed. Pyro is timed on one chain: it runs chains in sequence, so its total rate does not
depend on their number.

The same HMC inside ``pyro.infer.MCMC``, and the gradient as JAX's samplers call it, one call at a time and in a
compiled loop, measure the cost of those bridges. JAX computes with one thread here, as torch does.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.batched_vs_pyro``.
"""

from __future__ import annotations

import os

# Before the first import of jax: processor time adds up over threads.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import torch
from pyro.infer import HMC, MCMC
from torch import Tensor, nn

from benchmarks.common import parser_of, rates, ratio, write
from ppl_vaebm.inference.bridges.jax_potential import JaxPotential, jax_precision
from ppl_vaebm.inference.bridges.pyro_mcmc import BatchedMCMC, PyroKernel
from ppl_vaebm.inference.bridges.pyro_samplers import SitePotential
from ppl_vaebm.inference.kernels import hmc, langevin
from ppl_vaebm.inference.kernels.base import Kernel, init_params, value_and_grad
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.tables import text_table

GROUP_DIM, X_DIM, WIDTH, X_SCALE = 2, 2, 256, 0.1
ENERGY_SD_NATS = 2.5
NUM_GROUPS = (2, 10)
NUM_CHAINS = (64, 256)
NUM_STEPS, STEP_SIZE = 8, 0.15
NUM_ROUNDS = 21
# Evaluations per task and round: about a tenth of a second each.
BATCHED_EVALS, PYRO_EVALS = 64, 64
# Of HMC at the most chains over Pyro's with named sites, of every kernel over the bare gradient, and of the gradient
# through JAX over the bare one.
GOAL_RATIO, GOAL_OVERHEAD, GOAL_BRIDGE_OVERHEAD = 37, 0.25, 0.3


class Toy(nn.Module):
    """Latents in R^2, each normal given the one before, then x in R^2 given all, and its energy; random weights."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        sizes = {f"z{i}": GROUP_DIM for i in range(num_groups)} | {"x": X_DIM}
        self.packing = Packing({name: torch.Size([size]) for name, size in sizes.items()})
        self.priors = nn.ModuleList(_mlp(GROUP_DIM, 16, 1, 2 * GROUP_DIM) for _ in range(num_groups - 1))
        self.decoder = _mlp(GROUP_DIM * num_groups, WIDTH, 2, X_DIM)
        self.energy = _mlp(X_DIM, WIDTH, 3, 1)
        self.requires_grad_(False)
        self.scale = ENERGY_SD_NATS / float(self._energy(torch.randn(4096, self.packing.dim)).std())

    def _energy(self, position: Tensor) -> Tensor:
        *noises, x_noise = position.split(GROUP_DIM, dim=1)
        latents = [noises[0]]
        for prior, noise in zip(self.priors, noises[1:], strict=True):
            mean, log_scale = prior(latents[-1]).chunk(2, dim=1)
            latents.append(mean + log_scale.exp() * noise)
        x = self.decoder(torch.cat(latents, dim=1)) + X_SCALE * x_noise
        energy: Tensor = self.energy(x).squeeze(1)
        return energy

    def forward(self, position: Tensor) -> Tensor:
        """Evaluate Phi: ``(C, D)`` to ``(C,)``, nats."""
        return self.scale * self._energy(position)


def _mlp(num_inputs: int, width: int, depth: int, num_outputs: int) -> nn.Sequential:
    widths = [num_inputs, *[width] * depth]
    hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, num_outputs))


def _bare_gradient(potential: Toy, position: Tensor) -> Callable[[], int]:
    def task() -> int:
        for _ in range(BATCHED_EVALS):
            value_and_grad(potential, position)
        return BATCHED_EVALS * len(position)

    return task


def _batched(kernel: Kernel, position: Tensor, evals_per_step: int) -> Callable[[], int]:
    generator, params = stream(0, kernel.name), init_params(position, STEP_SIZE)

    def task() -> int:
        state = kernel.init(position)
        for _ in range(BATCHED_EVALS // evals_per_step):
            state, _ = kernel.step(generator, state, params)
        return (BATCHED_EVALS + 1) * len(position)

    return task


def _batched_in_pyro(kernel: Kernel, position: Tensor, evals_per_step: int) -> Callable[[], int]:
    def task() -> int:
        adapted = PyroKernel(kernel, position, init_params(position, STEP_SIZE), seed=0)
        BatchedMCMC(adapted, BATCHED_EVALS // evals_per_step, 0, disable_progbar=True).run()
        return (BATCHED_EVALS + 1) * len(position)

    return task


def _jax_calls(potential: Toy, position: Tensor) -> Callable[[], int]:
    gradient = jax.jit(jax.vmap(jax.value_and_grad(JaxPotential(potential, position))))
    rows = position.numpy()

    def task() -> int:
        with jax_precision(position.dtype):
            for _ in range(BATCHED_EVALS):
                jax.block_until_ready(gradient(rows))
        return BATCHED_EVALS * len(position)

    return task


def _jax_loop(potential: Toy, position: Tensor) -> Callable[[], int]:
    gradient = jax.vmap(jax.value_and_grad(JaxPotential(potential, position)))
    loop = jax.jit(lambda batches: jax.lax.map(gradient, batches))
    # Different positions, for XLA would take equal evaluations out of the loop.
    steps = STEP_SIZE * np.arange(BATCHED_EVALS, dtype=np.float32)[:, None, None]
    batches = position.numpy() * np.cos(steps) + position.numpy()[::-1] * np.sin(steps)

    def task() -> int:
        with jax_precision(position.dtype):
            jax.block_until_ready(loop(batches))
        return BATCHED_EVALS * len(position)

    return task


def _pyro_hmc(potential: Toy, packing: Packing, position: Tensor) -> Callable[[], int]:
    def task() -> int:
        site_potential = SitePotential(potential, packing)
        kernel = HMC(
            potential_fn=site_potential,
            step_size=STEP_SIZE,
            # Half a step more, for Pyro truncates the quotient.
            trajectory_length=STEP_SIZE * (NUM_STEPS + 0.5),
            adapt_step_size=False,
            adapt_mass_matrix=False,
        )
        sites = {name: site[0].clone() for name, site in packing.unravel(position[:1]).items()}
        mcmc = MCMC(kernel, PYRO_EVALS // NUM_STEPS, 0, initial_params=sites, disable_progbar=True)
        with global_rng(0):
            mcmc.run()
        return site_potential.num_evals

    return task


def _measure(num_groups: int) -> dict[str, dict[str, Any]]:
    with global_rng(num_groups):
        potential = Toy(num_groups)
    flat = Packing({"q": torch.Size([potential.packing.dim])})
    position = torch.randn(max(NUM_CHAINS), potential.packing.dim, generator=stream(0, "position"))
    tasks = {
        "pyro hmc, named sites": _pyro_hmc(potential, potential.packing, position),
        "pyro hmc, one flat site": _pyro_hmc(potential, flat, position),
        "gradient, 1 chain": _bare_gradient(potential, position[:1]),
    }
    for num_chains in NUM_CHAINS:
        rows, suffix = position[:num_chains], f", {num_chains} chains"
        tasks["gradient" + suffix] = _bare_gradient(potential, rows)
        kernels = {
            "hmc splitting": (hmc.build(potential, num_steps=NUM_STEPS), NUM_STEPS),
            "hmc leapfrog": (hmc.build(potential, integrator="leapfrog", num_steps=NUM_STEPS), NUM_STEPS),
            "mala": (langevin.build_mala(potential), 1),
            "langevin": (langevin.build_langevin(potential), 1),
        }
        for name, (kernel, evals_per_step) in kernels.items():
            tasks[name + suffix] = _batched(kernel, rows, evals_per_step)
        tasks["hmc splitting in Pyro's MCMC" + suffix] = _batched_in_pyro(kernels["hmc splitting"][0], rows, NUM_STEPS)
        tasks["gradient by calls of JAX" + suffix] = _jax_calls(potential, rows)
        tasks["gradient in a loop of JAX" + suffix] = _jax_loop(potential, rows)
    return _report(num_groups, potential.packing.dim, rates(tasks, NUM_ROUNDS))


def _report(num_groups: int, dim: int, rounds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    print(f"\n{num_groups} groups, D = {dim}: evaluations per second over all chains, median of {NUM_ROUNDS} rounds")
    results: dict[str, dict[str, Any]] = {}
    lines = []
    for name, rate in rounds.items():
        bare = rounds["gradient," + (name.rsplit(",", 1)[1] if "chain" in name else " 1 chain")]
        row = {
            "evals_per_second": float(torch.tensor(rate).median()),
            "over_pyro_named": ratio(rate, rounds["pyro hmc, named sites"]),
            "over_pyro_flat": ratio(rate, rounds["pyro hmc, one flat site"]),
            "overhead": ratio(bare, rate) - 1,
        }
        ratios = [f"{row['over_pyro_named']:.1f}x", f"{row['over_pyro_flat']:.1f}x", f"{row['overhead']:+.0%}"]
        lines.append([name, f"{row['evals_per_second']:,.0f}", *ratios])
        results[name] = {**row, "rounds": rate}
    headers = ["", "per s", "over pyro, named", "over pyro, flat", "over bare gradient"]
    print(text_table(lines, headers, numbers=range(1, len(headers))))
    return results


def main() -> None:
    """Print the tables and write ``results/batched_vs_pyro.json``."""
    parser_of(__doc__).parse_args()
    print(
        f"goals: hmc at {NUM_CHAINS[-1]} chains {GOAL_RATIO}x pyro's with named sites; overhead of kernels at most "
        f"{GOAL_OVERHEAD:.0%}, of the bridge to JAX at {NUM_CHAINS[0]} chains {GOAL_BRIDGE_OVERHEAD:.0%}"
    )
    write("batched_vs_pyro", {str(num_groups): _measure(num_groups) for num_groups in NUM_GROUPS})


if __name__ == "__main__":
    main()
