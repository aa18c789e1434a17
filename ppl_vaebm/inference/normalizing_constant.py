"""The log Z of a VAEBM by everything that can estimate it, and whether to believe it.

Annealing gives a bound from either side. Every other estimate has another weakness: VAE samples and the bridge need
overlap, a ladder needs round trips, a sequential sampler needs ancestors. Where they agree, none of these bites.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns, nested_r_hat
from ppl_vaebm.inference.kernels.base import KernelState, Ladder, init_params, value_only
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.likelihood import RejectionError, exact_draws
from ppl_vaebm.inference.log_z import ais, smc
from ppl_vaebm.inference.log_z.annealing import default_kernel
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp
from ppl_vaebm.inference.log_z.bridge import bridge
from ppl_vaebm.inference.log_z.thermodynamic import Integral, integrate, ladder_bridge
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import stream

# What is spent beside the particles. Chosen by us, so that digits take a few minutes on one core.
NUM_PILOT = 128
NUM_POPULATIONS = 8
"""Independent sequential samplers; they share the particles."""
NUM_EXACT = 2_000
"""Exact draws of h that are asked for; chains take their place where rejection cannot give so many."""
NUM_CHAIN_WARMUP, NUM_CHAIN_DRAWS = 50, 50
"""Steps of those chains, one for each particle, from where the sequential samplers ended."""
NUM_LADDERS, NUM_LADDER_WARMUP, NUM_LADDER_DRAWS = 32, 150, 200
IDEAL_GAP_NATS, LEAST_TEMPERATURES, MOST_TEMPERATURES = 0.1, 50, 1_000
"""So many temperatures that moves which forget where they came from would leave this gap; within these numbers."""

LOWER, UPPER = "annealing, forward: a lower bound", "annealing, reverse: an upper bound"


class TargetDraws(NamedTuple):
    """Draws of h for what starts there."""

    position: Tensor
    """One for each particle, ``(N, D)``."""
    energy: Tensor
    """E of the draws, ``(chains, draws)``; exact ones are chains of one draw. Nats."""
    source: str
    """Where they come from."""
    r_hat: float | None
    """Of the chains, nested, each population's a group; the worse of E and |eps|^2 / D. ``None`` for exact draws."""


class LogZEstimates(NamedTuple):
    """The estimates and how they were made."""

    estimates: dict[str, LogZ | str]
    """By name; a sentence where a way failed."""
    lower: ais.AnnealedEstimate
    upper: ais.AnnealedEstimate
    integral: Integral
    """Behind ``thermodynamic integration``."""
    ladder_r_hat: float
    """The worst over the energies at the levels of its ladders."""
    ladder_report: dict[str, float | list[float]]
    """What its kernel reports."""
    pilot: smc.Population
    down: ais.AnnealedWeights
    up: ais.AnnealedWeights
    populations: list[smc.Population]
    target: TargetDraws

    @property
    def middle(self) -> LogZ:
        """The middle of the two bounds, which err by like amounts in opposite directions."""
        low, high = self.lower.log_z, self.upper.log_z
        error = 0.5 * math.hypot(low.error, high.error)
        return LogZ(0.5 * (low.value + high.value), error, min(low.ess, high.ess))


def estimate_log_z(
    potential: NoisePotential,
    reference_energy: Tensor,
    seed: int,
    num_particles: int,
    num_temperatures: int | None = None,
) -> LogZEstimates:
    """Estimate log Z by annealing both ways, sequentially, from ladders, by a bridge, and from VAE samples.

    Args:
        reference_energy: E of VAE samples, ``(n,)``, nats; rejection may take as many again.
        num_particles: of each direction of annealing, and of all sequential samplers together; at least two for each
            of these.
        num_temperatures: steps of annealing; ``None`` follows the pilot.

    Raises:
        InputError: annealing was not possible; the sentence says why.
    """

    def named(purpose: str) -> torch.Generator:
        # The name of the stream is that of earlier versions, so that a seed gives the same numbers.
        return stream(seed, "normaliser", purpose, device=reference_energy.device)

    generator = named("pilot")
    pilot = smc.run_smc(potential, generator, potential.draw_reference(generator, NUM_PILOT), smc.Adaptive())
    num_temperatures = num_temperatures or smc.num_temperatures_for(
        pilot, IDEAL_GAP_NATS, LEAST_TEMPERATURES, MOST_TEMPERATURES
    )
    ladder = smc.spaced_ladder(pilot, num_temperatures)
    generator = named("forward")
    start = potential.draw_reference(generator, num_particles)
    down = ais.anneal(potential, generator, start, ladder)
    generator, size = named("smc"), max(2, num_particles // NUM_POPULATIONS)
    populations = [
        smc.run_smc(potential, generator, potential.draw_reference(generator, size), ladder)
        for _ in range(NUM_POPULATIONS)
    ]
    target = target_draws(potential, named("target"), populations, ladder, len(reference_energy))
    up = ais.anneal(potential, named("reverse"), target.position, ladder, "reverse")
    lower = ais.estimate(down.log_weights, named("bootstrap down"), "forward")
    upper = ais.estimate(up.log_weights, named("bootstrap up"), "reverse")
    levels, energy, chains = ladder_energies(potential, named("ladders"))
    integral = integrate(levels, energy)
    estimates: dict[str, LogZ | str] = {
        LOWER: lower.log_z,
        UPPER: upper.log_z,
        "sequential samplers": smc.combine(populations),
        "thermodynamic integration": integral.log_z,
        "bridges between levels": _attempt(lambda: ladder_bridge(levels, energy)),
        "bridge from the VAE to h": _attempt(lambda: bridge(-reference_energy.unsqueeze(1), -target.energy).log_z),
        "VAE samples": log_mean_exp(-reference_energy),
    }
    report = {name: value for name, value in chains.attrs.items() if isinstance(value, (float, int, list))}
    return LogZEstimates(
        estimates, lower, upper, integral, _worst_r_hat(energy), report, pilot, down, up, populations, target
    )


def _attempt(estimator: Callable[[], LogZ]) -> LogZ | str:
    try:
        return estimator()
    except InputError as error:
        return str(error)


def target_draws(
    potential: NoisePotential,
    generator: torch.Generator,
    populations: list[smc.Population],
    ladder: Ladder,
    max_proposals: int,
) -> TargetDraws:
    """Draw from h, as often as there are particles: exactly if rejection can within ``max_proposals`` VAE samples.

    Else chains run from the populations' ends, with the last step size of the ladder.
    """
    starts = torch.cat([smc.equal_draws(population, generator) for population in populations])
    try:
        exact = exact_draws(potential, generator, max(NUM_EXACT, len(starts)), max_proposals)
    except RejectionError:
        return _chain_draws(potential, generator, starts, float(ladder.step_sizes[-1]), len(populations))
    energy = value_only(potential, exact.position)
    source = f"exact draws, by rejection from the VAE (acceptance {exact.acceptance_rate:.2g})"
    return TargetDraws(exact.position[: len(starts)], energy.unsqueeze(1), source, None)


def _chain_draws(
    potential: NoisePotential, generator: torch.Generator, starts: Tensor, step_size: float, num_populations: int
) -> TargetDraws:
    kernel = default_kernel(potential)
    # The pilot tuned the step, so the warm-up has nothing to tune: its draws are thrown away.
    chains = run_chains(
        kernel,
        generator,
        starts,
        init_params(starts, step_size),
        num_draws=NUM_CHAIN_WARMUP + NUM_CHAIN_DRAWS,
        functionals=_energy_and_square,
    )
    draws = chains.draws["columns"][:, NUM_CHAIN_WARMUP:]
    source = (
        f"the ends of {len(starts)} {kernel.name} chains of {NUM_CHAIN_WARMUP + NUM_CHAIN_DRAWS} steps, from where "
        "the sequential samplers ended"
    )
    groups = np.arange(num_populations).repeat(len(starts) // num_populations)
    columns = draws.double().cpu().numpy()
    r_hat = max(nested_r_hat(columns[:, :, column], groups) for column in range(columns.shape[2]))
    return TargetDraws(chains.position, draws[:, :, 0], source, r_hat)


def _energy_and_square(state: KernelState) -> dict[str, Tensor]:
    return {"columns": torch.stack([state.potential, state.position.square().mean(1)], dim=1)}


def ladder_energies(potential: NoisePotential, generator: torch.Generator) -> tuple[Tensor, Tensor, Chains]:
    """Run tempered chains from fresh noise and store the energy at every level.

    Returns:
        Inverse temperatures ``(K + 1,)``; energies ``(C, N, K + 1)``, nats; the chains.
    """
    config = KernelConfig(name="tempered")
    start = potential.draw_reference(generator, NUM_LADDERS)
    chains = run_chains(
        build_kernel(config, potential),
        generator,
        start,
        start_params(config, start),
        num_draws=NUM_LADDER_DRAWS,
        num_warmup=NUM_LADDER_WARMUP,
        functionals=_level_energies,
    )
    assert chains.params.ladder is not None
    return chains.params.ladder.inverse_temperatures, chains.draws["energy"], chains


def _level_energies(state: KernelState) -> dict[str, Tensor]:
    assert state.replicas is not None
    return {"energy": torch.cat([state.replicas.potential, state.potential.unsqueeze(1)], dim=1)}


def _worst_r_hat(draws: Tensor) -> float:
    """Return the largest R-hat over the columns of draws ``(C, N, k)``; nan where any is."""
    return float(torch.from_numpy(diagnose_columns(draws.double().cpu().numpy()).r_hat).max())
