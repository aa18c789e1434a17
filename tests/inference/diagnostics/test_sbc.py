"""Simulation-based calibration where the posterior is known: what is right passes, and what is wrong does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.diagnostics.sbc import ranks, uniformity
from ppl_vaebm.rng import stream

NUM_DRAWS, NUM_BINS = 32, 11


def test_a_rank_counts_the_draws_below() -> None:
    draws = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert ranks(torch.tensor([0.5, 2.5, 9.0]), draws).tolist() == [0, 2, 3]


def test_chi_square_of_known_counts() -> None:
    found = uniformity(torch.tensor([0, 0, 0, 1, 2, 3]), num_draws=3, num_bins=2)
    assert found.counts == [4, 2]
    assert found.chi_square == pytest.approx(2 / 3)
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(1 / 3)))  # one degree of freedom
    assert uniformity(torch.arange(8) % 4, 3, 4).p_value == 1.0
    with pytest.raises(ValueError, match="expected num_bins to divide the 4 possible ranks"):
        uniformity(torch.tensor([0]), num_draws=3, num_bins=3)


def p_value(seed: int, num: int = 512, shift: float = 0.0, factor: float = 1.0) -> float:
    """Calibrate x ~ N(0, 1), y = x + N(0, 1): the posterior is N(y / 2, 1 / 2), here shifted or stretched."""
    generator = stream(seed, "calibration")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    truth = normal(num)
    y = truth + normal(num)
    draws = y.unsqueeze(1) / 2 + shift + factor * math.sqrt(0.5) * normal(num, NUM_DRAWS)
    return uniformity(ranks(truth, draws), NUM_DRAWS, NUM_BINS).p_value


def test_p_values_of_a_right_posterior_are_uniform(seed: int) -> None:
    p_values = torch.tensor([p_value(seed + index) for index in range(200)], dtype=torch.float64)
    found = p_values.sort().values
    distance = (found - torch.arange(1, 201) / 200).abs().max()
    assert distance * math.sqrt(200) < 2  # Kolmogorov's distance: probability 7e-4


@pytest.mark.parametrize("fault", [{"shift": 0.3}, {"factor": 0.7}, {"factor": 1.4}], ids=str)
def test_ranks_of_a_wrong_posterior_are_not_uniform(fault: dict[str, float], seed: int) -> None:
    assert p_value(seed, **fault) < 1e-4  # type: ignore[arg-type]
