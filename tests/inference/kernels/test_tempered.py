"""Replica exchange: every level's law, swaps and their bookkeeping, the spacing of levels, and the modes it joins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import ladder, langevin, registry, targets, tempered
from ppl_vaebm.inference.kernels.adaptation import MIN_STEP_SIZE, STEP_SIZE_GAIN, warm_up, with_step_size
from ppl_vaebm.inference.kernels.base import (
    Counts,
    KernelParams,
    KernelState,
    Ladder,
    Replicas,
    init_params,
    value_and_grad,
)
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.rng import stream
from tests.inference.level_draws import level_draws

MAX_Z = 5.0
MODES = targets.two_modes(distance=1.5, scale=0.3)
LADDER = Ladder(
    torch.tensor([0.0, 0.1, 0.35, 1.0], dtype=torch.float64),
    torch.tensor([math.pi / 2, 1.2, 0.7, 0.4], dtype=torch.float64),
)


def params_with(ladder: Ladder, dim: int = 1) -> KernelParams:
    return init_params(torch.zeros(1, dim, dtype=torch.float64), float(ladder.step_sizes[-1]))._replace(ladder=ladder)


def replicas_of(state: KernelState) -> Replicas:
    assert state.replicas is not None
    return state.replicas


def level_z(num_chains: int = 4000, num_sweeps: int = 60) -> Tensor:
    """Compare each level's share in the middle and mean square with exact draws, in standard errors."""
    kernel = tempered.build(MODES.potential, num_levels=4)
    start = torch.randn(num_chains, 1, generator=stream(0, "start"), dtype=torch.float64)
    state, generator = kernel.init(start), stream(1, "levels")
    for _ in range(num_sweeps):
        state, _ = kernel.step(generator, state, params_with(LADDER))
    exact = level_draws(MODES, LADDER.inverse_temperatures, 200_000, stream(2, "exact"))

    def functionals(position: Tensor) -> Tensor:
        return torch.cat([(position.abs() < 1).double(), position.square(), position], -1)

    ours, truth = functionals(tempered.all_positions(state)), functionals(exact)
    variances = ours.var(0) / len(ours) + truth.var(0) / len(truth)
    return (ours.mean(0) - truth.mean(0)) / variances.sqrt()


def test_every_level_has_its_own_law() -> None:
    z = level_z()
    assert z.shape == (4, 3) and z.abs().max() < MAX_Z


def test_swaps_that_are_never_refused_spoil_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(energies: Tensor, b: Tensor, lower: Tensor) -> Tensor:
        return torch.ones(len(energies), len(lower), dtype=torch.float64)

    monkeypatch.setattr(tempered, "swap_probability", always)
    assert level_z().abs().max() > 2 * MAX_Z


def test_exactness_needs_exact_replicas_too() -> None:
    num_chains = 20_000
    kernel = tempered.build(MODES.potential, num_levels=4)
    start = kernel.init(MODES.exact(stream(3, "start"), num_chains))
    hot = level_draws(MODES, LADDER.inverse_temperatures[:-1], num_chains, stream(4, "replicas"))
    truth = value_and_grad(MODES.potential, MODES.exact(stream(6, "energy"), 400_000))[0]
    z = []
    for state in (tempered.with_replicas(MODES.potential, start, hot), start):
        new, _ = kernel.step(stream(5, "sweep"), state, params_with(LADDER))
        variance = new.potential.var() / num_chains + truth.var() / len(truth)
        z.append(float((new.potential.mean() - truth.mean()) / variance.sqrt()))
    assert abs(z[0]) < MAX_Z < abs(z[1])


def test_the_hottest_level_is_drawn_anew_at_every_sweep() -> None:
    kernel = tempered.build(lambda q: 1e4 + 3 * q[:, 0], num_levels=2, num_steps=3)
    ladder = Ladder(
        torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([math.pi / 6, 1e-6], dtype=torch.float64)
    )
    state = kernel.init(torch.full((20_000, 2), 3.0, dtype=torch.float64))
    # Pairs from odd levels up are none here: in the second sweep nothing swaps, and the first level is what was drawn.
    state = state._replace(replicas=replicas_of(state)._replace(counts=one_sweep_later(replicas_of(state).counts)))
    state, _ = kernel.step(stream(7, "hottest"), state, params_with(ladder, 2))
    hot = replicas_of(state).position[:, 0]
    assert hot.mean(0).abs().max() < MAX_Z / math.sqrt(20_000)
    assert (hot.square().mean(0) - 1).abs().max() < MAX_Z * math.sqrt(2 / 20_000)
    assert (state.position - 3).abs().max() < 1e-3


def one_sweep_later(counts: Counts) -> Counts:
    return counts._replace(num_sweeps=counts.num_sweeps + 1)


def test_swap_probabilities_are_the_ratio_of_the_densities() -> None:
    b = LADDER.inverse_temperatures
    energies = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.0, 5.0, 1.0, 2.0]])
    rate = tempered.swap_probability(energies, b, torch.tensor([0, 2]))
    assert rate.dtype == torch.float64
    for row, chain in enumerate(energies.tolist()):
        for column, lower in enumerate((0, 2)):
            hot, cold = float(b[lower]), float(b[lower + 1])
            before = -hot * chain[lower] - cold * chain[lower + 1]
            after = -hot * chain[lower + 1] - cold * chain[lower]
            assert float(rate[row, column]) == pytest.approx(min(1.0, math.exp(after - before)))


def test_differences_of_large_float32_energies_are_taken_in_float64() -> None:
    energies, b = torch.tensor([[1e7 + 1, 1e7]], dtype=torch.float32), torch.tensor([0.3, 0.7], dtype=torch.float64)
    rate = tempered.swap_probability(energies, b, torch.tensor([0]))
    assert float(rate) == pytest.approx(math.exp(-0.4), rel=1e-6)
    before, after = (energies * b.float()).sum(), (energies.flip(1) * b.float()).sum()
    assert abs(float((before - after).exp()) - math.exp(-0.4)) > 0.1


@pytest.mark.parametrize(
    ("hot", "cold", "expected"),
    [
        (math.nan, 1.0, 0.0),
        (math.inf, 1.0, 0.0),
        (-math.inf, 1.0, 0.0),
        (1.0, math.nan, 0.0),
        (1.0, math.inf, 1.0),  # a start of no density takes any that has some
        (1.0, -math.inf, 0.0),
        (math.inf, math.inf, 0.0),
    ],
)
def test_an_energy_that_is_not_finite_never_goes_to_a_colder_level(hot: float, cold: float, expected: float) -> None:
    energies = torch.tensor([[hot, cold]], dtype=torch.float64)
    assert float(tempered.swap_probability(energies, torch.tensor([0.0, 1.0]).double(), torch.tensor([0]))) == expected


def test_a_start_without_density_is_left() -> None:
    def walled(position: Tensor) -> Tensor:
        return torch.where(position[:, 0] > 2, torch.inf, MODES.potential(position))

    kernel = tempered.build(walled, num_levels=4)
    state, generator = kernel.init(torch.full((50, 1), 3.0, dtype=torch.float64)), stream(8, "wall")
    num_divergent = 0
    for _ in range(30):
        state, info = kernel.step(generator, state, params_with(LADDER))
        num_divergent += int(info.is_divergent.sum())
    assert (tempered.all_positions(state) < 2).all() and state.potential.isfinite().all()
    assert num_divergent > 50


# --- bookkeeping


def test_swaps_alternate_between_even_and_odd_neighbours_and_are_followed() -> None:
    # Where Phi = 0 no swap is refused. A replica climbs a level a sweep, waits one sweep at each end, and is back after
    # two sweeps a level; of the four replicas, two have been at b = 0 since they left b = 1 by then.
    kernel = tempered.build(targets.reference(1).potential, num_levels=4)
    state, generator = kernel.init(torch.zeros(3, 1, dtype=torch.float64)), stream(9, "climb")
    labels = []
    for _ in range(8):
        state, _ = kernel.step(generator, state, params_with(LADDER))
        labels.append(replicas_of(state).counts.label[0].tolist())
    assert labels[:4] == [[1, 0, 3, 2], [1, 3, 0, 2], [3, 1, 2, 0], [3, 2, 1, 0]]
    assert labels[7] == [0, 1, 2, 3]
    counts = replicas_of(state).counts
    assert counts.num_sweeps == 8 and counts.num_swaps.tolist() == [4, 4, 4]
    assert counts.num_round_trips.tolist() == [1, 1, 1]


def test_without_refusals_a_chain_makes_a_round_trip_every_two_sweeps() -> None:
    kernel = tempered.build(targets.reference(1).potential, num_levels=5)
    start = torch.zeros(2, 1, dtype=torch.float64)
    chains = run_chains(
        kernel,
        stream(10, "trips"),
        start,
        init_params(start, 0.5),
        num_draws=1000,
        functionals=lambda state: {"q": state.position},
    )
    # Each of L replicas needs 2 L sweeps, less the first way up, which does not begin at b = 1.
    assert chains.attrs["round_trips_per_1000_sweeps"] == pytest.approx(500, abs=5)
    assert chains.attrs["num_round_trips"] == pytest.approx(1000, abs=10)
    assert chains.attrs["swap_rates"] == [1.0] * 4 and chains.attrs["communication_barrier"] == 0
    assert chains.num_evals == 2 * 1000 * 5


def test_a_round_trip_begins_and_ends_at_the_target() -> None:
    counts = ladder.new_counts(1, 2, torch.device("cpu"))
    pair, rate = torch.tensor([0]), torch.ones(1, 1, dtype=torch.float64)
    swap, stay = torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
    trips = []
    for order in (swap, stay, swap, swap, swap, stay):
        counts = ladder.add_swaps(counts, pair, rate, order)
        trips.append(int(counts.num_round_trips))
    # Replica 1 begins cold: the third and the fifth order bring it back from b = 0. Replica 0 begins hot: its first way
    # up is half a round trip, and the fourth order ends its first whole one.
    assert trips == [0, 0, 1, 2, 3, 3]
    assert counts.num_sweeps == 6 and counts.num_swaps.tolist() == [6]


def test_evaluations_are_the_rows_that_the_potential_saw() -> None:
    rows, calls = 0, 0

    def counted(position: Tensor) -> Tensor:
        nonlocal rows, calls
        rows, calls = rows + len(position), calls + 1
        return MODES.potential(position)

    config = KernelConfig("tempered", num_levels=3, num_steps=2)
    start = torch.zeros(5, 1, dtype=torch.float64)
    chains = run_chains(
        registry.build_kernel(config, counted),
        stream(11, "count"),
        start,
        registry.start_params(config, start),
        num_draws=7,
        num_warmup=9,
        functionals=lambda state: {"q": state.position},
    )
    assert (calls, rows) == (1 + 2 * 16, 5 + 2 * 16 * 15)  # the start is one call of five rows, and not counted
    assert (chains.num_evals, chains.warmup_evals) == (2 * 7 * 15, 2 * 9 * 15)


# --- the ladder


def rates_between(levels: Tensor) -> Tensor:
    """Return swap rates of a barrier that rises as the square root of b, as by 2 in all."""
    return 1 - 2 * levels.sqrt().diff()


def test_levels_are_spaced_until_neighbours_share_the_barrier() -> None:
    params = init_params(torch.zeros(1, 1, dtype=torch.float64), 0.3)
    spaced = ladder.start_ladder(6, params, 1)
    for _ in range(12):
        spaced = ladder.respace(spaced, rates_between(spaced.inverse_temperatures))
        assert (spaced.inverse_temperatures[0], spaced.inverse_temperatures[-1]) == (0, 1)
    expected = torch.linspace(0, 1, 6, dtype=torch.float64).square()
    torch.testing.assert_close(spaced.inverse_temperatures, expected, rtol=0.01, atol=1e-4)


def test_even_rates_move_no_level_and_neither_do_perfect_ones() -> None:
    for rates in (torch.full((3,), 0.7), torch.ones(3)):
        again = ladder.respace(LADDER, rates.double())
        torch.testing.assert_close(again.inverse_temperatures, LADDER.inverse_temperatures)
        torch.testing.assert_close(again.step_sizes, LADDER.step_sizes)


def test_moved_levels_take_steps_from_between_those_of_their_neighbours() -> None:
    moved = ladder.respace(LADDER, torch.tensor([0.1, 0.8, 0.9], dtype=torch.float64))
    b, h = moved.inverse_temperatures.tolist(), moved.step_sizes.tolist()
    # The barrier, 0.9 + 0.2 + 0.1, is shared by 0.4 each: two levels come to lie below the old first one.
    assert b[1:3] == pytest.approx([0.1 * 4 / 9, 0.1 * 8 / 9])
    assert h == pytest.approx([math.pi / 2, 1.2, 1.2, 0.4])


def counts_of(swaps: list[float], moves: list[float]) -> Counts:
    counts = ladder.new_counts(1, 4, torch.device("cpu"))
    rates = torch.tensor([swaps], dtype=torch.float64)
    sums = 2 * torch.tensor(moves, dtype=torch.float64)
    return counts._replace(
        num_sweeps=2, swap_rate_sums=rates, num_swaps=torch.ones(3, dtype=torch.int64), move_rate_sums=sums
    )


def test_a_ladder_follows_its_rates() -> None:
    still = ladder.follow_rates(LADDER, counts_of([0.7] * 3, [1.0, 0.75, 0.75, 0.75]), 0.75)
    torch.testing.assert_close(still, LADDER)
    moved = ladder.follow_rates(LADDER, counts_of([0.1, 0.9, 0.9], [1.0, 0.95, 0.75, 0.35]), 0.75)
    gains = (moved.step_sizes / LADDER.step_sizes).log() / STEP_SIZE_GAIN
    torch.testing.assert_close(gains, torch.tensor([0.0, 0.2, 0.0, -0.4], dtype=torch.float64), atol=1e-9, rtol=0)
    whole = ladder.respace(LADDER, torch.tensor([0.1, 0.9, 0.9], dtype=torch.float64)).inverse_temperatures
    way = (moved.inverse_temperatures - LADDER.inverse_temperatures)[1:-1]
    torch.testing.assert_close(way, ladder.SPACING_GAIN * (whole - LADDER.inverse_temperatures)[1:-1])
    assert (way < 0).all()  # most is rejected near b = 0, so that is where they go


def test_sweeps_count_what_every_level_accepts() -> None:
    kernel = tempered.build(MODES.potential, num_levels=4)
    state, generator = kernel.init(torch.zeros(50, 1, dtype=torch.float64)), stream(8, "counts")
    for _ in range(3):
        state, info = kernel.step(generator, state, params_with(LADDER))
    rates = replicas_of(state).counts.move_rate_sums / 3
    assert rates.shape == (4,) and float(rates[0]) == pytest.approx(1.0)  # b = 0 has nothing to refuse
    assert 0 < float(rates[-1]) < 1 and bool(info.acceptance_rate.mean() < 1)


def test_another_step_size_scales_the_ladder_with_it() -> None:
    scaled = with_step_size(params_with(LADDER), 0.6)
    assert scaled.ladder is not None and float(scaled.step_size) == pytest.approx(0.6)
    assert scaled.ladder.step_sizes.tolist() == pytest.approx([math.pi / 2, math.pi / 2, 1.05, 0.6])
    assert torch.equal(scaled.ladder.inverse_temperatures, LADDER.inverse_temperatures)
    assert LADDER.step_sizes[-1] == 0.4


def test_warm_up_evens_the_swaps_tunes_every_level_and_starts_the_counts_anew() -> None:
    config = KernelConfig("tempered", num_levels=5)
    kernel = registry.build_kernel(config, MODES.potential)
    start = torch.randn(100, 1, generator=stream(12, "start"), dtype=torch.float64)
    begun = registry.start_params(config, start)
    state, params, num_evals = warm_up(kernel, stream(13, "warm-up"), kernel.init(start), begun, 300)
    assert num_evals == 300 * 100 * 5
    assert replicas_of(state).counts.num_sweeps == 0 and not replicas_of(state).counts.num_round_trips.any()
    assert params.ladder is not None and torch.equal(params.step_size, params.ladder.step_sizes[-1])
    rates, generator = [], stream(14, "draws")
    for _ in range(200):
        state, info = kernel.step(generator, state, params)
        rates.append(float(info.acceptance_rate.mean()))
    assert sum(rates) / len(rates) == pytest.approx(tempered.TEMPERED_TARGET_ACCEPTANCE, abs=0.05)
    swaps = ladder.swap_rates(replicas_of(state).counts)
    assert swaps.max() - swaps.min() < 0.08
    assert kernel.report is not None
    told = kernel.report(state, params)
    assert told["swap_rates"] == pytest.approx(swaps.tolist())
    assert told["inverse_temperatures"] == params.ladder.inverse_temperatures.tolist()
    assert told["communication_barrier"] == pytest.approx(float((1 - swaps).sum()))
    # The ladder that it started from is nothing of the kind.
    state = kernel.init(state.position)
    for _ in range(200):
        state, _ = kernel.step(generator, state, begun)
    uneven = ladder.swap_rates(replicas_of(state).counts)
    assert uneven.max() - uneven.min() > 0.2


@pytest.mark.parametrize("num_sweeps", [1, 2, 5])
def test_a_short_warm_up_leaves_a_ladder_that_runs(num_sweeps: int) -> None:
    kernel = tempered.build(MODES.potential, num_levels=6)
    start = torch.zeros(1, 1, dtype=torch.float64)
    state, params, _ = warm_up(kernel, stream(15, "short"), kernel.init(start), init_params(start, 0.3), num_sweeps)
    assert params.ladder is not None and (params.ladder.inverse_temperatures.diff() > 0).all()
    state, _ = kernel.step(stream(16, "short"), state, params)
    assert state.position.isfinite().all()


def test_states_and_options_that_do_not_fit_are_refused() -> None:
    start = torch.zeros(2, 1, dtype=torch.float64)
    kernel = tempered.build(MODES.potential, num_levels=3)
    foreign = langevin.build_mala(MODES.potential).init(start)
    with pytest.raises(ValueError, match="needs replicas: start from its own init"):
        kernel.step(stream(0, "foreign"), foreign, init_params(start, 0.1))
    with pytest.raises(ValueError, match="expected 3, got 4"):
        kernel.step(stream(0, "long"), kernel.init(start), params_with(LADDER))
    with pytest.raises(ValueError, match="num_levels must be at least 2, got 1"):
        tempered.build(MODES.potential, num_levels=1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        tempered.build(MODES.potential, num_steps=0)


# --- what it is for


def run_named(config: KernelConfig, target: targets.Target, num_chains: int, num_warmup: int, num_evals: int) -> Chains:
    dim = len(target.mean)
    start = torch.randn(num_chains, dim, generator=stream(17, "start"), dtype=torch.float64)
    indices = target.mode
    assert indices is not None
    return run_chains(
        registry.build_kernel(config, target.potential),
        stream(18, config.name),
        start,
        registry.start_params(config, start),
        num_draws=num_evals,
        num_warmup=num_warmup,
        max_evals=num_evals,
        functionals=lambda state: {
            "energy": state.potential,
            "q": state.position,
            "square": state.position.square(),
            "row": torch.div(indices(state.position), 5, rounding_mode="floor").double(),
            "column": (indices(state.position) % 5).double(),
        },
    )


def test_tempered_joins_two_modes_that_mala_does_not() -> None:
    target = targets.two_modes()
    r_hats = {}
    for name in ("tempered", "mala"):
        config, num_draws = KernelConfig(name, num_levels=4), 1_200 if name == "tempered" else 200
        chains = run_named(config, target, 32, 200, num_draws)
        rows = {row.name: row for row in diagnostics.summarize(to_inference_data(chains))}
        r_hats[name] = rows["q[0]"].r_hat
        if name == "tempered":
            assert abs(rows["q[0]"].mean) < MAX_Z * rows["q[0]"].mcse_mean
            assert abs(rows["square[0]"].mean - 4.04) < MAX_Z * rows["square[0]"].mcse_mean
            assert rows["q[0]"].mcse_mean < 0.1 and rows["square[0]"].mcse_mean < 0.02
            assert chains.attrs["num_round_trips"] > 500  # type: ignore[operator]
    assert r_hats["tempered"] < 1.03 < 1.2 < r_hats["mala"]


@pytest.mark.slow
def test_on_25_modes_it_converges_where_local_kernels_do_not() -> None:
    target = targets.grid_modes()
    global_kernels = [KernelConfig("tempered", num_levels=4), KernelConfig("mixture", members=("independence", "mala"))]
    r_hats = {}
    for config in (*global_kernels, KernelConfig("mala"), KernelConfig("hmc"), KernelConfig("chees")):
        chains = run_named(config, target, 16, 300, 12_000)
        rows = diagnostics.summarize(to_inference_data(chains))
        r_hats[config.name] = max(row.r_hat for row in rows if row.name in ("energy", "row", "column"))
        if config in global_kernels:
            truth = {"row": 2.0, "column": 2.0, "q[0]": 0.0, "q[1]": 0.0}
            assert all(abs(r.mean - truth[r.name]) < MAX_Z * r.mcse_mean for r in rows if r.name in truth)
    assert max(r_hats["tempered"], r_hats["mixture"]) <= 1.01
    assert min(r_hats["mala"], r_hats["hmc"], r_hats["chees"]) > 1.05


def test_steps_of_a_ladder_that_follows_its_rates_stay_positive() -> None:
    followed = ladder.start_ladder(3, init_params(torch.zeros(1, 2), 0.1), 1)
    counts = ladder.new_counts(4, 3, torch.device("cpu"))
    counts = counts._replace(num_sweeps=2, num_swaps=counts.num_swaps + 1)  # nothing was accepted in two sweeps
    for _ in range(1_000):
        followed = ladder.follow_rates(followed, counts, 0.75)
    assert followed.step_sizes[1:].tolist() == pytest.approx([MIN_STEP_SIZE] * 2)
