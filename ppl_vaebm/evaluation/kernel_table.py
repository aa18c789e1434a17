"""The table of a comparison of kernels: a line for each kernel with mean and standard deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Sequence
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
    """Summarize a kernel's seeds in a line; a measure is nan where one of the seeds has too few draws for it."""
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
    """Measure one run of a kernel."""
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
    counts = mode_counts(torch.from_numpy(x), torch.from_numpy(reference.modes), reference.mode_std).numpy()
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


NUM_DIGITS = 4  # of a mean with a spread, at most


class Column(NamedTuple):
    """A column of a table for people."""

    title: str
    unit: str
    text: Callable[[Row, Reference], str]
    """Empty for what nothing is known of, such as modes of images; nan is a number that the chains could not give."""
    is_number: bool = True


def to_csv(rows: Sequence[Row]) -> str:
    """Format lines as CSV with a header; ``..._sd`` is the standard deviation over seeds."""
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


def _measure(title: str, unit: str, name: str) -> Column:
    """Make a column of a measure with its spread, empty where nothing is known that it compares with."""

    def text(row: Row, reference: Reference) -> str:
        mean, sd = getattr(row.mean, name), getattr(row.sd, name)
        has_no_bias = name == "energy_bias" and math.isnan(mean) and math.isnan(reference.energy)
        return "" if has_no_bias or (name == "mode_kl" and reference.modes is None) else with_spread(mean, sd)

    return Column(title, unit, text)


def _modes(row: Row, reference: Reference) -> str:
    return "" if reference.modes is None else f"{row.mean.modes_found:.3g} of {len(reference.modes)}"


KERNEL = Column("kernel", "", lambda row, reference: row.kernel, is_number=False)
TRUST = (
    KERNEL,
    Column("exact", "by test", lambda row, reference: _adjusted(row), is_number=False),
    Column("step", "h", lambda row, reference: digits(row.mean.step_size, 3)),
    Column("acceptance", "", lambda row, reference: digits(row.mean.acceptance, 2)),
    Column("R-hat", "largest", lambda row, reference: r_hat_text(row.mean.max_r_hat)),
    Column("R-hat", "largest of", lambda row, reference: row.worst_functional, is_number=False),
    _measure("bias of E", "nats", "energy_bias"),
    Column("bias", "sigmas", lambda row, reference: _known(f"{row.bias_sigmas:+.1f}")),
    Column("modes", "found", _modes),
    _measure("KL of modes", "nats", "mode_kl"),
    Column("divergent", "draws", lambda row, reference: digits(row.mean.divergences, 3)),
)


def cost(budget: Budget) -> tuple[Column, ...]:
    """Return the columns on what effective draws cost."""
    return (
        KERNEL,
        Column("draws", "per chain", lambda row, reference: digits(row.mean.draws, 3)),
        _measure("ESS per", "1000 evals", "ess_per_1000_evals"),
        Column("ESS", "fewest of", lambda row, reference: row.slowest_functional, is_number=False),
        _measure("ESS per s", "draws", "ess_per_second"),
        _measure("ESS per s", "with warm-up", "ess_per_second_with_warmup"),
        *([_measure("ESS", f"at {budget.num_seconds:g} s", "ess_at_equal_seconds")] if budget.num_seconds else []),
        _measure("seconds", "draws", "seconds"),
        _measure("seconds", "warm-up", "warmup_seconds"),
    )


def _known(text: str) -> str:
    return "" if text == "+nan" else text


def with_spread(mean: float, sd: float) -> str:
    """Write a mean with as many decimals as its spread, which has one digit, or two that begin with 1."""
    if not (0 < sd < math.inf and math.isfinite(mean)):
        return digits(mean, 3)
    exponent = math.floor(math.log10(sd))
    first, largest = sd / 10**exponent, max(abs(mean), sd)
    decimals = max(0, min((first < 2) - exponent, NUM_DIGITS - 1 - math.floor(math.log10(largest))))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def table_of(
    columns: Sequence[Column], rows: Sequence[Row], reference: Reference
) -> tuple[list[Column], list[list[str]]]:
    """Return the columns that are not empty, and the text of each line in them; kernels without a run are left out."""
    body = [[column.text(row, reference) for column in columns] for row in rows if row.num_seeds]
    indices = [str(index) for index in range(len(columns))]
    kept, *body = without_empty_columns([indices, *body], num_header=1)
    return [columns[int(index)] for index in kept], body


def to_text(rows: Sequence[Row], budget: Budget, reference: Reference) -> str:
    """Lay lines out for a terminal: what to trust, then what it costs, then what has to be known."""
    blocks = []
    for columns in (TRUST, cost(budget)):
        kept, body = table_of(columns, rows, reference)
        head = [[column.title for column in kept], [column.unit for column in kept]]
        blocks.append(text_table([*head, *body], numbers=range(1, len(kept))))
    notes = [f"{row.kernel}: {row.note}" for row in rows if row.note]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def reference_text(reference: Reference) -> str:
    """Say what is known of the target without chains, in one sentence without its full stop."""
    if math.isnan(reference.energy):
        return "no exact draws to compare with: E is not finite, or the target is too far from the VAE for rejection"
    return f"mean energy of exact draws: {reference.energy:.4g} ± {reference.energy_error:.2g} nats"
