"""Chains of the first latent alone, and swaps with them, against densities in closed form.

In the swaps' tests the term has two wells and the joint term is linear in z_1 and x, so under h both wells are shifted,
the noise of x too, and the wells' masses are other than the term alone has them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.kernels import Budget, run_kernel
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, KernelState, init_params, init_with_grad
from ppl_vaebm.inference.kernels.langevin import build_mala
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.latent_exchange import (
    LATENT_NUM_LEVELS,
    STEPS_PER_SWAP,
    LatentPotential,
    LatentStore,
    num_first,
    run_first_latent,
    swap,
    with_first,
    with_partners,
    with_swaps,
)
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import chain_blocks, sample_by_chains
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng, stream
from tests.inference.wells import (
    FIRST_TILT,
    PLACE,
    WEIGHT,
    WEIGHT_UNDER_H,
    Wells,
    assert_under_h,
    draw_slanted,
    draw_wells,
    slanted,
    tilted,
)
from tests.small_models import FEW, NVAES, QUANTILE_NVAES, ZeroEnergy, draw_noise, linear_vae, shipped_vae

# --- the potential and its chains ------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FEW, *NVAES, *QUANTILE_NVAES])
def test_the_first_latent_is_the_transports(name: str) -> None:
    vae = shipped_vae(name)
    vae.model.temperature = 0.7
    eps = draw_noise(vae, 5)
    first, (_, z) = vae.first_latent(eps["eps_z_1"]), vae.transport(eps)
    torch.testing.assert_close(first["z_1"], z["z_1"], rtol=0, atol=0)
    assert list(first) == ["z_1"]


@pytest.mark.parametrize("name", [*FEW, *NVAES, *QUANTILE_NVAES])
def test_the_first_posterior_is_the_guides(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 3)
    x = vae.transport(eps)[0].detach()
    with global_rng(seed), torch.no_grad():
        z = vae.guide(x)["z_1"]
    with global_rng(seed), torch.no_grad():
        draw = vae.first_posterior(x).sample()
    torch.testing.assert_close(draw, z)


def test_the_potential_is_the_term_at_the_first_latent() -> None:
    vaebm = tilted(temperature=0.5)
    position = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    torch.testing.assert_close(LatentPotential(vaebm)(position), 0.5 * FIRST_TILT * position[:, 0])


def run(
    potential: NoisePotential, num: int, num_steps: int, params: KernelParams | None = None
) -> tuple[Tensor, KernelParams]:
    generator = stream(0, "first latent")
    fresh = potential.draw_reference(generator, num)
    state, params = run_first_latent(potential, generator, fresh, num_steps, params)
    return state.position, params


def test_chains_of_the_first_latent_have_the_density_of_its_term() -> None:
    potential, num = noise_potential(tilted()), 4_000
    first, params = run(potential, num, 60)
    again, kept = run(potential, num, 20, params)
    assert kept is params
    for found in (first, again):
        assert abs(float(found.mean()) + FIRST_TILT) < 4 / math.sqrt(num)
        assert float(found.var()) == pytest.approx(1.0, rel=4 * math.sqrt(2 / num))
    start, _ = run(potential, num, 0)
    assert abs(float(start.mean()) + FIRST_TILT) > 20 / math.sqrt(num)  # negative control: where they began


def test_replacing_the_first_noise_keeps_the_others(generator: torch.Generator) -> None:
    potential = noise_potential(tilted())
    fresh = potential.draw_reference(generator, 3)
    moved = with_first(fresh, fresh[:, :1] + 1)
    assert num_first(potential) == 1
    torch.testing.assert_close(moved - fresh, torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64))
    potential.vaebm.energy.latent_net = None
    with pytest.raises(ValueError, match="set energy.latent-term"):
        potential.vaebm.energy.latent_term({"z_1": fresh})


def store_of(vaebm: VAEBM, num: int) -> LatentStore:
    return LatentStore(vaebm, stream(0, "store"), num)


def test_the_store_keeps_its_chains_and_its_ladder() -> None:
    store, other = store_of(tilted(), 20), store_of(tilted(), 20)
    start = store.positions.clone()
    rows, slots, infos = store.advance(stream(0, "advance"), 5, 3)
    is_moved = (store.positions != start).flatten(1).any(1)
    assert start.shape == (20, LATENT_NUM_LEVELS, 1) and int(is_moved.sum()) == 5 and len(infos) == 3
    assert sorted(rows.flatten().tolist()) == sorted(store.positions[is_moved][:, -1].flatten().tolist())
    torch.testing.assert_close(rows, store.positions[slots, -1], rtol=0, atol=0)
    assert float(store.params.step_size) > 0.5  # all accept, so it grows
    other.load(store.state())
    again = [each.advance(stream(1, "advance"), 5, 3)[0] for each in (store, other)]
    assert torch.equal(*again)
    store.put(slots, rows + 1)
    is_put = torch.zeros_like(start)
    is_put[slots, -1] = 1
    torch.testing.assert_close(store.positions - other.positions, is_put)
    with pytest.raises(InputError, match="start the stage again with --overwrite"):
        store_of(tilted(), 21).load(store.state())


def test_replica_exchange_gives_the_modes_their_weights() -> None:
    num = 1_000
    vaebm = VAEBM(linear_vae(), Wells()).requires_grad_(False)
    store, generator = store_of(vaebm, num), stream(0, "wells")
    for _ in range(40):
        rows, _, _ = store.advance(generator, num, 5)
    error = math.sqrt(0.1 * 0.9 / num)
    potential = noise_potential(vaebm)
    for draws in (rows, run(potential, num, 400)[0]):
        assert abs(float((draws < 0).double().mean()) - 0.1) < 4 * error
        assert float(draws[draws > 0].std()) == pytest.approx(0.3, rel=4 / math.sqrt(1.8 * num))
    # Negative control: single chains from N(0, I) stay on the side that they came from, half of them on each.
    kernel = build_mala(LatentPotential(vaebm))
    fresh = potential.draw_reference(generator, num)[:, :1]
    state, params, _ = warm_up(kernel, generator, kernel.init(fresh), init_params(fresh, 0.5), 200)
    for _ in range(200):
        state, _ = kernel.step(generator, state, params)
    assert float((state.position < 0).double().mean()) > 0.3


@pytest.mark.parametrize("latent_steps", [0, 60])
def test_samples_may_start_from_chains_of_the_first_latent(latent_steps: int) -> None:
    num, config = 2_000, KernelConfig("mala", step_size=1e-6, target_acceptance=None)
    potential = noise_potential(tilted())
    potential.vaebm.energy.joint_term = lambda x, z: 0.0 * x[:, 0]  # type: ignore[method-assign]
    steps = [0, 1, STEPS_PER_SWAP]
    chains = sample_by_chains(potential, replace(config), num=num, steps=steps, seed=0, latent_steps=latent_steps)
    start, end, _ = (chains.positions[count][:, 0].mean() for count in steps)
    assert abs(float(start)) < 4 / math.sqrt(num)
    if latent_steps:
        assert abs(float(end) + FIRST_TILT) < 4 / math.sqrt(num)
    # The first latent's own sweeps evaluate no energy of x, an exchange evaluates one.
    assert chains.num_evals == STEPS_PER_SWAP + (1 if latent_steps else 0)


# --- swaps ------------------------------------------------------------------------------------------


def test_the_joint_term_changes_the_masses_of_the_wells() -> None:
    assert 0.3 < WEIGHT_UNDER_H < 0.7 and WEIGHT == 0.1


def test_a_swap_preserves_both_densities() -> None:
    num, potential, generator = 20_000, slanted(), stream(0, "exact")
    own = LatentPotential(potential.vaebm)
    state, other = draw_slanted(num, generator), draw_wells(num, WEIGHT, 0.0, generator)
    found = swap(generator, potential, own, init_with_grad(potential)(state), init_with_grad(own)(other))
    assert_under_h(found.state.position)
    assert abs(float((found.other.position < 0).double().mean()) - WEIGHT) < 4 * math.sqrt(WEIGHT * (1 - WEIGHT) / num)
    assert 0.3 < float(found.acceptance_rate.mean()) < 0.9
    moved = found.state.position[:, 0] != state[:, 0]
    assert torch.equal(moved, found.is_accepted)
    # The two noises have changed places, and what goes with a place has gone with it.
    torch.testing.assert_close(found.state.position[moved, :1], other[moved], rtol=0, atol=0)
    torch.testing.assert_close(found.other.position[moved], state[moved, :1], rtol=0, atol=0)
    for each, phi in ((found.state, potential), (found.other, own)):
        again = init_with_grad(phi)(each.position)
        torch.testing.assert_close((each.potential, each.grad), (again.potential, again.grad))
    # Negative control: taking every proposal gives the wells the term's masses.
    taken = with_first(state, other)
    assert abs(float((taken[:, 0] < 0).double().mean()) - WEIGHT_UNDER_H) > 0.1


def test_a_proposal_that_is_not_finite_is_rejected() -> None:
    potential = slanted()
    own = LatentPotential(potential.vaebm)
    state = init_with_grad(potential)(torch.zeros(2, 2, dtype=torch.float64))
    other = init_with_grad(own)(torch.tensor([[math.nan], [1.0]], dtype=torch.float64))
    found = swap(stream(0, "nan"), potential, own, state, other)
    assert found.acceptance_rate[0] == 0 and not found.is_accepted[0] and found.acceptance_rate[1] > 0
    assert bool(found.state.position.isfinite().all())


def run_kernel_on(kernel: Kernel, state: KernelState, config: KernelConfig, num_steps: int) -> KernelState:
    generator = stream(0, "run")
    state, params, _ = warm_up(kernel, generator, state, start_params(config, state.position), 60)
    for _ in range(num_steps):
        state, _ = kernel.step(generator, state, params)
    return state


@pytest.mark.parametrize("name", ["pcn", "tempered"])
def test_any_kernel_with_swaps_finds_the_masses_of_the_wells(name: str) -> None:
    num, potential, config = 800, slanted(), KernelConfig(name)  # type: ignore[arg-type]
    kernel = with_swaps(build_kernel(config, potential), potential)
    start = torch.tensor([[-PLACE, 0.0]], dtype=torch.float64).repeat(num, 1)  # all of them in one well
    state = run_kernel_on(kernel, kernel.init(start), config, 100)
    assert_under_h(state.position)
    assert kernel.report is not None
    report = kernel.report(state, start_params(config, start))
    assert 0.3 < float(report["exchange_rate"]) < 0.9  # type: ignore[arg-type]
    assert len(report["first_latent_swap_rates"]) == 8  # type: ignore[arg-type]
    if name == "tempered":  # the local kernel's replicas and its report are kept
        assert state.replicas is not None and "swap_rates" in report


def test_chains_without_swaps_stay_in_their_well() -> None:
    """Negative control."""
    potential, config = slanted(), KernelConfig("mala")
    kernel = build_kernel(config, potential)
    state = run_kernel_on(kernel, kernel.init(torch.tensor([[-PLACE, 0.0]] * 500, dtype=torch.float64)), config, 150)
    assert float((state.position[:, 0] < 0).double().mean()) > 0.95


def test_exact_draws_stay_exact_under_swaps() -> None:
    num, potential, config = 2_000, slanted(), KernelConfig("mala", step_size=0.5)
    kernel, generator = with_swaps(build_kernel(config, potential), potential), stream(0, "stay")
    first, partners = run_first_latent(potential, generator, potential.draw_reference(generator, num), 120)
    state = with_partners(kernel.init(draw_slanted(num, generator)), first)
    params = start_params(config, state.position)._replace(partners=partners)
    for _ in range(3 * STEPS_PER_SWAP):
        state, _ = kernel.step(generator, state, params)
    assert state.partners is not None and state.partners.num_exchanges == 3
    assert_under_h(state.position)


def test_an_energy_without_the_term_keeps_its_kernel() -> None:
    potential = noise_potential(VAEBM(linear_vae(), ZeroEnergy()))
    kernel = build_kernel(KernelConfig("mala"), potential)
    assert with_swaps(kernel, potential) is kernel


def test_samples_swap_with_the_chains_that_they_started_from() -> None:
    (block,) = chain_blocks(slanted(), KernelConfig("mala"), num=500, steps=[0, 200], seed=0, latent_steps=200)
    assert_under_h(block.positions[200])
    assert 0.3 < float(block.report["exchange_rate"]) < 0.9  # type: ignore[arg-type]


def test_compared_kernels_swap_and_report_it() -> None:
    potential, budget = slanted(), Budget(num_chains=200, num_warmup=40, num_evals=300)
    start = torch.tensor([[-PLACE, 0.0]], dtype=torch.float64).repeat(200, 1)
    chains = run_kernel("mala", potential, KernelConfig("mala"), start, budget, seed=0)
    assert 0.3 < float(chains.attrs["exchange_rate"]) < 0.9  # type: ignore[arg-type]
    # Of 250 steps every fifth has one evaluation more.
    assert chains.num_evals / 200 == pytest.approx(300, abs=1)
    assert chains.stats["n_steps"].double().mean() == pytest.approx(1.2, abs=0.01)
    is_left = (chains.position[:, 0] < 0).double().mean()
    assert 0.2 < float(is_left) < 0.8  # all of them began there
