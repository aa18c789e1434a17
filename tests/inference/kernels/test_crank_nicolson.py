"""Crank-Nicolson against its formula; at the full step it has no memory."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.inference.kernels import crank_nicolson, targets
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.rng import stream

TARGET = targets.ar1_gaussian(4)


def test_a_step_is_the_formula_accepted_on_the_change_of_phi_alone() -> None:
    h = 0.8
    start = TARGET.exact(stream(0, "start"), 50)
    params = init_params(start, h)._replace(inverse_mass=torch.tensor([0.25, 1.0, 1.0, 2.25], dtype=torch.float64))
    kernel = crank_nicolson.build_pcn(TARGET.potential)
    state, info = kernel.step(stream(1, "step"), kernel.init(start), params)
    generator = stream(1, "step")
    noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
    angles = torch.tensor([0.4, 0.8, 0.8, 1.2], dtype=torch.float64)
    proposal = start * angles.cos() + noise * angles.sin()
    ratio = (TARGET.potential(start) - TARGET.potential(proposal)).exp().clamp(max=1)
    is_accepted = torch.rand(50, generator=generator, dtype=torch.float64) < ratio
    torch.testing.assert_close(info.acceptance_rate, ratio)
    assert torch.equal(info.is_accepted, is_accepted) and 5 < is_accepted.sum() < 45
    torch.testing.assert_close(state.position, torch.where(is_accepted[:, None], proposal, start))
    assert info.num_evals.tolist() == [1] * 50


def test_the_full_step_has_no_memory() -> None:
    kernel = crank_nicolson.build_independence(lambda position: position.cos().sum(-1))
    start = TARGET.exact(stream(2, "start"), 50)
    far = start + 100.0
    params = init_params(start, 0.1)  # which it ignores
    one, one_info = kernel.step(stream(3, "step"), kernel.init(start), params)
    two, two_info = kernel.step(stream(3, "step"), kernel.init(far), params)
    both = one_info.is_accepted & two_info.is_accepted
    assert both.sum() > 5
    assert torch.equal(one.position[both], two.position[both])
    noise = torch.randn(start.shape, generator=stream(3, "step"), dtype=start.dtype)
    assert torch.equal(one.position[both], noise[both])


def test_a_smaller_step_has_a_memory() -> None:
    target = targets.reference(2)  # every move is accepted
    kernel = crank_nicolson.build_pcn(target.potential, step_size=1.5)
    start = torch.zeros(4, 2, dtype=torch.float64)
    params = init_params(start, 0.1)
    one, _ = kernel.step(stream(4, "step"), kernel.init(start), params)
    two, _ = kernel.step(stream(4, "step"), kernel.init(start + 1), params)
    torch.testing.assert_close(two.position - one.position, torch.full_like(start, math.cos(1.5)))


def test_only_a_step_that_is_not_fixed_is_tuned() -> None:
    phi = TARGET.potential
    assert crank_nicolson.build_pcn(phi).target_acceptance == crank_nicolson.TARGET_ACCEPTANCE
    assert crank_nicolson.build_pcn(phi, target_acceptance=0.4).target_acceptance == 0.4
    assert crank_nicolson.build_pcn(phi, step_size=0.3).target_acceptance is None
    assert crank_nicolson.build_independence(phi).target_acceptance is None


@pytest.mark.parametrize("step_size", [0.0, -0.1, 1.6])
def test_an_angle_beyond_a_quarter_turn_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"in \(0, pi/2\], got"):
        crank_nicolson.build_pcn(TARGET.potential, step_size=step_size)
