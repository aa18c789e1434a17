from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.bridges.pyro_samplers import PyroKernelName, SitePotential, flat_packing, run_pyro
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import KernelState, Potential, init_params
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import stream

# Not in alphabetical order, which is Pyro's.
PACKING = Packing({"z": torch.Size([2]), "a": torch.Size([1, 3])})
KERNELS: tuple[PyroKernelName, ...] = ("pyro-hmc", "pyro-nuts")
BATCH = 20


class Counted:
    """A potential that counts its calls."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.num_calls = 0

    def __call__(self, position: Tensor) -> Tensor:
        self.num_calls += 1
        return self.potential(position)


def quartic(position: Tensor) -> Tensor:
    return 0.25 * position.pow(4).sum(-1)


def stored(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "phi": state.potential}


def run(
    kernel: PyroKernelName, potential: Potential, start: Tensor, packing: Packing | None = PACKING, **options: Any
) -> Chains:
    """Run with options and limits by name."""
    settings: dict[str, Any] = {
        "num_draws": 20,
        "num_warmup": 0,
        "step_size": 0.25,
        "trajectory_length": 1.0,
        "seed": 1,
    } | options
    limits = Limits(**{name: settings.pop(name) for name in Limits._fields if name in settings})
    own = SamplerOptions(**{name: settings.pop(name) for name in SamplerOptions._fields if name in settings})
    return run_pyro(kernel, potential, packing, start, own, limits, functionals=stored, **settings)


def start(num_chains: int) -> Tensor:
    return torch.randn(num_chains, PACKING.dim, generator=stream(0, "start"), dtype=torch.float64)


def standard_errors_off(draws: Tensor, expected: float) -> float:
    """How far the mean of draws ``(C, N)`` is from a number, in standard errors by batch means."""
    batches = draws.unflatten(1, (-1, BATCH)).mean(-1).flatten()
    return float((batches.mean() - expected).abs() / (batches.std() / math.sqrt(len(batches))))


@pytest.mark.parametrize("kernel", KERNELS)
def test_moments_of_a_correlated_gaussian_are_right(kernel: PyroKernelName) -> None:
    target = targets.ar1_gaussian(PACKING.dim, 0.6)
    chains = run(
        kernel,
        target.potential,
        target.exact(stream(0, "exact"), 2),
        num_draws=300 if kernel == "pyro-hmc" else 160,  # draws of NUTS are less correlated
        num_warmup=60,
        trajectory_length=1.5,
    )
    q = chains.draws["q"]
    for i in range(PACKING.dim):
        assert standard_errors_off(q[..., i], 0.0) < 5
        assert standard_errors_off(q[..., i] ** 2, 1.0) < 5
        assert standard_errors_off(q[..., i] * q[..., i - 1], 0.6 if i else 0.6**4) < 5
    # The same check sees the correlation that N(0, I) lacks.
    assert standard_errors_off(q[..., 0] * q[..., 1], 0.0) > 5
    assert not chains.stats["diverging"].any()
    assert 0.6 < chains.stats["acceptance_rate"].mean() < 0.97


def test_pyros_hmc_and_this_packages_agree_with_the_integral_of_a_quartic() -> None:
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (-quartic(grid[:, None]) - 0.5 * grid**2).exp()
    expected = float((grid**2 * density).sum() / density.sum())
    theirs = run("pyro-hmc", quartic, start(2), num_draws=300, num_warmup=20, trajectory_length=1.5)
    kernel = hmc.build(quartic, num_steps=4)
    ours = run_chains(
        kernel,
        stream(0, "ours"),
        start(4),
        init_params(start(1), 0.3),
        num_draws=300,
        num_warmup=50,
        functionals=stored,
    )
    for chains in (theirs, ours):
        assert standard_errors_off(chains.draws["q"].square().mean(-1), expected) < 5
        assert standard_errors_off(chains.draws["q"].square().mean(-1), 1.0) > 5  # what N(0, I) would give


def test_hmc_counts_every_evaluation() -> None:
    potential = Counted(quartic)
    chains = run("pyro-hmc", potential, start(3), num_draws=7)
    assert chains.stats["n_steps"].tolist() == [[4] * 7] * 3  # int(1.0 / 0.25) leapfrog steps
    assert chains.warmup_evals == 3  # one at each start
    assert potential.num_calls == 3 + 3 * 7 * 4 == chains.num_evals + chains.warmup_evals


@pytest.mark.parametrize("kernel", KERNELS)
def test_evaluations_of_warmup_and_draws_add_up(kernel: PyroKernelName) -> None:
    potential = Counted(quartic)
    chains = run(kernel, potential, start(2), num_draws=5, num_warmup=25)
    assert chains.num_evals + chains.warmup_evals == potential.num_calls
    assert chains.warmup_evals >= 2 * (1 + 25)
    assert (chains.stats["n_steps"] >= 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_are_those_of_run_chains(kernel: PyroKernelName) -> None:
    chains = run(kernel, quartic, start(3), num_draws=6)
    assert chains.kernel == kernel
    assert chains.draws["q"].shape == (3, 6, 5) and chains.draws["phi"].shape == (3, 6)
    assert chains.position.equal(chains.draws["q"][:, -1])
    assert set(chains.stats) == {"lp", "acceptance_rate", "diverging", "energy", "n_steps"}
    assert all(stat.shape == (3, 6) for stat in chains.stats.values())
    assert chains.stats["diverging"].dtype == torch.bool and chains.stats["n_steps"].dtype == torch.int64
    assert chains.params.step_size.tolist() == [0.25] * 3  # no warm-up, no adaptation
    assert chains.params.inverse_mass.equal(torch.ones(3, 5, dtype=torch.float64))
    assert chains.seconds > 0 and chains.warmup_seconds > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_statistics_belong_to_their_draws(kernel: PyroKernelName) -> None:
    chains = run(kernel, quartic, start(2), num_draws=100)
    q, lp = chains.draws["q"], chains.stats["lp"]
    phi = quartic(q.flatten(0, 1)).unflatten(0, q.shape[:2])
    torch.testing.assert_close(chains.draws["phi"], phi, rtol=0, atol=1e-12)
    torch.testing.assert_close(lp, -phi - 0.5 * q.square().sum(-1), rtol=0, atol=1e-12)
    # A transition starts where the one before ended, with kinetic energy |p|^2 / 2 and p ~ N(0, I): D / 2 on average.
    kinetic = chains.stats["energy"][:, 1:] + lp[:, :-1]
    assert (kinetic > 0).all()
    assert abs(kinetic.mean() - 5 / 2) < 5 * math.sqrt(5 / 2 / kinetic.numel())
    rate = chains.stats["acceptance_rate"]
    assert (rate >= 0).all() and (rate <= 1).all() and rate.mean() > 0.9 and rate.std() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_huge_step_is_rejected_and_flagged(kernel: PyroKernelName) -> None:
    chains = run(kernel, quartic, start(2), num_draws=4, step_size=50.0, trajectory_length=50.0)
    assert chains.stats["diverging"].all()
    assert (chains.stats["acceptance_rate"] == 0).all()
    assert chains.draws["q"].equal(start(2)[:, None].expand(2, 4, 5))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nan_potential_is_rejected_and_flagged(kernel: PyroKernelName) -> None:
    def potential(position: Tensor) -> Tensor:
        is_start = position.isclose(start(1), rtol=0, atol=0).all(-1)
        return torch.where(is_start, 0.0, math.nan).to(position.dtype)

    chains = run(kernel, potential, start(1), num_draws=3)
    assert chains.stats["diverging"].all()
    assert chains.position.equal(start(1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_start_without_a_finite_u_is_refused(kernel: PyroKernelName) -> None:
    with pytest.raises(ValueError, match="finite"):
        run(kernel, lambda position: position.sum(-1) * math.nan, start(1), num_draws=2)


def test_site_potential_is_u_in_the_order_of_the_columns() -> None:
    target = targets.gaussian(torch.arange(5.0, dtype=torch.float64), torch.full((5,), 2.0, dtype=torch.float64))
    position = start(1)
    sites = {"a": position[0, 2:].view(1, 3), "z": position[0, :2]}
    potential = SitePotential(target.potential, PACKING)
    value = potential(sites)
    assert value.shape == ()
    torch.testing.assert_close(value, (((position - torch.arange(5)) / 2).square() / 2).sum(), rtol=0, atol=1e-12)
    assert potential.position(sites).equal(position)
    swapped = {"a": position[0, :3].view(1, 3), "z": position[0, 3:]}
    assert abs(potential(swapped) - value) > 0.1
    assert potential.num_evals == 2


def test_the_adapted_mass_is_in_the_order_of_the_columns() -> None:
    scale = torch.tensor([0.1, 0.1, 1.0, 1.0, 1.0], dtype=torch.float64)
    target = targets.gaussian(torch.zeros(5, dtype=torch.float64), scale)
    chains = run("pyro-nuts", target.potential, target.exact(stream(0, "exact"), 1), num_draws=1, num_warmup=60)
    inverse_mass = chains.params.inverse_mass[0]
    assert (inverse_mass[:2] < 0.1).all() and (inverse_mass[2:] > 0.1).all()
    assert chains.params.step_size.shape == (1,) and chains.params.step_size.item() != 0.25


def test_hmc_stops_with_the_draw_that_spends_its_budget() -> None:
    potential = Counted(quartic)
    chains = run("pyro-hmc", potential, start(2), num_draws=50, max_evals=10)
    assert chains.stats["n_steps"].tolist() == [[4, 4, 4]] * 2
    assert potential.num_calls == 2 + 2 * 12


def test_nuts_chains_are_cut_to_the_shortest_within_the_budget() -> None:
    whole = run("pyro-nuts", quartic, start(3), num_draws=40)
    spent = whole.stats["n_steps"].cumsum(1)
    lengths = (spent < 60).sum(1) + 1  # a chain stops with the draw that reaches the budget
    assert lengths.unique().numel() > 1
    cut = run("pyro-nuts", quartic, start(3), num_draws=40, max_evals=60)
    assert cut.draws["q"].equal(whole.draws["q"][:, : lengths.min()])
    assert cut.num_evals == whole.stats["n_steps"][:, : lengths.min()].sum()


def test_draws_continue_until_each_chain_has_used_its_fraction_of_the_time() -> None:
    def slow(position: Tensor) -> Tensor:
        time.sleep(0.002)
        return quartic(position)

    chains = run("pyro-hmc", slow, start(2), num_draws=1000, max_evals=8, min_seconds=0.2)
    num_draws = chains.stats["lp"].shape[1]
    assert 2 < num_draws <= 0.1 / (4 * 0.002) + 1  # two draws would spend the evaluations; a draw takes 8 ms or more
    assert chains.elapsed is not None
    assert chains.elapsed[-1] >= 2 * (num_draws - 1) * 4 * 0.002
    assert run("pyro-hmc", slow, start(2), num_draws=3, max_evals=8, min_seconds=10.0).stats["lp"].shape[1] == 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_elapsed_sums_the_time_of_all_chains_draw_by_draw(kernel: PyroKernelName) -> None:
    def slow(position: Tensor) -> Tensor:
        time.sleep(0.001)
        return quartic(position)

    chains = run(kernel, slow, start(3), num_draws=6)
    assert chains.elapsed is not None and chains.elapsed.shape == (6,)
    assert chains.elapsed[-1] == chains.seconds
    of_each_draw = torch.diff(chains.elapsed, prepend=chains.elapsed.new_zeros(1))
    assert (of_each_draw >= 0.001 * chains.stats["n_steps"].sum(0)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_packing_is_one_flat_site(kernel: PyroKernelName) -> None:
    packing = flat_packing(PACKING.dim)
    assert packing.shapes == {"position": torch.Size([5])}
    flat = run(kernel, quartic, start(2), packing=None, num_draws=5, num_warmup=5)
    same = run(kernel, quartic, start(2), packing=packing, num_draws=5, num_warmup=5)
    assert flat.draws["q"].equal(same.draws["q"]) and flat.draws["q"].shape == (2, 5, 5)
    # Pyro draws momenta site by site in alphabetical order, so other sites are other draws.
    assert not flat.draws["q"].equal(run(kernel, quartic, start(2), num_draws=5, num_warmup=5).draws["q"])


def test_a_flat_site_samples_the_same_target() -> None:
    target = targets.ar1_gaussian(PACKING.dim, 0.6)
    exact = target.exact(stream(0, "exact"), 2)
    chains = run("pyro-hmc", target.potential, exact, packing=None, num_draws=300, num_warmup=60)
    q = chains.draws["q"]
    assert standard_errors_off(q[..., 0] * q[..., 1], 0.6) < 5
    assert standard_errors_off(q[..., 0] * q[..., 1], 0.0) > 5


@pytest.mark.parametrize("kernel", KERNELS)
def test_global_random_numbers_are_unchanged(kernel: PyroKernelName) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    run(kernel, quartic, start(2), num_draws=2, num_warmup=5)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


def test_draws_follow_the_seed_and_chains_differ() -> None:
    same_starts = start(1).expand(2, -1)
    first, again, other = (run("pyro-hmc", quartic, same_starts, seed=seed).draws["q"] for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert not first[0].equal(first[1])
    # A chain's stream does not depend on how many there are.
    assert run("pyro-hmc", quartic, start(1)).draws["q"][0].equal(first[0])


def test_float32_stays_float32() -> None:
    chains = run("pyro-nuts", quartic, start(1).float(), num_draws=2, num_warmup=3)
    assert chains.draws["q"].dtype == chains.draws["phi"].dtype == torch.float32
    assert chains.stats["lp"].dtype == torch.float64


def test_phi_zero_is_sampled_under_no_grad() -> None:
    with torch.no_grad():
        chains = run("pyro-hmc", targets.reference(5).potential, start(1), num_draws=3)
    assert not chains.draws["phi"].abs().gt(1e-12).any()
    assert not chains.draws["q"].requires_grad


def test_an_unknown_pyro_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="pyro-hmc, pyro-nuts"):
        run("hmc", quartic, start(1))  # type: ignore[arg-type]
