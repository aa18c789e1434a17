"""From chains of several kernels and seeds to one table: a line for each kernel, mean and spread over seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppl_vaebm.evaluation.kernel_files import Outcome
from ppl_vaebm.evaluation.kernels import Budget, Reference, mode_counts
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, attribute_list, cut, scalar_draws, stat
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, FloatArray, diagnose_columns
from ppl_vaebm.inference.diagnostics.summary import notes


class Measures(NamedTuple):
    """What one run of a kernel gave, or the mean or the standard deviation of that over seeds.

    All but ``ess_at_equal_seconds`` is of the draws up to the budget's evaluations.
    """

    step_size: float
    acceptance: float
    draws: float
    """Per chain."""
    evals: float
    """Per chain, over its draws."""
    max_r_hat: float
    """Largest over functionals."""
    min_ess: float
    """Smallest bulk ESS over functionals, all chains; so are the next four."""
    ess_per_1000_evals: float
    ess_per_second: float
    """Warm-up not counted."""
    ess_per_second_with_warmup: float
    ess_at_equal_seconds: float
    """Of the draws up to the budget's seconds; nan where the chains stopped before, or had made fewer than 4."""
    mean_energy: float
    energy_error: float
    """Monte Carlo standard error of the mean energy."""
    energy_bias: float
    """Mean energy minus that of exact draws; nan where these cannot be had."""
    modes_found: float
    """Modes with at least one draw within three standard deviations; nan where the data's are not known."""
    mode_kl: float
    """KL divergence, in nats, of the draws' shares of the modes from those of exact draws, or from equal shares."""
    divergences: float
    seconds: float
    """Of the draws."""
    warmup_seconds: float


class SeedRow(NamedTuple):
    """One kernel with one seed."""

    measures: Measures
    worst_functional: str
    """That of ``max_r_hat``."""
    slowest_functional: str
    """That of ``min_ess``."""


class Row(NamedTuple):
    """One kernel's line."""

    kernel: str
    is_adjusted: bool | None
    """Whether a Metropolis test makes it exact; ``None`` where no seed ran."""
    num_seeds: int
    """Seeds that ran."""
    mean: Measures
    sd: Measures
    """Standard deviation over seeds; nan with one."""
    bias_sigmas: float
    """Bias of the mean energy over seeds in units of its standard error: the chains' own or the spread over seeds,
    whichever is larger, and that of the exact draws."""
    worst_functional: str
    """That of the seed with the largest R-hat."""
    slowest_functional: str
    """That of the seed with the smallest ESS."""
    note: str
    """What has to be known of the line, or why there is none."""


_NAN = Measures(*[math.nan] * len(Measures._fields))


def kernel_row(kernel: str, outcomes: Sequence[Outcome], budget: Budget, reference: Reference) -> Row:
    """Boil a kernel's seeds down to a line.

    Args:
        kernel: its name.
        outcomes: of every seed.
        budget: what each was given.
        reference: what is known of the target.

    Returns:
        The line; what too few draws cannot tell is nan, and so are means over seeds of which one cannot tell.
    """
    chains = [outcome.idata for outcome in outcomes if outcome.idata is not None]
    runs = [seed_row(idata, budget, reference) for idata in chains]
    note = "; ".join(_notes(outcomes, budget))
    if not runs:
        return Row(kernel, None, 0, _NAN, _NAN, math.nan, "", "", note)
    table = np.array([row.measures for row in runs])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a standard deviation of one seed is nan
        sd = table.std(axis=0, ddof=1)
    mean = Measures(*table.mean(axis=0).tolist())
    errors = table[:, Measures._fields.index("energy_error")]
    # Chains that have not mixed underestimate their own error, and then the spread over seeds is the better one.
    spread = sd[Measures._fields.index("energy_bias")]
    error = math.sqrt(np.fmax(np.square(errors).mean(), np.square(spread)) / len(runs))
    error = math.hypot(error, reference.energy_error)
    worst = max(runs, key=lambda row: _nan_as(math.inf, row.measures.max_r_hat))
    slowest = min(runs, key=lambda row: _nan_as(-math.inf, row.measures.min_ess))
    return Row(
        kernel=kernel,
        is_adjusted=bool(chains[0]["posterior"].attrs["is_adjusted"]),
        num_seeds=len(runs),
        mean=mean,
        sd=Measures(*sd.tolist()),
        bias_sigmas=mean.energy_bias / error if error else math.nan,
        worst_functional=worst.worst_functional,
        slowest_functional=slowest.slowest_functional,
        note=note,
    )


def seed_row(idata: InferenceData, budget: Budget, reference: Reference) -> SeedRow:
    """Measure one run of a kernel.

    Args:
        idata: its chains.
        budget: what it was given.
        reference: what is known of the target.

    Returns:
        The measures.
    """
    kept = cut(idata, draws_within_evals(idata, budget.num_evals))
    attrs = kept["posterior"].attrs
    num_chains, num_draws = stat(kept, "lp").shape
    if num_draws >= MIN_DRAWS:
        summaries = diagnostics.summarize(kept)
    else:  # the budget is spent: this kernel's line says so, and the other kernels keep theirs
        unknown = [math.nan] * (len(diagnostics.QuantitySummary._fields) - 2)
        energy_mean = float(scalar_draws(kept)["energy"].mean())
        summaries = [diagnostics.QuantitySummary("energy", energy_mean, *unknown)]
    worst, slowest = diagnostics.worst(summaries)
    energy = next(row for row in summaries if row.name == "energy")
    modes_found, mode_kl = _mode_coverage(kept, reference)
    seconds, warmup_seconds = float(attrs["seconds"]), float(attrs["warmup_seconds"])
    measures = Measures(
        step_size=float(stat(kept, "step_size").mean()),
        acceptance=float(stat(kept, "acceptance_rate").mean()),
        draws=num_draws,
        evals=attrs["num_evals"] / num_chains,
        max_r_hat=worst.r_hat,
        min_ess=slowest.ess_bulk,
        ess_per_1000_evals=slowest.ess_per_1000_evals,
        ess_per_second=slowest.ess_per_second,
        ess_per_second_with_warmup=slowest.ess_bulk / (seconds + warmup_seconds),
        ess_at_equal_seconds=_ess_within_seconds(idata, budget.num_seconds),
        mean_energy=energy.mean,
        energy_error=energy.mcse_mean,
        energy_bias=energy.mean - reference.energy,
        modes_found=modes_found,
        mode_kl=mode_kl,
        divergences=diagnostics.num_divergent(kept),
        seconds=seconds,
        warmup_seconds=warmup_seconds,
    )
    return SeedRow(measures, worst.name, slowest.name)


def _nan_as(value: float, number: float) -> float:
    return value if math.isnan(number) else number


# --- equal budgets -----------------------------------------------------------------------------------


def mean_evals(idata: InferenceData) -> FloatArray:
    """Return the evaluations per chain up to the end of every draw, ``(N,)``."""
    spent: FloatArray = stat(idata, "n_steps").mean(axis=0).cumsum()
    return spent


def elapsed_seconds(idata: InferenceData) -> FloatArray:
    """Return the seconds up to the end of every draw, over all chains, ``(N,)``; by evaluations if not measured."""
    if "elapsed" in idata["sample_stats"]:
        elapsed: FloatArray = stat(idata, "elapsed")[0]
        return elapsed
    evals = mean_evals(idata)
    shared: FloatArray = evals / evals[-1] * float(idata["posterior"].attrs["seconds"])
    return shared


def draws_within_evals(idata: InferenceData, num_evals: float) -> int:
    """Count the draws up to and with the one that reaches so many evaluations per chain; all if none does."""
    evals = mean_evals(idata)
    return min(len(evals), int(np.searchsorted(evals, num_evals)) + 1)


def draws_within_seconds(idata: InferenceData, num_seconds: float) -> int:
    """Count the draws that ended within a time; 0 where the chains stopped before they had used it."""
    elapsed = elapsed_seconds(idata)
    return int(np.searchsorted(elapsed, num_seconds, side="right")) if elapsed[-1] >= num_seconds else 0


def _ess_within_seconds(idata: InferenceData, num_seconds: float) -> float:
    num_draws = draws_within_seconds(idata, num_seconds)
    if num_draws < MIN_DRAWS:
        return math.nan
    columns = np.stack([draws[:, :num_draws] for draws in scalar_draws(idata).values()], axis=-1)
    return float(diagnose_columns(columns).ess_bulk.min())


def _mode_coverage(idata: InferenceData, reference: Reference) -> tuple[float, float]:
    if reference.modes is None:
        return math.nan, math.nan
    x = idata["posterior"]["x"].to_numpy().reshape(-1, reference.modes.shape[1]).astype(np.float64)
    counts = mode_counts(x, reference.modes, reference.mode_std)
    weights = np.full(len(counts), 1 / len(counts)) if reference.mode_weights is None else reference.mode_weights
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = counts / counts.sum()
        terms = np.where(shares > 0, shares * np.log(shares / weights), shares)
    return float((counts > 0).sum()), float(terms.sum())


# --- notes -------------------------------------------------------------------------------------------


def _notes(outcomes: Sequence[Outcome], budget: Budget) -> list[str]:
    """Say what failed, and what chains are wrong with, each sentence once with the seeds that it is of."""
    found: dict[str, list[int]] = {}
    for outcome in outcomes:
        sentences = [outcome.error] if outcome.idata is None else _run_notes(outcome.idata, budget)
        for sentence in sentences:
            found.setdefault(sentence, []).append(outcome.seed)
    return [
        sentence if len(seeds) == len(outcomes) else f"seed {', '.join(map(str, seeds))}: {sentence}"
        for sentence, seeds in found.items()
    ]


def _run_notes(idata: InferenceData, budget: Budget) -> list[str]:
    attrs = idata["posterior"].attrs
    found = notes(cut(idata, draws_within_evals(idata, budget.num_evals)), counts_divergences=False)
    if elapsed_seconds(idata)[-1] < budget.num_seconds:
        found.append(f"stopped before {budget.num_seconds:g} s, so there is no ESS at equal seconds")
    rates = attribute_list(idata, "swap_rates")
    if rates:
        found.append(f"swaps accepted {min(rates):.1f} to {max(rates):.1f}")
    if attrs.get("num_evals_computed", 0) > 1.05 * stat(idata, "n_steps").sum():
        found.append("chains wait for the longest trajectory, and what is evaluated while they wait is not counted")
    return found
