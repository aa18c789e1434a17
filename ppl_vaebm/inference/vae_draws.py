"""Draws of a VAE to look at and to measure: from its prior, from the posterior of data, along one latent group.

Every image has random streams of its own, so image i depends neither on how many are drawn nor on how many fit in one
pass. A temperature t multiplies the noise of the latents, as NVAE multiplies their standard deviations (Vahdat and
Kautz 2020, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.models.decoders import Decoded
from ppl_vaebm.models.vae import HierarchicalVAE, Prior
from ppl_vaebm.rng import global_rng, seed_for, stream

Noise = dict[str, Tensor]


def prior_noise(vae: HierarchicalVAE, rows: Iterable[int], seed: int) -> Noise:
    """Draw every noise of some images.

    Args:
        vae: the VAE.
        rows: numbers of the images.
        seed: of the draws.

    Returns:
        Standard normal noise with the shapes of ``vae.noise_shapes``, one row per image, on the VAE's device.
    """
    packing = Packing(vae.noise_shapes)
    flat = [torch.randn(packing.dim, generator=stream(seed, "image", row)) for row in rows]
    return packing.unravel(torch.stack(flat).to(next(vae.parameters())))


def tempered(noise: Mapping[str, Tensor], temperature: float) -> Noise:
    """Multiply the noise of every latent by a temperature; that of x stays."""
    return {name: value if name == "eps_x" else temperature * value for name, value in noise.items()}


def prior_means(vae: HierarchicalVAE, num: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Decode draws of the prior to the decoder's means.

    Args:
        vae: the VAE, in evaluation mode.
        num: images.
        seed: of the noise, which is the same for every temperature.
        temperature: factor on the noise of the latents.

    Returns:
        ``(num, *event_shape)``, on the CPU.
    """
    return _drawn(vae, num, seed, temperature, lambda decoded, noise: decoded.mean())


def prior_draws(vae: HierarchicalVAE, num: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Draw x: latents from the prior, then x given the latents.

    Args:
        vae: the VAE, in evaluation mode.
        num: draws.
        seed: of the noise.
        temperature: factor on the noise of the latents, not on that of x.

    Returns:
        ``(num, *event_shape)``, on the CPU.
    """
    return _drawn(vae, num, seed, temperature, lambda decoded, noise: decoded.transport(noise["eps_x"]))


def _drawn(
    vae: HierarchicalVAE, num: int, seed: int, temperature: float, look: Callable[[Decoded, Noise], Tensor]
) -> Tensor:
    blocks = (tempered(prior_noise(vae, rows, seed), temperature) for rows in _passes(vae, num))
    return _decoded(vae, blocks, look)


def _passes(vae: HierarchicalVAE, num: int) -> Iterator[range]:
    for start in range(0, num, vae.rows_per_block):
        yield range(start, min(num, start + vae.rows_per_block))


def _decoded(vae: HierarchicalVAE, blocks: Iterable[Noise], look: Callable[[Decoded, Noise], Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([look(vae.decode_noise(noise)[0], noise).cpu() for noise in blocks])


def reconstructions(vae: HierarchicalVAE, x: Tensor, seed: int) -> Tensor:
    """Send data through one draw of their posterior and back.

    Args:
        vae: the VAE, in evaluation mode.
        x: ``(n, *event_shape)``, on any device.
        seed: of the draws.

    Returns:
        The decoder's means, ``(n, *event_shape)``, on the CPU.
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
    """Turn one noise towards a direction, and keep all others.

    ``eps cos(a) + direction sin(a)`` is standard normal at every angle if both are, so that the rotation does not leave
    what the decoder knows; a straight line would.

    Args:
        noise: of n images.
        site: which noise to turn.
        direction: of the noise's event shape.
        angles: ``(k,)``, radians; at 0 nothing changes.

    Returns:
        Noise of ``n * k`` images, those of one image together.
    """
    num = len(noise[site])
    repeated = {name: value.repeat_interleave(len(angles), 0) for name, value in noise.items()}
    a = angles.to(direction).repeat(num).reshape(-1, *[1] * direction.dim())
    return {**repeated, site: a.cos() * repeated[site] + a.sin() * direction}


def traversal(
    vae: HierarchicalVAE, group: str, num: int, seed: int, angles: Tensor, temperature: float = 1.0
) -> Tensor:
    """Change one latent group of draws of the prior step by step, and leave all others.

    Groups below follow the one that moves, for their priors depend on it; it is their noise that stays.

    Args:
        vae: the VAE, in evaluation mode.
        group: site of the latent group.
        num: images, those of :func:`prior_means`.
        seed: of the noise, and of the direction, which all images share.
        angles: ``(k,)``, radians.
        temperature: factor on the noise of the latents.

    Returns:
        The decoder's means, ``(num, k, *event_shape)``, on the CPU.
    """
    noise = prior_noise(vae, range(num), seed)
    site = f"eps_{group}"
    direction = torch.randn(noise[site].shape[1:], generator=stream(seed, "direction", group)).to(noise[site])
    turned = tempered(rotated(noise, site, direction, angles), temperature)
    blocks = (
        {name: value[rows.start : rows.stop] for name, value in turned.items()}
        for rows in _passes(vae, num * len(angles))
    )
    x = _decoded(vae, blocks, lambda decoded, noise: decoded.mean())
    return x.reshape(num, len(angles), *x.shape[1:])
