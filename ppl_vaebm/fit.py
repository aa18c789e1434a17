"""Fit a VAEBM: stage svi (the VAE), then stage ebm (the energy). ``python -m ppl_vaebm.fit --help``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from ppl_vaebm.config import Config
from ppl_vaebm.config.options import FLAT, Checked
from ppl_vaebm.config.parsing import as_yaml, last_value, parse, tokens
from ppl_vaebm.config.recipes import load_yaml, recipe_names, recipe_path
from ppl_vaebm.errors import InputError, exits_with_one_sentence

DESCRIPTION = """Fit a VAEBM: stage svi fits the VAE by stochastic variational inference, stage ebm then learns the
energy. Options are read from the run's config.yaml, or without one from the recipe named like the data set; then from
the recipe that is named; then from the command line. Later ones win. Values in brackets are those used now; --kernel
NAME --help shows the options of another kernel."""
FIRST = (
    *("stage", "recipe", "data.name", "data.root", "run", "resume", "overwrite", "dry-run"),
    *("ebm.objective", "kernel.name"),
)
KERNEL_TUNING = ("--kernel.step-size=", "--kernel.target-acceptance=")
"""Tokens of options that are chosen for one kernel and are wrong for another."""


@dataclass(frozen=True)
class Options(Checked):
    """Options of fit."""

    stage: Literal["svi", "ebm"] = "svi"
    """svi: fit the VAE; ebm: learn the energy, in a run whose stage svi is complete."""
    run: str | None = None
    """Folder of the run; the default is runs/ and the name of the recipe or data set."""
    recipe: str | None = None
    """Name of a recipe that ships with the package, or a YAML file of the same form."""
    resume: bool = False
    """Continue an interrupted stage from its last checkpoint."""
    overwrite: bool = False
    """Start the stage anew; removes its checkpoints, those that depend on them, and samples and results."""
    dry_run: bool = False
    """Print the configuration, the networks and the memory they need, and write nothing."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one")


def resolve(argv: list[str]) -> tuple[Options, Path]:
    """Parse the command line on top of the run's configuration or a recipe.

    Args:
        argv: tokens of the command line.

    Returns:
        The options and the run's folder.

    Raises:
        InputError: a wrong option, in the command line or in a file.
    """
    recipe, run = last_value(argv, "--recipe"), last_value(argv, "--run")
    name = Path(recipe).stem if recipe else last_value(argv, "--data", "--data.name") or Config().data.name
    folder = Path(run or Path("runs") / name)
    if any(place.is_file() for place in (folder, *folder.parents)):
        raise InputError(f"expected a folder for the run at {folder}, found a file; name another folder")
    files = [folder / "config.yaml"] if (folder / "config.yaml").is_file() else []
    if recipe:
        files.append(recipe_path(recipe))
    elif not files and name in recipe_names():
        files.append(recipe_path(name))
    base: list[str] = []
    for file in files:
        base += tokens(load_yaml(file))
        parse(Config, base, f"fit (options in {file})")  # so that a message names the file
    kernel = last_value(argv, "--kernel", "--kernel.name")
    if kernel and kernel != (last_value(base, "--kernel", "--kernel.name") or Config().kernel.name):
        base = [token for token in base if not token.startswith(KERNEL_TUNING)]
    return parse(Options, [*base, *argv], "fit", DESCRIPTION, FIRST), folder


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command, alone or as one of the processes that torchrun started."""
    options, folder = resolve(sys.argv[1:] if argv is None else argv)

    if options.dry_run:
        from ppl_vaebm.models.vaebm import check_continuous_x
        from ppl_vaebm.runs.dry_run import describe

        if options.stage == "ebm":
            check_continuous_x(options.config)
        _announce(options.stage, folder, options.config)
        print("\n".join(describe(options.config)))
        return

    from ppl_vaebm.devices import check_bfloat16, check_device, joined, own_device, set_threads
    from ppl_vaebm.reports.gallery import gallery_grids, save_png
    from ppl_vaebm.reports.report import write_report
    from ppl_vaebm.runs.fitting import Request, fit_stage
    from ppl_vaebm.runs.run import Run

    set_threads(options.config.threads)
    device = own_device(os.environ, options.config.device)
    check_device(device)
    if (options.config.svi if options.stage == "svi" else options.config.ebm).bf16:
        check_bfloat16(device, f"{options.stage}.bf16")
    request = Request(options.stage, folder, options.resume, options.overwrite)
    with joined(os.environ, device) as process:
        fit_stage(request, options.config, process, device, partial(_announce, options.stage, folder), gallery_grids)
        if process.is_first:
            run = Run(folder)
            if options.stage == "svi":
                for file in run.samples_dir.glob("svi_*.npz"):
                    save_png(file)
            print(f"report: {write_report(run)}")


def _announce(stage: str, folder: Path, config: Config) -> str:
    """Print the resolved configuration, and return it as it is written."""
    resolved = as_yaml(config)
    print(f"run: {folder}\nstage: {stage}\n{resolved}", end="")
    if stage == "ebm" and not config.ebm.has_chains:
        unused = "kernel, ebm.negatives and" if config.ebm.objective == "ratio" else "kernel and"
        print(f"note: this stage learns from VAE samples and runs no chains; {unused} ebm.replay-* are not used")
    elif stage == "ebm" and config.kernel.useless():
        print(f"note: kernel {config.kernel.name} does not use {', '.join(config.kernel.useless())}")
    return resolved


if __name__ == "__main__":
    main()
