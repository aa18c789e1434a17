"""Runs of kernels for a comparison: all have the same starts and the same budgets of evaluations and time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.config.kernel import LEAPFROG_HMC
from ppl_vaebm.data.load import Data
from ppl_vaebm.evaluation.metrics.modes import mode_counts
from ppl_vaebm.inference.bridges.jax_runner import JaxKernelName, run_jax
from ppl_vaebm.inference.bridges.pyro_samplers import PyroKernelName, run_pyro
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions
from ppl_vaebm.inference.diagnostics.convergence import FloatArray
from ppl_vaebm.inference.diagnostics.functionals import noise_functionals
from ppl_vaebm.inference.kernels.base import value_only
from ppl_vaebm.inference.kernels.chains import Chains, Functionals, run_chains
from ppl_vaebm.inference.kernels.registry import DEFAULT_STEP_SIZES, build_kernel, start_params
from ppl_vaebm.inference.latent_exchange import with_swaps
from ppl_vaebm.inference.likelihood import RejectionError, exact_draws
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.rng import seed_for, stream

UNADJUSTED = ("langevin",)
"""Kernels without a Metropolis test among ours; chains of JAX report it themselves."""

NUM_EXACT = 20_000
MAX_PROPOSALS = 2_000_000
# Most draws per chain where time is to be filled: 200 MB of functionals for 8 chains in two dimensions.
MAX_DRAWS = 50_000
# Without a bound a few long trajectories would spend the budget. One draw of Pyro's HMC takes at most 16 evaluations at
# its first step size, and one of any NUTS 63.
COMPARED_MAX_NUM_STEPS = 16
COMPARED_MAX_TREE_DEPTH = 6
# Pyro's chains run one by one for equal times and are cut to the fewest draws, so they get more time. Chosen by us.
PYRO_SLACK = 1.5


class Budget(NamedTuple):
    """Limits on what every kernel spends."""

    num_chains: int
    num_warmup: int
    """Steps of warm-up, counted and timed separately."""
    num_evals: int
    """Evaluations of the potential per chain for the draws."""
    num_seconds: float = 0.0
    """Least time of the draws of all chains."""


class Reference(NamedTuple):
    """Properties of the target that are known without chains."""

    energy: float
    """Mean E of exact draws, nats; nan where there are none."""
    energy_error: float
    """Standard error of ``energy``."""
    modes: FloatArray | None = None
    """Centers of the data's modes, ``(m, d)``, where they are known."""
    mode_std: float = math.nan
    """Standard deviation of each."""
    mode_weights: FloatArray | None = None
    """Probabilities of the modes under the target, ``(m,)``, from exact draws; ``None`` where there are none."""


def starts(potential: NoisePotential, num_chains: int, seed: int, chains_per_start: int = 1) -> Tensor:
    """Draw starts ``(num_chains, D)`` from N(0, I), each for ``chains_per_start`` neighbouring chains."""
    device = next(potential.vaebm.parameters()).device
    position = potential.draw_reference(stream(seed, "start", device=device), num_chains // chains_per_start)
    return position.repeat_interleave(chains_per_start, 0)


def run_kernel(
    name: str,
    potential: NoisePotential,
    config: KernelConfig,
    start: Tensor,
    budget: Budget,
    seed: int,
    functionals: Functionals | None = None,
) -> Chains:
    """Run one kernel, ours or another library's, within a budget.

    Where the energy has a term of the first latent alone, our kernels swap it with chains of that term.

    Args:
        name: one of :data:`~ppl_vaebm.config.kernel.COMPARABLE_KERNELS`.
        config: step size and target acceptance apply to the kernel that it names only.
        start: ``(num_chains, D)``.
        functionals: scalar summaries to store of each draw; the default is :func:`noise_functionals`.

    Returns:
        The chains; ``attrs`` has the seed, and ``is_adjusted``: whether a Metropolis test makes the kernel exact.
    """
    num_draws = max(budget.num_evals, MAX_DRAWS) if budget.num_seconds else budget.num_evals
    functionals = functionals or noise_functionals(potential)
    options = SamplerOptions(budget.num_warmup, max_tree_depth=COMPARED_MAX_TREE_DEPTH)
    limits = Limits(num_draws, budget.num_evals, budget.num_seconds)
    common: dict[str, Any] = {"seed": seed_for(seed, name), "functionals": functionals}
    if name in get_args(PyroKernelName):
        step_size = DEFAULT_STEP_SIZES["hmc"]
        length = (config.num_steps or COMPARED_MAX_NUM_STEPS) * step_size
        options = options._replace(step_size=step_size, trajectory_length=length)
        limits = limits._replace(min_seconds=PYRO_SLACK * budget.num_seconds)
        chains = run_pyro(cast(PyroKernelName, name), potential, potential.packing, start, options, limits, **common)
    elif name in get_args(JaxKernelName):
        chains = run_jax(cast(JaxKernelName, name), potential, start, options, limits, **common)
    else:
        config = _own_config(name, config)
        kernel = with_swaps(build_kernel(config, potential), potential)
        generator = stream(seed, "chains", name, device=start.device)
        params, limited = start_params(config, start), limits._asdict()
        chains = run_chains(
            kernel, generator, start, params, num_warmup=budget.num_warmup, functionals=functionals, **limited
        )
    return replace(
        chains, kernel=name, attrs={"is_adjusted": int(name not in UNADJUSTED), **chains.attrs, "seed": seed}
    )


def _own_config(name: str, config: KernelConfig) -> KernelConfig:
    if name != LEAPFROG_HMC:
        return config.of(cast(KernelName, name))
    if config.name == "hmc" and config.integrator == "leapfrog":
        return config
    # Step and target were chosen for another integrator.
    return replace(config, name="hmc", integrator="leapfrog", step_size=None, target_acceptance=None)


def reference(potential: NoisePotential, data: Data, seed: int) -> Reference:
    """Compute the reference; nan without weights where the energy is not finite or rejection from the VAE fails."""
    modes = None if data.modes is None else data.modes.double().numpy()
    unknown = Reference(math.nan, math.nan, modes, data.mode_std or math.nan)
    device = next(potential.vaebm.parameters()).device
    pilot = value_only(potential, potential.draw_reference(stream(seed, "pilot", device=device), 64))
    if not pilot.isfinite().all():
        return unknown  # rejection would never accept
    try:
        draws = exact_draws(potential, stream(seed, "exact", device=device), NUM_EXACT, MAX_PROPOSALS).position
    except RejectionError:
        return unknown
    energy = value_only(potential, draws).double()
    known = unknown._replace(energy=float(energy.mean()), energy_error=float(energy.std()) / math.sqrt(len(energy)))
    if data.modes is None:
        return known
    x = torch.cat([potential.decode(rows).flatten(1) for rows in draws.split(potential.rows_per_pass)]).cpu()
    counts = mode_counts(x, data.modes, known.mode_std).double()
    return known._replace(mode_weights=(counts / counts.sum()).numpy())
