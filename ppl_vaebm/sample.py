"""Draw samples from a fitted VAEBM, or from its VAE alone: ``python -m ppl_vaebm.sample RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from ppl_vaebm.config import KernelName
from ppl_vaebm.config.options import FLAT, NOT_NEGATIVE, Alias, Checked, OptionalCount, RunFolder
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence
from ppl_vaebm.runs.given import GivenOptions

if TYPE_CHECKING:
    from ppl_vaebm.runs.drawing import Written

DESCRIPTION = """Draw samples from a fitted VAEBM by Markov chains from N(0, I), and from its VAE. Writes
samples/vaebm.npz, samples/vae.npz and samples/data.npz (array x, samples first), a PNG of each, and the report. With
stage svi alone: VAE samples, and pictures of the VAE as samples/svi_*.npz: reconstructions, samples at several
temperatures, one latent group changed step by step, KL of each group. With --given or --given-values: samples of the
posterior of x given the observed values, their mean, standard deviation and R-hat, as samples/conditional.npz (arrays
x, mean, sd, r_hat, given, mask), .png and .nc (ArviZ)."""
FIRST = ("run", "stage", "num", "seed", "kernel", "num-steps", "given", "mask", "given-values", "noise-sd")
DEFAULT_NUM = {"ebm": 10_000, "svi": 1_000, "conditional": 1_000}


@dataclass(frozen=True)
class Options(Checked):
    """Options of sample."""

    run: RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """svi: sample the VAE; ebm: sample both VAEBM and VAE; the default is the run's last stage."""
    num: OptionalCount = None
    """Number of samples; the default is 10,000 with stage ebm, and 1,000 with stage svi or of a posterior."""
    kernel: Annotated[KernelName | None, Alias("-k")] = None
    """Kernel of the chains, with stage ebm; the default is sampling.kernel of the run, or for a posterior hmc for
    images and mixture for points."""
    num_steps: OptionalCount = None
    """Kernel steps from N(0, I) to a sample, with stage ebm; the default is sampling.num-steps of the run."""
    temperatures: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
    """Prior temperatures of the pictures of an image VAE, with stage svi; the default is 0.6, 0.7, 0.8 and 1."""
    group: str | None = None
    """Latent group to change step by step, such as z_5, for images with stage svi; the default is the one with the
    largest KL."""
    seed: int = 0
    """Seed of the samples."""
    condition: Annotated[GivenOptions, FLAT] = field(default_factory=GivenOptions)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "sample", DESCRIPTION, FIRST)

    from ppl_vaebm.runs.run import Run  # here, because NumPy would double the time of --help

    run = Run.open(options.run)
    is_conditional = options.condition.is_conditional

    from ppl_vaebm.reports.gallery import save_png
    from ppl_vaebm.reports.report import write_report
    from ppl_vaebm.runs.loading import stage_of

    stage = stage_of(run, options.stage)
    if is_conditional:
        written = _sample_conditional(options, stage)
    else:
        written = (_sample_vae if stage == "svi" else _sample_vaebm)(options)
    for file in written.files:
        save_png(file)
    print("\n".join(written.lines))
    print(f"report: {write_report(run)}")


def _refuse_unused(options: Options, unused: tuple[str, ...], use: str, instead: str) -> None:
    """Refuse an option that has no effect."""
    for name in unused:
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for {use}, found it for {instead}: leave it out")


def _sample_vae(options: Options) -> Written:
    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.runs.drawing import draw_vae
    from ppl_vaebm.runs.gallery import TEMPERATURES, Choices
    from ppl_vaebm.runs.loading import open_fitted_vae

    _refuse_unused(options, ("kernel", "num_steps"), "--stage ebm", "svi")
    fitted = open_fitted_vae(options.run)
    set_threads(fitted.config.threads)
    choices = Choices(options.temperatures or TEMPERATURES, options.group)
    return draw_vae(fitted, choices, options.num or DEFAULT_NUM["svi"], options.seed)


def _sample_vaebm(options: Options) -> Written:
    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.runs.drawing import draw_vaebm
    from ppl_vaebm.runs.loading import load_run

    _refuse_unused(options, ("temperatures", "group"), "--stage svi", "ebm")
    loaded = load_run(options.run)
    set_threads(loaded.config.threads)
    sampling = loaded.config.sampling
    kernel = sampling.kernel.of(options.kernel or sampling.kernel.name)
    num, num_steps = options.num or DEFAULT_NUM["ebm"], options.num_steps or sampling.num_steps
    return draw_vaebm(loaded, kernel, num=num, num_steps=num_steps, seed=options.seed)


def _sample_conditional(options: Options, stage: Literal["svi", "ebm"]) -> Written:
    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.runs.conditional import kernel_of, open_run, sample_given

    _refuse_unused(options, ("temperatures", "group", "num_steps"), "samples without --given", "a posterior")
    loaded = open_run(options.run, stage)
    set_threads(loaded.config.threads)
    kernel = kernel_of(loaded, options.kernel)
    num = options.num or DEFAULT_NUM["conditional"]
    return sample_given(loaded, options.condition, kernel, num=num, seed=options.seed)


if __name__ == "__main__":
    main()
