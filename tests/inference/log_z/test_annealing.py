"""Moves along the path and resampling, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import Ladder, init_with_grad, value_and_grad
from ppl_vaebm.inference.log_z import annealing
from ppl_vaebm.inference.log_z.annealing import check_ladder, check_particles, default_kernel, move, resample

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
