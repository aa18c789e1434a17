"""The balance of the joint term, against its closed form on a linear model; and its place in stage 2."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig, LatentTermConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import load_data
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.inference.ebm.latent_balance import fit_latent_balance
from ppl_vaebm.inference.ebm.learner import EnergyLearner
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.latent_chains import LatentStore, num_first, with_first
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.run import Run
from tests.small_models import A, S, linear_vae
from tests.tiny import IMAGES

TILT = 0.7
"""Of the first latent's own term, so that its chains are ``N(-TILT, 1)``."""
SLOPE = 1.5
"""Of the joint term in x."""


class Slanted(Energy):
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


def fit(folder: Path, slope: float = SLOPE, num_steps: int = 600) -> Fitted:
    vaebm = VAEBM(linear_vae(), Slanted(slope).double()).requires_grad_(False)
    potential = noise_potential(vaebm)
    store = LatentStore(vaebm, stream(0, "store"), 256)
    store.advance(stream(0, "start"), 256, 50)
    latent = LatentTermConfig(steps=1, balance_steps=num_steps)
    energy = EnergyConfig(inputs="x-and-z", latent_term=True, latent_balance=True)
    run = Run.create(folder)
    fit_latent_balance(run, Config(energy=energy, ebm=EbmConfig(latent=latent)), potential, store, 0)
    return Fitted(potential, store, [json.loads(line) for line in run.metrics_file.read_text().splitlines()])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(tmp_path_factory.mktemp("balance"))


def test_it_is_the_log_mean_of_the_joint_terms_factor_given_the_first_latent(fitted: Fitted) -> None:
    energy = fitted.potential.vaebm.energy
    z = torch.linspace(-TILT - 1.5, -TILT + 1.5, 7, dtype=torch.float64)[:, None]
    expected = -SLOPE * A * z[:, 0] + (SLOPE * S) ** 2 / 2
    assert float((energy.balance_term({"z_1": z}) - expected).abs().max()) < 0.15  # 3.6 nats from end to end
    assert not any(parameter.requires_grad for parameter in energy.parameters())
    last = fitted.records[-1]
    assert last["stage"] == "ebm-balance" and last["step"] == 600
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
        fit(tmp_path, slope=math.inf)


def balanced_images(**energy: bool) -> Config:
    tree = yaml.safe_load(IMAGES)
    tree["energy"] |= {"inputs": "x-and-z", "latent_term": True, "width": 8, **energy}
    latent = {"steps": 3, "batch_size": 8, "num_chains": 4, "store_size": 8, "num_sweeps": 2, "balance_steps": 5}
    tree["ebm"] |= {"latent": latent}
    return from_dict(tree, "a test")


def test_it_is_fitted_last_and_changes_nothing_else(tmp_path: Path) -> None:
    plain, balanced = balanced_images(), balanced_images(latent_balance=True)
    data = load_data(plain.data, plain.seed)
    vae = new_vae(plain, data).eval()
    without = fit_ebm(Run.create(tmp_path / "plain"), plain, data, vae).energy
    run = Run.create(tmp_path / "balanced")
    energy = fit_ebm(run, balanced, data, vae).energy
    weights = energy.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in without.state_dict().items())
    assert energy.balance_net is not None
    assert float(energy.balance_net[-1].bias.abs()) > 0  # type: ignore[operator]
    # A checkpoint has it, and who goes on from there has it in training too.
    saved = checkpoint.load(run.checkpoints("ebm"), "last")
    learner = EnergyLearner(balanced, data, build_vaebm(balanced, vae), Guard(balanced), saved)
    for one in (learner.energy, learner.average.module):
        for name, value in one.balance_net.state_dict().items():  # type: ignore[union-attr]
            torch.testing.assert_close(value, energy.balance_net.state_dict()[name], rtol=0, atol=0)


def test_a_result_that_the_guard_chose_is_balanced_too(tmp_path: Path) -> None:
    config = balanced_images(latent_balance=True)
    config = replace(config, ebm=replace(config.ebm, max_rollbacks=0, max_energy_gap=1e-9))
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
        (lambda: LatentTermConfig(balance_steps=0), "ebm.latent.balance-steps"),
        (lambda: replace(LatentTermConfig(), balance_steps=-1), "ebm.latent.balance-steps"),
    ],
)
def test_options_that_cannot_work_are_refused(make: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()  # type: ignore[operator]
