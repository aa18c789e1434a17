"""What a fitted VAEBM is judged by, on a product whose density is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ppl_vaebm.config import Config, KernelConfig, ModelConfig, NvaeConfig, SamplingConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, Points, image_data
from ppl_vaebm.evaluation import samples as evaluation_modes
from ppl_vaebm.evaluation.likelihood import bits_per_dim, has_bits, likelihood, likelihood_terms
from ppl_vaebm.evaluation.samples import modes
from ppl_vaebm.evaluation.sections import Effort, random_order
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run
from tests.judged import columns_of
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


def test_test_points_of_a_sorted_file_are_a_fair_choice(tmp_path: Path) -> None:
    """Their mean log p is that of all, within its error; that of the first ones is far from it."""
    loaded, num = loaded_run(tmp_path), 200
    everything = loaded.data.test.batch(torch.arange(EFFORT.num_test), stream(0, "unused"))
    split = Points(everything.sort(dim=0).values)
    loaded = replace(loaded, data=replace(loaded.data, test=split))
    effort = EFFORT._replace(num_test=num, num_z_draws=100)
    terms = likelihood_terms(loaded, effort, seed=0)
    assert torch.equal(terms.x, split.points[random_order(split, 0, "test")[:num].sort().values])
    value, error = cell({**likelihood(loaded, effort, 0, terms)}, "log p (VAE)")
    of_all, of_first = (log_normal(x.double(), 0.0, VARIANCE).mean() for x in (split.points, split.points[:num]))
    assert abs(value - float(of_all)) < 4 * error < abs(float(of_first - of_all))
    assert not torch.equal(likelihood_terms(loaded, effort, seed=1).x, terms.x)


@pytest.mark.parametrize("num", [20, 5_000])
def test_a_small_test_part_is_taken_as_it_is(tmp_path: Path, num: int) -> None:
    config, data = Config(), image_set(17)
    vaebm = build_vaebm(config, new_vae(config, data).eval())
    loaded = LoadedRun(Run(tmp_path), config, data, vaebm, noise_potential(vaebm))
    effort = EFFORT._replace(num_test=num, num_importance=2, num_z_draws=2)
    x = likelihood_terms(loaded, effort, seed=5).x
    assert torch.equal(x, data.test.batch(torch.arange(20), stream(5, "dequantise", "test")))  # to the last bit


def test_few_effective_draws_are_not_certified(tmp_path: Path) -> None:
    section = likelihood(loaded_run(tmp_path), EFFORT._replace(num_z_draws=50), seed=0)
    assert str(section["log Z certified"]).startswith("no: fewer than 100")


def test_modes_are_those_of_the_draws(tmp_path: Path) -> None:
    sections = modes(loaded_run(tmp_path), EFFORT, seed=0)[0].columns
    shares = {name: cell({**section}, "share within 3 std of a mode") for name, section in sections.items()}
    normal_share = math.erf(3 / math.sqrt(2))
    for name in ("VAEBM, exact draws", "VAEBM, independence chains, 20 steps"):
        assert shares[name][0] == pytest.approx(normal_share, abs=4 * math.sqrt(normal_share * 0.0027 / 4_000))
    scale = math.sqrt(2 * VARIANCE)
    vae_share = 0.5 * (math.erf((MEAN + 3 * STD) / scale) - math.erf((MEAN - 3 * STD) / scale))
    value, error = shares["VAE"]
    assert abs(value - vae_share) < 4 * error and vae_share < normal_share - 4 * error


def test_where_rejection_gives_up_the_section_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_modes, "exact_draws", partial(exact_draws, max_proposals=1))
    sections = modes(loaded_run(tmp_path), EFFORT._replace(num_samples=20_000, steps=[]), seed=0)
    assert "too far from the VAE" in str(columns_of(sections, "modes of exact draws of the VAEBM")[""]["none"])


# --- bits per dimension --------------------------------------------------------------------------


def image_set(levels: int, is_binarized: bool = False, num: int = 20) -> Data:
    shape = (num, 1, 8, 8)
    images = torch.randint(levels, shape, generator=stream(0, "images"), dtype=torch.uint8)
    split = IntegerImages(images, None, levels, is_binarized=is_binarized)
    return image_data("noise", torch.Size(shape[1:]), [split, split, split])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bits_per_dimension_of_the_uniform_distribution_are_the_log_of_the_levels(levels: int) -> None:
    uniform = {"value": 64 * math.log(1 / 2), "error": 64 * math.log(2)}
    assert bits_per_dim(uniform, image_set(levels)) == pytest.approx({"value": math.log2(levels), "error": 1.0})


def test_bits_per_dimension_of_binarised_images_are_those_of_fair_coins() -> None:
    fair = {"value": 64 * math.log(1 / 2), "error": 0.0}
    assert bits_per_dim(fair, image_set(256, is_binarized=True))["value"] == pytest.approx(1.0)


def test_only_a_likelihood_of_levels_has_bits() -> None:
    bernoulli = Config(model=ModelConfig(kind="nvae", nvae=NvaeConfig(decoder="bernoulli")))
    assert has_bits(Config(), image_set(17)) and has_bits(bernoulli, image_set(256, is_binarized=True))
    assert not has_bits(Config(), image_set(256, is_binarized=True))  # a Normal's density at -1 and 1
    points = Points(torch.zeros(5, 2))
    assert not has_bits(Config(), Data("points", torch.Size([2]), points, points, points))


@pytest.mark.parametrize("decoder", ["normal", "logistic"])
def test_the_likelihood_of_images_comes_in_bits_too(tmp_path: Path, decoder: str) -> None:
    nvae = NvaeConfig(channels=4, num_latents=2, groups_per_scale=2, encoder_cells=1, decoder_cells=1)
    nvae = replace(nvae, decoder=decoder)  # type: ignore[arg-type]
    config, data = Config(model=ModelConfig(kind="nvae", nvae=nvae)), image_set(17)
    vaebm = build_vaebm(config, new_vae(config, data).eval())
    loaded = LoadedRun(Run(tmp_path), config, data, vaebm, noise_potential(vaebm))
    effort = EFFORT._replace(num_test=10, num_importance=4, num_z_draws=100)
    section: dict[str, object] = {**likelihood(loaded, effort, seed=0)}
    for name in ("log p (VAE)", "log h (VAEBM)"):
        nats, error = cell(section, name)
        bits, bits_error = cell(section, f"{name}, bits per dimension")
        assert bits == pytest.approx(math.log2(17 / 2) - nats / (64 * math.log(2)))
        assert bits_error == pytest.approx(error / (64 * math.log(2)))
    assert ("the VAE, discretised, bits per dimension" in section) == (decoder == "logistic")
    if decoder == "logistic":
        continuous = cell(section, "log p (VAE), bits per dimension")
        assert cell(section, "the VAE, discretised, bits per dimension") != pytest.approx(continuous, abs=1e-6)
