"""Golden numbers: two steps of every kernel from a fixed seed, float64.

``python tests/inference/golden_kernels.py`` writes golden_kernels.json beside this file. The numbers change
only with the numerics of a sampler, and then with a line in CHANGELOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias, get_args

import torch

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference.kernels import registry, targets
from ppl_vaebm.inference.kernels.base import Kernel, Potential, init_params

PATH = Path(__file__).with_suffix(".json")
SEED = 20_260_101
STEP_SIZE = 0.5

Numbers: TypeAlias = dict[str, list[dict[str, list[float]]]]
"""Kernel to steps to fields; a field of several columns is flattened."""


def all_kernels(potential: Potential) -> dict[str, Kernel]:
    """Build every kernel by name, and every integrator of those that have a choice."""
    built = {name: registry.build_kernel(KernelConfig(name, num_levels=2), potential) for name in get_args(KernelName)}
    for name in ("mala", "hmc", "chees"):
        built[f"{name} leapfrog"] = registry.build_kernel(KernelConfig(name, integrator="leapfrog"), potential)
    return built


def compute() -> Numbers:
    """Take two steps of every kernel.

    Returns:
        Position, potential and every field of the step's report, after each step.
    """
    # Nine normals at a time, or twelve for two chains of two levels: from 16 on torch draws them by another, vectorised
    # route.
    target = targets.ar1_gaussian(3)
    start = torch.tensor([[0.5, -0.5, 0.1], [1.5, 1.0, 2.0], [-2.0, 0.0, 1.0]], dtype=torch.float64)
    params = init_params(start, STEP_SIZE)
    numbers: Numbers = {}
    for name, kernel in all_kernels(target.potential).items():
        generator, state = torch.Generator().manual_seed(SEED), kernel.init(start[:2] if name == "tempered" else start)
        numbers[name] = []
        for _ in range(2):
            state, info = kernel.step(generator, state, params)
            fields = {"position": state.position, "potential": state.potential, **info._asdict()}
            numbers[name].append({field: value.flatten().tolist() for field, value in fields.items()})
    return numbers


if __name__ == "__main__":
    PATH.write_text(json.dumps(compute(), indent=1) + "\n")
