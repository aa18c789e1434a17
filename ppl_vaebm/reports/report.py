"""The report of a run: one HTML file with its curves, samples, numbers and chains.

Each chapter is built from files of the run's folder, and left out where they are missing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.reports.html import Chapter, Contents, render
from ppl_vaebm.reports.sections import (
    chains_contents,
    comparison_contents,
    conditioning_contents,
    ebm_contents,
    evaluation_contents,
    samples_contents,
    svi_contents,
)
from ppl_vaebm.runs.run import Run


class Place(NamedTuple):
    """A place in the report, with the function that fills it."""

    anchor: str
    title: str
    command: str
    """Command that writes its files."""
    build: Callable[[Run], Contents | None]
    """Returns ``None`` where the files are missing."""
    lead: str
    """What is shown and what good looks like."""


def write_report(run: Run) -> Path:
    """Write the report of a run from the files that it has, and return its path.

    Raises:
        InputError: a file that the report cannot show.
    """
    contents = {place: _contents(place, run) for place in PLACES}
    page = render(
        name=run.path.name,
        subtitle="Report of a run.",
        config=run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else None,
        chapters=[
            Chapter(place.anchor, place.title, place.lead, content)
            for place, content in contents.items()
            if content is not None
        ],
        missing={place.title: place.command for place, content in contents.items() if content is None},
    )
    write_atomic(run.report_file, page)
    return run.report_file


def _contents(place: Place, run: Run) -> Contents | None:
    try:
        return place.build(run)
    except InputError:
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # what damaged JSON, CSV and NPZ files raise
        raise InputError(
            f"the file behind the report's chapter {place.title!r} in {run.path} cannot be read ({error}); "
            f"remove it, or make it again: {place.command}"
        ) from None


PLACES = (
    Place(
        "svi",
        "Stage 1: the VAE",
        "python -m ppl_vaebm.fit --stage svi --run RUN",
        svi_contents,
        "Stage 1 fits the VAE by maximising the ELBO, a lower bound on the log-likelihood. Good: the validation curve "
        "rises, levels off and stays close to the training curve. The KL term, in all and of each latent group, is the "
        "information about x in the latents; where it is near 0 the decoder ignores them. The loss may rise while the "
        "weight of the KL term increases. Below the curves are reconstructions of held-out data and prior samples.",
    ),
    Place(
        "ebm",
        "Stage 2: the energy",
        "python -m ppl_vaebm.fit --stage ebm --run RUN",
        ebm_contents,
        "Stage 2 learns the energy E. Good: the validation gain, which is the held-out log-likelihood of the VAEBM "
        "minus that of the VAE, rises above 0 and stays there; data and model samples have the same mean energy, so "
        "that their gap stays near 0; the effective number of draws behind log Z stays above 100, below which the gain "
        "cannot be trusted; chains accept more than half of their proposals, and their noise keeps a mean square near "
        "1. An energy gap that grows without limit is a sign of a training that diverges.",
    ),
    Place(
        "samples",
        "Samples",
        "python -m ppl_vaebm.sample RUN",
        samples_contents,
        "Data, VAE samples and, if stage 2 is fitted, VAEBM samples; none are selected. Good: the VAEBM samples look "
        "like the data, without the VAE samples that lie where there are no data.",
    ),
    Place(
        "conditioning",
        "Conditioning",
        "python -m ppl_vaebm.sample RUN --given IMAGE --mask MASK",
        conditioning_contents,
        "The posterior of x given a part of it, exactly or with noise, or given a blurred or coarser x: the mean, the "
        "standard deviation and the R-hat of every value, and draws. Good: R-hat at most "
        f"{diagnostics.MAX_R_HAT} everywhere; if it is larger, mean and standard deviation are those of the chains and "
        "not of the posterior. In the table, energy is E(x), misfit is minus the log-likelihood of the observation, "
        "and value is a value of x that is not observed.",
    ),
    Place(
        "evaluation",
        "Evaluation",
        "python -m ppl_vaebm.evaluate RUN",
        evaluation_contents,
        "Measurements on samples and held-out data. The error of a number follows the sign ±; a difference of two "
        "numbers means something when it is several times larger than their errors.",
    ),
    Place(
        "chains",
        "Chains",
        "python -m ppl_vaebm.diagnose RUN",
        chains_contents,
        "Several chains from different starts draw from the fitted VAEBM; each row of the table is one scalar "
        f"quantity of the draws. Good: R-hat at most {diagnostics.MAX_R_HAT} (the chains agree), effective sample "
        f"sizes (ESS) of at least {diagnostics.MIN_ESS:.0f}, no divergent draw, BFMI above {diagnostics.MIN_BFMI}; an "
        "R-hat or ESS that misses its threshold is marked. In the pictures: traces that look alike and do not drift, "
        "ranks of every chain within the grey band (it is for independent draws, so autocorrelated ones leave it now "
        "and then), autocorrelation that falls to 0, and changes of energy about as wide as the energies.",
    ),
    Place(
        "comparison",
        "Comparison of kernels",
        "python -m ppl_vaebm.compare RUN",
        comparison_contents,
        "Several kernels drew from the same target, each with the same evaluations of the energy. More effective "
        "draws (ESS) per evaluation and per second are better, but only among kernels whose R-hat is close to 1: a "
        "kernel that misses a mode can look fast. A kernel that is not exact has no Metropolis test, and its step "
        "biases its draws. The standard deviation over seeds follows the sign ±.",
    ),
)
"""The chapters in the order of the page."""
