"""Precision, recall and nearest neighbours against hand-made and brute-force answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics import neighbours as metrics_neighbours
from ppl_vaebm.evaluation.metrics.neighbours import (
    PrecisionRecall,
    density_coverage,
    nearest_neighbours,
    precision_recall,
    precision_recall_error,
)
from ppl_vaebm.rng import stream


def column(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(1)


def draws(num: int, *key: str | int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num, 8, generator=stream(0, *key))


def test_points_on_a_line_are_worked_out_by_hand() -> None:
    real = column(0, 1, 2, 3)  # each ball has radius 1 for k = 1, so the manifold is [-1, 4]
    generated = column(0.5, 3.9, 10, 10.5)  # radii 3.4, 3.4, 0.5, 0.5: [-2.9, 7.3] and [9.5, 11]
    assert precision_recall(real, generated, 1) == (0.5, 1.0)
    assert precision_recall(generated, real, 1) == (1.0, 0.5)
    # For k = 2 the outer balls of the data have radius 2: [-2, 5].
    assert precision_recall(real, column(-1.9, 4.9, -2.1, 5.1), 2).precision == 0.5
    # A ball has its edge.
    assert precision_recall(real, column(-1, 4, 20, 30), 1).precision == 0.5


def test_a_set_covers_itself_and_not_what_is_far() -> None:
    x = draws(200, "x")
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    # Equal points have balls of radius 0, and lie in them.
    assert precision_recall(torch.full((9, 8), 0.1), torch.full((9, 8), 0.1)) == (1.0, 1.0)
    assert precision_recall(x[:1].expand(200, 8), x).recall == 1.0


def test_narrow_samples_are_precise_and_wide_ones_have_recall() -> None:
    real = draws(600, "real")
    same, narrow, wide = (precision_recall(real, draws(600, "samples", scale=scale)) for scale in (1.0, 0.5, 1.5))
    assert narrow.precision > same.precision + 0.1 > wide.precision + 0.3
    assert narrow.recall < same.recall - 0.3
    # Under one law both are the same on average.
    gaps = []
    for repeat in range(30):
        found = precision_recall(draws(100, "a", repeat), draws(100, "b", repeat))
        gaps.append(found.precision - found.recall)
    gap = torch.tensor(gaps)
    assert abs(float(gap.mean())) < 5 * float(gap.std()) / math.sqrt(len(gap))


def brute_force(real: Tensor, generated: Tensor, k: int) -> PrecisionRecall:
    def share(centres: Tensor, points: Tensor) -> float:
        radii = [sorted(float((c - other).norm()) for other in centres)[k] for c in centres]
        inside = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(inside)

    return PrecisionRecall(share(real, generated), share(generated, real))


def test_blocks_give_what_brute_force_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = draws(40, "real").double(), draws(40, "samples", scale=1.2).double() + 0.5
    expected = brute_force(real, generated, 3)
    assert 0 < expected.precision < 1 and 0 < expected.recall < 1
    whole = precision_recall(real, generated)
    # Seven rows at a time, the last block being shorter.
    monkeypatch.setattr(metrics_neighbours, "BLOCK_SIZE", 7 * 40 + 1)
    assert precision_recall(real, generated) == whole == expected


def test_large_offsets_leave_the_answer_alone() -> None:
    real, generated = draws(100, "real").double(), draws(100, "samples", scale=1.2).double()
    assert precision_recall(real + 1e4, generated + 1e4) == precision_recall(real, generated)


@pytest.mark.parametrize(
    ("real", "generated", "because"),
    [
        (torch.zeros(9, 2), torch.zeros(8, 2), "as many real as generated samples.* got 9 and 8"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "n >= 4"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "one width, got 2 and 3"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), "18 numbers that are not finite"),
    ],
)
def test_precision_and_recall_refuse_what_they_cannot_compare(real: Tensor, generated: Tensor, because: str) -> None:
    with pytest.raises(InputError, match=because):
        precision_recall(real, generated)


@pytest.mark.parametrize("num_groups", [2, 5, 43])
def test_the_jackknife_is_that_of_the_metric_without_each_group(
    num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generated = draws(43, "real").double(), draws(43, "samples", scale=1.2).double() + 0.5
    group = torch.arange(43) % num_groups
    without = torch.tensor(
        [precision_recall(real[group != g], generated[group != g]) for g in range(num_groups)], dtype=torch.float64
    )
    expected = ((num_groups - 1) * without.var(0, correction=0)).sqrt()
    assert (expected > 0).all()
    monkeypatch.setattr(metrics_neighbours, "BLOCK_SIZE", 7 * 43 + 1)
    found = precision_recall_error(real, generated, num_groups=num_groups)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-6, atol=0)


def spread_and_error(sets: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    found = torch.tensor([precision_recall(*pair) for pair in sets])
    error = torch.tensor([precision_recall_error(*pair) for pair in sets])
    return found.std(0), error.square().mean(0).sqrt()


def test_the_jackknife_has_the_spread_of_fresh_sets_where_outliers_decide() -> None:
    def with_outliers(repeat: int) -> Tensor:
        is_far = torch.rand(200, 1, generator=stream(0, "far", repeat)) < 0.01
        return torch.where(is_far, 8.0, 0.5) * draws(200, "samples", repeat)

    sets = [(draws(200, "real", repeat), with_outliers(repeat)) for repeat in range(150)]
    spread, error = spread_and_error(sets)
    # A standard deviation of 150 has an error of 6 %.
    assert 0.8 < float(error[1] / spread[1]) < 1.25
    # That of a share of independent points is a third of it: two outliers, more or less, hold all that is recalled.
    recall = torch.tensor([precision_recall(*pair).recall for pair in sets]).mean()
    assert float((recall * (1 - recall) / 200).sqrt() / spread[1]) < 0.4


def test_the_jackknife_is_on_the_large_side_of_even_sets() -> None:
    sets = [(draws(200, "real", repeat), draws(200, "samples", repeat)) for repeat in range(100)]
    spread, error = spread_and_error(sets)
    assert (error > spread).all() and (error < 2 * spread).all()


@pytest.mark.parametrize(
    ("num", "num_groups", "because"), [(9, 10, "n >= 10"), (7, 2, "n >= 8"), (20, 1, "at least 2 groups, got 1")]
)
def test_the_jackknife_refuses_what_leaves_too_little(num: int, num_groups: int, because: str) -> None:
    with pytest.raises(InputError, match=because):
        precision_recall_error(draws(num, "real"), draws(num, "samples"), num_groups=num_groups)
    with pytest.raises(InputError, match="as many real as generated"):
        precision_recall_error(draws(30, "real"), draws(31, "samples"))


# --- density and coverage ------------------------------------------------------------------------


def test_density_and_coverage_on_a_line_are_worked_out_by_hand() -> None:
    real = column(0, 1, 2, 3)  # balls for k = 1: [-1, 1], [0, 2], [1, 3], [2, 4]
    # 0.5 lies in two of them, 1.0 in three for a ball has its edge, and 9 in none.
    assert density_coverage(real, column(0.5, 1.0, 9.0), 1) == (5 / 3, 3 / 4)
    # For k = 2 the balls are [-2, 2], [0, 2], [1, 3] and [1, 5].
    assert density_coverage(real, column(4.0), 2) == (1 / 2, 1 / 4)
    assert density_coverage(real, real + 100, 1) == (0.0, 0.0)


@pytest.mark.parametrize(("num_real", "num_generated", "k"), [(40, 40, 5), (30, 60, 3), (60, 10, 1)])
def test_sets_of_one_law_have_the_density_and_coverage_of_the_closed_form(
    num_real: int, num_generated: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_neighbours, "BLOCK_SIZE", 7 * num_generated)
    found = torch.tensor(
        [
            density_coverage(draws(num_real, "real", repeat), draws(num_generated, "samples", repeat), k)
            for repeat in range(400)
        ]
    )
    no_sample = math.prod((num_real - i) / (num_real + num_generated - i) for i in range(1, k + 1))
    expected = torch.tensor([1.0, 1 - no_sample])
    z = (found.mean(0) - expected) / (found.std(0) / math.sqrt(len(found)))
    assert (z.abs() < 4).all()


def test_outliers_make_recall_and_not_coverage() -> None:
    real, narrow = draws(300, "real"), draws(300, "samples", scale=0.4)
    # Far away on every axis, so that each of their balls holds all that is beyond the samples on its side.
    outlying = torch.cat([narrow[16:], 30 * torch.eye(8), -30 * torch.eye(8)])
    assert precision_recall(real, outlying).recall > 0.9 > 0.2 > precision_recall(real, narrow).recall
    gap = density_coverage(real, outlying).coverage - density_coverage(real, narrow).coverage
    assert abs(gap) < 0.03


def test_density_and_coverage_refuse_what_they_cannot_compare() -> None:
    with pytest.raises(InputError, match="a density and coverage needs .* n >= 6, got shape \\(5, 8\\)"):
        density_coverage(draws(5, "real"), draws(9, "samples"))
    with pytest.raises(InputError, match="n >= 1, got shape \\(0, 8\\)"):
        density_coverage(draws(9, "real"), draws(0, "samples"))
    with pytest.raises(InputError, match="one width, got 8 and 3"):
        density_coverage(draws(9, "real"), draws(9, "samples")[:, :3])


def test_neighbours_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    x, reference = draws(30, "x").double(), draws(50, "reference").double()
    monkeypatch.setattr(metrics_neighbours, "BLOCK_SIZE", 7 * 50)
    found = nearest_neighbours(x, reference, 3)
    distances = torch.stack([(row - reference).norm(dim=1) for row in x])
    expected = distances.sort(dim=1)
    torch.testing.assert_close(found.distance, expected.values[:, :3])
    assert torch.equal(found.indices, expected.indices[:, :3])


def test_a_copy_is_its_own_nearest_neighbour() -> None:
    reference = draws(50, "reference").double()
    found = nearest_neighbours(reference[[7, 3]], reference)
    assert found.indices.tolist() == [[7], [3]]
    assert found.distance.tolist() == [[0.0], [0.0]]
    assert float(nearest_neighbours(reference[[7]] + 1e-3, reference).distance) == pytest.approx(1e-3 * math.sqrt(8))


def test_a_search_refuses_too_small_a_reference() -> None:
    with pytest.raises(InputError, match="a search for neighbours needs .* n >= 3, got shape \\(2, 8\\)"):
        nearest_neighbours(draws(5, "x"), draws(2, "reference"), 3)
    with pytest.raises(InputError, match="one width"):
        nearest_neighbours(draws(5, "x")[:, :3], draws(2, "reference"))


def test_numbers_are_those_of_torch_fidelity() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc", reason="needs the extra metrics")
    real, generated = draws(150, "real").double(), draws(150, "samples", scale=1.3).double()
    theirs = prc.prc_features_to_metric(generated, real, prc_neighborhood=3, prc_batch_size=64, verbose=False)
    ours = precision_recall(real, generated)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
