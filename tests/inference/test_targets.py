"""Targets against quadrature, and their potentials against their own exact draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference import targets
from ppl_vaebm.inference.base import value_and_grad
from ppl_vaebm.rng import stream

TARGETS = [
    targets.reference(2),
    targets.gaussian(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.4, 1.3]).double()),
    targets.ar1_gaussian(2, 0.8),
    targets.ar1_gaussian(3, -0.5),
    targets.two_modes(),
    targets.two_modes(distance=1.0, scale=0.5),
]
IDS = ["reference", "gaussian", "ar1", "ar1 negative", "two_modes", "two_modes wide"]
NUM_DRAWS = 40_000
each_target = pytest.mark.parametrize("target", TARGETS, ids=IDS)


def grid(dim: int) -> tuple[Tensor, float]:
    """Return the points of a cube and the volume of each; what a target has outside it is below 1e-8."""
    num_per_axis = {1: 4001, 2: 601, 3: 101}[dim]
    axis = torch.linspace(-9, 9, num_per_axis, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim), (18 / (num_per_axis - 1)) ** dim


def normalised_weights(target: targets.Target) -> tuple[Tensor, Tensor, float]:
    points, volume = grid(len(target.mean))
    log_reference = -0.5 * points.square().sum(-1) - 0.5 * points.shape[1] * math.log(2 * math.pi)
    weights = (log_reference - target.potential(points)).exp() * volume
    return points, weights / weights.sum(), float(weights.sum().log())


@each_target
def test_log_z_and_moments_are_those_of_quadrature(target: targets.Target) -> None:
    points, weights, log_z = normalised_weights(target)
    assert log_z == pytest.approx(target.log_z, abs=1e-8)
    mean = weights @ points
    torch.testing.assert_close(mean, target.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(weights @ (points - mean).square(), target.variance, rtol=0, atol=1e-7)


@each_target
def test_exact_draws_have_the_stated_moments(target: targets.Target) -> None:
    draws = target.exact(stream(0, "draws"), NUM_DRAWS)
    assert draws.shape == (NUM_DRAWS, len(target.mean))
    for values, truth in ((draws, target.mean), ((draws - target.mean).square(), target.variance)):
        standard_error = values.std(0) / math.sqrt(NUM_DRAWS)
        assert ((values.mean(0) - truth).abs() < 5 * standard_error).all()


def worst_score_z(target: targets.Target, draws: Tensor) -> float:
    """Test ``E[dU/dq_i] = 0`` and ``E[q_i dU/dq_j] = 1 if i == j else 0``, in standard errors."""
    score = value_and_grad(target.potential, draws)[1] + draws
    products = (draws[:, :, None] * score[:, None, :]).flatten(1)
    values = torch.cat([score, products], dim=1)
    dim = draws.shape[1]
    truth = torch.cat([torch.zeros(dim), torch.eye(dim).flatten()])
    return float(((values.mean(0) - truth) / (values.std(0) / math.sqrt(len(draws)))).abs().max())


@each_target
def test_the_potential_is_that_of_the_exact_draws(target: targets.Target) -> None:
    assert worst_score_z(target, target.exact(stream(1, "draws"), NUM_DRAWS)) < 5


@each_target
def test_draws_of_a_slightly_wider_density_fail_that(target: targets.Target) -> None:
    assert worst_score_z(target, 1.05 * target.exact(stream(1, "draws"), NUM_DRAWS)) > 5


def test_log_z_is_that_of_a_large_monte_carlo_run() -> None:
    target = targets.ar1_gaussian(20, 0.3)
    draws = torch.randn(200_000, 20, generator=stream(2, "draws"), dtype=torch.float64)
    weights = (-target.potential(draws)).exp()
    standard_error = weights.std() / weights.mean() / math.sqrt(len(weights))
    assert standard_error < 0.02
    assert abs(weights.mean().log() - target.log_z) < 5 * standard_error


def test_neighbours_of_the_ar1_target_have_the_stated_correlation() -> None:
    draws = targets.ar1_gaussian(5, 0.8).exact(stream(3, "draws"), NUM_DRAWS)
    for lag in (1, 2, 4):
        products = draws[:, 0] * draws[:, lag]
        assert abs(products.mean() - 0.8**lag) < 5 * products.std() / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    for target in (targets.reference(3, dtype), targets.ar1_gaussian(3, 0.8, dtype), targets.two_modes(dtype=dtype)):
        draws = target.exact(stream(4, "draws"), 2)
        assert draws.dtype == target.potential(draws).dtype == target.mean.dtype == target.variance.dtype == dtype
