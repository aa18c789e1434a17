"""Thermodynamic integration and bridges between levels, on levels whose draws are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels.base import KernelState
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.log_z.thermodynamic import integrate, ladder_bridge
from tests.inference.log_z.test_ais import errors_off
from tests.inference.log_z.test_annealing import GAUSSIAN, MEAN, SCALE, draw_level, level_moments


def ladder(num: int) -> Tensor:
    return torch.linspace(0, 1, num + 1, dtype=torch.float64).square()


def energies(levels: Tensor, num_chains: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draw Phi at every level exactly, ``(C, N, K + 1)``."""
    columns = [GAUSSIAN.potential(draw_level(float(b), num_chains * num_draws, generator)) for b in levels]
    return torch.stack(columns, 1).reshape(num_chains, num_draws, -1)


def exact_moments(b: float) -> tuple[float, float]:
    """Return mean and variance of Phi at a level: it is ``sum (a q^2 / 2 - c q + d)`` of independent normals."""
    mean, variance = level_moments(b)
    a, c = SCALE**-2 - 1, MEAN / SCALE**2
    slope = a * mean - c
    first = 0.5 * a * (variance + mean**2) - c * mean + 0.5 * MEAN**2 / SCALE**2
    second = slope**2 * variance + 0.5 * a**2 * variance**2
    return float(first.sum()), float(second.sum())


def two_points(levels: Tensor) -> Tensor:
    """Make draws with exactly these means and variances: one standard deviation above and below."""
    moments = [exact_moments(float(b)) for b in levels]
    return torch.tensor([[[mean + sign * math.sqrt(v) for mean, v in moments]] for sign in (-1, 1)]).double()


def test_both_find_the_known_log_z(generator: torch.Generator) -> None:
    levels = ladder(10)
    draws = energies(levels, 40, 100, generator)
    integral, between = integrate(levels, draws), ladder_bridge(levels, draws)
    assert abs(integral.log_z.value - GAUSSIAN.log_z) < 5 * integral.log_z.error + integral.discretisation
    assert errors_off(between, GAUSSIAN.log_z) < 5
    assert max(integral.log_z.error, between.error, integral.discretisation) < 0.03
    assert abs(GAUSSIAN.log_z) > 0.5
    exact = torch.tensor([exact_moments(float(b))[0] for b in levels])
    assert ((integral.mean_energy - exact).abs() / integral.mean_energy_error).max() < 5
    # Negative control: b given the wrong way round.
    wrong = integrate(levels, draws.flip(2))
    assert abs(wrong.log_z.value - GAUSSIAN.log_z) > 20 * wrong.log_z.error


def test_the_corrected_trapezoids_are_of_fourth_order() -> None:
    off = []
    for num in (8, 16, 32, 64):
        levels = torch.linspace(0, 1, num + 1, dtype=torch.float64)
        off.append(abs(integrate(levels, two_points(levels)).log_z.value - GAUSSIAN.log_z))
    ratios = [coarse / fine for coarse, fine in zip(off[1:], off[2:], strict=False)]
    assert min(ratios) > 12  # 16 in the limit
    # Negative control: without the variances it is of second order.
    plain = []
    for num in (32, 64):
        levels = torch.linspace(0, 1, num + 1, dtype=torch.float64)
        mean = two_points(levels).mean((0, 1))
        plain.append(abs(-float(torch.trapezoid(mean, levels)) - GAUSSIAN.log_z))
    assert 3 < plain[0] / plain[1] < 5 and plain[1] > 20 * off[3]


@pytest.mark.parametrize("num", [2, 3, 4])
def test_the_discretisation_of_coarse_ladders_is_owned_up_to(num: int, generator: torch.Generator) -> None:
    levels = ladder(num)
    found = integrate(levels, energies(levels, 1_000, 40, generator))
    off = abs(found.log_z.value - GAUSSIAN.log_z)
    assert off < 5 * found.log_z.error + found.discretisation
    between = ladder_bridge(levels, energies(levels, 1_000, 40, generator))
    assert errors_off(between, GAUSSIAN.log_z) < 5
    if num == 2:
        assert off > 5 * found.log_z.error  # negative control: the chains' error alone would not cover it


def test_their_errors_are_the_spread_over_repetitions(generator: torch.Generator) -> None:
    """Neighbouring levels share their noise, as those of replica exchange do in part, and draws come three times."""
    levels, integrals, bridges = ladder(8), [], []
    for _ in range(200):
        noise = torch.randn(20 * 10, 2, generator=generator, dtype=torch.float64)
        columns = []
        for b in levels.tolist():
            mean, variance = level_moments(b)
            columns.append(GAUSSIAN.potential(mean + variance.sqrt() * noise))
        draws = torch.stack(columns, 1).reshape(20, 10, -1).repeat_interleave(3, dim=1)
        one, other = integrate(levels, draws).log_z, ladder_bridge(levels, draws)
        integrals.append((one.value - GAUSSIAN.log_z) / one.error)
        bridges.append((other.value - GAUSSIAN.log_z) / other.error)
    for scores in (integrals, bridges):
        # Of 20 chains the error is itself known to 16 %, which widens the scores to 1.06.
        assert float(torch.tensor(scores).std()) == pytest.approx(1.06, abs=0.27)


def test_a_tempered_run_gives_them_their_draws(generator: torch.Generator) -> None:
    config = KernelConfig(name="tempered", num_levels=6)
    position = torch.randn(32, 2, generator=generator, dtype=torch.float64)

    def level_energies(state: KernelState) -> dict[str, Tensor]:
        assert state.replicas is not None
        return {"energy": torch.cat([state.replicas.potential, state.potential.unsqueeze(1)], 1)}

    chains = run_chains(
        build_kernel(config, GAUSSIAN.potential),
        generator,
        position,
        start_params(config, position),
        num_draws=150,
        num_warmup=100,
        functionals=level_energies,
    )
    assert chains.params.ladder is not None
    levels = chains.params.ladder.inverse_temperatures
    integral, between = (f(levels, chains.draws["energy"]) for f in (integrate, ladder_bridge))
    assert abs(integral.log_z.value - GAUSSIAN.log_z) < 5 * integral.log_z.error + integral.discretisation  # type: ignore[union-attr]
    assert errors_off(between, GAUSSIAN.log_z) < 5  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [[0.0, 0.5, 0.4, 1.0], [0.0, 0.5, 0.9], [0.0, 0.3, 0.6, 0.9]])
def test_bad_levels_are_refused(levels: list[float]) -> None:
    for function in (integrate, ladder_bridge):
        with pytest.raises(InputError, match="increase from 0 to 1 and energies"):
            function(torch.tensor(levels), torch.zeros(3, 5, 4))


def test_one_chain_is_refused() -> None:
    for function in (integrate, ladder_bridge):
        with pytest.raises(InputError, match="at least 2 chains"):
            function(torch.tensor([0.0, 1.0]), torch.zeros(1, 5, 2))
