"""Annealed importance sampling against known normalisers, and what breaks it."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelParams, KernelState, Ladder, Potential, select
from ppl_vaebm.inference.log_z import ais, annealing
from ppl_vaebm.inference.log_z.ais import anneal, estimate
from ppl_vaebm.inference.log_z.annealing import default_kernel
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp
from ppl_vaebm.inference.log_z.smc import Adaptive, run_smc, spaced_ladder

TARGETS = {
    "gaussian": targets.gaussian(
        torch.tensor([0.8, -0.5, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.9, 0.6], dtype=torch.float64)
    ),
    "ar1_gaussian": targets.ar1_gaussian(6, 0.7),
    "two_modes": targets.two_modes(1.5, 0.4),
}


def start(target: targets.Target, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, len(target.mean), generator=generator, dtype=torch.float64)


def few_levels(num: int = 6, step_size: float = 0.6) -> Ladder:
    """Make a coarse ladder, denser near 0; far too coarse for tight bounds."""
    levels = torch.linspace(0, 1, num + 1, dtype=torch.float64).square()
    return Ladder(levels, torch.full_like(levels, step_size))


def errors_off(found: LogZ, log_z: float) -> float:
    return abs(found.value - log_z) / found.error


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_without_an_energy_log_z_is_zero_exactly(direction: ais.Direction, generator: torch.Generator) -> None:
    target = targets.reference(4)
    annealed = anneal(target.potential, generator, start(target, 20, generator), few_levels(), direction)
    found = estimate(annealed.log_weights, generator, direction)
    assert found.log_z.value == pytest.approx(0.0, abs=1e-14)
    assert found.log_z.error == pytest.approx(0.0, abs=1e-14)
    assert found.log_z.ess == pytest.approx(20)
    assert found.mean_log_weight.value == 0 and found.num_not_finite == 0


@pytest.mark.parametrize("name", TARGETS)
def test_both_bounds_close_on_the_known_log_z(name: str, generator: torch.Generator) -> None:
    target = TARGETS[name]
    pilot = run_smc(target.potential, generator, start(target, 200, generator), Adaptive())
    ladder = spaced_ladder(pilot, 200)
    down = anneal(target.potential, generator, start(target, 800, generator), ladder)
    up = anneal(target.potential, generator, target.exact(generator, 800), ladder, "reverse")
    lower = estimate(down.log_weights, generator, "forward")
    upper = estimate(up.log_weights, generator, "reverse")
    for found in (lower.log_z, upper.log_z):
        assert errors_off(found, target.log_z) < 5
        assert found.error < 0.03
    assert abs(upper.log_z.value - lower.log_z.value) < 0.1
    assert abs(target.log_z) > 5 * lower.log_z.error  # log Z = 0 would not pass
    assert lower.mean_log_weight.value < lower.log_z.value and upper.mean_log_weight.value > upper.log_z.value


@pytest.mark.parametrize("name", TARGETS)
def test_with_few_temperatures_the_weights_are_unbiased_and_the_log_weights_are_bounds(
    name: str, generator: torch.Generator
) -> None:
    target, ladder, num = TARGETS[name], few_levels(), 4_000
    down = anneal(target.potential, generator, start(target, num, generator), ladder)
    up = anneal(target.potential, generator, target.exact(generator, num), ladder, "reverse")
    lower = estimate(down.log_weights, generator, "forward")
    assert errors_off(lower.log_z, target.log_z) < 5
    below, above = lower.mean_log_weight, estimate(up.log_weights, generator, "reverse").mean_log_weight
    assert below.value + 8 * below.error < target.log_z < above.value - 8 * above.error


# --- what breaks it ------------------------------------------------------------------------------


def test_every_temperature_counts_with_its_sign(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    target, ladder = TARGETS["gaussian"], few_levels(8)
    seen: list[Tensor] = []
    move = annealing.move

    def recording(potential: Potential, build: object, generator: torch.Generator, state: KernelState, *rest: float):  # type: ignore[no-untyped-def]
        seen.append(state.potential)
        new, info = move(potential, build, generator, state, *rest)  # type: ignore[arg-type]
        if len(seen) == 7:
            seen.append(new.potential)
        return new, info

    monkeypatch.setattr(ais, "move", recording)
    found = anneal(target.potential, generator, start(target, 10_000, generator), ladder)
    increments = -ladder.inverse_temperatures.diff() * torch.stack(seen, 1)
    torch.testing.assert_close(found.log_weights, increments.sum(1), rtol=1e-12, atol=1e-12)
    assert errors_off(log_mean_exp(found.log_weights), target.log_z) < 5
    for wrong in (
        -found.log_weights,  # the wrong sign
        *(found.log_weights - increments[:, k] for k in range(8)),  # one temperature forgotten
    ):
        assert errors_off(log_mean_exp(wrong), target.log_z) > 5


def test_moves_must_keep_their_level(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    target, move = TARGETS["gaussian"], annealing.move
    monkeypatch.setattr(ais, "move", lambda *args: move(*args[:4], 1.0, args[5]))  # type: ignore[call-arg]
    found = anneal(target.potential, generator, start(target, 4_000, generator), few_levels())
    assert errors_off(log_mean_exp(found.log_weights), target.log_z) > 10


def favouring(potential: Potential) -> Kernel:
    """Make a kernel that tries two moves and lets each particle's own energy choose: adaptation on what counts."""
    inner = hmc.build(potential, num_steps=3)

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        one, info = inner.step(generator, state, params)
        other, _ = inner.step(generator, state, params._replace(step_size=0.5 * params.step_size))
        return select(one.potential < other.potential, one, other), info._replace(
            is_accepted=torch.ones_like(info.is_accepted)
        )

    return inner._replace(step=step)


def test_particles_that_choose_their_own_step_are_biased(generator: torch.Generator) -> None:
    target, num = TARGETS["gaussian"], 4_000
    off = {}
    for name, build in (("frozen", default_kernel), ("own", favouring)):
        found = anneal(target.potential, generator, start(target, num, generator), few_levels(), build=build)
        off[name] = errors_off(log_mean_exp(found.log_weights), target.log_z)
    assert off["frozen"] < 5 and off["own"] > 10


def test_each_level_moves_by_its_own_frozen_step(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    levels = torch.tensor([0, 0.2, 0.5, 1], dtype=torch.float64)
    ladder = Ladder(levels, torch.tensor([1.5, 0.4, 0.3, 0.2], dtype=torch.float64))
    point, scale = torch.ones(1, 3, dtype=torch.float64), target.potential(torch.ones(1, 3, dtype=torch.float64))
    seen: list[tuple[float, float]] = []

    def build(potential: Potential) -> Kernel:
        inner = hmc.build(potential, num_steps=1)

        def step(
            generator: torch.Generator, state: KernelState, params: KernelParams
        ) -> tuple[KernelState, KernelInfo]:
            seen.append((round(float(potential(point) / scale), 6), round(float(params.step_size), 6)))
            return inner.step(generator, state, params)

        return inner._replace(step=step)

    anneal(target.potential, generator, start(target, 4, generator), ladder, build=build)
    assert seen == [(0.2, 0.4), (0.5, 0.3)]
    seen.clear()
    anneal(target.potential, generator, start(target, 4, generator), ladder, "reverse", build=build)
    assert seen == [(0.5, 0.3), (0.2, 0.4)]


def test_the_upper_bound_needs_draws_of_the_target(generator: torch.Generator) -> None:
    target, num = TARGETS["gaussian"], 2_000
    exact = anneal(target.potential, generator, target.exact(generator, num), few_levels(20), "reverse")
    other = anneal(target.potential, generator, start(target, num, generator), few_levels(20), "reverse")
    assert errors_off(estimate(exact.log_weights, generator, "reverse").log_z, target.log_z) < 5
    assert errors_off(estimate(other.log_weights, generator, "reverse").log_z, target.log_z) > 10


# --- bookkeeping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_change_of_temperature_costs_no_evaluation(direction: ais.Direction, generator: torch.Generator) -> None:
    target, rows = TARGETS["gaussian"], 0

    def counting(position: Tensor) -> Tensor:
        nonlocal rows
        rows += len(position)
        return target.potential(position)

    found = anneal(counting, generator, start(target, 7, generator), few_levels(5, step_size=1.2), direction)
    # A move is one evaluation of the independence step, and of HMC three steps and the gradient at its start.
    assert found.num_evals == rows == 7 * (1 + 4 * 5)
    assert found.acceptance_rate.shape == (4,)
    assert found.acceptance_rate[0] > found.acceptance_rate[-1]  # hottest first


def test_energies_that_are_not_numbers_are_counted_and_not_mended(generator: torch.Generator) -> None:
    at = start(TARGETS["gaussian"], 200, generator)
    num_bad = int((at[:, 0] > 0.5).sum())

    def potential(position: Tensor) -> Tensor:
        return position[:, 1].where(position[:, 0] < 0.5, math.nan)

    weights = anneal(potential, generator, at, few_levels()).log_weights
    found = estimate(weights, generator, "forward")
    assert found.num_not_finite == num_bad > 0
    assert math.isnan(found.log_z.value) and math.isnan(found.log_z.error) and math.isnan(found.mean_log_weight.value)


def test_an_infinite_energy_is_a_density_of_zero(generator: torch.Generator) -> None:
    at = start(TARGETS["gaussian"], 4_000, generator)

    def potential(position: Tensor) -> Tensor:
        return position[:, 1].where(position[:, 0] < 0, math.inf)

    found = estimate(anneal(potential, generator, at, few_levels()).log_weights, generator, "forward")
    assert found.num_not_finite == int((at[:, 0] >= 0).sum())
    assert errors_off(found.log_z, math.log(0.5) + 0.5) < 5


def test_one_particle_is_refused(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    for direction in get_args(ais.Direction):
        with pytest.raises(InputError, match="at least 2 particles"):
            anneal(target.potential, generator, start(target, 1, generator), few_levels(), direction)
    with pytest.raises(InputError, match="at least 2 particles"):
        estimate(torch.zeros(1), generator, "forward")


def test_float32_gives_the_same_log_z(generator: torch.Generator) -> None:
    target = targets.gaussian(torch.tensor([0.8, -0.5]), torch.tensor([0.4, 0.9]))
    position = torch.randn(1_000, 2, generator=generator)
    found = anneal(target.potential, generator, position, few_levels(40))
    assert found.position.dtype == torch.float32 and found.log_weights.dtype == torch.float64
    assert errors_off(estimate(found.log_weights, generator, "forward").log_z, target.log_z) < 5
