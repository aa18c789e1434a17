"""Tuning of the training chains on an energy whose descent is known: E = w x^2 / 2 on a linear VAE."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import Tensor

from ppl_vaebm.config import Config, EbmConfig, KernelConfig, SamplingConfig, TrainingKernelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm.step_search import (
    FIXED_GRADIENTS,
    LONGEST_CHAIN,
    STEP_RATIO,
    Trial,
    choose,
    descend,
    trial_table,
    tune,
    with_trial,
)
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from tests.small_models import VARIANCE, linear_vae

W = 4.0
NUM = 4_000


class Parabola(Energy):
    """``E = w x^2 / 2``."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * W * x.square().sum(-1)


def potential() -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(), Parabola()))


def config(kernel: str = "langevin", **options: object) -> Config:
    ebm = EbmConfig(**{"objective": "mle", "batch_size": NUM, "replay_size": NUM, **options})  # type: ignore[arg-type]
    return Config(ebm=ebm, kernel=TrainingKernelConfig(kernel))  # type: ignore[arg-type]


def exact_fall(h: float, num_steps: int) -> float:
    """Return the fall of the mean energy by Euler's steps.

    Phi is ``lam y^2 / 2`` of the one direction y of the noise that x follows, with ``lam = w VARIANCE``. A step takes y
    to ``(1 - h^2 (1 + lam) / 2) y + h n``, so the mean square follows a recursion that starts at 1.
    """
    lam = W * VARIANCE
    shrink, mean_square = 1 - 0.5 * h * h * (1 + lam), 1.0
    for _ in range(num_steps):
        mean_square = shrink**2 * mean_square + h * h
    return 0.5 * lam * (1 - mean_square)


def exact_rate(h: float, num_steps: int) -> float:
    return 1_000 * exact_fall(h, num_steps) / (num_steps + FIXED_GRADIENTS)


def test_the_chains_descend_as_the_recursion_says() -> None:
    trials = descend(config(), potential(), 0.4)
    lam = W * VARIANCE
    for num_steps in (1, 3, 10):
        error = 0.5 * lam * math.sqrt(2 * 2 / NUM)  # of the mean of lam y^2 / 2 at both ends
        error *= 1_000 / (num_steps + FIXED_GRADIENTS)
        assert abs(trials[num_steps - 1].fall - exact_rate(0.4, num_steps)) < 5 * error
    assert [trial.num_steps for trial in trials] == list(range(1, LONGEST_CHAIN + 1))


def test_the_choice_is_near_the_analytic_optimum() -> None:
    trials = tune(config(), potential(), 0.99)
    choice = choose(trials, 0.99)
    grid = [(0.01 * i, num_steps) for i in range(5, 150) for num_steps in range(1, LONGEST_CHAIN + 1)]
    best = max(grid, key=lambda point: exact_rate(*point))
    assert STEP_RATIO * best[0] < choice.step_size < best[0] / STEP_RATIO
    assert abs(choice.num_steps - best[1]) <= 1
    assert choice.fall == pytest.approx(exact_rate(*best), rel=0.05)
    assert exact_rate(choice.step_size / 2, choice.num_steps) < 0.8 * choice.fall  # it matters


def test_the_bound_on_rejection_holds_and_costs_speed() -> None:
    free, bound = (choose(tune(config(), potential(), limit), limit) for limit in (0.99, 0.05))
    assert bound.rejection <= 0.05 < free.rejection
    assert bound.step_size < free.step_size and bound.fall < free.fall


def test_an_adjusted_kernel_is_tuned_by_its_own_steps() -> None:
    trials = tune(config("mala"), potential())
    choice = choose(trials, 0.25)
    assert choice.rejection <= 0.25
    assert all(trial.fall <= choice.fall for trial in trials if trial.rejection <= 0.25)
    sizes = [trial.step_size for trial in trials]
    assert sizes == pytest.approx([math.pi / 2 * STEP_RATIO**i for i in range(len(sizes))])


def test_where_nothing_is_within_the_bound_the_least_rejection_is_taken() -> None:
    trials = [Trial(0.2, 3, 5.0, 0.6), Trial(0.1, 4, 2.0, 0.4)]
    assert choose(trials, 0.25) == trials[1] and choose(trials, 0.5) == trials[1] and choose(trials, 0.7) == trials[0]


def test_the_choice_goes_into_the_configuration() -> None:
    trial = Trial(0.3, 7, 5.0, 0.2)
    sampling = SamplingConfig(KernelConfig("langevin", step_size=0.9))
    fixed = with_trial(replace(config(), sampling=sampling), trial)
    assert fixed.ebm.num_transitions == 7 and fixed.kernel.step_size == fixed.sampling.kernel.step_size == 0.3
    assert fixed.kernel.target_acceptance is None
    adapted = with_trial(replace(config("mala"), sampling=sampling), trial)
    assert adapted.kernel.target_acceptance == 0.8 and adapted.sampling.kernel.step_size == 0.9
    assert with_trial(config("mala"), Trial(1.5, 1, 5.0, 0.0)).kernel.target_acceptance == 0.99
    with pytest.raises(InputError, match="found no step of mala that is accepted, down to 0.001: .*kernel.step-size"):
        with_trial(config("mala"), Trial(0.001, 1, 5.0, 1.0))


def test_the_table_marks_the_choice() -> None:
    trials = [Trial(0.2, 3, 5.0, 0.6), Trial(0.1, 4, 2.0, 0.4)]
    head, first, second = trial_table(trials, trials[1]).splitlines()
    assert "rejection" in head and "chosen" in first and "0.1" in first and "chosen" not in second


def test_the_noise_is_its_own_and_the_same_for_every_step() -> None:
    one, again = descend(config(), potential(), 0.4), descend(config(), potential(), 0.4)
    assert one == again
    other = descend(replace(config(), seed=1), potential(), 0.4)
    falls = [[trial.fall * (trial.num_steps + FIXED_GRADIENTS) / 1_000 for trial in trials] for trials in (one, other)]
    assert one != other and max(abs(a - b) for a, b in zip(*falls, strict=True)) < 0.1
