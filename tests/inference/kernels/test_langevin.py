"""Langevin against the paper's formula, its closed-form bias, and the textbook Metropolis ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import gradient_free, hmc, integrators, langevin, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelState, Potential, init_params, run_steps, value_and_grad
from ppl_vaebm.rng import stream

TARGET = targets.ar1_gaussian(4)
Build = Callable[[Potential], Kernel]


def energy_and_grad(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and its gradient."""
    value, grad = value_and_grad(TARGET.potential, q)
    return value + 0.5 * q.square().sum(-1), grad + q


def test_a_step_is_the_papers_formula_with_eta_the_square_of_h() -> None:
    h = 0.3
    start = TARGET.exact(stream(0, "start"), 6)
    kernel = langevin.build_langevin(TARGET.potential)
    state, _ = kernel.step(stream(1, "step"), kernel.init(start), init_params(start, h))
    noise = torch.randn(start.shape, generator=stream(1, "step"), dtype=start.dtype)
    eta = h * h
    expected = start - eta / 2 * energy_and_grad(start)[1] + math.sqrt(eta) * noise
    torch.testing.assert_close(state.position, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_the_euler_step_has_the_known_wrong_variance_on_a_standard_normal(h: float) -> None:
    target = targets.reference(1)
    start = target.exact(stream(2, "start"), 40_000)
    kernel, params = langevin.build_langevin(target.potential), init_params(start, h)
    state, generator = kernel.init(start), stream(3, "steps")
    for _ in range(40):  # the correlation with the start is (1 - h^2/2)^40, below 1 %
        state, _ = kernel.step(generator, state, params)
    expected = 1 / (1 - h * h / 4)
    standard_error = expected * math.sqrt(2 / len(start))
    found = state.position.square().mean().item()
    assert abs(found - expected) < 5 * standard_error
    assert abs(found - 1) > 5 * standard_error


@pytest.mark.parametrize("integrator", ["splitting", "leapfrog"])
def test_mala_is_hmc_with_one_step(integrator: integrators.Integrator) -> None:
    start = TARGET.exact(stream(6, "start"), 20)
    params = init_params(start, 0.6)
    mala = langevin.build_mala(TARGET.potential, integrator=integrator)
    one_step = hmc.build(TARGET.potential, integrator=integrator, num_steps=1)
    state, other = mala.init(start), one_step.init(start)
    generator, other_generator = stream(7, "mala"), stream(7, "mala")
    for _ in range(10):
        state, info = mala.step(generator, state, params)
        other, other_info = one_step.step(other_generator, other, params)
        assert torch.equal(state.position, other.position)
        assert all(torch.equal(a, b) for a, b in zip(info, other_info, strict=True))


def test_leapfrog_mala_accepts_with_the_textbook_ratio() -> None:
    h = 0.7
    start = TARGET.exact(stream(8, "start"), 50)
    langevin_step = langevin.build_langevin(TARGET.potential)
    proposal, unadjusted = langevin_step.step(stream(9, "step"), langevin_step.init(start), init_params(start, h))
    mala = langevin.build_mala(TARGET.potential, integrator="leapfrog")
    _, info = mala.step(stream(9, "step"), mala.init(start), init_params(start, h))

    def log_transition(there: Tensor, here: Tensor) -> Tensor:
        return -(there - here + h * h / 2 * energy_and_grad(here)[1]).square().sum(-1) / (2 * h * h)

    y = proposal.position
    log_ratio = energy_and_grad(start)[0] - energy_and_grad(y)[0] + log_transition(start, y) - log_transition(y, start)
    expected = log_ratio.exp().clamp(max=1)
    assert expected.min() < 0.3
    torch.testing.assert_close(info.acceptance_rate, expected)
    torch.testing.assert_close(unadjusted.acceptance_rate, expected)


def test_a_missing_gradient_is_one_more_evaluation() -> None:
    start = TARGET.exact(stream(10, "start"), 3)
    kernel, params = langevin.build_langevin(TARGET.potential), init_params(start, 0.1)
    without_grad: KernelState = gradient_free.build_pcn(TARGET.potential).init(start)
    state, info = kernel.step(stream(11, "fill"), without_grad, params)
    assert info.num_evals.tolist() == [2] * 3
    assert kernel.step(stream(11, "fill"), state, params)[1].num_evals.tolist() == [1] * 3


@pytest.mark.parametrize(("build", "expected"), [(langevin.build_langevin, 5), (langevin.build_mala, 6)])
def test_five_unadjusted_steps_take_five_evaluations_and_end_at_the_same_place(build: Build, expected: int) -> None:
    num_calls = 0

    def counted(position: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return TARGET.potential(position)

    start = TARGET.exact(stream(12, "start"), 20)
    kernel, params = build(counted), init_params(start, 0.4)
    state, infos = run_steps(kernel, stream(13, "steps"), kernel.init(start), params, 5)
    assert num_calls == expected and len(infos) == 5
    generator, plain = stream(13, "steps"), kernel.init(start)
    for _ in range(5):
        plain, info = kernel.step(generator, plain, params)
    assert torch.equal(state.position, plain.position)
    assert torch.equal(infos[-1].energy, info.energy)
    # A state whose end was not evaluated is filled in by the next step.
    onward, _ = kernel.step(stream(14, "onward"), state, params)
    assert torch.equal(onward.position, kernel.step(stream(14, "onward"), plain, params)[0].position)


def test_one_step_alone_reports_its_acceptance() -> None:
    start = TARGET.exact(stream(15, "start"), 4)
    kernel, params = langevin.build_langevin(TARGET.potential), init_params(start, 0.4)
    _, (info,) = run_steps(kernel, stream(16, "steps"), kernel.init(start), params, 1)
    assert info.acceptance_rate.isfinite().all()
    _, infos = run_steps(kernel, stream(16, "steps"), kernel.init(start), params, 2)
    assert infos[0].acceptance_rate.isfinite().all() and infos[1].acceptance_rate.isnan().all()


def test_a_last_step_that_leaves_the_numbers_is_not_taken() -> None:
    start = TARGET.exact(stream(17, "start"), 4)
    kernel = langevin.build_langevin(TARGET.potential)
    state = kernel.init(start)
    assert state.grad is not None and kernel.last_step is not None
    state.grad[1] = math.inf
    end, info = kernel.last_step(stream(18, "steps"), state, init_params(start, 0.4))
    assert info.is_divergent.tolist() == [False, True, False, False]
    assert torch.equal(end.position[1], start[1]) and end.position.isfinite().all()
