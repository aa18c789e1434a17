"""Table of a comparison of kernels: a row for each kernel with mean and standard deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ppl_vaebm.evaluation.kernel_files import Outcome
from ppl_vaebm.evaluation.kernels import Budget, Reference
from ppl_vaebm.evaluation.metrics.modes import mode_counts
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import InferenceData, attribute_list, cut, scalar_draws, stat
from ppl_vaebm.inference.diagnostics.convergence import MIN_DRAWS, FloatArray, diagnose_columns
from ppl_vaebm.inference.diagnostics.summary import digits, notes, r_hat_text, without_empty_columns
from ppl_vaebm.tables import text_table


class Measures(NamedTuple):
    """Measures of one run of a kernel, or their means or standard deviations over seeds.

    All but ``ess_at_equal_seconds`` are of the draws up to the budget's evaluations.
    """

    step_size: float
    acceptance: float
    draws: float
    """Per chain."""
    evals: float
    """Per chain, over its draws."""
    max_r_hat: float
    """Largest over scalar summaries (functionals of the state)."""
    min_ess: float
    """Smallest bulk ESS over scalar summaries, of all chains together; the next four rest on it too."""
    ess_per_1000_evals: float
    ess_per_second: float
    """Without warm-up."""
    ess_per_second_with_warmup: float
    ess_at_equal_seconds: float
    """Of the draws up to the budget's seconds; nan where the chains stopped earlier or have fewer than 4 draws."""
    mean_energy: float
    energy_error: float
    """Monte Carlo standard error of the mean energy."""
    energy_bias: float
    """Mean energy minus that of exact draws; nan without exact draws."""
    modes_found: float
    """Modes with at least one draw within three standard deviations; nan where the data have no known modes."""
    mode_kl: float
    """KL divergence, in nats, of the fractions of draws at the modes from those of exact draws, or from equal ones."""
    divergences: float
    seconds: float
    """Of the draws."""
    warmup_seconds: float


class SeedRow(NamedTuple):
    """One kernel with one seed."""

    measures: Measures
    worst_functional: str
    """Summary with ``max_r_hat``."""
    slowest_functional: str
    """Summary with ``min_ess``."""


class Row(NamedTuple):
    """One kernel in the table."""

    kernel: str
    is_adjusted: bool | None
    """Whether a Metropolis test makes it exact; ``None`` where no seed has chains."""
    num_seeds: int
    """Seeds with chains."""
    mean: Measures
    sd: Measures
    """Standard deviation over seeds; nan with one."""
    bias_sigmas: float
    """Bias of the mean energy over seeds in units of its standard error, which joins that of the exact draws with the
    larger of the chains' own error and the spread over seeds."""
    worst_functional: str
    """Of the seed with the largest R-hat."""
    slowest_functional: str
    """Of the seed with the smallest ESS."""
    note: str
    """Warnings and failures."""


_NAN = Measures(*[math.nan] * len(Measures._fields))


def kernel_row(kernel: str, outcomes: Sequence[Outcome], budget: Budget, reference: Reference) -> Row:
    """Summarize the seeds of a kernel; a measure is nan where one of the seeds has too few draws for it."""
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
    # nan is the largest R-hat and the smallest ESS.
    worst = max(runs, key=lambda row: (math.isnan(row.measures.max_r_hat), row.measures.max_r_hat))
    slowest = min(runs, key=lambda row: (not math.isnan(row.measures.min_ess), row.measures.min_ess))
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
    """Measure one run of a kernel."""
    kept = cut(idata, draws_within_evals(idata, budget.num_evals))
    attrs = kept["posterior"].attrs
    num_chains, num_draws = stat(kept, "lp").shape
    if num_draws >= MIN_DRAWS:
        summaries = diagnostics.summarize(kept)
    else:  # the budget allows no more; the other kernels keep their rows
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


def mean_evals(idata: InferenceData) -> FloatArray:
    """Return the evaluations per chain up to the end of every draw, ``(N,)``."""
    spent: FloatArray = stat(idata, "n_steps").mean(axis=0).cumsum()
    return spent


def elapsed_seconds(idata: InferenceData) -> FloatArray:
    """Return the seconds up to the end of every draw, over all chains, ``(N,)``; else in proportion to evaluations."""
    if "elapsed" in idata["sample_stats"]:
        return np.asarray(stat(idata, "elapsed")[0])
    evals = mean_evals(idata)
    seconds: FloatArray = evals / evals[-1] * float(idata["posterior"].attrs["seconds"])
    return seconds


def draws_within_evals(idata: InferenceData, num_evals: float) -> int:
    """Count the draws up to the first that reaches this number of evaluations per chain, included; all if none does."""
    evals = mean_evals(idata)
    return min(len(evals), int(np.searchsorted(evals, num_evals)) + 1)


def draws_within_seconds(idata: InferenceData, num_seconds: float) -> int:
    """Count the draws that ended within a time; 0 where the chains stopped earlier."""
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
    counts = mode_counts(torch.from_numpy(x), torch.from_numpy(reference.modes), reference.mode_std).numpy()
    weights = np.full(len(counts), 1 / len(counts)) if reference.mode_weights is None else reference.mode_weights
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = counts / counts.sum()
        terms = np.where(fractions > 0, fractions * np.log(fractions / weights), fractions)
    return float((counts > 0).sum()), float(terms.sum())


def _notes(outcomes: Sequence[Outcome], budget: Budget) -> list[str]:
    """List errors of runs and warnings about chains, each once with its seeds."""
    seeds_of: dict[str, list[int]] = {}
    for outcome in outcomes:
        sentences = [outcome.error] if outcome.idata is None else _run_notes(outcome.idata, budget)
        for sentence in sentences:
            seeds_of.setdefault(sentence, []).append(outcome.seed)
    return [
        sentence if len(seeds) == len(outcomes) else f"seed {', '.join(map(str, seeds))}: {sentence}"
        for sentence, seeds in seeds_of.items()
    ]


def _run_notes(idata: InferenceData, budget: Budget) -> list[str]:
    attrs = idata["posterior"].attrs
    sentences = notes(cut(idata, draws_within_evals(idata, budget.num_evals)), counts_divergences=False)
    if elapsed_seconds(idata)[-1] < budget.num_seconds:
        sentences.append(f"stopped before {budget.num_seconds:g} s, so there is no ESS at equal seconds")
    rates = attribute_list(idata, "swap_rates")
    if rates:
        sentences.append(f"swaps accepted {min(rates):.1f} to {max(rates):.1f}")
    if attrs.get("num_evals_computed", 0) > 1.05 * stat(idata, "n_steps").sum():
        sentences.append("chains wait for the longest trajectory, and what is evaluated while they wait is not counted")
    return sentences


NUM_DIGITS = 4  # of a mean with a spread, at most


def to_csv(rows: Sequence[Row]) -> str:
    """Format rows as CSV with a header; ``..._sd`` is the standard deviation over seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [column for name in Measures._fields for column in (name, f"{name}_sd")]
    writer.writerow(
        ["kernel", "adjusted", "seeds", *columns, "bias_sigmas", "worst_functional", "slowest_functional", "note"]
    )
    for row in rows:
        numbers = [_short(value) for pair in zip(row.mean, row.sd, strict=True) for value in pair]
        last = [_short(row.bias_sigmas), row.worst_functional, row.slowest_functional, row.note]
        writer.writerow([row.kernel, _adjusted(row), row.num_seeds, *numbers, *last])
    return text.getvalue()


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _adjusted(row: Row) -> str:
    return {True: "yes", False: "no", None: ""}[row.is_adjusted]


def _trust(row: Row, reference: Reference) -> dict[tuple[str, str], str]:
    """Write the cells that show whether to trust a kernel, by title and unit.

    A text is empty for what is not known of the target, such as modes of images; nan is a number that the chains do not
    have.
    """
    mean, sd = row.mean, row.sd
    bias = kl = modes = ""
    if not math.isnan(reference.energy):
        bias = with_spread(mean.energy_bias, sd.energy_bias)
    if reference.modes is not None:
        modes, kl = f"{mean.modes_found:.3g} of {len(reference.modes)}", with_spread(mean.mode_kl, sd.mode_kl)
    return {
        ("kernel", ""): row.kernel,
        ("exact", "by test"): _adjusted(row),
        ("step", "h"): digits(mean.step_size, 3),
        ("acceptance", ""): digits(mean.acceptance, 2),
        ("R-hat", "largest"): r_hat_text(mean.max_r_hat),
        ("R-hat", "largest of"): row.worst_functional,
        ("bias of E", "nats"): bias,
        ("bias", "sigmas"): "" if math.isnan(row.bias_sigmas) else f"{row.bias_sigmas:+.1f}",
        ("modes", "found"): modes,
        ("KL of modes", "nats"): kl,
        ("divergent", "draws"): digits(mean.divergences, 3),
    }


def _cost(row: Row, budget: Budget) -> dict[tuple[str, str], str]:
    """Write the cells that show what effective draws cost, by title and unit."""
    mean, sd = row.mean, row.sd
    at_seconds = {
        ("ESS", f"at {budget.num_seconds:g} s"): with_spread(mean.ess_at_equal_seconds, sd.ess_at_equal_seconds)
    }
    return {
        ("kernel", ""): row.kernel,
        ("draws", "per chain"): digits(mean.draws, 3),
        ("ESS per", "1000 evals"): with_spread(mean.ess_per_1000_evals, sd.ess_per_1000_evals),
        ("ESS", "fewest of"): row.slowest_functional,
        ("ESS per s", "draws"): with_spread(mean.ess_per_second, sd.ess_per_second),
        ("ESS per s", "with warm-up"): with_spread(mean.ess_per_second_with_warmup, sd.ess_per_second_with_warmup),
        **(at_seconds if budget.num_seconds else {}),
        ("seconds", "draws"): with_spread(mean.seconds, sd.seconds),
        ("seconds", "warm-up"): with_spread(mean.warmup_seconds, sd.warmup_seconds),
    }


def with_spread(mean: float, sd: float) -> str:
    """Write a mean with as many decimals as its spread, which has one digit, or two that begin with 1."""
    if not (0 < sd < math.inf and math.isfinite(mean)):
        return digits(mean, 3)
    exponent = math.floor(math.log10(sd))
    first, largest = sd / 10**exponent, max(abs(mean), sd)
    decimals = max(0, min((first < 2) - exponent, NUM_DIGITS - 1 - math.floor(math.log10(largest))))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def tables(rows: Sequence[Row], budget: Budget, reference: Reference) -> list[list[list[str]]]:
    """Lay kernels with chains out as two tables: whether to trust them, and what their draws cost.

    The first two rows of a table are the titles and the units of its columns; columns without a text are left out.
    """
    laid_out = []
    for cells in ([_trust(row, reference) for row in rows], [_cost(row, budget) for row in rows]):
        body = [[*texts.values()] for row, texts in zip(rows, cells, strict=True) if row.num_seeds]
        laid_out.append(without_empty_columns([*map(list, zip(*cells[0], strict=True)), *body], num_header=2))
    return laid_out


def to_text(rows: Sequence[Row], budget: Budget, reference: Reference) -> str:
    """Lay rows out for a terminal: what to trust, what it costs, then the notes."""
    blocks = [text_table(table, numbers=range(1, len(table[0]))) for table in tables(rows, budget, reference)]
    notes = [f"{row.kernel}: {row.note}" for row in rows if row.note]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def reference_text(reference: Reference) -> str:
    """Describe the reference in one sentence without its full stop."""
    if math.isnan(reference.energy):
        return "no exact draws to compare with: E is not finite, or the target is too far from the VAE for rejection"
    return f"mean energy of exact draws: {reference.energy:.4g} ± {reference.energy_error:.2g} nats"
