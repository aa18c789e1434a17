"""The light energy network against the standard one of the same width: energies with their gradient, per second.

Both on images of 32 x 32 pixels, in two sizes: the blocks of `energy.layout halving` with a stride in the stem at 16
channels, and those of `energy.layout cifar10` at 128. Two rows more say what the standard blocks owe to how they are
computed, which changes nothing but the rounding, and that is checked first: without folding the mean over 2x2 pixels
into the convolution before it, and without that and with contiguous tensors, as PyTorch's layers would do it.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.light_energy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.common import machine, parser_of, rates, ratio, write
from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.models import nvae_cells
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.energy_nets import PooledConv2d
from ppl_vaebm.models.nvae_cells import Conv2d
from ppl_vaebm.rng import global_rng, stream

# Configuration, channels of the images, and calls that one timing takes.
SIZES = {
    "halving, 16 channels": (EnergyConfig(layout="halving", stem_stride=2, channels=16), 1, 16),
    "cifar10, 128 channels": (EnergyConfig(layout="cifar10", channels=128), 3, 1),
}
BATCH_SIZES = (32, 64)
NUM_ROUNDS = 15
TOLERANCE = 1e-4  # of values in float32, relative


@contextmanager
def computed_as_written(is_contiguous: bool) -> Iterator[None]:
    """Let the blocks take the mean over pixels after the convolution, and compute in PyTorch's default format."""
    folded, before = PooledConv2d.forward, nvae_cells.MEMORY_FORMAT

    def forward(conv: PooledConv2d, x: Tensor) -> Tensor:
        return avg_pool2d(Conv2d.forward(conv, x), 2)

    PooledConv2d.forward = forward  # type: ignore[method-assign, assignment]
    if is_contiguous:
        nvae_cells.MEMORY_FORMAT = torch.contiguous_format
    try:
        yield
    finally:
        PooledConv2d.forward, nvae_cells.MEMORY_FORMAT = folded, before  # type: ignore[method-assign]


def new_energy(config: EnergyConfig, num_colours: int) -> Energy:
    """Make an energy with frozen weights, as kernels have it."""
    with global_rng(0):
        return build_energy(config, torch.Size([num_colours, 32, 32])).requires_grad_(False)


def task(energy: Energy, x: Tensor, num_calls: int, context: Callable[[], Any] | None = None) -> Callable[[], int]:
    """Make a task that evaluates an energy and its gradient by x, and counts images."""

    def evaluate() -> int:
        for _ in range(num_calls):
            torch.autograd.grad(energy(x).sum(), x)
        return num_calls * len(x)

    def run() -> int:
        if context is None:
            return evaluate()
        with context():
            return evaluate()

    return run


def main() -> None:
    """Run the benchmark."""
    parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(f"{machine()['processor']}, one thread; median of {NUM_ROUNDS} rounds of processor time")
    for size, (config, num_colours, num_calls) in SIZES.items():
        standard = new_energy(config, num_colours)
        light = new_energy(replace(config, block="depthwise"), num_colours)
        counts = {
            name: sum(p.numel() for p in net.parameters())
            for name, net in zip(("standard", "light"), (standard, light), strict=True)
        }
        results[size] = {"num_parameters": counts}
        for batch_size in BATCH_SIZES:
            x = torch.randn(batch_size, num_colours, 32, 32, generator=stream(0, "benchmark")).requires_grad_()
            contexts = {
                "standard, mean after the convolution": lambda: computed_as_written(False),
                "standard, so and contiguous": lambda: computed_as_written(True),
            }
            for context in contexts.values():
                expected = standard(x)
                with context():
                    assert (standard(x) - expected).abs().max() < TOLERANCE * expected.abs().max()
            tasks = {"standard": task(standard, x, num_calls), "light": task(light, x, num_calls)}
            tasks |= {name: task(standard, x, num_calls, context) for name, context in contexts.items()}
            found = rates(tasks, NUM_ROUNDS)
            ratios = {name: ratio(found[name], found["standard"]) for name in tasks}
            middle = {name: float(torch.tensor(found[name]).median()) for name in tasks}
            print(
                f"\n{size}, batch {batch_size}; parameters: standard {counts['standard']:,}, light {counts['light']:,}"
            )
            for name in tasks:
                print(f"  {name:38}{middle[name]:10.0f} energies with gradient/s{ratios[name]:8.2f} of the standard's")
            results[size][f"batch {batch_size}"] = {"per_second": found, "over_standard": ratios}
    write("light_energy", results)


if __name__ == "__main__":
    main()
