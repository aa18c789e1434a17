"""Dual averaging against its recursion, and against the acceptance rate that it promises."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.inference.kernels import adaptation, gradient_free, hmc, langevin, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelParams, KernelState, init_params
from ppl_vaebm.inference.kernels.cycle import build_mixture
from ppl_vaebm.rng import stream

TARGET = targets.gaussian(torch.zeros(10, dtype=torch.float64), torch.linspace(0.4, 1.6, 10, dtype=torch.float64))
PHI = TARGET.potential


def test_two_updates_by_hand() -> None:
    # Hoffman and Gelman (2014), equation 6, with mu = log(10 h), gamma = 0.2, t0 = 10, kappa = 0.75.
    start = adaptation.start_averaging(0.01)
    one = adaptation.update_averaging(start, 0.2, 0.8)
    error = 0.6 / 11
    assert one.mean_error == pytest.approx(error)
    assert one.log_step == pytest.approx(math.log(0.1) - 5 * error)
    assert one.log_step_average == pytest.approx(one.log_step)
    two = adaptation.update_averaging(one, 0.9, 0.8)
    error = (1 - 1 / 12) * error - 0.1 / 12
    assert two.log_step == pytest.approx(math.log(0.1) - math.sqrt(2) * 5 * error)
    weight = 2**-0.75
    assert two.log_step_average == pytest.approx(weight * two.log_step + (1 - weight) * one.log_step)


def test_no_step_passes_a_quarter_turn() -> None:
    averaging = adaptation.start_averaging(0.5)
    for _ in range(50):
        averaging = adaptation.update_averaging(averaging, 1.0, 0.6)
        assert max(averaging.log_step, averaging.log_step_average) <= math.log(math.pi / 2) + 1e-12
    assert averaging.log_step_average == pytest.approx(math.log(math.pi / 2))


@pytest.mark.parametrize(
    "kernel",
    [
        langevin.build_mala(PHI),
        langevin.build_mala(PHI, integrator="leapfrog", target_acceptance=0.5),
        hmc.build(PHI, num_steps=3, jitter=0.2),
        hmc.build(PHI, num_steps=3, integrator="leapfrog", target_acceptance=0.9),
        gradient_free.build_pcn(PHI),
        build_mixture([gradient_free.build_independence(PHI), langevin.build_mala(PHI)]),
    ],
    ids=["mala", "mala leapfrog", "hmc", "hmc leapfrog", "pcn", "mixture"],
)
@pytest.mark.parametrize("first_step", [0.05, 0.5])
def test_warm_up_reaches_the_target_acceptance_and_then_freezes(kernel: Kernel, first_step: float) -> None:
    assert kernel.target_acceptance is not None
    generator = stream(0, "warm-up")
    state = kernel.init(TARGET.exact(stream(1, "start"), 100))
    params = init_params(state.position, first_step)
    state, tuned, num_evals = adaptation.warm_up(kernel, generator, state, params, 200)
    assert num_evals >= 200 * 100
    assert tuned.step_size != params.step_size
    assert torch.equal(tuned.inverse_mass, params.inverse_mass)
    frozen, rates = tuned.step_size.clone(), []
    for _ in range(60):
        state, info = kernel.step(generator, state, tuned)
        rates.append(info.acceptance_rate.mean())
    assert torch.equal(tuned.step_size, frozen)
    assert torch.stack(rates).mean().item() == pytest.approx(kernel.target_acceptance, abs=0.05)


def test_no_steps_change_nothing() -> None:
    kernel = langevin.build_mala(PHI)
    state = kernel.init(torch.zeros(2, 10, dtype=torch.float64))
    params = init_params(state.position, 0.3)
    assert adaptation.warm_up(kernel, stream(2, "none"), state, params, 0) == (state, params, 0)


def test_a_kernel_with_nothing_to_tune_only_runs() -> None:
    kernel = langevin.build_langevin(PHI)
    state = kernel.init(TARGET.exact(stream(3, "start"), 5))
    params = init_params(state.position, 0.3)
    after, same, num_evals = adaptation.warm_up(kernel, stream(4, "runs"), state, params, 7)
    assert same is params and num_evals == 7 * 5
    assert (after.position != state.position).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_keeps_its_dtype(dtype: torch.dtype) -> None:
    params = adaptation.with_step_size(init_params(torch.zeros(2, 3, dtype=dtype), 0.3), 0.25)
    assert params.step_size.dtype == dtype and params.step_size.shape == () and params.step_size == 0.25


def test_the_step_that_is_kept_is_the_average_of_those_tried() -> None:
    tried: list[float] = []

    def init(position: torch.Tensor) -> KernelState:
        return KernelState(position, position[:, 0], None)

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        tried.append(float(params.step_size))
        rates = (-params.step_size).exp() * torch.tensor([0.8, 1.2], dtype=torch.float64)
        flags = torch.zeros(2, dtype=torch.bool)
        return state, KernelInfo(rates, flags, flags, rates, torch.tensor([1, 2]))

    kernel = Kernel("stub", init, step, 0.9)
    start = torch.zeros(2, 1, dtype=torch.float64)
    _, tuned, num_evals = adaptation.warm_up(kernel, stream(5, "stub"), kernel.init(start), init_params(start, 0.5), 6)
    averaging, expected = adaptation.start_averaging(0.5), [0.5]
    for _ in range(6):
        averaging = adaptation.update_averaging(averaging, math.exp(-expected[-1]), 0.9)
        expected.append(math.exp(averaging.log_step))
    assert tried == pytest.approx(expected[:-1])
    assert float(tuned.step_size) == pytest.approx(math.exp(averaging.log_step_average))
    assert float(tuned.step_size) != pytest.approx(expected[-1], rel=0.05)
    assert num_evals == 6 * 3


def rates_of(*means: float) -> torch.Tensor:
    return torch.tensor([[mean, mean] for mean in means], dtype=torch.float64)


def test_chains_that_hardly_accept_are_named() -> None:
    kernel = hmc.build(PHI, target_acceptance=0.8)
    assert adaptation.acceptance_note(kernel, rates_of(0.9, 0.5, 0.081)) is None
    note = adaptation.acceptance_note(kernel, rates_of(0.9, 0.0, 0.079, math.nan))
    assert note is not None
    assert note.startswith("3 of 4 chains accept less than 0.08 of their proposals, where hmc is tuned to 0.8")
    assert adaptation.acceptance_note(gradient_free.build_independence(PHI), rates_of(0.0)) is None


def test_a_step_that_is_hopeless_is_named_after_a_run() -> None:
    narrow = targets.gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 1e-3, dtype=torch.float64))
    kernel, start = langevin.build_mala(narrow.potential), narrow.exact(stream(6, "narrow"), 4)
    for step_size, is_named in ((0.5, True), (1e-3, False)):
        state, rates = kernel.init(start), []
        for index in range(20):
            state, info = kernel.step(stream(index, "hopeless"), state, init_params(start, step_size))
            rates.append(info.acceptance_rate)
        note = adaptation.acceptance_note(kernel, torch.stack(rates, 1))
        assert (note is not None and note.startswith("4 of 4 chains")) == is_named


def test_steps_that_follow_a_density_stay_within_bounds() -> None:
    params = init_params(torch.zeros(1, 2), 0.1)
    for _ in range(1_000):
        params = adaptation.follow_acceptance(params, 0.0, 0.75)
    assert float(params.step_size) == pytest.approx(adaptation.MIN_STEP_SIZE)
    for _ in range(2_000):
        params = adaptation.follow_acceptance(params, 1.0, 0.25)
    assert float(params.step_size) == pytest.approx(adaptation.MAX_STEP_SIZE)
