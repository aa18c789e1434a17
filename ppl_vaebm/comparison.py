"""Kernels side by side: the same starts, the same number of evaluations of the potential."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference import diagnostics
from ppl_vaebm.inference.chains import Chains, run_chains
from ppl_vaebm.inference.functionals import noise_functionals
from ppl_vaebm.inference.kernels import DEFAULT_STEP_SIZES, build_kernel, start_params
from ppl_vaebm.inference.likelihood import RejectionError, exact_draws
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.pyro_kernel import PyroKernelName, run_pyro
from ppl_vaebm.rng import seed_for, stream

KERNELS: tuple[str, ...] = (*get_args(KernelName), *get_args(PyroKernelName))
NUM_EXACT = 20_000
# Pyro's chains run one after another: these bound the cost of one draw, to 16 and to 63 evaluations at the step that
# their trajectory or tree starts from.
MAX_NUM_STEPS = 16
MAX_TREE_DEPTH = 6


class Budget(NamedTuple):
    """What every kernel may spend."""

    num_chains: int
    num_warmup: int
    """Steps of warm-up; they are counted and timed apart."""
    num_evals: int
    """Evaluations of the potential per chain for the draws."""


class Row(NamedTuple):
    """One kernel's line."""

    kernel: str
    step_size: float
    acceptance: float
    draws: int
    """Per chain."""
    evals: float
    """Per chain, over its draws."""
    max_r_hat: float
    """Largest over functionals."""
    min_ess: float
    """Smallest bulk ESS over functionals, all chains."""
    ess_per_1000_evals: float
    """Of that functional."""
    ess_per_second: float
    """Of that functional, warm-up not counted."""
    mean_energy: float
    energy_error: float
    """Monte Carlo standard error of the mean energy."""
    energy_bias: float
    """Mean energy minus that of exact draws; nan where these cannot be had."""
    divergences: int
    seconds: float
    """Draws and warm-up."""


def check_names(names: Sequence[str]) -> None:
    """Refuse a list of kernels with an unknown or repeated name.

    Raises:
        InputError: naming it and the known ones.
    """
    for name in names:
        if name not in KERNELS:
            raise InputError(f"unknown kernel {name!r}: expected some of {', '.join(KERNELS)}, separated by commas")
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected a list of different kernels, got {', '.join(names) or 'none'}")


def run_kernel(
    name: str, potential: NoisePotential, config: KernelConfig, start: Tensor, budget: Budget, seed: int
) -> Chains:
    """Run one kernel, ours or Pyro's, within a budget.

    Args:
        name: of the kernel, one of :data:`KERNELS`.
        potential: of the VAEBM.
        config: options; step size and target acceptance are used only by the kernel that the configuration names.
        start: ``(num_chains, D)``.
        budget: what it may spend.
        seed: of the chains.

    Returns:
        The chains.
    """
    functionals = noise_functionals(potential)
    if name in get_args(PyroKernelName):
        chains = run_pyro(
            cast(PyroKernelName, name),
            potential,
            potential.packing,
            start,
            seed=seed_for(seed, name),
            num_draws=budget.num_evals,
            num_warmup=budget.num_warmup,
            step_size=DEFAULT_STEP_SIZES["hmc"],
            trajectory_length=(config.num_steps or MAX_NUM_STEPS) * DEFAULT_STEP_SIZES["hmc"],
            max_tree_depth=MAX_TREE_DEPTH,
            functionals=functionals,
            max_evals=budget.num_evals,
        )
        return replace(chains, attrs={**chains.attrs, "seed": seed})
    config = config.of(cast(KernelName, name))
    chains = run_chains(
        build_kernel(config, potential),
        stream(seed, "chains", name, device=start.device),
        start,
        start_params(config, start),
        num_draws=budget.num_evals,
        num_warmup=budget.num_warmup,
        functionals=functionals,
        max_evals=budget.num_evals,
    )
    return replace(chains, attrs={**chains.attrs, "seed": seed})


def exact_energy(potential: NoisePotential, seed: int) -> tuple[float, float]:
    """Return the mean energy of exact draws and its standard error, or nan where there are none to be had."""
    generator = stream(seed, "exact", device=next(potential.vaebm.parameters()).device)
    try:
        draws = exact_draws(potential, generator, NUM_EXACT, max_proposals=2_000_000)
    except RejectionError:
        return math.nan, math.nan
    with torch.no_grad():
        energy = potential(draws.position).double()
    return float(energy.mean()), float(energy.std()) / math.sqrt(len(energy))


def summary_row(chains: Chains, reference_energy: float) -> Row:
    """Boil chains down to a line.

    Args:
        chains: of one kernel.
        reference_energy: mean energy of exact draws, or nan.

    Returns:
        The line; what too few draws cannot tell is nan.
    """
    num_chains, num_draws = chains.stats["lp"].shape
    if num_draws >= diagnostics.MIN_DRAWS:
        summaries = diagnostics.summarize(diagnostics.to_inference_data(chains))
    else:  # the budget is spent: this kernel's line says so, and the other kernels keep theirs
        summaries = [_unknown_summary(chains)]
    slowest = min(summaries, key=lambda row: -math.inf if math.isnan(row.ess_bulk) else row.ess_bulk)
    energy = next(row for row in summaries if row.name == "energy")
    max_r_hat, min_ess = diagnostics.worst(summaries)
    return Row(
        kernel=chains.kernel,
        step_size=float(chains.params.step_size.mean()),
        acceptance=float(chains.stats["acceptance_rate"].mean()),
        draws=num_draws,
        evals=chains.num_evals / num_chains,
        max_r_hat=max_r_hat,
        min_ess=min_ess,
        ess_per_1000_evals=slowest.ess_per_1000_evals,
        ess_per_second=slowest.ess_per_second,
        mean_energy=energy.mean,
        energy_error=energy.mcse_mean,
        energy_bias=energy.mean - reference_energy,
        divergences=int(chains.stats["diverging"].sum()),
        seconds=chains.seconds + chains.warmup_seconds,
    )


def _unknown_summary(chains: Chains) -> diagnostics.FunctionalSummary:
    energy = chains.draws["energy"].double()
    return diagnostics.FunctionalSummary("energy", float(energy.mean()), *[math.nan] * 7)


def to_csv(rows: Sequence[Row]) -> str:
    """Format lines as CSV with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([_short(value) for value in row] for row in rows)
    return text.getvalue()


def to_text(rows: Sequence[Row]) -> str:
    """Format lines as an aligned table."""
    table = [list(Row._fields), *([str(_short(value)) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(Row._fields))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def _short(value: str | float) -> str | float:
    return float(f"{value:.4g}") if isinstance(value, float) else value
