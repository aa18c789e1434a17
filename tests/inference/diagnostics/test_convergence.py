"""All columns at once: the same digits as ArviZ for one, and known answers for chains that do and do not mix."""

from __future__ import annotations

import math

import arviz
import numpy as np
import pytest
from numpy.typing import NDArray

from ppl_vaebm.inference.diagnostics import convergence
from ppl_vaebm.inference.diagnostics.convergence import TAIL_PROBABILITIES, diagnose_columns, ess_of_means, nested_r_hat

Draws = NDArray[np.float64]


def autoregression(rho: float, num_chains: int, num_draws: int, num_columns: int, seed: int = 0) -> Draws:
    """Draw stationary AR(1) chains ``(C, N, D)`` with unit variance."""
    noise = np.random.default_rng(seed).normal(size=(num_chains, num_draws, num_columns))
    draws = noise.copy()
    for t in range(1, num_draws):
        draws[:, t] = rho * draws[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return draws


def with_rejections(draws: Draws, rate: float, seed: int = 1) -> Draws:
    """Repeat draws as a Metropolis test does, so that columns have ties."""
    is_rejected = np.random.default_rng(seed).random(draws.shape) < rate
    draws = draws.copy()
    for t in range(1, draws.shape[1]):
        draws[:, t] = np.where(is_rejected[:, t], draws[:, t - 1], draws[:, t])
    return draws


def one_by_one(draws: Draws) -> convergence.Convergence:
    """Ask ArviZ for every column."""
    columns = [draws[:, :, index] for index in range(draws.shape[2])]
    with np.errstate(divide="ignore", invalid="ignore"):
        return convergence.Convergence(
            np.array([arviz.rhat(column, method="rank") for column in columns], dtype=np.float64),
            np.array([arviz.ess(column, method="bulk") for column in columns], dtype=np.float64),
            np.array([arviz.ess(column, method="tail", prob=TAIL_PROBABILITIES) for column in columns], np.float64),
        )


KINDS = {
    "positively correlated": autoregression(0.9, 4, 200, 5),
    "antithetic": autoregression(-0.6, 4, 200, 5),
    "independent, an odd number of draws": autoregression(0.0, 3, 101, 5),
    "as short as can be": autoregression(0.3, 2, 4, 5),
    "seven draws": autoregression(0.3, 5, 7, 5),
    "with ties": with_rejections(autoregression(0.5, 4, 150, 5), 0.6),
    "of few values": np.round(autoregression(0.5, 4, 150, 5)),
    "that disagree": autoregression(0.5, 4, 150, 5) + np.arange(4.0)[:, None, None],
    "of other widths": autoregression(0.5, 4, 150, 5) * np.array([1.0, 1.0, 1.0, 9.0])[:, None, None],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_equals_arviz(kind: str) -> None:
    draws = KINDS[kind]
    for name, ours, theirs in zip(
        convergence.Convergence._fields, diagnose_columns(draws), one_by_one(draws), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=name)


def test_comparison_with_arviz_detects_a_wrong_value() -> None:
    draws = KINDS["with ties"]
    moved = draws.copy()
    moved[0, 0] += 1.0
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(diagnose_columns(moved).ess_bulk, one_by_one(draws).ess_bulk, rtol=1e-10)


def test_columns_do_not_depend_on_their_neighbours_or_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.concatenate([KINDS["with ties"], KINDS["of few values"], KINDS["that disagree"]], axis=2)
    whole = diagnose_columns(draws)
    monkeypatch.setattr(convergence, "BLOCK_VALUES", 1)
    for ours, alone in zip(whole, diagnose_columns(draws), strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_float32_draws_are_ranked_without_rounding() -> None:
    draws = autoregression(0.8, 4, 100, 20).astype(np.float32)
    for ours, theirs in zip(diagnose_columns(draws), diagnose_columns(draws.astype(np.float64)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_effective_draws_of_an_autoregression_are_known() -> None:
    rho, num_columns = 0.8, 200
    ess = diagnose_columns(autoregression(rho, 8, 1000, num_columns)).ess_bulk
    expected = 8 * 1000 * (1 - rho) / (1 + rho)
    error = float(ess.std()) / math.sqrt(num_columns)
    # The truncated sum of correlations is biased by a few per cent, so the error bar alone would be too strict.
    assert abs(ess.mean() - expected) < 5 * error + 0.03 * expected


def test_a_constant_or_nan_column_is_nan_and_leaves_the_others_unchanged() -> None:
    draws = autoregression(0.5, 4, 60, 4)
    clean = diagnose_columns(draws)
    draws[:, :, 1] = 3.0
    draws[2, 7, 2] = np.nan
    for ours, before in zip(diagnose_columns(draws), clean, strict=True):
        assert np.isnan(ours[1:3]).all()
        np.testing.assert_array_equal(ours[[0, 3]], before[[0, 3]])


def test_columns_with_infinite_draws_have_a_rank_r_hat() -> None:
    draws = autoregression(0.0, 4, 100, 1)
    draws[1, 7] = np.inf
    found = diagnose_columns(draws)
    assert found.r_hat[0] < 1.1 and found.ess_bulk[0] > 100


def test_r_hat_of_one_chain_compares_its_quarters() -> None:
    draws = autoregression(0.5, 1, 101, 3)
    halves = draws[:, :100].reshape(2, 50, 3)
    np.testing.assert_array_equal(diagnose_columns(draws).r_hat, diagnose_columns(halves).r_hat)
    assert np.isnan(diagnose_columns(draws[:, :6]).r_hat).all()


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 100), (4, 10, 0)])
def test_draws_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected draws"):
        diagnose_columns(np.zeros(shape))


def test_effective_draws_of_means_equal_arviz() -> None:
    draws = KINDS["positively correlated"]
    theirs = [float(arviz.ess(draws[:, :, index], method="mean")) for index in range(draws.shape[2])]
    np.testing.assert_allclose(ess_of_means(draws.transpose(2, 0, 1)), theirs, rtol=1e-10)


# --- nested R-hat ------------------------------------------------------------------------------------

# arviz_stats 0.8.0, array_stats.rhat_nested(draws, ids), draws of nested_draws() below.
NESTED_BY_ARVIZ_STATS: dict[tuple[int, ...], float] = {
    (0, 0, 1, 1, 2, 2, 3, 3): 1.1665820394145503,
    (0, 1, 2, 3, 0, 1, 2, 3): 1.0975476441921,
    (0, 1, 2, 3, 4, 5, 6, 7): 1.3148761739789678,
}


def nested_draws() -> Draws:
    generator = np.random.default_rng(5)
    return generator.normal(size=(8, 11)) + generator.normal(size=(8, 1))


@pytest.mark.parametrize("ids", NESTED_BY_ARVIZ_STATS)
def test_nested_r_hat_equals_arviz_stats(ids: tuple[int, ...]) -> None:
    found = nested_r_hat(nested_draws(), np.array(ids))
    assert found == pytest.approx(NESTED_BY_ARVIZ_STATS[ids], rel=1e-12)
    if hasattr(arviz, "rhat_nested"):
        assert found == pytest.approx(float(arviz.rhat_nested(nested_draws(), superchain_ids=list(ids))), rel=1e-12)


def test_many_short_chains_that_have_mixed_pass_the_nested_r_hat_only() -> None:
    draws = autoregression(0.7, 256, 8, 1)[:, :, 0]
    groups = np.arange(256) // 64
    assert nested_r_hat(draws, groups) < 1.02
    assert diagnose_columns(draws[:, :, None]).r_hat[0] > 1.2
    stuck = draws + np.array([0.0, 0.0, 0.0, 1.5])[groups][:, None]  # one group has not left its start
    assert nested_r_hat(stuck, groups) > 1.1


def test_nested_r_hat_of_a_nan_is_nan() -> None:
    draws = nested_draws()
    draws[0, 0] = np.nan
    assert math.isnan(nested_r_hat(draws, np.arange(8) // 2))


@pytest.mark.parametrize(
    ("ids", "words"), [([0] * 8, "two groups"), ([0, 0, 0, 1, 1, 1, 1, 1], "one size"), ([0, 1], "expected draws")]
)
def test_nested_r_hat_refuses_groups_that_cannot_be_compared(ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nested_r_hat(nested_draws(), np.array(ids))
