"""Draw from a fitted VAEBM, or from its VAE alone: ``python -m ppl_vaebm.sample RUN``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ppl_vaebm import cli
from ppl_vaebm.config import KernelName
from ppl_vaebm.errors import InputError, exits_with_one_sentence
from ppl_vaebm.options import parse

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vaebm.data import Data
    from ppl_vaebm.run import Run

DESCRIPTION = """Draw from a fitted VAEBM by chains from fresh noise, and from its VAE. Writes samples/vaebm.npz,
samples/vae.npz and samples/data.npz (array x, draws first), a PNG of each, and the report. Of stage svi alone: draws of
the VAE, and stage 1's pictures as samples/svi_*.npz: reconstructions, draws of the prior at several temperatures, one
latent group changed step by step, KL of every group."""

DEFAULT_NUM = {"ebm": 10_000, "svi": 1_000}


@dataclass(frozen=True)
class Options:
    """Options of sample."""

    run: cli.RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """What to draw from: the VAE, or the VAEBM beside it; the last stage that the run holds if not given."""
    num: int | None = None
    """Draws; if not given 10,000 of the VAEBM and as many of its VAE, or 1,000 of stage svi."""
    kernel: Annotated[KernelName | None, tyro.conf.arg(aliases=["-k"])] = None
    """ebm: kernel of the chains; the run's sampling kernel if not given."""
    num_steps: int | None = None
    """ebm: steps from fresh noise to a sample; the run's sampling.num-steps if not given."""
    temperatures: tuple[float, ...] = ()
    """svi, images: temperatures of the prior's pictures; 0.6, 0.7, 0.8 and 1 if not given."""
    group: str | None = None
    """svi, images: latent group to change step by step, such as z_5; the one with the largest KL if not given."""
    seed: int = 0
    """Seed of the draws."""

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

    from ppl_vaebm.fitted_vae import stage_of
    from ppl_vaebm.report import write_report
    from ppl_vaebm.run import Run

    run = Run.open(options.run)
    stage = stage_of(run, options.stage)
    _refuse_unused(options, stage)
    num = options.num or DEFAULT_NUM[stage]
    if stage == "svi":
        _sample_vae(options, num)
    else:
        _sample_vaebm(options, num)
    print(f"report: {write_report(run)}")


def _refuse_unused(options: Options, stage: str) -> None:
    """Refuse an option that would do nothing."""
    unused = {"svi": ("kernel", "num_steps"), "ebm": ("temperatures", "group")}[stage]
    for name in unused:
        if getattr(options, name):
            other = "ebm" if stage == "svi" else "svi"
            raise InputError(
                f"option {name.replace('_', '-')} is for --stage {other}, got it for {stage}: leave it out"
            )


def _sample_vae(options: Options, num: int) -> None:
    from ppl_vaebm.fitted_vae import open_fitted_vae
    from ppl_vaebm.gallery import TEMPERATURES, Choices, check_group, write_gallery
    from ppl_vaebm.inference.vae_draws import prior_draws

    fitted = open_fitted_vae(options.run)
    cli.set_threads(fitted.config.threads)
    choices = Choices(options.temperatures or TEMPERATURES, options.group)
    check_group(fitted.vae, choices.group)
    draws = prior_draws(fitted.sampler, num, options.seed)
    _save(fitted.run, {"data": _test_data(fitted.data, num, options.seed), "vae": draws})
    for path in write_gallery(fitted, options.seed, choices):
        print(path)


def _sample_vaebm(options: Options, num: int) -> None:
    from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
    from ppl_vaebm.loading import load_run

    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    sampling = loaded.config.sampling
    kernel = sampling.kernel.of(options.kernel or sampling.kernel.name)
    num_steps = options.num_steps or sampling.num_steps
    chains = sample_by_chains(loaded.potential, kernel, num=num, steps=[0, num_steps], seed=options.seed)
    sets = {
        "data": _test_data(loaded.data, num, options.seed),
        "vae": decode_in_blocks(loaded.potential, chains.positions[0]),
        "vaebm": decode_in_blocks(loaded.potential, chains.positions[num_steps]),
    }
    _save(loaded.run, sets)
    print(
        f"{kernel.name}: {num_steps} steps from fresh noise, step size {chains.step_size:.3g}, "
        f"acceptance {chains.acceptance_rate:.2f}, {chains.num_evals:.0f} evaluations a draw"
    )


def _test_data(data: Data, num: int, seed: int) -> Tensor:
    import torch

    from ppl_vaebm.rng import stream

    return data.test.batch(torch.arange(min(num, len(data.test))), stream(seed, "dequantise"))


def _save(run: Run, sets: Mapping[str, Tensor]) -> None:
    from ppl_vaebm.figures_samples import save_samples_png

    for name, x in sets.items():
        path = run.save_npz(name, x=x.numpy())
        save_samples_png(path.with_suffix(".png"), x.numpy())
        print(f"{path}: {len(x)} draws, shape {tuple(x.shape[1:])}")


if __name__ == "__main__":
    main()
