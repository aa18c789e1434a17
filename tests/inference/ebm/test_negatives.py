"""The negative phase: its images, monitors and replay, and the rungs of the ladder, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig, TrainingKernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.negatives import WEIGHT_ESS_EVERY, NegativePhase
from ppl_vaebm.inference.kernels.base import KernelInfo, KernelState
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import VARIANCE, A, linear_vae

DATA = torch.tensor([[0.5], [-1.0], [2.0], [0.25]], dtype=torch.float64)


class Parabola(Energy):
    """``E = w x^2 / 2 + b``."""

    def __init__(self, weight: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * self.weight * x.square().sum(-1) + self.offset


def variance_at(weight: float) -> float:
    """Variance of x under h at a weight."""
    return VARIANCE / (1 + weight * VARIANCE)


def negatives(weight: float, kernel: str = "hmc", *, dim: int = 1, **options: object) -> NegativePhase:
    ebm = EbmConfig(**{"objective": "mle", "batch_size": 4, "replay_size": 4, **options})  # type: ignore[arg-type]
    config = Config(ebm=ebm, kernel=TrainingKernelConfig(kernel))  # type: ignore[arg-type]
    return NegativePhase(config, noise_potential(VAEBM(linear_vae(dim=dim), Parabola(weight))))


def gradients(phase_of: NegativePhase, x: Tensor, step: int) -> tuple[float, float]:
    """Differentiate the loss of a step by weight and offset."""
    parameters = [phase_of.potential.vaebm.energy.get_parameter(name) for name in ("weight", "offset")]
    by_weight, by_offset = torch.autograd.grad(phase_of(x, step).loss, parameters)
    return float(by_weight), float(by_offset)


# --- chains ----------------------------------------------------------------------------------------


def test_the_loss_may_take_the_decoders_mean() -> None:
    for image in ("draw", "mean"):
        phase_of = negatives(1.3, negative_image=image)
        by_weight, _ = gradients(phase_of, DATA, 0)
        ends = phase_of.potential.packing.unravel(phase_of.replay.positions)  # all of them moved
        x = A * ends["eps_z_1"] if image == "mean" else phase_of.potential.decode(phase_of.replay.positions)
        assert by_weight == pytest.approx(0.5 * float(DATA.square().mean() - x.square().mean()), rel=1e-12)


def test_the_monitors_are_what_they_say() -> None:
    phase_of = negatives(1.3, "langevin")
    phase = phase_of(DATA, 0)
    energy = phase_of.potential.vaebm.energy
    x = phase_of.potential.decode(phase_of.replay.positions)
    # The replay's order is not the batch's, which neither mean nor spread sees.
    gap, sd = energy(DATA).mean() - energy(x).mean(), torch.stack([energy(DATA).std(), energy(x).std()]).max()
    torch.testing.assert_close(phase.monitors["energy_gap"], gap.detach())
    torch.testing.assert_close(phase.monitors["energy_sd"], sd.detach())
    assert 0.5 < float(phase.monitors["acceptance_rate"]) < 1
    assert "saturation" not in phase.monitors  # points are no images
    assert not any(value.requires_grad for value in phase.monitors.values())


def test_draws_of_the_vae_are_looked_at_now_and_then_and_change_nothing() -> None:
    seen, unseen = negatives(1.3), negatives(1.3)
    steps = [0, 9, WEIGHT_ESS_EVERY - 1, WEIGHT_ESS_EVERY, 2 * WEIGHT_ESS_EVERY - 1]  # a log-every of 10 meets the odd
    has_ess = {step: "weight_ess" in seen(DATA, step).record for step in steps}
    assert [step for step in steps if has_ess[step]] == [0, WEIGHT_ESS_EVERY - 1, 2 * WEIGHT_ESS_EVERY - 1]
    for step in steps:
        assert unseen(DATA, step, is_logged=False).record == {}
    assert torch.equal(seen.replay.positions, unseen.replay.positions)


def test_divergent_moves_are_counted_between_records_too(monkeypatch: pytest.MonkeyPatch) -> None:
    phase_of = negatives(1.3, num_transitions=3)
    step = phase_of.kernel.step

    def diverging(*args: Any) -> tuple[KernelState, KernelInfo]:
        state, info = step(*args)
        return state, info._replace(is_divergent=torch.tensor([True, False, False, False]))

    monkeypatch.setattr(phase_of, "kernel", phase_of.kernel._replace(step=diverging))
    counts = [phase_of(DATA, index, is_logged=index % 4 == 3).record.get("num_divergent") for index in range(6)]
    assert counts == [None, None, None, 4 * 3, None, None]
    restored = negatives(1.3)
    restored.load(phase_of.state())
    assert restored(DATA, 6).record["num_divergent"] == 2 * 3


def test_another_seed_has_other_noise() -> None:
    first, same, other = negatives(1.3), negatives(1.3), negatives(1.3)
    losses = [each(DATA, 0, seed=seed).loss.item() for each, seed in ((first, None), (same, 0), (other, 1))]
    assert losses[0] == losses[1] != losses[2]


def test_the_replay_of_another_model_is_refused() -> None:
    state = negatives(1.3).state()
    negatives(0.2).load(state)  # another energy moves the same noises
    with pytest.raises(InputError, match=r"replay of 5 chains of 2 noises .*, found one of 4 chains of 2 noises"):
        negatives(1.3, replay_size=5).load(state)
    with pytest.raises(InputError, match=r"4 chains of 4 noises .*, found one of 4 chains of 2 noises"):
        negatives(1.3, dim=2).load(state)
    # As many noises, of other sites.
    with pytest.raises(InputError, match=r"\(eps_z_1 \(1,\), eps_x \(1,\)\), found one of .* \(eps_z_1 \(2,\)\)"):
        negatives(1.3).load({**state, "replay_sites": ["eps_z_1 (2,)"]})
    old = {name: value for name, value in state.items() if name != "replay_sites"}
    negatives(1.3).load(old)  # as an earlier version wrote it


def test_a_tempered_kernels_steps_are_restored_to_the_last_bit() -> None:
    phases = [negatives(1.3, "tempered", num_transitions=1) for _ in range(2)]
    for step in range(12):
        phases[0](DATA, step, is_logged=False)
    phases[1].load(phases[0].state())
    ladders = [each.params.ladder for each in phases]
    assert ladders[0] is not None and ladders[1] is not None
    assert torch.equal(ladders[0].step_sizes, ladders[1].step_sizes)
    fresh = negatives(1.3, "tempered").params.ladder
    assert fresh is not None and not torch.equal(fresh.step_sizes, ladders[0].step_sizes)


# --- the ladder ------------------------------------------------------------------------------------


def test_the_first_rung_is_the_ratio() -> None:
    ladder, ratio = negatives(0.3, objective="ladder", rung_steps=3), negatives(0.3, objective="ratio")
    for step in range(3):
        assert ladder(DATA, step).loss.item() == ratio(DATA, step).loss.item()
        assert gradients(ladder, DATA, step) == gradients(ratio, DATA, step)
    assert ladder(DATA, 3).loss.item() != ratio(DATA, 3).loss.item()


def on_the_second_rung(num: int, below: float, weight: float, offset: float) -> NegativePhase:
    """Stand on the second rung, with chains that have settled on the energy below."""
    phase_of = negatives(
        below,
        "independence",
        objective="ladder",
        rung_steps=2,
        batch_size=num,
        replay_size=num,
        replay_probability=1.0,
        num_transitions=30,
    )
    phase_of(DATA.repeat(num // 4, 1), 2)  # takes the copy, and lets the chains settle
    with torch.no_grad():
        phase_of.potential.vaebm.energy.get_parameter("weight").fill_(weight)
        phase_of.potential.vaebm.energy.get_parameter("offset").fill_(offset)
    return phase_of


def test_a_rung_has_no_gradient_where_its_density_is_the_datas() -> None:
    """The logit is right at ``E - E_below = log(h_below / p_data)``, with the normalisers' ratio as its constant."""
    num, below, weight = 40_000, 0.4, 1.5
    data = math.sqrt(variance_at(weight)) * torch.randn(num, 1, dtype=torch.float64, generator=stream(0, "data"))
    offset = 0.5 * math.log(variance_at(weight) / variance_at(below))
    phase_of = on_the_second_rung(num, below, weight, offset)
    by_weight, by_offset = gradients(phase_of, data, 3)
    # Each is a difference of two means of num terms, of a sigmoid below 1 times x^2 / 2, and of a sigmoid.
    assert abs(by_weight) < 5 * 0.5 * VARIANCE * math.sqrt(4 / num)
    assert abs(by_offset) < 5 * 0.5 * math.sqrt(2 / num)
    record = phase_of(data, 3).record
    assert record["rung"] == 2 and abs(record["rung_log_z"]) < 0.02
    assert float(phase_of(data, 3).monitors["energy_gap"]) == pytest.approx(0, abs=0.02)
    # Negative control: the constant that belongs to the ratio against the VAE.
    wrong = on_the_second_rung(num, below, weight, 0.5 * math.log(variance_at(weight) / VARIANCE))
    assert abs(gradients(wrong, data, 3)[1]) > 0.02


def test_the_rung_below_stands_still_until_the_next_begins() -> None:
    phase_of = negatives(0.4, objective="ladder", rung_steps=2, replay_probability=1.0)
    energy, below = phase_of.potential.vaebm.energy, phase_of.sampled.vaebm.energy
    weights = []
    for step in range(5):
        with torch.no_grad():
            energy.get_parameter("weight").fill_(float(step))
        phase_of(DATA, step)
        weights.append(below.get_parameter("weight").item())
    assert weights == [0.4, 0.4, 2.0, 2.0, 4.0]
    assert not any(parameter.requires_grad for parameter in below.parameters())
    assert list(phase_of.weights()) == ["rung"] and negatives(0.4).weights() == {}
