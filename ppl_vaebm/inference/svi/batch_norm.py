"""Statistics of the batch normalisations for prior samples.

In training they are statistics of posterior samples. Those of prior samples differ, above all at a temperature below 1,
so NVAE estimates them anew before it samples (Vahdat and Kautz 2020, appendix A).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_vaebm.models.nvae_cells import NORM_MOMENTUM, BatchNorm2d
from ppl_vaebm.models.vae import Generator, HierarchicalVAE
from ppl_vaebm.rng import stream

BATCH = 16  # samples at a time, as in NVAE


def norms_of(generator: Generator) -> dict[str, BatchNorm2d]:
    """Return the batch normalisations of a generator by their names in it."""
    return {name: module for name, module in generator.named_modules() if isinstance(module, BatchNorm2d)}


def prior_statistics(vae: HierarchicalVAE, temperature: float, num_batches: int, seed: int) -> dict[str, Tensor]:
    """Estimate the statistics of prior samples, the mean over batches of :data:`BATCH` of each batch's own.

    NVAE's code takes a moving average with weight 0.05 instead, which forgets all but the last batches. Returns mean
    and variance of every layer, by their names in the generator's state; empty without batch normalisation. The VAE is
    left as it was.
    """
    layers = norms_of(vae.model)
    before = {name: buffer.clone() for name, buffer in _buffers(layers).items()}
    like = next(vae.parameters())
    random = stream(seed, "prior statistics", device=like.device)
    try:
        for layer in layers.values():
            layer.train().reset_running_stats()
            layer.momentum = None  # the plain mean over batches
        for _ in range(num_batches if layers else 0):
            eps = {
                f"eps_{name}": temperature * torch.randn(BATCH, *shape, generator=random, device=like.device).to(like)
                for name, shape in vae.model.latent_shapes.items()
            }
            with torch.no_grad():
                vae.decode_noise(eps)
        return {name: buffer.clone() for name, buffer in _buffers(layers).items() if "num_batches" not in name}
    finally:
        for layer in layers.values():
            layer.train(vae.training)
            layer.momentum = NORM_MOMENTUM
        for name, buffer in _buffers(layers).items():
            buffer.copy_(before[name])


def _buffers(layers: dict[str, BatchNorm2d]) -> dict[str, Tensor]:
    return {f"{name}.{key}": buffer for name, layer in layers.items() for key, buffer in layer.named_buffers()}


def set_statistics(generator: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Put statistics that :func:`prior_statistics` returned into a generator."""
    buffers = dict(generator.named_buffers())
    for name, value in statistics.items():
        buffers[name].copy_(value)
