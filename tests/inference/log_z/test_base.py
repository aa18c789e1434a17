"""Errors of log normalisers, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.log_z.base import bootstrap_error, chain_mean, log_mean_exp, weights_ess


@pytest.mark.parametrize(
    ("weights", "ess"),
    [
        ([1.0] * 7, 7.0),
        ([1.0, 0.0, 0.0], 1.0),
        ([3.0, 3.0, 0.0, 0.0], 2.0),
        ([1.0, 2.0, 3.0], 36 / 14),
        ([1e-200, 2e-200, 3e-200], 36 / 14),
    ],
)
def test_effective_samples_of_known_weights(weights: list[float], ess: float) -> None:
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    assert weights_ess(log_weights) == pytest.approx(ess, rel=1e-12)
    assert weights_ess(log_weights + 1_000) == pytest.approx(ess, rel=1e-10)


def test_the_log_of_a_mean_has_the_error_of_the_delta_method() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    estimate = log_mean_exp(weights.log() - 900)
    assert estimate.value == pytest.approx(math.log(3) - 900)
    assert estimate.error == pytest.approx(float(weights.std()) / math.sqrt(4) / 3)
    assert estimate.ess == pytest.approx(144 / 50)


def test_the_bootstrap_agrees_with_the_delta_method_where_many_weights_count(generator: torch.Generator) -> None:
    log_weights = 0.5 * torch.randn(2_000, generator=generator, dtype=torch.float64) - 700
    # The bootstrap's own error is 2 %.
    assert bootstrap_error(log_weights, generator) == pytest.approx(log_mean_exp(log_weights).error, rel=0.1)
    assert math.isnan(bootstrap_error(log_weights.index_fill(0, torch.tensor([3]), math.nan), generator))


RHO = 0.8


def correlated(num_chains: int, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Draw stationary AR(1) chains of unit variance, ``(C, N)``."""
    noise = torch.randn(num_chains, num_draws, generator=generator, dtype=torch.float64)
    columns = [noise[:, 0]]
    for index in range(1, num_draws):
        columns.append(RHO * columns[-1] + math.sqrt(1 - RHO**2) * noise[:, index])
    return torch.stack(columns, 1)


def test_the_error_over_chains_knows_of_autocorrelation(generator: torch.Generator) -> None:
    num_chains, num_draws = 400, 200
    found = chain_mean(correlated(num_chains, num_draws, generator).unsqueeze(2).expand(-1, -1, 2))
    lags = torch.arange(1, num_draws)
    inflation = 1 + 2 * float(((1 - lags / num_draws) * RHO**lags).sum())
    error = math.sqrt(inflation / (num_chains * num_draws))
    assert found.error.tolist() == pytest.approx([error] * 2, rel=5 / math.sqrt(2 * num_chains))
    assert found.value.abs().max() < 5 * error
    assert found.ess.tolist() == pytest.approx([num_chains * num_draws / inflation] * 2, rel=10 / math.sqrt(800))
    # Negative control: draws taken for independent would claim a third of the error.
    naive = 1 / math.sqrt(num_chains * num_draws)
    assert float(found.error[0]) > 2.5 * naive


def test_independent_draws_are_chains_of_one(generator: torch.Generator) -> None:
    draws = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    found = chain_mean(draws)
    assert float(found.error) == pytest.approx(float(draws.std()) / math.sqrt(50))
    assert float(found.ess) == pytest.approx(50)
    assert math.isnan(float(chain_mean(torch.ones(4, 3)).ess))


def test_one_chain_has_no_error() -> None:
    with pytest.raises(InputError, match="at least 2 chains .* found 1"):
        chain_mean(torch.zeros(1, 100))
