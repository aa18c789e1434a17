"""The contract that every kernel meets; a new kernel adds a row to CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.config.kernel import TUNABLE_KERNELS
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import chees, gradient_free, hmc, integrators, langevin, registry, targets, tempered
from ppl_vaebm.inference.kernels.base import (
    DiagonalGaussian,
    Kernel,
    KernelInfo,
    KernelParams,
    KernelState,
    Potential,
    acceptance,
    init_params,
    init_with_grad,
    log_density_energy,
    metropolis,
    value_and_grad,
)
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.cycle import build_mixture
from ppl_vaebm.inference.kernels.ladder import start_ladder
from ppl_vaebm.rng import stream
from tests.inference.level_draws import level_draws

Build = Callable[[Potential], Kernel]

MAX_Z = 5.0  # a false alarm in 2 million comparisons of independent draws, and the seeds are fixed


class Case(NamedTuple):
    """A kernel and what the contract may ask of it."""

    build: Build
    is_adjusted: bool = True
    is_splitting: bool = True
    """Whether it keeps N(0, I) without any rejection when Phi = 0."""
    uses_grad: bool = True
    is_exact_at_rejection: bool = True
    """Whether a divergent chain stays where it was; slices, cycles and swaps may still move it."""
    has_replicas: bool = False


def named(name: KernelName, **options: object) -> Build:
    return lambda potential: registry.build_kernel(KernelConfig(name=name, **options), potential)  # type: ignore[arg-type]


CASES = {
    "langevin": Case(named("langevin"), is_adjusted=False, is_splitting=False),
    "mala": Case(named("mala")),
    "mala leapfrog": Case(named("mala", integrator="leapfrog"), is_splitting=False),
    "hmc": Case(named("hmc", num_steps=3, jitter=0.0)),
    "hmc leapfrog": Case(named("hmc", num_steps=3, jitter=0.0, integrator="leapfrog"), is_splitting=False),
    "hmc jittered": Case(named("hmc", jitter=0.2)),
    "chees": Case(named("chees")),
    "chees leapfrog": Case(named("chees", integrator="leapfrog"), is_splitting=False),
    "pcn": Case(named("pcn"), uses_grad=False),
    "independence": Case(named("independence"), uses_grad=False),
    "elliptical": Case(named("elliptical"), uses_grad=False, is_exact_at_rejection=False),
    "mixture": Case(named("mixture"), is_exact_at_rejection=False),
    "mixture of gradient-free": Case(
        named("mixture", members=("elliptical", "pcn")), uses_grad=False, is_exact_at_rejection=False
    ),
    "tempered": Case(named("tempered", num_levels=4), is_exact_at_rejection=False, has_replicas=True),
    "tempered of 3 steps": Case(
        named("tempered", num_levels=3, num_steps=3), is_exact_at_rejection=False, has_replicas=True
    ),
}
EVERY = sorted(CASES)
ADJUSTED = [name for name in EVERY if CASES[name].is_adjusted]
SPLITTING = [name for name in EVERY if CASES[name].is_splitting]
WITH_GRAD = [name for name in EVERY if CASES[name].uses_grad]


class Known(NamedTuple):
    """A target, a map that makes its draws zero-mean, uncorrelated and of unit variance, and a step for kernels."""

    target: targets.Target
    whiten: Callable[[Tensor], Tensor]
    step_size: float


def known_targets(dtype: torch.dtype = torch.float64) -> dict[str, Known]:
    mean, scale = torch.tensor([1.0, -0.5, 0.0], dtype=dtype), torch.tensor([0.5, 1.0, 1.5], dtype=dtype)

    def ar1_innovations(q: Tensor) -> Tensor:
        return torch.cat([q[:, :1], (q[:, 1:] - 0.8 * q[:, :-1]) / 0.6], dim=1)

    def within_and_between_modes(q: Tensor) -> Tensor:
        return torch.cat([(q.abs() - 2) / 0.2, q / math.sqrt(4.04)], dim=1)

    return {
        "reference": Known(targets.reference(2, dtype), lambda q: q, 0.7),
        "gaussian": Known(targets.gaussian(mean, scale), lambda q: (q - mean.to(q)) / scale.to(q), 0.6),
        "ar1": Known(targets.ar1_gaussian(4, 0.8, dtype), ar1_innovations, 0.5),
        "two_modes": Known(targets.two_modes(dtype=dtype), within_and_between_modes, 0.25),
    }


TARGETS = known_targets()


def run(
    kernel: Kernel, start: Tensor | KernelState, params: KernelParams, num_steps: int, seed: int = 0
) -> tuple[KernelState, list[KernelInfo]]:
    generator = stream(seed, "contract")
    state, infos = start if isinstance(start, KernelState) else kernel.init(start), []
    for _ in range(num_steps):
        state, info = kernel.step(generator, state, params)
        infos.append(info)
    return state, infos


def exact_state(kernel: Kernel, known: Known, num_chains: int, params: KernelParams) -> KernelState:
    """Start at exact draws of the target, and every replica at one of its own level."""
    state = kernel.init(known.target.exact(stream(1, "exact"), num_chains))
    if state.replicas is None:
        return state
    num_levels = state.replicas.position.shape[1] + 1
    b = start_ladder(num_levels, params, num_steps=1).inverse_temperatures[:-1]
    return tempered.with_replicas(
        known.target.potential, state, level_draws(known.target, b, num_chains, stream(1, "replicas"))
    )


def run_from_exact_draws(build: Build, known: Known, num_chains: int = 10_000, num_steps: int = 15) -> Tensor:
    kernel, params = build(known.target.potential), init_params(known.target.mean[None], known.step_size)
    return run(kernel, exact_state(kernel, known, num_chains, params), params, num_steps)[0].position


def worst_z(position: Tensor, known: Known) -> float:
    """Compare all means, variances and covariances of independent rows with the truth, in standard errors."""
    white = known.whiten(position.double())
    rows, columns = torch.triu_indices(white.shape[1], white.shape[1])
    functionals = torch.cat([white, white[:, rows] * white[:, columns]], dim=1)
    truth = torch.cat([torch.zeros(white.shape[1]), (rows == columns).double()])
    standard_error = functionals.std(0) / math.sqrt(len(white))
    return float(((functionals.mean(0) - truth) / standard_error).abs().max())


def without_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_all(
        generator: torch.Generator, state: KernelState, proposal: KernelState, energy_change: Tensor
    ) -> tuple[KernelState, Tensor, Tensor, Tensor]:
        yes = torch.ones_like(energy_change, dtype=torch.bool)
        return proposal, yes.double(), yes, ~yes

    for module in (hmc, gradient_free, tempered):
        monkeypatch.setattr(module, "metropolis", take_all)


def assert_same(one: Tensor, other: Tensor) -> None:
    # Not bit for bit: vectorised arithmetic may round a row by its place in the batch.
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def assert_same_state(one: KernelState, other: KernelState, rows: slice | Tensor = slice(None)) -> None:
    assert_same(one.position[rows], other.position[rows])
    assert_same(one.potential[rows], other.potential[rows])
    assert (one.grad is None) == (other.grad is None)
    if one.grad is not None and other.grad is not None:
        assert_same(one.grad[rows], other.grad[rows])


def tensors(*values: object) -> list[Tensor]:
    """Return every tensor of states and parameters, those within their parts too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += tensors(*value)
    return found


def assert_finite(state: KernelState) -> None:
    assert all(part.isfinite().all() for part in tensors(state))


# --- the rows of the contract


def test_every_kernel_that_a_recipe_can_name_is_under_contract() -> None:
    assert {build(targets.reference(1).potential).name for build, *_ in CASES.values()} == set(get_args(KernelName))


@pytest.mark.parametrize(
    ("config", "direct"),
    [
        (KernelConfig("langevin"), langevin.build_langevin),
        (KernelConfig("mala", integrator="leapfrog"), lambda phi: langevin.build_mala(phi, integrator="leapfrog")),
        (KernelConfig("hmc", num_steps=2, jitter=0.1), lambda phi: hmc.build(phi, num_steps=2, jitter=0.1)),
        (
            KernelConfig("chees", integrator="leapfrog", max_num_steps=2),
            lambda phi: chees.build(phi, integrator="leapfrog", max_num_steps=2),
        ),
        (
            KernelConfig("tempered", num_levels=3, num_steps=2),
            lambda phi: tempered.build(phi, num_levels=3, num_steps=2),
        ),
        (KernelConfig("hmc", max_num_steps=2), lambda phi: hmc.build(phi, max_num_steps=2, jitter=0.2)),
        (KernelConfig("pcn"), gradient_free.build_pcn),
        (KernelConfig("independence"), gradient_free.build_independence),
        (KernelConfig("elliptical"), gradient_free.build_elliptical),
        (
            KernelConfig("mixture", members=("independence", "mala")),
            lambda phi: build_mixture([gradient_free.build_independence(phi), langevin.build_mala(phi)]),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, KernelConfig) else "",
)
def test_a_configuration_builds_the_kernel_that_it_names(config: KernelConfig, direct: Build) -> None:
    target = TARGETS["ar1"].target
    start = target.exact(stream(2, "start"), 6)
    params = init_params(start, 0.3)
    built, expected = registry.build_kernel(config, target.potential), direct(target.potential)
    assert_same_state(run(built, start, params, 2)[0], run(expected, start, params, 2)[0])
    assert (built.name, built.target_acceptance) == (expected.name, expected.target_acceptance)


def test_a_configuration_sets_the_target_acceptance_of_tunable_kernels_only() -> None:
    phi = targets.reference(1).potential
    tuned = {
        name: registry.build_kernel(KernelConfig(name, target_acceptance=0.9), phi).target_acceptance
        for name in get_args(KernelName)
    }
    untuned = dict.fromkeys(["langevin", "independence", "elliptical"])
    assert tuned == {**dict.fromkeys([*TUNABLE_KERNELS, "mixture"], 0.9), **untuned}


def test_start_params_take_the_given_step_or_the_default_of_the_most_careful_member() -> None:
    position = torch.zeros(2, 3, dtype=torch.float64)
    given = registry.start_params(KernelConfig("hmc", step_size=0.7, trajectory_length=1.2), position)
    assert (float(given.step_size), float(given.trajectory_length)) == (0.7, 1.2)
    assert torch.equal(given.inverse_mass, torch.ones(3, dtype=torch.float64))
    default = registry.start_params(KernelConfig("mixture", members=("independence", "hmc")), position)
    assert float(default.step_size) == registry.DEFAULT_STEP_SIZES["hmc"]
    assert default.ladder is None
    tempered_params = registry.start_params(KernelConfig("tempered", num_levels=3, num_steps=2), position)
    assert tempered_params.ladder is not None
    assert tempered_params.ladder.inverse_temperatures.tolist() == [0, 0.125, 1]
    assert tempered_params.ladder.step_sizes.tolist() == [math.pi / 4, 0.1, 0.1]
    # The unadjusted kernel starts from eta = h^2 = 1e-3.
    assert float(registry.start_params(KernelConfig("langevin"), position).step_size) ** 2 == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "target"),
    # Kernels that split have rows of their own on the reference, below.
    [(n, t) for n in ADJUSTED for t in sorted(TARGETS) if t != "reference" or not CASES[n].is_splitting],
)
def test_an_adjusted_kernel_started_exact_stays_exact(name: str, target: str) -> None:
    known = TARGETS[target]
    assert worst_z(run_from_exact_draws(CASES[name].build, known), known) < MAX_Z


@pytest.mark.parametrize("name", ADJUSTED)
def test_an_adjusted_kernel_stays_exact_in_float32_under_unequal_masses(name: str) -> None:
    known = known_targets(torch.float32)["gaussian"]
    kernel = CASES[name].build(known.target.potential)
    params = init_params(known.target.mean[None], known.step_size)
    params = params._replace(inverse_mass=torch.tensor([0.5, 1.0, 2.0]))
    state, _ = run(kernel, exact_state(kernel, known, 5000, params), params, 15)
    assert state.position.dtype == torch.float32
    assert worst_z(state.position, known) < MAX_Z


@pytest.mark.parametrize("target", ["gaussian", "ar1", "two_modes"])
def test_unadjusted_langevin_fails_what_adjusted_kernels_pass(target: str) -> None:
    known = TARGETS[target]
    assert worst_z(run_from_exact_draws(langevin.build_langevin, known), known) > 2 * MAX_Z


@pytest.mark.parametrize("name", ["hmc", "hmc leapfrog", "mala", "chees", "pcn", "independence", "tempered"])
def test_a_kernel_without_its_rejections_fails_what_it_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_rejection(monkeypatch)
    known = TARGETS["gaussian"]
    assert worst_z(run_from_exact_draws(CASES[name].build, known), known) > 2 * MAX_Z


@pytest.mark.parametrize("name", ADJUSTED)
def test_an_adjusted_kernel_converges_from_elsewhere(name: str) -> None:
    mean, scale = torch.tensor([0.5, -0.5], dtype=torch.float64), torch.tensor([0.6, 0.9], dtype=torch.float64)
    target = targets.gaussian(mean, scale)
    start = torch.full((64, 2), 3.0, dtype=torch.float64)
    kernel, params = CASES[name].build(target.potential), init_params(start, 0.8)
    burnt_in, _ = run(kernel, start, params, 60)
    chains = run_chains(
        kernel,
        stream(4, "elsewhere"),
        burnt_in.position,
        params,
        num_draws=250,
        functionals=lambda state: {"q": state.position, "square": state.position.square()},
    )
    truth = torch.cat([mean, scale.square() + mean.square()]).tolist()
    for summary, expected in zip(diagnostics.summarize(to_inference_data(chains)), truth, strict=True):
        assert summary.r_hat < 1.05
        assert abs(summary.mean - expected) < MAX_Z * summary.mcse_mean
        assert summary.mcse_mean < 0.05  # else the line above says little


@pytest.mark.parametrize("step_size", [0.1, 1.5])
@pytest.mark.parametrize("name", sorted({*ADJUSTED, *SPLITTING}))
def test_the_reference_is_kept_at_any_step(name: str, step_size: float) -> None:
    target = targets.reference(50)
    start = target.exact(stream(5, "reference"), 200)
    state, infos = run(CASES[name].build(target.potential), start, init_params(start, step_size), 60)
    standard_error = math.sqrt(2 / state.position.numel())
    assert abs(float(state.position.square().mean()) - 1) < 4 * standard_error
    if CASES[name].is_splitting:
        assert all((info.acceptance_rate == 1).all() and info.is_accepted.all() for info in infos)


@pytest.mark.parametrize("step_size", [0.7, 1.5])
def test_the_euler_step_does_not_keep_the_reference(step_size: float) -> None:
    target = targets.reference(50)
    start = target.exact(stream(5, "reference"), 100)
    state, _ = run(langevin.build_langevin(target.potential), start, init_params(start, step_size), 200)
    assert float(state.position.square().mean()) - 1 > 4 * math.sqrt(2 / state.position.numel())


def start_with_another_chain_0(other: float) -> tuple[Tensor, Tensor]:
    start = TARGETS["gaussian"].target.exact(stream(6, "start"), 8)
    changed = start.clone()
    changed[0] = other
    return start, changed


@pytest.mark.parametrize("other", [0.3, 40.0, math.nan])
@pytest.mark.parametrize("name", EVERY)
def test_the_start_of_chain_0_does_not_change_chain_1(name: str, other: float) -> None:
    start, changed = start_with_another_chain_0(other)
    kernel, params = CASES[name].build(TARGETS["gaussian"].target.potential), init_params(start, 0.6)
    (state, infos), (other_state, other_infos) = run(kernel, start, params, 5), run(kernel, changed, params, 5)
    assert_same_state(state, other_state, slice(1, None))
    for info, other_info in zip(infos, other_infos, strict=True):
        assert torch.equal(info.is_accepted[1:], other_info.is_accepted[1:])
        assert torch.equal(info.num_evals[1:], other_info.num_evals[1:])


def test_chains_accepted_all_together_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_together(
        generator: torch.Generator, state: KernelState, proposal: KernelState, energy_change: Tensor
    ) -> tuple[KernelState, Tensor, Tensor, Tensor]:
        return metropolis(generator, state, proposal, energy_change.sum().expand_as(energy_change))

    monkeypatch.setattr(hmc, "metropolis", all_together)
    start, changed = start_with_another_chain_0(40.0)
    kernel, params = CASES["hmc"].build(TARGETS["gaussian"].target.potential), init_params(start, 0.6)
    moved = run(kernel, start, params, 5)[0].position - run(kernel, changed, params, 5)[0].position
    assert moved[1:].abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in ADJUSTED if CASES[name].is_exact_at_rejection])
def test_each_chain_is_accepted_on_its_own_rate(name: str) -> None:
    known = TARGETS["gaussian"]
    start = known.target.exact(stream(7, "start"), 20_000)
    state, (info,) = run(CASES[name].build(known.target.potential), start, init_params(start, 0.6), 1)
    rate, is_accepted = info.acceptance_rate, info.is_accepted.double()
    assert torch.equal(info.is_accepted, (state.position != start).any(-1))
    # is_accepted - rate is a martingale difference, also among the chains with a low rate.
    for rows in (rate >= 0, rate < 0.5, rate >= 0.9):
        variance = (rate * (1 - rate))[rows].sum()
        assert variance > 10
        assert (is_accepted - rate)[rows].sum().abs() < MAX_Z * variance.sqrt()


LIMIT = 1.6  # most chains of the target "gaussian" start and stay below it in their first coordinate


def broken_beyond_limit(potential: Potential, bad: float) -> Potential:
    """Make Phi and its gradient ``bad`` where the first coordinate is above the limit."""
    return lambda position: potential(position) * torch.where(position[:, 0] > LIMIT, bad, 1.0)


def bad_gradient_beyond_limit(potential: Potential, bad: float) -> Potential:
    """Make only the gradient of Phi ``bad`` there."""

    def broken(position: Tensor) -> Tensor:
        is_bad = position[:, :1] > LIMIT
        position = position * 1.0
        if position.requires_grad:
            position.register_hook(lambda grad: torch.where(is_bad, bad, grad))
        return potential(position)

    return broken


def check_broken(case: Case, clean: Potential, broken: Potential) -> None:
    start = TARGETS["gaussian"].target.exact(stream(8, "start"), 400)
    start = start[start[:, 0] < LIMIT]
    params = init_params(start, 0.6)
    expected, _ = run(case.build(clean), start, params, 1)
    state, (info,) = run(case.build(broken), start, params, 1)
    is_hit = info.is_divergent
    assert 10 < is_hit.sum() < len(start) - 10
    assert_finite(state)
    assert_same_state(state, expected, ~is_hit)
    assert (state.position[:, 0] < LIMIT).all()
    if case.is_exact_at_rejection:
        assert_same_state(state, case.build(clean).init(start), is_hit)
        assert not info.is_accepted[is_hit].any() and (info.acceptance_rate[is_hit] == 0).all()
    later, _ = run(case.build(broken), state.position, params, 10)
    assert_finite(later)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", EVERY)
def test_a_potential_that_is_not_finite_is_refused_flagged_and_stays_in_its_chain(name: str, bad: float) -> None:
    clean = TARGETS["gaussian"].target.potential
    check_broken(CASES[name], clean, broken_beyond_limit(clean, bad))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in WITH_GRAD if name != "mixture"])
def test_a_gradient_that_is_not_finite_is_refused_flagged_and_stays_in_its_chain(name: str, bad: float) -> None:
    clean = TARGETS["gaussian"].target.potential
    check_broken(CASES[name], clean, bad_gradient_beyond_limit(clean, bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_dtypes_and_shapes_are_kept(name: str, dtype: torch.dtype) -> None:
    known = known_targets(dtype)["gaussian"]
    start = known.target.exact(stream(9, "start"), 5)
    state, infos = run(CASES[name].build(known.target.potential), start, init_params(start, 0.5), 3)
    assert state.position.dtype == state.potential.dtype == dtype
    assert state.position.shape == (5, 3) and state.potential.shape == (5,)
    assert state.grad is None or (state.grad.dtype == dtype and state.grad.shape == (5, 3))
    torch.testing.assert_close(state.potential, known.target.potential(state.position))
    for info in infos:
        assert all(field.shape == (5,) for field in info)
        assert info.acceptance_rate.dtype == info.energy.dtype == torch.float64
        assert info.is_accepted.dtype == info.is_divergent.dtype == torch.bool
        assert info.num_evals.dtype == torch.int64


@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_a_pure_function_of_generator_state_and_params(name: str) -> None:
    known = TARGETS["ar1"]
    kernel = CASES[name].build(known.target.potential)
    start = known.target.exact(stream(10, "start"), 6)
    state, params = kernel.init(start), init_params(start, 0.4)
    kept = [part.clone() for part in tensors(state, params)]
    global_state = torch.get_rng_state()
    one, one_info = kernel.step(stream(11, "pure"), state, params)
    kernel.step(stream(12, "between"), one, params)
    two, two_info = kernel.step(stream(11, "pure"), state, params)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(map(torch.equal, tensors(state, params), kept))
    pairs = zip(tensors(one, one_info), tensors(two, two_info), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", EVERY)
def test_the_cached_gradient_and_energy_belong_to_the_position(name: str) -> None:
    known = TARGETS["ar1"]
    start = known.target.exact(stream(13, "start"), 50)
    kernel = CASES[name].build(known.target.potential)
    state, infos = run(kernel, start, init_params(start, 0.4), 3)
    value, grad = value_and_grad(known.target.potential, state.position)
    torch.testing.assert_close(state.potential, value)
    if state.grad is not None:
        torch.testing.assert_close(state.grad, grad)
    if not CASES[name].uses_grad and not name.startswith("mixture"):
        torch.testing.assert_close(infos[-1].energy, value + 0.5 * state.position.square().sum(-1))
    assert (state.grad is not None) == CASES[name].uses_grad


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "wrong",
    [lambda position: position.square(), lambda position: position.sum(), lambda position: position.sum(-1, True)],
    ids=["per coordinate", "summed over chains", "extra axis"],
)
def test_a_potential_of_the_wrong_shape_is_refused(name: str, wrong: Potential) -> None:
    start = torch.zeros(4, 3, dtype=torch.float64)
    kernel = CASES[name].build(wrong)
    with pytest.raises(ValueError, match=r"one number per chain, shape \(4,\)"):
        kernel.init(start)
    good = CASES[name].build(targets.reference(3).potential).init(start)
    with pytest.raises(ValueError, match="one number per chain"):
        kernel.step(stream(0, "wrong"), good, init_params(start, 0.1))


def test_a_potential_that_ignores_the_position_has_gradient_zero() -> None:
    level = torch.tensor(2.0, requires_grad=True)
    for potential in (lambda position: torch.full((3,), 2.0), lambda position: level.expand(3)):
        value, grad = value_and_grad(potential, torch.ones(3, 2))
        assert torch.equal(value, torch.full((3,), 2.0)) and not value.requires_grad
        assert torch.equal(grad, torch.zeros(3, 2))


def test_log_density_energy_is_phi_plus_half_the_square() -> None:
    state = KernelState(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, -1.0]), None)
    assert log_density_energy(state).tolist() == [13.5, 1.0]
    assert log_density_energy(state).dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["position", "grad", "energy_change"])
def test_acceptance_is_zero_where_anything_is_not_finite(part: str, bad: float) -> None:
    parts = {
        "position": torch.zeros(4, 2),
        "grad": torch.zeros(4, 2),
        "energy_change": torch.tensor([0.0, math.log(4), -3.0, 1001.0], dtype=torch.float64),
    }
    parts[part][0] = bad
    proposal = KernelState(parts["position"], torch.zeros(4), parts["grad"])
    rate, is_divergent = acceptance(proposal, parts["energy_change"])
    assert rate.tolist() == pytest.approx([0.0, 0.25, 1.0, 0.0])
    assert is_divergent.tolist() == [True, False, False, True]


@pytest.mark.parametrize("build", [chees.build, tempered.build])
def test_a_mixture_refuses_a_member_with_a_warm_up_of_its_own(build: Build) -> None:
    phi = targets.reference(1).potential
    with pytest.raises(ValueError, match=f"runs no warm-up of a member's own, which {build(phi).name} has"):
        build_mixture([gradient_free.build_independence(phi), build(phi)])


LARGE_DIM = 150_000  # the noise of an NVAE on CIFAR-10


def along_one_direction(position: Tensor) -> Tensor:
    """Give an energy of a nat or so: what it holds at this dimension is no larger than at any other."""
    direction = torch.linspace(-1, 1, LARGE_DIM, dtype=position.dtype)
    return 3 * (position @ (direction / direction.norm())).cos()


def rates_at_dim_150_000(
    dtype: torch.dtype, integrator: integrators.Integrator, has_reference: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a trajectory's acceptance rate and starting energy, and the rate that subtracted energies would give."""
    generator = stream(20, "large")
    q, p = torch.randn(2, 6, LARGE_DIM, generator=generator, dtype=torch.float32).to(dtype)
    reference = None
    if has_reference:
        mean, log_scale = 0.1 * torch.randn(2, LARGE_DIM, generator=generator, dtype=torch.float32).to(dtype)
        reference = DiagonalGaussian(mean, log_scale.exp())
    params = init_params(q, 0.003)._replace(reference=reference)
    state = init_with_grad(along_one_direction)(q)
    _, info, trajectory = hmc.transition(
        along_one_direction, generator, state, p, params, params.step_size, 3, integrator
    )
    end = trajectory.end

    def hamiltonian(state: KernelState, momentum: Tensor) -> Tensor:
        return state.potential + 0.5 * state.position.square().sum(-1) + 0.5 * momentum.square().sum(-1)

    subtracted = hamiltonian(end, trajectory.momentum) - hamiltonian(state, p)
    return info.acceptance_rate, info.energy, (-subtracted.double()).exp().clamp(max=1)


@pytest.mark.parametrize(
    ("integrator", "has_reference"), [("splitting", False), ("splitting", True), ("leapfrog", False)]
)
def test_a_tiny_step_is_accepted_as_it_should_in_150_000_dimensions_of_float32(
    integrator: integrators.Integrator, has_reference: bool
) -> None:
    rate, energy, subtracted = rates_at_dim_150_000(torch.float32, integrator, has_reference)
    exact, exact_energy, _ = rates_at_dim_150_000(torch.float64, integrator, has_reference)
    assert exact.min() > 0.999
    assert (rate - exact).abs().max() < 1e-4
    torch.testing.assert_close(energy, exact_energy, rtol=0, atol=1e-3)
    # Energies of 150,000 nats, accumulated and subtracted in float32, are 0.008 nats apart at least, if not equal.
    assert (subtracted - exact).abs().max() > 3e-3


def rate_error_of_a_climb() -> float:
    """Let chains trade 150,000 nats of kinetic energy for potential, and see how wrong their acceptance is."""
    potential, generator = targets.reference(LARGE_DIM).potential, stream(21, "climb")
    q, p = torch.randn(2, 2, LARGE_DIM, generator=generator, dtype=torch.float32)
    state, momentum, params = init_with_grad(potential)(q), 2 + p, init_params(q, 0.003)
    _, info, trajectory = hmc.transition(
        potential, generator, state, momentum, params, params.step_size, 300, "leapfrog"
    )
    climbed = 0.5 * (trajectory.end.position.double().square() - q.double().square()).sum(-1)
    assert climbed.min() > 150_000
    slowed = 0.5 * (momentum.double().square() - trajectory.momentum.double().square()).sum(-1)
    exact = (slowed - climbed).exp().clamp(max=1)
    assert 0.2 < float(exact.min()) and float(exact.max()) < 0.9
    return float((info.acceptance_rate - exact).abs().max())


def test_energy_changes_are_added_up_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rate_error_of_a_climb() < 0.005
    monkeypatch.setattr(integrators, "ENERGY_DTYPE", torch.float32)
    assert rate_error_of_a_climb() > 0.02


def test_the_configuration_knows_which_kernels_are_tuned() -> None:
    names = [name for name in get_args(KernelName) if name != "mixture"]
    tuned = [name for name in names if named(name)(targets.reference(1).potential).target_acceptance is not None]
    assert tuned == list(TUNABLE_KERNELS)


class InPasses:
    """A potential that remembers its largest pass."""

    def __init__(self, potential: Potential, rows_per_pass: int) -> None:
        self.potential, self.rows_per_pass, self.most = potential, rows_per_pass, 0

    def __call__(self, position: Tensor) -> Tensor:
        self.most = max(self.most, len(position))
        return self.potential(position)


@pytest.mark.parametrize("name", EVERY)
def test_passes_of_a_potential_that_bounds_its_rows_change_no_draw(name: str) -> None:
    target = TARGETS["ar1"].target
    start, bounded = target.exact(stream(30, "start"), 7), InPasses(target.potential, 3)
    params = init_params(start, 0.4)
    state, infos = run(CASES[name].build(bounded), start, params, 3)
    expected, expected_infos = run(CASES[name].build(target.potential), start, params, 3)
    assert bounded.most == 3
    assert_same_state(state, expected)
    assert torch.equal(infos[-1].num_evals, expected_infos[-1].num_evals)
