"""All estimators side by side, on a product of the linear VAE whose log Z is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference import normalizing_constant
from ppl_vaebm.inference.kernels import gradient_free
from ppl_vaebm.inference.likelihood import RejectionError, reference_energies
from ppl_vaebm.inference.log_z import smc
from ppl_vaebm.inference.log_z.base import LogZ
from ppl_vaebm.inference.normalizing_constant import LogZEstimates, estimate_log_z
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.inference.test_likelihood import CENTER, LOG_Z, MEAN, PRODUCT_VARIANCE, WIDTH, linear_potential
from tests.small_models import QuadraticEnergy, ZeroEnergy, linear_vae

NUM_PARTICLES = 256


def estimate(
    potential: NoisePotential,
    num_particles: int = NUM_PARTICLES,
    num: int = 20_000,
    seed: int = 0,
    num_temperatures: int | None = None,
) -> LogZEstimates:
    energy = reference_energies(potential, stream(seed, "reference"), num)
    return estimate_log_z(potential, energy, seed, num_particles, num_temperatures)


@pytest.fixture(autouse=True)
def less_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalizing_constant, "LEAST_TEMPERATURES", 25)
    monkeypatch.setattr(normalizing_constant, "NUM_LADDER_WARMUP", 60)
    monkeypatch.setattr(normalizing_constant, "NUM_LADDER_DRAWS", 80)


def assert_all_near(found: LogZEstimates, log_z: float) -> None:
    for name, one in found.estimates.items():
        assert isinstance(one, LogZ), f"{name}: {one}"
        error = one.error + (found.integral.discretisation if name == "thermodynamic integration" else 0.0)
        assert abs(one.value - log_z) < 5 * error, name
        assert error < 0.05, name


def test_every_estimate_is_near_the_known_log_z() -> None:
    found = estimate(linear_potential())
    assert_all_near(found, LOG_Z)
    assert abs(LOG_Z) > 0.5  # log Z = 0 would not pass
    assert found.target.source.startswith("exact draws") and found.target.r_hat is None
    assert len(found.target.position) == NUM_PARTICLES and found.target.energy.shape == (
        normalizing_constant.NUM_EXACT,
        1,
    )
    assert abs(found.middle.value - LOG_Z) < 5 * found.middle.error < 0.1
    assert 1 <= found.populations[0].num_ancestors <= NUM_PARTICLES // normalizing_constant.NUM_POPULATIONS


def test_chains_take_the_place_of_exact_draws_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*args: object) -> None:
        raise RejectionError("too far")

    monkeypatch.setattr(normalizing_constant, "exact_draws", gives_up)
    potential = linear_potential()
    found = estimate(potential)
    assert_all_near(found, LOG_Z)
    assert found.target.r_hat is not None and found.target.r_hat < 1.01
    assert "mixture chains" in found.target.source
    assert found.target.energy.shape == (NUM_PARTICLES, normalizing_constant.NUM_CHAIN_DRAWS)
    x = potential.decode(found.target.position)
    assert abs(float(x.mean()) - MEAN) < 5 * math.sqrt(PRODUCT_VARIANCE / len(x))


@pytest.mark.usefixtures("short_ladders")
def test_chains_that_stay_apart_have_a_large_r_hat(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*args: object) -> None:
        raise RejectionError("too far")

    monkeypatch.setattr(normalizing_constant, "exact_draws", gives_up)
    # Negative control of the one above: the populations' ends are moved apart, and the chains hardly move at all.
    monkeypatch.setattr(smc, "equal_draws", lambda population, generator: population.position + _shift())
    monkeypatch.setattr(normalizing_constant, "default_kernel", lambda potential: _frozen(potential))
    found = estimate(linear_potential(), num=2_000)
    assert found.target.r_hat is not None and found.target.r_hat > 1.5


SHIFTS = iter(torch.linspace(-3, 3, 8).tolist() * 10)


def _shift() -> float:
    return next(SHIFTS)


def _frozen(potential: object) -> object:
    kernel = gradient_free.build_pcn(potential)  # type: ignore[arg-type]
    return kernel._replace(
        step=lambda generator, state, params: kernel.step(
            generator, state, params._replace(step_size=1e-3 * params.step_size)
        )
    )


@pytest.mark.usefixtures("short_ladders")
def test_passes_within_the_memory_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*args: object) -> None:
        raise RejectionError("too far")

    monkeypatch.setattr(normalizing_constant, "exact_draws", gives_up)
    potential, plain, num_rows = linear_potential(), NoisePotential.__call__, [0]

    def recorded(self: NoisePotential, position: Tensor) -> Tensor:
        num_rows.append(len(position))
        return plain(self, position)

    energy = reference_energies(potential, stream(0, "reference"), 500)
    monkeypatch.setattr(NoisePotential, "__call__", recorded)
    values, most = [], []
    for rows_per_pass in (10_000, 100):
        potential.rows_per_pass = rows_per_pass
        found = estimate_log_z(potential, energy, 0, num_particles=160, num_temperatures=4)
        values.append({name: one.value for name, one in found.estimates.items() if isinstance(one, LogZ)})
        most.append(max(num_rows))
        num_rows.clear()
    assert most == [normalizing_constant.NUM_LADDERS * 6, 100]  # ladders of 6 levels
    assert values[1] == pytest.approx(values[0], rel=1e-8)


@pytest.mark.usefixtures("short_ladders")
def test_without_an_energy_everything_is_zero() -> None:
    found = estimate(noise_potential(VAEBM(linear_vae(), ZeroEnergy())), num=2_000)
    for name, one in found.estimates.items():
        assert isinstance(one, LogZ), name
        assert one.value == pytest.approx(0, abs=1e-12) and one.error == pytest.approx(0, abs=1e-12), name


@pytest.fixture
def short_ladders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalizing_constant, "NUM_LADDER_WARMUP", 10)
    monkeypatch.setattr(normalizing_constant, "NUM_LADDER_DRAWS", 10)


@pytest.mark.usefixtures("short_ladders")
def test_the_same_seed_gives_the_same_numbers() -> None:
    one, other, third = (estimate(linear_potential(), 16, 2_000, s, num_temperatures=4) for s in (1, 1, 2))
    assert one.estimates == other.estimates and one.estimates != third.estimates


class Overflowing(Energy):
    """An energy that is no number on part of the plane."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return QuadraticEnergy(CENTER, WIDTH)(x).where(x[:, 0] < 0.5, math.nan)


def test_an_energy_that_is_no_number_ends_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"finite energy of every pilot particle, found \d+ of 128 without"):
        estimate(linear_potential(Overflowing()), num=2_000)


@pytest.mark.usefixtures("short_ladders")
def test_a_way_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise InputError("no overlap")

    monkeypatch.setattr(normalizing_constant, "bridge", fails)
    found = estimate(linear_potential(), 16, num=2_000, num_temperatures=4)
    assert found.estimates["bridge from the VAE to h"] == "no overlap"
    assert all(isinstance(one, LogZ) for name, one in found.estimates.items() if "VAE to h" not in name)


def test_the_worst_r_hat_of_columns_is_nan_where_one_is() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 50, 2)))
    assert normalizing_constant._worst_r_hat(draws) < 1.1
    draws[0, 0, 1] = math.nan
    assert math.isnan(normalizing_constant._worst_r_hat(draws))
