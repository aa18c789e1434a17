"""Normalised likelihoods and exact draws, where both are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference import likelihood
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.likelihood import (
    RejectionError,
    elbo_rows,
    exact_draws,
    log_p,
    log_z_from_vae,
    reference_energies,
)
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import (
    FEW,
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    VARIANCE,
    QuadraticEnergy,
    ZeroEnergy,
    linear_vae,
    log_normal,
    shipped_vae,
)

CENTER, WIDTH = 0.7, 0.6
# The product of N(0, v) and exp(-(x - c)^2 / (2 w^2)).
LOG_Z = 0.5 * math.log(2 * math.pi * WIDTH**2) + float(
    log_normal(torch.tensor([[CENTER]], dtype=torch.float64), 0.0, VARIANCE + WIDTH**2)
)
MEAN = CENTER * VARIANCE / (VARIANCE + WIDTH**2)
PRODUCT_VARIANCE = VARIANCE * WIDTH**2 / (VARIANCE + WIDTH**2)


def linear_potential(energy: Energy | None = None) -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), energy or QuadraticEnergy(CENTER, WIDTH)))


def moment_errors(x: Tensor) -> list[float]:
    """Return the errors of mean and variance of independent draws of the product, in standard errors."""
    mean_error = math.sqrt(PRODUCT_VARIANCE / len(x))
    variance_error = PRODUCT_VARIANCE * math.sqrt(2 / len(x))
    return [
        abs(float(x.mean()) - MEAN) / mean_error,
        abs(float((x - MEAN).square().mean()) - PRODUCT_VARIANCE) / variance_error,
    ]


@pytest.mark.parametrize("name", FEW)
def test_without_an_energy_log_z_is_zero_exactly(name: str, generator: torch.Generator) -> None:
    potential = noise_potential(VAEBM(shipped_vae(name), ZeroEnergy()))
    estimate = log_z_from_vae(potential, generator, 50)
    assert estimate.value == pytest.approx(0.0, abs=1e-14)
    assert estimate.error == pytest.approx(0.0, abs=1e-14)
    assert estimate.ess == pytest.approx(50)


def test_a_gaussian_times_a_quadratic_has_the_known_log_z(generator: torch.Generator) -> None:
    num = 40_000
    estimate = log_z_from_vae(linear_potential(), generator, num)
    assert abs(estimate.value - LOG_Z) < 4 * estimate.error
    # E[w^2] is the normaliser for a quadratic of half the squared width.
    half = WIDTH / math.sqrt(2)
    log_second = 0.5 * math.log(2 * math.pi * half**2) + float(
        log_normal(torch.tensor([[CENTER]], dtype=torch.float64), 0.0, VARIANCE + half**2)
    )
    relative_variance = math.exp(log_second - 2 * LOG_Z) - 1
    assert estimate.error == pytest.approx(math.sqrt(relative_variance / num), rel=0.05)
    assert estimate.ess == pytest.approx(num / (1 + relative_variance), rel=0.05)
    assert abs(LOG_Z) > 20 * estimate.error  # the VAE's own log Z = 0 would fail


def test_a_constant_added_to_the_energy_moves_log_z_by_minus_it() -> None:
    base = linear_potential()

    class Raised(QuadraticEnergy):
        def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
            return super().forward(x, z) + 1_000

    raised = linear_potential(Raised(CENTER, WIDTH))
    one, other = (log_z_from_vae(potential, stream(0, "log_z"), 100) for potential in (base, raised))
    assert other.value == pytest.approx(one.value - 1_000, abs=1e-9)
    assert other.error == pytest.approx(one.error, rel=1e-6)


def test_energies_of_the_vae_come_in_any_number(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(likelihood, "BATCH", 16)
    energies = reference_energies(linear_potential(), generator, 41)
    assert energies.shape == (41,) and len(energies.unique()) == 41 and not energies.requires_grad


POINTS = torch.tensor([[-1.5], [0.0], [0.4], [2.0]], dtype=torch.float64)


@pytest.mark.parametrize("num_importance", [2, 30])
def test_the_exact_posterior_gives_the_evidence_without_error(num_importance: int, seed: int) -> None:
    estimate = log_p(linear_vae(), POINTS, seed, num_importance, scales=(1.0,))
    torch.testing.assert_close(estimate.value, log_normal(POINTS, 0.0, VARIANCE), rtol=1e-12, atol=0)
    assert estimate.error.max() < 1e-12


def test_another_guide_gives_it_within_its_errors(seed: int) -> None:
    vae = linear_vae(slope=0.9 * POSTERIOR_SLOPE, spread=1.5 * POSTERIOR_SPREAD)
    estimate = log_p(vae, POINTS, seed, 20_000)
    errors = (estimate.value - log_normal(POINTS, 0.0, VARIANCE)).abs() / estimate.error
    assert errors.max() < 4
    assert estimate.error.min() > 1e-4 and estimate.error.max() < 0.02


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.0), (1.0, 2.0, 4.0)])
def test_wide_guides_leave_the_estimate_unbiased(scales: tuple[float, ...], seed: int) -> None:
    """Two draws a point, so that a wrong weight of any component would show in the mean of the weights."""
    vae = linear_vae(slope=0.9 * POSTERIOR_SLOPE, spread=0.8 * POSTERIOR_SPREAD)
    x = torch.full((60_000, 1), 0.7, dtype=torch.float64)
    weights = (log_p(vae, x, seed, 2, scales).value - log_normal(x[:1], 0.0, VARIANCE)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(x))


def test_wide_guides_mend_a_narrow_one(seed: int) -> None:
    vae = linear_vae(slope=POSTERIOR_SLOPE, spread=0.4 * POSTERIOR_SPREAD)
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(1)
    evidence = log_normal(x, 0.0, VARIANCE)
    narrow, wide = ((log_p(vae, x, seed, 300, scales).value - evidence).abs().mean() for scales in ((1.0,), None))
    assert wide < 0.5 * narrow


def test_few_draws_from_another_guide_fall_short_on_average(seed: int) -> None:
    vae = linear_vae(slope=0.0, spread=1.0)  # the prior
    x = torch.full((20_000, 1), 1.5, dtype=torch.float64)
    means = [float(log_p(vae, x, seed, num).value.mean()) for num in (2, 10, 50)]
    evidence = float(log_normal(x[:1], 0.0, VARIANCE))
    assert means[0] < means[1] < means[2] < evidence
    assert evidence - means[0] > 0.1 and evidence - means[2] < 0.05


def test_rows_keep_their_order_over_several_passes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(likelihood, "BATCH", 100)
    x = torch.linspace(-2, 2, 33, dtype=torch.float64).unsqueeze(1)
    estimate = log_p(linear_vae(), x, seed, 20, scales=(1.0,))  # five rows a pass
    torch.testing.assert_close(estimate.value, log_normal(x, 0.0, VARIANCE), rtol=1e-12, atol=0)


def test_the_exact_draws_are_those_of_the_product(generator: torch.Generator) -> None:
    potential = linear_potential()
    draws = exact_draws(potential, generator, 20_000)
    assert draws.position.shape == (20_000, 2)
    assert max(moment_errors(potential.decode(draws.position))) < 5
    # A draw is kept with probability exp(-E - bound), and the bound is near the largest -E, which is 0.
    error = math.sqrt(math.exp(LOG_Z) * (1 - math.exp(LOG_Z)) / draws.num_proposals)
    assert draws.acceptance_rate == pytest.approx(math.exp(LOG_Z), abs=5 * error + 1e-4)
    # Negative control: VAE samples have other moments.
    reference = potential.draw_reference(generator, 20_000)
    assert min(moment_errors(potential.decode(reference))) > 20


@pytest.mark.parametrize("name", ["hmc", "mixture"])
def test_a_chain_started_from_them_keeps_their_moments(name: str, generator: torch.Generator) -> None:
    potential = linear_potential()
    start = exact_draws(potential, generator, 5_000).position
    kernel = build_kernel(KernelConfig(name, num_steps=3), potential)  # type: ignore[arg-type]
    state, params = kernel.init(start), init_params(start, 0.5)
    for _ in range(20):
        state, _ = kernel.step(generator, state, params)
    assert max(moment_errors(potential.decode(state.position))) < 5


def test_they_stay_so_when_the_pilot_saw_little(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(likelihood, "NUM_PILOT", 1)
    monkeypatch.setattr(likelihood, "BATCH", 50)
    potential = linear_potential()
    x = torch.cat([potential.decode(exact_draws(potential, generator, 40).position) for _ in range(200)])
    assert max(moment_errors(x)) < 5


@pytest.mark.parametrize("is_discretized", [True, False])
def test_the_elbo_of_the_exact_posterior_is_the_evidence(is_discretized: bool, seed: int) -> None:
    elbo, kl = elbo_rows(linear_vae(), POINTS, seed, is_discretized)
    # Given x, the ELBO's draw is log p(x | z) less the KL, whose mean over draws is the evidence.
    many = torch.stack([elbo_rows(linear_vae(), POINTS, draw, is_discretized)[0] for draw in range(400)])
    error = many.std(0) / math.sqrt(400)
    assert ((many.mean(0) - log_normal(POINTS, 0.0, VARIANCE)).abs() / error).max() < 5
    assert elbo.shape == kl["z_1"].shape == (4,)


def test_the_discretised_elbo_differs_from_the_continuous_one_with_a_logistic_decoder(seed: int) -> None:
    vae = shipped_vae("nvae, padding, logistic")
    x = torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    discretized, continuous = (elbo_rows(vae, x, seed, flag)[0] for flag in (True, False))
    assert (discretized - continuous).abs().min() > 1e-6


def test_the_density_of_the_product_integrates_to_one(generator: torch.Generator) -> None:
    """By quadrature over x of exp(log p - E - log Z), which nothing here is fitted to."""
    x = torch.linspace(-6, 6, 1_201, dtype=torch.float64).unsqueeze(1)
    log_h = log_p(linear_vae(), x, 0, 2, scales=(1.0,)).value - QuadraticEnergy(CENTER, WIDTH)(x)
    log_z = log_z_from_vae(linear_potential(), generator, 40_000).value
    for offset, is_normalised in ((0.0, True), (0.05, False)):
        mass = float(torch.trapezoid((log_h - log_z - offset).exp(), x[:, 0]))
        assert (abs(mass - 1) < 0.02) == is_normalised


class Scripted:
    """A potential whose draws are blocks of numbers given in advance; -E is the number."""

    rows_per_block = 1_000_000

    def __init__(self, blocks: list[list[float]]) -> None:
        self.blocks = iter(blocks)

    def draw_reference(self, generator: torch.Generator, num: int) -> Tensor:
        block = torch.tensor(next(self.blocks), dtype=torch.float64).unsqueeze(1)
        assert len(block) == num
        return block

    def __call__(self, position: Tensor) -> Tensor:
        return -position[:, 0]


@pytest.mark.parametrize("thins", [True, False])
def test_raising_the_bound_thins_what_was_kept_before(
    thins: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    size, high = 10_000, math.log(4)
    monkeypatch.setattr(likelihood, "NUM_PILOT", size)
    monkeypatch.setattr(likelihood, "BATCH", size)
    if not thins:  # negative control
        thinned = likelihood._thinned

        def without_thinning(rows: Tensor, log_probability: float | Tensor, generator: torch.Generator) -> Tensor:
            return rows if isinstance(log_probability, float) else thinned(rows, log_probability, generator)

        monkeypatch.setattr(likelihood, "_thinned", without_thinning)
    pilot, first, second, third = [0.0] * size, [0.0] * size, [high] + [-1.0] * (size - 1), [high] * size
    scripted = Scripted([pilot, first, second, third])
    draws = exact_draws(scripted, generator, 12_000, max_proposals=4 * size)  # type: ignore[arg-type]
    assert draws.num_proposals == 3 * size and len(draws.position) == 12_000
    counts = {value: int((draws.position == value).sum()) for value in (0.0, -1.0, high)}
    # All of the first block are kept under the pilot's bound of 0, a quarter of them under log 4.
    for value, share in ((0.0, 0.25), (-1.0, math.exp(-1) / 4)):
        is_near = abs(counts[value] - share * size) < 5 * math.sqrt(share * (1 - share) * size)
        assert is_near == (thins or value != 0.0)
    assert counts[high] == 12_000 - counts[0.0] - counts[-1.0]
    kept = counts[0.0] + counts[-1.0] + size + 1
    assert draws.acceptance_rate == pytest.approx(kept / (3 * size))


def test_it_gives_up_with_the_numbers(generator: torch.Generator) -> None:
    share = exact_draws(linear_potential(), generator, 1_000).acceptance_rate
    num = round(30_000 * share * 1.4)  # more than 30,000 proposals give, but not twice as many
    with pytest.raises(RejectionError, match=rf"rejection kept \d+ of 30000 VAE samples where {num} were asked"):
        exact_draws(linear_potential(), generator, num, max_proposals=30_000)


def test_it_gives_up_at_once_where_there_is_no_hope(generator: torch.Generator) -> None:
    with pytest.raises(RejectionError, match=r"would keep about \d.*e-\d+ of the VAE samples"):
        exact_draws(linear_potential(QuadraticEnergy(4.0, 1e-4)), generator, 20_000)


def test_it_gives_up_at_once_where_all_energies_are_infinite(generator: torch.Generator) -> None:
    scripted = Scripted([[-math.inf] * likelihood.MIN_PILOT])
    with pytest.raises(RejectionError, match="would keep about 0 of"):
        exact_draws(scripted, generator, 1)  # type: ignore[arg-type]


class Counted(Energy):
    """A wide Gaussian energy that counts its rows, and is NaN in one row after some."""

    def __init__(self, bad_row: float = math.inf) -> None:
        super().__init__()
        self.bad_row, self.num_rows = bad_row, 0

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        energy = 0.1 * x.square().flatten(1).sum(1)
        if self.num_rows <= self.bad_row < self.num_rows + len(x):
            energy[0] = math.nan
        self.num_rows += len(x)
        return energy


def test_few_exact_draws_take_few_evaluations(generator: torch.Generator) -> None:
    energy = Counted()
    assert len(exact_draws(linear_potential(energy), generator, 40).position) == 40
    assert energy.num_rows < 15_000  # the pilot of many draws alone has 50,000


@pytest.mark.parametrize("bad_row", [100, 8_000], ids=["pilot", "proposals"])
def test_an_energy_that_is_nan_ends_rejection_at_once(bad_row: int, generator: torch.Generator) -> None:
    energy = Counted(bad_row)
    with pytest.raises(RejectionError, match=r"found 1 of \d+ VAE samples whose energy is NaN or minus infinity"):
        exact_draws(linear_potential(energy), generator, 500)
    assert energy.num_rows < 15_000
