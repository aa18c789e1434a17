"""Distances of features against closed forms, brute force and simulation."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.frechet import frechet_bias, frechet_distance, kernel_distance
from ppl_vaebm.rng import stream


def with_moments(mean: Tensor, covariance: Tensor, num: int, key: str) -> Tensor:
    """Draw points, then move them so that their sample moments are exactly those asked for."""
    x = torch.randn(num, len(mean), generator=stream(0, key), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (num - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


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


# --- its bias ------------------------------------------------------------------------------------


def gaussian(num: int, *key: str | int, scale: float = 1.0) -> Tensor:
    """Draw Gaussian features with standard deviations from 1 down to a quarter, times the scale."""
    return scale * torch.linspace(1, 0.25, 16) * torch.randn(num, 16, generator=stream(0, *key))


def biases(num: int, num_repeats: int, scale: float = 1.0) -> Tensor:
    """Repeat a comparison of two sets: its true bias, and the low and high estimates, ``(num_repeats, 3)``."""
    truth = float(((scale - 1) * torch.linspace(1, 0.25, 16)).square().sum())
    rows = []
    for repeat in range(num_repeats):
        a, b = gaussian(num, "a", repeat), gaussian(num, "b", repeat, scale=scale)
        rows.append([frechet_distance(a, b) - truth, *frechet_bias(a, b, stream(0, "parts", repeat))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_low_bias_is_the_bias_where_samples_are_many_times_the_features(scale: float) -> None:
    found = biases(8 * 16, 60, scale)
    difference = found[:, 1] - found[:, 0]
    error = float(difference.std()) / math.sqrt(len(found))
    # What is left is of second order: a few percent of the bias.
    assert abs(float(difference.mean())) < 5 * error + 0.05 * float(found[:, 0].mean())
    assert float(found[:, 0].mean()) > 10 * error


@pytest.mark.parametrize("num", [6, 8, 16, 32])
def test_bias_of_few_samples_lies_between_the_two(num: int) -> None:
    bias, low, high = biases(num, 40).mean(0).tolist()
    assert 0.2 * bias < low < 1.1 * bias
    assert bias < high < 2.5 * bias


def test_high_bias_is_that_of_the_datas_own_law_where_data_abound() -> None:
    num, rows = 12, []
    for repeat in range(60):
        real, samples = gaussian(400, "real", repeat), gaussian(num, "samples", repeat)
        rows.append([frechet_distance(real, samples), frechet_bias(real, samples, stream(0, "parts", repeat)).high])
    bias, high = torch.tensor(rows, dtype=torch.float64).unbind(1)
    error = float((high - bias).std()) / math.sqrt(len(rows))
    assert abs(float((high - bias).mean())) < 5 * error
    assert float(bias.mean()) > 20 * error


# --- the kernel distance -------------------------------------------------------------------------


def test_kernel_distance_of_two_points_is_worked_out_by_hand() -> None:
    # k(1, 1) = (1 + 1)^3 = 8, k(0, 0) = k(1, 0) = 1, so 8 + 1 - 2, in every subset.
    assert kernel_distance(torch.ones(6, 1), torch.zeros(5, 1), stream(0, "subsets")) == (7.0, 0.0)
    # In two features (1, 1) has k = (2 / 2 + 1)^3 as well.
    assert kernel_distance(torch.ones(6, 2), torch.zeros(5, 2), stream(0, "subsets")).value == pytest.approx(7.0)


def brute_force(a: Tensor, b: Tensor) -> float:
    """Average the kernel over all pairs of different members."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    within = [mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (a, b)]
    return sum(within) - 2 * mean([kernel(x, y) for x in a for y in b])


def test_subsets_average_to_the_statistic_of_the_whole_sets() -> None:
    a = torch.randn(20, 3, generator=stream(0, "a"), dtype=torch.float64)
    b = torch.randn(24, 3, generator=stream(0, "b"), dtype=torch.float64) + 0.5
    num_subsets, size = 2000, 5
    found = kernel_distance(a, b, stream(0, "subsets"), num_subsets, size)
    share = size / 20
    one_subset = found.error / math.sqrt(1 / num_subsets + share / (1 - share))
    error = one_subset / math.sqrt(num_subsets)
    assert abs(found.value - brute_force(a, b)) < 5 * error
    # The biased statistic, which counts a member with itself, would be seen.
    biased = brute_force(torch.cat([a, a]), torch.cat([b, b]))
    assert abs(found.value - biased) > 5 * error


NUM_SUBSETS, SHARE = 20, 0.25


@functools.cache
def repeated(shift: float) -> tuple[Tensor, Tensor]:
    """Estimate the kernel distance of N(0, 1) and N(shift, 1) from new samples each time: values and errors."""
    found = []
    for repeat in range(120):
        a = torch.randn(100, 1, generator=stream(0, "a", repeat))
        b = shift + torch.randn(100, 1, generator=stream(0, "b", repeat))
        found.append(kernel_distance(a, b, stream(0, "subsets", repeat), NUM_SUBSETS, round(SHARE * 100)))
    return torch.tensor([value for value, _ in found]), torch.tensor([error for _, error in found])


def test_kernel_distance_of_two_gaussians_has_its_closed_form_on_average() -> None:
    shift = 0.5
    # The kernel's features are 1, x, x^2 and x^3 with weights 1, 3, 3 and 1.
    truth = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    value, _ = repeated(shift)
    assert abs(float(value.mean()) - truth) < 5 * float(value.std()) / math.sqrt(len(value))
    # Sets of one law are at 0 on average, with negative values among them.
    value, _ = repeated(0.0)
    assert abs(float(value.mean())) < 5 * float(value.std()) / math.sqrt(len(value))
    assert float(value.min()) < 0


def test_error_of_the_kernel_distance_is_the_spread_over_new_samples() -> None:
    value, error = repeated(0.5)
    rms = float(error.square().mean().sqrt())
    assert 0.75 < rms / float(value.std()) < 1.3
    # The spread of the subsets alone, over the root of their number, knows nothing of new samples.
    subsets_alone = rms / math.sqrt(1 + NUM_SUBSETS * SHARE / (1 - SHARE))
    assert subsets_alone < 0.5 * float(value.std())
    # Where the sets are alike the error is on the safe side.
    value, error = repeated(0.0)
    assert float(error.square().mean().sqrt()) > float(value.std())


@pytest.mark.parametrize("is_first_small", [True, False])
def test_error_of_the_kernel_distance_knows_that_one_set_is_larger(is_first_small: bool) -> None:
    num, many, rows = 60, 1_200, []
    for repeat in range(150):
        # Bounded, for the cube of Gaussian tails leaves the spread itself uncertain.
        small = torch.rand(num, 1, generator=stream(0, "small", repeat))
        large = 0.5 + torch.rand(many, 1, generator=stream(0, "large", repeat))
        sets = [(small, large), (small, large[:num])]
        found = [
            kernel_distance(*(pair if is_first_small else pair[::-1]), stream(0, "subsets", repeat), NUM_SUBSETS, 15)
            for pair in sets
        ]
        rows.append([found[0].value, found[0].error, found[1].error])
    value, error, equal = torch.tensor(rows, dtype=torch.float64).unbind(1)
    spread = float(value.std())
    assert 0.85 < float(error.square().mean().sqrt()) / spread < 1.2
    # The error of two sets as small as the smaller one is another.
    assert float(equal.square().mean().sqrt()) > 1.5 * spread


@pytest.mark.parametrize("num_subsets", [2, 5])
def test_distance_is_the_mean_over_subsets_drawn_in_turn_and_sets_of_one_size_share_one_error(num_subsets: int) -> None:
    a = torch.randn(12, 2, generator=stream(0, "a"), dtype=torch.float64)
    b = torch.randn(12, 2, generator=stream(0, "b"), dtype=torch.float64) + 0.5
    generator, size = stream(0, "subsets"), 4
    values = []
    for _ in range(num_subsets):
        rows = [x[torch.randperm(12, generator=generator)[:size]] for x in (a, b)]
        values.append(brute_force(*rows))
    spread = float(torch.tensor(values, dtype=torch.float64).var())
    found = kernel_distance(a, b, stream(0, "subsets"), num_subsets, size)
    expected = sum(values) / num_subsets, math.sqrt(spread * (1 / num_subsets + (4 / 12) / (8 / 12)))
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("a", "b", "options", "because"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), {}, "n >= 4"),
        (torch.zeros(9, 2), torch.zeros(9, 3), {}, "features of one width, got 2 and 3"),
        (torch.full((9, 2), math.inf), torch.zeros(9, 2), {}, "18 numbers that are not finite"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"num_subsets": 1}, "got 1 of 1000"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"subset_size": 1}, "got 100 of 1"),
    ],
)
def test_kernel_distance_refuses_what_it_cannot_compare(
    a: Tensor, b: Tensor, options: dict[str, int], because: str
) -> None:
    with pytest.raises(InputError, match=because):
        kernel_distance(a, b, stream(0, "subsets"), **options)


def test_numbers_are_those_of_torch_fidelity() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid", reason="needs the extra metrics")
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="needs the extra metrics")
    a, b = gaussian(200, "a").double(), gaussian(200, "b", scale=1.3).double()
    statistics = [{"mu": x.mean(0).numpy(), "sigma": torch.cov(x.T).numpy()} for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    ours = kernel_distance(a, b, stream(0, "subsets"), 500, 50)
    options = {"kid_subsets": 500, "kid_subset_size": 50, "verbose": False}
    values = kid.kid_features_to_metric(a, b, **options)
    error = values["kernel_inception_distance_std"] / math.sqrt(500)
    assert abs(ours.value - values["kernel_inception_distance_mean"]) < 5 * math.sqrt(2) * error
