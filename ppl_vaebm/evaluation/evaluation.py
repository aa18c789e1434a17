"""Evaluation of a fitted VAEBM, part by part, with Monte Carlo errors.

Samples of short chains can be good while the density is worse than the VAE's. Therefore the normalized log-likelihood
and exact draws come first, and samples are measured at more than one chain length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.image_metrics import Judge, check_sizes, measure_neighbours, new_judge
from ppl_vaebm.evaluation.likelihood import Scores, Terms, histograms, likelihood, likelihood_terms, score_data
from ppl_vaebm.evaluation.log_z import log_z_sections
from ppl_vaebm.evaluation.metrics.features import FeatureChoice, feature_net
from ppl_vaebm.evaluation.ood import measure_ood, ood_sets
from ppl_vaebm.evaluation.samples import NUM_KEPT, Samples, draw_samples, measure_samples, modes
from ppl_vaebm.evaluation.sections import Effort, Measured, Section
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import FEATURES_FILE, Run

NO_NETWORK = Section(
    "metrics of samples", {"": {"none": "the data have no labels for a classifier to learn; name --features inception"}}
)
"""In place of metrics that no network can be had for."""
JUDGED: tuple[Part, ...] = ("samples", "neighbours")
"""Parts that look at images through a network."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    effort: Effort
    parts: tuple[Part, ...]
    seed: int = 0
    """Of all draws."""
    features: FeatureChoice | None = None
    """Network of the metrics of images; ``None`` takes the classifier, and none where the data have no labels."""
    feature_weights: Path | None = None
    """File of its weights."""
    ood: tuple[str, ...] = ()
    """Sets of images of other distributions."""
    ood_root: str | None = None
    """Where the files of these lie; where the run's own do, if not given."""


def judge_of(run: Run, data: Data, plan: Plan, seed: int, device: str) -> Judge | None:
    """Load or train the network of a plan, which the run's folder keeps, and compute the features of the data.

    Returns ``None`` where no part needs a network, or none is named and the data have no labels to train one.

    Raises:
        InputError: a network or weights are named that cannot be used; samples or images are too few; or as
            :func:`~ppl_vaebm.evaluation.metrics.features.feature_net`.
    """
    _check_features(data, plan)
    choice = _choice(data, plan)
    judged = [part for part in plan.parts if part in JUDGED]
    if choice is None or not judged or len(data.event_shape) != 3:
        return None
    check_sizes(data, plan.effort, judged)  # before a classifier is trained
    net = feature_net(choice, plan.feature_weights, data, seed, run.path / FEATURES_FILE, device)
    return new_judge(net, data, plan.effort, plan.seed)


def _check_features(data: Data, plan: Plan) -> None:
    """Refuse a network, or its weights, that no metric uses."""
    for option, asked in (("features", plan.features), ("feature-weights", plan.feature_weights)):
        if asked is not None and len(data.event_shape) != 3:
            raise InputError(
                f"--{option} are those of images, and the data of this run, {data.name}, are points; leave them out"
            )
    if plan.feature_weights is not None and _choice(data, plan) is None:
        raise InputError(
            f"--feature-weights are those of a classifier, and the data of this run, {data.name}, have no labels for "
            "one; name --features inception if they are Inception-v3's, or leave them out"
        )


def _choice(data: Data, plan: Plan) -> FeatureChoice | None:
    return plan.features or (None if data.train.labels is None else "classifier")


class Evaluation:
    """The parts of an evaluation, and what they share.

    Raises:
        InputError: a part does not go with the data, or a set of other images or the network of the metrics cannot be
            had.
    """

    def __init__(self, loaded: LoadedRun, plan: Plan) -> None:
        self.loaded, self.plan = loaded, plan
        _check(loaded.data, plan)
        # Loaded before anything slow is done, for they may be missing.
        self.others = ood_sets(loaded, plan.ood, plan.effort.num_scored, plan.seed, plan.ood_root) if plan.ood else {}
        self.judge = judge_of(loaded.run, loaded.data, plan, loaded.config.seed, loaded.config.device)

    def measure(self, part: Part) -> Measured:
        """Measure one part."""
        measure = {
            "likelihood": self._likelihood,
            "log-z": self._log_z,
            "samples": self._samples,
            "ood": self._ood,
            "histograms": self._histograms,
            "neighbours": self._neighbours,
        }
        return measure[part]()

    @functools.cached_property
    def terms(self) -> Terms:
        """What log h of the test data is made of."""
        return likelihood_terms(self.loaded, self.plan.effort, self.plan.seed)

    @functools.cached_property
    def samples(self) -> Samples:
        """Images at every chain length; where only neighbours are asked for, some at the first length."""
        effort, seed = self.plan.effort, self.plan.seed
        if "samples" in self.plan.parts and self.judge is not None:
            return draw_samples(self.loaded, self.judge, effort.num_samples, effort.steps, seed)
        return draw_samples(self.loaded, None, min(NUM_KEPT, effort.num_samples), effort.steps[:1], seed)

    @functools.cached_property
    def test_scores(self) -> Scores:
        """Scores of test data, for training data and other images to be compared with."""
        return score_data(self.loaded, "test", self.plan.effort, self.plan.seed)

    def _likelihood(self) -> Measured:
        section = likelihood(self.loaded, self.plan.effort, self.plan.seed, self.terms)
        return Measured([Section("log-likelihood of test data (nats per point)", {"": section})], {})

    def _log_z(self) -> Measured:
        return Measured(log_z_sections(self.loaded, self.plan.effort, self.terms, self.plan.seed), {})

    def _samples(self) -> Measured:
        if self.loaded.data.modes is not None:
            return Measured(modes(self.loaded, self.plan.effort, self.plan.seed), {})
        if len(self.loaded.data.event_shape) != 3:
            return Measured([], {})
        if self.judge is None:
            return Measured([NO_NETWORK], {})
        return measure_samples(self.loaded, self.judge, self.samples, self.plan.effort)

    def _ood(self) -> Measured:
        return measure_ood(self.loaded, self.test_scores, self.others, self.plan.effort, self.plan.seed)

    def _histograms(self) -> Measured:
        train = score_data(self.loaded, "train", self.plan.effort, self.plan.seed)
        return histograms(train, self.test_scores, self.plan.effort.num_score_draws)

    def _neighbours(self) -> Measured:
        plan = self.plan
        first: Tensor = self.samples.after[plan.effort.steps[0]].images
        return measure_neighbours(self.loaded.data, first, self.judge, plan.effort, plan.seed)


def _check(data: Data, plan: Plan) -> None:
    is_image = len(data.event_shape) == 3
    if "neighbours" in plan.parts and not is_image:
        raise InputError(f"neighbours are those of images, and the data of this run, {data.name}, are points")
    if ("ood" in plan.parts) != bool(plan.ood):
        raise InputError("the part ood needs sets to compare with: name them with --ood, or leave the part out")


def evaluate(loaded: LoadedRun, plan: Plan) -> Iterator[tuple[Part, Measured]]:
    """Measure parts one after another, and yield each with its name, to be stored before the next begins."""
    evaluation = Evaluation(loaded, plan)
    for part in plan.parts:
        yield part, evaluation.measure(part)
