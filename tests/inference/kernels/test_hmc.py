"""Trajectories: reversible, volume-preserving, of second order, and exact on the Gaussian part."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import gradient_free, hmc, integrators, targets
from ppl_vaebm.inference.kernels.base import KernelState, Potential, init_params, init_with_grad
from ppl_vaebm.rng import stream

INTEGRATORS = get_args(integrators.Integrator)


def wavy(position: Tensor) -> Tensor:
    """Couple neighbours without being quadratic: ``0.5 sum_i cos(2 q_i + q_{i+1})``."""
    return 0.5 * (2 * position + position.roll(1, dims=-1)).cos().sum(-1)


def starts(num_chains: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = stream(0, "trajectories")
    both = torch.randn(2, num_chains, dim, generator=generator, dtype=torch.float64).to(dtype)
    return both[0], both[1]


def follow(
    potential: Potential, q: Tensor, p: Tensor, h: float | Tensor, num_steps: int, integrator: integrators.Integrator
) -> integrators.Trajectory:
    step_sizes = h if isinstance(h, Tensor) else torch.full_like(q[0], h)
    return integrators.follow(
        potential, init_with_grad(potential)(q), p, step_sizes, num_steps, integrators.make_flow(integrator, step_sizes)
    )


def hamiltonian(potential: Potential, q: Tensor, p: Tensor) -> Tensor:
    return potential(q) + 0.5 * q.square().sum(-1) + 0.5 * p.square().sum(-1)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_flipping_the_momentum_leads_back_to_the_start(integrator: integrators.Integrator) -> None:
    q, p = starts(20, 5)
    h = torch.linspace(0.1, 0.4, 5, dtype=torch.float64)
    there = follow(wavy, q, p, h, 12, integrator)
    back = follow(wavy, there.end.position, -there.momentum, h, 12, integrator)
    assert (there.end.position - q).abs().max() > 1
    torch.testing.assert_close(back.end.position, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.momentum, -p, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.energy_change, -there.energy_change, rtol=0, atol=1e-10)
    onward = follow(wavy, there.end.position, there.momentum, h, 12, integrator)
    assert (onward.end.position - q).abs().max() > 1


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_trajectory_preserves_volume(integrator: integrators.Integrator) -> None:
    dim, epsilon = 2, 1e-5
    h = torch.tensor([0.3, 0.5], dtype=torch.float64)
    point = torch.tensor([0.4, -1.1, 0.8, 0.3], dtype=torch.float64)  # q and p
    shifts = epsilon * torch.eye(2 * dim, dtype=torch.float64)
    points = torch.cat([point + shifts, point - shifts])
    trajectory = follow(wavy, points[:, :dim], points[:, dim:], h, 4, integrator)
    ends = torch.cat([trajectory.end.position, trajectory.momentum], dim=1)
    jacobian = (ends[: 2 * dim] - ends[2 * dim :]) / (2 * epsilon)
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-8)
    assert (jacobian - torch.eye(2 * dim)).abs().max() > 0.3


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_energy_change_is_that_of_the_hamiltonian(integrator: integrators.Integrator) -> None:
    q, p = starts(20, 5)
    trajectory = follow(wavy, q, p, 0.4, 6, integrator)
    expected = hamiltonian(wavy, trajectory.end.position, trajectory.momentum) - hamiltonian(wavy, q, p)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(trajectory.energy_change, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_energy_error_of_a_trajectory_is_of_second_order(integrator: integrators.Integrator) -> None:
    q, p = starts(200, 5)
    nums = np.array([8, 16, 32, 64])
    errors = [
        follow(wavy, q, p, math.pi / 2 / num, int(num), integrator).energy_change.square().mean().sqrt().item()
        for num in nums
    ]
    slope = np.polyfit(np.log(1 / nums), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_both_integrators_converge_to_the_same_flow(integrator: integrators.Integrator) -> None:
    q, p = starts(20, 5)
    fine = follow(wavy, q, p, 1e-3, 1000, "leapfrog")
    coarse = follow(wavy, q, p, 0.01, 100, integrator)
    torch.testing.assert_close(coarse.end.position, fine.end.position, rtol=0, atol=3e-3)
    torch.testing.assert_close(coarse.momentum, fine.momentum, rtol=0, atol=3e-3)


def test_splitting_rotates_exactly_when_phi_is_zero() -> None:
    q, p = starts(20, 5)
    trajectory = follow(targets.reference(5).potential, q, p, 0.7, 3, "splitting")
    torch.testing.assert_close(trajectory.end.position, q * math.cos(2.1) + p * math.sin(2.1))
    torch.testing.assert_close(trajectory.momentum, p * math.cos(2.1) - q * math.sin(2.1))
    assert (trajectory.energy_change == 0).all()
    assert follow(targets.reference(5).potential, q, p, 0.7, 3, "leapfrog").energy_change.abs().max() > 0.05


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_an_inverse_mass_rescales_the_steps_of_its_coordinate(integrator: integrators.Integrator) -> None:
    q, _ = starts(4, 3)
    state = init_with_grad(wavy)(q)
    params = init_params(q, 0.2)._replace(inverse_mass=torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64))
    kernel = hmc.build(wavy, integrator=integrator, num_steps=2)
    new, info = kernel.step(stream(1, "mass"), state, params)
    p = torch.randn(q.shape, generator=stream(1, "mass"), dtype=q.dtype)
    h = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    expected = follow(wavy, q, p, h, 2, integrator)
    assert info.is_accepted.any()
    assert torch.equal(new.position[info.is_accepted], expected.end.position[info.is_accepted])
    torch.testing.assert_close(info.acceptance_rate, (-expected.energy_change).exp().clamp(max=1))
    torch.testing.assert_close(info.energy, hamiltonian(wavy, q, p))


def weak_everywhere(position: Tensor) -> Tensor:
    return 0.05 * position.cos().sum(-1)


def changes_at_dim_20_000(dtype: torch.dtype, potential: Potential) -> tuple[Tensor, Tensor]:
    """Return the change that a trajectory reports, and that of ``U + |p|^2 / 2`` in the trajectory's dtype."""
    q, p = starts(8, 20_000, dtype)
    trajectory = follow(potential, q, p, 0.3, 5, "splitting")
    naive = hamiltonian(potential, trajectory.end.position, trajectory.momentum) - hamiltonian(potential, q, p)
    return trajectory.energy_change, naive.double()


def test_float32_energy_changes_do_not_round_with_the_dimension() -> None:
    change, naive = changes_at_dim_20_000(torch.float32, weak_everywhere)
    expected, _ = changes_at_dim_20_000(torch.float64, weak_everywhere)
    assert expected.abs().max() > 0.01
    assert (change - expected).abs().max() < 1e-3
    assert (naive - expected).abs().max() > 2e-3  # what subtracting energies would give


def test_float32_energy_change_is_exactly_zero_when_phi_is() -> None:
    change, naive = changes_at_dim_20_000(torch.float32, targets.reference(20_000).potential)
    assert (change == 0).all()
    assert naive.abs().max() > 2e-3


@pytest.mark.parametrize(
    ("step_size", "trajectory_length", "expected"),
    [(0.1, 1.0, 10), (0.3, 1.0, 3), (0.1, math.pi / 2, 16), (0.01, 1.0, 16), (1.5, 0.5, 1)],
)
def test_the_number_of_steps_follows_the_trajectory_length(
    step_size: float, trajectory_length: float, expected: int
) -> None:
    kernel = hmc.build(wavy)
    start = torch.zeros(3, 2, dtype=torch.float64)
    params = init_params(start, step_size, trajectory_length)
    _, info = kernel.step(stream(2, "steps"), kernel.init(start), params)
    assert info.num_evals.tolist() == [expected] * 3


def test_num_evals_counts_every_call_of_the_potential() -> None:
    calls = 0

    def counted(position: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return wavy(position)

    kernel = hmc.build(counted, num_steps=4)
    start = torch.zeros(2, 3, dtype=torch.float64)
    with_grad, without_grad = kernel.init(start), gradient_free.build_pcn(wavy).init(start)
    for state, expected in ((with_grad, 4), (without_grad, 5)):
        calls = 0
        _, info = kernel.step(stream(3, "count"), state, init_params(start, 0.1))
        assert calls == expected and info.num_evals.tolist() == [expected] * 2


def test_a_missing_gradient_is_filled_in_and_changes_nothing_else() -> None:
    q, _ = starts(4, 3)
    kernel, params = hmc.build(wavy, num_steps=2), init_params(q, 0.3)
    full = kernel.init(q)
    one, _ = kernel.step(stream(4, "fill"), full, params)
    two, _ = kernel.step(stream(4, "fill"), KernelState(full.position, full.potential, None), params)
    assert torch.equal(one.position, two.position)


def test_jitter_stretches_each_trajectory_by_its_uniform_draw() -> None:
    # With Phi = 0 a step turns by the angle, so the angle can be read from q = 1 and p: q' = cos a + p sin a.
    target = targets.reference(1)
    kernel, start = hmc.build(target.potential, num_steps=1, jitter=0.4), torch.ones(1, 1, dtype=torch.float64)
    params, angles = init_params(start, 0.5), []
    for seed in range(300):
        new, _ = kernel.step(stream(seed, "jitter"), kernel.init(start), params)
        p = torch.randn(1, 1, generator=stream(seed, "jitter"), dtype=torch.float64).item()
        radius, phase = math.hypot(1, p), math.atan2(p, 1)
        turned = (phase - math.acos(new.position.item() / radius)) % (2 * math.pi)
        other = (phase + math.acos(new.position.item() / radius)) % (2 * math.pi)
        angles.append(next(a for a in (turned, other) if 0.3 - 1e-9 <= a <= 0.7 + 1e-9))
    assert np.mean(angles) == pytest.approx(0.5, abs=5 * 0.4 / math.sqrt(12 * 300))
    assert min(angles) < 0.32 and max(angles) > 0.68


def test_a_rise_beyond_the_threshold_is_divergent_and_refused() -> None:
    narrow = targets.gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 1e-3, dtype=torch.float64))
    kernel, start = hmc.build(narrow.potential, num_steps=3), narrow.exact(stream(5, "narrow"), 10)
    state, info = kernel.step(stream(6, "narrow"), kernel.init(start), init_params(start, 0.5))
    assert info.is_divergent.all() and not info.is_accepted.any()
    assert torch.equal(state.position, start)
    _, info = kernel.step(stream(6, "narrow"), kernel.init(start), init_params(start, 1e-3))
    assert not info.is_divergent.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"integrator": "euler"}, "splitting, leapfrog, got 'euler'"),
        ({"num_steps": 0}, "at least 1, got 0"),
        ({"jitter": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hmc.build(wavy, **options)  # type: ignore[arg-type]
