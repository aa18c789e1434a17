"""Draw from a fitted VAEBM, or from its VAE alone: ``python -m ppl_vaebm.sample RUN``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ppl_vaebm.config import KernelName
from ppl_vaebm.config import commands as cli
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence
from ppl_vaebm.runs.given import GivenOptions

DESCRIPTION = """Draw from a fitted VAEBM by chains from fresh noise, and from its VAE. Writes samples/vaebm.npz,
samples/vae.npz and samples/data.npz (array x, draws first), a PNG of each, and the report. Of stage svi alone: draws of
the VAE, and stage 1's pictures as samples/svi_*.npz: reconstructions, draws of the prior at several temperatures, one
latent group changed step by step, KL of every group. With --given or --given-values: draws of the posterior of x given
what was observed, their mean, standard deviation and R-hat, as samples/conditional.npz (arrays x, mean, sd, r_hat,
given, mask), .png and .nc (ArviZ)."""

DEFAULT_NUM = {"ebm": 10_000, "svi": 1_000, "conditional": 1_000}


@dataclass(frozen=True)
class Options:
    """Options of sample."""

    run: cli.RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """What to draw from: the VAE, or the VAEBM beside it; the last stage that the run holds if not given."""
    num: int | None = None
    """Draws; if not given 10,000 of the VAEBM and as many of its VAE, or 1,000 of stage svi or of a posterior."""
    kernel: Annotated[KernelName | None, tyro.conf.arg(aliases=["-k"])] = None
    """ebm: kernel of the chains; if not given the run's sampling kernel; for a posterior hmc, or mixture of points."""
    num_steps: int | None = None
    """ebm: steps from fresh noise to a sample; the run's sampling.num-steps if not given."""
    temperatures: tuple[float, ...] = ()
    """svi, images: temperatures of the prior's pictures; 0.6, 0.7, 0.8 and 1 if not given."""
    group: str | None = None
    """svi, images: latent group to change step by step, such as z_5; the one with the largest KL if not given."""
    seed: int = 0
    """Seed of the draws."""
    condition: Annotated[GivenOptions, tyro.conf.arg(name="")] = field(default_factory=GivenOptions)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.num is not None:
            cli.positive("num", self.num)
        if self.num_steps is not None:
            cli.positive("num-steps", self.num_steps)
        for temperature in self.temperatures:
            if not 0 <= temperature < math.inf:
                raise ValueError(f"temperatures must be 0 or more and finite, got {temperature}")


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "sample", DESCRIPTION)

    from ppl_vaebm.reports.html import write_report
    from ppl_vaebm.runs.fitted_vae import stage_of
    from ppl_vaebm.runs.run import Run

    run = Run.open(options.run)
    stage = stage_of(run, options.stage)
    if options.condition.is_conditional:
        lines = _sample_conditional(options, stage)
    elif stage == "svi":
        lines = _sample_vae(options)
    else:
        lines = _sample_vaebm(options)
    print("\n".join(lines))
    print(f"report: {write_report(run)}")


def _refuse_unused(options: Options, unused: tuple[str, ...], use: str, instead: str) -> None:
    """Refuse an option that would do nothing."""
    for name in unused:
        if getattr(options, name):
            raise InputError(f"option {name.replace('_', '-')} is for {use}, got it for {instead}: leave it out")


def _sample_vae(options: Options) -> list[str]:
    from ppl_vaebm.reports.gallery import TEMPERATURES, Choices
    from ppl_vaebm.runs.drawing import draw_vae
    from ppl_vaebm.runs.fitted_vae import open_fitted_vae

    _refuse_unused(options, ("kernel", "num_steps"), "--stage ebm", "svi")
    fitted = open_fitted_vae(options.run)
    cli.set_threads(fitted.config.threads)
    choices = Choices(options.temperatures or TEMPERATURES, options.group)
    return draw_vae(fitted, choices, options.num or DEFAULT_NUM["svi"], options.seed)


def _sample_vaebm(options: Options) -> list[str]:
    from ppl_vaebm.runs.drawing import draw_vaebm
    from ppl_vaebm.runs.loading import load_run

    _refuse_unused(options, ("temperatures", "group"), "--stage svi", "ebm")
    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    sampling = loaded.config.sampling
    kernel = sampling.kernel.of(options.kernel or sampling.kernel.name)
    num, num_steps = options.num or DEFAULT_NUM["ebm"], options.num_steps or sampling.num_steps
    return draw_vaebm(loaded, kernel, num=num, num_steps=num_steps, seed=options.seed)


def _sample_conditional(options: Options, stage: Literal["svi", "ebm"]) -> list[str]:
    from ppl_vaebm.runs.conditional import kernel_of, open_run, sample_given

    _refuse_unused(options, ("temperatures", "group", "num_steps"), "draws without --given", "a posterior")
    loaded = open_run(options.run, stage)
    cli.set_threads(loaded.config.threads)
    kernel = kernel_of(loaded, options.kernel)
    num = options.num or DEFAULT_NUM["conditional"]
    return sample_given(loaded, options.condition, kernel, num=num, seed=options.seed)


if __name__ == "__main__":
    main()
