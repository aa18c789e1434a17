"""Distances and mode counts against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.data import gaussians25_modes
from ppl_vaebm.errors import InputError
from ppl_vaebm.metrics import frechet_distance, mode_statistics
from ppl_vaebm.rng import stream

MODES = gaussians25_modes(1.0)
STD = 0.05


def with_moments(mean: Tensor, covariance: Tensor, num: int, key: str) -> Tensor:
    """Draw points, then move them so that their sample moments are exactly those asked for."""
    x = torch.randn(num, len(mean), generator=stream(0, key), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (num - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def gaussian_ring(num: int) -> Tensor:
    """Points whose distances to 0 are exact quantiles of a two-dimensional standard Gaussian."""
    share = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    angle = 2.4 * torch.arange(num, dtype=torch.float64)
    radius = (-2 * torch.log1p(-share)).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    a = with_moments(mean_a, std_a.square().diag(), 50, "a")
    b = with_moments(mean_b, std_b.square().diag(), 80, "b")
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_of_two_by_two_gaussians_that_do_not_commute() -> None:
    first = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    second = torch.tensor([[1.0, -0.9], [-0.9, 3.0]]).double()
    zero = torch.zeros(2).double()
    # In two dimensions tr(M^1/2) = sqrt(tr M + 2 sqrt(det M)), with M of the eigenvalues of the product.
    product = first @ second
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = float(first.trace() + second.trace()) - 2 * cross
    a, b = with_moments(zero, first, 40, "a"), with_moments(zero, second, 40, "b")
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)
    commuting = float((torch.linalg.eigvalsh(first).sqrt() - torch.linalg.eigvalsh(second).sqrt()).square().sum())
    assert abs(expected - commuting) > 0.1  # a formula that ignored the axes would be seen


def test_frechet_distance_is_zero_on_itself_symmetric_and_sees_a_shift() -> None:
    a = torch.randn(300, 16, generator=stream(0, "a"))
    b = 1.3 * torch.randn(200, 16, generator=stream(0, "b"))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a + 0.5) == pytest.approx(16 * 0.25, rel=1e-6)


def test_frechet_distance_accepts_fewer_samples_than_features() -> None:
    a = torch.randn(5, 32, generator=stream(0, "a"))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, -a) == pytest.approx(float((2 * a.double().mean(0)).square().sum()), abs=1e-5)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3), torch.zeros(4), torch.zeros(4, 2), torch.tensor([[0.0, 1.0, math.nan]] * 4)]
)
def test_frechet_distance_refuses_what_has_no_moments(bad: Tensor) -> None:
    with pytest.raises(InputError, match="Frechet distance needs"):
        frechet_distance(torch.zeros(4, 3), bad)


def test_true_mixture_has_its_exact_share_of_high_quality_and_even_modes() -> None:
    num = 4000
    x = (MODES.double().unsqueeze(1) + STD * gaussian_ring(num)).flatten(0, 1)
    statistics = mode_statistics(x, MODES, STD)
    assert statistics.high_quality == pytest.approx(1 - math.exp(-4.5), abs=1 / num)
    assert statistics.num_modes == 25
    assert statistics.kl_to_uniform == pytest.approx(0, abs=1e-12)


def test_wide_samples_have_the_share_of_their_own_width() -> None:
    num = 4000
    x = (MODES.double().unsqueeze(1) + 2 * STD * gaussian_ring(num)).flatten(0, 1)
    # Within 3 std of a Gaussian of width 2 std: radius 1.5.
    assert mode_statistics(x, MODES, STD).high_quality == pytest.approx(1 - math.exp(-1.125), abs=2 / num)


def test_missing_modes_raise_the_divergence_by_its_closed_form() -> None:
    assert mode_statistics(MODES[:1], MODES, STD) == (1.0, 1, pytest.approx(math.log(25)))
    assert mode_statistics(MODES[:5], MODES, STD).kl_to_uniform == pytest.approx(math.log(5))
    uneven = torch.cat([MODES[:1], MODES[:1], MODES[:1], MODES[1:2]])
    expected = math.log(25) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert mode_statistics(uneven, MODES, STD).kl_to_uniform == pytest.approx(expected)


def test_points_far_from_every_mode_count_for_nothing() -> None:
    x = torch.cat([MODES, MODES + 0.5, torch.tensor([[math.nan, 0.0], [math.inf, 0.0]])])
    statistics = mode_statistics(x, MODES, STD)
    assert statistics.high_quality == pytest.approx(25 / 52)
    assert (statistics.num_modes, statistics.kl_to_uniform) == (25, pytest.approx(0, abs=1e-12))


def test_no_high_quality_point_leaves_the_divergence_undefined() -> None:
    statistics = mode_statistics(MODES + 0.5, MODES, STD)
    assert statistics[:2] == (0.0, 0)
    assert math.isnan(statistics.kl_to_uniform)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (0, 2)])
def test_mode_statistics_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"samples of shape \(n, 2\)"):
        mode_statistics(torch.zeros(shape), MODES, STD)
