"""What an evaluation is asked for, and the network that its metrics of images come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppl_vaebm.data import Data
from ppl_vaebm.evaluation_base import Effort, Part, Section
from ppl_vaebm.evaluation_metrics import Judge, new_judge
from ppl_vaebm.features import FeatureChoice, feature_net
from ppl_vaebm.inference.normaliser import Effort as NormaliserEffort
from ppl_vaebm.run import Run

NO_NETWORK: Section = {"none": "the data have no labels for a classifier to learn; name --features inception"}
"""What stands in the place of metrics that nobody can make."""


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

    Args:
        run: where a classifier is kept, once trained.
        data: images.
        plan: what to measure.
        seed: the run's, of the classifier's training.
        device: where the network runs.

    Returns:
        The judge; ``None`` where no network was asked for and the data cannot train one.

    Raises:
        InputError: as :func:`~ppl_vaebm.features.feature_net` and :func:`~ppl_vaebm.evaluation_metrics.new_judge`.
    """
    choice = plan.features or ("classifier" if data.train.labels is not None else None)
    if choice is None:
        return None
    net = feature_net(choice, plan.feature_weights, data, seed, run.path, device)
    return new_judge(net, data, plan.effort, plan.seed)
