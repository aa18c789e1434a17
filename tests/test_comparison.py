"""Kernels side by side: what of the options each one gets, and a line of the table."""

from __future__ import annotations

import math

import pytest

from ppl_vaebm import comparison
from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import VARIANCE, QuadraticEnergy, linear_vae

CENTER, WIDTH = 0.3, 0.7
BUDGET = comparison.Budget(num_chains=8, num_warmup=40, num_evals=60)


def linear_potential() -> NoisePotential:
    """Make ``N(0, VARIANCE)`` times ``exp(-(x - CENTER)^2 / (2 WIDTH^2))``."""
    return noise_potential(VAEBM(linear_vae(), QuadraticEnergy(CENTER, WIDTH)))


def tuned_step(name: str, config: KernelConfig) -> float:
    potential = linear_potential()
    start = potential.draw_reference(stream(0, "start"), BUDGET.num_chains)
    return float(comparison.run_kernel(name, potential, config, start, BUDGET, seed=0).params.step_size)


def test_a_kernel_is_tuned_to_its_own_target_and_not_to_anothers() -> None:
    own = tuned_step("pcn", KernelConfig("pcn"))
    assert tuned_step("pcn", KernelConfig("mala", step_size=0.9, target_acceptance=0.9)) == own
    assert tuned_step("pcn", KernelConfig("pcn", target_acceptance=0.9)) < own


def test_the_mean_energy_of_exact_draws_is_known() -> None:
    mean, error = comparison.exact_energy(linear_potential(), seed=0)
    precision = 1 / VARIANCE + 1 / WIDTH**2
    center = CENTER / WIDTH**2 / precision
    expected = 0.5 * ((center - CENTER) ** 2 + 1 / precision) / WIDTH**2
    assert abs(mean - expected) < 4 * error
    assert 0 < error < 0.01


def test_a_density_far_from_the_vae_has_no_exact_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "NUM_EXACT", 10**9)
    assert all(map(math.isnan, comparison.exact_energy(linear_potential(), seed=0)))


def test_a_failure_of_another_kind_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(comparison, "exact_draws", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        comparison.exact_energy(linear_potential(), seed=0)


def test_too_few_draws_leave_a_line_with_gaps() -> None:
    potential = linear_potential()
    start = potential.draw_reference(stream(0, "start"), BUDGET.num_chains)
    chains = comparison.run_kernel("hmc", potential, KernelConfig("hmc", num_steps=30), start, BUDGET, seed=0)
    assert chains.stats["lp"].shape[1] == 2
    row = comparison.summary_row(chains, reference_energy=0.25)
    assert row.mean_energy == pytest.approx(float(chains.draws["energy"].mean()))
    assert row.energy_bias == pytest.approx(row.mean_energy - 0.25)
    assert all(map(math.isnan, (row.max_r_hat, row.min_ess, row.ess_per_second, row.energy_error)))
    budget = BUDGET._replace(num_evals=120)
    chains = comparison.run_kernel("hmc", potential, KernelConfig("hmc", num_steps=30), start, budget, seed=0)
    assert comparison.summary_row(chains, 0.25).min_ess > 0  # four draws are enough


def test_a_table_has_a_line_per_kernel_with_rounded_numbers() -> None:
    numbers = [1.23456789] * (len(comparison.Row._fields) - 1)
    text = comparison.to_csv([comparison.Row("hmc", *numbers)])  # type: ignore[arg-type]
    header, line = text.splitlines()
    assert header.split(",") == list(comparison.Row._fields)
    assert line.split(",") == ["hmc", *["1.235"] * len(numbers)]
    widths = {len(line) for line in comparison.to_text([comparison.Row("hmc", *numbers)]).splitlines()}  # type: ignore[arg-type]
    assert len(widths) == 1
