"""What the two training loops share: the schedule, the averaged weights, the guarded optimiser step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ppl_vaebm.config import EbmConfig, SviConfig
from ppl_vaebm.errors import TrainingError

MAX_BAD_STEPS = 20
"""Updates in a row with a gradient that is not finite, after which a run stops (chosen by us)."""
FINAL_SHARE = 0.01
"""Of the learning rate of :class:`CosineAdam`, at its end. Chosen by us."""
# Bounds of the clip by Adam's moments, from the code of VAEBM (Xiao et al. 2021).
NUM_DEVIATIONS, SLACK = 3.0, 0.1


class DivergedError(TrainingError):
    """Training ran away.

    Args:
        step: number of the step, from 0.
        reason: what was found, as the end of a sentence.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"step {step + 1}: {reason}; checkpoints, if there are any, are kept: start the stage again with a lower "
            "learning rate"
        )
        self.step, self.reason = step, reason


def learning_rate(loop: SviConfig | EbmConfig, step: int) -> float:
    """Return the learning rate of a step: a rise from 0 over the warm-up, then half a cosine to the final rate.

    Args:
        loop: configuration of the loop, without epochs.
        step: from 0 to ``loop.steps - 1``.

    Returns:
        The rate.
    """
    warmup = loop.warmup_steps if isinstance(loop, SviConfig) else 0
    if step < warmup:
        return loop.learning_rate * (step + 1) / (warmup + 1)
    phase = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, loop.steps - warmup)))
    return loop.final_learning_rate + phase * (loop.learning_rate - loop.final_learning_rate)


Averaged = TypeVar("Averaged", bound=nn.Module)


class AveragedWeights(Generic[Averaged]):
    """An exponential moving average of a module's parameters, as a copy of the module with its current buffers.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``, so that a short run's average forgets its
    initial weights.

    Args:
        module: to average.
        decay: in [0, 1).
    """

    def __init__(self, module: Averaged, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    def update(self, module: Averaged) -> None:
        """Take in the module's current parameters, and copy its buffers: statistics are averages by themselves."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [parameter.data for parameter in self.module.parameters()]
        currents = [parameter.detach() for parameter in module.parameters()]
        torch._foreach_lerp_(averages, currents, 1 - decay)
        copy_buffers(module, self.module)
        self.num_updates += 1


@torch.no_grad()
def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy the buffers of a module, such as running statistics, into a module of the same kind."""
    for buffer, current in zip(target.buffers(), source.buffers(), strict=True):
        buffer.copy_(current)


def build_optimizer(parameters: list[nn.Parameter], loop: SviConfig | EbmConfig) -> torch.optim.Optimizer:
    """Make a loop's update rule.

    Args:
        parameters: to train.
        loop: configuration with the rule and its constants.

    Returns:
        PyTorch's own optimiser, in its variant with the fewest kernels.
    """
    if isinstance(loop, EbmConfig):
        rates: dict[str, Any] = {"lr": loop.learning_rate, "weight_decay": loop.weight_decay}
        return torch.optim.Adam(parameters, **rates, betas=loop.adam_betas, fused=True)
    common: dict[str, Any] = {"lr": loop.learning_rate, "eps": loop.epsilon, "weight_decay": loop.weight_decay}
    if loop.optimizer == "adamax":
        return torch.optim.Adamax(parameters, **common, foreach=True)
    return torch.optim.Adam(parameters, **common, fused=True)


@torch.no_grad()
def clip_by_moments(rule: torch.optim.Optimizer) -> None:
    """Bound every element of the gradient by three of its own root mean squares and 0.1, as Adam has averaged them.

    An element of a parameter that Adam has not yet moved is left as it is, so the first step is free.

    Args:
        rule: Adam; its parameters' gradients are clipped in place.
    """
    for group in rule.param_groups:
        for parameter in group["params"]:
            moments = rule.state.get(parameter)
            if parameter.grad is None or not moments:
                continue
            mean_square = moments["exp_avg_sq"] / (1 - group["betas"][1] ** moments["step"])
            bound = NUM_DEVIATIONS * mean_square.sqrt() + SLACK
            parameter.grad.clamp_(-bound, bound)


class CosineAdam:
    """Adam with a rate that falls along half a cosine to a hundredth, for the small parts beside the two loops.

    Args:
        parameters: to train.
        learning_rate: at the start.
        num_steps: until the end.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, num_steps: int) -> None:
        self.rule = torch.optim.Adam(parameters, learning_rate)
        final = FINAL_SHARE * learning_rate
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.rule, num_steps, final)

    def step(self, loss: Tensor) -> None:
        """Differentiate a finite loss and move the parameters."""
        self.rule.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.rule.step()
        self.schedule.step()


class GuardedOptimizer:
    """An optimiser whose step is skipped, and counted, when the gradient is not finite.

    Args:
        parameters: to train.
        loop: configuration with the rule, the rates and the clip.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], loop: SviConfig | EbmConfig) -> None:
        self.parameters = list(parameters)
        self.loop = loop
        self.rule = build_optimizer(self.parameters, loop)
        self.num_skipped = 0
        self.num_bad_in_a_row = 0

    def step(self, loss: Tensor, step: int, rate_factor: float = 1.0) -> float:
        """Differentiate a loss and move the parameters.

        Args:
            loss: scalar.
            step: number of this step, for the schedule.
            rate_factor: what the schedule's learning rate is multiplied by.

        Returns:
            The gradient's norm before clipping.

        Raises:
            DivergedError: :data:`MAX_BAD_STEPS` gradients in a row were not finite.
        """
        for group in self.rule.param_groups:
            group["lr"] = rate_factor * learning_rate(self.loop, step)
        self.rule.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._clip()
        if math.isfinite(norm):
            self.rule.step()
            self.num_bad_in_a_row = 0
            return norm
        self.num_skipped += 1
        self.num_bad_in_a_row += 1
        if self.num_bad_in_a_row == MAX_BAD_STEPS:
            found = f"the loss is {float(loss.detach())} and its gradient has not been finite for {MAX_BAD_STEPS} steps"
            raise DivergedError(step, found)
        return norm

    def _clip(self) -> float:
        """Clip the gradient as the loop says; return its norm before."""
        if isinstance(self.loop, SviConfig) or self.loop.clip == "norm":
            return float(clip_grad_norm_(self.parameters, self.loop.grad_clip))
        norm = float(get_total_norm([each.grad for each in self.parameters if each.grad is not None]))
        clip_by_moments(self.rule)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, for a checkpoint."""
        return {"rule": self.rule.state_dict(), "num_skipped": self.num_skipped, "num_bad": self.num_bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.rule.load_state_dict(state["rule"])
        self.num_skipped, self.num_bad_in_a_row = state["num_skipped"], state["num_bad"]
