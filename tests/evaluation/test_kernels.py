"""Kernels side by side: what each one is given, equal budgets cut from one run, and a line of the table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, KernelConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import Points
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation import kernel_files as comparison_files
from ppl_vaebm.evaluation import kernel_table as comparison_table
from ppl_vaebm.evaluation import kernels as comparison
from ppl_vaebm.evaluation.kernel_files import Outcome
from ppl_vaebm.evaluation.metrics.modes import mode_counts
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.inference.kernels.chains import Chains
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.reports import comparison_page
from ppl_vaebm.reports import kernels as figures_compare
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run
from tests.small_models import VARIANCE, QuadraticEnergy, linear_vae

CENTER, WIDTH = 0.3, 0.7
BUDGET = comparison.Budget(num_chains=8, num_warmup=40, num_evals=60)
NO_REFERENCE = comparison.Reference(math.nan, math.nan)
ORIGIN = Points(torch.zeros(1, 1, dtype=torch.float64))
DATA = Data("line", torch.Size([1]), ORIGIN, ORIGIN, ORIGIN)


def linear_potential(energy: Energy | None = None) -> NoisePotential:
    """Make ``N(0, VARIANCE)`` times ``exp(-(x - CENTER)^2 / (2 WIDTH^2))``."""
    return noise_potential(VAEBM(linear_vae(), energy or QuadraticEnergy(CENTER, WIDTH)))


def run_one(name: str, config: KernelConfig | None = None, budget: comparison.Budget = BUDGET, seed: int = 0) -> Chains:
    potential = linear_potential()
    start = comparison.starts(potential, budget.num_chains, seed)
    return comparison.run_kernel(name, potential, config or KernelConfig("hmc"), start, budget, seed)


def make_loaded(folder: Path, energy: Energy | None = None, data: Data = DATA) -> LoadedRun:
    potential = linear_potential(energy)
    return LoadedRun(Run.create(folder), Config(), data, potential.vaebm, potential)


class NanEnergy(Energy):
    """An energy that is nowhere a number."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return (x * torch.nan).flatten(1).sum(1)


# --- kernels -----------------------------------------------------------------------------------------


def test_a_kernel_is_tuned_to_its_own_target_and_not_to_anothers() -> None:
    def step(config: KernelConfig) -> float:
        return float(run_one("pcn", config).params.step_size)

    own = step(KernelConfig("pcn"))
    assert step(KernelConfig("mala", step_size=0.9, target_acceptance=0.9)) == own
    assert step(KernelConfig("pcn", target_acceptance=0.9)) < own


def test_both_integrators_of_hmc_have_names() -> None:
    chains = {
        name: run_one(name, config)
        for name, config in {
            "hmc": KernelConfig("hmc", step_size=0.3, num_steps=3),
            "hmc-leapfrog": KernelConfig("hmc", step_size=0.3, num_steps=3),
        }.items()
    }
    assert {name: one.kernel for name, one in chains.items()} == {name: name for name in chains}
    assert not torch.equal(chains["hmc"].stats["energy"], chains["hmc-leapfrog"].stats["energy"])
    of_run = KernelConfig("hmc", integrator="leapfrog", step_size=0.3, num_steps=3)
    budget = BUDGET._replace(num_warmup=0)
    assert float(run_one("hmc-leapfrog", of_run, budget).params.step_size) == pytest.approx(0.3)
    tuned_for_splitting = replace(of_run, integrator="splitting")
    assert float(run_one("hmc-leapfrog", tuned_for_splitting, budget).params.step_size) != pytest.approx(0.3)


def test_every_kernel_begins_at_the_same_places_and_chains_may_share_one() -> None:
    potential = linear_potential()
    assert torch.equal(comparison.starts(potential, 6, 3), comparison.starts(potential, 6, 3))
    shared = comparison.starts(potential, 6, 3, chains_per_start=3)
    assert torch.equal(shared, shared[[0, 0, 0, 3, 3, 3]]) and not torch.equal(shared[0], shared[3])
    assert not torch.equal(comparison.starts(potential, 6, 4), comparison.starts(potential, 6, 3))


def test_chains_say_whether_a_test_makes_them_exact() -> None:
    assert run_one("langevin").attrs["is_adjusted"] == 0
    assert run_one("mala").attrs["is_adjusted"] == 1


# --- what is known without chains --------------------------------------------------------------------


def test_the_mean_energy_of_exact_draws_is_known() -> None:
    found = comparison.reference(linear_potential(), DATA, seed=0)
    precision = 1 / VARIANCE + 1 / WIDTH**2
    center = CENTER / WIDTH**2 / precision
    expected = 0.5 * ((center - CENTER) ** 2 + 1 / precision) / WIDTH**2
    assert abs(found.energy - expected) < 4 * found.energy_error
    assert 0 < found.energy_error < 0.01
    assert found.modes is None and found.mode_weights is None


def test_the_weights_of_modes_are_shares_of_exact_draws() -> None:
    modes, std = torch.tensor([[-0.5], [0.5]]), 1 / 6  # within three standard deviations is within 1/2
    found = comparison.reference(linear_potential(), replace(DATA, modes=modes, mode_std=std), seed=0)
    precision = 1 / VARIANCE + 1 / WIDTH**2
    law = torch.distributions.Normal(CENTER / WIDTH**2 / precision, precision**-0.5)
    below, above = (
        float(law.cdf(torch.tensor(high)) - law.cdf(torch.tensor(low))) for low, high in ((-1.0, 0.0), (0.0, 1.0))
    )
    assert found.mode_weights is not None
    expected = below / (below + above)
    error = math.sqrt(expected * (1 - expected) / (comparison.NUM_EXACT * (below + above)))
    assert abs(found.mode_weights[0] - expected) < 4 * error
    assert found.mode_weights.sum() == pytest.approx(1)


def test_draws_are_counted_at_the_mode_that_they_are_near() -> None:
    modes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.1, 0.0], [0.0, -0.29], [0.95, 0.1], [0.5, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert mode_counts(x, modes, 0.1).tolist() == [2, 1]
    assert mode_counts(x[4:], modes, 0.1).tolist() == [0, 0]


def test_a_density_far_from_the_vae_has_no_exact_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "NUM_EXACT", 10**9)
    assert math.isnan(comparison.reference(linear_potential(), DATA, seed=0).energy)


def test_a_failure_of_another_kind_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(comparison, "exact_draws", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        comparison.reference(linear_potential(), DATA, seed=0)


# --- equal budgets -----------------------------------------------------------------------------------


def made_chains(num_draws: int = 40, energies: Tensor | None = None, **draws: Tensor) -> Chains:
    """Make chains of 4 evaluations and a tenth of a second per draw, with given draws ``(4, N)``."""
    shape = (4, num_draws)
    energy = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Chains(
        kernel="made",
        draws={"energy": energy if energies is None else energies, **draws},
        stats={
            "lp": -energy,
            "acceptance_rate": torch.full(shape, 0.8),
            "diverging": torch.zeros(shape, dtype=torch.bool),
            "energy": energy,
            "n_steps": torch.full(shape, 4),
        },
        position=torch.zeros(4, 1),
        params=init_params(torch.zeros(4, 1), 0.25),
        seconds=num_draws / 10,
        elapsed=torch.arange(1, num_draws + 1).double() / 10,
        warmup_seconds=1.0,
        attrs={"is_adjusted": 1},
    )


def test_both_budgets_are_cut_from_one_run() -> None:
    idata = to_inference_data(made_chains(400))
    assert [comparison_table.draws_within_evals(idata, n) for n in (1, 4, 5, 80, 1600, 9999)] == [1, 1, 2, 20, 400, 400]
    assert [comparison_table.draws_within_seconds(idata, s) for s in (0.05, 0.1, 2.0, 40.0, 41)] == [0, 1, 20, 400, 0]
    budget = comparison.Budget(4, 10, num_evals=800, num_seconds=40.0)
    row = comparison_table.seed_row(idata, budget, NO_REFERENCE).measures
    assert (row.draws, row.evals, row.seconds, row.warmup_seconds) == (200, 800, 20.0, 1.0)
    assert row.ess_per_1000_evals == pytest.approx(1000 * row.min_ess / 3200)
    assert row.ess_per_second == pytest.approx(row.min_ess / 20)
    assert row.ess_per_second_with_warmup == pytest.approx(row.min_ess / 21)
    # Of all 400 draws, which are independent.
    assert row.ess_at_equal_seconds == pytest.approx(2 * row.min_ess, rel=0.4)
    late = comparison_table.seed_row(idata, budget._replace(num_seconds=41), NO_REFERENCE).measures
    assert math.isnan(late.ess_at_equal_seconds)


def test_chains_of_a_run_go_on_until_both_budgets_are_spent() -> None:
    short = run_one("mala", budget=BUDGET._replace(num_seconds=0.0))
    long = run_one("mala", budget=BUDGET._replace(num_seconds=0.5))
    assert short.stats["lp"].shape[1] == 60 < long.stats["lp"].shape[1]
    assert torch.equal(short.stats["lp"], long.stats["lp"][:, :60])
    assert long.elapsed is not None and float(long.elapsed[-1]) >= 0.5


def test_too_few_draws_leave_a_line_with_gaps() -> None:
    idata = to_inference_data(made_chains())
    budget = comparison.Budget(4, 10, num_evals=12)
    row = comparison_table.seed_row(idata, budget, NO_REFERENCE._replace(energy=0.25)).measures
    assert row.draws == 3
    mean = float(idata["posterior"]["energy"][:, :3].mean())
    assert row.mean_energy == pytest.approx(mean) and row.energy_bias == pytest.approx(mean - 0.25)
    assert all(map(math.isnan, (row.max_r_hat, row.min_ess, row.ess_per_second, row.energy_error)))
    four = comparison_table.seed_row(idata, budget._replace(num_evals=13), NO_REFERENCE).measures
    assert four.min_ess > 0  # four draws are enough


# --- lines -------------------------------------------------------------------------------------------


def kernel_row(
    chains: Mapping[int, Chains], reference: comparison.Reference = NO_REFERENCE, **errors: str
) -> comparison_table.Row:
    outcomes = [Outcome("made", seed, to_inference_data(one)) for seed, one in chains.items()]
    outcomes += [Outcome("made", int(seed.removeprefix("seed_")), None, error) for seed, error in errors.items()]
    return comparison_table.kernel_row("made", outcomes, comparison.Budget(4, 10, 160), reference)


def energies(mean: float, seed: int) -> Tensor:
    return mean + torch.randn(4, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_line_has_means_and_spreads_over_seeds_and_the_bias_with_its_error() -> None:
    chains = {seed: made_chains(energies=energies(5.0, seed)) for seed in range(3)}
    row = kernel_row(chains, comparison.Reference(4.0, 0.03))
    means = [float(one.draws["energy"].mean()) for one in chains.values()]
    assert row.num_seeds == 3 and row.is_adjusted
    assert row.mean.energy_bias == pytest.approx(np.mean(means) - 4)
    assert row.sd.energy_bias == pytest.approx(np.std(means, ddof=1))
    # 480 independent draws of unit variance, and the reference's error.
    assert row.bias_sigmas == pytest.approx(row.mean.energy_bias / math.hypot(480**-0.5, 0.03), rel=0.3)
    apart = {seed: made_chains(energies=energies(5.0 + seed, seed)) for seed in range(3)}
    assert abs(kernel_row(apart, comparison.Reference(5.0, 0.0)).bias_sigmas) < 3  # the seeds disagree by more
    alone = kernel_row({0: chains[0]}, comparison.Reference(4.0, 0.03))
    assert math.isnan(alone.sd.energy_bias) and alone.bias_sigmas > 5


def test_the_worst_functional_is_named() -> None:
    apart = torch.arange(4.0).double()[:, None] * 9 + energies(0.0, 1)
    row = kernel_row({0: made_chains(), 1: made_chains(apart=apart)})
    assert (row.worst_functional, row.slowest_functional) == ("apart", "apart")
    assert row.mean.max_r_hat > 1.5


def test_modes_that_are_found_are_counted_and_weighed() -> None:
    modes = np.array([[0.0], [1.0], [2.0], [3.0]])
    x = torch.cat([torch.zeros(4, 10, 1), torch.ones(4, 30, 1)], dim=1) + 1e-3 * energies(0.0, 2)[..., None]
    known = comparison.Reference(math.nan, math.nan, modes, 0.1, np.array([0.25, 0.75, 0.0, 0.0]))
    row = kernel_row({0: made_chains(x=x)}, known)
    assert row.mean.modes_found == 2 and row.mean.mode_kl == pytest.approx(0.0, abs=1e-9)
    uniform = kernel_row({0: made_chains(x=x)}, known._replace(mode_weights=None))
    assert uniform.mean.mode_kl == pytest.approx(math.log(4) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    nowhere = kernel_row({0: made_chains(x=x + 50)}, known)
    assert nowhere.mean.modes_found == 0 and math.isnan(nowhere.mean.mode_kl)


def test_a_seed_that_fails_leaves_the_others_their_line() -> None:
    row = kernel_row({0: made_chains(), 2: made_chains()}, seed_1="it broke")
    assert row.num_seeds == 2 and row.mean.min_ess > 0 and "seed 1: it broke" in row.note
    nothing = kernel_row({}, seed_0="it broke", seed_1="it broke")
    assert nothing.num_seeds == 0 and nothing.note == "it broke" and math.isnan(nothing.mean.min_ess)
    text = comparison_table.to_text([nothing, row], comparison.Budget(4, 10, 160), NO_REFERENCE)
    assert "made: it broke" in text


def test_a_table_has_a_line_per_kernel_with_rounded_numbers() -> None:
    row = kernel_row({0: made_chains(), 1: made_chains(energies=energies(0.0, 1))})
    header, line = csv.reader(io.StringIO(comparison_table.to_csv([row])))
    values = dict(zip(header, line, strict=True))
    assert values["kernel"] == "made" and values["adjusted"] == "yes" and values["seeds"] == "2"
    assert values["evals"] == "160.0" and values["evals_sd"] == "0.0"
    assert float(values["min_ess"]) == pytest.approx(row.mean.min_ess, rel=1e-3)
    assert len(values["min_ess"].replace(".", "")) <= 5
    budget = comparison.Budget(4, 10, 160, 2.0)
    text = comparison_table.to_text([row], budget, NO_REFERENCE)
    trust, cost = text.split("\n\n")[:2]
    assert "modes" not in trust and "bias" not in trust  # nothing is known of them
    assert "at 2 s" in cost and f"{row.mean.min_ess / 0.64:.0f}"[:2] in cost


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (2.55361, 0.0036, "2.554 ± 0.004"),
        (69.123, 12.4, "69 ± 12"),
        (1234567.0, 1000.0, "1234567 ± 1000"),
        (0.0123, 0.0021, "0.012 ± 0.002"),
        (3.0, 0.0, "3"),
        (3.0, math.nan, "3"),
        (math.nan, 1.0, "nan"),
    ],
)
def test_a_mean_has_the_digits_that_its_spread_allows(mean: float, sd: float, text: str) -> None:
    assert comparison_table.with_spread(mean, sd) == text


# --- files -------------------------------------------------------------------------------------------


def test_chains_are_kept_and_an_energy_or_a_budget_of_another_kind_is_refused(tmp_path: Path) -> None:
    loaded = make_loaded(tmp_path)
    first = [comparison_files.run_and_save(loaded, "mala", seed, BUDGET) for seed in (0, 1)]
    kept = comparison_files.kept_outcomes(loaded.run, ["hmc"], (0, 1), BUDGET, loaded.fingerprint)
    assert [one.seed for one in kept["mala"]] == [0, 1]
    for before, after in zip(first, kept["mala"], strict=True):
        assert before.idata is not None and after.idata is not None
        np.testing.assert_array_equal(after.idata["posterior"]["energy"], before.idata["posterior"]["energy"])

    def refusal(
        seeds: tuple[int, ...] = (0, 1), budget: comparison.Budget = BUDGET, fingerprint: str = loaded.fingerprint
    ) -> str:
        with pytest.raises(InputError) as caught:
            comparison_files.kept_outcomes(loaded.run, ["hmc"], seeds, budget, fingerprint)
        return str(caught.value)

    assert "other weights" in refusal(fingerprint=make_loaded(tmp_path, QuadraticEnergy(CENTER, 0.8)).fingerprint + "0")
    assert "num-evals 60 instead of 61" in refusal(budget=BUDGET._replace(num_evals=61))
    assert "seed 2" in refusal(seeds=(0, 1, 2))
    comparison_files.remove_others(loaded.run, [])
    assert list(loaded.run.comparison_dir.iterdir()) == []
    assert "leave out --keep" in refusal()


def test_the_fingerprint_is_of_every_weight_and_of_the_data(tmp_path: Path) -> None:
    def fingerprint(**changes: object) -> str:
        return replace(make_loaded(tmp_path), **changes).fingerprint  # type: ignore[arg-type]

    first = fingerprint()
    assert fingerprint() == first and len(first) == 16
    assert fingerprint(config=Config(seed=1)) != first
    assert fingerprint(config=replace(Config(), ebm=replace(Config().ebm, steps=3))) == first
    moved = make_loaded(tmp_path)
    with torch.no_grad():
        next(iter(moved.vaebm.parameters())).add_(1e-7)
    assert moved.fingerprint != first


def test_a_kernel_that_fails_says_why_and_loses_nothing_of_the_others(tmp_path: Path) -> None:
    loaded = make_loaded(tmp_path)
    comparison_files.run_and_save(loaded, "mala", 0, BUDGET)
    broken = replace(loaded.config.sampling.kernel, name="mixture", members=("hmc",))
    object.__setattr__(broken, "members", ())  # no configuration can say this
    bad = replace(loaded, config=replace(loaded.config, sampling=replace(loaded.config.sampling, kernel=broken)))
    outcome = comparison_files.run_and_save(bad, "mixture", 0, BUDGET)
    assert outcome.idata is None and outcome.error
    assert comparison_files.chains_path(loaded.run, "mala", 0).exists()


def test_an_energy_that_is_not_a_number_is_a_line_without_numbers(tmp_path: Path) -> None:
    loaded = make_loaded(tmp_path, NanEnergy())
    reference = comparison.reference(loaded.potential, loaded.data, 0)
    assert math.isnan(reference.energy)
    rows, outcomes = [], {}
    for name in ("hmc", "langevin", "pcn", "pyro-hmc"):
        outcomes[name] = [comparison_files.run_and_save(loaded, name, 0, BUDGET)]
        rows.append(comparison_table.kernel_row(name, outcomes[name], BUDGET, reference))
    for row in rows[:3]:
        assert row.mean.divergences == row.mean.draws * BUDGET.num_chains
        assert math.isnan(row.mean.min_ess) and math.isnan(row.mean.mean_energy)
    assert rows[3].num_seeds == 0 and "finite" in rows[3].note
    assert "nan" in comparison_table.to_text(rows, BUDGET, reference)
    page = comparison_page.write_comparison(loaded.run, rows, outcomes, BUDGET, reference).read_text()
    assert "pyro-hmc: expected a finite U" in page and page.count("<img") == 5


# --- pictures ----------------------------------------------------------------------------------------


def test_kernels_have_colours_of_their_own() -> None:
    names = [f"kernel {index}" for index in range(25)]
    assert len(set(figures_compare.colours_of(names).values())) == len(names)


def test_marks_say_which_bars_mean_little() -> None:
    row = kernel_row({0: made_chains()})
    assert figures_compare._mark(row) in ("", " (*)")
    assert figures_compare._mark(row._replace(mean=row.mean._replace(max_r_hat=1.2))) == " (*)"
    assert figures_compare._mark(row._replace(mean=row.mean._replace(max_r_hat=1.0))) == ""
    assert " (u)" in figures_compare._mark(row._replace(is_adjusted=False))
    assert figures_compare._mark(row._replace(num_seeds=0)) == " (-)"


def test_effective_draws_are_counted_at_growing_shares() -> None:
    shown = figures_compare.shown_of(to_inference_data(made_chains()), 160)
    counts, found = figures_compare._growth(shown.idata, 40)
    assert counts[0] == 4 and counts[-1] == 40 and (np.diff(counts) > 0).all()
    whole = comparison_table.seed_row(shown.idata, comparison.Budget(4, 10, 160), NO_REFERENCE).measures
    assert found[-1].ess_bulk[0] == pytest.approx(whole.min_ess)
    assert found[-1].r_hat[0] == pytest.approx(whole.max_r_hat)
    assert len(figures_compare._growth(shown.idata, 3)[0]) == 0


def test_images_over_time_stand_in_rows(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 3 * 5, dtype=np.float32).reshape(3, 5, 1, 1, 1) * np.ones((1, 1, 1, 2, 2), np.float32)
    picture = figures_compare.images_picture("hmc", images, 8)
    assert picture.title == "hmc: 3 chains over time" and "every 8 draws" in picture.note
    assert picture.width > 0
