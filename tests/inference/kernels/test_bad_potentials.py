"""Energies that go wrong, through whole runs of every kernel: refused, flagged, counted; no chain goes there."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import adaptation, registry, targets
from ppl_vaebm.inference.kernels.base import KernelState, Potential
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.rng import stream

CONFIGS = {name: KernelConfig(name) for name in get_args(KernelName)} | {
    "mala leapfrog": KernelConfig("mala", integrator="leapfrog"),
    "hmc leapfrog": KernelConfig("hmc", integrator="leapfrog"),
    "chees leapfrog": KernelConfig("chees", integrator="leapfrog"),
}
EVERY = sorted(CONFIGS)
# Kernels for which a step can be too long: the others move by slices, at b = 0 or from N(0, I) whatever it is.
WITH_STEP = ("mala", "mala leapfrog", "hmc", "hmc leapfrog", "chees", "chees leapfrog", "pcn")
DIM, NUM_CHAINS = 3, 16
BAD = (math.nan, math.inf, -math.inf)
LIMIT = 1.0
MAX_Z = 5.0

each_kernel = pytest.mark.parametrize("name", EVERY)
each_bad = pytest.mark.parametrize("bad", BAD)


def store(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "phi": state.potential}


def run(
    name: str,
    potential: Potential,
    start: Tensor,
    num_draws: int,
    *,
    num_warmup: int = 0,
    thin: int = 1,
    step_size: float | None = None,
) -> Chains:
    config = CONFIGS[name]
    params = registry.start_params(config, start)
    if step_size is not None:
        params = params._replace(step_size=torch.full_like(params.step_size, step_size))
    kernel = registry.build_kernel(config, potential)
    generator = stream(0, "bad", name)
    return run_chains(
        kernel, generator, start, params, num_draws=num_draws, num_warmup=num_warmup, thin=thin, functionals=store
    )


def bad_but_at(places: Tensor, bad: float) -> Potential:
    """Make a Phi that is zero at given positions and bad everywhere else."""

    def potential(position: Tensor) -> Tensor:
        is_place = (position.unsqueeze(1) == places).all(-1).any(1)
        return torch.where(is_place, position.sum(-1) * 0, bad)

    return potential


def bad_beyond_limit(position: Tensor) -> Tensor:
    """Phi that is zero where the first coordinate is below the limit; above it every kind of bad has its strip."""
    strip = torch.bucketize(position[:, 1].contiguous(), position.new_tensor([-0.5, 0.5]))
    return torch.where(position[:, 0] < LIMIT, position.sum(-1) * 0, position.new_tensor(BAD)[strip])


def normal(num_chains: int = NUM_CHAINS) -> Tensor:
    return torch.randn(num_chains, DIM, generator=stream(1, "start"), dtype=torch.float64)


@each_bad
@each_kernel
def test_a_wholly_bad_energy_holds_every_chain_where_it_is_and_every_draw_is_counted(name: str, bad: float) -> None:
    start = normal()
    chains = run(name, bad_but_at(start, bad), start, 6)
    assert torch.equal(chains.draws["q"], start.unsqueeze(1).expand(-1, 6, -1))
    assert (chains.draws["phi"] == 0).all()
    assert chains.stats["diverging"].all()
    assert chains.stats["lp"].isfinite().all()
    if name != "elliptical":  # its bracket shrinks until the point that it takes rounds to the chain's own
        assert (chains.stats["acceptance_rate"] == 0).all()
    idata = to_inference_data(chains)
    assert diagnostics.num_divergent(idata) == chains.stats["diverging"].numel()
    assert not any(diagnostics.is_converged(summary) for summary in diagnostics.summarize(idata))


@each_kernel
def test_a_partly_bad_energy_is_a_wall_that_exact_kernels_sample_in_front_of(name: str) -> None:
    start = normal(64)
    start[:, 0] = -start[:, 0].abs()
    step_size = 0.5 if name == "langevin" else None  # its default is too short to come to the wall
    chains = run(name, bad_beyond_limit, start, 100, num_warmup=60, thin=2, step_size=step_size)
    first = chains.draws["q"][..., 0]
    assert chains.draws["q"].isfinite().all() and (chains.draws["phi"] == 0).all()
    assert (first < LIMIT).all()
    assert 0 < chains.stats["diverging"].sum() < chains.stats["diverging"].numel()
    # N(0, 1) cut off at the limit has mean -density / mass.
    truth = -math.exp(-0.5 * LIMIT**2) / math.sqrt(2 * math.pi) / (0.5 * (1 + math.erf(LIMIT / math.sqrt(2))))
    chains.draws.clear()
    chains.draws["first"] = first
    (summary,) = diagnostics.summarize(to_inference_data(chains))
    assert summary.mcse_mean < 0.1
    if name == "langevin":
        return  # biased
    assert abs(summary.mean - truth) < MAX_Z * summary.mcse_mean
    assert abs(summary.mean) > MAX_Z * summary.mcse_mean  # the mean without a wall


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["position", "phi"])
@each_kernel
def test_a_start_that_is_not_finite_is_flagged_and_stays_in_its_chain(name: str, where: str, bad: float) -> None:
    start, bad_row = normal(), 5
    clean = targets.ar1_gaussian(DIM).potential
    potential: Potential = clean
    if where == "position":
        start[bad_row] = bad
    else:
        place = start[bad_row : bad_row + 1]
        potential = lambda position: torch.where((position == place).all(-1), bad, clean(position))  # noqa: E731
    chains = run(name, potential, start, 5)
    others = torch.arange(NUM_CHAINS) != bad_row
    assert all(values[others].isfinite().all() for values in chains.draws.values())
    assert not chains.stats["diverging"][others].any()
    # Either it stays, and is counted all along; or it gets away, as a fresh draw, a swap, or a slice below an infinite
    # Phi may, and then it is where everything is finite.
    last = {key: values[bad_row, -1] for key, values in chains.draws.items()}
    if where == "position" or torch.equal(last["q"], start[bad_row]):
        assert chains.stats["diverging"][bad_row].all()
    else:
        assert last["q"].isfinite().all() and last["phi"].isfinite()


@pytest.mark.parametrize("name", ["hmc", "pcn", "elliptical"])
def test_a_place_that_is_not_finite_is_refused_even_where_phi_does_not_look_at_it(name: str) -> None:
    start = normal()
    start[0] = math.nan
    chains = run(name, targets.reference(DIM).potential, start, 3)
    assert chains.stats["diverging"][0].all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda position: position.square(),
        lambda position: position.sum(),
        lambda position: position.sum(-1, keepdim=True),
        lambda position: position.sum(-1)[:-1],
    ],
    ids=["per coordinate", "summed over chains", "extra axis", "a chain is missing"],
)
@each_kernel
def test_a_wrong_shape_is_one_clear_sentence(name: str, wrong: Potential) -> None:
    with pytest.raises(ValueError, match=rf"one number per chain, shape \({NUM_CHAINS},\)") as caught:
        run(name, wrong, normal(), 3)
    message = str(caught.value)
    assert f"returned shape {tuple(wrong(normal()).shape)} for positions ({NUM_CHAINS}, {DIM})" in message
    assert "sum over the event dimensions only" in message
    assert ". " not in message and "\n" not in message


@pytest.mark.parametrize("name", WITH_STEP)
def test_a_step_that_never_accepts_is_visible(name: str) -> None:
    narrow = targets.gaussian(torch.zeros(DIM, dtype=torch.float64), torch.full((DIM,), 1e-6, dtype=torch.float64))
    start = narrow.exact(stream(2, "exact"), NUM_CHAINS)
    chains = run(name, narrow.potential, start, 20, step_size=1.0)
    assert torch.equal(chains.draws["q"], start.unsqueeze(1).expand(-1, 20, -1))
    assert (chains.stats["acceptance_rate"] == 0).all()
    idata = to_inference_data(chains)
    assert not any(diagnostics.is_converged(summary) for summary in diagnostics.summarize(idata))
    if not name.startswith("chees"):  # whose trajectory of a quarter turn would be a million steps
        # With a step that suits the target none of this holds.
        assert run(name, narrow.potential, start, 20, step_size=1e-7).stats["acceptance_rate"].mean() > 0.5


def test_a_warm_up_that_accepts_nothing_ends_with_a_usable_step() -> None:
    averaging = adaptation.start_averaging(0.1)
    for _ in range(3000):
        averaging = adaptation.update_averaging(averaging, 0.0, 0.75)
    start = torch.zeros(4, DIM)
    for log_step in (averaging.log_step, averaging.log_step_average):
        chains = run("hmc", bad_but_at(start, math.nan), start, 3, step_size=math.exp(log_step))
        assert chains.stats["diverging"].all()
