"""The numbers that stage 1 is judged by on its own: bounds on the likelihood of test data, and its draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_vaebm.evaluation import (
    Effort,
    Section,
    bits_per_dim,
    features,
    has_bits,
    has_labelled_images,
    mean_cell,
    mode_cells,
    whole,
)
from ppl_vaebm.features import load_or_train
from ppl_vaebm.fitted_vae import FittedVAE
from ppl_vaebm.inference.likelihood import elbo_rows, log_p
from ppl_vaebm.inference.vae_draws import prior_draws
from ppl_vaebm.metrics import frechet_distance
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import seed_for, stream

BLOCK = 500  # test points read at a time


def evaluate_vae(fitted: FittedVAE, effort: Effort, seed: int) -> dict[str, Section]:
    """Measure what can be measured of a VAE without an energy.

    Args:
        fitted: the VAE.
        effort: how much to spend; draws for log Z and lengths of chains are not used.
        seed: of all draws.

    Returns:
        Sections of named numbers: bounds always, with each set of batch statistics that the VAE has; modes where the
        data's are known; Frechet distances where the data are labelled images.
    """
    sections = {"stage 1, test data, training statistics": bounds(fitted, fitted.vae, effort, seed)}
    if fitted.prior_vae is None:
        sections = {"stage 1, test data": next(iter(sections.values()))}
    else:
        title = f"stage 1, test data, prior statistics at temperature {fitted.norm_temperature:g}"
        sections[title] = bounds(fitted, fitted.prior_vae, effort, seed)
    if fitted.data.modes is not None:
        x = prior_draws(fitted.sampler, effort.num_samples, seed_for(seed, "samples"))
        sections["modes: VAE"] = mode_cells(x, fitted.data)
    if has_labelled_images(fitted.data):
        sections |= frechet_of_vae(fitted, effort, seed)
    return sections


def bounds(fitted: FittedVAE, vae: HierarchicalVAE, effort: Effort, seed: int) -> Section:
    """Bound the likelihood of test data from below, by the decoder's law of levels where it has one.

    Args:
        fitted: where the data come from.
        vae: the VAE, with either statistics.
        effort: test points, and draws of the guide per point.
        seed: of the dequantisation and of the draws; two VAEs get the same.

    Returns:
        The ELBO, the importance-weighted bound and the KL of every group, with standard errors over test points.
    """
    elbos, bests, kls = [], [], []
    for block, x in enumerate(_test_blocks(fitted, effort.num_test, seed)):
        elbo, kl = elbo_rows(vae, x, seed_for(seed, "posterior", block))
        elbos.append(elbo)
        kls.append(kl)
        draws = seed_for(seed, "importance", block)
        bests.append(log_p(vae, x, draws, effort.num_importance, by_level=True).value)
    unit = "nats per image" if len(fitted.data.event_shape) == 3 else "nats per point"
    nats = {
        "ELBO": mean_cell(torch.cat(elbos)),
        f"importance-weighted bound, {effort.num_importance} draws": mean_cell(torch.cat(bests)),
    }
    section: Section = {f"{name} ({unit})": value for name, value in nats.items()}
    if has_bits(fitted.config, fitted.data):
        section |= {f"{name} (bits per dimension)": bits_per_dim(value, fitted.data) for name, value in nats.items()}
    for name in vae.model.latent_shapes:
        section[f"KL of {name} ({unit})"] = mean_cell(torch.cat([kl[name] for kl in kls]))
    return section


def _test_blocks(fitted: FittedVAE, limit: int, seed: int) -> Iterator[Tensor]:
    noise, num = stream(seed, "dequantise", "test"), min(limit, len(fitted.data.test))
    for indices in torch.arange(num).split(BLOCK):
        yield fitted.data.test.batch(indices, noise).to(fitted.config.device)


def frechet_of_vae(fitted: FittedVAE, effort: Effort, seed: int) -> dict[str, Section]:
    """Measure Frechet distances of draws of the VAE to the training data, as :func:`~ppl_vaebm.evaluation.frechet`.

    Args:
        fitted: the VAE, on labelled images.
        effort: number of samples.
        seed: of all draws.

    Returns:
        One section: held-out data, draws at temperature 1, and with the statistics of prior draws, where there are any,
        draws at temperature 1 and at that of the statistics.
    """
    data = fitted.data
    net = load_or_train(fitted.run.path / "features.safetensors", data, fitted.config.seed)
    reference = features(net, whole(data, "train", seed))

    def distance(x: Tensor) -> float:
        return frechet_distance(features(net, x), reference)

    def of_prior(vae: HierarchicalVAE, temperature: float) -> float:
        return distance(prior_draws(vae, effort.num_samples, seed_for(seed, "samples"), temperature))

    section: Section = {f"held-out data, {len(data.test)} images": distance(whole(data, "test", seed))}
    section["VAE, temperature 1"] = of_prior(fitted.vae, 1.0)
    if fitted.prior_vae is not None and fitted.norm_temperature is not None:
        for temperature in sorted({1.0, fitted.norm_temperature}, reverse=True):
            name = f"VAE, temperature {temperature:g}, prior statistics at {fitted.norm_temperature:g}"
            section[name] = of_prior(fitted.prior_vae, temperature)
    return {f"Frechet distance [{net.name}], {effort.num_samples} samples": section}
