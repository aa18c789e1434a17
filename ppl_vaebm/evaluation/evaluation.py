"""The numbers that a fitted VAEBM is judged by, part by part, each with its Monte Carlo error where it has one.

A sample's look does not show whether the density is right: a short-run sampler can fill every mode
while the density that it was trained with is far worse than the VAE's. So the normalised log-likelihood
and draws that owe nothing to a chain stand first, and samples are measured at more than one chain length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.base import Effort, Measured, Section
from ppl_vaebm.evaluation.likelihood import Terms, likelihood, likelihood_terms
from ppl_vaebm.evaluation.log_z import normaliser_sections
from ppl_vaebm.evaluation.modes import mode_section, modes
from ppl_vaebm.evaluation.neighbours import measure_neighbours
from ppl_vaebm.evaluation.ood import measure_ood
from ppl_vaebm.evaluation.ood_sets import ood_sets
from ppl_vaebm.evaluation.plan import NO_NETWORK, Plan, judge_of
from ppl_vaebm.evaluation.samples import NUM_KEPT, Samples, draw_samples, measure_samples
from ppl_vaebm.evaluation.scores import Scores, histograms, score_data
from ppl_vaebm.runs.loading import LoadedRun

__all__ = ["Effort", "Evaluation", "Plan", "Section", "evaluate", "likelihood", "mode_section"]


class Evaluation:
    """The parts of an evaluation, and what they share.

    Args:
        loaded: the fitted VAEBM.
        plan: what to measure.

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
            "normaliser": self._normaliser,
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
        return Measured({"log-likelihood of test data (nats per point)": section}, {})

    def _normaliser(self) -> Measured:
        assert self.plan.normaliser is not None
        return Measured(normaliser_sections(self.loaded, self.plan.normaliser, self.terms, self.plan.seed), {})

    def _samples(self) -> Measured:
        if self.loaded.data.modes is not None:
            return Measured(modes(self.loaded, self.plan.effort, self.plan.seed), {})
        if len(self.loaded.data.event_shape) != 3:
            return Measured({}, {})
        if self.judge is None:
            return Measured({"metrics of samples": NO_NETWORK}, {})
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
    """Measure parts one after another, so that each can be kept before the next begins.

    Args:
        loaded: the fitted VAEBM.
        plan: what to measure.

    Yields:
        The name of each part, and what it found.

    Raises:
        InputError: as :class:`Evaluation`, or a part cannot be measured on these data.
    """
    evaluation = Evaluation(loaded, plan)
    for part in plan.parts:
        yield part, evaluation.measure(part)
