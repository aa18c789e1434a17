"""What the entry points share, without torch: it is imported only once the options have been read."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class ChainOptions:
    """Options of the commands that run long chains."""

    run: RunFolder
    """Folder of the run."""
    num_chains: int = 16
    """Chains, from fresh noise; Pyro's run one after another. R-hat needs 4 or more to see modes that some miss."""
    num_warmup: int = 200
    """Steps of warm-up, in which the step size is tuned; counted and timed apart."""
    num_evals: int = 6_000
    """Evaluations of the energy, most with its gradient, per chain for the draws."""
    seed: int = 0
    """Seed of starts and chains."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("num_chains", "num_warmup", "num_evals"):
            positive(name.replace("_", "-"), getattr(self, name))


def set_threads(threads: int) -> None:
    """Set PyTorch's CPU threads; 0 leaves them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
