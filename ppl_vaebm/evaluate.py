"""Measure a fitted VAEBM: ``python -m ppl_vaebm.evaluate RUN``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppl_vaebm.config import commands as cli
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import InputError, exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.config import Config
    from ppl_vaebm.data.load import Data
    from ppl_vaebm.evaluation.base import Effort, Measured, Part
    from ppl_vaebm.evaluation.evaluation import Plan

DESCRIPTION = """Measure a fitted VAEBM: its normalised log-likelihood on test data; of points the modes; of images
Frechet and kernel distance, Inception Score, precision, recall, density and coverage, at the run's chain length and at
ten times that, and the training images nearest to its draws; whether training data are likelier than test data; with
--ood, whether other images are less so. Of stage svi alone: the ELBO and a tighter bound, KL of every latent group, and
metrics of the VAE's draws. Prints tables and writes evaluate.json part by part, and the report; parts that are not
measured again keep their numbers as long as the weights are the same."""

MIN_PARTICLES, NUM_PARTICLES = 16, 256
"""Least and default number of particles of every estimate of log Z by annealing."""
NUM_SAMPLES = {"images": 2_000, "points": 10_000}
"""Default numbers of samples. 10,000 images, as published distances of small images have, take five times as long."""
LONG = 10
"""How many times the run's own chain length is measured too: a density that is right is right there as well."""
USED_BY = {
    "features": ("samples", "neighbours"),
    "feature_weights": ("samples", "neighbours"),
    "ood_root": ("ood",),
    "num_particles": ("normaliser",),
    "num_temperatures": ("normaliser",),
}
"""Options that are not given by default, and the parts that look at them."""


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    run: cli.RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """What to measure: the VAE, or the VAEBM; the last stage that the run holds if not given."""
    only: str | None = None
    """Parts to measure, separated by commas: likelihood, normaliser (that of --log-likelihood), samples, ood,
    histograms, neighbours; if not given all that go with the data, ood where sets are named, normaliser with
    --log-likelihood."""
    num_test: int = 5_000
    """likelihood: test points."""
    num_importance: int = 600
    """likelihood: draws of the guide per test point."""
    num_z_draws: int = 200_000
    """ebm, likelihood: draws of the VAE for log Z."""
    num_samples: int | None = None
    """samples: how many; 2,000 images or 10,000 points if not given."""
    steps: tuple[int, ...] = ()
    """ebm, samples: chain lengths from fresh noise; the run's sampling.num-steps and ten times that if not given."""
    features: Literal["classifier", "inception"] | None = None
    """samples, neighbours: network of the metrics; a small classifier of the run's own data if not given, or
    Inception-v3, whose numbers compare with published ones."""
    feature_weights: str | None = None
    """File of that network's weights; the run's features.safetensors, or Inception-v3's as torch-fidelity fetches them,
    if not given."""
    num_reference: int = 50_000
    """samples, neighbours: training images, at most, to measure against."""
    ood: str | None = None
    """ebm, ood: sets to tell from the test data, separated by commas: rotated, inverted, noise, constant,
    interpolation, vae, or names of data sets; those that need no files if only the part is asked for."""
    ood_root: str | None = None
    """ood: folder of other data sets' files; the run's data.root if not given."""
    num_ood: int = 1_000
    """ebm, ood and histograms: images, or points, of each set."""
    num_ood_importance: int = 20
    """ebm, ood and histograms: draws of the guide for each."""
    log_likelihood: bool = False
    """ebm: estimate log Z by annealing both ways, sequential samplers, tempered chains and a bridge; bound log h."""
    num_particles: int | None = None
    """ebm: particles of each of these with --log-likelihood; 256 if not given."""
    num_temperatures: int | None = None
    """ebm: annealing steps with --log-likelihood; chosen by a pilot run if not given."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in (
            "num_test",
            "num_importance",
            "num_z_draws",
            "num_samples",
            "num_reference",
            "num_ood",
            "num_ood_importance",
        ):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name.replace('_', '-')} must be at least 2 for an error to be known, got {value}")
        if self.num_particles is not None and self.num_particles < MIN_PARTICLES:
            raise ValueError(
                f"num-particles must be at least {MIN_PARTICLES}, two for each of the sequential samplers, "
                f"got {self.num_particles}"
            )
        if self.num_temperatures is not None:
            cli.positive("num-temperatures", self.num_temperatures)
        for count in self.steps:
            cli.positive("steps", count)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "evaluate", DESCRIPTION)

    from ppl_vaebm.evaluation.store import read_sections, store
    from ppl_vaebm.evaluation.tables import lines
    from ppl_vaebm.reports.html import write_report
    from ppl_vaebm.runs.fitted_vae import stage_of
    from ppl_vaebm.runs.run import Run

    run = Run.open(options.run)
    read_sections(run)  # refuses a damaged file before anything slow is done
    weights, parts = (_vae if stage_of(run, options.stage) == "svi" else _vaebm)(options)
    for part, measured in parts:
        store(run, part, measured, weights, options.seed)
        print("\n".join([*lines(measured.sections), ""]), flush=True)
    print(f"{run.evaluation_file}\nreport: {write_report(run)}")


def _vae(options: Options) -> tuple[str, Iterator[tuple[Part, Measured]]]:
    from ppl_vaebm.evaluation.vae import evaluate_vae
    from ppl_vaebm.models.energy import Energy
    from ppl_vaebm.models.vaebm import VAEBM
    from ppl_vaebm.runs.fitted_vae import open_fitted_vae
    from ppl_vaebm.runs.loading import fingerprint

    if options.steps:
        raise InputError("steps are those of stage ebm's chains, and stage svi has none: leave the option out")
    if options.log_likelihood:
        raise InputError("log-likelihood normalises the VAEBM, and stage svi has none: leave the option out")
    if options.ood is not None:
        raise InputError("ood compares scores of the VAEBM, and stage svi has none: leave the option out")
    fitted = open_fitted_vae(options.run)
    cli.set_threads(fitted.config.threads)
    plan = _plan(options, fitted.config, fitted.data, ("likelihood", "samples"))
    return fingerprint(VAEBM(fitted.vae, Energy()), fitted.config), evaluate_vae(fitted, plan)


def _vaebm(options: Options) -> tuple[str, Iterator[tuple[Part, Measured]]]:
    from ppl_vaebm.evaluation.evaluation import evaluate
    from ppl_vaebm.runs.loading import load_run

    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    parts: list[Part] = ["likelihood", "samples", "histograms"]
    parts += ["neighbours"] if len(loaded.data.event_shape) == 3 else []
    parts += ["ood"] if options.ood is not None else []
    return loaded.fingerprint, evaluate(loaded, _plan(options, loaded.config, loaded.data, parts))


def _plan(options: Options, config: Config, data: Data, parts: Sequence[Part]) -> Plan:
    from ppl_vaebm.evaluation.evaluation import Plan
    from ppl_vaebm.evaluation.ood_sets import SYNTHETIC
    from ppl_vaebm.inference.normalizing_constant import Effort as NormaliserEffort

    chosen = _chosen(options, parts)
    _refuse_unused(options, chosen)
    ood = tuple(SYNTHETIC) if options.ood is None and "ood" in chosen else _names(options.ood)
    return Plan(
        effort=_effort(options, config, data),
        parts=chosen,
        seed=options.seed,
        features=options.features,
        feature_weights=None if options.feature_weights is None else Path(options.feature_weights),
        ood=ood,
        ood_root=options.ood_root,
        normaliser=NormaliserEffort(options.num_particles or NUM_PARTICLES, options.num_temperatures),
    )


def _chosen(options: Options, default: Sequence[Part]) -> tuple[Part, ...]:
    """Read --only, or take what goes with the data; --log-likelihood adds its part to either."""
    from ppl_vaebm.evaluation.base import PARTS

    asked: Sequence[str] = default if options.only is None else _names(options.only)
    unknown = [name for name in asked if name not in PARTS]
    if unknown or not asked:
        raise InputError(f"only: expected some of {', '.join(PARTS)}, found {', '.join(unknown) or 'none'}")
    if options.ood is not None and "ood" not in asked:
        raise InputError("ood names sets for a part that --only leaves out: add ood to --only, or leave --ood out")
    return tuple(part for part in PARTS if part in asked or (part == "normaliser" and options.log_likelihood))


def _refuse_unused(options: Options, chosen: Sequence[Part]) -> None:
    """Refuse an option that would do nothing."""
    for name, parts in USED_BY.items():
        if getattr(options, name) is not None and not set(parts) & set(chosen):
            use = "--log-likelihood" if "normaliser" in parts else f"the part {' or '.join(parts)}"
            raise InputError(f"option {name.replace('_', '-')} is for {use}, got it without: leave it out")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _effort(options: Options, config: Config, data: Data) -> Effort:
    from ppl_vaebm.evaluation.base import Effort

    num_steps = config.sampling.num_steps
    kind = "images" if len(data.event_shape) == 3 else "points"
    return Effort(
        options.num_test,
        options.num_importance,
        options.num_z_draws,
        NUM_SAMPLES[kind] if options.num_samples is None else options.num_samples,
        sorted(set(options.steps)) or (num_steps, LONG * num_steps),
        options.num_reference,
        options.num_ood,
        options.num_ood_importance,
    )


if __name__ == "__main__":
    main()
