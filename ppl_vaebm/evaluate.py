"""Measure a fitted VAEBM: ``python -m ppl_vaebm.evaluate RUN``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ppl_vaebm import cli
from ppl_vaebm.errors import InputError, exits_with_one_sentence
from ppl_vaebm.options import parse

if TYPE_CHECKING:
    from ppl_vaebm.evaluation import Effort, Section

DESCRIPTION = """Measure a fitted VAEBM: its normalised log-likelihood on test data; modes, where the data's are known;
Frechet distances in the features of a small classifier, where the data are labelled images. Of stage svi alone: the
ELBO and a tighter bound, KL of every latent group, modes and Frechet distances of the VAE. Prints one table and writes
evaluate.json and the report."""

MIN_PARTICLES = 16


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    run: cli.RunFolder
    """Folder of the run."""
    stage: Literal["svi", "ebm"] | None = None
    """What to measure: the VAE, or the VAEBM; the last stage that the run holds if not given."""
    num_test: int = 5_000
    """Test points for the likelihood."""
    num_importance: int = 600
    """Draws of the guide per test point."""
    num_z_draws: int = 200_000
    """ebm: draws of the VAE for log Z."""
    num_samples: int = 10_000
    """Samples for the metrics of samples."""
    steps: tuple[int, ...] = ()
    """ebm: chain lengths from fresh noise; the run's sampling.num-steps and five times that if not given."""
    log_likelihood: bool = False
    """ebm: estimate log Z by annealing both ways, sequential samplers, tempered chains and a bridge; bound log h."""
    num_particles: int = 256
    """ebm: particles of each of these with --log-likelihood."""
    num_temperatures: int | None = None
    """ebm: annealing steps with --log-likelihood; chosen by a pilot run if not given."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("num_test", "num_importance", "num_z_draws", "num_samples"):
            value = getattr(self, name)
            if value < 2:
                raise ValueError(f"{name.replace('_', '-')} must be at least 2 for an error to be known, got {value}")
        if self.num_particles < MIN_PARTICLES:
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

    from ppl_vaebm.evaluation import lines
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.fitted_vae import stage_of
    from ppl_vaebm.report import write_report
    from ppl_vaebm.run import Run

    run = Run.open(options.run)
    measure = _measure_vae if stage_of(run, options.stage) == "svi" else _measure_vaebm
    sections = measure(options)
    print("\n".join(lines(sections)))
    write_atomic(run.evaluation_file, json.dumps(sections, indent=2) + "\n")
    print(f"\n{run.evaluation_file}\nreport: {write_report(run)}")


def _measure_vae(options: Options) -> dict[str, Section]:
    from ppl_vaebm.evaluation_svi import evaluate_vae
    from ppl_vaebm.fitted_vae import open_fitted_vae

    if options.steps:
        raise InputError("steps are those of stage ebm's chains, and stage svi has none: leave the option out")
    if options.log_likelihood:
        raise InputError("log-likelihood normalises the VAEBM, and stage svi has none: leave the option out")
    fitted = open_fitted_vae(options.run)
    cli.set_threads(fitted.config.threads)
    return evaluate_vae(fitted, _effort(options, ()), options.seed)


def _measure_vaebm(options: Options) -> dict[str, Section]:
    from ppl_vaebm.evaluation import evaluate, likelihood_terms
    from ppl_vaebm.loading import load_run

    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    num_steps = loaded.config.sampling.num_steps
    steps = tuple(sorted(set(options.steps))) or (num_steps, 5 * num_steps)
    effort = _effort(options, steps)
    terms = likelihood_terms(loaded, effort, options.seed)
    sections = evaluate(loaded, effort, options.seed, terms)
    if options.log_likelihood:
        from ppl_vaebm.evaluation_normaliser import normaliser_sections
        from ppl_vaebm.inference.normaliser import Effort

        how_much = Effort(options.num_particles, options.num_temperatures)
        sections |= normaliser_sections(loaded, how_much, terms, options.seed)
    return sections


def _effort(options: Options, steps: tuple[int, ...]) -> Effort:
    from ppl_vaebm.evaluation import Effort

    return Effort(options.num_test, options.num_importance, options.num_z_draws, options.num_samples, steps)


if __name__ == "__main__":
    main()
