"""Every exact kernel on every analytic target, from starts wider than the target: right moments, or a flag.

No pair is left out. A pair that converges within its budget has to have all means and variances within 5 Monte Carlo
standard errors and R-hat at most 1.01; of the others, which :data:`FLAGGED` lists with the reason, the diagnosis has to
say that they have not converged. The unadjusted kernel has its bias in closed form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.diagnostics.summary import QuantitySummary
from ppl_vaebm.inference.kernels import langevin, registry, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, KernelState, Potential, init_params
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.rng import stream
from tests.inference import reference_moments

MAX_Z = 5.0
# Starts have twice the target's standard deviation. The first steps are at the kernel's default, short enough to come
# back from there: at a step tuned to where most chains are, a chain far out in a bend may never accept.
OVER_DISPERSION, NUM_BURN_IN = 2.0, 100
NUM_WATCHED = 32

KERNELS = {name: KernelConfig(name) for name in get_args(KernelName) if name != "langevin"} | {
    "hmc leapfrog": KernelConfig("hmc", integrator="leapfrog")
}


class Known(NamedTuple):
    """A target and the budget of the pairs with it."""

    build: Callable[[], targets.Target]
    thin: dict[str, int]
    """Steps per stored draw, by kernel: what it takes for about 100 effective draws of every chain."""
    num_chains: int = 32
    num_draws: int = 500
    num_warmup: int = 300
    is_slow: bool = True


def logistic() -> targets.Target:
    """The regression, with the stored moments; nobody has exact draws of it."""
    moments = reference_moments.stored()
    potential = targets.logistic_regression(*reference_moments.breast_cancer())

    def exact(generator: torch.Generator, n: int) -> Tensor:
        raise NotImplementedError("this posterior has no exact draws")

    return targets.Target("logistic", potential, moments.mean, moments.variance, math.nan, exact)


TARGETS = {
    "condition 4, D = 3": Known(
        lambda: targets.conditioned_gaussian(3, 4.0),
        {"mala": 4, "hmc": 3, "hmc leapfrog": 3, "chees": 2, "pcn": 2, "independence": 2, "elliptical": 2}
        | {"mixture": 1, "tempered": 1},
        num_draws=300,
        num_warmup=100,
        is_slow=False,
    ),
    "condition 100, D = 5": Known(
        lambda: targets.conditioned_gaussian(5),
        {"mala": 50, "hmc": 3, "hmc leapfrog": 3, "chees": 1, "pcn": 80, "independence": 80, "elliptical": 10}
        | {"mixture": 3, "tempered": 6},
    ),
    "condition 100, D = 20": Known(
        lambda: targets.conditioned_gaussian(20, is_rotated=True),
        {"mala": 55, "hmc": 2, "hmc leapfrog": 2, "chees": 2, "pcn": 3, "independence": 3, "elliptical": 1}
        | {"mixture": 2, "tempered": 18},
    ),
    "condition 100, D = 1000": Known(
        lambda: targets.conditioned_gaussian(1000),
        {"mala": 1, "hmc": 6, "hmc leapfrog": 1, "chees": 3, "pcn": 1, "independence": 1, "elliptical": 1}
        | {"mixture": 1, "tempered": 1},
        num_chains=16,
        num_draws=300,
    ),
    "banana": Known(
        targets.banana,
        {"mala": 8, "hmc": 2, "hmc leapfrog": 2, "chees": 1, "pcn": 3, "independence": 3, "elliptical": 2}
        | {"mixture": 1, "tempered": 2},
    ),
    "25 modes": Known(
        targets.grid_modes,
        {"mala": 2, "hmc": 1, "hmc leapfrog": 1, "chees": 1, "pcn": 40, "independence": 10, "elliptical": 3}
        | {"mixture": 5, "tempered": 4},
        num_warmup=150,
    ),
    "funnel": Known(
        lambda: targets.funnel(torch.linspace(-2, 2, 9, dtype=torch.float64)),
        {"mala": 2, "hmc": 1, "hmc leapfrog": 1, "chees": 2, "pcn": 24, "independence": 50, "elliptical": 7}
        | {"mixture": 1, "tempered": 3},
    ),
    "logistic regression": Known(
        logistic,
        {"mala": 2, "hmc": 2, "hmc leapfrog": 2, "chees": 2, "pcn": 1, "independence": 1, "elliptical": 1}
        | {"mixture": 2, "tempered": 2},
    ),
}

# Pairs that their budget is too small for, and why; the diagnosis has to notice.
OF_DIMENSION = "without a gradient, what is accepted shrinks with every direction that the target narrows"
OF_DIFFUSION = "steps as short as the narrowest direction diffuse along the widest"
OF_MODES = "nothing leads a local move from one mode to the next"
OF_NECK = "a chain that starts in the neck needs a step a tenth of that which suits the others"
OF_BUDGET = "hmc needs six times as many trajectories, and so would this"
FLAGGED = (
    {("condition 100, D = 20", kernel): OF_DIMENSION for kernel in ("pcn", "independence", "elliptical")}
    | {("condition 100, D = 1000", kernel): OF_DIMENSION for kernel in ("pcn", "independence", "elliptical")}
    | {("condition 100, D = 1000", kernel): OF_DIFFUSION for kernel in ("mala", "tempered")}
    | {("condition 100, D = 1000", kernel): OF_BUDGET for kernel in ("hmc leapfrog", "mixture")}
    | {("25 modes", kernel): OF_MODES for kernel in ("mala", "hmc", "hmc leapfrog", "chees")}
    | {("funnel", kernel): OF_NECK for kernel in ("mala", "hmc", "hmc leapfrog")}
    | {("logistic regression", kernel): OF_DIMENSION for kernel in ("pcn", "independence", "elliptical")}
    | {("logistic regression", kernel): OF_DIFFUSION for kernel in ("mala", "tempered")}
)

PAIRS = [
    pytest.param(target, kernel, id=f"{kernel} on {target}", marks=[pytest.mark.slow] if known.is_slow else [])
    for target, known in TARGETS.items()
    for kernel in KERNELS
]


@functools.cache
def built(target: str) -> targets.Target:
    return TARGETS[target].build()


def walk(
    kernel: Kernel, generator: torch.Generator, position: Tensor, params: KernelParams, num_steps: int
) -> KernelState:
    state = kernel.init(position)
    for _ in range(num_steps):
        state, _ = kernel.step(generator, state, params)
    return state


def watched(target: targets.Target) -> Tensor:
    """Pick coordinates to judge: all, or 32 evenly spaced ones with the first and the last."""
    dim = len(target.mean)
    return torch.linspace(0, dim - 1, min(dim, NUM_WATCHED)).round().long()


def judged(name: str, kernel: Kernel, params: Callable[[Tensor], KernelParams], thin: int) -> list[QuantitySummary]:
    """Run a kernel from over-dispersed starts, and judge coordinates first, then their squared deviations."""
    known, target = TARGETS[name], built(name)
    columns = watched(target)

    def store(state: KernelState) -> dict[str, Tensor]:
        q = state.position[:, columns]
        return {"q": q, "square": (q - target.mean[columns]).square()}

    shape = (known.num_chains, len(target.mean))
    normal = torch.randn(shape, generator=stream(0, "start"), dtype=target.mean.dtype)
    start = target.mean + OVER_DISPERSION * target.variance.sqrt() * normal
    burnt_in = walk(kernel, stream(0, "burn-in", kernel.name), start, params(start), NUM_BURN_IN).position
    chains = run_chains(
        kernel,
        stream(0, "exactness", kernel.name),
        burnt_in,
        params(start),
        num_draws=known.num_draws,
        num_warmup=known.num_warmup,
        thin=thin,
        functionals=store,
    )
    return diagnostics.summarize(to_inference_data(chains))


def worst_z(name: str, rows: list[QuantitySummary]) -> float:
    """Compare means and variances with the truth, in Monte Carlo standard errors of both."""
    target, columns = built(name), watched(built(name))
    truth = torch.cat([target.mean[columns], target.variance[columns]])
    error = torch.zeros_like(truth)
    if name == "logistic regression":
        moments = reference_moments.stored()
        error = torch.cat([moments.mean_error[columns], moments.variance_error[columns]])
    found = torch.tensor([[row.mean, row.mcse_mean] for row in rows], dtype=truth.dtype)
    return float(((found[:, 0] - truth) / torch.hypot(found[:, 1], error)).abs().max())


@pytest.mark.parametrize(("target", "kernel"), PAIRS)
def test_the_moments_are_right_or_the_diagnosis_says_that_they_are_not_known(target: str, kernel: str) -> None:
    config = KERNELS[kernel]
    build = registry.build_kernel(config, built(target).potential)
    thin = TARGETS[target].thin[kernel]
    rows = judged(target, build, lambda start: registry.start_params(config, start), thin)
    is_converged = all(diagnostics.is_converged(row) for row in rows)
    if (target, kernel) in FLAGGED:
        assert not is_converged
        return
    assert is_converged, max(row.r_hat for row in rows)
    assert worst_z(target, rows) < MAX_Z
    # Errors small enough for the line above to say something.
    assert max(row.mcse_mean / row.sd for row in rows) < 0.05


def test_every_flag_belongs_to_a_pair_and_every_pair_has_a_budget() -> None:
    assert set(FLAGGED) <= {(target, kernel) for target in TARGETS for kernel in KERNELS}
    assert all(set(known.thin) == set(KERNELS) for known in TARGETS.values())


def test_a_biased_kernel_fails_what_exact_ones_pass() -> None:
    name = "condition 4, D = 3"
    biased = langevin.build_langevin(built(name).potential)
    rows = judged(name, biased, lambda start: init_params(start, 0.6), 4)
    assert all(diagnostics.is_converged(row) for row in rows)  # to the wrong distribution
    assert worst_z(name, rows) > 2 * MAX_Z


@pytest.mark.slow
def test_proposals_that_do_not_cover_the_tails_can_look_converged_and_be_wrong() -> None:
    # Why the banana above is the narrow one. On a wide one exp(-Phi) has no bound along its arms, where N(0, I) hardly
    # ever proposes, and the diagnosis cannot see what no chain has seen. Of seeds 4 to 7 two are flagged, and two are 9
    # and 16 standard errors off without a flag.
    target = targets.banana(scale=1.0, curvature=0.7)
    kernel = registry.build_kernel(KernelConfig("independence"), target.potential)
    num_misled = 0
    for seed in (4, 5, 6, 7):
        start = torch.randn(32, 2, generator=stream(seed, "start"), dtype=torch.float64)
        chains = run_chains(
            kernel,
            stream(seed, "tails"),
            start,
            init_params(start, 1.0),
            num_draws=500,
            num_warmup=100,
            thin=10,
            functionals=lambda state: {"square": state.position.square()},
        )
        rows = diagnostics.summarize(to_inference_data(chains))
        z = abs(rows[1].mean - float(target.variance[1])) / rows[1].mcse_mean
        num_misled += all(diagnostics.is_converged(row) for row in rows) and z > MAX_Z
    assert num_misled >= 2


# --- started from exact draws a kernel stays exact, whether it mixes or not


# The step with which a kernel accepts some proposals and refuses some. All replicas of a tempered kernel would have to
# be exact at their own levels (tests/inference/kernels/test_tempered.py), and nobody has exact draws of the regression.
STEP_SIZES = {
    "condition 100, D = 5": 0.15,
    "condition 100, D = 20": 0.13,
    "condition 100, D = 1000": 0.06,
    "banana": 0.4,
    "25 modes": 0.08,
    "funnel": 0.3,
}
NUM_EXACT_DRAWS, MAX_EXACT_VALUES, NUM_STEPS = 2000, 500_000, 10


def z_after_steps(target: targets.Target, kernel: Kernel, params: KernelParams, num_steps: int) -> float:
    """Start independent chains from exact draws; after some steps compare means and variances, in standard errors."""
    num_draws = min(NUM_EXACT_DRAWS, MAX_EXACT_VALUES // len(target.mean))
    start = target.exact(stream(1, "exact"), num_draws)
    deviation = walk(kernel, stream(1, "stay", kernel.name), start, params, num_steps).position - target.mean
    values, truth = torch.cat([deviation, deviation.square()], 1), torch.cat([0 * target.mean, target.variance])
    return float(((values.mean(0) - truth) / (values.std(0) / math.sqrt(len(values)))).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "tempered"])
@pytest.mark.parametrize("target", STEP_SIZES)
def test_started_from_exact_draws_it_stays_exact(target: str, kernel: str) -> None:
    known, config = built(target), KERNELS[kernel]
    params = registry.start_params(config, known.mean.unsqueeze(0))
    params = params._replace(step_size=known.mean.new_tensor(STEP_SIZES[target]))
    assert z_after_steps(known, registry.build_kernel(config, known.potential), params, NUM_STEPS) < MAX_Z


# On the others its bias is in directions that no coordinate shows, or as small as the error.
@pytest.mark.slow
@pytest.mark.parametrize("target", ["condition 100, D = 5", "25 modes", "funnel"])
def test_the_biased_kernel_does_not(target: str) -> None:
    known = built(target)
    params = init_params(known.mean.unsqueeze(0), STEP_SIZES[target])
    assert z_after_steps(known, langevin.build_langevin(known.potential), params, 5 * NUM_STEPS) > MAX_Z


# --- the bias of the unadjusted kernel


def variance_after_steps(potential: Potential, start: Tensor, h: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Take Euler steps; return the chains' variances about zero and their standard errors, ``(D,)`` each."""
    kernel = langevin.build_langevin(potential)
    squares = walk(kernel, stream(2, "euler"), start, init_params(start, h), num_steps).position.square()
    return squares.mean(0), squares.std(0) / math.sqrt(len(start))


@pytest.mark.parametrize("h", [0.1, 0.19])
def test_the_bias_of_unadjusted_langevin_is_its_closed_form(h: float) -> None:
    # On N(0, 1 / precision) Euler's step keeps the variance 1 / precision / (1 - h^2 precision / 4), for
    # q' = (1 - h^2 precision / 2) q + h n.
    target = targets.conditioned_gaussian(20)
    biased = target.variance / (1 - h**2 / target.variance / 4)
    noise = torch.randn(5000, 20, generator=stream(2, "start"), dtype=torch.float64)
    # The law is invariant, in every direction; and one direction after another comes to it from exact draws: those
    # that have forgotten their start, by (1 - h^2 precision / 2)^(2 steps), to below 0.1 % of the variance.
    found, error = variance_after_steps(target.potential, biased.sqrt() * noise, h, 20)
    assert ((found - biased).abs() < MAX_Z * error).all()
    found, error = variance_after_steps(target.potential, target.variance.sqrt() * noise, h, 100)
    has_forgotten = (1 - h**2 / target.variance / 2).abs() ** 200 < 1e-3
    assert has_forgotten.sum() >= 10
    assert ((found - biased).abs() < MAX_Z * error)[has_forgotten].all()
    # The exact variance is not what it keeps.
    assert ((found - target.variance).abs() > MAX_Z * error).sum() >= 5


@pytest.mark.parametrize("h", [0.5, 1.0])
def test_on_a_standard_normal_it_is_the_known_one(h: float) -> None:
    target = targets.reference(4)
    start = target.exact(stream(3, "start"), 5000)
    found, error = variance_after_steps(target.potential, start, h, 60)
    assert ((found - 1 / (1 - h**2 / 4)).abs() < MAX_Z * error).all()
    assert ((found - 1).abs() > MAX_Z * error).any() or h < 1
