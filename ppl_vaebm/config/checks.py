"""Checks of options."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any


def require(condition: bool, field_name: str, expected: str, got: object) -> None:
    """Refuse a wrong value: a ValueError with the option, what is expected and what was got."""
    if not condition:
        raise ValueError(f"{field_name} must be {expected}, got {got!r}")


def require_finite(section: Any, prefix: str = "") -> None:
    """Check all numbers, of sections too: a checkpoint's configuration is JSON, which has no word for others."""
    for each in fields(section):
        flag, value = f"{prefix}{each.name.replace('_', '-')}", getattr(section, each.name)
        if is_dataclass(value):
            require_finite(value, f"{flag}.")
        for number in value if isinstance(value, tuple) else (value,):
            require(not isinstance(number, float) or math.isfinite(number), flag, "finite", value)


def require_loop(section: str, loop: Any) -> None:
    """Check what both training loops have."""
    positive = ("steps", "batch_size", "learning_rate", "grad_clip", "validate_every", "checkpoint_every", "log_every")
    for name in positive:
        flag = f"{section}.{name.replace('_', '-')}"
        require(getattr(loop, name) > 0, flag, "positive", getattr(loop, name))
    final = loop.final_learning_rate
    require(0 <= final <= loop.learning_rate, f"{section}.final-learning-rate", "in [0, learning-rate]", final)
    require(0 <= loop.ema_decay < 1, f"{section}.ema-decay", "in [0, 1)", loop.ema_decay)
