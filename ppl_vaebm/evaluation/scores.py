"""Scores of single points: log h up to log Z, and the two terms that it is made of; of training and test data alike.

log h is what a VAEBM says of a point. The energy alone is no such thing, for it was only ever taught to tell data from
draws of the VAE, and the VAE's log p alone lacks what it learned.
"""

from __future__ import annotations

from typing import NamedTuple

from scipy import stats  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from ppl_vaebm.evaluation.base import Arrays, Effort, Measured, Section, mean_cell, random_order
from ppl_vaebm.evaluation.likelihood import data_energies
from ppl_vaebm.inference.likelihood import log_p
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs.loading import LoadedRun

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
    """Score points.

    Args:
        loaded: the fitted VAEBM.
        x: ``(n, *event_shape)``, with the dequantisation noise that the data have.
        num_draws: of the guide per point; the bound is the looser, and log p the lower, the fewer there are.
        seed: of the draws.

    Returns:
        The scores, on the CPU.
    """
    x = x.to(loaded.config.device)
    density = log_p(loaded.vaebm.vae, x, seed_for(seed, "importance"), num_draws).value
    energy = data_energies(loaded, x, seed_for(seed, "energy"))
    return Scores(density.double().cpu(), -energy.cpu())


def score_data(loaded: LoadedRun, part: str, effort: Effort, seed: int) -> Scores:
    """Score points of the part train or test, the first ones of a random order.

    Args:
        loaded: the fitted VAEBM.
        part: which part.
        effort: points, and draws of the guide.
        seed: of the order and the draws.

    Returns:
        The scores.
    """
    split = {"train": loaded.data.train, "test": loaded.data.test}[part]
    indices = random_order(split, seed, part)[: effort.num_scored]
    x = split.batch(indices, stream(seed, "dequantise", "scored", part))
    return score(loaded, x, effort.num_score_draws, seed_for(seed, part))


def histograms(train: Scores, test: Scores, num_draws: int) -> Measured:
    """Compare the scores of training and test data: apart, the model has learned the training data by heart.

    Args:
        train: of training data.
        test: of test data.
        num_draws: of the guide behind each.

    Returns:
        Means, their difference, and the two-sample Kolmogorov-Smirnov statistic with its p-value, for each score.
    """
    sections: dict[str, Section] = {}
    arrays: Arrays = {}
    for (name, of_train), of_test in zip(train.by_name().items(), test.by_name().values(), strict=True):
        title = f"{name} [training and test data], {len(of_train)} and {len(of_test)} points, {num_draws} draws of z"
        sections[title] = _compared(of_train, of_test)
        arrays |= {f"train {name}": of_train.numpy(), f"test {name}": of_test.numpy()}
    return Measured(sections, arrays)


def _compared(train: Tensor, test: Tensor) -> Section:
    num_bad = int((~train.isfinite()).sum() + (~test.isfinite()).sum())
    if num_bad:
        return {"none": f"{num_bad} of the scores are not finite"}
    found = stats.ks_2samp(train.numpy(), test.numpy())
    test_error = mean_cell(test)["error"]
    return {
        "mean over training data (nats)": mean_cell(train),
        "mean over test data (nats)": mean_cell(test),
        "training less test (nats)": mean_cell(train - test.mean(), test_error),
        "Kolmogorov-Smirnov statistic": float(found.statistic),
        "its p-value": float(found.pvalue),
    }
