"""What the entry points share, without torch: it is imported only once the options have been read."""

from __future__ import annotations

from typing import Annotated

import tyro

RunFolder = Annotated[str, tyro.conf.Positional]
"""The run's folder, the first argument of every command but fit."""


def positive(name: str, value: int) -> None:
    """Refuse a count below one.

    Raises:
        ValueError: naming the option.
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def set_threads(threads: int) -> None:
    """Set PyTorch's CPU threads; 0 leaves them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
