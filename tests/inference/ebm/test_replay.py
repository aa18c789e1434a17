"""The store of persistent chains."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.inference.ebm.replay import Replay
from ppl_vaebm.rng import stream


def numbered(size: int, dim: int = 3) -> torch.Tensor:
    """Positions far from N(0, I), each its own slot's number plus 100 in every column."""
    return (100.0 + torch.arange(size, dtype=torch.float64)).unsqueeze(1).expand(size, dim).clone()


def test_with_probability_one_every_chain_goes_on_from_its_slot(generator: torch.Generator) -> None:
    replay = Replay(numbered(50))
    positions, slots, _ = replay.take(generator, 20, 1.0)
    assert torch.equal(positions, numbered(50)[slots])
    assert len(slots.unique()) == 20 and slots.min() >= 0 and slots.max() < 50
    assert slots.tolist() != sorted(slots.tolist())


def test_with_probability_zero_every_chain_restarts_from_the_reference(generator: torch.Generator) -> None:
    replay = Replay(numbered(5_000))
    positions, _, _ = replay.take(generator, 5_000, 0.0)
    assert positions.dtype == torch.float64
    assert positions.mean(0).abs().max() < 5 / math.sqrt(5_000)
    assert (positions.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 5_000)
    correlation = torch.corrcoef(positions.T) - torch.eye(3, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(5_000)
    assert torch.equal(replay.positions, numbered(5_000))


@pytest.mark.parametrize("probability", [0.2, 0.95])
def test_in_between_that_share_goes_on_each_as_a_whole(probability: float, generator: torch.Generator) -> None:
    num = 10_000
    positions, slots, said = Replay(numbered(num)).take(generator, num, probability)
    goes_on = positions > 50
    assert torch.equal(goes_on.all(1), goes_on.any(1))
    assert torch.equal(positions[goes_on[:, 0]], numbered(num)[slots[goes_on[:, 0]]])
    assert torch.equal(goes_on[:, 0], said)
    error = math.sqrt(probability * (1 - probability) / num)
    assert float(goes_on[:, 0].double().mean()) == pytest.approx(probability, abs=5 * error)


def test_every_slot_is_as_likely_as_any(generator: torch.Generator) -> None:
    replay, counts, rounds = Replay(numbered(8)), torch.zeros(8), 4_000
    for _ in range(rounds):
        counts[replay.take(generator, 2, 1.0)[1]] += 1
    assert (counts / rounds - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / rounds)


def test_what_is_put_back_is_what_the_next_take_finds(generator: torch.Generator) -> None:
    replay = Replay(numbered(10))
    positions, slots, _ = replay.take(generator, 4, 1.0)
    moved = (positions + 1000).requires_grad_()
    replay.put(slots, moved)
    assert not replay.positions.requires_grad
    others = torch.ones(10, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(replay.positions[slots], numbered(10)[slots] + 1000)
    assert torch.equal(replay.positions[others], numbered(10)[others])
    again, slots, _ = replay.take(generator, 10, 1.0)
    assert torch.equal(again, replay.positions[slots])


def test_what_was_taken_does_not_change_with_the_store(generator: torch.Generator) -> None:
    replay = Replay(numbered(10))
    positions, slots, _ = replay.take(generator, 4, 1.0)
    kept = positions.clone()
    replay.put(slots, positions - 7)
    assert torch.equal(positions, kept)


def test_a_take_is_a_function_of_its_generator() -> None:
    takes = [Replay(numbered(20)).take(stream(0, "replay"), 6, 0.5) for _ in range(2)]
    assert torch.equal(takes[0][0], takes[1][0]) and torch.equal(takes[0][1], takes[1][1])
    other = Replay(numbered(20)).take(stream(1, "replay"), 6, 0.5)
    assert not torch.equal(takes[0][1], other[1])
