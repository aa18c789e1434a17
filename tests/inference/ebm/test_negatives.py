"""Persistent chains of training: their store, their moves and what they report, on a Gaussian VAE and energy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, KernelConfig, KernelName, TrainingKernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm import losses
from ppl_vaebm.inference.ebm.negatives import PersistentChains, replay_probability
from ppl_vaebm.inference.kernels.base import KernelInfo, KernelState
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.inference.ebm.parabola import Parabola
from tests.small_models import A, linear_vae

DATA = torch.tensor([[0.5], [-1.0], [2.0], [0.25]], dtype=torch.float64)
NUM = len(DATA)


def chains_at(
    weight: float = 1.3, kernel: TrainingKernelConfig | KernelName = "hmc", *, dim: int = 1, **options: object
) -> PersistentChains:
    ebm = EbmConfig(**{"objective": "mle", "batch_size": NUM, "replay_size": NUM, **options})  # type: ignore[arg-type]
    config = Config(ebm=ebm, kernel=TrainingKernelConfig(kernel) if isinstance(kernel, str) else kernel)
    return PersistentChains(config, noise_potential(VAEBM(linear_vae(dim=dim), Parabola(weight))))


def numbered(size: int) -> PersistentChains:
    """Return chains far from N(0, I), each at its own slot's number plus 100 in both columns."""
    chains = chains_at(batch_size=1, replay_size=size)
    chains.positions[:] = (100.0 + torch.arange(size, dtype=torch.float64)).unsqueeze(1)
    return chains


def advance(chains: PersistentChains, step: int = 0, probability: float = 0.0) -> Any:
    return chains.advance(stream(0, "advance", step), NUM, probability)


# --- the store -------------------------------------------------------------------------------------


def test_all_chains_continue_from_their_slots_with_probability_one(generator: torch.Generator) -> None:
    chains = numbered(50)
    positions, slots, _ = chains.take(generator, 20, 1.0)
    assert torch.equal(positions, numbered(50).positions[slots])
    assert len(slots.unique()) == 20 and slots.min() >= 0 and slots.max() < 50
    assert slots.tolist() != sorted(slots.tolist())


def test_all_chains_restart_from_the_reference_with_probability_zero(generator: torch.Generator) -> None:
    num, chains = 5_000, numbered(5_000)
    positions, _, _ = chains.take(generator, num, 0.0)
    assert positions.dtype == torch.float64
    assert positions.mean(0).abs().max() < 5 / math.sqrt(num)
    assert (positions.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / num)
    correlation = torch.corrcoef(positions.T) - torch.eye(2, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(num)
    assert torch.equal(chains.positions, numbered(num).positions)


@pytest.mark.parametrize("probability", [0.2, 0.95])
def test_that_fraction_of_the_chains_continues_with_all_coordinates(
    probability: float, generator: torch.Generator
) -> None:
    num, chains = 10_000, numbered(10_000)
    positions, slots, reported = chains.take(generator, num, probability)
    is_continued = positions > 50
    assert torch.equal(is_continued.all(1), is_continued.any(1))
    assert torch.equal(positions[is_continued[:, 0]], chains.positions[slots[is_continued[:, 0]]])
    assert torch.equal(is_continued[:, 0], reported)
    error = math.sqrt(probability * (1 - probability) / num)
    assert float(is_continued[:, 0].double().mean()) == pytest.approx(probability, abs=5 * error)


def test_all_slots_are_equally_likely(generator: torch.Generator) -> None:
    chains, counts, rounds = numbered(8), torch.zeros(8), 4_000
    for _ in range(rounds):
        counts[chains.take(generator, 2, 1.0).slots] += 1
    assert (counts / rounds - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / rounds)


def test_the_next_take_finds_what_was_put_back(generator: torch.Generator) -> None:
    chains, before = numbered(10), numbered(10).positions
    positions, slots, _ = chains.take(generator, 4, 1.0)
    taken = positions.clone()
    chains.put(slots, (positions + 1000).requires_grad_())
    assert torch.equal(positions, taken)
    assert not chains.positions.requires_grad
    others = torch.ones(10, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(chains.positions[slots], before[slots] + 1000)
    assert torch.equal(chains.positions[others], before[others])
    again, slots, _ = chains.take(generator, 10, 1.0)
    assert torch.equal(again, chains.positions[slots])


def test_a_take_is_a_function_of_its_generator() -> None:
    takes = [numbered(20).take(stream(0, "replay"), 6, 0.5) for _ in range(2)]
    assert torch.equal(takes[0].positions, takes[1].positions) and torch.equal(takes[0].slots, takes[1].slots)
    assert not torch.equal(takes[0].slots, numbered(20).take(stream(1, "replay"), 6, 0.5).slots)


def test_the_replay_is_annealed() -> None:
    loop = EbmConfig(replay_probability=0.8, replay_anneal_steps=10)
    assert [replay_probability(loop, step) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 0.4, 0.8, 0.8])
    assert replay_probability(EbmConfig(replay_probability=0.8), 0) == 0.8


# --- moves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["langevin", "mala", "pcn"])
def test_no_gradient_flows_through_the_chains(kernel: KernelName) -> None:
    """With a store as large as the batch, the stored positions are the negatives."""
    chains = chains_at(kernel=kernel, num_transitions=3)
    energy = chains.potential.vaebm.energy
    x, z = chains.negatives(advance(chains).end)
    loss = losses.contrastive(energy(DATA), energy(x, z))
    (gradient,) = torch.autograd.grad(loss, energy.get_parameter("weight"))
    ends = chains.potential.decode(chains.positions)
    assert float(gradient) == pytest.approx(0.5 * float(DATA.square().mean() - ends.square().mean()), rel=1e-12)
    assert all(parameter.requires_grad for parameter in energy.parameters())
    assert not any(parameter.requires_grad for parameter in chains.potential.vaebm.vae.parameters())


@pytest.mark.parametrize("image", ["draw", "mean"])
def test_negatives_are_the_draw_or_the_mean_of_the_decoder(image: str) -> None:
    chains = chains_at(negative_image=image)
    end = advance(chains).end
    x, z = chains.negatives(end)
    latents = chains.potential.packing.unravel(end)["eps_z_1"]
    torch.testing.assert_close(z["z_1"], latents, rtol=0, atol=0)
    torch.testing.assert_close(x, A * latents if image == "mean" else chains.potential.decode(end))


@pytest.mark.parametrize("asked", [None, 0.9])
def test_the_step_follows_the_acceptance_rate(asked: float | None) -> None:
    chains = chains_at(kernel=TrainingKernelConfig("mala", step_size=0.5, target_acceptance=asked))
    moved = advance(chains)
    target = asked or build_kernel(KernelConfig("mala"), chains.potential).target_acceptance
    assert target is not None and float(moved.acceptance_rate) != target
    expected = 0.5 * math.exp(0.05 * (float(moved.acceptance_rate) - target))
    assert float(chains.params.step_size) == pytest.approx(expected)
    assert float(moved.step_size) == 0.5  # of the moves that are reported


def test_the_step_of_an_unadjusted_kernel_stays() -> None:
    chains = chains_at(kernel=TrainingKernelConfig("langevin", step_size=0.5))
    assert 0.5 < float(advance(chains).acceptance_rate) < 1
    assert float(chains.params.step_size) == 0.5


def test_divergent_moves_are_counted_between_records_too(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = chains_at(num_transitions=3)
    step = chains.kernel.step

    def diverging(*args: Any) -> tuple[KernelState, KernelInfo]:
        state, info = step(*args)
        return state, info._replace(is_divergent=torch.tensor([True, False, False, False]))

    monkeypatch.setattr(chains, "kernel", chains.kernel._replace(step=diverging))
    for index in range(4):
        moved = advance(chains, index)
    assert chains.record(moved)["num_divergent"] == 4 * 3
    for index in range(2):
        advance(chains, index)
    restored = chains_at(num_transitions=3)
    restored.load(chains.state())
    assert restored.record(moved)["num_divergent"] == 2 * 3


# --- checkpoints -----------------------------------------------------------------------------------


def test_chains_of_another_model_are_refused() -> None:
    state = chains_at(1.3).state()
    chains_at(0.2).load(state)  # another energy moves the same noises
    with pytest.raises(InputError, match=r"replay of 5 chains of 2 noises .*, found one of 4 chains of 2 noises"):
        chains_at(replay_size=5).load(state)
    with pytest.raises(InputError, match=r"4 chains of 4 noises .*, found one of 4 chains of 2 noises"):
        chains_at(dim=2).load(state)
    # As many noises, of other sites.
    with pytest.raises(InputError, match=r"\(eps_z_1 \(1,\), eps_x \(1,\)\), found one of .* \(eps_z_1 \(2,\)\)"):
        chains_at().load({**state, "replay_sites": ["eps_z_1 (2,)"]})


def test_steps_of_a_tempered_kernel_are_restored_to_the_last_bit() -> None:
    one, other = (chains_at(kernel="tempered", num_transitions=1) for _ in range(2))
    for step in range(12):
        advance(one, step)
    other.load(one.state())
    fresh = chains_at(kernel="tempered").params.ladder
    assert one.params.ladder is not None and other.params.ladder is not None and fresh is not None
    assert torch.equal(one.params.ladder.step_sizes, other.params.ladder.step_sizes)
    assert not torch.equal(fresh.step_sizes, one.params.ladder.step_sizes)


def test_the_mean_square_of_the_noise_is_reported_by_site() -> None:
    chains = chains_at()
    moved = advance(chains)
    record = chains.record(moved)
    expected: Tensor = moved.end.square().mean(0)
    assert [record["eps_mean_square/eps_z_1"], record["eps_mean_square/eps_x"]] == pytest.approx(expected.tolist())
    assert record["rms_move"] == pytest.approx(float((moved.end - moved.start).square().mean().sqrt()))
