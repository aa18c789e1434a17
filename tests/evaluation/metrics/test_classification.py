"""Inception Scores and areas under ROC curves against closed forms and simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics.classification import auroc_estimate, inception_score
from ppl_vaebm.rng import stream

# --- Inception Score -----------------------------------------------------------------------------


def certain(*classes: int, num_classes: int = 10) -> Tensor:
    """Logits of samples whose classes are beyond doubt."""
    return 1000.0 * torch.nn.functional.one_hot(torch.tensor(classes), num_classes)


def test_even_certain_classes_score_their_number() -> None:
    assert inception_score(certain(*range(10)).repeat(10, 1)) == pytest.approx((10.0, 0.0), abs=1e-9)
    assert inception_score(certain(0, 1, 2).repeat(20, 1)) == pytest.approx((3.0, 0.0), abs=1e-9)


def test_constant_answers_score_one() -> None:
    assert inception_score(torch.randn(10, generator=stream(0, "logits")).expand(50, 10)) == pytest.approx((1.0, 0.0))
    assert inception_score(certain(4).repeat(50, 1)) == pytest.approx((1.0, 0.0))


def test_two_probabilities_have_the_divergence_worked_out_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    # The marginal is even, so KL = log 2 - H(0.8).
    expected = math.exp(math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert inception_score(logits, 1).value == pytest.approx(expected)
    # A constant added to a row of logits changes no probability.
    assert inception_score(logits + torch.tensor([[5.0], [-3.0]]), 1).value == pytest.approx(expected)


def test_splits_are_scored_one_by_one() -> None:
    logits = torch.cat([certain(0, 0, 0, 0), certain(0, 1, 0, 1)])
    assert inception_score(logits, 2) == pytest.approx((1.5, 0.5))
    assert inception_score(logits, 1).value == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize("logits", [torch.zeros(9, 3), torch.zeros(20), torch.full((20, 3), math.nan)])
def test_inception_score_refuses_what_has_none(logits: Tensor) -> None:
    with pytest.raises(InputError, match="an Inception Score needs finite features .* n >= 10"):
        inception_score(logits)


def test_score_is_that_of_torch_fidelity() -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason="needs the extra metrics")
    logits = 3 * torch.randn(107, 12, generator=stream(0, "logits"))
    theirs = isc.isc_features_to_metric(logits[:100], splits=10, shuffle=False)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits[:100]) == pytest.approx(expected, rel=1e-9)


# --- area under the ROC curve --------------------------------------------------------------------


def auroc(inside: Tensor, outside: Tensor) -> float:
    return auroc_estimate(inside, outside).value


def test_small_sets_are_counted_by_hand() -> None:
    # Of the pairs, 2 > 1, 2 > 0 and 1 > 0 are won, and 1 = 1 counts half.
    assert auroc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == 3.5 / 4
    assert auroc(torch.ones(3), torch.ones(5)) == 0.5
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1.0
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 0.0
    # What the model holds for impossible is below all else.
    impossible = torch.tensor([-math.inf, -math.inf])
    assert auroc(torch.tensor([-1e30, 0.0]), impossible) == 1.0
    assert auroc(impossible, impossible) == 0.5


def scores(num: int, *key: str | int, mean: float = 0.0, is_rounded: bool = False) -> Tensor:
    x = mean + torch.randn(num, generator=stream(0, *key))
    return x.round() if is_rounded else x


def test_pairs_are_those_of_brute_force_and_swapping_the_sets_reverses_it() -> None:
    a, b = scores(40, "a", mean=0.5, is_rounded=True), scores(30, "b", is_rounded=True)
    difference = a.unsqueeze(1) - b
    ties = (difference == 0).double()
    assert float(ties.mean()) > 0.1
    expected = float(((difference > 0).double() + 0.5 * ties).mean())
    assert auroc(a, b) == pytest.approx(expected, abs=1e-12)
    assert auroc(b, a) == pytest.approx(1 - expected, abs=1e-12)
    # A law that grows changes no order.
    assert auroc(a.exp(), b.exp()) == auroc(a, b)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_two_gaussians_have_their_closed_form_and_the_error_is_the_spread(is_rounded: bool) -> None:
    found = torch.tensor(
        [
            auroc_estimate(
                scores(80, "a", repeat, mean=1.0, is_rounded=is_rounded), scores(50, "b", repeat, is_rounded=is_rounded)
            )
            for repeat in range(300)
        ],
        dtype=torch.float64,
    )
    value, error = found.unbind(1)
    spread = float(value.std())
    assert 0.85 < float(error.square().mean().sqrt()) / spread < 1.15
    truth = 0.5 * (1 + math.erf(1.0 / math.sqrt(2) / math.sqrt(2)))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    # Rounding makes ties of what was in order, which draws the area to one half.
    assert (abs(float(value.mean()) - truth) < 5 * spread / math.sqrt(300)) is not is_rounded


@pytest.mark.parametrize(
    ("inside", "outside", "because"),
    [
        (torch.zeros(3), torch.tensor([0.0, math.nan]), "with 1 such scores outside"),
        (torch.tensor([0.0, math.inf]), torch.zeros(3), "with 1 such scores inside"),
        (torch.zeros(1), torch.zeros(3), "n >= 2"),
        (torch.zeros(3), torch.zeros(3, 1), r"got shape \(3, 1\)"),
    ],
)
def test_area_refuses_scores_that_have_no_order(inside: Tensor, outside: Tensor, because: str) -> None:
    with pytest.raises(InputError, match=because):
        auroc_estimate(inside, outside)
