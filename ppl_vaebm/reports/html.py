"""A run as one HTML file that a stranger can read: curves, samples, numbers, chains.

Every section is built from files of the run's folder, and left out where they are missing. Pictures are
embedded, so the file can be mailed; it needs no network and no JavaScript.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jinja2

from ppl_vaebm import __version__
from ppl_vaebm.errors import InputError
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.reports import sections as report_sections
from ppl_vaebm.reports.cells import Cell, Section, Table
from ppl_vaebm.runs.run import Run

__all__ = ["PARTS", "Cell", "Heading", "Part", "Section", "Table", "render", "write_report"]


class Part(NamedTuple):
    """A place for a section, and how it comes about."""

    anchor: str
    title: str
    command: str
    """What to run to get it."""
    build: Callable[[Run], Section | None]
    """Returns ``None`` where the files are missing."""
    lead: str
    """What is shown and what good looks like."""


def write_report(run: Run) -> Path:
    """Write the report of a run from whatever files it has.

    Args:
        run: the run's folder.

    Returns:
        The path of the report.

    Raises:
        InputError: a file that the report cannot show.
    """
    sections = [(part, _built(part, run)) for part in PARTS]
    page = render(
        name=run.path.name,
        subtitle="Report of a run.",
        config=run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else None,
        sections=[(part, section) for part, section in sections if section is not None],
        missing=[part for part, section in sections if section is None],
    )
    write_atomic(run.report_file, page)
    return run.report_file


class Heading(Protocol):
    """What a page says of a section before its contents: a :class:`Part`, or something like it."""

    @property
    def anchor(self) -> str:
        """Its name in links."""
        ...

    @property
    def title(self) -> str:
        """Its title."""
        ...

    @property
    def lead(self) -> str:
        """What is shown and what good looks like."""
        ...


def render(
    name: str,
    subtitle: str,
    sections: Sequence[tuple[Heading, Section]],
    missing: Sequence[Part] = (),
    config: str | None = None,
) -> str:
    """Make a page.

    Args:
        name: its title.
        subtitle: one line on what it is.
        sections: in their order.
        missing: those that the page says how to get.
        config: the run's configuration, to unfold.

    Returns:
        HTML.
    """
    return _template().render(
        name=name, subtitle=subtitle, version=__version__, config=config, sections=sections, missing=missing
    )


def _built(part: Part, run: Run) -> Section | None:
    try:
        return part.build(run)
    except InputError:
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # what damaged JSON, CSV and NPZ files raise
        raise InputError(
            f"the file behind the report's section {part.title!r} in {run.path} cannot be read ({error}); "
            f"remove it, or make it again: {part.command}"
        ) from None


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


PARTS = (
    Part(
        "svi",
        "Stage 1: the VAE",
        "python -m ppl_vaebm.fit --stage svi --run RUN",
        report_sections.svi_section,
        "Stage 1 fits the VAE by maximising the ELBO, a lower bound on the log-likelihood. Good: the validation "
        "curve rises, levels off and stays close to the training curve. The KL term, in all and of each latent "
        "group, is what the latents tell about x; near 0 the decoder ignores them. While the weight of the KL "
        "term warms up, the loss may rise. Under the curves stands what the fitted VAE makes of held-out data and of "
        "its prior.",
    ),
    Part(
        "ebm",
        "Stage 2: the energy",
        "python -m ppl_vaebm.fit --stage ebm --run RUN",
        report_sections.ebm_section,
        "Stage 2 learns the energy E. Good: the validation gain, which is the held-out log-likelihood of the "
        "VAEBM minus that of the VAE, rises above 0 and stays there; data and model samples get the same mean "
        "energy, so that their gap hovers around 0; the effective number of draws behind log Z does not collapse "
        "(below about 100 the gain cannot be trusted); chains accept more than half of their moves, and their "
        "noise keeps a mean square near 1. A gap that runs off is a run that blows up.",
    ),
    Part(
        "samples",
        "Samples",
        "python -m ppl_vaebm.sample RUN",
        report_sections.samples_section,
        "Data, samples of the VAE alone, and, of a run with stage 2, samples of the VAEBM; none are selected. Good: "
        "the VAEBM's cannot be told from the data, and what the VAE puts where no data are is gone.",
    ),
    Part(
        "conditioning",
        "Conditioning",
        "python -m ppl_vaebm.sample RUN --given IMAGE --mask MASK",
        report_sections.conditioning_section,
        "The posterior of x given a part of it, exactly or with noise, or given a blurred or coarser x: the mean, the "
        "standard deviation and the R-hat of every value, and draws. Good: R-hat at most "
        f"{diagnostics.MAX_R_HAT} everywhere; until then mean and standard deviation are those of the chains and not "
        "of the posterior. In the table, energy is E(x), misfit is minus the log-likelihood of what was observed, and "
        "value is a value of x that was not.",
    ),
    Part(
        "evaluation",
        "Evaluation",
        "python -m ppl_vaebm.evaluate RUN",
        report_sections.evaluation_section,
        "What the evaluation measured on samples and held-out data. After the sign ± stands the error of a "
        "number; a difference of two numbers means something when it is several times larger than their errors.",
    ),
    Part(
        "chains",
        "Chains",
        "python -m ppl_vaebm.diagnose RUN",
        report_sections.chains_section,
        "Several chains from different starts draw from the trained VAEBM; each row of the table is one number "
        f"per draw. Good: R-hat at most {diagnostics.MAX_R_HAT} (the chains agree), effective sample sizes (ESS) "
        f"of at least {diagnostics.MIN_ESS:.0f}, no divergent draw, BFMI above {diagnostics.MIN_BFMI}; an R-hat or"
        " ESS that misses its threshold is marked. In the pictures: traces that look alike and do not drift, "
        "ranks of every chain within the grey band (it is for independent draws, so autocorrelated ones leave it "
        "now and then), autocorrelation that falls to 0, and changes of energy about as wide as the energies.",
    ),
    Part(
        "comparison",
        "Comparison of kernels",
        "python -m ppl_vaebm.compare RUN",
        report_sections.comparison_section,
        "Several kernels drew from the same target, each with the same evaluations of the energy. More effective "
        "draws (ESS) per evaluation and per second are better, but only among kernels whose R-hat is close to 1: one "
        "that misses a mode can look fast. A kernel that is not exact has no Metropolis test, and its step biases its "
        "draws. After the sign ± stands the standard deviation over seeds.",
    ),
)
"""The sections in the order of the page."""
