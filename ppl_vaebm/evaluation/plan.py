"""What an evaluation is asked for, and the network that its metrics of images come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppl_vaebm.config.evaluation import Part
from ppl_vaebm.data.load import Data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.base import Effort, Section
from ppl_vaebm.evaluation.image_metrics import Judge, check_sizes, new_judge
from ppl_vaebm.evaluation.metrics.features import FeatureChoice, feature_net
from ppl_vaebm.inference.normalizing_constant import Effort as NormaliserEffort
from ppl_vaebm.runs.run import Run

NO_NETWORK: Section = {"none": "the data have no labels for a classifier to learn; name --features inception"}
"""What stands in the place of metrics that nobody can make."""
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
    normaliser: NormaliserEffort | None = None
    """How much to spend on log Z."""


def judge_of(run: Run, data: Data, plan: Plan, seed: int, device: str) -> Judge | None:
    """Get the network that a plan asks for, and describe the data by it.

    Call it before anything slow is done: files may be missing, and samples too few.

    Args:
        run: where a classifier is kept, once trained.
        data: of the run.
        plan: what to measure.
        seed: the run's, of the classifier's training.
        device: where the network runs.

    Returns:
        The judge; ``None`` where no part looks at images, or no network was asked for and the data cannot train one.

    Raises:
        InputError: a network or its weights are named, and the data are points; or the weights are, and without labels
            there is no network; or samples or images are fewer than the metrics need; or as
            :func:`~ppl_vaebm.features.feature_net`.
    """
    _check_features(data, plan)
    choice = _choice(data, plan)
    judged = [part for part in plan.parts if part in JUDGED]
    if choice is None or not judged or len(data.event_shape) != 3:
        return None
    check_sizes(data, plan.effort, judged)  # before a classifier is trained
    net = feature_net(choice, plan.feature_weights, data, seed, run.path, device)
    return new_judge(net, data, plan.effort, plan.seed)


def _check_features(data: Data, plan: Plan) -> None:
    """Refuse a network, or its weights, that no metric would be taken from."""
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
