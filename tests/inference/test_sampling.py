"""Samples by chains from fresh noise: which draws they are, and of what."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference import sampling
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import chain_blocks, decode_in_blocks, num_blocks, sample_by_chains, tuned_params
from ppl_vaebm.models.vaebm import VAEBM
from tests.small_models import VARIANCE, QuadraticEnergy, linear_vae

CENTER, WIDTH = 0.6, 0.5
PRECISION = 1 / VARIANCE + 1 / WIDTH**2
MEAN = CENTER / WIDTH**2 / PRECISION
"""Of x under h."""


def linear_potential() -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), QuadraticEnergy(CENTER, WIDTH)))


@pytest.mark.parametrize("config", [KernelConfig("independence"), KernelConfig("mala"), KernelConfig("mixture")])
def test_no_step_gives_the_vae_and_enough_steps_the_product(config: KernelConfig) -> None:
    num = 2_000
    chains = sample_by_chains(linear_potential(), config, num=num, steps=[0, 30], seed=0)
    start, end = (decode_in_blocks(linear_potential(), chains.positions[count])[:, 0] for count in (0, 30))
    assert abs(start.mean()) < 4 * math.sqrt(VARIANCE / num)
    assert float(start.var()) == pytest.approx(VARIANCE, rel=4 * math.sqrt(2 / num))
    assert abs(end.mean() - MEAN) < 4 / math.sqrt(PRECISION * num)
    assert float(end.var()) == pytest.approx(1 / PRECISION, rel=4 * math.sqrt(2 / num))


def test_a_sample_depends_neither_on_the_number_nor_on_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 20)
    few = sample_by_chains(linear_potential(), KernelConfig("mala"), num=7, steps=[3], seed=0)
    many = sample_by_chains(linear_potential(), KernelConfig("mala"), num=45, steps=[0, 3, 5], seed=0)
    other = sample_by_chains(linear_potential(), KernelConfig("mala"), num=7, steps=[3], seed=1)
    assert {count: len(position) for count, position in many.positions.items()} == {0: 45, 3: 45, 5: 45}
    assert torch.equal(many.positions[3][:7], few.positions[3])
    assert not torch.equal(other.positions[3], few.positions[3])


def test_evaluations_are_counted_per_chain() -> None:
    """However many chains of the last block nobody asked for."""
    for num in (5, 600):
        assert sample_by_chains(linear_potential(), KernelConfig("pcn"), num=num, steps=[0, 9], seed=0).num_evals == 9


def test_the_pilot_tunes_to_the_target() -> None:
    potential = linear_potential()
    config = KernelConfig("pcn", target_acceptance=0.6)
    chains = sample_by_chains(potential, config, num=1_000, steps=[40], seed=0)
    assert chains.step_size == float(tuned_params(potential, config, seed=0).step_size)
    assert chains.acceptance_rate == pytest.approx(0.6, abs=0.06)


def test_blocks_say_what_their_chains_had_cost_until_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 20)
    steps_taken = 0

    def on_step() -> None:
        nonlocal steps_taken
        steps_taken += 1

    config = KernelConfig("mala", step_size=0.3)
    potential = linear_potential()
    blocks = list(chain_blocks(potential, config, num=45, steps=[0, 2, 5], seed=0, on_step=on_step))
    assert len(blocks) == num_blocks(potential, 45) == 3 and steps_taken == 3 * 5
    assert [len(block.positions[5]) for block in blocks] == [20, 20, 5] and all(block.size == 20 for block in blocks)
    for block in blocks:
        assert block.num_evals == {0: 0, 2: 2, 5: 5}
        assert 0 <= block.seconds[0] <= block.seconds[2] <= block.seconds[5]
        assert block.acceptance_rate.shape == block.num_divergent.shape == (5,)
    whole = sample_by_chains(potential, config, num=45, steps=[0, 2, 5], seed=0)
    assert torch.equal(torch.cat([block.positions[2] for block in blocks]), whole.positions[2])
    assert whole.acceptance_rate == pytest.approx(float(torch.cat([b.acceptance_rate for b in blocks]).mean()))
