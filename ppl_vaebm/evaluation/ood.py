"""Whether a VAEBM's scores tell the data's distribution from others: the area under the ROC curve, set by set.

For kinds of images that it never saw the guide is worse and the bound on log p looser, which helps log p and log h
alike. So all sets get the same number of draws of the guide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ppl_vaebm.evaluation.base import Arrays, Cell, Effort, Measured, Section
from ppl_vaebm.evaluation.image_metrics import estimate_cell
from ppl_vaebm.evaluation.metrics.classification import auroc_estimate
from ppl_vaebm.evaluation.ood_sets import OodSet
from ppl_vaebm.evaluation.scores import SCORES, Scores, score
from ppl_vaebm.rng import seed_for
from ppl_vaebm.runs.loading import LoadedRun


def measure_ood(loaded: LoadedRun, inside: Scores, sets: Mapping[str, OodSet], effort: Effort, seed: int) -> Measured:
    """Compare the scores of test data with those of other sets.

    Args:
        loaded: the fitted VAEBM.
        inside: scores of test data.
        sets: of :func:`~ppl_vaebm.evaluation_ood_sets.ood_sets`.
        effort: draws of the guide.
        seed: of these draws.

    Returns:
        A section for each score, of areas with the standard error of DeLong et al. 1988; and what the sets are.
    """
    outside = {
        name: score(loaded, found.x, effort.num_score_draws, seed_for(seed, "ood", name))
        for name, found in sets.items()
    }
    family = f"[test data against others], {len(inside.log_p)} test images, {effort.num_score_draws} draws of z"
    sections: dict[str, Section] = {
        f"AUROC of {score_name} {family}": {
            name: auroc_cell(inside, scores, score_name) for name, scores in outside.items()
        }
        for score_name in SCORES
    }
    sections["what the others are"] = {
        name: f"{len(found.x)} images: {found.what}{_flag(outside[name])}" for name, found in sets.items()
    }
    return Measured(sections, _arrays(inside, outside, sections))


def auroc_cell(inside: Scores, outside: Scores, score_name: str) -> Cell:
    """Measure how often a point of the distribution scores higher than one from outside.

    Args:
        inside: scores of the distribution's points.
        outside: of others.
        score_name: one of :data:`~ppl_vaebm.evaluation_scores.SCORES`.

    Returns:
        The area and its error; or, where a score is NaN or plus infinity, a text that says how many are.
    """
    a, b = inside.by_name()[score_name], outside.by_name()[score_name]
    num_bad = [int((scores.isnan() | scores.isposinf()).sum()) for scores in (a, b)]
    if any(num_bad):
        return f"none: {num_bad[0]} test images and {num_bad[1]} of these have NaN or infinity as their score"
    return estimate_cell(auroc_estimate(a, b))


def _flag(scores: Scores) -> str:
    num = scores.num_not_finite
    return f"; log h of {num} of them is not finite" if num else ""


def _arrays(inside: Scores, outside: Mapping[str, Scores], sections: Mapping[str, Section]) -> Arrays:
    """Keep the areas as ``(sets, scores)``, for a picture, and all scores, for who wants other numbers."""
    areas = [sections[title] for title in sections if title.startswith("AUROC")]

    def column(key: str) -> list[list[float]]:
        cells = [[section[name] for section in areas] for name in outside]
        return [[cell[key] if isinstance(cell, dict) else math.nan for cell in row] for row in cells]

    arrays: Arrays = {"sets": np.array(list(outside)), "scores": np.array(SCORES)}
    arrays |= {key: np.array(column(key)) for key in ("value", "error")}
    for set_name, scores in {"test": inside, **outside}.items():
        arrays |= {f"{score_name} of {set_name}": values.numpy() for score_name, values in scores.by_name().items()}
    return arrays
