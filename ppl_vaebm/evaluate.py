"""Measure a fitted VAEBM: ``python -m ppl_vaebm.evaluate RUN``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ppl_vaebm.config.evaluation import OLD_NAMES, OOD_SETS, PARTS, SYNTHETIC_SETS, Part, split_parts
from ppl_vaebm.config.options import Check, Checked, OptionalCount, RunFolder, at_least, split_names
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.config import Config
    from ppl_vaebm.data.load import Data
    from ppl_vaebm.evaluation.evaluation import Plan
    from ppl_vaebm.evaluation.sections import Measured

DESCRIPTION = """Evaluate a fitted VAEBM: its normalized log-likelihood on test data; for points the modes; for images
Frechet and kernel distance, Inception Score, precision, recall, density and coverage, at the run's chain length and at
ten times that, and the nearest training images of its samples; histograms of log densities of training and test data;
with --ood those of other images. With stage svi alone: the ELBO and a tighter bound, KL of each latent group, and the
metrics of VAE samples. Prints tables and writes evaluate.json after each part, and the report; parts that are not
measured again keep their numbers as long as the weights are the same."""
FIRST = ("run", "stage", "only", "seed", "num-test", "num-samples", "steps", "features", "ood", "log-likelihood")

MIN_PARTICLES, NUM_PARTICLES = 16, 256
"""Least and default number of particles of each annealing estimate of log Z."""
NUM_SAMPLES = {"images": 2_000, "points": 10_000}
"""Default numbers of samples. 10,000 images, as in published distances of small images, take five times as long."""
LONG = 10
"""Factor on the run's chain length at which samples are measured too: a correct density is right there as well."""
USED_BY = {
    "features": ("samples", "neighbours"),
    "feature_weights": ("samples", "neighbours"),
    "ood_root": ("ood",),
    "num_particles": ("log-z",),
    "num_temperatures": ("log-z",),
}
"""Options that are not given by default, and the parts that use them."""
SPREAD = Check("at least 2 so that it has a standard error", lambda value: value >= 2)
ENOUGH = Check(
    f"at least {MIN_PARTICLES}, two for each of the sequential samplers", lambda value: value >= MIN_PARTICLES
)
Size = Annotated[int, SPREAD]


@dataclass(frozen=True)
class Options(Checked):
    """Options of evaluate."""

    run: RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """svi: evaluate the VAE; ebm: evaluate the VAEBM; the default is the run's last stage."""
    only: str | None = None
    """Parts to measure, separated by commas: likelihood, log-z (of --log-likelihood), samples, ood, histograms,
    neighbours; the default is all that fit the data, with ood where sets are named."""
    num_test: Size = 5_000
    """likelihood: test points."""
    num_importance: Size = 600
    """likelihood: samples of the guide per test point."""
    num_z_draws: Size = 200_000
    """likelihood, stage ebm: VAE samples for log Z."""
    num_samples: Annotated[int | None, SPREAD] = None
    """samples: how many; the default is 2,000 images or 10,000 points."""
    steps: Annotated[tuple[int, ...], at_least(1)] = ()
    """samples, stage ebm: chain lengths from N(0, I); the default is sampling.num-steps of the run and ten times
    that."""
    features: Literal["classifier", "inception"] | None = None
    """samples, neighbours: network of the metrics: a small classifier of the run's own data (default), or Inception-v3,
    which gives numbers that compare with published ones."""
    feature_weights: str | None = None
    """File of that network's weights; the default is features.safetensors of the run, or for Inception-v3 the file that
    torch-fidelity downloads."""
    num_reference: Size = 50_000
    """samples, neighbours: largest number of training images to compare with."""
    ood: str | None = None
    """ood, stage ebm: sets to tell from the test data, separated by commas: rotated, inverted, noise, constant,
    interpolation, vae, or names of data sets; with --only ood the default is all that need no files."""
    ood_root: str | None = None
    """ood: folder of the other data sets; the default is data.root of the run."""
    num_ood: Size = 1_000
    """ood, histograms: images, or points, of each set."""
    num_ood_importance: Size = 20
    """ood, histograms: samples of the guide for each of these."""
    log_likelihood: bool = False
    """Also estimate log Z, with stage ebm, by annealing in both directions, sequential samplers, tempered chains and a
    bridge, and bound log h."""
    num_particles: Annotated[int | None, ENOUGH] = None
    """log-likelihood: particles of each estimate; the default is 256."""
    num_temperatures: OptionalCount = None
    """log-likelihood: annealing steps; without it a pilot run chooses them."""
    seed: int = 0
    """Seed of all random numbers."""

    def check_together(self) -> None:
        """Refuse unknown names, and sets without their part."""
        parts = None if self.only is None else split_parts(self.only)
        if self.ood is not None:
            split_names(self.ood, OOD_SETS, "set")
            if parts and "ood" not in parts:
                raise ValueError("ood names sets for a part that --only leaves out: add ood to it, or leave --ood out")


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "evaluate", DESCRIPTION, FIRST)

    from ppl_vaebm.runs.run import Run  # here, because NumPy would double the time of --help

    run = Run.open(options.run)

    from ppl_vaebm.evaluation.sections import sections_text
    from ppl_vaebm.evaluation.store import read_parts, store
    from ppl_vaebm.reports.report import write_report
    from ppl_vaebm.runs.loading import stage_of

    for old in {name.strip() for name in (options.only or "").split(",")} & {*OLD_NAMES}:
        print(f"note: the part {old} is called {OLD_NAMES[old]} now", file=sys.stderr)
    read_parts(run)  # refuses a damaged file before anything slow is done
    weights, parts = (_vae if stage_of(run, options.stage) == "svi" else _vaebm)(options)
    for part, measured in parts:
        store(run, part, measured, weights, options.seed)
        print(sections_text(measured.sections), end="\n\n", flush=True)
    print(f"{run.evaluation_file}\nreport: {write_report(run)}")


def _vae(options: Options) -> tuple[str, Iterator[tuple[Part, Measured]]]:
    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.evaluation.vae import evaluate_vae
    from ppl_vaebm.models.energy import Energy
    from ppl_vaebm.models.vaebm import VAEBM
    from ppl_vaebm.runs.loading import fingerprint, open_fitted_vae

    for name in ("steps", "log_likelihood", "ood"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is of the VAEBM, and stage svi has none: leave it out")
    fitted = open_fitted_vae(options.run)
    set_threads(fitted.config.threads)
    plan = _plan(options, fitted.config, fitted.data, ("likelihood", "samples"))
    return fingerprint(VAEBM(fitted.vae, Energy()), fitted.config), evaluate_vae(fitted, plan)


def _vaebm(options: Options) -> tuple[str, Iterator[tuple[Part, Measured]]]:
    from ppl_vaebm.devices import set_threads
    from ppl_vaebm.evaluation.evaluation import evaluate
    from ppl_vaebm.runs.loading import load_run

    loaded = load_run(options.run)
    set_threads(loaded.config.threads)
    parts: list[Part] = ["likelihood", "samples", "histograms"]
    parts += ["neighbours"] if len(loaded.data.event_shape) == 3 else []
    parts += ["ood"] if options.ood is not None else []
    return loaded.fingerprint, evaluate(loaded, _plan(options, loaded.config, loaded.data, parts))


def _plan(options: Options, config: Config, data: Data, default: Sequence[Part]) -> Plan:
    """Turn the options into a plan; --log-likelihood adds its part to those of --only or to the default ones."""
    from ppl_vaebm.evaluation.evaluation import Plan
    from ppl_vaebm.evaluation.sections import Effort

    asked = default if options.only is None else split_parts(options.only)
    chosen = tuple(part for part in PARTS if part in asked or (part == "log-z" and options.log_likelihood))
    for name, parts in USED_BY.items():
        if getattr(options, name) is not None and not set(parts) & set(chosen):
            use = "--log-likelihood" if "log-z" in parts else f"the part {' or '.join(parts)}"
            raise InputError(f"--{name.replace('_', '-')} is for {use}, found it without: leave it out")
    ood = SYNTHETIC_SETS if "ood" in chosen else ()
    num_steps, kind = config.sampling.num_steps, "images" if len(data.event_shape) == 3 else "points"
    effort = Effort(
        options.num_test,
        options.num_importance,
        options.num_z_draws,
        options.num_samples or NUM_SAMPLES[kind],
        sorted(set(options.steps)) or (num_steps, LONG * num_steps),
        options.num_reference,
        options.num_ood,
        options.num_ood_importance,
        options.num_particles or NUM_PARTICLES,
        options.num_temperatures,
    )
    return Plan(
        effort=effort,
        parts=chosen,
        seed=options.seed,
        features=options.features,
        feature_weights=None if options.feature_weights is None else Path(options.feature_weights),
        ood=ood if options.ood is None else split_names(options.ood, OOD_SETS, "set"),
        ood_root=options.ood_root,
    )


if __name__ == "__main__":
    main()
