"""What evaluate --log-likelihood says of a product whose log Z and log h are known, and when it says yes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppl_vaebm import evaluate
from ppl_vaebm.config import Config, EnergyConfig
from ppl_vaebm.evaluation.likelihood import Terms, likelihood, likelihood_terms
from ppl_vaebm.evaluation.log_z import (
    agreeing,
    bound_section,
    estimate_section,
    how_section,
    joint_bound,
    log_z_sections,
    verdict,
)
from ppl_vaebm.evaluation.sections import Section, sections_text
from ppl_vaebm.evaluation.store import read_parts
from ppl_vaebm.inference import likelihood as likelihood_module
from ppl_vaebm.inference import normalizing_constant
from ppl_vaebm.inference.likelihood import log_p
from ppl_vaebm.inference.log_z.base import LogZ
from ppl_vaebm.inference.normalizing_constant import LOWER, UPPER, LogZEstimates, estimate_log_z
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run
from tests.evaluation.test_evaluation import CENTER, EFFORT, MEAN, STD, WIDTH, cell, image_set, loaded_run
from tests.judged import columns_of
from tests.small_models import (
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    VARIANCE,
    QuadraticEnergy,
    ZeroEnergy,
    linear_vae,
    log_normal,
)
from tests.tiny import fit_run, write_empty_report

LOG_Z = 0.5 * math.log(2 * math.pi * WIDTH**2) + float(
    log_normal(torch.tensor([[CENTER]], dtype=torch.float64), 0.0, VARIANCE + WIDTH**2)
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRun, Terms, LogZEstimates]:
    loaded = loaded_run(tmp_path_factory.mktemp("run"))
    terms = likelihood_terms(loaded, EFFORT, seed=0)
    return loaded, terms, estimate_log_z(loaded.potential, terms.reference_energy, seed=0, num_particles=256)


def test_the_estimates_are_listed_with_their_errors(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    section: dict[str, object] = {**estimate_section(measured[2])}
    for name in (*measured[2].estimates, "middle of the bounds"):
        value, error = cell(section, name)
        assert abs(value - LOG_Z) < 5 * error + measured[2].integral.discretisation
    gap, error = cell(section, "gap, upper bound less lower")
    assert gap == pytest.approx(cell(section, UPPER)[0] - cell(section, LOWER)[0])
    assert abs(gap) < 0.1 and abs(gap) < 5 * error
    low, high = (
        cell(section, f"mean log weight, {way} bound")[0]
        for way in ("forward: a wider lower", "reverse: a wider upper")
    )
    assert low < LOG_Z < high
    assert section["log Z certified"] == "yes: the bounds and 5 of 5 other estimates agree"


def test_what_stands_behind_them_is_said(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    section = how_section(measured[2])
    assert str(section["reverse starts"]).startswith("exact draws")
    assert section["R-hat of these"] == "none: they are independent"
    assert section["particles without a finite weight"] == 0 and section["divergent moves, forward and reverse"] == 0
    assert str(section["levels of the ladder"]).startswith("0.000, ")
    assert len(str(section["swap rates of its neighbours"]).split(", ")) == 5
    assert "nan" not in sections_text([Section("how", {"": section})])


def test_log_h_is_bounded_from_below(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    loaded, terms, found = measured
    section: dict[str, object] = {**bound_section(loaded, found, terms, seed=0)}
    truth = float(log_normal(terms.x, MEAN, STD**2).mean())
    middle, _ = cell(section, "log h by IWAE - E - log Z (middle)")
    assert middle == pytest.approx(truth, abs=0.002 + 4 * found.middle.error)
    upper, error = cell(section, "log h >= IWAE - E - log Z (upper bound)")
    assert upper == pytest.approx(middle + found.middle.value - found.upper.log_z.value)
    # The guide is the exact posterior, so that the ELBO's bound is as good, but for its one draw a point.
    elbo, elbo_error = cell(section, "log h >= ELBO - E - log Z (upper bound)")
    assert abs(elbo - upper) < 5 * math.hypot(elbo_error, error)
    points, log_z = (
        section[f"error of these by {what}"] for what in ("the choice of test points", "log Z, upper bound")
    )
    assert error == pytest.approx(math.hypot(float(points), float(log_z)))  # type: ignore[arg-type]
    value, _ = cell(section, "IWAE bound of log p (VAE)")
    energy, _ = cell(section, "E of test data")
    assert upper == pytest.approx(value - energy - found.upper.log_z.value)


def test_terms_given_are_not_computed_anew(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    loaded, terms, _ = measured
    assert likelihood(loaded, EFFORT, 0, terms) == likelihood(loaded, EFFORT, 0)
    shifted = terms._replace(energy=terms.energy + 1)
    section: dict[str, object] = {**likelihood(loaded, EFFORT, 0, shifted)}
    log_h, _ = cell({**likelihood(loaded, EFFORT, 0, terms)}, "log h (VAEBM)")
    assert cell(section, "log h (VAEBM)")[0] == pytest.approx(log_h - 1)


# --- an energy of x and z ------------------------------------------------------------------------

Z_WIDTH = 0.5
Z_LOG_Z = -0.5 * math.log(1 + 1 / Z_WIDTH**2)
"""Of exp(-z^2 / (2 width^2)) under N(0, 1)."""
TILT = 1 / (1 + POSTERIOR_SPREAD**2 / Z_WIDTH**2)
"""By which that factor shrinks the mean and the variance of z given x."""


class LatentEnergy(Energy):
    """``E = |z_1|^2 / (2 width^2)``, so that z given x stays a Gaussian."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        assert z is not None
        return 0.5 * (z["z_1"] / Z_WIDTH).square().flatten(1).sum(1)


def unnormalised(x: Tensor) -> Tensor:
    """Log of the integral of p(x, z) exp(-E(z)) over z, ``(n,)``: log p and the factor's mean given x."""
    x = x.double()
    variance = Z_WIDTH**2 + POSTERIOR_SPREAD**2
    factor = 0.5 * math.log(Z_WIDTH**2 / variance) - 0.5 * (POSTERIOR_SLOPE * x[:, 0]).square() / variance
    return log_normal(x, 0.0, VARIANCE) + factor


def points(num: int) -> Tensor:
    return math.sqrt(VARIANCE) * torch.randn(num, 1, generator=stream(0, "points"), dtype=torch.float64)


@pytest.mark.parametrize("rows_per_block", [None, 7, 64])
def test_the_joint_bound_is_exact_where_the_guide_is_the_posterior_under_h(
    rows_per_block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows_per_block is not None:  # draws of one point in several passes; several points in one
        monkeypatch.setattr(HierarchicalVAE, "rows_per_block", rows_per_block)
    guide = linear_vae(TILT * POSTERIOR_SLOPE, math.sqrt(TILT) * POSTERIOR_SPREAD)
    found = joint_bound(VAEBM(guide, LatentEnergy()), points(20), seed=0, num_draws=10)
    torch.testing.assert_close(found.value, unnormalised(points(20)), rtol=0, atol=1e-9)
    assert float(found.error.max()) < 1e-9
    # The VAE's own posterior is not that of h, and its weights vary.
    other = joint_bound(VAEBM(linear_vae(), LatentEnergy()), points(20), seed=0, num_draws=10)
    assert float(other.error.min()) > 0.01


def test_the_joint_bound_is_unbiased_before_the_log_and_a_lower_bound_after() -> None:
    x, vaebm = points(400), VAEBM(linear_vae(), LatentEnergy())
    few, many = (joint_bound(vaebm, x, seed=0, num_draws=num) for num in (2, 2_000))
    errors = (many.value - unnormalised(x)) / many.error
    assert abs(float(errors.mean())) < 5 / math.sqrt(len(x)) and float(errors.std()) < 1.3
    shortfall = unnormalised(x) - few.value
    assert float(shortfall.mean()) > 5 * float(shortfall.std()) / math.sqrt(len(x))


def test_for_an_energy_of_x_the_joint_bound_is_that_of_log_p_less_e() -> None:
    x, energy = points(30), QuadraticEnergy(CENTER, WIDTH)
    found = joint_bound(VAEBM(linear_vae(0.5, 0.7), energy), x, seed=0, num_draws=20)
    expected = log_p(linear_vae(0.5, 0.7), x, 0, 20, scales=[1.0]).value - energy(x)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-9)


def joint_run(folder: Path, vae: HierarchicalVAE) -> LoadedRun:
    """Make a run whose energy reads z."""
    loaded = loaded_run(folder)
    vaebm = VAEBM(vae, LatentEnergy())
    config = Config(energy=EnergyConfig(inputs="x-and-z"))
    return replace(loaded, config=config, vaebm=vaebm, potential=noise_potential(vaebm))


def known(found: LogZEstimates, log_z: float) -> LogZEstimates:
    """Put a log Z that is known in the place of the bounds."""
    exact = LogZ(log_z, 0.0, 200.0)
    return found._replace(lower=found.lower._replace(log_z=exact), upper=found.upper._replace(log_z=exact))


def test_with_a_wrong_guide_the_joint_rows_bound_log_h_and_log_p_less_e_does_not(
    tmp_path: Path, measured: tuple[LoadedRun, Terms, LogZEstimates]
) -> None:
    # This guide knows nothing of x and lies where the energy is low.
    loaded = joint_run(tmp_path, linear_vae(0.0, 0.4))
    terms = likelihood_terms(loaded, EFFORT, seed=0)
    section: dict[str, object] = {**bound_section(loaded, known(measured[2], Z_LOG_Z), terms, seed=0)}
    truth = float(unnormalised(terms.x).mean()) - Z_LOG_Z
    assert not any("IWAE - E" in name for name in section)
    joint, _ = cell(section, "log h >= joint IWAE - log Z (upper bound)")
    middle, _ = cell(section, "log h by joint IWAE - log Z (middle)")
    assert joint == middle
    by_draws = section["error of that by the guide's draws alone"]
    assert isinstance(by_draws, float)
    assert -0.02 < joint - truth < 5 * by_draws < 0.02
    elbo, _ = cell(section, "log h >= ELBO - E - log Z (upper bound)")
    assert elbo < joint - 0.1
    unnormalised_mean, _ = cell(section, "joint IWAE bound of log h + log Z, 100 draws")
    assert joint == pytest.approx(unnormalised_mean - Z_LOG_Z)
    # What this row was once: far above the truth.
    once = float((terms.log_p.value.double() - terms.energy).mean()) - Z_LOG_Z
    assert once > truth + 0.2


# --- the verdict ---------------------------------------------------------------------------------


def bounds(found: LogZEstimates, low: float, high: float, error: float = 0.01) -> LogZEstimates:
    """Put other bounds in place of the found ones, given relative to log Z."""
    lower = found.lower._replace(log_z=LogZ(LOG_Z + low, error, 200.0))
    upper = found.upper._replace(log_z=LogZ(LOG_Z + high, error, 200.0))
    return found._replace(lower=lower, upper=upper)


def others(found: LogZEstimates, values: dict[str, LogZ | str]) -> LogZEstimates:
    """Put other estimates in place of the found ones."""
    return found._replace(estimates={**found.estimates, **values})


def wrong(found: LogZEstimates) -> LogZEstimates:
    return others(found, {"sequential samplers": LogZ(LOG_Z + 1, 0.02, 8.0)})


def alone(found: LogZEstimates) -> LogZEstimates:
    return found._replace(estimates={name: found.estimates[name] for name in (LOWER, UPPER)})


def of_chains(found: LogZEstimates, r_hat: float) -> LogZEstimates:
    return found._replace(target=found.target._replace(r_hat=r_hat))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: bounds(found, -0.02, 0.02), "yes: the bounds and 5 of 5 other estimates agree"),
        (lambda found: bounds(found, -0.3, 0.3), "no: the bounds leave 0.64 nats"),
        (lambda found: bounds(found, 0.2, -0.2), "no: the lower bound is above the upper one"),
        (lambda found: bounds(found, math.nan, 0.1), "no: the bounds leave nan nats"),
        (lambda found: bounds(found, -0.3, 0.0, 0.2), "no: the bounds leave 1.1 nats"),
        (wrong, "no: sequential samplers differ from the bounds by more than 3 errors"),
        (alone, "no: no other estimate agrees"),
        (lambda found: of_chains(found, 1.2), "no: the chains behind the upper bound have R-hat 1.200"),
        (lambda found: of_chains(found, math.nan), "no: the chains behind the upper bound have R-hat nan"),
        (lambda found: of_chains(found, 1.002), "agree, as far as chains of R-hat 1.002 have converged"),
        (
            lambda found: found._replace(lower=found.lower._replace(num_not_finite=3)),
            "no: 3 annealed particles have no finite weight",
        ),
    ],
)
def test_the_verdict(
    change: Callable[[LogZEstimates], LogZEstimates], said: str, measured: tuple[LoadedRun, Terms, LogZEstimates]
) -> None:
    assert said in verdict(change(measured[2]))


def test_what_knows_too_little_is_not_asked(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    found = measured[2]
    assert len(agreeing(found)) == 5
    vague = others(
        found,
        {
            "VAE samples": LogZ(LOG_Z + 1, 0.01, 12.0),  # too few effective draws
            "thermodynamic integration": LogZ(LOG_Z + 1, 0.4, 5_000.0),  # too large an error to disagree
            "bridge from the VAE to h": "the two densities hardly overlap",
        },
    )
    assert agreeing(vague) == ["sequential samplers", "bridges between levels"]
    assert verdict(vague) == "yes: the bounds and 2 of 5 other estimates agree"


@pytest.mark.parametrize(("outside", "agrees"), [(0.0, True), (1e-6, False), (-1e-6, False)])
def test_bounds_without_an_error_are_taken_at_their_word(
    outside: float, agrees: bool, measured: tuple[LoadedRun, Terms, LogZEstimates]
) -> None:
    found = others(bounds(measured[2], 0.0, 0.0, error=0.0), {"VAE samples": LogZ(LOG_Z + outside, 0.0, 5_000.0)})
    assert ("VAE samples" in agreeing(found)) is agrees


def test_an_energy_that_does_not_vary_has_a_log_z_without_an_error(tmp_path: Path, quick: None) -> None:
    loaded = loaded_run(tmp_path)
    vaebm = VAEBM(linear_vae(), ZeroEnergy())
    loaded = replace(loaded, vaebm=vaebm, potential=noise_potential(vaebm))
    few = EFFORT._replace(num_test=10, num_importance=4, num_z_draws=200, num_particles=16, num_temperatures=3)
    sections = log_z_sections(loaded, few, likelihood_terms(loaded, few, 0), seed=0)
    section: dict[str, object] = {**columns_of(sections, "log Z by all methods (nats)")[""]}
    assert cell(section, UPPER) == cell(section, LOWER) == (0.0, 0.0)
    assert "VAE samples" in str(section["agree with the bounds"])


def test_where_annealing_fails_the_section_says_so(measured: tuple[LoadedRun, Terms, LogZEstimates]) -> None:
    loaded, terms, _ = measured
    sections = log_z_sections(loaded, EFFORT._replace(num_particles=1), terms, seed=0)
    assert "at least 2 particles" in str(columns_of(sections, "log Z by all methods (nats)")[""]["none"])


# --- the command ---------------------------------------------------------------------------------

FEW = ["--num-test", "20", "--num-importance", "4", "--num-z-draws", "200", "--num-samples", "20"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood_module, "NUM_PILOT", 100)
    small = {"NUM_PILOT": 16, "NUM_EXACT": 20, "NUM_LADDERS": 4, "NUM_LADDER_WARMUP": 20, "NUM_LADDER_DRAWS": 10}
    for name, value in small.items():
        monkeypatch.setattr(normalizing_constant, name, value)
    monkeypatch.setattr("ppl_vaebm.reports.report.write_report", write_empty_report)


def test_the_command_writes_the_sections_and_leaves_them_out_unasked(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit_run(tmp_path)
    evaluate.main([str(run), *FEW])
    plain = read_parts(Run(run))
    assert not any("log Z" in section.title for part in plain.values() for section in part.sections)
    options = ["--only", "likelihood", "--log-likelihood", "--num-particles", "16", "--num-temperatures", "3"]
    evaluate.main([str(run), *FEW, *options])
    parts = read_parts(Run(run))
    sections = parts.pop("log-z").sections
    assert parts == plain and len(sections) == 3
    assert columns_of(sections, "how log Z was estimated")[""]["temperatures"] == 3
    assert "annealing, reverse: an upper bound" in capsys.readouterr().out
    assert not any(
        "bits" in name for name in columns_of(sections, "log h of test data, from bounds (nats per point)")[""]
    )
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(run), "--stage", "svi", "--log-likelihood"])
    assert ended.value.code == 2
    assert "--log-likelihood is of the VAEBM, and stage svi has none: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(("inputs", "name"), [("x", "IWAE - E"), ("x-and-z", "joint IWAE")])
def test_images_have_their_bounds_in_bits_too(
    inputs: str, name: str, tmp_path: Path, measured: tuple[LoadedRun, Terms, LogZEstimates]
) -> None:
    config, data = Config(energy=EnergyConfig(inputs=inputs)), image_set(17)  # type: ignore[arg-type]
    vaebm = build_vaebm(config, new_vae(config, data).eval())
    loaded = LoadedRun(Run(tmp_path), config, data, vaebm, noise_potential(vaebm))
    few = EFFORT._replace(num_test=10, num_importance=4, num_z_draws=100)
    section: dict[str, object] = {**bound_section(loaded, measured[2], likelihood_terms(loaded, few, 0), seed=0)}
    nats, error = cell(section, f"log h >= {name} - log Z (upper bound)")
    bits, bits_error = cell(section, f"bits per dimension, at most by {name} - log Z (upper bound)")
    assert f"bits per dimension by {name} - log Z (middle)" in section
    assert ("log h >= IWAE - E - log Z (upper bound)" in section) is (inputs == "x")
    assert bits == pytest.approx(math.log2(17 / 2) - nats / (64 * math.log(2)))
    assert bits_error == pytest.approx(error / (64 * math.log(2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-particles", "15"], ["num-particles", "at least 16", "15"]),
        (["--num-temperatures", "0"], ["num-temperatures", "at least 1"]),
    ],
)
def test_options_that_cannot_work_end_in_a_sentence(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(tmp_path), *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)


def test_the_least_number_of_particles_is_two_for_each_sequential_sampler() -> None:
    assert evaluate.MIN_PARTICLES == 2 * normalizing_constant.NUM_POPULATIONS
