"""Moves along the path, resampling, and the pilot run, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import Ladder, init_with_grad, value_and_grad
from ppl_vaebm.inference.log_z import annealing
from ppl_vaebm.inference.log_z.annealing import (
    Pilot,
    check_ladder,
    check_particles,
    default_kernel,
    move,
    num_temperatures_for,
    resample,
    run_pilot,
    spaced_ladder,
)

MEAN, SCALE = torch.tensor([0.8, -0.5], dtype=torch.float64), torch.tensor([0.4, 0.9], dtype=torch.float64)
GAUSSIAN = targets.gaussian(MEAN, SCALE)


def level_moments(b: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of ``exp(-b Phi) N(q; 0, I)`` for the Gaussian."""
    precision = 1 + b * (SCALE**-2 - 1)
    return b * MEAN / SCALE**2 / precision, 1 / precision


def draw_level(b: float, num: int, generator: torch.Generator) -> Tensor:
    mean, variance = level_moments(b)
    return mean + variance.sqrt() * torch.randn(num, 2, generator=generator, dtype=torch.float64)


def moment_errors(position: Tensor, b: float) -> float:
    """Return the largest error of means and variances, in standard errors."""
    mean, variance = level_moments(b)
    of_mean = (position.mean(0) - mean) / (variance / len(position)).sqrt()
    of_variance = ((position - mean).square().mean(0) - variance) / (variance * math.sqrt(2 / len(position)))
    return float(torch.cat([of_mean, of_variance]).abs().max())


@pytest.mark.parametrize("build", [default_kernel, hmc.build])
def test_a_move_keeps_its_level(build: annealing.BuildKernel, generator: torch.Generator) -> None:
    b = 0.3
    state = init_with_grad(GAUSSIAN.potential)(draw_level(b, 20_000, generator))
    other = state
    for _ in range(10):
        state, _ = move(GAUSSIAN.potential, build, generator, state, b, 0.7)
        other, _ = move(GAUSSIAN.potential, build, generator, other, 1.0, 0.7)
    assert moment_errors(state.position, b) < 5
    assert moment_errors(other.position, b) > 20  # negative control: a move at another level


def test_a_move_returns_phi_itself_and_rounds_nothing_that_stayed(generator: torch.Generator) -> None:
    b, position = 0.3, torch.randn(500, 2, generator=generator, dtype=torch.float64)
    state = init_with_grad(GAUSSIAN.potential)(position)
    new, info = move(GAUSSIAN.potential, hmc.build, generator, state, b, 1.5)
    stayed = ~info.is_accepted
    assert 50 < int(stayed.sum()) < 450
    value, grad = value_and_grad(GAUSSIAN.potential, new.position)
    assert new.grad is not None and state.grad is not None
    torch.testing.assert_close(new.potential, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.grad, grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(new.potential[stayed], state.potential[stayed])
    assert torch.equal(new.grad[stayed], state.grad[stayed])


def test_systematic_resampling_gives_each_particle_its_share(generator: torch.Generator) -> None:
    shares = torch.tensor([0.5, 0.26, 0.14, 0.1, 0.0], dtype=torch.float64)
    counts = torch.stack([resample(shares.log() - 800, generator).bincount(minlength=5) for _ in range(4_000)]).double()
    assert (counts.sum(1) == 5).all()
    assert ((counts - 5 * shares).abs() < 1).all()  # floor or the next integer
    error = (counts.std(0) / math.sqrt(len(counts))).clamp(min=1e-12)
    assert ((counts.mean(0) - 5 * shares).abs() / error).max() < 5


@pytest.mark.parametrize("levels", [[0.0, 0.5, 0.5, 1.0], [0.0, 0.6, 0.4, 1.0], [0.1, 1.0], [0.0, 0.9], [0.0]])
def test_levels_that_do_not_lead_from_0_to_1_are_refused(levels: list[float]) -> None:
    with pytest.raises(InputError, match=r"increase from 0 to 1, found .*: give such a ladder"):
        check_ladder(Ladder(torch.tensor(levels), torch.ones(len(levels))))


@pytest.mark.parametrize("steps", [[1.0, 1.0], [1.0, 1.0, 0.0], [1.0, math.nan, 1.0]])
def test_levels_without_a_step_are_refused(steps: list[float]) -> None:
    with pytest.raises(InputError, match=r"positive step size for each of 3 .*: give one for each"):
        check_ladder(Ladder(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(steps)))


@pytest.mark.parametrize(("shape", "found"), [((1, 3), "1"), ((0, 3), "0"), ((5,), r"a tensor of shape \(5,\)")])
def test_too_few_particles_are_refused(shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(InputError, match=f"at least 2 particles .* found {found}: give more"):
        check_particles(torch.zeros(shape))


def tilt(strength: float) -> targets.Target:
    """Make ``Phi = strength * q_0``, whose variance is the same at every b: the barrier is the strength."""
    base = targets.reference(2)
    return base._replace(potential=lambda position: strength * position[:, 0], log_z=strength**2 / 2)


def test_the_pilot_measures_a_barrier_known_in_closed_form(generator: torch.Generator) -> None:
    pilot = run_pilot(tilt(3.0).potential, generator, torch.randn(2_000, 2, generator=generator, dtype=torch.float64))
    # Every level's standard deviation is known to within 1 / sqrt(2 n), and resampled particles count for fewer.
    assert pilot.barrier == pytest.approx(3.0, rel=0.05)
    assert pilot.energy_sd.tolist() == pytest.approx([3.0] * len(pilot.energy_sd), rel=0.15)
    ladder = spaced_ladder(pilot, 40)
    check_ladder(ladder)
    assert ladder.inverse_temperatures.tolist() == pytest.approx([k / 40 for k in range(41)], abs=0.03)
    # exp(-(3 h)^2) of the particles are effective after a rise by h: 0.9 of them at h = 0.108.
    assert len(pilot.energy_sd) - 1 == pytest.approx(1 / 0.108, abs=2)
    assert num_temperatures_for(pilot, 0.1, 1, 1_000) == math.ceil(pilot.barrier**2 / 0.1)
    assert num_temperatures_for(pilot, 0.1, 200, 1_000) == 200 and num_temperatures_for(pilot, 0.1, 1, 7) == 7


def test_its_steps_are_accepted_at_about_the_target(generator: torch.Generator) -> None:
    target = targets.ar1_gaussian(20)
    pilot = run_pilot(target.potential, generator, torch.randn(256, 20, generator=generator, dtype=torch.float64))
    state = init_with_grad(target.potential)(target.exact(generator, 4_000))
    _, info = move(target.potential, default_kernel, generator, state, 1.0, float(pilot.step_sizes[-1]))
    assert 0.45 < float(info.acceptance_rate.mean()) < 0.9
    assert pilot.num_evals > 256 * (len(pilot.energy_sd) - 1)


def test_where_phi_does_not_vary_levels_are_even(generator: torch.Generator) -> None:
    position = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    pilot = run_pilot(targets.reference(2).potential, generator, position)
    assert pilot.inverse_temperatures.tolist() == [0.0, 1.0] and pilot.barrier == 0
    assert spaced_ladder(pilot, 4).inverse_temperatures.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_levels_increase_where_phi_varies_at_one_end_only() -> None:
    levels = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    pilot = Pilot(levels, torch.ones(4, dtype=torch.float64), levels.new_tensor([50.0, 0.0, 0.0, 0.0]), 0)
    check_ladder(spaced_ladder(pilot, 300))
    with pytest.raises(InputError, match="at least 1 temperature, found 0"):
        spaced_ladder(pilot, 0)


def test_the_pilot_refuses_energies_that_are_not_finite(generator: torch.Generator) -> None:
    start = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    num_bad = int((start[:, 0] > 1).sum())

    def potential(position: Tensor) -> Tensor:
        return position[:, 1].where(position[:, 0] < 1, math.nan)

    with pytest.raises(InputError, match=f"finite energy of every pilot particle, found {num_bad} of 64 without"):
        run_pilot(potential, generator, start)


def test_the_pilot_gives_up_on_a_path_that_is_too_long(generator: torch.Generator) -> None:
    position = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    with pytest.raises(InputError, match=r"at most 5 levels of the pilot, found b = 0\.\d+ there"):
        run_pilot(tilt(100.0).potential, generator, position, max_levels=5, num_moves=1)
