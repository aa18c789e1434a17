"""The loop of stage 2: what its options change, and what it logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import load_data
from ppl_vaebm.inference.ebm import losses, train
from ppl_vaebm.inference.ebm.negatives import Moved, PersistentChains
from ppl_vaebm.inference.ebm.state import Training
from ppl_vaebm.inference.ebm.train import WEIGHT_ESS_EVERY, fit_ebm, monitors_of, negatives_at
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run
from tests.tiny import IMAGES, POINTS


def config_of(text: str, **options: Any) -> Config:
    tree = yaml.safe_load(text)
    for section, values in options.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree, "a test")


def training_of(config: Config) -> Training:
    data = load_data(config.data, config.seed)
    return Training(config, data, new_vae(config, data).eval(), config.seed)


def fit(folder: Path, config: Config) -> Run:
    run, data = Run.create(folder), load_data(config.data, config.seed)
    fit_ebm(run, config, data, new_vae(config, data).eval())
    return run


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.metrics("ebm") if "loss" in record]


@pytest.mark.parametrize("text", [POINTS, IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("objective", ["mle", "ratio"])
def test_an_energy_of_both_trains(text: str, objective: str, tmp_path: Path) -> None:
    config = config_of(text, energy={"inputs": "x-and-z"}, ebm={"objective": objective, "steps": 2, "log_every": 1})
    before = training_of(config).vaebm.energy.state_dict()
    run = fit(tmp_path, config)
    after = checkpoints.load(run.checkpoints("ebm")).weights["energy"]
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    for record in steps_of(run):
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert ("saturation" in record) == (text == IMAGES and objective == "mle")
        assert ("acceptance_rate" in record) == (objective == "mle")
    assert len(steps_of(run)) == 2


def test_the_ratio_comes_first_where_it_is_asked_for() -> None:
    loop = EbmConfig(objective="mle", ratio_steps=2)
    assert [negatives_at(loop, step) for step in range(4)] == ["ratio", "ratio", "chains", "chains"]
    assert negatives_at(EbmConfig(objective="mle", negatives="importance"), 0) == "importance"
    assert negatives_at(EbmConfig(), 10_000) == "ratio"


def test_the_monitors_are_moments_of_the_energies() -> None:
    chains = training_of(config_of(IMAGES)).chains
    data, negatives = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, 4.0, -4.0])
    moved = chains.advance(torch.Generator().manual_seed(0), 3, 0.0)
    x = torch.tensor([0.5, 1.5, -2.0, 1.0]).reshape(1, 1, 2, 2)
    monitors = monitors_of(data, negatives, moved, x)
    assert {name: float(monitors[name]) for name in ("energy_gap", "energy_sd", "saturation")} == {
        "energy_gap": 2.0,
        "energy_sd": 4.0,
        "saturation": 0.5,
    }
    assert monitors["acceptance_rate"] is moved.acceptance_rate
    assert not any(value.requires_grad for value in monitors.values())
    assert "saturation" not in monitors_of(data, negatives, moved, x.flatten(1))  # points
    assert monitors_of(data, negatives, None, None).keys() == {"energy_sd"}


def test_vae_samples_are_weighed_now_and_then_and_change_nothing(tmp_path: Path) -> None:
    options = {"objective": "mle", "steps": 2 * WEIGHT_ESS_EVERY, "validate_every": 500, "checkpoint_every": 500}
    runs = [
        fit(tmp_path / str(log_every), config_of(POINTS, ebm={**options, "log_every": log_every}))
        for log_every in (1, 10)  # a log-every of 10 meets the steps that are weighed
    ]
    every, tenth = ([record["step"] for record in steps_of(run) if "weight_ess" in record] for run in runs)
    assert every == [1, WEIGHT_ESS_EVERY, 2 * WEIGHT_ESS_EVERY] and tenth == every[1:]
    ends = [checkpoints.load(run.checkpoints("ebm")) for run in runs]
    assert torch.equal(ends[0].state["replay"], ends[1].state["replay"])


def test_weights_of_vae_samples_are_computed_only_where_they_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(log_weights: torch.Tensor) -> float:
        calls.append(log_weights)
        return 1.0

    monkeypatch.setattr(train, "weights_ess", counted)
    run = fit(tmp_path, config_of(POINTS, ebm={"objective": "ratio", "steps": 12, "log_every": 6}))
    assert len(calls) == len(steps_of(run)) == 2


def test_the_head_may_be_left_out_of_the_spectral_penalty() -> None:
    whole, hidden = (training_of(config_of(IMAGES, ebm={"spectral_head": has_head})) for has_head in (True, False))
    assert float(whole.spectral().detach()) > float(hidden.spectral().detach()) > 0
    num_whole, num_hidden = (sum(map(len, one.spectral._groups)) for one in (whole, hidden))
    assert num_hidden == num_whole - 1


def test_the_energy_is_initialised_from_data_before_it_is_averaged() -> None:
    one, fresh = training_of(config_of(IMAGES, energy={"data_init": True})), training_of(config_of(IMAGES))
    energy = one.vaebm.energy
    assert bool(energy.is_initialised) and bool(one.average.module.is_initialised)
    for name, parameter in energy.named_parameters():
        assert torch.equal(parameter, one.average.module.get_parameter(name))
    assert not torch.equal(energy.get_parameter("stem.weight"), fresh.vaebm.energy.get_parameter("stem.weight"))


def test_a_chain_that_ends_where_the_energy_is_not_finite_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last Langevin step does not evaluate its end, and no chain moves on from such a place."""
    original, bad = PersistentChains.negatives, [1, 2]
    taken: list[Moved] = []
    advance = PersistentChains.advance

    def advanced(chains: PersistentChains, *args: Any) -> Moved:
        taken.append(advance(chains, *args))
        return taken[-1]

    def overflowing(chains: PersistentChains, position: torch.Tensor) -> Any:
        x, z = original(chains, position)
        x[bad] = math.nan
        return x, z

    monkeypatch.setattr(PersistentChains, "advance", advanced)
    monkeypatch.setattr(PersistentChains, "negatives", overflowing)
    ebm = {"objective": "mle", "steps": 1, "num_transitions": 2, "replay_probability": 1.0, "guard": False}
    run = fit(tmp_path, config_of(POINTS, ebm=ebm, kernel={"name": "langevin", "step_size": 0.1}))
    stored, (moved,) = checkpoints.load(run.checkpoints("ebm")).state["replay"], taken
    has_moved = (stored[moved.slots] != moved.start).any(1)
    assert has_moved.tolist() == [row not in bad for row in range(len(has_moved))]
    assert torch.equal(stored[moved.slots][has_moved], moved.end[has_moved])


def test_losses_are_computed_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the product of weights and energies would be rounded to bfloat16."""
    seen: list[tuple[bool, bool]] = []

    def recorded(energy_data: torch.Tensor, energy_draws: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), energy_data.dtype == energy_draws.dtype))
        return losses.importance_weighted(energy_data, energy_draws)

    monkeypatch.setitem(train.OBJECTIVES, "importance", recorded)
    ebm = {"objective": "mle", "negatives": "importance", "steps": 1, "bf16": True}
    fit(tmp_path, config_of(POINTS, ebm=ebm))
    assert seen == [(False, True)]
