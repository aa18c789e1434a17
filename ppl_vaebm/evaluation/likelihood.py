"""The normalized log-likelihood of test data with its Monte Carlo errors, and scores of points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import random_subset
from ppl_vaebm.data.toys import gaussians25_log_prob
from ppl_vaebm.evaluation.sections import Arrays, Effort, Measured, Rows, Section, mean_value, random_order
from ppl_vaebm.inference.ebm.validation import data_latents
from ppl_vaebm.inference.likelihood import CERTIFIED_ESS, LogLikelihood, log_p, reference_energies
from ppl_vaebm.inference.log_z.base import LogZ, log_mean_exp
from ppl_vaebm.models.vaebm import has_discrete_x
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.loading import LoadedRun


class Terms(NamedTuple):
    """The terms of log h of the test data."""

    x: Tensor
    """Test points, ``(n, *event_shape)``."""
    log_p: LogLikelihood
    """Of each under the VAE."""
    energy: Tensor
    """E of each, ``(n,)``, float64, nats."""
    reference_energy: Tensor
    """E of VAE samples, ``(num_z_draws,)``, nats."""

    @property
    def log_z(self) -> LogZ:
        """Estimate log Z from the draws of the VAE."""
        return log_mean_exp(-self.reference_energy)


def likelihood_terms(loaded: LoadedRun, effort: Effort, seed: int) -> Terms:
    """Evaluate test points under the VAE and the energy, and VAE samples under the energy."""
    data, potential = loaded.data, loaded.potential
    test = random_subset(data.test, effort.num_test, stream(seed, "order", "test"))
    x = test.batch(torch.arange(len(test)), stream(seed, "dequantise", "test")).to(loaded.config.device)
    reference_energy = reference_energies(potential, stream(seed, "log_z", device=x.device), effort.num_z_draws)
    estimate = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), effort.num_importance)
    energy = data_energies(loaded, x, seed_for(seed, "posterior"))
    return Terms(x, estimate, energy, reference_energy)


def data_energies(loaded: LoadedRun, x: Tensor, seed: int) -> Tensor:
    """Evaluate the energy of data.

    An energy of x and z takes one draw of z from the guide for each point. Then ``log p - E`` bounds log h + log Z
    from below on average, if the guide is the posterior.

    Returns:
        ``(n,)``, float64, nats.
    """
    blocks = x.split(min(1_000, loaded.vaebm.vae.rows_per_block))
    parts = []
    with torch.no_grad():
        for block, rows in enumerate(blocks):
            z = data_latents(loaded.config, loaded.vaebm.vae, rows, seed_for(seed, block))
            parts.append(loaded.vaebm.energy(rows, z))
    return torch.cat(parts).double()


def likelihood(loaded: LoadedRun, effort: Effort, seed: int, terms: Terms | None = None) -> Rows:
    """Estimate log p, log Z and log h on test data; the default of the terms is :func:`likelihood_terms`.

    Standard errors are over test points and draws. ``log p`` is a lower bound in expectation.
    """
    data = loaded.data
    x, estimate, energy, _ = terms = terms or likelihood_terms(loaded, effort, seed)
    log_z = terms.log_z
    gain = -energy - log_z.value
    section: Rows = {
        "log p (VAE)": mean_value(estimate.value),
        "log h (VAEBM)": mean_value(estimate.value + gain, log_z.error),
        "log h - log p": mean_value(gain, log_z.error),
        "log Z": {"value": log_z.value, "error": log_z.error},
        "effective draws behind log Z": log_z.ess,
        "log Z certified": "yes" if log_z.ess >= CERTIFIED_ESS else f"no: fewer than {CERTIFIED_ESS:g} effective draws",
        "mean Monte Carlo error of log p per point": float(estimate.error.mean()),
    }
    section |= _bits(loaded, x, section, effort, seed)
    if data.max_log_density_nats is not None:
        config = loaded.config.data
        truth = gaussians25_log_prob(x.cpu(), config.spacing, config.std).to(x.device)
        section["entropy bound (mean log density of the data distribution)"] = data.max_log_density_nats
        section["the data distribution on these test points"] = mean_value(truth)
        section["KL(data, VAE), same test points"] = mean_value(truth - estimate.value)
        kl = mean_value(truth - estimate.value - gain, log_z.error)
        section["KL(data, VAEBM), same test points"] = kl
        # log p(data) as a control variate: most of log h's spread over test points is that of the points.
        bound_less_kl = data.max_log_density_nats - kl["value"]
        section["log h (VAEBM), as the bound less that KL"] = {"value": bound_less_kl, "error": kl["error"]}
    return section


def _bits(loaded: LoadedRun, x: Tensor, section: Rows, effort: Effort, seed: int) -> Rows:
    """Convert a likelihood to bits per dimension; where the decoder is discretised, add the VAE's discretised one."""
    data = loaded.data
    if not has_bits(loaded.config, data):
        return {}
    found: Rows = {}
    for name in ("log p (VAE)", "log h (VAEBM)"):
        nats = section[name]
        assert isinstance(nats, dict)
        found[f"{name}, bits per dimension"] = bits_per_dim(nats, data)
    if scores_levels(loaded.config):
        estimate = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), effort.num_importance, is_discretized=True)
        found["the VAE, discretised, bits per dimension"] = bits_per_dim(mean_value(estimate.value), data)
    return found


def has_bits(config: Config, data: Data) -> bool:
    """Say whether a likelihood in nats has an equivalent in bits per dimension.

    Points have no levels; and of binarised images only a discrete decoder's likelihood is that of levels.
    """
    return data.levels is not None and not data.noise_sd and (data.is_dequantized or has_discrete_x(config))


def scores_levels(config: Config) -> bool:
    """Return whether the decoder scores data by a discretised distribution that its samples do not have."""
    return config.model.kind == "nvae" and config.model.nvae.decoder.startswith("logistic")


def bits_per_dim(nats: Mapping[str, float], data: Data) -> dict[str, float]:
    """Convert the value and error of a mean log-likelihood per image into bits per dimension.

    For dequantised data it is an upper bound for the discretised ones, once ``log(2 / levels)`` per coordinate is added
    (Theis et al. 2016, arXiv:1511.01844, section 3.1). The uniform distribution has ``log2(levels)``.
    """
    assert data.levels is not None
    num = data.event_shape.numel()
    volume = num * math.log(2 / data.levels) if data.is_dequantized else 0.0
    scale = num * math.log(2)
    return {"value": -(nats["value"] + volume) / scale, "error": nats["error"] / scale}


SCORES = ("log h", "log p", "-E")


class Scores(NamedTuple):
    """What a VAEBM says of points, each ``(n,)``, float64, nats; higher is more likely."""

    log_p: Tensor
    """Under the VAE: a lower bound in expectation, by importance weights."""
    minus_energy: Tensor

    @property
    def log_h(self) -> Tensor:
        """Under the VAEBM, log Z left out."""
        return self.log_p + self.minus_energy

    def by_name(self) -> dict[str, Tensor]:
        """Return the scores by the names of :data:`SCORES`."""
        return dict(zip(SCORES, (self.log_h, self.log_p, self.minus_energy), strict=True))

    @property
    def num_not_finite(self) -> int:
        """Count the points whose log h is not a finite number."""
        return int((~self.log_h.isfinite()).sum())


def score(loaded: LoadedRun, x: Tensor, num_draws: int, seed: int) -> Scores:
    """Score points ``(n, *event_shape)``, with dequantisation noise if the data have it; the scores are on the CPU.

    Fewer draws of the guide per point give a looser bound, and so a lower log p.
    """
    x = x.to(loaded.config.device)
    density = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), num_draws).value
    energy = data_energies(loaded, x, seed_for(seed, "energy"))
    return Scores(density.double().cpu(), -energy.cpu())


def score_data(loaded: LoadedRun, part: str, effort: Effort, seed: int) -> Scores:
    """Score the first points of the part train or test in a random order."""
    split = {"train": loaded.data.train, "test": loaded.data.test}[part]
    indices = random_order(split, seed, part)[: effort.num_scored]
    x = split.batch(indices, stream(seed, "dequantise", "scored", part))
    return score(loaded, x, effort.num_score_draws, seed_for(seed, part))


def histograms(train: Scores, test: Scores, num_draws: int) -> Measured:
    """Compare the scores of training and test data, which differ if the model overfits.

    Each score has means, their difference, and the two-sample Kolmogorov-Smirnov statistic with its p-value.
    """
    columns: dict[str, Rows] = {}
    arrays: Arrays = {}
    for (name, of_train), of_test in zip(train.by_name().items(), test.by_name().values(), strict=True):
        columns[name] = _compared(of_train, of_test)
        arrays |= {f"train {name}": of_train.numpy(), f"test {name}": of_test.numpy()}
    num_train, num_test = (len(scores.log_p) for scores in (train, test))
    title = f"training and test data, {num_train} and {num_test} points, {num_draws} draws of z"
    return Measured([Section(title, columns)], arrays)


def _compared(train: Tensor, test: Tensor) -> Rows:
    num_bad = int((~train.isfinite()).sum() + (~test.isfinite()).sum())
    if num_bad:
        return {"none": f"{num_bad} of the scores are not finite"}
    found = stats.ks_2samp(train.numpy(), test.numpy())
    test_error = mean_value(test)["error"]
    return {
        "mean over training data (nats)": mean_value(train),
        "mean over test data (nats)": mean_value(test),
        "training less test (nats)": mean_value(train - test.mean(), test_error),
        "Kolmogorov-Smirnov statistic": float(found.statistic),
        "its p-value": float(found.pvalue),
    }
