"""The sequential sampler against known normalisers and moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import Kernel, Ladder, Potential
from ppl_vaebm.inference.log_z import smc
from ppl_vaebm.inference.log_z.smc import Population, combine, equal_draws, run_smc
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
    assert found.num_resamplings == 0 and found.num_ancestors == size and found.log_z == pytest.approx(0, abs=1e-12)
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
