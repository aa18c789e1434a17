"""The terms of the first latent alone: its own one and the joint term's balance, and their place in stage 2."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig, LatentTermConfig, TrainingKernelConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import load_data
from ppl_vaebm.data.splits import Points
from ppl_vaebm.inference.ebm import guard, latent_term, state
from ppl_vaebm.inference.ebm.latent_term import (
    NUM_POSTERIOR_DRAWS,
    aggregate_posterior,
    fit_latent_balance,
    fit_latent_term,
)
from ppl_vaebm.inference.ebm.negatives import PersistentChains
from ppl_vaebm.inference.ebm.state import Training
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.latent_exchange import LatentStore, num_first, run_first_latent, with_first
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.run import Run
from tests.inference.wells import FIRST_TILT, PLACE, assert_under_h, slanted, tilted
from tests.small_models import POSTERIOR_SLOPE, POSTERIOR_SPREAD, A, S, linear_vae
from tests.tiny import IMAGES


@pytest.fixture
def small_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first latent's term cheap to fit."""
    for name, value in (("BATCH_SIZE", 8), ("NUM_CHAINS", 4), ("STORE_SIZE", 8), ("NUM_SWEEPS", 2)):
        monkeypatch.setattr(latent_term, name, value)


# --- learning the term -----------------------------------------------------------------------------


def test_the_aggregate_posterior_is_the_guides_distribution_over_the_data() -> None:
    num, spread = 20_000, 0.8
    x = torch.full((num, 1), 1.5, dtype=torch.float64) + spread * torch.randn(
        num, 1, generator=stream(0, "x"), dtype=torch.float64
    )
    z = aggregate_posterior(Config(), Points(x), VAEBM(linear_vae().float(), tilted().energy.float()))
    variance = (POSTERIOR_SLOPE * spread) ** 2 + POSTERIOR_SPREAD**2
    assert z.shape == (NUM_POSTERIOR_DRAWS * num, 1)
    assert abs(float(z.mean()) - 1.5 * POSTERIOR_SLOPE) < 5 * math.sqrt(variance / num)
    assert float(z.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / num))


def shifted_config(**options: Any) -> Config:
    energy = EnergyConfig(width=16, num_fourier=0, inputs="x-and-z", latent_term=True)
    latent = LatentTermConfig(**{"steps": 60, **options})
    return Config(energy=energy, ebm=EbmConfig(objective="mle", replay_size=500, log_every=30, latent=latent))


@pytest.fixture
def fast_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_term, "TERM_RATE", 2e-2)
    monkeypatch.setattr(latent_term, "NUM_SWEEPS", 4)


def learnt(folder: Path, config: Config) -> tuple[VAEBM, LatentStore, Tensor]:
    vae = linear_vae().float()
    with global_rng(0):
        vaebm = VAEBM(vae, build_energy(config.energy, torch.Size([1]), vae.model.latent_shapes))
    x = 1.2 + 0.3 * torch.randn(5_000, 1, generator=stream(0, "x"))
    store = LatentStore(vaebm, stream(0, "store"), 256)
    fit_latent_term(Run.create(folder), config, Points(x), vaebm, store)
    return vaebm, store, aggregate_posterior(config, Points(x), vaebm)


@pytest.mark.usefixtures("fast_rate")
def test_chains_of_the_learnt_term_have_the_aggregate_posteriors_moments(tmp_path: Path) -> None:
    vaebm, store, z = learnt(tmp_path, shifted_config())
    potential = noise_potential(vaebm.requires_grad_(False))
    generator = stream(0, "first latent")
    state, _ = run_first_latent(potential, generator, potential.draw_reference(generator, 1_000), 100)
    for draws in (state.position[:, 0], store.positions[:, -1, 0]):  # fresh chains, and those of training
        assert float(draws.mean()) == pytest.approx(float(z.mean()), abs=0.1)
        assert float(draws.std()) == pytest.approx(float(z.std()), rel=0.12)
    assert abs(float(z.mean())) > 0.5  # negative control: the prior has mean 0
    records = [json.loads(line) for line in Run(tmp_path).metrics_file.read_text().splitlines()]
    assert [record["step"] for record in records] == [30, 60]
    assert all(record["stage"] == "ebm-latent" and math.isfinite(record["energy_gap"]) for record in records)


@pytest.mark.usefixtures("fast_rate")
def test_the_result_is_the_average_of_its_weights(tmp_path: Path) -> None:
    ends = [
        torch.cat([part.detach().flatten() for part in learnt(tmp_path / str(decay), config)[0].energy.parameters()])
        for decay, config in ((decay, shifted_config(steps=1, ema_decay=decay)) for decay in (0.0, 0.9))
    ]
    with global_rng(0):
        energy = build_energy(shifted_config().energy, torch.Size([1]), linear_vae().model.latent_shapes)
    first = torch.cat([part.detach().flatten() for part in energy.parameters()])
    # After one step the average keeps a tenth of the start, if it averages at all.
    torch.testing.assert_close(ends[1] - first, 0.9 * (ends[0] - first))
    assert float((ends[0] - first).abs().max()) > 1e-3


def test_a_loss_of_the_term_that_is_not_finite_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_term, "TERM_RATE", 1e30)
    with pytest.raises(DivergedError, match="step 1: the loss of the first latent's term is nan in its step"):
        learnt(tmp_path, shifted_config())
    assert checkpoint.available(Run(tmp_path).checkpoints("ebm-latent")) == []


# --- the balance ------------------------------------------------------------------------------------

TILT = 0.7
"""Of the first latent's own term, so that its chains are ``N(-TILT, 1)``."""
SLOPE = 1.5
"""Of the joint term in x."""


class SlopedInX(Energy):
    """``E_1 = TILT z_1`` and ``J = SLOPE x``; with ``x = A z_1 + S eps``, B is ``-SLOPE A z_1 + (SLOPE S)^2 / 2``."""

    def __init__(self, slope: float = SLOPE) -> None:
        super().__init__()
        self.slope = slope
        config = EnergyConfig(width=16, inputs="x-and-z", latent_term=True, latent_balance=True)
        with global_rng(0):
            self._complete(config, {"z_1": torch.Size([1])})
            layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, TILT)
        self.latent_net = nn.Sequential(layer)

    def joint_term(self, x: Tensor, z: object) -> Tensor:
        return self.slope * x[:, 0]


class Fitted(NamedTuple):
    """A balance, and what it was fitted with."""

    potential: NoisePotential
    store: LatentStore
    records: list[dict[str, Any]]


def fit_balance(folder: Path, slope: float = SLOPE, num_steps: int = 200) -> Fitted:
    vaebm = VAEBM(linear_vae(), SlopedInX(slope).double()).requires_grad_(False)
    potential = noise_potential(vaebm)
    store = LatentStore(vaebm, stream(0, "store"), 128)
    store.advance(stream(0, "start"), 128, 50)
    latent = LatentTermConfig(steps=1, balance_steps=num_steps)
    energy = EnergyConfig(inputs="x-and-z", latent_term=True, latent_balance=True)
    run = Run.create(folder)
    fit_latent_balance(run, Config(energy=energy, ebm=EbmConfig(latent=latent)), potential, store, 0)
    return Fitted(potential, store, [json.loads(line) for line in run.metrics_file.read_text().splitlines()])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fitted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_term, "SWEEPS_PER_SWAP", 4)  # the chains have their distribution from the start
        patch.setattr(latent_term, "BALANCE_RATE", 4e-3)
        yield fit_balance(tmp_path_factory.mktemp("balance"))


def test_it_is_the_log_mean_of_the_joint_terms_factor_given_the_first_latent(fitted: Fitted) -> None:
    energy = fitted.potential.vaebm.energy
    z = torch.linspace(-TILT - 1.5, -TILT + 1.5, 7, dtype=torch.float64)[:, None]
    expected = -SLOPE * A * z[:, 0] + (SLOPE * S) ** 2 / 2
    assert float((energy.balance_term({"z_1": z}) - expected).abs().max()) < 0.15  # 3.6 nats from end to end
    assert not any(parameter.requires_grad for parameter in energy.parameters())
    last = fitted.records[-1]
    assert last["stage"] == "ebm-balance" and last["step"] == 200
    assert last["mean_ratio"] == pytest.approx(1, abs=0.25)


def test_with_it_the_first_latent_keeps_the_density_of_its_own_term(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    potential, store, _ = fitted
    num, generator = 40_000, stream(1, "draws")
    fresh = potential.draw_reference(generator, num)
    first = fresh[:, : num_first(potential)] - TILT  # exact draws of the term's density
    position = with_first(fresh, first)
    energy = potential.vaebm.energy

    def mean_under_h() -> float:
        weights = (store.potential(first) - potential(position)).softmax(0)
        return float((weights * first[:, 0]).sum())

    assert mean_under_h() == pytest.approx(-TILT, abs=0.06)
    monkeypatch.setattr(energy, "balance_net", None)  # negative control: J alone moves it
    assert mean_under_h() == pytest.approx(-TILT - SLOPE * A, abs=0.1)


def test_a_range_beyond_floating_point_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="joint term's balance"):
        fit_balance(tmp_path, slope=math.inf)


# --- the place of both parts in stage 2 ------------------------------------------------------------


def images(*, has_balance: bool = False, **ebm: Any) -> Config:
    tree = yaml.safe_load(IMAGES)
    tree["energy"] |= {"inputs": "x-and-z", "latent_term": True, "width": 8, "latent_balance": has_balance}
    tree["ebm"] |= {"latent": {"steps": 3, "balance_steps": 5}, **ebm}
    return from_dict(tree, "a test")


def term_of(energy: Energy) -> list[Tensor]:
    assert energy.latent_net is not None
    return [parameter.detach().clone() for parameter in energy.latent_net.parameters()]


@pytest.mark.usefixtures("small_part")
def test_the_loop_receives_the_term_finished_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    config = images()
    data = load_data(config.data, config.seed)
    vae, run = new_vae(config, data).eval(), Run.create(tmp_path)
    fresh = term_of(Training(config, data, vae, config.seed).vaebm.energy)
    fitted = term_of(fit_ebm(run, config, data, vae).energy)
    part = checkpoint.load(run.checkpoints("ebm-latent"))
    stored = [part.weights["latent_net"][name] for name in ("0.weight", "0.bias")]
    assert any(not torch.equal(old, new) for old, new in zip(fresh, fitted, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(stored, fitted, strict=False))
    last = checkpoint.load(run.checkpoints("ebm"), "last")
    for name, value in part.weights["latent_net"].items():
        assert torch.equal(last.weights["energy"][f"latent_net.{name}"], value)
        assert torch.equal(last.weights["energy_average"][f"latent_net.{name}"], value)


@pytest.mark.usefixtures("small_part")
def test_a_fit_that_is_cut_off_after_the_term_continues_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = images()
    data = load_data(config.data, config.seed)
    vae = new_vae(config, data).eval()
    whole = fit_ebm(Run.create(tmp_path / "whole"), config, data, vae)
    run = Run.create(tmp_path / "cut")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(guard.Guard, "watch", cut)
        fit_ebm(run, config, data, vae)
    assert checkpoint.available(run.checkpoints("ebm")) == [0]
    monkeypatch.setattr(latent_term, "fit_latent_term", cut)  # it is not fitted again
    resumed = fit_ebm(run, config, data, vae, resume=checkpoint.load(run.checkpoints("ebm"), "last"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_part")
def test_a_return_to_the_start_takes_the_finished_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit that nothing keeps the first return is to step 0, the second to the start."""
    config = images(max_rollbacks=2, max_energy_gap=1e-9)
    data = load_data(config.data, config.seed)
    vae, run = new_vae(config, data).eval(), Run.create(tmp_path)
    fits, original = [], latent_term.fit_latent_term

    def counted(*args: Any) -> None:
        fits.append(args)
        original(*args)

    monkeypatch.setattr(latent_term, "fit_latent_term", counted)
    fit_ebm(run, config, data, vae)
    assert [record["event"] for record in run.metrics("ebm") if "event" in record] == ["rollback", "rollback", "stop"]
    assert len(fits) == 1
    fit_ebm(run, config, data, vae)  # without a checkpoint to continue from, nothing of the fit before is used
    assert len(fits) == 2


@pytest.mark.usefixtures("small_part")
def test_the_balance_is_fitted_last_and_changes_nothing_else(tmp_path: Path) -> None:
    plain, balanced = images(), images(has_balance=True)
    data = load_data(plain.data, plain.seed)
    vae = new_vae(plain, data).eval()
    without = fit_ebm(Run.create(tmp_path / "plain"), plain, data, vae).energy
    run = Run.create(tmp_path / "balanced")
    energy = fit_ebm(run, balanced, data, vae).energy
    weights = energy.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in without.state_dict().items())
    assert energy.balance_net is not None
    assert float(energy.balance_net[-1].bias.abs()) > 0  # type: ignore[operator]
    # A checkpoint has it, of the average and of the energy in training.
    training = Training(balanced, data, vae, balanced.seed)
    training.load(checkpoint.load(run.checkpoints("ebm"), "last"))
    for one in (training.vaebm.energy, training.average.module):
        assert one.balance_net is not None
        for name, value in one.balance_net.state_dict().items():
            assert torch.equal(value, energy.balance_net.state_dict()[name])


@pytest.mark.usefixtures("small_part")
def test_a_balance_that_diverges_is_a_reason_to_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = images(has_balance=True, steps=2, checkpoint_every=1)
    data = load_data(config.data, config.seed)
    vae, run, original = new_vae(config, data).eval(), Run.create(tmp_path), fit_latent_balance
    seen: list[int] = []

    def diverging_once(*args: Any) -> None:
        seen.append(len(checkpoint.available(run.checkpoints("ebm"))))
        if len(seen) == 1:
            raise DivergedError(1, "the range is too large")
        original(*args)

    monkeypatch.setattr(state, "fit_latent_balance", diverging_once)
    energy = fit_ebm(run, config, data, vae).energy
    (event,) = [record for record in run.metrics("ebm") if "event" in record]
    assert (event["step"], event["to_step"], event["reason"]) == (2, 1, "the range is too large")
    assert seen == [2, 2] and checkpoint.available(run.checkpoints("ebm"))[-1] == 2
    assert energy.balance_net is not None
    assert float(energy.balance_net[-1].bias.abs()) > 0  # type: ignore[operator]


@pytest.mark.usefixtures("small_part")
def test_a_result_that_the_guard_chose_is_balanced_too(tmp_path: Path) -> None:
    config = images(has_balance=True, max_rollbacks=0, max_energy_gap=1e-9)
    data = load_data(config.data, config.seed)
    vae, run = new_vae(config, data).eval(), Run.create(tmp_path)
    fit_ebm(run, config, data, vae)
    saved = checkpoint.load(run.checkpoints("ebm"), "last")
    assert saved.step == 0 and saved.state["guard"]["is_stopped"]
    assert float(saved.weights["energy_average"]["balance_net.4.bias"].abs()) > 0
    # There is nothing to resume, and nothing is written but the last event in another place.
    records = [run.metrics("ebm-balance"), sorted(run.metrics("ebm"), key=str)]
    again = fit_ebm(run, config, data, vae, saved).energy
    assert [run.metrics("ebm-balance"), sorted(run.metrics("ebm"), key=str)] == records
    assert all(torch.equal(again.state_dict()[name], value) for name, value in saved.weights["energy_average"].items())


# --- negatives with the first latent's chains ------------------------------------------------------


def chains_with_term(
    potential: NoisePotential, num: int, *, is_held: bool, step_size: float = 0.3, objective: str = "mle"
) -> PersistentChains:
    loop = EbmConfig(
        objective=objective,  # type: ignore[arg-type]
        batch_size=num,
        replay_size=num,
        num_transitions=1,
        latent=LatentTermConfig(steps=5 if is_held else 0),
    )
    energy = EnergyConfig(inputs="x-and-z", latent_term=True)
    kernel = TrainingKernelConfig("mala", step_size=step_size, target_acceptance=None)
    store = LatentStore(potential.vaebm, stream(0, "latent-store"), num)
    return PersistentChains(Config(ebm=loop, energy=energy, kernel=kernel), potential, store)


def test_chains_restart_from_those_of_the_first_latent() -> None:
    num = 4_000
    chains = chains_with_term(noise_potential(tilted()), num, is_held=False, step_size=1e-6)
    for step in range(3):
        chains.advance(stream(0, "advance", step), num, 0.0)
    sites = chains.potential.packing.unravel(chains.positions)
    assert abs(float(sites["eps_z_1"].mean()) + FIRST_TILT) < 4 / math.sqrt(num)
    assert abs(float(sites["eps_x"].mean())) < 4 / math.sqrt(num)
    assert "latents" in chains.state()


@pytest.mark.parametrize("is_held", [True, False])
def test_the_penalty_leaves_a_held_term_out(is_held: bool) -> None:
    chains = chains_with_term(noise_potential(tilted()), 8, is_held=is_held)
    x, z = (torch.full((8, 1), 2.0, dtype=torch.float64) for _ in range(2))
    energy_data, energy = chains.potential.vaebm.energy(x, {"z_1": z}), chains.potential(chains.positions)
    learnt_data, learnt = chains.without_fixed_term(energy_data, {"z_1": z}, energy, chains.positions)
    if is_held:  # all of this energy is the term
        assert torch.cat([learnt_data, learnt]).tolist() == pytest.approx([0.0] * 16, abs=1e-12)
    else:
        assert torch.equal(learnt_data, energy_data) and torch.equal(learnt, energy)


@pytest.mark.parametrize("is_held", [True, False])
def test_negatives_swap_with_the_chains_of_a_held_term(is_held: bool) -> None:
    num = 1_000
    chains = chains_with_term(slanted(), num, is_held=is_held)
    chains.positions[:] = torch.tensor([-PLACE, 0.0])
    for step in range(40):
        moved = chains.advance(stream(0, "advance", step), num, 1.0)
    if is_held:
        assert_under_h(chains.positions)
        assert moved.swap_rate is not None and 0.3 < float(moved.swap_rate) < 0.9
    else:  # negative control: a term in training has no density to keep, and the chains stay where they were
        assert float((chains.positions[:, 0] < 0).double().mean()) > 0.95
        assert moved.swap_rate is None


def test_chains_that_restart_do_not_count_in_the_swap_rate() -> None:
    """They have their partner's first latent, so the energy has nothing to accept."""
    num = 2_000
    rates = []
    for probability in (1.0, 0.5, 0.0):
        chains = chains_with_term(slanted(), num, is_held=True)
        chains.positions[:] = torch.tensor([-PLACE, 0.0])
        rates.append(chains.advance(stream(0, "advance"), num, probability).swap_rate)
    assert rates[2] is None and rates[0] is not None and rates[1] is not None
    assert float(rates[1]) == pytest.approx(float(rates[0]), abs=0.05)
    assert float(rates[0]) < 0.9  # else a mean over all of them would pass too


# --- the sum of the terms, and refusals ------------------------------------------------------------


def test_the_energy_is_the_sum_of_its_terms(seed: int) -> None:
    config = EnergyConfig(width=8, inputs="x-and-z", latent_term=True, latent_balance=True)
    shapes = {"z_1": torch.Size([3]), "z_2": torch.Size([2])}
    with global_rng(seed):
        energy = build_energy(config, torch.Size([2]), shapes).requires_grad_(False)
        x, z = torch.randn(5, 2), {name: torch.randn(5, *shape) for name, shape in shapes.items()}
    two = energy.joint_term(x, z) + energy.latent_term(z)
    assert torch.equal(energy.balance_term(z), torch.zeros(5))
    assert torch.equal(energy(x, z), two)
    assert energy.balance_net is not None
    nn.init.ones_(energy.balance_net[-1].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(energy(x, z), two + 1)
    apart = set(energy.balance_net)
    assert not apart & {*energy.layers(), *energy.hidden_layers()}  # nor is it penalised
    energy.balance_net = None
    with pytest.raises(ValueError, match="latent-balance"):
        energy.balance_term(z)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: EnergyConfig(inputs="x-and-z", latent_balance=True), "energy.latent-balance"),
        (
            lambda: Config(energy=EnergyConfig(inputs="x-and-z", latent_term=True, latent_balance=True)),
            "ebm.latent.steps",
        ),
        (lambda: EnergyConfig(latent_term=True), "energy.latent-term"),
        (lambda: Config(ebm=EbmConfig(latent=LatentTermConfig(steps=5))), "ebm.latent.steps"),
        (lambda: LatentTermConfig(steps=-1), "ebm.latent.steps"),
        (lambda: LatentTermConfig(ema_decay=1.0), "ebm.latent.ema-decay"),
        (lambda: LatentTermConfig(balance_steps=0), "ebm.latent.balance-steps"),
    ],
)
def test_options_that_cannot_work_are_refused(make: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()  # type: ignore[operator]
