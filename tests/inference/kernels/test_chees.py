"""ChEES: its gradient and its optimum in closed form, the fitted Gaussian, and what the tuned kernel is worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import chees, integrators, targets
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import (
    DiagonalGaussian,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    init_params,
    init_with_grad,
)
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.registry import start_params
from ppl_vaebm.rng import stream

MAX_Z = 5.0
MEAN = torch.tensor([2.0, -1.0, 0.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([0.1, 3.0, 1.0, 1.0], dtype=torch.float64)


def test_shares_are_the_halton_sequence_of_base_2() -> None:
    assert [chees.halton(index) for index in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def gradient_of_a_rotation(angle: float, scale: Tensor, mean: Tensor) -> float:
    """Estimate the gradient where a trajectory is a rotation about a Gaussian, whose scale is the metric."""
    num_chains = 50_000
    y, p = torch.randn(2, num_chains, len(scale), generator=stream(0, "rotation"), dtype=torch.float64)
    end = KernelState(mean + scale * (y * math.cos(angle) + p * math.sin(angle)), y[:, 0], None)
    trajectory = integrators.Trajectory(end, p * math.cos(angle) - y * math.sin(angle), torch.zeros(num_chains))
    ones = torch.ones(num_chains, dtype=torch.float64)
    info = KernelInfo(ones, ones > 0, ones < 0, ones, ones.long())
    params = init_params(y, 0.1)._replace(inverse_mass=scale.square())
    return chees.criterion_gradient(KernelState(mean + scale * y, y[:, 0], None), trajectory, info, params)


@pytest.mark.parametrize("angle", [0.3, 1.0, math.pi / 2, 2.0])
def test_the_gradient_is_that_of_a_rotation_in_units_of_the_metric(angle: float) -> None:
    # With y, p ~ N(0, I): |y'|^2 - |y|^2 = s^2 (|p|^2 - |y|^2) + 2 s c <y, p>, and <y', p'> = s c (|p|^2 - |y|^2)
    # + (c^2 - s^2) <y, p>; so the mean of their product is 4 D s^3 c + 2 D s c (c^2 - s^2) = D sin(2 angle).
    expected = len(SCALE) * math.sin(2 * angle)
    assert gradient_of_a_rotation(angle, SCALE, MEAN) == pytest.approx(expected, abs=0.25)
    assert gradient_of_a_rotation(angle, torch.ones_like(SCALE), 0 * MEAN) == pytest.approx(expected, abs=0.25)


def test_a_proposal_that_is_not_finite_has_no_weight() -> None:
    q, p = torch.randn(2, 6, 3, generator=stream(1, "weights"), dtype=torch.float64)
    rate = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.9, 0.0], dtype=torch.float64)
    start, momentum, params = KernelState(q, q[:, 0], None), p.clone(), init_params(q, 0.1)
    info = KernelInfo(rate, rate > 0, rate == 0, rate, rate.long())
    for bad in (1e3, math.inf, math.nan):
        end, momentum = q + p, p.clone()
        end[rate == 0], momentum[rate == 0] = bad, bad
        trajectory = integrators.Trajectory(KernelState(end, end[:, 0], None), momentum, rate)
        gradient = chees.criterion_gradient(start, trajectory, info, params)
        after = end[rate > 0] - (rate[rate > 0] / rate.sum()) @ end[rate > 0]
        before = (q - q.mean(0))[rate > 0]
        terms = (after.square().sum(1) - before.square().sum(1)) * (after * momentum[rate > 0]).sum(1)
        assert gradient == pytest.approx(float((rate[rate > 0] * terms).sum() / rate.sum()))
    nothing = KernelInfo(0 * rate, rate > 0, rate >= 0, rate, rate.long())
    assert chees.criterion_gradient(start, trajectory, nothing, params) == 0


def test_the_harmonic_mean_leaves_divergent_chains_out() -> None:
    rate = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    is_divergent = rate == 0
    info = KernelInfo(rate, rate > 0, is_divergent, rate, rate.long())
    assert chees.harmonic_mean(info) == pytest.approx(3 / 7)
    assert chees.harmonic_mean(info._replace(is_divergent=rate >= 0)) == 0
    assert chees.harmonic_mean(info._replace(is_divergent=rate < 0)) == 0


def tuned(
    potential: Potential, start: Tensor, num_steps: int, **options: object
) -> tuple[KernelState, KernelParams, int]:
    kernel = chees.build(potential, **options)  # type: ignore[arg-type]
    return warm_up(kernel, stream(2, "warm-up"), kernel.init(start), init_params(start, 0.1, 0.5), num_steps)


def test_the_longest_trajectory_on_a_gaussian_is_the_one_that_is_best_on_average() -> None:
    # The criterion at angle t is proportional to -cos(2 t); a uniform share of T makes it stationary where
    # the integral of t sin(2 t) to T is 0: tan(2 T) = 2 T, so T = 2.247.
    target = targets.reference(200)
    start = target.exact(stream(3, "start"), 200)
    options = {"integrator": "leapfrog", "fits_reference": False, "target_acceptance": 0.97}
    _, params, _ = tuned(target.potential, start, 400, **options)
    assert params.step_size < 0.5  # fine enough to have no say
    assert float(params.trajectory_length) == pytest.approx(2.247, rel=0.1)


@pytest.mark.parametrize("integrator", ["splitting", "leapfrog"])
def test_warm_up_reaches_the_harmonic_target_then_freezes(integrator: integrators.Integrator) -> None:
    target = targets.gaussian(torch.zeros(10, dtype=torch.float64), torch.linspace(0.4, 1.6, 10, dtype=torch.float64))
    kernel = chees.build(target.potential, integrator=integrator, fits_reference=False)
    state, params, num_evals = tuned(
        target.potential, target.exact(stream(4, "start"), 100), 300, integrator=integrator, fits_reference=False
    )
    assert num_evals >= 300 * 100
    kept, rates, generator = (params.step_size.clone(), params.trajectory_length.clone()), [], stream(5, "frozen")
    for _ in range(100):
        state, info = kernel.step(generator, state, params)
        rates.append(chees.harmonic_mean(info))
    assert sum(rates) / len(rates) == pytest.approx(chees.CHEES_TARGET_ACCEPTANCE, abs=0.06)
    assert (params.step_size, params.trajectory_length) == kept
    assert kernel.report is not None
    assert kernel.report(state, params) == {"trajectory_length": float(params.trajectory_length)}


def moments_of(draws: Tensor) -> chees.Moments:
    return chees.Moments(draws.shape[1], draws.double().sum(1), draws.double().square().sum(1))


def test_the_fit_moves_coordinates_that_differ_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    num_chains, dim = 100, 1000
    generator = stream(6, "fit")
    draws = torch.randn(num_chains, 50, dim, generator=generator, dtype=torch.float64)
    draws[..., :4] = MEAN + SCALE * draws[..., :4]
    fit, weight = chees.fit_gaussian(moments_of(draws), MEAN), 100 / 105
    torch.testing.assert_close(fit.mean[:2], weight * MEAN[:2], rtol=0.02, atol=0.02)
    torch.testing.assert_close(fit.scale[:2], SCALE[:2] ** weight, rtol=0.05, atol=0)
    is_kept = (fit.mean == 0) & (fit.scale == 1)
    # Two tests at 3 standard errors each: 0.5 % of false alarms.
    assert not is_kept[:2].any() and is_kept[2:].sum() > 0.98 * dim
    monkeypatch.setattr(chees, "MIN_Z", 0.0)
    assert not (chees.fit_gaussian(moments_of(draws), MEAN).scale == 1).any()


def test_what_is_not_finite_or_never_moved_is_not_fitted() -> None:
    draws = 5 * torch.randn(10, 20, 3, generator=stream(7, "bad"))
    draws[2, 3, 0] = math.inf
    draws[..., 1] = 4.0
    fit = chees.fit_gaussian(moments_of(draws), draws)
    assert fit.mean.dtype == fit.scale.dtype == torch.float32
    assert fit.mean[:2].tolist() == [0.0, 0.0] and fit.scale[:2].tolist() == [1.0, 1.0]
    assert fit.scale[2] > 2


def exact_start(target: targets.Target, num_chains: int = 2000) -> Tensor:
    return target.exact(stream(8, "start"), num_chains)


def test_splitting_about_the_target_itself_never_rejects() -> None:
    target = targets.gaussian(MEAN, SCALE)
    start = exact_start(target)
    params = init_params(start, 1.4, 3.0)._replace(inverse_mass=SCALE.square(), reference=DiagonalGaussian(MEAN, SCALE))
    kernel = chees.build(target.potential)
    for seed in range(5):
        state, info = kernel.step(stream(seed, "about"), kernel.init(start), params)
        assert info.acceptance_rate.min() > 1 - 1e-10
        assert (state.position != start).any(1).all()
    # About N(0, I), the narrow coordinate alone refuses such a step.
    _, info = kernel.step(stream(0, "about"), kernel.init(start), params._replace(reference=None))
    assert info.acceptance_rate.mean() < 0.5


def test_splitting_about_another_gaussian_is_exact() -> None:
    target = targets.ar1_gaussian(4)
    start = exact_start(target, 10_000)
    other = DiagonalGaussian(0.3 * MEAN, torch.tensor([0.7, 1.5, 1.0, 0.9], dtype=torch.float64))
    params = init_params(start, 0.4, 1.5)._replace(inverse_mass=other.scale.square(), reference=other)
    kernel = chees.build(target.potential)
    state, rates = kernel.init(start), []
    for index in range(15):
        state, info = kernel.step(stream(index, "other"), state, params)
        rates.append(float(info.acceptance_rate.mean()))
    assert 0.5 < sum(rates) / len(rates) < 0.99
    innovations = torch.cat([state.position[:, :1], (state.position[:, 1:] - 0.8 * state.position[:, :-1]) / 0.6], 1)
    standard_error = math.sqrt(1 / len(start))
    assert innovations.mean(0).abs().max() < MAX_Z * standard_error
    assert (innovations.square().mean(0) - 1).abs().max() < MAX_Z * math.sqrt(2) * standard_error


def test_a_trajectory_about_a_gaussian_is_reversible_and_its_energy_change_that_of_the_hamiltonian() -> None:
    q, p = torch.randn(2, 20, 4, generator=stream(9, "reverse"), dtype=torch.float64)

    def wavy(position: Tensor) -> Tensor:
        return 0.5 * (2 * position + position.roll(1, dims=-1)).cos().sum(-1)

    h = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    flow = integrators.make_flow("splitting", h, DiagonalGaussian(MEAN, SCALE))
    there = integrators.follow(wavy, init_with_grad(wavy)(q), p, h, 5, flow)
    back = integrators.follow(wavy, there.end, -there.momentum, h, 5, flow)
    torch.testing.assert_close(back.end.position, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.momentum, -p, rtol=0, atol=1e-10)

    def hamiltonian(q: Tensor, p: Tensor) -> Tensor:
        return wavy(q) + 0.5 * q.square().sum(-1) + 0.5 * p.square().sum(-1)

    expected = hamiltonian(there.end.position, there.momentum) - hamiltonian(q, p)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(there.energy_change, expected, rtol=0, atol=1e-10)


def test_a_step_takes_a_uniform_share_of_the_longest_trajectory_within_its_bound() -> None:
    target = targets.reference(2)
    start = torch.zeros(3, 2, dtype=torch.float64)
    for bound, largest in ((1000, 20), (7, 7)):
        kernel = chees.build(target.potential, max_num_steps=bound)
        generator, state, counts = stream(10, "shares"), kernel.init(start), []
        for _ in range(400):
            _, info = kernel.step(generator, state, init_params(start, 0.1, 2.0))
            assert (info.num_evals == info.num_evals[0]).all()
            counts.append(int(info.num_evals[0]))
        assert min(counts) == 1 and max(counts) == largest
        expected = sum(min(steps, bound) for steps in range(1, 21)) / 20
        assert sum(counts) / 400 == pytest.approx(expected, abs=MAX_Z * 5.8 / math.sqrt(400))


def test_warm_up_counts_its_evaluations_and_keeps_the_length_within_its_bounds() -> None:
    rows = 0

    def counted(position: Tensor) -> Tensor:
        nonlocal rows
        rows += len(position)
        return narrow.potential(position)

    narrow = targets.gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.01, dtype=torch.float64))
    start = narrow.exact(stream(11, "start"), 8)
    _, params, num_evals = tuned(counted, start, 60, max_num_steps=3, fits_reference=False)
    assert rows == num_evals + len(start)  # the start itself is not counted
    assert params.trajectory_length < 1.1 * 3 * params.step_size


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20])
def test_a_short_warm_up_leaves_parameters_that_run(num_steps: int) -> None:
    target = targets.ar1_gaussian(3)
    state, params, _ = tuned(target.potential, exact_start(target, 2), num_steps)
    assert state.position.isfinite().all()
    assert all(part.isfinite().all() and (part > 0).all() for part in params[:3])


def test_a_single_chain_is_refused() -> None:
    with pytest.raises(InputError, match="chees tunes across chains: expected 2 or more, found 1; run more chains"):
        tuned(targets.reference(2).potential, torch.zeros(1, 2), 10)
    with pytest.raises(ValueError, match="max_num_steps must be at least 1, got 0"):
        chees.build(targets.reference(2).potential, max_num_steps=0)


def run_on_ar1(integrator: integrators.Integrator, fit_reference: bool, num_draws: int) -> Chains:
    """Sample 20 correlated coordinates of scales 1 to 5, from starts that know nothing of them."""
    target = targets.ar1_gaussian(20, scales=torch.linspace(1, 5, 20, dtype=torch.float64))
    config = KernelConfig("chees")
    start = torch.randn(64, 20, generator=stream(12, "start"), dtype=torch.float64)
    return run_chains(
        chees.build(target.potential, integrator=integrator, fits_reference=fit_reference),
        stream(13, "chains"),
        start,
        start_params(config, start),
        num_draws=num_draws,
        num_warmup=200,
        functionals=lambda state: {"q": state.position, "square": state.position.square()},
    )


@pytest.mark.parametrize("integrator", ["splitting", "leapfrog"])
def test_it_finds_scales_and_lengths_worth_20_draws_per_1000_gradients(integrator: integrators.Integrator) -> None:
    summaries = diagnostics.summarize(to_inference_data(run_on_ar1(integrator, True, 250)))
    truth = [*([0.0] * 20), *torch.linspace(1, 5, 20).square().tolist()]
    for summary, expected in zip(summaries, truth, strict=True):
        assert abs(summary.mean - expected) < MAX_Z * summary.mcse_mean
        assert summary.mcse_mean < 0.03 * 5 if expected == 0 else summary.mcse_mean < 0.05 * expected
        assert summary.r_hat < 1.02 and summary.ess_per_1000_evals > 20


def test_splitting_about_the_wrong_gaussian_is_worth_less() -> None:
    summaries = diagnostics.summarize(to_inference_data(run_on_ar1("splitting", False, 30)))
    assert min(summary.ess_per_1000_evals for summary in summaries) < 10


def test_the_bound_of_t_is_the_tabled_quantile() -> None:
    # Two-sided 5 % points of Student's t, for which a normal variable has 1.959964.
    tabled = {1: 12.7062, 2: 4.30265, 3: 3.18245, 7: 2.36462, 30: 2.04227, 120: 1.97993}
    for degrees, expected in tabled.items():
        assert chees.t_bound(1.959964, degrees) == pytest.approx(expected, rel=1e-5)
    assert chees.t_bound(chees.MIN_Z, 100_000) == pytest.approx(chees.MIN_Z, rel=1e-3)


@pytest.mark.parametrize("num_chains", [3, 8, 64])
def test_pure_noise_is_fitted_at_the_false_alarm_rate_of_a_normal_variable(num_chains: int) -> None:
    draws = torch.randn(num_chains, 40, 8_000, generator=stream(14, "noise"))
    fit = chees.fit_gaussian(moments_of(draws), draws[0, 0])
    # Means and variances are tested, each at 0.27 %; taking |t| > 3 gave 4.4 % of the coordinates with 8 chains.
    assert 0.002 < float(((fit.mean != 0) | (fit.scale != 1)).double().mean()) < 0.01


@pytest.mark.parametrize(("num_chains", "most_evals"), [(8, 10), (64, 3)])
def test_a_narrow_gaussian_is_not_gone_round_many_times(num_chains: int, most_evals: float) -> None:
    scale = torch.full((2,), 0.01, dtype=torch.float64)
    target, config = targets.gaussian(0 * scale, scale), KernelConfig("chees")
    start = torch.randn(num_chains, 2, generator=stream(0, "s"), dtype=torch.float64)
    kernel = chees.build(target.potential)
    state, params, num_evals = warm_up(kernel, stream(1, "w"), kernel.init(start), start_params(config, start), 200)
    # Trajectories as long in the new unit as in the old one took 12,758 and 64 (9,433 and 35 with 64 chains).
    assert num_evals / num_chains < 5_000
    generator, cost = stream(2, "d"), []
    for _ in range(50):
        state, info = kernel.step(generator, state, params)
        cost.append(float(info.num_evals.double().mean()))
    assert sum(cost) / len(cost) < most_evals
    assert float(state.position.std(0).mean()) == pytest.approx(0.01, rel=0.5)
