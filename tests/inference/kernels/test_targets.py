"""Targets against quadrature, and their potentials against their own exact draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import targets
from ppl_vaebm.inference.kernels.base import value_and_grad
from ppl_vaebm.rng import stream

TARGETS = [
    targets.reference(2),
    targets.gaussian(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.4, 1.3]).double()),
    targets.ar1_gaussian(2, 0.8),
    targets.ar1_gaussian(3, -0.5),
    targets.two_modes(),
    targets.two_modes(distance=1.0, scale=0.5),
    targets.ar1_gaussian(3, 0.5, scales=torch.tensor([1.0, 0.8, 1.3])),
    targets.conditioned_gaussian(2, 25.0),
    targets.conditioned_gaussian(3, 4.0, is_rotated=True),
    targets.banana(curvature=0.2),
    targets.funnel(torch.tensor([1.5]).double()),
    targets.funnel(torch.tensor([-1.0, 2.0]).double(), noise_scale=2.0),
    targets.grid_modes(),
]
IDS = [f"{target.name} {index}" for index, target in enumerate(TARGETS)]
# Too bent for a cube of quadrature, or of too many dimensions.
WITHOUT_QUADRATURE = [
    targets.banana(),
    targets.conditioned_gaussian(20, is_rotated=True),
    targets.funnel(torch.linspace(-2, 2, 9).double()),
]
# What the cubes resolve: the steps of the staircase and the funnel's neck are hardly wider than the distance of points.
RESOLUTION = {"grid_modes": 1e-4, "funnel": 1e-3}
NUM_DRAWS = 40_000
each_target = pytest.mark.parametrize("target", TARGETS, ids=IDS)
each_target_with_draws = pytest.mark.parametrize(
    "target", [*TARGETS, *WITHOUT_QUADRATURE], ids=[*IDS, *(f"{target.name} large" for target in WITHOUT_QUADRATURE)]
)


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
    error = RESOLUTION.get(target.name, 1e-7)
    assert log_z == pytest.approx(target.log_z, abs=error)
    mean = weights @ points
    torch.testing.assert_close(mean, target.mean, rtol=0, atol=error)
    torch.testing.assert_close(weights @ (points - mean).square(), target.variance, rtol=0, atol=error)


@each_target_with_draws
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


@each_target_with_draws
def test_the_potential_is_that_of_the_exact_draws(target: targets.Target) -> None:
    assert worst_score_z(target, target.exact(stream(1, "draws"), NUM_DRAWS)) < 5


@each_target_with_draws
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


def test_scales_stretch_the_ar1_target() -> None:
    scales = torch.linspace(1, 5, 20).double()
    unit, stretched = targets.ar1_gaussian(20), targets.ar1_gaussian(20, scales=scales)
    draws = unit.exact(stream(5, "draws"), 100)
    torch.testing.assert_close(stretched.exact(stream(5, "draws"), 100), draws * scales)

    def log_density(target: targets.Target, q: Tensor) -> Tensor:
        return -target.potential(q) - 0.5 * q.square().sum(-1) - target.log_z

    change_of_variables = log_density(unit, draws) - scales.log().sum()
    torch.testing.assert_close(log_density(stretched, draws * scales), change_of_variables)


@pytest.mark.parametrize("is_rotated", [False, True])
def test_the_condition_number_is_the_stated_one(is_rotated: bool) -> None:
    target = targets.conditioned_gaussian(20, 100.0, is_rotated=is_rotated)
    precision = torch.autograd.functional.hessian(
        lambda q: target.potential(q.unsqueeze(0)).sum(), torch.zeros(20).double()
    ) + torch.eye(20)
    eigenvalues = torch.linalg.eigvalsh(precision)
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([1.0, 100.0]).double())
    torch.testing.assert_close(precision.inverse().diagonal(), target.variance)
    assert bool((precision - precision.diagonal().diag()).abs().max() > 1) == is_rotated


def test_a_funnel_that_is_hardly_observed_is_the_reference() -> None:
    target = targets.funnel(torch.tensor([3.0, -3.0]).double(), noise_scale=1e9)
    torch.testing.assert_close(target.mean, torch.zeros(3).double())
    torch.testing.assert_close(target.variance, torch.ones(3).double())
    assert target.log_z == pytest.approx(0, abs=1e-9)


def test_the_staircase_is_a_monotone_map_with_the_stated_slope_and_inverse() -> None:
    noise = torch.linspace(-5, 5, 4001, dtype=torch.float64, requires_grad=True)
    x = targets.staircase(noise)
    slope = torch.autograd.grad(x.sum(), noise)[0]
    assert (slope >= targets.LANDING_SLOPE).all()
    torch.testing.assert_close(slope.log(), targets.log_slope(noise))
    with torch.no_grad():
        torch.testing.assert_close(targets.inverse_staircase(x.detach()), noise, rtol=0, atol=1e-12)
    # The middles of the inner landings, zero among them, lie at whole numbers.
    step, next_step = torch.special.ndtri(torch.tensor([0.6, 0.8], dtype=torch.float64))
    middles = torch.stack([-(step + next_step) / 2, torch.zeros(()).double(), (step + next_step) / 2])
    whole = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(targets.staircase(middles), whole, rtol=0, atol=1e-4)


def test_the_25_modes_are_even_round_and_counted_from_a_corner() -> None:
    target = targets.grid_modes()
    draws = target.exact(stream(6, "draws"), NUM_DRAWS)
    assert target.mode is not None
    index = target.mode(draws)
    counts = torch.bincount(index, minlength=25).double()
    expected = NUM_DRAWS / 25
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()
    corners = targets.inverse_staircase(torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0]]).double())
    assert target.mode(corners).tolist() == [0, 4, 20]
    offset = targets.staircase(draws) - torch.stack([index // 5, index % 5], -1) + 2
    assert offset.abs().max() < 6 * 0.05
    assert abs(float(offset.square().mean()) / 0.05**2 - 1) < 5 * math.sqrt(2 / offset.numel())


def test_minus_phi_of_a_logistic_regression_is_the_log_likelihood() -> None:
    generator = stream(7, "draws")
    features = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (50,), generator=generator)
    coefficients = 3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    likelihood = torch.distributions.Bernoulli(logits=coefficients @ features.mT).log_prob(labels.double()).sum(-1)
    torch.testing.assert_close(targets.logistic_regression(features, labels)(coefficients), -likelihood)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    for target in (
        targets.reference(3, dtype),
        targets.ar1_gaussian(3, 0.8, dtype),
        targets.conditioned_gaussian(3, 10.0, dtype, is_rotated=True),
        targets.two_modes(dtype=dtype),
        targets.banana(dtype=dtype),
        targets.funnel(torch.ones(2, dtype=dtype)),
        targets.grid_modes(dtype),
    ):
        draws = target.exact(stream(4, "draws"), 2)
        assert draws.dtype == target.potential(draws).dtype == target.mean.dtype == target.variance.dtype == dtype
