"""Fit a VAEBM: stage svi (the VAE), then stage ebm (the energy). ``python -m ppl_vaebm.fit --help``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ppl_vaebm.config import Config
from ppl_vaebm.config import commands as cli
from ppl_vaebm.config.parsing import as_yaml, load_yaml, parse, parse_known, recipe_names, recipe_path, tokens
from ppl_vaebm.errors import exits_with_one_sentence

DESCRIPTION = """Fit a VAEBM. Stage svi fits the VAE by stochastic variational inference, stage ebm then learns the
energy. Options come from the run's config.yaml if it has one, else from the data set's own recipe; then from the recipe
that is named, if one is; then from the command line, which wins."""


@dataclass(frozen=True)
class Options:
    """Options of fit."""

    stage: Literal["svi", "ebm"] = "svi"
    """svi: the VAE; ebm: the energy, on a run whose stage svi is done."""
    run: str | None = None
    """Folder of the run; runs/<recipe or data set> if not given."""
    recipe: str | None = None
    """Recipe that ships, by name, or a YAML file of the same form."""
    resume: bool = False
    """Continue an interrupted stage from its last checkpoint."""
    overwrite: bool = False
    """Start the stage again, removing its checkpoints, those that depend on them, and what was drawn and measured."""
    dry_run: bool = False
    """Print the configuration and the networks, and write nothing."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one")
        if self.run == "":
            raise ValueError("run must name a folder, got an empty name")


@dataclass(frozen=True)
class _Places:
    """The options that say which files hold the others."""

    run: str | None = None
    recipe: str | None = None
    data: Annotated[str, tyro.conf.arg(name="data.name", aliases=["--data"])] = Config().data.name


def resolve(argv: list[str]) -> tuple[Options, Path]:
    """Read the command line over the run's configuration or a recipe.

    Args:
        argv: tokens of the command line.

    Returns:
        The options and the run's folder.

    Raises:
        InputError: a wrong option, here or in the files.
    """
    # Not the whole command line yet: an option may be wrong beside the defaults, and right beside the recipe.
    asked = parse_known(_Places, argv, "fit")
    name = Path(asked.recipe).stem if asked.recipe else asked.data
    folder = Path(asked.run) if asked.run else Path("runs") / name
    files = [folder / "config.yaml"] if (folder / "config.yaml").is_file() else []
    if asked.recipe:
        files.append(recipe_path(asked.recipe))
    elif not files and name in recipe_names():
        files.append(recipe_path(name))
    base: list[str] = []
    for file in files:
        base += tokens(load_yaml(file))
        parse(Config, base, f"fit (options in {file})")  # so that a message names the file
    options = parse(Options, [*base, *argv], "fit", DESCRIPTION)
    if options.config.kernel.name != parse(Config, base, "fit").kernel.name:
        # The files chose these for another kernel than the command line names.
        foreign = ("--kernel.step-size=", "--kernel.target-acceptance=")
        base = [token for token in base if not token.startswith(foreign)]
        options = parse(Options, [*base, *argv], "fit", DESCRIPTION)
    return options, folder


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command, alone or as one of the processes that torchrun started.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options, folder = resolve(sys.argv[1:] if argv is None else argv)

    if options.dry_run:
        from ppl_vaebm.inference.ebm.train import check_kernel
        from ppl_vaebm.models.build import check_continuous_x
        from ppl_vaebm.runs.dry_run import describe

        if options.stage == "ebm":
            check_kernel(options.config)
            check_continuous_x(options.config)
        _announce(options.stage, folder, options.config)
        print("\n".join(describe(options.config)))
        return

    from ppl_vaebm.devices import check_bfloat16, check_device
    from ppl_vaebm.processes import joined, own_device
    from ppl_vaebm.runs.fitting import Request, fit_stage

    cli.set_threads(options.config.threads)
    device = own_device(os.environ, options.config.device)
    check_device(device)
    if (options.config.svi if options.stage == "svi" else options.config.ebm).bf16:
        check_bfloat16(device, f"{options.stage}.bf16")
    request = Request(options.stage, folder, options.resume, options.overwrite)
    with joined(os.environ, device) as process:
        fit_stage(request, options.config, process, device, partial(_announce, options.stage, folder))


def _announce(stage: str, folder: Path, config: Config) -> str:
    """Print the resolved configuration, and return it as it is written."""
    resolved = as_yaml(config)
    print(f"run: {folder}\nstage: {stage}\n{resolved}", end="")
    if stage == "ebm" and not config.ebm.has_chains:
        unused = "kernel, ebm.negatives and" if config.ebm.objective == "ratio" else "kernel and"
        print(f"note: this stage learns from draws of the VAE and runs no chains; {unused} ebm.replay-* are not used")
    return resolved


if __name__ == "__main__":
    main()
