"""The schedule, the guarded optimiser step, its clips and the averaged weights."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import EbmConfig, SviConfig
from ppl_vaebm.inference.optim import (
    MAX_BAD_STEPS,
    AveragedWeights,
    GuardedOptimizer,
    Schedule,
    cosine_adam,
    stage_optimizer,
)

LOOP = SviConfig(steps=100, learning_rate=0.1, final_learning_rate=0.02, grad_clip=5.0)


def test_the_rate_follows_half_a_cosine_between_its_ends() -> None:
    rate = optimizer_of(Weights(0.0)).schedule
    assert rate(0) == 0.1
    assert rate(50) == pytest.approx(0.06)
    assert rate(100) == pytest.approx(0.02)
    assert rate(25) == pytest.approx(0.06 + 0.04 * math.sqrt(0.5))
    rates = [rate(step) for step in range(100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.021
    assert Schedule(1.0, 0.0, 10)(5) == pytest.approx(0.5)


def test_the_rate_rises_linearly_over_the_warm_up() -> None:
    rate = Schedule(1.0, 0.0, num_steps=110, num_warmup_steps=9)
    assert [rate(step) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert rate(9) == 1.0
    assert rate(9 + 101 // 2) == pytest.approx(0.5, abs=0.02)
    assert rate(109) < 1e-3


def test_the_schedule_of_a_small_part_is_pytorchs_cosine() -> None:
    module = Weights(0.0)
    optimizer = cosine_adam(module.parameters(), 2e-3, 40)
    rule = torch.optim.Adam(Weights(0.0).parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(rule, 40, 2e-5)
    for step in range(40):
        optimizer.step(module.weight.sum(), step)
        assert optimizer.learning_rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        rule.step()
        scheduler.step()


class Weights(nn.Module):
    """One parameter and one buffer."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.register_buffer("fixed", torch.tensor([3.0]))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


def averaged(values: list[float], start: float, decay: float) -> float:
    module = Weights(start)
    average = AveragedWeights(module, decay)
    for value in values:
        module.set(value)
        average.update(module)
    assert average.num_updates == len(values)
    return average.module.get_parameter("weight").item()


def test_the_average_has_its_closed_form() -> None:
    # The decays of the first updates are 1/10, 2/11, 3/12.
    assert averaged([7.0], 2.0, 0.999) == pytest.approx(0.1 * 2 + 0.9 * 7)
    assert averaged([7.0, 1.0], 2.0, 0.999) == pytest.approx(2 / 11 * (0.1 * 2 + 0.9 * 7) + 9 / 11)
    expected = 3 / 12 * (2 / 11 * (0.1 * 2 + 0.9 * 7) + 9 / 11) + 9 / 12 * 4
    assert averaged([7.0, 1.0, 4.0], 2.0, 0.999) == pytest.approx(expected)
    # Where they pass the decay asked for, that one rules: a geometric average from then on.
    assert averaged([1.0] * 5, 0.0, 0.05) == pytest.approx(1 - 0.05**5)
    assert averaged([7.0, 1.0, 4.0], 2.0, 0.0) == 4.0
    # A decay of n / (n + 9) after n updates forgets the start: what is left of it is the product of decays.
    left = math.prod((1 + n) / (10 + n) for n in range(50))
    assert averaged([0.0] * 50, 1.0, 0.999) == pytest.approx(left) and left < 1e-7


def test_the_average_is_a_frozen_copy_in_evaluation_mode() -> None:
    module = Weights(1.0).train()
    average = AveragedWeights(module, 0.5)
    assert not average.module.training and module.training
    assert not average.module.get_parameter("weight").requires_grad and module.weight.requires_grad
    module.set(2.0)
    assert average.module.get_parameter("weight").item() == 1.0
    average.update(module)
    assert module.weight.item() == 2.0
    assert average.module.get_buffer("fixed").item() == 3.0


def loss_with_gradient(weight: Tensor, *gradient: float) -> Tensor:
    return weight @ torch.tensor(gradient, dtype=weight.dtype)


def optimizer_of(module: Weights, loop: SviConfig = LOOP) -> GuardedOptimizer:
    return stage_optimizer(module.parameters(), loop)


def test_a_step_is_adams_at_the_scheduled_rate() -> None:
    for step in (0, 50):
        module = Weights(1.0, -2.0)
        norm = optimizer_of(module).step(loss_with_gradient(module.weight, 3.0, -4.0), step)
        rate = Schedule(LOOP.learning_rate, LOOP.final_learning_rate, LOOP.steps)(step)
        # Adam's first step is the rate times the gradient's sign.
        assert module.weight.tolist() == pytest.approx([1.0 - rate, -2.0 + rate], abs=1e-8)
        assert norm == pytest.approx(5.0)


def test_the_gradient_is_clipped_and_its_norm_before_is_returned() -> None:
    module = Weights(0.0, 0.0)
    assert optimizer_of(module).step(loss_with_gradient(module.weight, 30.0, 40.0), 0) == pytest.approx(50.0)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == pytest.approx([3.0, 4.0], rel=1e-5)


def test_gradients_do_not_pile_up() -> None:
    module = Weights(0.0)
    optimizer = optimizer_of(module)
    norms = [optimizer.step(loss_with_gradient(module.weight, 2.0), step) for step in range(3)]
    assert norms == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_bad_gradient_touches_nothing_and_is_counted(bad: float) -> None:
    module, twin = Weights(1.0, -2.0), Weights(1.0, -2.0)
    optimizer, twin_optimizer = optimizer_of(module), optimizer_of(twin)
    for one, its_optimizer in ((module, optimizer), (twin, twin_optimizer)):
        its_optimizer.step(loss_with_gradient(one.weight, 1.0, 2.0), 0)
    before = module.weight.detach().clone()
    assert not math.isfinite(optimizer.step(loss_with_gradient(module.weight, bad, 1.0), 1))
    assert torch.equal(module.weight, before)
    assert (optimizer.num_skipped, optimizer.num_bad_in_a_row) == (1, 1)
    # Adam's moments are untouched too: it goes on as if nothing had happened.
    for one, its_optimizer in ((module, optimizer), (twin, twin_optimizer)):
        its_optimizer.step(loss_with_gradient(one.weight, 2.0, -1.0), 2)
    assert torch.equal(module.weight, twin.weight) and not torch.equal(module.weight, before)
    assert (optimizer.num_skipped, optimizer.num_bad_in_a_row) == (1, 0)


def test_without_the_guard_a_bad_gradient_ruins_the_parameters() -> None:
    module = Weights(1.0, -2.0)
    adam = torch.optim.Adam(module.parameters())
    loss_with_gradient(module.weight, math.nan, 1.0).backward()
    adam.step()
    assert module.weight.isnan().any()


def test_too_many_bad_steps_in_a_row_are_a_failure() -> None:
    module = Weights(1.0)
    optimizer = optimizer_of(module)

    def failure_after(step: int, gradient: float) -> str | None:
        loss = loss_with_gradient(module.weight, gradient)
        optimizer.step(loss, step)
        return optimizer.failure(loss)

    assert not any(failure_after(step, math.nan) for step in range(MAX_BAD_STEPS - 1))
    assert failure_after(30, 0.0) is None  # one good step starts the count again
    assert not any(failure_after(40 + step, math.nan) for step in range(MAX_BAD_STEPS - 1))
    expected = f"the loss is nan and its gradient has not been finite for {MAX_BAD_STEPS} steps"
    assert failure_after(99, math.nan) == expected
    assert module.weight.item() == 1.0
    assert optimizer.num_skipped == 2 * MAX_BAD_STEPS - 1


def test_a_restored_optimizer_continues_bit_for_bit() -> None:
    def run(module: Weights, optimizer: GuardedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.step((module.weight - 1 / (1 + step)).square().sum(), step)

    module = Weights(0.3, 2.0)
    optimizer = optimizer_of(module)
    run(module, optimizer, range(5))
    optimizer.step(loss_with_gradient(module.weight, math.nan, 1.0), 5)

    restored = Weights(0.0, 0.0)
    restored.load_state_dict(module.state_dict())
    restored_optimizer = optimizer_of(restored)
    restored_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would give it
    assert (restored_optimizer.num_skipped, restored_optimizer.num_bad_in_a_row) == (1, 1)
    forgetful = Weights(0.0, 0.0)
    forgetful.load_state_dict(module.state_dict())
    for one, its_optimizer in (
        (module, optimizer),
        (restored, restored_optimizer),
        (forgetful, optimizer_of(forgetful)),
    ):
        run(one, its_optimizer, range(6, 12))
    assert torch.equal(restored.weight, module.weight)
    assert not torch.equal(forgetful.weight, module.weight)  # negative control: without Adam's moments it does not


EBM = EbmConfig(steps=100, learning_rate=0.1, final_learning_rate=0.1, adam_betas=(0.8, 0.9), clip="adam-moments")


def adam_by_hand(gradients: list[list[float]], loop: EbmConfig, start: list[float]) -> list[float]:
    """Write Adam and its clip out for single numbers."""
    (beta1, beta2), ends = loop.adam_betas, []
    for weight, ours in zip(start, zip(*gradients, strict=True), strict=True):
        mean = square = 0.0
        for count, gradient in enumerate(ours, start=1):
            if count > 1:
                bound = 3 * math.sqrt(square / (1 - beta2 ** (count - 1))) + 0.1
                gradient = max(-bound, min(bound, gradient))
            gradient += loop.weight_decay * weight
            mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
            root = math.sqrt(square / (1 - beta2**count)) + 1e-8
            weight -= loop.learning_rate * mean / (1 - beta1**count) / root
        ends.append(weight)
    return ends


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_clip_by_moments_is_the_one_written_out(weight_decay: float) -> None:
    # The second step's first element and the third's second are beyond their bounds, of 3.1 and about 6.
    gradients = [[1.0, -2.0], [50.0, 1.0], [-1.0, -90.0], [0.3, 0.2]]
    loop, module = replace(EBM, weight_decay=weight_decay), Weights(1.0, -2.0)
    optimizer = stage_optimizer(module.parameters(), loop)
    norms = [optimizer.step(loss_with_gradient(module.weight, *each), step) for step, each in enumerate(gradients)]
    assert module.weight.tolist() == pytest.approx(adam_by_hand(gradients, loop, [1.0, -2.0]), rel=1e-6)
    assert norms == pytest.approx([math.hypot(*each) for each in gradients])  # before the clip
    unclipped = Weights(1.0, -2.0)
    free = stage_optimizer(unclipped.parameters(), replace(loop, clip="norm", grad_clip=1e9))
    for step, each in enumerate(gradients):
        free.step(loss_with_gradient(unclipped.weight, *each), step)
    assert (unclipped.weight - module.weight).abs().min() > 1e-3  # negative control


def test_the_first_step_is_not_clipped_by_moments() -> None:
    module = Weights(0.0)
    optimizer = stage_optimizer(module.parameters(), EBM)
    optimizer.step(loss_with_gradient(module.weight, 1e6), 0)
    assert module.weight.grad is not None and module.weight.grad.item() == 1e6
    optimizer.step(loss_with_gradient(module.weight, 1e9), 1)
    assert module.weight.grad.item() == pytest.approx(3e6 + 0.1, rel=1e-6)


def test_a_factor_lowers_the_rate() -> None:
    moved = []
    for factor in (1.0, 0.25):
        module = Weights(1.0)
        stage_optimizer(module.parameters(), EBM).step(loss_with_gradient(module.weight, 3.0), 0, factor)
        moved.append(1.0 - module.weight.item())
    assert moved == pytest.approx([0.1, 0.025], rel=1e-6)
