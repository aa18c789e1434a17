"""Evaluation of a VAE without an energy: bounds on the likelihood of test data, and metrics of its samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.splits import random_subset
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.evaluation import NO_NETWORK, Plan, judge_of
from ppl_vaebm.evaluation.image_metrics import Judge, class_columns, metric_arrays, metric_rows, metric_section, remarks
from ppl_vaebm.evaluation.likelihood import bits_per_dim, has_bits
from ppl_vaebm.evaluation.samples import data_mode_rows
from ppl_vaebm.evaluation.sections import Effort, Measured, Rows, Section, mean_value
from ppl_vaebm.inference.likelihood import elbo_rows, log_p
from ppl_vaebm.inference.vae_samples import vae_samples
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.loading import FittedVAE

BLOCK = 500  # test points read at a time
VAE_PARTS: tuple[Part, ...] = ("likelihood", "samples")
"""Parts that do not need an energy."""


def evaluate_vae(fitted: FittedVAE, plan: Plan) -> Iterator[tuple[Part, Measured]]:
    """Measure the parts of a plan, and yield each with its name.

    The bounds have a column for each set of batch statistics. Samples have modes where the data's are known, and
    metrics where the data are images.

    Raises:
        InputError: a part needs an energy, or as :func:`~ppl_vaebm.evaluation.evaluation.judge_of`.
    """
    refused = [part for part in plan.parts if part not in VAE_PARTS]
    if refused:
        raise InputError(
            f"of stage svi the parts {' and '.join(VAE_PARTS)} can be measured, and {', '.join(refused)} not; "
            "leave the others out of --only"
        )
    # Before the bounds, which are slow: a file may be missing.
    judge = judge_of(fitted.run, fitted.data, plan, fitted.config.seed, fitted.config.device)
    for part in plan.parts:
        yield part, _bounds(fitted, plan) if part == "likelihood" else _samples(fitted, plan, judge)


def _bounds(fitted: FittedVAE, plan: Plan) -> Measured:
    section = bounds(fitted, fitted.vae, plan.effort, plan.seed)
    columns = {"": section}
    if fitted.prior_vae is not None:
        other = bounds(fitted, fitted.prior_vae, plan.effort, plan.seed)
        columns = {
            "training statistics": section,
            f"prior statistics at temperature {fitted.norm_temperature:g}": other,
        }
    return Measured([Section("stage 1, test data", columns)], {})


def bounds(fitted: FittedVAE, vae: HierarchicalVAE, effort: Effort, seed: int) -> Rows:
    """Bound the likelihood of test data from below, discretised where the decoder is, with standard errors over points.

    Args:
        vae: with either batch statistics; VAEs with the same seed get the same test points and draws.

    Returns:
        The ELBO, the importance-weighted bound and the KL of each latent group.
    """
    elbos, bests, kls = [], [], []
    for block, x in enumerate(_test_blocks(fitted, effort.num_test, seed)):
        elbo, kl = elbo_rows(vae, x, seed_for(seed, "posterior", block))
        elbos.append(elbo)
        kls.append(kl)
        draws = seed_for(seed, "importance", block)
        bests.append(log_p(vae, x, draws, effort.num_importance, is_discretized=True).value)
    unit = "nats per image" if len(fitted.data.event_shape) == 3 else "nats per point"
    nats = {
        "ELBO": mean_value(torch.cat(elbos)),
        f"importance-weighted bound, {effort.num_importance} draws": mean_value(torch.cat(bests)),
    }
    section: Rows = {f"{name} ({unit})": value for name, value in nats.items()}
    if has_bits(fitted.config, fitted.data):
        section |= {f"{name} (bits per dimension)": bits_per_dim(value, fitted.data) for name, value in nats.items()}
    for name in vae.model.latent_shapes:
        section[f"KL of {name} ({unit})"] = mean_value(torch.cat([kl[name] for kl in kls]))
    return section


def _test_blocks(fitted: FittedVAE, limit: int, seed: int) -> Iterator[Tensor]:
    noise = stream(seed, "dequantise", "test")
    test = random_subset(fitted.data.test, limit, stream(seed, "order", "test"))
    for indices in torch.arange(len(test)).split(BLOCK):
        yield test.batch(indices, noise).to(fitted.config.device)


def _samples(fitted: FittedVAE, plan: Plan, judge: Judge | None) -> Measured:
    num, draws = plan.effort.num_samples, seed_for(plan.seed, "samples")
    if fitted.data.modes is not None:
        modes = data_mode_rows(vae_samples(fitted.sampler, num, draws), fitted.data)
        return Measured([Section("modes", {"VAE": modes})], {})
    if len(fitted.data.event_shape) != 3:
        return Measured([], {})
    if judge is None:
        return Measured([NO_NETWORK], {})
    sets = {
        name: judge.describe(vae_samples(vae, num, draws, temperature))
        for name, (vae, temperature) in _samplers(fitted).items()
    }
    rows = metric_rows(judge, sets, num)
    sections = [
        metric_section(judge, rows, num, class_columns(judge, sets, num)),
        remarks(judge, next(iter(sets.values())), num),
    ]
    return Measured(sections, metric_arrays(rows, net=judge.net.name, num=num))


def _samplers(fitted: FittedVAE) -> dict[str, tuple[HierarchicalVAE, float]]:
    """Return VAEs and temperatures by name: temperature 1, with prior statistics also the temperature of these."""
    found = {"VAE, temperature 1": (fitted.vae, 1.0)}
    if fitted.prior_vae is not None and fitted.norm_temperature is not None:
        for temperature in sorted({1.0, fitted.norm_temperature}, reverse=True):
            name = f"VAE, temperature {temperature:g}, prior statistics at {fitted.norm_temperature:g}"
            found[name] = (fitted.prior_vae, temperature)
    return found
