"""What every training loop shares: the learning rate's schedule, the guarded optimiser step, the averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppl_vaebm.config import EbmConfig, SviConfig
from ppl_vaebm.errors import TrainingError

MAX_BAD_STEPS = 20
"""Updates in a row with a gradient that is not finite, after which an optimiser has failed. Chosen by us."""
FINAL_FRACTION = 0.01
"""Final learning rate of :func:`cosine_adam`, as a fraction of the first. Chosen by us."""
# Bounds of the clip by Adam's moments, from the code of VAEBM (Xiao et al. 2021).
NUM_DEVIATIONS, SLACK = 3.0, 0.1


class DivergedError(TrainingError):
    """Training diverged at a step, counted from 0; the reason is the end of a sentence."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"step {step + 1}: {reason}; checkpoints, if there are any, are kept: start the stage again with a lower "
            "learning rate"
        )
        self.step, self.reason = step, reason


class Schedule(NamedTuple):
    """Learning rate by step: a linear rise from 0 over the warm-up, then half a cosine down to the final rate."""

    learning_rate: float
    """At the start of the cosine."""
    final_learning_rate: float
    num_steps: int
    """Steps in all."""
    num_warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / (self.num_warmup_steps + 1)
        num_done, num_steps = step - self.num_warmup_steps, max(1, self.num_steps - self.num_warmup_steps)
        phase = 0.5 * (1 + math.cos(math.pi * num_done / num_steps))
        return self.final_learning_rate + phase * (self.learning_rate - self.final_learning_rate)


class GuardedOptimizer:
    """A PyTorch optimiser on a schedule, which skips and counts the steps whose gradient is not finite.

    ``clip`` is the largest norm of the gradient, or ``adam-moments``; see :func:`clip_by_moments`.
    """

    def __init__(
        self, rule: torch.optim.Optimizer, schedule: Schedule, clip: float | Literal["adam-moments"] = math.inf
    ) -> None:
        self.rule, self.schedule, self.clip = rule, schedule, clip
        self.parameters = [parameter for group in rule.param_groups for parameter in group["params"]]
        self.learning_rate = schedule(0)
        """Rate of the last step."""
        self.num_skipped = self.num_bad_in_a_row = 0

    def step(self, loss: Tensor, step: int, rate_factor: float = 1.0) -> float:
        """Differentiate a loss, ``()``, and move the parameters at ``rate_factor`` times the schedule's rate of a step.

        Returns the gradient's norm before clipping. If it is not finite, nothing has moved.
        """
        self.learning_rate = rate_factor * self.schedule(step)
        for group in self.rule.param_groups:
            group["lr"] = self.learning_rate
        self.rule.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = self._clip()
        if math.isfinite(norm):
            self.rule.step()
            self.num_bad_in_a_row = 0
        else:
            self.num_skipped += 1
            self.num_bad_in_a_row += 1
        return norm

    def failure(self, loss: Tensor) -> str | None:
        """Describe :data:`MAX_BAD_STEPS` bad steps in a row, with the last loss; return ``None`` where fewer were."""
        if self.num_bad_in_a_row < MAX_BAD_STEPS:
            return None
        return f"the loss is {float(loss.detach())} and its gradient has not been finite for {MAX_BAD_STEPS} steps"

    def _clip(self) -> float:
        """Clip the gradient; return its norm before."""
        norm = get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        if self.clip == "adam-moments":
            clip_by_moments(self.rule)
        elif self.clip < math.inf:
            clip_grads_with_norm_(self.parameters, self.clip, norm)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, for a checkpoint."""
        return {"rule": self.rule.state_dict(), "num_skipped": self.num_skipped, "num_bad": self.num_bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rule.load_state_dict(state["rule"])
        self.num_skipped, self.num_bad_in_a_row = state["num_skipped"], state["num_bad"]


def stage_optimizer(parameters: Iterable[nn.Parameter], loop: SviConfig | EbmConfig) -> GuardedOptimizer:
    """Make a stage's optimiser from its options, in PyTorch's variant with the fewest kernels."""
    options: dict[str, Any] = {"lr": loop.learning_rate, "weight_decay": loop.weight_decay}
    clip: float | Literal["adam-moments"] = loop.grad_clip
    rule: torch.optim.Optimizer
    if isinstance(loop, EbmConfig):
        num_warmup_steps, clip = 0, "adam-moments" if loop.clip == "adam-moments" else clip
        rule = torch.optim.Adam(parameters, **options, betas=loop.adam_betas, fused=True)
    else:
        num_warmup_steps, options["eps"] = loop.warmup_steps, loop.epsilon
        if loop.optimizer == "adamax":
            rule = torch.optim.Adamax(parameters, **options, foreach=True)
        else:
            rule = torch.optim.Adam(parameters, **options, fused=True)
    schedule = Schedule(loop.learning_rate, loop.final_learning_rate, loop.steps, num_warmup_steps)
    return GuardedOptimizer(rule, schedule, clip)


def cosine_adam(parameters: Iterable[nn.Parameter], learning_rate: float, num_steps: int) -> GuardedOptimizer:
    """Make Adam with a rate that falls along half a cosine to a hundredth, for a small part beside the stages."""
    schedule = Schedule(learning_rate, FINAL_FRACTION * learning_rate, num_steps)
    return GuardedOptimizer(torch.optim.Adam(parameters, learning_rate), schedule)


@torch.no_grad()
def clip_by_moments(rule: torch.optim.Optimizer) -> None:
    """Bound every element of the gradient by three of its own root mean squares and 0.1, as Adam has averaged them.

    The gradients of the rule's parameters are clipped in place. The first step of each element is free.
    """
    for group in rule.param_groups:
        for parameter in group["params"]:
            moments = rule.state.get(parameter)
            if parameter.grad is None or not moments:
                continue
            mean_square = moments["exp_avg_sq"] / (1 - group["betas"][1] ** moments["step"])
            bound = NUM_DEVIATIONS * mean_square.sqrt() + SLACK
            parameter.grad.clamp_(-bound, bound)


Averaged = TypeVar("Averaged", bound=nn.Module)


class AveragedWeights(Generic[Averaged]):
    """Exponential moving average of a module's parameters, as a copy of the module with its current buffers.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``, with a decay in [0, 1), so that a short run's average
    forgets its initial weights.
    """

    def __init__(self, module: Averaged, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.num_updates = decay, 0

    def update(self, module: Averaged) -> None:
        """Average in the module's current parameters, and copy its buffers."""
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
