"""Exchange of the first latent with chains of its own term, against a product of the two in closed form.

The term has two wells, and the rest of the energy is linear in z_1 and x, so under h both wells are shifted, the noise
of x too, and the wells' masses are other than the term alone has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig, KernelConfig, LatentTermConfig, TrainingKernelConfig
from ppl_vaebm.evaluation.kernels import Budget, run_kernel
from ppl_vaebm.inference.ebm.negatives import NegativePhase
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelState, init_with_grad
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.latent_chains import LatentPotential, run_first_latent, with_first
from ppl_vaebm.inference.latent_exchange import STEPS_PER_EXCHANGE, exchange, with_exchange, with_partners
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import chain_blocks
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.inference.wells import PLACE, SPREAD, WEIGHT, Wells
from tests.small_models import A, S, ZeroEnergy, linear_vae

SLOPE_Z, SLOPE_X = 0.2, 0.3
TILT = SLOPE_Z + SLOPE_X * A
"""Of the noise of z_1."""
WEIGHT_UNDER_H = WEIGHT / (WEIGHT + (1 - WEIGHT) * math.exp(-2 * PLACE * TILT))
"""Mass of the well at ``-PLACE``."""


class Slanted(Wells):
    """The wells, and ``J = SLOPE_Z z_1 + SLOPE_X x``."""

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        assert z is not None
        return SLOPE_Z * z["z_1"].squeeze(-1) + SLOPE_X * x.squeeze(-1)


def slanted() -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), Slanted()).requires_grad_(False))


def wells(num: int, weight: float, shift: float, generator: torch.Generator) -> Tensor:
    """Draw from two wells, ``(num, 1)``, a given mass in the left one."""
    is_left = torch.rand(num, 1, generator=generator, dtype=torch.float64) < weight
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    return torch.where(is_left, -PLACE, PLACE) - shift + SPREAD * noise


def exact(num: int, generator: torch.Generator) -> Tensor:
    """Draw both noises under h, ``(num, 2)``."""
    first = wells(num, WEIGHT_UNDER_H, TILT * SPREAD**2, generator)
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    return torch.cat([first, noise - SLOPE_X * S], dim=1)


def assert_under_h(position: Tensor) -> None:
    """Compare a column for each noise with h, in four standard errors."""
    num, is_left = len(position), position[:, 0] < 0
    error = math.sqrt(WEIGHT_UNDER_H * (1 - WEIGHT_UNDER_H) / num)
    assert abs(float(is_left.double().mean()) - WEIGHT_UNDER_H) < 4 * error
    assert abs(float(position[:, 1].mean()) + SLOPE_X * S) < 4 / math.sqrt(num)
    assert float(position[:, 1].var()) == pytest.approx(1.0, rel=4 * math.sqrt(2 / num))
    for place, rows in ((-PLACE, position[is_left, 0]), (PLACE, position[~is_left, 0])):
        assert abs(float(rows.mean()) - (place - TILT * SPREAD**2)) < 4 * SPREAD / math.sqrt(len(rows))
        assert float(rows.std()) == pytest.approx(SPREAD, rel=4 / math.sqrt(2 * len(rows)))


def test_the_tilt_changes_the_wells_enough_to_be_seen() -> None:
    assert 0.3 < WEIGHT_UNDER_H < 0.7 and WEIGHT == 0.1


def test_an_exchange_leaves_both_densities_as_they_are() -> None:
    num, potential, generator = 20_000, slanted(), stream(0, "exact")
    own = LatentPotential(potential.vaebm)
    state, other = exact(num, generator), wells(num, WEIGHT, 0.0, generator)
    found = exchange(generator, potential, own, init_with_grad(potential)(state), init_with_grad(own)(other))
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


def test_what_is_not_finite_is_not_taken() -> None:
    potential = slanted()
    own = LatentPotential(potential.vaebm)
    state = init_with_grad(potential)(torch.zeros(2, 2, dtype=torch.float64))
    other = init_with_grad(own)(torch.tensor([[math.nan], [1.0]], dtype=torch.float64))
    found = exchange(stream(0, "nan"), potential, own, state, other)
    assert found.acceptance_rate[0] == 0 and not found.is_accepted[0] and found.acceptance_rate[1] > 0
    assert bool(found.state.position.isfinite().all())


def run(kernel: Kernel, state: KernelState, config: KernelConfig, num_steps: int) -> KernelState:
    generator = stream(0, "run")
    state, params, _ = warm_up(kernel, generator, state, start_params(config, state.position), 60)
    for _ in range(num_steps):
        state, _ = kernel.step(generator, state, params)
    return state


@pytest.mark.parametrize("name", ["mala", "pcn", "tempered"])
def test_any_kernel_finds_the_wells_masses_with_it(name: str) -> None:
    num, potential, config = 800, slanted(), KernelConfig(name)  # type: ignore[arg-type]
    kernel = with_exchange(build_kernel(config, potential), potential)
    start = torch.tensor([[-PLACE, 0.0]], dtype=torch.float64).repeat(num, 1)  # all of them in one well
    state = run(kernel, kernel.init(start), config, 100)
    assert_under_h(state.position)
    assert kernel.report is not None
    report = kernel.report(state, start_params(config, start))
    assert 0.3 < float(report["exchange_rate"]) < 0.9  # type: ignore[arg-type]
    assert len(report["first_latent_swap_rates"]) == 8  # type: ignore[arg-type]
    if name == "tempered":  # the local kernel's replicas and its report are kept
        assert state.replicas is not None and "swap_rates" in report


def test_without_it_the_chains_stay_in_their_well() -> None:
    """Negative control."""
    potential, config = slanted(), KernelConfig("mala")
    kernel = build_kernel(config, potential)
    state = run(kernel, kernel.init(torch.tensor([[-PLACE, 0.0]] * 500, dtype=torch.float64)), config, 150)
    assert float((state.position[:, 0] < 0).double().mean()) > 0.95


def test_the_exact_draws_stay_exact() -> None:
    num, potential, config = 4_000, slanted(), KernelConfig("mala", step_size=0.5)
    kernel, generator = with_exchange(build_kernel(config, potential), potential), stream(0, "stay")
    first, partners = run_first_latent(potential, generator, potential.draw_reference(generator, num), 200)
    state = with_partners(kernel.init(exact(num, generator)), first)
    params = start_params(config, state.position)._replace(partners=partners)
    for _ in range(3 * STEPS_PER_EXCHANGE):
        state, _ = kernel.step(generator, state, params)
    assert state.partners is not None and state.partners.num_exchanges == 3
    assert_under_h(state.position)


def test_an_energy_without_the_term_keeps_its_kernel() -> None:
    potential = noise_potential(VAEBM(linear_vae(), ZeroEnergy()))
    kernel = build_kernel(KernelConfig("mala"), potential)
    assert with_exchange(kernel, potential) is kernel


def test_samples_exchange_with_the_chains_that_they_started_from() -> None:
    (block,) = chain_blocks(slanted(), KernelConfig("mala"), num=500, steps=[0, 200], seed=0, latent_steps=200)
    assert_under_h(block.positions[200])
    assert 0.3 < float(block.report["exchange_rate"]) < 0.9  # type: ignore[arg-type]


def test_compared_kernels_exchange_too_and_report_it() -> None:
    potential, budget = slanted(), Budget(num_chains=200, num_warmup=40, num_evals=300)
    start = torch.tensor([[-PLACE, 0.0]], dtype=torch.float64).repeat(200, 1)
    chains = run_kernel("mala", potential, KernelConfig("mala"), start, budget, seed=0)
    assert 0.3 < float(chains.attrs["exchange_rate"]) < 0.9  # type: ignore[arg-type]
    # Of 250 steps every fifth has one evaluation more.
    assert chains.num_evals / 200 == pytest.approx(300, abs=1)
    assert chains.stats["n_steps"].double().mean() == pytest.approx(1.2, abs=0.01)
    is_left = (chains.position[:, 0] < 0).double().mean()
    assert 0.2 < float(is_left) < 0.8  # all of them began there


# --- in training -----------------------------------------------------------------------------------


def phase(latent_steps: int, num: int, replay_probability: float = 1.0) -> NegativePhase:
    loop = EbmConfig(
        objective="mle",
        batch_size=num,
        replay_size=num,
        num_transitions=1,
        replay_probability=replay_probability,
        latent=LatentTermConfig(steps=latent_steps, num_chains=num, store_size=num),
    )
    config = Config(
        ebm=loop,
        energy=EnergyConfig(inputs="x-and-z", latent_term=True),
        kernel=TrainingKernelConfig("mala", step_size=0.3, target_acceptance=None),
    )
    return NegativePhase(config, slanted())


@pytest.mark.parametrize("latent_steps", [5, 0])
def test_negatives_exchange_with_the_held_terms_chains(latent_steps: int) -> None:
    num = 1_000
    negatives = phase(latent_steps, num)
    negatives.replay.positions[:] = torch.tensor([-PLACE, 0.0])
    x, z = (torch.zeros(num, 1, dtype=torch.float64) for _ in range(2))
    for step in range(40):
        found = negatives(x, step, {"z_1": z})
    is_left = (negatives.replay.positions[:, 0] < 0).double().mean()
    if latent_steps:
        assert_under_h(negatives.replay.positions)
        assert 0.3 < float(found.monitors["exchange_rate"]) < 0.9
    else:  # negative control: a term in training has no density to keep, and the chains stay where they were
        assert float(is_left) > 0.95
        assert "exchange_rate" not in found.monitors


def test_chains_that_restart_say_nothing_of_the_exchange() -> None:
    """They have their partner's first latent, so what the energy thinks of it is not asked."""
    num = 2_000
    x, z = (torch.zeros(num, 1, dtype=torch.float64) for _ in range(2))
    whole, half, none = (phase(5, num, probability) for probability in (1.0, 0.5, 0.0))
    rates = []
    for negatives in (whole, half, none):
        negatives.replay.positions[:] = torch.tensor([-PLACE, 0.0])
        rates.append(negatives(x, 0, {"z_1": z}).monitors.get("exchange_rate"))
    assert rates[2] is None
    assert rates[0] is not None and rates[1] is not None
    assert float(rates[1]) == pytest.approx(float(rates[0]), abs=0.05)
    assert float(rates[0]) < 0.9  # else a mean over all of them would pass too
