"""Mode counts against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ppl_vaebm.data.toys import gaussians25_modes
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.modes import class_coverage, coverage_of_even_draws, mode_statistics
from ppl_vaebm.rng import stream

MODES = gaussians25_modes(1.0)
STD = 0.05


def gaussian_ring(num: int) -> Tensor:
    """Points whose distances to 0 are exact quantiles of a two-dimensional standard Gaussian."""
    share = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    angle = 2.4 * torch.arange(num, dtype=torch.float64)
    radius = (-2 * torch.log1p(-share)).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


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


def test_class_coverage_has_its_closed_forms() -> None:
    assert class_coverage(torch.arange(1000), 1000)[:2] == (1000, pytest.approx(0, abs=1e-12))
    assert class_coverage(torch.full((7,), 3), 1000)[:2] == (1, pytest.approx(math.log(1000)))
    assert class_coverage(torch.arange(500).repeat(3), 1000)[:2] == (500, pytest.approx(math.log(2)))
    uneven = class_coverage(torch.tensor([0, 0, 0, 2]), 4)
    assert uneven.num_modes == 2
    assert uneven.kl_to_uniform == pytest.approx(math.log(4) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))


def test_even_draws_have_the_divergence_that_is_told_for_them() -> None:
    num, num_classes, repeats = 2000, 20, 300
    labels = torch.randint(num_classes, (repeats, num), generator=stream(0, "labels"))
    found = [class_coverage(row, num_classes) for row in labels]
    divergence = torch.tensor([coverage.kl_to_uniform for coverage in found])
    error = float(divergence.std()) / math.sqrt(repeats)
    expected = coverage_of_even_draws(num, num_classes).kl_to_uniform
    assert expected == pytest.approx(19 / 4000, rel=0.01)  # its limit for many draws
    assert abs(float(divergence.mean()) - expected) < 5 * error
    # Without one class the divergence stands out.
    lacking = class_coverage(labels[0][labels[0] != 7], num_classes).kl_to_uniform
    assert lacking > expected + 20 * float(divergence.std())


def test_few_even_draws_have_the_classes_and_the_divergence_that_are_told_for_them() -> None:
    num, num_classes, repeats = 100, 60, 400
    labels = torch.randint(num_classes, (repeats, num), generator=stream(0, "few"))
    found = torch.tensor([class_coverage(row, num_classes) for row in labels], dtype=torch.float64)
    mean, error = found.mean(0), found.std(0) / math.sqrt(repeats)
    expected = torch.tensor(coverage_of_even_draws(num, num_classes), dtype=torch.float64)
    assert bool(((mean - expected).abs() < 5 * error).all())
    # The limit for many draws is no answer here.
    assert abs(float(mean[1]) - (num_classes - 1) / (2 * num)) > 5 * float(error[1])


def test_even_draws_have_their_exact_means() -> None:
    # One draw leaves one class; of two draws of two classes half fall together.
    assert coverage_of_even_draws(1, 7) == pytest.approx((1.0, math.log(7)))
    assert coverage_of_even_draws(2, 2) == pytest.approx((1.5, math.log(2) / 2))
    assert coverage_of_even_draws(50, 1) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert coverage_of_even_draws(200, 1_000_000).num_modes == pytest.approx(199.9801, abs=1e-3)


@pytest.mark.parametrize(("num", "told"), [(1_000, 0.573), (2_000, 0.285), (2_500, 0.223), (26_000, 0.01934)])
def test_even_draws_of_stacked_digits_have_the_sum_over_the_law_of_one_count(num: int, told: float) -> None:
    count = np.arange(1, num + 1)
    terms = stats.binom.pmf(count, num, 1 / 1_000) * count / num * np.log(1_000 * count / num)
    found = coverage_of_even_draws(num, 1_000).kl_to_uniform
    assert found == pytest.approx(1_000 * float(terms.sum()), rel=1e-7)
    assert found == pytest.approx(told, rel=2e-3)


@pytest.mark.parametrize(("num", "num_classes"), [(0, 5), (5, 0)])
def test_no_draws_have_no_means(num: int, num_classes: int) -> None:
    with pytest.raises(InputError, match=f"got {num} of {num_classes}"):
        coverage_of_even_draws(num, num_classes)


@pytest.mark.parametrize(
    ("labels", "because"),
    [
        (torch.zeros(0, dtype=torch.int64), "n >= 1"),
        (torch.zeros(3, 1, dtype=torch.int64), "shape"),
        (torch.zeros(3), "integer labels"),
        (torch.tensor([0, 10]), r"0\.\.9, got 0\.\.10"),
        (torch.tensor([-1, 1]), r"got -1\.\.1"),
    ],
)
def test_class_coverage_refuses_what_are_no_classes(labels: Tensor, because: str) -> None:
    with pytest.raises(InputError, match=because):
        class_coverage(labels, 10)
