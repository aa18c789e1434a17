"""The numbers that a fitted VAEBM is judged by, each with its Monte Carlo error where it has one.

A sample's look does not show whether the density is right: a short-run sampler can fill every mode
while the density that it was trained with is far worse than the VAE's. So the normalised log-likelihood
and draws that owe nothing to a chain stand first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.config import Config
from ppl_vaebm.data import Data, gaussians25_log_prob
from ppl_vaebm.features import Classifier, load_or_train
from ppl_vaebm.inference.ebm import has_discrete_x
from ppl_vaebm.inference.likelihood import (
    CERTIFIED_ESS,
    LogLikelihood,
    RejectionError,
    exact_draws,
    log_p,
    reference_energies,
)
from ppl_vaebm.inference.log_z import LogZ, log_mean_exp
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
from ppl_vaebm.loading import LoadedRun
from ppl_vaebm.metrics import frechet_distance, mode_statistics
from ppl_vaebm.rng import seed_for, stream

Cell = float | int | str | dict[str, float]
Section = dict[str, Cell]


class Effort(NamedTuple):
    """How much to spend."""

    num_test: int
    """Test points for the likelihood."""
    num_importance: int
    """Draws of the guide per test point."""
    num_z_draws: int
    """Draws of the VAE for log Z."""
    num_samples: int
    """Samples for the metrics of samples."""
    steps: Sequence[int]
    """Chain lengths from fresh noise at which the Frechet distance is taken."""


class Terms(NamedTuple):
    """What log h of the test data is made of."""

    x: Tensor
    """Test points, ``(n, *event_shape)``."""
    log_p: LogLikelihood
    """Of each under the VAE."""
    energy: Tensor
    """E of each, ``(n,)``, float64, nats."""
    reference_energy: Tensor
    """E of draws of the VAE, ``(num_z_draws,)``, nats."""

    @property
    def log_z(self) -> LogZ:
        """Estimate log Z from the draws of the VAE."""
        return log_mean_exp(-self.reference_energy)


def likelihood_terms(loaded: LoadedRun, effort: Effort, seed: int) -> Terms:
    """Evaluate test points under the VAE and the energy, and draws of the VAE under the energy.

    Args:
        loaded: the fitted VAEBM.
        effort: test points and draws.
        seed: of all draws.

    Returns:
        The terms.
    """
    data, potential = loaded.data, loaded.potential
    num = min(effort.num_test, len(data.test))
    x = data.test.batch(torch.arange(num), stream(seed, "dequantise", "test")).to(loaded.config.device)
    reference_energy = reference_energies(potential, stream(seed, "log_z", device=x.device), effort.num_z_draws)
    estimate = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), effort.num_importance)
    with torch.no_grad():
        energy = torch.cat([loaded.vaebm.energy(rows) for rows in x.split(1_000)]).double()
    return Terms(x, estimate, energy, reference_energy)


def evaluate(loaded: LoadedRun, effort: Effort, seed: int, terms: Terms | None = None) -> dict[str, Section]:
    """Measure what can be measured on a run's data.

    Args:
        loaded: the fitted VAEBM.
        effort: how much to spend.
        seed: of all draws.
        terms: of :func:`likelihood_terms`, where they are there already.

    Returns:
        Sections of named numbers: the likelihood always; modes where the data's are known; Frechet distances where
        the data are labelled images.
    """
    sections = {"log-likelihood of test data (nats per point)": likelihood(loaded, effort, seed, terms)}
    if loaded.data.modes is not None:
        sections |= modes(loaded, effort, seed)
    if has_labelled_images(loaded.data):
        sections |= frechet(loaded, effort, seed)
    return sections


def has_labelled_images(data: Data) -> bool:
    """Say whether the data can train the classifier of the Frechet distances."""
    return data.train.labels is not None and len(data.event_shape) == 3


def likelihood(loaded: LoadedRun, effort: Effort, seed: int, terms: Terms | None = None) -> Section:
    """Estimate log p, log Z and log h on test data.

    Args:
        loaded: the fitted VAEBM.
        effort: test points and draws.
        seed: of all draws.
        terms: of :func:`likelihood_terms`, where they are there already.

    Returns:
        The numbers, with standard errors over test points and draws. ``log p`` is a lower bound in expectation.
    """
    data = loaded.data
    x, estimate, energy, _ = terms = terms or likelihood_terms(loaded, effort, seed)
    log_z = terms.log_z
    gain = -energy - log_z.value
    section: Section = {
        "log p (VAE)": mean_cell(estimate.value),
        "log h (VAEBM)": mean_cell(estimate.value + gain, log_z.error),
        "log h - log p": mean_cell(gain, log_z.error),
        "log Z": {"value": log_z.value, "error": log_z.error},
        "effective draws behind log Z": log_z.ess,
        "log Z certified": "yes" if log_z.ess >= CERTIFIED_ESS else f"no: fewer than {CERTIFIED_ESS:g} effective draws",
        "mean Monte Carlo error of log p per point": float(estimate.error.mean()),
    }
    section |= _bits(loaded, x, section, effort, seed)
    if data.max_log_density_nats is not None:
        config = loaded.config.data
        truth = gaussians25_log_prob(x.cpu(), config.spacing, config.std).to(x.device)
        section["entropy bound (mean log density of the data's own law)"] = data.max_log_density_nats
        section["the data's own law on these test points"] = mean_cell(truth)
        section["KL(data, VAE), same test points"] = mean_cell(truth - estimate.value)
        kl = mean_cell(truth - estimate.value - gain, log_z.error)
        section["KL(data, VAEBM), same test points"] = kl
        # The data's own law as a control variate: most of log h's spread over test points is that of the points.
        bound_less_kl = data.max_log_density_nats - kl["value"]
        section["log h (VAEBM), as the bound less that KL"] = {"value": bound_less_kl, "error": kl["error"]}
    return section


def _bits(loaded: LoadedRun, x: Tensor, section: Section, effort: Effort, seed: int) -> Section:
    """Convert a likelihood to bits per dimension; where the decoder scores levels, add the VAE's by that law."""
    data = loaded.data
    if not has_bits(loaded.config, data):
        return {}
    found: Section = {}
    for name in ("log p (VAE)", "log h (VAEBM)"):
        nats = section[name]
        assert isinstance(nats, dict)
        found[f"{name}, bits per dimension"] = bits_per_dim(nats, data)
    if scores_levels(loaded.config):
        by_level = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), effort.num_importance, by_level=True)
        found["the VAE by level, bits per dimension"] = bits_per_dim(mean_cell(by_level.value), data)
    return found


def has_bits(config: Config, data: Data) -> bool:
    """Say whether a likelihood in nats has an equivalent in bits per dimension.

    Points have no levels; and of binarised images only a discrete decoder's likelihood is that of levels.
    """
    return data.levels is not None and (data.is_dequantized or has_discrete_x(config))


def scores_levels(config: Config) -> bool:
    """Say whether the decoder scores data by a law of levels that its draws do not have."""
    return config.model.kind == "nvae" and config.model.nvae.decoder.startswith("logistic")


def bits_per_dim(nats: Mapping[str, float], data: Data) -> dict[str, float]:
    """Turn a log-likelihood into bits per dimension.

    A density of dequantised data bounds the log probability of their levels, once ``log(2 / levels)`` per coordinate is
    added (Theis et al. 2016, arXiv:1511.01844, section 3.1): the number is an upper bound. For binarised data it is the
    log probability already.

    Args:
        nats: value and error of a mean log-likelihood, per image.
        data: the images, with levels; :func:`has_bits` says whether the number means something.

    Returns:
        Value and error; lower is better, and the uniform distribution has ``log2(levels)``.
    """
    assert data.levels is not None
    num = data.event_shape.numel()
    volume = num * math.log(2 / data.levels) if data.is_dequantized else 0.0
    scale = num * math.log(2)
    return {"value": -(nats["value"] + volume) / scale, "error": nats["error"] / scale}


def modes(loaded: LoadedRun, effort: Effort, seed: int) -> dict[str, Section]:
    """Count modes of the VAE, of exact draws of the VAEBM, and of its chains.

    Args:
        loaded: the fitted VAEBM, on data with known modes.
        effort: number of samples and chain lengths.
        seed: of all draws.

    Returns:
        A section for each set of draws; where rejection gives up, that of the exact draws says so.
    """
    chains = sample_by_chains(
        loaded.potential, loaded.config.sampling.kernel, num=effort.num_samples, steps=[0, *effort.steps], seed=seed
    )
    sections = {"modes: VAE": mode_section(loaded, chains.positions[0])}
    try:
        exact = exact_draws(
            loaded.potential, stream(seed, "exact", device=loaded.config.device), effort.num_samples
        ).position
        sections["modes: VAEBM, exact draws"] = mode_section(loaded, exact)
    except RejectionError as error:
        sections["modes: VAEBM, exact draws"] = {"none": str(error)}
    for count in effort.steps:
        name = f"modes: VAEBM, {loaded.config.sampling.kernel.name} chains, {count} steps"
        sections[name] = mode_section(loaded, chains.positions[count])
    return sections


def mode_section(loaded: LoadedRun, position: Tensor) -> Section:
    """Describe one set of draws on data with known modes.

    Args:
        loaded: the fitted VAEBM.
        position: noise, ``(num, D)``.

    Returns:
        Share of good points, modes found, evenness of the modes, mean energy.
    """
    return {
        **mode_cells(decode_in_blocks(loaded.potential, position), loaded.data),
        "mean energy": mean_cell(_energies(loaded.potential, position)),
    }


def mode_cells(x: Tensor, data: Data) -> Section:
    """Describe samples of data with known modes.

    Args:
        x: samples, ``(n, d)``.
        data: what they should look like.

    Returns:
        Share of good points, modes found, evenness of the modes.
    """
    assert data.modes is not None and data.mode_std is not None
    found = mode_statistics(x, data.modes, data.mode_std)
    share = found.high_quality
    return {
        "share within 3 std of a mode": {"value": share, "error": math.sqrt(share * (1 - share) / len(x))},
        f"modes of {len(data.modes)}": found.num_modes,
        "KL of the mode histogram to uniform (nats)": (
            found.kl_to_uniform if share else "undefined: no point is near a mode"
        ),
    }


def frechet(loaded: LoadedRun, effort: Effort, seed: int) -> dict[str, Section]:
    """Measure Frechet distances to the training data, in the features of a classifier of the same data.

    Args:
        loaded: the fitted VAEBM, on labelled images.
        effort: number of samples and chain lengths.
        seed: of all draws.

    Returns:
        One section: the VAE, the chains at each length, and held-out data; and the mean square of every noise, which
        is 1 on average under the VAE.
    """
    data, kernel = loaded.data, loaded.config.sampling.kernel
    net = load_or_train(loaded.run.path / "features.safetensors", data, loaded.config.seed)
    reference = features(net, whole(data, "train", seed))
    chains = sample_by_chains(loaded.potential, kernel, num=effort.num_samples, steps=[0, *effort.steps], seed=seed)
    distances = {
        count: frechet_distance(features(net, decode_in_blocks(loaded.potential, position)), reference)
        for count, position in chains.positions.items()
    }
    section: Section = {
        f"held-out data, {len(data.test)} images": frechet_distance(features(net, whole(data, "test", seed)), reference)
    }
    section["VAE"] = vae_distance = distances.pop(0)
    for count, distance in distances.items():
        section[f"VAEBM, {count} {kernel.name} steps"] = distance
        section[f"VAEBM, {count} {kernel.name} steps, over its VAE's"] = distance / vae_distance
        for name, value in loaded.potential.packing.mean_square(chains.positions[count]).items():
            section[f"mean square of {name}, {count} steps"] = float(value.mean())
    section[f"acceptance of {kernel.name}"] = chains.acceptance_rate
    section[f"step size of {kernel.name}"] = chains.step_size
    return {f"Frechet distance [{net.name}], {effort.num_samples} samples": section}


def features(net: Classifier, x: Tensor) -> Tensor:
    """Compute the features ``(n, d)`` of images ``(n, C, H, W)``, a block at a time."""
    with torch.no_grad():
        return torch.cat([net.features(rows) for rows in x.split(1_000)])


def whole(data: Data, part: str, seed: int) -> Tensor:
    """Return every image of the part train or test, ``(n, C, H, W)``."""
    split = {"train": data.train, "test": data.test}[part]
    return split.batch(torch.arange(len(split)), stream(seed, "dequantise", part))


def _energies(potential: NoisePotential, position: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([potential(rows) for rows in position.split(1_000)])


def mean_cell(values: Tensor, other_error: float = 0.0) -> dict[str, float]:
    """Average independent values.

    Args:
        values: ``(n,)``.
        other_error: an independent standard error to join with theirs.

    Returns:
        The mean and its standard error.
    """
    values = values.double()
    error = math.hypot(float(values.std()) / math.sqrt(len(values)), other_error)
    return {"value": float(values.mean()), "error": error}


def lines(sections: Mapping[str, Section]) -> list[str]:
    """Format sections as aligned text.

    Args:
        sections: as :func:`evaluate` returns them.

    Returns:
        One line for each heading and number.
    """
    text: list[str] = []
    for title, section in sections.items():
        text += ["", title, *(f"  {name:<58} {_cell(value)}" for name, value in section.items())]
    return text[1:]


def _cell(value: Cell) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.4f} +- {value['error']:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
