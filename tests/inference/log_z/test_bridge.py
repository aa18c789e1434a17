"""Bridge sampling against known normalisers, and its error against its own spread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import targets
from ppl_vaebm.inference.log_z import bridge as bridge_sampling
from ppl_vaebm.inference.log_z.bridge import Bridge, bridge
from tests.inference.log_z.test_ais import TARGETS, errors_off, start


def bridge_to(target: targets.Target, draws: Tensor, num: int, generator: torch.Generator) -> Bridge:
    """Bridge from draws of N(0, I) to draws ``(C, N, D)`` of a target."""
    reference = -target.potential(start(target, num, generator))
    return bridge(reference.unsqueeze(1), -target.potential(draws.flatten(0, 1)).reshape(draws.shape[:2]))


@pytest.mark.parametrize("name", TARGETS)
def test_it_finds_the_known_log_z(name: str, generator: torch.Generator) -> None:
    target = TARGETS[name]
    found = bridge_to(target, target.exact(generator, 3_000).unsqueeze(1), 5_000, generator)
    assert errors_off(found.log_z, target.log_z) < 5
    assert found.log_z.error < 0.05
    # Negative control: draws of N(0, I) in place of the target's.
    wrong = bridge_to(target, start(target, 3_000, generator).unsqueeze(1), 5_000, generator)
    assert errors_off(wrong.log_z, target.log_z) > 10


def test_two_equal_densities_are_off_by_their_constant_exactly() -> None:
    found = bridge(torch.full((5, 1), -3.25), torch.full((2, 7), -3.25))
    assert found.log_z.value == pytest.approx(-3.25, abs=1e-12)
    assert found.log_z.error == pytest.approx(0, abs=1e-12)


def test_the_error_is_the_spread_over_repetitions(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    found = [bridge_to(target, target.exact(generator, 200).unsqueeze(1), 300, generator).log_z for _ in range(300)]
    scores = torch.tensor([(one.value - target.log_z) / one.error for one in found])
    assert abs(float(scores.mean())) < 0.5  # the bias is of second order
    assert float(scores.std()) == pytest.approx(1, rel=5 / math.sqrt(600))


def slow_chains(target: targets.Target, num_chains: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """Make chains that stay where they are for ten draws, ``(C, N, D)``."""
    fresh = target.exact(generator, num_chains * num_draws // 10).reshape(num_chains, num_draws // 10, -1)
    return fresh.repeat_interleave(10, dim=1)


def test_the_error_counts_autocorrelated_draws_for_fewer(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    scores, naive = [], []
    for _ in range(150):
        draws = slow_chains(target, 40, 50, generator)
        found = bridge_to(target, draws, 4_000, generator).log_z
        scores.append((found.value - target.log_z) / found.error)
        flat = bridge_to(target, draws.flatten(0, 1).unsqueeze(1), 4_000, generator).log_z
        naive.append((flat.value - target.log_z) / flat.error)
    spread = float(torch.tensor(scores).std())
    assert spread == pytest.approx(1, rel=5 / math.sqrt(300))
    assert float(torch.tensor(naive).std()) > 1.5  # negative control: ten draws at one place taken for ten


def test_where_nothing_overlaps_it_says_so(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    far = targets.gaussian(torch.full((3,), 9.0, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64))
    monkeypatch.setattr(bridge_sampling, "MAX_ITERATIONS", 50)
    try:
        found = bridge_to(far, far.exact(generator, 500).unsqueeze(1), 500, generator)
    except InputError as error:
        assert "hardly overlap" in str(error)
    else:
        assert found.log_z.ess < 10


def test_bad_input_is_refused() -> None:
    good = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[0, 2] = math.inf
    with pytest.raises(InputError, match="finite energies of the draws to bridge, found 1 that are not"):
        bridge(good, bad)
    with pytest.raises(InputError, match="at least 2 chains"):
        bridge(good, good[:1])
