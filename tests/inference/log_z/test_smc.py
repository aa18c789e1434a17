"""The sequential sampler against known normalisers and moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.adaptation import MIN_STEP_SIZE
from ppl_vaebm.inference.kernels.base import Kernel, Ladder, Potential, init_with_grad
from ppl_vaebm.inference.log_z import smc
from ppl_vaebm.inference.log_z.annealing import check_ladder, default_kernel, move
from ppl_vaebm.inference.log_z.smc import (
    Adaptive,
    Population,
    combine,
    equal_draws,
    num_temperatures_for,
    run_smc,
    spaced_ladder,
)
from tests.inference.log_z.test_ais import TARGETS, errors_off, few_levels, start


def short_hmc(potential: Potential) -> Kernel:
    """Make a kernel that forgets so slowly that the weights have to do the work."""
    return hmc.build(potential, num_steps=1)


def populations(target: targets.Target, generator: torch.Generator, num: int, size: int) -> list[Population]:
    ladder = few_levels(4, step_size=0.2)
    return [
        run_smc(target.potential, generator, start(target, size, generator), ladder, build=short_hmc)
        for _ in range(num)
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_small_populations_are_unbiased(name: str, generator: torch.Generator) -> None:
    target = TARGETS[name]
    found = populations(target, generator, 100, 40)
    assert errors_off(combine(found), target.log_z) < 5
    assert combine(found).error < 0.08
    assert sum(population.num_resamplings for population in found) > 20


def test_resampling_must_follow_the_weights(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]

    def blind(log_weights: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(len(log_weights), (len(log_weights),), generator=generator)

    monkeypatch.setattr(smc, "resample", blind)
    assert errors_off(combine(populations(target, generator, 100, 40)), target.log_z) > 5


def test_the_particles_end_as_draws_of_the_target(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    found = run_smc(target.potential, generator, start(target, 10_000, generator), few_levels(3))
    shares = found.log_weights.exp()
    assert float(shares.sum()) == pytest.approx(1)
    position = equal_draws(found, generator)
    effective = 1 / float(shares.square().sum())
    for moment in ((shares[:, None] * found.position).sum(0), position.mean(0)):
        # Resampled particles share ancestors, so that fewer are effective; half as many is what the last rise leaves.
        assert ((moment - target.mean).abs() / (target.variance / effective).sqrt()).max() < 8
    assert (position.var(0) / target.variance - 1).abs().max() < 0.1
    assert (start(target, 10_000, generator).var(0) / target.variance - 1).abs().max() > 1  # negative control


def test_the_genealogy_says_how_many_ancestors_are_left(generator: torch.Generator) -> None:
    easy, size = targets.reference(3), 50
    found = run_smc(easy.potential, generator, start(easy, size, generator), few_levels())
    assert found.num_resamplings == 0 and found.num_ancestors == size
    assert float(found.log_z) == pytest.approx(0, abs=1e-12)
    hard = targets.gaussian(torch.full((8,), 2.0, dtype=torch.float64), torch.full((8,), 0.2, dtype=torch.float64))
    found = run_smc(hard.potential, generator, start(hard, size, generator), few_levels(8))
    assert found.num_resamplings >= 4 and found.num_ancestors < 0.4 * size


def test_a_nan_makes_the_estimate_nan_and_is_counted(generator: torch.Generator) -> None:
    at = torch.randn(100, 2, generator=generator, dtype=torch.float64)

    def potential(position: Tensor) -> Tensor:
        return position[:, 1].where(position[:, 0] < 1, math.nan)

    found = run_smc(potential, generator, at, few_levels())
    assert found.num_not_finite == int((at[:, 0] >= 1).sum()) > 0
    assert math.isnan(found.log_z)


def test_bad_input_is_refused(generator: torch.Generator) -> None:
    target = TARGETS["gaussian"]
    with pytest.raises(InputError, match="at least 2 particles"):
        run_smc(target.potential, generator, start(target, 1, generator), few_levels())
    with pytest.raises(InputError, match="increase from 0 to 1"):
        run_smc(target.potential, generator, start(target, 5, generator), Ladder(torch.zeros(3), torch.ones(3)))


# --- levels that the particles choose


def normal(num: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, dim, generator=generator, dtype=torch.float64)


def tilt(strength: float) -> targets.Target:
    """Make ``Phi = strength * q_0``, whose variance is the same at every b: the barrier is the strength."""
    base = targets.reference(2)
    return base._replace(potential=lambda position: strength * position[:, 0], log_z=strength**2 / 2)


def test_the_pilot_measures_a_barrier_known_in_closed_form(generator: torch.Generator) -> None:
    pilot = run_smc(tilt(3.0).potential, generator, normal(2_000, 2, generator), Adaptive())
    # Every level's standard deviation is known to within 1 / sqrt(2 n), and resampled particles count for fewer.
    assert pilot.barrier == pytest.approx(3.0, rel=0.05)
    assert pilot.energy_sd.tolist() == pytest.approx([3.0] * len(pilot.energy_sd), rel=0.15)
    ladder = spaced_ladder(pilot, 40)
    check_ladder(ladder)
    assert ladder.inverse_temperatures.tolist() == pytest.approx([k / 40 for k in range(41)], abs=0.03)
    # exp(-(3 h)^2) of the particles are effective after a rise by h: 0.9 of them at h = 0.108.
    assert len(pilot.energy_sd) - 1 == pytest.approx(1 / 0.108, abs=2)
    assert num_temperatures_for(pilot, 0.1, 1, 1_000) == math.ceil(pilot.barrier**2 / 0.1)
    assert num_temperatures_for(pilot, 0.1, 200, 1_000) == 200 and num_temperatures_for(pilot, 0.1, 1, 7) == 7


def test_its_steps_are_accepted_at_about_the_target(generator: torch.Generator) -> None:
    target = targets.ar1_gaussian(20)
    pilot = run_smc(target.potential, generator, normal(256, 20, generator), Adaptive())
    state = init_with_grad(target.potential)(target.exact(generator, 4_000))
    _, info = move(target.potential, default_kernel, generator, state, 1.0, float(pilot.ladder.step_sizes[-1]))
    assert 0.45 < float(info.acceptance_rate.mean()) < 0.9
    assert pilot.num_evals > 256 * (len(pilot.energy_sd) - 1)


def test_where_phi_does_not_vary_levels_are_even(generator: torch.Generator) -> None:
    position = normal(10, 2, generator)
    pilot = run_smc(targets.reference(2).potential, generator, position, Adaptive())
    assert pilot.ladder.inverse_temperatures.tolist() == [0.0, 1.0] and pilot.barrier == 0
    assert spaced_ladder(pilot, 4).inverse_temperatures.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_levels_increase_where_phi_varies_at_one_end_only(generator: torch.Generator) -> None:
    levels = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    pilot = run_smc(targets.reference(2).potential, generator, normal(10, 2, generator), Adaptive())._replace(
        ladder=Ladder(levels, torch.ones(4, dtype=torch.float64)), energy_sd=levels.new_tensor([50.0, 0.0, 0.0, 0.0])
    )
    check_ladder(spaced_ladder(pilot, 300))
    with pytest.raises(InputError, match="at least 1 temperature, found 0"):
        spaced_ladder(pilot, 0)


def test_the_pilot_refuses_energies_that_are_not_finite(generator: torch.Generator) -> None:
    at = normal(64, 2, generator)
    num_bad = int((at[:, 0] > 1).sum())

    def potential(position: Tensor) -> Tensor:
        return position[:, 1].where(position[:, 0] < 1, math.nan)

    with pytest.raises(InputError, match=f"finite energy of every pilot particle, found {num_bad} of 64 without"):
        spaced_ladder(run_smc(potential, generator, at, Adaptive()), 5)


def test_the_pilot_gives_up_on_a_path_that_is_too_long(generator: torch.Generator) -> None:
    with pytest.raises(InputError, match=r"at most 5 levels, found b = 0\.\d+ after them"):
        run_smc(tilt(100.0).potential, generator, normal(64, 2, generator), Adaptive(max_levels=5, num_moves=1))


def two_gaussians(position: Tensor) -> Tensor:
    """Phi of N(2, 0.3^2) in the first half of the rows, of N(-1, 0.5^2) in the second."""
    half = len(position) // 2
    one, other = (
        targets.gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([scale], dtype=torch.float64))
        for mean, scale in ((2.0, 0.3), (-1.0, 0.5))
    )
    return torch.cat([one.potential(position[:half]), other.potential(position[half:])])


def test_groups_share_levels_and_keep_their_own_targets_and_log_z(generator: torch.Generator) -> None:
    found = run_smc(two_gaussians, generator, normal(4_000, 1, generator), Adaptive(0.5, 6), num_groups=2)
    assert found.log_z.exp().tolist() == pytest.approx([0.3, 0.5], rel=0.15)
    one, other = equal_draws(found, generator).split(2_000)
    assert float(one.mean()) == pytest.approx(2.0, abs=0.05) and float(other.mean()) == pytest.approx(-1.0, abs=0.08)
    assert float(one.std()) == pytest.approx(0.3, abs=0.04) and float(other.std()) == pytest.approx(0.5, abs=0.06)
    assert (found.ancestors[:2_000] < 2_000).all() and (found.ancestors[2_000:] >= 2_000).all()


def test_a_step_that_nothing_accepts_stays_positive(generator: torch.Generator) -> None:
    # Every proposal has an infinite energy, so nothing is ever accepted and the step shrinks at every move.
    at = normal(20, 2, generator)

    def potential(position: Tensor) -> Tensor:
        return torch.where((position.unsqueeze(1) == at).all(-1).any(1), position[:, 0] * 0.01, math.inf)

    found = run_smc(potential, generator, at, Adaptive(num_moves=60), build=short_hmc)
    assert float(found.acceptance_rate.max()) == 0
    assert float(found.ladder.step_sizes[-1]) == pytest.approx(MIN_STEP_SIZE)
