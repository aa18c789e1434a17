"""A training step of NVAE through Pyro against the same loss written by hand, on the recipe cifar10-small.

``OMP_NUM_THREADS=1 python -m benchmarks.pyro_overhead``. Three ways to one loss and its gradient:

- by hand: one walk down the hierarchy with tensors only, no distribution object and no handler;
- one walk: ``BalancedELBO``, in which Pyro traces model and guide in one walk (what stage svi runs);
- two walks: Pyro's own ``TraceMeanField_ELBO``, which traces the guide and then replays the model.

The limit is the loss by hand. Whether all give the same number is checked first. A fourth row runs the one walk with
contiguous tensors, to show what the memory format of the convolutions is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from benchmarks.common import machine, parser_of, rates, ratio, write
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.config.recipes import load_yaml, recipe_path
from ppl_vaebm.inference.elbo import BalancedELBO
from ppl_vaebm.models import nvae_cells
from ppl_vaebm.models.decoders import DecodedLogistics, positive_scale, soft_clamp
from ppl_vaebm.models.nvae import NVAEGuide
from ppl_vaebm.models.vae import HierarchicalVAE, Prior
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.rng import global_rng, stream

NUM_ROUNDS = 9
BATCH_SIZES = (8, 32)
EVENT_SHAPE, LEVELS = torch.Size([3, 32, 32]), 256


def loss_by_hand(vae: HierarchicalVAE, x: Tensor) -> Tensor:
    """Compute minus the ELBO of a batch, summed over it, with nothing but tensors."""
    guide = vae.guide
    assert isinstance(guide, NVAEGuide)
    features, kl = guide.encode(x), []
    num_below = len(guide.combiners)

    def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
        seen, index = features[name], num_below - int(name.removeprefix("z_")) + 1
        if index < num_below:
            seen = seen + guide.combiners[index](state)
        raw_loc, raw_scale = guide.heads[name](seen).chunk(2, dim=1)
        assert prior.raw is not None
        loc, scale = soft_clamp(raw_loc + prior.raw[0]), positive_scale(raw_scale + prior.raw[1])
        ratio_, shift = scale / prior.scale, (loc - prior.loc) / prior.scale
        kl.append((0.5 * (ratio_.square() + shift.square() - 1) - ratio_.log()).sum())
        return loc + scale * torch.randn(scale.shape)  # randn_like follows the memory format

    decoded = vae.model.decode(vae.model.walk(choose, len(x))[1])
    assert isinstance(decoded, DecodedLogistics)
    return torch.stack(kl).sum() - decoded.discretized().log_prob(x).sum()


def task(vae: HierarchicalVAE, loss: Callable[[], Any], batch_size: int) -> Callable[[], int]:
    """Make a task that differentiates a loss, and counts images."""

    def run() -> int:
        with global_rng(0), pyro.validation_enabled(False):
            vae.zero_grad(set_to_none=True)
            loss().backward()
        return batch_size

    return run


def contiguous(loss: Callable[[], Any]) -> Callable[[], Any]:
    """Make a loss whose convolutions compute in PyTorch's default memory format, in its backward pass too."""

    def run() -> Any:
        before, nvae_cells.MEMORY_FORMAT = nvae_cells.MEMORY_FORMAT, torch.contiguous_format
        try:
            return loss()
        finally:
            nvae_cells.MEMORY_FORMAT = before

    return run


def main() -> None:
    """Run the benchmark."""
    parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    config = from_dict(load_yaml(recipe_path("cifar10-small")), "cifar10-small").model
    with global_rng(0):
        vae = build_vae(config, EVENT_SHAPE, LEVELS).train()
    one_walk, two_walks = BalancedELBO()(vae.model, vae.guide), TraceMeanField_ELBO()(vae.model, vae.guide)
    results: dict[str, Any] = {"num_parameters": sum(p.numel() for p in vae.parameters())}
    print(f"cifar10-small, {results['num_parameters']:,} parameters; {machine()['processor']}, one thread")
    for batch_size in BATCH_SIZES:
        x = 2 * torch.rand(batch_size, *EVENT_SHAPE, generator=stream(0, "benchmark")) - 1
        losses: dict[str, Callable[[], Any]] = {
            "by hand": partial(loss_by_hand, vae, x),
            "one walk": partial(one_walk, x),
            "two walks": partial(two_walks, x),
            "one walk, contiguous": contiguous(partial(one_walk, x)),
        }
        values = []
        for loss in losses.values():
            with global_rng(0), torch.no_grad():
                values.append(float(loss()))
        assert max(values) - min(values) < 1e-5 * abs(values[0]), values
        found = rates({name: task(vae, loss, batch_size) for name, loss in losses.items()}, NUM_ROUNDS)
        ratios = {name: ratio(found["by hand"], found[name]) for name in losses}
        print(f"\nbatch {batch_size}: images/s by hand {sorted(found['by hand'])[NUM_ROUNDS // 2]:.1f}")
        for name, value in ratios.items():
            print(f"  {name:<22} {value:.3f} of the time by hand")
        results[f"batch {batch_size}"] = {"images_per_second": found, "time_over_by_hand": ratios, "losses": values}
    write("pyro_overhead", results)


if __name__ == "__main__":
    main()
