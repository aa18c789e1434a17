"""Crank-Nicolson against its formula, and elliptical slices against the published algorithm run chain by chain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import gradient_free, targets
from ppl_vaebm.inference.kernels.base import Potential, init_params
from ppl_vaebm.rng import stream

TARGET = targets.ar1_gaussian(4)


def test_a_step_is_the_formula_accepted_on_the_change_of_phi_alone() -> None:
    h = 0.8
    start = TARGET.exact(stream(0, "start"), 50)
    params = init_params(start, h)._replace(inverse_mass=torch.tensor([0.25, 1.0, 1.0, 2.25], dtype=torch.float64))
    kernel = gradient_free.build_pcn(TARGET.potential)
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
    kernel = gradient_free.build_independence(lambda position: position.cos().sum(-1))
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
    kernel = gradient_free.build_pcn(target.potential, step_size=1.5)
    start = torch.zeros(4, 2, dtype=torch.float64)
    params = init_params(start, 0.1)
    one, _ = kernel.step(stream(4, "step"), kernel.init(start), params)
    two, _ = kernel.step(stream(4, "step"), kernel.init(start + 1), params)
    torch.testing.assert_close(two.position - one.position, torch.full_like(start, math.cos(1.5)))


def test_only_a_step_that_is_not_fixed_is_tuned() -> None:
    phi = TARGET.potential
    assert gradient_free.build_pcn(phi).target_acceptance == gradient_free.PCN_TARGET_ACCEPTANCE
    assert gradient_free.build_pcn(phi, target_acceptance=0.4).target_acceptance == 0.4
    assert gradient_free.build_pcn(phi, step_size=0.3).target_acceptance is None
    assert gradient_free.build_independence(phi).target_acceptance is None


@pytest.mark.parametrize("step_size", [0.0, -0.1, 1.6])
def test_an_angle_beyond_a_quarter_turn_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"in \(0, pi/2\], got"):
        gradient_free.build_pcn(TARGET.potential, step_size=step_size)


def murray_adams_mackay(phi: Potential, q: Tensor, noise: Tensor, uniforms: list[float]) -> tuple[Tensor, int]:
    """Follow figure 2 of Murray, Adams and MacKay (2010) for one chain; return its end and the points tried."""
    log_y = -phi(q[None]).item() + math.log(1 - uniforms[0])
    angle = 2 * math.pi * uniforms[1]
    low, high = angle - 2 * math.pi, angle
    num_tried = 0
    for uniform in uniforms[2:]:
        point = q * math.cos(angle) + noise * math.sin(angle)
        num_tried += 1
        if -phi(point[None]).item() > log_y:
            return point, num_tried
        low, high = (angle, high) if angle < 0 else (low, angle)
        angle = low + (high - low) * uniform
    raise AssertionError("no point was accepted")


@pytest.mark.parametrize("target", [targets.ar1_gaussian(4, 0.95), targets.two_modes()], ids=lambda target: target.name)
def test_every_chain_does_what_the_published_algorithm_does(target: targets.Target) -> None:
    start = target.exact(stream(0, "start"), 60)
    kernel = gradient_free.build_elliptical(target.potential)
    state, info = kernel.step(stream(1, "step"), kernel.init(start), init_params(start, 0.1))
    generator = stream(1, "step")
    noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
    uniforms = torch.rand(60, gradient_free.MAX_SHRINKS + 1, generator=generator, dtype=start.dtype)
    expected = [
        murray_adams_mackay(target.potential, start[chain], noise[chain], uniforms[chain].tolist())
        for chain in range(60)
    ]
    assert info.num_evals.tolist() == [num_tried for _, num_tried in expected]
    assert info.num_evals.unique().numel() > 3
    torch.testing.assert_close(state.position, torch.stack([point for point, _ in expected]), rtol=0, atol=1e-12)
    assert info.is_accepted.all() and (info.acceptance_rate == 1).all() and not info.is_divergent.any()


def test_num_evals_is_the_number_of_rows_that_the_potential_saw() -> None:
    rows = 0
    target = targets.ar1_gaussian(4, 0.95)

    def counted(position: Tensor) -> Tensor:
        nonlocal rows
        rows += len(position)
        return target.potential(position)

    kernel = gradient_free.build_elliptical(counted)
    state = kernel.init(target.exact(stream(2, "start"), 30))
    rows = 0
    _, info = kernel.step(stream(3, "step"), state, init_params(state.position, 0.1))
    assert int(info.num_evals.sum()) == rows > 30


def test_the_first_point_is_taken_when_phi_is_zero() -> None:
    target = targets.reference(3)
    start = target.exact(stream(4, "start"), 20)
    kernel = gradient_free.build_elliptical(target.potential)
    state, info = kernel.step(stream(5, "step"), kernel.init(start), init_params(start, 0.1))
    assert (info.num_evals == 1).all()
    assert (state.position != start).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_chain_without_a_single_finite_point_stays_and_is_flagged(bad: float) -> None:
    start = torch.tensor([[0.5], [-0.5], [2.0]], dtype=torch.float64)
    clean = gradient_free.build_elliptical(targets.reference(1).potential)
    state, params = clean.init(start), init_params(start, 0.1)
    kernel = gradient_free.build_elliptical(lambda position: torch.full_like(position[:, 0], bad))
    new, info = kernel.step(stream(6, "step"), state, params)
    assert torch.equal(new.position, start) and torch.equal(new.potential, state.potential)
    assert info.is_divergent.all() and not info.is_accepted.any() and (info.acceptance_rate == 0).all()
    assert (info.num_evals == gradient_free.MAX_SHRINKS).all()


def test_a_chain_that_starts_where_the_density_is_zero_finds_its_way_out() -> None:
    def wall(position: Tensor) -> Tensor:
        return torch.where(position[:, 0] < 0, math.inf, 0.0)

    start = torch.full((200, 1), -1.0, dtype=torch.float64)
    kernel = gradient_free.build_elliptical(wall)
    state, info = kernel.step(stream(7, "wall"), kernel.init(start), init_params(start, 0.1))
    assert (state.position > 0).any()
    assert (state.potential[info.is_accepted] == 0).all()


class Halves:
    """Two Gaussians, of the first and of the second half of the rows; their potential is ``20 (q -+ 1)^2``."""

    is_by_place = True

    def __call__(self, position: Tensor) -> Tensor:
        assert len(position) == 400
        centre = torch.tensor([1.0, -1.0]).repeat_interleave(len(position) // 2)
        return 20 * (position[:, 0] - centre).square()


def test_slices_of_a_potential_by_place_take_all_rows() -> None:
    kernel, start = gradient_free.build_elliptical(Halves()), torch.randn(400, 1, generator=stream(0, "start"))
    state, generator = kernel.init(start), stream(0, "steps")
    for _ in range(20):
        state, _ = kernel.step(generator, state, init_params(start, 0.5))
    means = state.position.view(2, 200).mean(1)
    assert means.tolist() == pytest.approx([40 / 41, -40 / 41], abs=5 / math.sqrt(41 * 200))
