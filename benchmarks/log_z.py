"""log Z by annealing both ways, by sequential samplers, from ladders and by a bridge, against VAE samples.

The models are a random one, whose energy has a standard deviation of 2.5 nats under N(0, I), and fitted runs of the
command line. Their importance weights have a large effective sample size, so that log Z from millions of VAE samples is
the reference. Where x has two values, the density exp(log p - E - log Z) is also summed over a fine grid of the plane.
On every model, annealing by the default kernel (a cycle of independence Metropolis and HMC) is compared with HMC alone
at equal evaluations.

Limit: the error of the VAE samples.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.log_z [RUN ...]``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import parser_of, write
from ppl_vaebm.config import ModelConfig
from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.likelihood import log_p, reference_energies
from ppl_vaebm.inference.log_z import ais
from ppl_vaebm.inference.log_z.annealing import BuildKernel, default_kernel
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp
from ppl_vaebm.inference.log_z.smc import Adaptive, run_smc, spaced_ladder
from ppl_vaebm.inference.normalizing_constant import estimate_log_z
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM, build_vae
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs.loading import load_run

ENERGY_SD_NATS, GAIN, WIDTH, DEPTH = 2.5, 2.0, 256, 2
# Draws of the VAE and particles: of points, and of images, whose evaluations cost fifty times as much.
MANY, FEW = (4_000_000, 2_048), (200_000, 256)
MAX_CHEAP_DIM = 20
# Temperatures of the cycle and of HMC alone: five evaluations a move against three.
EQUAL_COST = {"cycle": (default_kernel, 60), "HMC alone": (lambda potential: hmc.build(potential, num_steps=3), 100)}
GRID_EDGE, GRID_STEP, GRID_IMPORTANCE = 3.2, 0.04, 600


class RandomEnergy(Energy):
    """A random net of x, shifted and scaled."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2, WIDTH, WIDTH, WIDTH)
        layers = [nn.Linear(one, other) for one, other in zip(sizes, sizes[1:], strict=False)]
        # Bounded units: were E to fall with |x| without end, Z would be infinite.
        self.net = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(WIDTH, 1))
        self.mean, self.scale = 0.0, 1.0

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate E, ``(n,)`` nats."""
        energy: Tensor = (self.net(x).squeeze(1) - self.mean) * self.scale
        return energy


def random_potential() -> NoisePotential:
    """Make the random model: two groups of two latents, x in the plane."""
    with global_rng(0):
        vae = build_vae(ModelConfig(latents=(2, 2), width=WIDTH, depth=DEPTH), torch.Size([2]), None)
        energy = RandomEnergy()
    with torch.no_grad():
        for layer in (*vae.modules(), *energy.modules()):
            if isinstance(layer, nn.Linear):
                layer.weight *= GAIN
    potential = noise_potential(VAEBM(vae.eval(), energy.requires_grad_(False)))
    energies = reference_energies(potential, stream(0, "scale"), 100_000)
    energy.mean, energy.scale = float(energies.mean()), ENERGY_SD_NATS / float(energies.std())
    return potential


def measure(potential: NoisePotential, seed: int) -> dict[str, Any]:
    """Estimate one model's log Z by every method, against VAE samples."""
    num_draws, num_particles = MANY if potential.packing.dim <= MAX_CHEAP_DIM else FEW
    start = time.process_time()
    energy = reference_energies(potential, stream(seed, "truth"), num_draws)
    truth = log_mean_exp(-energy)
    print(f"  {num_draws} VAE samples: {truth.value:.4f} +- {truth.error:.4f}, ", end="")
    print(f"{truth.ess:.0f} effective, sd of E {energy.std():.2f}, {time.process_time() - start:.0f} s")
    start = time.process_time()
    found = estimate_log_z(potential, energy[:200_000], seed, num_particles)
    seconds = time.process_time() - start
    rows: dict[str, Any] = {}
    for name, estimate in found.estimates.items():
        if isinstance(estimate, str):
            rows[name] = estimate
            continue
        rows[name] = {**estimate._asdict(), "less_truth": estimate.value - truth.value}
        print(f"  {name:36}{estimate.value:9.4f} +- {estimate.error:.4f}, off {estimate.value - truth.value:+.4f}")
    gap = found.upper.log_z.value - found.lower.log_z.value
    print(f"  gap {gap:+.4f}; mean log weights {found.lower.mean_log_weight.value:.3f}", end="")
    print(f" to {found.upper.mean_log_weight.value:.3f}; {len(found.down.acceptance_rate) + 1} temperatures, ", end="")
    print(f"barrier {found.pilot.barrier:.2f}, {seconds:.0f} s; {found.target.source}")
    return {
        "dim": potential.packing.dim,
        "truth": truth._asdict(),
        "estimates": rows,
        "gap": gap,
        "middle": found.middle.value,
        "mean_log_weights": [found.lower.mean_log_weight.value, found.upper.mean_log_weight.value],
        "discretisation": found.integral.discretisation,
        "num_temperatures": len(found.down.acceptance_rate) + 1,
        "num_particles": num_particles,
        "barrier": found.pilot.barrier,
        "seconds": seconds,
        "reverse_starts": found.target.source,
        "r_hat": found.target.r_hat,
        "kernels": compare_kernels(potential, truth, num_particles, seed),
    }


def compare_kernels(potential: NoisePotential, truth: LogZ, num_particles: int, seed: int) -> dict[str, Any]:
    """Anneal forwards at equal evaluations by both kernels; what counts is how far the mean log weight falls short."""
    rows = {}
    for name, (build, num_temperatures) in EQUAL_COST.items():
        down = anneal(potential, build, num_temperatures, num_particles, stream(seed, "kernels", name))
        found = ais.estimate(down.log_weights, stream(seed, "bootstrap"), "forward")
        shortfall, error = truth.value - found.mean_log_weight.value, found.mean_log_weight.error
        evals = down.num_evals / num_particles
        print(f"  {name:10}{num_temperatures:4} temperatures, {evals:.0f} evaluations: ", end="")
        print(f"mean log weight {shortfall:.3f} +- {error:.3f} below log Z, {found.log_z.ess:.0f} effective")
        rows[name] = {
            "num_temperatures": num_temperatures,
            "evals_per_particle": evals,
            "shortfall_of_mean_log_weight": shortfall,
            "shortfall_error": error,
            "ess": found.log_z.ess,
            "log_z": found.log_z.value,
            "log_z_error": found.log_z.error,
        }
    return rows


def anneal(
    potential: NoisePotential, build: BuildKernel, num_temperatures: int, num: int, generator: torch.Generator
) -> ais.AnnealedWeights:
    """Anneal particles by a kernel with a pilot of its own."""
    pilot = run_smc(potential, generator, potential.draw_reference(generator, 128), Adaptive(), build=build)
    ladder = spaced_ladder(pilot, num_temperatures)
    return ais.anneal(potential, generator, potential.draw_reference(generator, num), ladder, build=build)


def mass_on_the_plane(potential: NoisePotential, log_z: float) -> dict[str, float]:
    """Sum exp(log p - E - log Z) over a grid; its step is under a standard deviation of the narrowest mode."""
    axis = torch.arange(-GRID_EDGE, GRID_EDGE + GRID_STEP / 2, GRID_STEP)
    x = torch.cartesian_prod(axis, axis)
    found = log_p(potential.vaebm.vae, x, 0, GRID_IMPORTANCE)
    with torch.no_grad():
        energy = potential.vaebm.energy(x).double()
    density = (found.value - energy - log_z).exp() * GRID_STEP**2
    of_p = found.value.exp() * GRID_STEP**2
    rows = {
        "mass_of_h": float(density.sum()),
        "error": float((density * found.error).square().sum().sqrt()),
        "mass_of_p": float(of_p.sum()),
        "points": len(x),
    }
    print(f"  the plane holds {rows['mass_of_h']:.4f} +- {rows['error']:.4f} of h, {rows['mass_of_p']:.4f} of p")
    return rows


def main() -> None:
    """Measure every model."""
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a fitted run")
    runs = parser.parse_args().runs
    results: dict[str, Any] = {}
    models = {"random": random_potential(), **{run.name: load_run(run).potential for run in runs}}
    for name, potential in models.items():
        print(f"\n{name}, D = {potential.packing.dim}")
        results[name] = measure(potential, 0)
        if name != "random" and potential.vaebm.vae.model.event_shape == torch.Size([2]):
            results[name]["plane"] = mass_on_the_plane(potential, results[name]["truth"]["value"])
            shift = results[name]["truth"]["value"] - results[name]["middle"]
            results[name]["plane_with_the_middle_of_the_bounds"] = results[name]["plane"]["mass_of_h"] * math.exp(shift)
    write("log_z", results)


if __name__ == "__main__":
    main()
