"""NumPyro's and BlackJAX's samplers on potentials of torch.

Each compiles for seconds: two of them are in the fast tests, and all tests of a kernel share one program.
"""

from __future__ import annotations

import math
import time
from typing import Any, get_args

import jax
import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges import jax_potential, jax_runner
from ppl_vaebm.inference.bridges.jax_runner import JaxKernelName, run_jax
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions
from ppl_vaebm.inference.kernels import targets
from ppl_vaebm.inference.kernels.base import KernelState, Potential
from ppl_vaebm.inference.kernels.chains import Chains
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import seed_for, stream
from tests.small_models import A, QuadraticEnergy, S, linear_vae, sites_of

NUM_CHAINS, DIM, NUM_WARMUP = 32, 4, 60
ALONE = "numpyro-hmc"
"""A kernel whose chains take different numbers of steps."""
TOGETHER = "blackjax-chees"
"""A kernel whose chains all take the same number."""
ALL_KERNELS = [
    pytest.param(name, marks=[] if name in (ALONE, TOGETHER) else pytest.mark.slow) for name in get_args(JaxKernelName)
]
ADJUSTED = [case for case in ALL_KERNELS if case.values[0] != "blackjax-mclmc"]
OTHERS = [case for case in ADJUSTED if case.values[0] != ALONE]
SLOW_ALONE = pytest.param(ALONE, marks=pytest.mark.slow)
AR1 = targets.ar1_gaussian(DIM, 0.6)
START = AR1.exact(stream(0, "start"), NUM_CHAINS)
MAX_Z = 5.0


class Counted:
    """A potential that counts the positions that it is given, and how often."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.num_calls = self.num_rows = 0

    def __call__(self, position: Tensor) -> Tensor:
        self.num_calls += 1
        self.num_rows += len(position)
        return self.potential(position)


def stored(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "phi": state.potential}


def run(kernel: str, potential: Potential = AR1.potential, position: Tensor = START, **options: Any) -> Chains:
    """Run with options and limits by name."""
    settings: dict[str, Any] = {"num_draws": 20, "num_warmup": NUM_WARMUP, "seed": 1, "functionals": stored} | options
    limits = Limits(**{name: settings.pop(name) for name in Limits._fields if name in settings})
    own = SamplerOptions(**{name: settings.pop(name) for name in SamplerOptions._fields if name in settings})
    return run_jax(kernel, potential, position, own, limits, **settings)  # type: ignore[arg-type]


def standard_errors_off(draws: Tensor, expected: float | Tensor) -> Tensor:
    """How far means of draws ``(C, N, ...)`` are from numbers, in standard errors: chains are independent."""
    means = draws.mean(1)
    return (means.mean(0) - expected).abs() / (means.std(0) / math.sqrt(len(means)))


def program_potential(vaebm: VAEBM) -> Potential:
    """Phi from the log density of the Pyro program whose sites Pyro made noises, up to a constant."""
    packing = Packing(vaebm.vae.noise_shapes)
    names = [name.removeprefix("eps_") for name in packing.shapes]
    decentred = poutine.reparam(vaebm, config={name: LocScaleReparam(0.0) for name in names})

    def phi(position: Tensor) -> Tensor:
        noises = packing.unravel(position).values()
        data = {f"{name}_decentered": noise for name, noise in zip(names, noises, strict=True)}
        trace = poutine.trace(poutine.condition(decentred, data=data)).get_trace(num=len(position))
        trace.compute_log_prob()
        log_probs = [
            site["log_prob"] for site in sites_of(trace).values() if "log_prob" in site and site["is_observed"]
        ]
        return -torch.stack(log_probs).sum(0) - 0.5 * position.square().sum(-1)

    return phi


@pytest.mark.parametrize("kernel", ADJUSTED)
def test_moments_of_a_correlated_gaussian_are_right(kernel: str) -> None:
    chains = run(kernel, num_draws=80 if kernel in (ALONE, TOGETHER) else 150)
    q = chains.draws["q"]
    products = q[..., 1:] * q[..., :-1]
    assert (standard_errors_off(q, 0.0) < MAX_Z).all()
    assert (standard_errors_off(q.square(), 1.0) < MAX_Z).all()
    assert (standard_errors_off(products, 0.6) < MAX_Z).all()
    assert (standard_errors_off(products, 0.0) > MAX_Z).all()  # the correlation that N(0, I) lacks is seen
    assert chains.stats["diverging"].double().mean() < 0.01 and chains.attrs["is_adjusted"] == 1


@pytest.mark.parametrize(
    "kernel", [ALONE, *(pytest.param(case.values[0], marks=pytest.mark.slow) for case in ADJUSTED[1:])]
)
def test_moments_under_a_pyro_program_are_those_of_its_posterior(kernel: str) -> None:
    center, width = 2.0, 0.7
    vaebm = VAEBM(linear_vae(dim=2), QuadraticEnergy(center, width)).eval()
    chains = run(kernel, program_potential(vaebm), torch.zeros_like(START), num_draws=70 if kernel == ALONE else 150)
    q = chains.draws["q"][:, 20:]
    # x = A z + S e in each of two dimensions, and exp(-(x - center)^2 / 2 width^2) is a likelihood.
    map_to_x = torch.tensor([A, A, S, S], dtype=torch.float64)
    shrinkage = 1 / (width**2 + A**2 + S**2)
    assert (standard_errors_off(q, map_to_x * center * shrinkage) < MAX_Z).all()
    deviations = q - map_to_x * center * shrinkage
    assert (standard_errors_off(deviations.square(), 1 - map_to_x.square() * shrinkage) < MAX_Z).all()
    assert (standard_errors_off(deviations[..., :2] * deviations[..., 2:], -A * S * shrinkage) < MAX_Z).all()
    assert (standard_errors_off(q, 0.0) > MAX_Z).all()  # N(0, I) has another mean


@pytest.mark.slow
def test_unadjusted_mclmc_is_marked_and_biased_by_its_step() -> None:
    careful = run("blackjax-mclmc", num_draws=600)
    assert careful.attrs["is_adjusted"] == 0
    q = careful.draws["q"]
    assert ((q.mean((0, 1))).abs() < 0.1).all() and ((q.var((0, 1)) - 1).abs() < 0.1).all()
    rough = run("blackjax-mclmc", num_draws=600, num_warmup=0, step_size=1.5)
    assert (standard_errors_off(rough.draws["q"].square().mean(-1), 1.0) > MAX_Z).all()
    assert rough.stats["acceptance_rate"].mean() < 0.9 < careful.stats["acceptance_rate"].mean()


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_statistics_belong_to_their_draws(kernel: str) -> None:
    chains = run(kernel)
    q, lp = chains.draws["q"], chains.stats["lp"]
    phi = AR1.potential(q.flatten(0, 1)).unflatten(0, q.shape[:2])
    torch.testing.assert_close(chains.draws["phi"], phi, rtol=0, atol=1e-12)
    torch.testing.assert_close(lp, -phi - 0.5 * q.square().sum(-1), rtol=0, atol=1e-12)
    rate = chains.stats["acceptance_rate"]
    assert (rate >= 0).all() and (rate <= 1).all() and rate.mean() > 0.5
    kinetic = chains.stats["energy"][:, 1:] + lp[:, :-1]
    if kernel in ("blackjax-nuts", "blackjax-chees"):  # the Hamiltonian of the start
        assert abs(float(kinetic.mean()) - DIM / 2) < 5 * math.sqrt(DIM / 2 / kinetic.numel())
        assert (kinetic > 0).all()
    elif "mclmc" in kernel:
        assert chains.stats["energy"].equal(-lp)
    else:  # the Hamiltonian of the end
        assert (chains.stats["energy"] + lp > -1e-9).all()


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_shapes_and_names_are_those_of_run_chains(kernel: str) -> None:
    chains = run(kernel, num_draws=6)
    assert chains.kernel == kernel
    assert chains.draws["q"].shape == (NUM_CHAINS, 6, DIM) and chains.draws["phi"].shape == (NUM_CHAINS, 6)
    assert chains.position.equal(chains.draws["q"][:, -1])
    assert set(chains.stats) == {"lp", "acceptance_rate", "diverging", "energy", "n_steps"}
    assert all(stat.shape == (NUM_CHAINS, 6) for stat in chains.stats.values())
    assert chains.stats["diverging"].dtype == torch.bool and chains.stats["n_steps"].dtype == torch.int64
    assert chains.stats["lp"].dtype == chains.draws["q"].dtype == chains.draws["phi"].dtype == torch.float64
    assert chains.params.step_size.shape == chains.params.trajectory_length.shape == (NUM_CHAINS,)
    assert chains.params.inverse_mass.shape == (NUM_CHAINS, DIM)
    assert (chains.params.step_size != SamplerOptions(0).step_size).all()
    assert {"seed": 1, "thin": 1}.items() <= chains.attrs.items()


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_all_evaluations_are_counted(kernel: str) -> None:
    potential = Counted(AR1.potential)
    chains = run(kernel, potential)
    steps, attrs = chains.stats["n_steps"], dict[str, Any](chains.attrs)
    assert chains.num_evals == steps.sum() and (steps >= 1).all()
    # A transition goes on until the chain that needs most steps has done them, for all chains; a tree may go on longer,
    # for chains that are done build trees that nobody wants.
    needed = NUM_CHAINS * steps.amax(0).sum()
    assert attrs["num_evals_computed"] == needed or ("nuts" in kernel and attrs["num_evals_computed"] > needed)
    assert potential.num_rows == attrs["num_evals_computed"] + attrs["warmup_evals_computed"]
    assert potential.num_calls * NUM_CHAINS == potential.num_rows  # always all chains in one call
    assert NUM_CHAINS * 2 <= chains.warmup_evals <= attrs["warmup_evals_computed"]
    same_steps = kernel in (TOGETHER, "blackjax-mclmc")
    assert (chains.num_evals == attrs["num_evals_computed"]) == same_steps
    assert (chains.warmup_evals == attrs["warmup_evals_computed"]) == same_steps


def test_draws_stop_with_the_one_that_spends_the_budget() -> None:
    whole = run(ALONE, num_draws=30)
    spent = whole.stats["n_steps"].double().mean(0).cumsum(0)
    for max_evals in (1, int(spent[4]), int(spent[20]) + 1):
        expected = int((spent < max_evals).sum()) + 1
        cut = run(ALONE, num_draws=30, max_evals=max_evals)
        assert cut.draws["q"].equal(whole.draws["q"][:, :expected])
        assert cut.position.equal(cut.draws["q"][:, -1])
        assert cut.num_evals == whole.stats["n_steps"][:, :expected].sum()
    assert run(ALONE, num_draws=3, max_evals=10**6).stats["lp"].shape[1] == 3


def test_draws_continue_until_the_time_is_used() -> None:
    def slow(position: Tensor) -> Tensor:
        time.sleep(0.002)
        return AR1.potential(position)

    chains = run(TOGETHER, slow, num_draws=1000, max_evals=1, min_seconds=0.3)
    assert chains.elapsed is not None and 2 < len(chains.elapsed) < 1000
    assert chains.seconds >= 0.3 > chains.elapsed[-2]
    assert run(TOGETHER, slow, num_draws=3, max_evals=1, min_seconds=10.0).stats["lp"].shape[1] == 3


def test_elapsed_grows_by_the_evaluations_of_each_draw() -> None:
    chains = run(ALONE, num_draws=62)
    assert chains.elapsed is not None and chains.elapsed.shape == (62,)
    assert chains.elapsed[-1] == chains.seconds
    of_draw = torch.diff(chains.elapsed, prepend=chains.elapsed.new_zeros(1))
    computed = chains.stats["n_steps"].amax(0)
    assert (of_draw > 0).all()
    within = slice(2, 60)  # the second block: the first is one draw, and the most that a block takes is 64
    per_eval = of_draw[within] / computed[within]
    torch.testing.assert_close(per_eval, per_eval[:1].expand_as(per_eval), rtol=1e-6, atol=0)


def test_a_second_potential_of_the_same_shape_needs_no_compilation() -> None:
    run(ALONE)
    shifted = targets.gaussian(torch.full((DIM,), 3.0, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64))
    chains = run(ALONE, shifted.potential)
    assert chains.attrs["compile_seconds"] < 0.5  # type: ignore[operator]
    assert chains.warmup_seconds > chains.attrs["compile_seconds"]  # type: ignore[operator]
    assert abs(float(chains.draws["q"].mean()) - 3.0) < 0.5


def test_draws_follow_the_seed_and_chains_differ() -> None:
    same_starts = START[:1].expand(NUM_CHAINS, -1)
    first, again, other = (run(ALONE, position=same_starts, seed=seed).draws["q"] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert len(first[:, -1, 0].unique()) == NUM_CHAINS


def test_keys_do_not_depend_on_the_number_of_chains() -> None:
    few, many = (np.asarray(jax.random.key_data(jax_runner._keys(ALONE, 1, n))) for n in (3, 5))
    assert (few == many[:3]).all() and len({tuple(key) for key in many.tolist()}) == 5
    assert [(int(high) << 32) + int(low) for high, low in many.tolist()] == [
        seed_for(1, "jax", ALONE, chain) for chain in range(5)
    ]


def test_global_state_is_unchanged_and_draws_work_under_no_grad() -> None:
    before = dict(jax.config.values), torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with torch.no_grad():
        chains = run(ALONE, num_draws=2)
    assert not chains.draws["q"].requires_grad
    assert dict(jax.config.values) == before[0]
    assert torch.get_rng_state().equal(before[1])
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


@pytest.mark.parametrize("kernel", [case for case in ALL_KERNELS if case.values[0] != ALONE] + [SLOW_ALONE])
def test_a_potential_that_becomes_nan_is_flagged_and_rejected(kernel: str) -> None:
    def fails_later(position: Tensor) -> Tensor:
        # The start is evaluated twice: for its check, and by the sampler.
        return torch.full_like(position[:, 0], 0.0 if potential.num_calls <= 2 else math.nan)

    potential = Counted(fails_later)
    # Without a warm-up, which would search for an ever smaller step.
    chains = run(kernel, potential, num_draws=3, num_warmup=0)
    assert chains.stats["diverging"].all()
    assert chains.position.equal(START)
    assert (chains.stats["acceptance_rate"] == 0).all()
    assert chains.stats["lp"].isfinite().all()


@pytest.mark.parametrize("kernel", ["numpyro-hmc", "blackjax-mclmc"])
@pytest.mark.slow
def test_float32_stays_float32(kernel: str) -> None:
    chains = run(kernel, targets.ar1_gaussian(DIM, 0.6, torch.float32).potential, START.float())
    assert chains.draws["q"].dtype == chains.draws["phi"].dtype == chains.params.step_size.dtype == torch.float32
    assert chains.stats["lp"].dtype == torch.float64
    phi = AR1.potential(chains.draws["q"].double().flatten(0, 1)).unflatten(0, (NUM_CHAINS, -1))
    torch.testing.assert_close(chains.draws["phi"].double(), phi, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.slow
def test_without_a_warm_up_step_and_mass_stay_as_given(kernel: str) -> None:
    chains = run(kernel, num_warmup=0, num_draws=2, step_size=0.25)
    assert (chains.params.step_size == 0.25).all()
    assert chains.params.inverse_mass.equal(torch.ones(NUM_CHAINS, DIM, dtype=torch.float64))
    assert chains.warmup_evals == chains.attrs["warmup_evals_computed"] == 2 * NUM_CHAINS


def test_errors_of_the_potential_are_raised_unwrapped() -> None:
    def fails_later(position: Tensor) -> Tensor:
        if potential.num_calls > 5:
            raise RuntimeError("out of luck")
        return AR1.potential(position)

    potential = Counted(fails_later)
    with pytest.raises(RuntimeError, match="^out of luck$"):
        run(ALONE, potential)
    with pytest.raises(ValueError, match=r"one number per chain, shape \(32,\)"):
        run(ALONE, lambda position: position.square())


def test_bad_input_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected one of the kernels numpyro-hmc, .*, found 'hmc'"):
        run("hmc")
    with pytest.raises(InputError, match="expected a finite U where every chain starts, found 32 of 32"):
        run(ALONE, lambda position: position.sum(-1) * math.nan)
    with pytest.raises(InputError, match=r"found \(4,\) and torch.float64"):
        run(ALONE, position=START[0])
    with pytest.raises(InputError, match="torch.bfloat16"):
        run(ALONE, position=START.bfloat16())
    with pytest.raises(InputError, match="two or more dimensions for blackjax-mclmc"):
        run("blackjax-mclmc", lambda position: position[:, 0], START[:, :1])
    with pytest.raises(InputError, match="at least 30 warm-up steps for blackjax-mclmc, .* found 10"):
        run("blackjax-mclmc", num_warmup=10)
    monkeypatch.setattr(jax_potential, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"found no jax, numpyro: .*pip install -e '\.\[jax\]'"):
        run(ALONE)
