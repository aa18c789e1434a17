"""VAE samples, reconstructions and latent traversals.

Each image has random streams of its own, so that it depends neither on the number of images nor on the size of a pass.
A temperature multiplies the noise of the latents, as NVAE multiplies their standard deviations (Vahdat and Kautz 2020,
section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.models.vae import HierarchicalVAE, Prior
from ppl_vaebm.rng import global_rng, seed_for, stream

Noise = dict[str, Tensor]


def vae_samples(
    vae: HierarchicalVAE, num: int, seed: int, temperature: float = 1.0, *, is_mean: bool = False
) -> Tensor:
    """Draw latents from the prior of a VAE in evaluation mode, and then x, or the mean of x given the latents.

    The noise of a seed is the same for every temperature, which is a factor on that of the latents, not on that of x.
    Returns ``(num, *event_shape)``, on the CPU.
    """
    blocks = torch.arange(num).split(vae.rows_per_block)
    return _decoded(vae, (tempered(image_noise(vae, rows.tolist(), seed), temperature) for rows in blocks), is_mean)


def image_noise(vae: HierarchicalVAE, rows: Iterable[int], seed: int) -> Noise:
    """Draw every noise of the images with these numbers, one row per image, on the VAE's device."""
    packing = Packing(vae.noise_shapes)
    flat = [torch.randn(packing.dim, generator=stream(seed, "image", row)) for row in rows]
    return packing.unravel(torch.stack(flat).to(next(vae.parameters())))


def tempered(noise: Mapping[str, Tensor], temperature: float) -> Noise:
    """Multiply the noise of every latent by a temperature; that of x stays."""
    return {name: value if name == "eps_x" else temperature * value for name, value in noise.items()}


def _decoded(vae: HierarchicalVAE, blocks: Iterable[Noise], is_mean: bool) -> Tensor:
    """Decode noise block by block to x, or to the mean of x given the latents, on the CPU."""
    parts = []
    with torch.no_grad():
        for noise in blocks:
            decoded, _ = vae.decode_noise(noise)
            parts.append((decoded.mean() if is_mean else decoded.transport(noise["eps_x"])).cpu())
    return torch.cat(parts)


def reconstructions(vae: HierarchicalVAE, x: Tensor, seed: int) -> Tensor:
    """Decode one posterior sample of each data point to its mean, by a VAE in evaluation mode.

    x is ``(n, *event_shape)``, on any device; so is the result, on the CPU.
    """
    like = next(vae.parameters())
    with torch.no_grad(), global_rng(seed_for(seed, "posterior")):
        return torch.cat([_reconstructed(vae, rows.to(like)).cpu() for rows in x.split(vae.rows_per_block)])


def _reconstructed(vae: HierarchicalVAE, x: Tensor) -> Tensor:
    features = vae.guide.encode(x)

    def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
        z: Tensor = vae.guide.posterior(name, prior, features[name], state).sample()
        return z

    mean: Tensor = vae.model.decode(vae.model.walk(choose, len(x))[1]).mean()
    return mean


def rotated(noise: Mapping[str, Tensor], site: str, direction: Tensor, angles: Tensor) -> Noise:
    """Rotate one noise of n images towards a direction of its event shape by k angles, radians; keep all others.

    ``eps cos(a) + direction sin(a)`` is standard normal at every angle if both are, so that the decoder gets noise like
    that of its training; on a straight line it would not. Returns ``n * k`` rows, those of one image together.
    """
    num = len(noise[site])
    repeated = {name: value.repeat_interleave(len(angles), 0) for name, value in noise.items()}
    a = angles.to(direction).repeat(num).reshape(-1, *[1] * direction.dim())
    return {**repeated, site: a.cos() * repeated[site] + a.sin() * direction}


def traversal(
    vae: HierarchicalVAE, group: str, num: int, seed: int, angles: Tensor, temperature: float = 1.0
) -> Tensor:
    """Change the noise of one latent group of VAE samples step by step, and keep all other noises.

    The images are those of :func:`vae_samples`, and all change in the same direction. Groups below change too, for
    their priors depend on that group. Returns the decoder's means at k angles, radians, ``(num, k, *event_shape)``, on
    the CPU.
    """
    noise = image_noise(vae, range(num), seed)
    site = f"eps_{group}"
    direction = torch.randn(noise[site].shape[1:], generator=stream(seed, "direction", group)).to(noise[site])
    turned = tempered(rotated(noise, site, direction, angles), temperature)
    blocks = zip(*(value.split(vae.rows_per_block) for value in turned.values()), strict=True)
    x = _decoded(vae, (dict(zip(turned, block, strict=True)) for block in blocks), is_mean=True)
    return x.reshape(num, len(angles), *x.shape[1:])
