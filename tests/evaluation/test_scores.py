"""Training data against test data: alike where they are of one law, and apart where one was learned by heart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from ppl_vaebm.config import Config, EnergyConfig
from ppl_vaebm.evaluation.likelihood import SCORES, Scores, data_energies, histograms, score_data
from ppl_vaebm.evaluation.sections import Effort
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.evaluation.test_evaluation import loaded_run
from tests.small_models import POSTERIOR_SLOPE, POSTERIOR_SPREAD, linear_vae

EFFORT = Effort(2, 2, 2, 2, (2,), num_scored=400, num_score_draws=50)


def normal_scores(num: int, shift: float, name: str) -> Scores:
    x = torch.randn(2, num, generator=stream(0, name), dtype=torch.float64)
    return Scores(x[0] + shift, x[1])


def test_scores_of_one_law_have_a_likely_distance_and_others_none() -> None:
    alike = histograms(normal_scores(500, 0.0, "a"), normal_scores(400, 0.0, "b"), 7).sections[0].columns
    apart = histograms(normal_scores(500, 1.0, "a"), normal_scores(400, 0.0, "b"), 7).sections[0].columns
    assert list(alike) == list(SCORES) == list(apart)
    for name, is_shifted in zip(SCORES, (True, True, False), strict=True):
        one, other = alike[name], apart[name]
        p, difference = (other["its p-value"], other["training less test (nats)"])
        assert isinstance(one["its p-value"], float) and one["its p-value"] > 1e-3
        assert isinstance(p, float) and isinstance(difference, dict)
        assert (p < 1e-6) == is_shifted
        assert abs(difference["value"] - (1.0 if is_shifted else 0.0)) < 5 * difference["error"]
    # Two Normals a standard deviation apart: the largest distance of their laws is at the middle.
    statistic = apart["log p"]["Kolmogorov-Smirnov statistic"]
    assert isinstance(statistic, float) and abs(statistic - math.erf(0.5 / math.sqrt(2))) < 0.1


def test_scores_that_are_not_finite_are_counted() -> None:
    bad = Scores(torch.tensor([math.nan, 1.0, -math.inf]).double(), torch.zeros(3).double())
    sections, arrays = histograms(bad, normal_scores(9, 0.0, "b"), 2)
    assert [section.get("none") for section in sections[0].columns.values()] == [
        "2 of the scores are not finite"
    ] * 2 + [None]
    assert set(arrays) == {f"{part} {name}" for part in ("train", "test") for name in SCORES}


def test_points_are_scored_from_a_random_order_that_does_not_move(tmp_path: Path) -> None:
    loaded = loaded_run(tmp_path)
    some = score_data(loaded, "test", EFFORT, seed=0)
    again = score_data(loaded, "test", EFFORT, seed=0)
    other = score_data(loaded, "test", EFFORT, seed=1)
    assert torch.equal(some.log_h, again.log_h) and len(some.log_h) == 400
    assert not torch.equal(some.minus_energy, other.minus_energy)


class LatentEnergy(Energy):
    """``E = z``: the latent itself."""

    def forward(self, x: torch.Tensor, z: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        assert z is not None
        return z["z_1"].squeeze(-1)


def test_an_energy_of_latents_gets_those_of_the_guide(tmp_path: Path) -> None:
    loaded = loaded_run(tmp_path)
    config = Config(energy=EnergyConfig(inputs="x-and-z"))
    loaded = replace(loaded, config=config, vaebm=VAEBM(linear_vae(), LatentEnergy()))
    x = torch.full((2_000, 1), 0.7)
    energy = data_energies(loaded, x, seed=0)
    assert energy.dtype == torch.float64
    assert abs(float(energy.mean()) - 0.7 * POSTERIOR_SLOPE) < 5 * POSTERIOR_SPREAD / math.sqrt(2_000)
    assert abs(float(energy.std()) / POSTERIOR_SPREAD - 1) < 5 / math.sqrt(2 * 2_000)
    assert torch.equal(energy, data_energies(loaded, x, seed=0))
    assert not torch.equal(energy, data_energies(loaded, x, seed=1))
