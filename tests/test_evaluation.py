"""What a fitted VAEBM is judged by, on a product whose density is known."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from ppl_vaebm import evaluation
from ppl_vaebm.config import Config, KernelConfig, SamplingConfig
from ppl_vaebm.data import Data
from ppl_vaebm.evaluation import Effort, likelihood, lines, modes
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.loading import LoadedRun
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from ppl_vaebm.run import Run
from ppl_vaebm.splits import Points
from tests.small_models import VARIANCE, QuadraticEnergy, linear_vae, log_normal

CENTER, WIDTH = 0.6, 0.5
PRECISION = 1 / VARIANCE + 1 / WIDTH**2
MEAN, STD = CENTER / WIDTH**2 / PRECISION, 1 / math.sqrt(PRECISION)
"""Of x under h."""
EFFORT = Effort(num_test=1_000, num_importance=600, num_z_draws=50_000, num_samples=4_000, steps=[20])


def loaded_run(folder: Path) -> LoadedRun:
    """Make a run of the product N(MEAN, STD^2), with test points from that law and its one mode known."""
    x = MEAN + STD * torch.randn(EFFORT.num_test, 1, generator=stream(0, "test"))
    split = Points(x)
    data = Data("one", torch.Size([1]), split, split, split, modes=torch.tensor([[MEAN]]), mode_std=STD)
    vaebm = VAEBM(linear_vae(), QuadraticEnergy(CENTER, WIDTH))
    config = Config(sampling=SamplingConfig(KernelConfig("independence")))
    return LoadedRun(Run(folder), config, data, vaebm, noise_potential(vaebm))


def cell(section: dict[str, object], name: str) -> tuple[float, float]:
    found = section[name]
    assert isinstance(found, dict)
    return found["value"], found["error"]


def test_the_likelihood_is_that_of_the_closed_form(tmp_path: Path) -> None:
    loaded = loaded_run(tmp_path)
    section: dict[str, object] = {**likelihood(loaded, EFFORT, seed=0)}
    x = loaded.data.test.batch(torch.arange(EFFORT.num_test), stream(0, "unused")).double()
    log_h, log_p = log_normal(x, MEAN, STD**2), log_normal(x, 0.0, VARIANCE)
    value, _ = cell(section, "log p (VAE)")
    assert value == pytest.approx(float(log_p.mean()), abs=0.002)
    log_z, log_z_error = cell(section, "log Z")
    evidence = log_normal(torch.tensor([[CENTER]]), 0.0, VARIANCE + WIDTH**2)
    assert abs(log_z - float(evidence) - 0.5 * math.log(2 * math.pi * WIDTH**2)) < 4 * log_z_error < 0.05
    value, error = cell(section, "log h (VAEBM)")
    assert value == pytest.approx(float(log_h.mean()), abs=0.002 + 4 * log_z_error)
    assert error == pytest.approx(math.hypot(float(log_h.std()) / math.sqrt(len(x)), log_z_error), rel=0.1)
    gain, _ = cell(section, "log h - log p")
    assert gain == pytest.approx(float((log_h - log_p).mean()), abs=4 * log_z_error)
    assert section["log Z certified"] == "yes"


def test_few_effective_draws_are_not_certified(tmp_path: Path) -> None:
    section = likelihood(loaded_run(tmp_path), EFFORT._replace(num_z_draws=50), seed=0)
    assert str(section["log Z certified"]).startswith("no: fewer than 100")


def test_modes_are_those_of_the_draws(tmp_path: Path) -> None:
    sections = modes(loaded_run(tmp_path), EFFORT, seed=0)
    shares = {name: cell({**section}, "share within 3 std of a mode") for name, section in sections.items()}
    normal_share = math.erf(3 / math.sqrt(2))
    for name in ("modes: VAEBM, exact draws", "modes: VAEBM, independence chains, 20 steps"):
        assert shares[name][0] == pytest.approx(normal_share, abs=4 * math.sqrt(normal_share * 0.0027 / 4_000))
    scale = math.sqrt(2 * VARIANCE)
    vae_share = 0.5 * (math.erf((MEAN + 3 * STD) / scale) - math.erf((MEAN - 3 * STD) / scale))
    value, error = shares["modes: VAE"]
    assert abs(value - vae_share) < 4 * error and vae_share < normal_share - 4 * error


def test_where_rejection_gives_up_the_section_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "exact_draws", partial(exact_draws, max_proposals=1))
    sections = modes(loaded_run(tmp_path), EFFORT._replace(num_samples=20_000, steps=[]), seed=0)
    assert "too far from the VAE" in str(sections["modes: VAEBM, exact draws"]["none"])


def test_lines_hold_every_number() -> None:
    text = lines({"first": {"a": {"value": 1.23456, "error": 0.5}, "b": 7}, "second": {"c": 0.25, "d": "yes"}})
    assert [line.split() for line in text] == [
        ["first"],
        ["a", "1.2346", "+-", "0.5000"],
        ["b", "7"],
        [],
        ["second"],
        ["c", "0.2500"],
        ["d", "yes"],
    ]
