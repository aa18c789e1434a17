"""Measure a fitted VAEBM: ``python -m ppl_vaebm.evaluate RUN``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from ppl_vaebm import cli
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.options import parse

DESCRIPTION = """Measure a fitted VAEBM: its normalised log-likelihood on test data; modes, where the data's are known;
Frechet distances in the features of a small classifier, where the data are labelled images. Prints one table and
writes evaluate.json and the report."""


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    run: cli.RunFolder
    """Folder of the run."""
    num_test: int = 5_000
    """Test points for the likelihood."""
    num_importance: int = 600
    """Draws of the guide per test point."""
    num_z_draws: int = 200_000
    """Draws of the VAE for log Z."""
    num_samples: int = 10_000
    """Samples for the metrics of samples."""
    steps: tuple[int, ...] = ()
    """Chain lengths from fresh noise; the run's sampling.num-steps and five times that if not given."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("num_test", "num_importance", "num_z_draws", "num_samples"):
            value = getattr(self, name)
            if value < 2:
                raise ValueError(f"{name.replace('_', '-')} must be at least 2 for an error to be known, got {value}")
        for count in self.steps:
            cli.positive("steps", count)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "evaluate", DESCRIPTION)

    from ppl_vaebm.evaluation import Effort, evaluate, lines
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.loading import load_run
    from ppl_vaebm.report import write_report

    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    num_steps = loaded.config.sampling.num_steps
    effort = Effort(
        options.num_test,
        options.num_importance,
        options.num_z_draws,
        options.num_samples,
        sorted(set(options.steps)) or (num_steps, 5 * num_steps),
    )
    sections = evaluate(loaded, effort, options.seed)
    print("\n".join(lines(sections)))
    write_atomic(loaded.run.evaluation_file, json.dumps(sections, indent=2) + "\n")
    print(f"\n{loaded.run.evaluation_file}\nreport: {write_report(loaded.run)}")


if __name__ == "__main__":
    main()
