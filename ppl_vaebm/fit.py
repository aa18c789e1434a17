"""Fit a VAEBM: stage svi (the VAE), then stage ebm (the energy). ``python -m ppl_vaebm.fit --help``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
import yaml

from ppl_vaebm import cli
from ppl_vaebm.config import Config, load_yaml, parse, recipe_names, recipe_path, to_dict, tokens
from ppl_vaebm.errors import InputError, exits_with_one_sentence

if TYPE_CHECKING:
    from ppl_vaebm.checkpoint import Checkpoint
    from ppl_vaebm.run import Run

DESCRIPTION = """Fit a VAEBM. Stage svi fits the VAE by stochastic variational inference, stage ebm then learns the
energy. Options come from the run's config.yaml if it has one, else from the recipe (the data set's own, if it has one
and no other is named), and from the command line, which wins."""


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
    """Start the stage again, removing its checkpoints and those that depend on them."""
    dry_run: bool = False
    """Print the configuration and the networks, and write nothing."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one")


def resolve(argv: list[str]) -> tuple[Options, Path]:
    """Read the command line over the run's configuration or a recipe.

    Args:
        argv: tokens of the command line.

    Returns:
        The options and the run's folder.

    Raises:
        InputError: a wrong option, here or in the files.
    """
    asked = parse(Options, argv, "fit", DESCRIPTION)
    name = Path(asked.recipe).stem if asked.recipe else asked.config.data.name
    folder = Path(asked.run) if asked.run else Path("runs") / name
    files = [folder / "config.yaml"] if (folder / "config.yaml").is_file() else []
    if asked.recipe:
        files.append(recipe_path(asked.recipe))
    elif not files and name in recipe_names():
        files.append(recipe_path(name))
    base: list[str] = []
    for file in files:
        base += tokens(load_yaml(file))
        parse(Options, base, f"fit (options in {file})")  # so that a message names the file
    return parse(Options, [*base, *argv], "fit", DESCRIPTION), folder


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options, folder = resolve(sys.argv[1:] if argv is None else argv)
    config = options.config
    resolved = yaml.safe_dump(to_dict(config), sort_keys=False)
    print(f"run: {folder}\nstage: {options.stage}\n{resolved}", end="")

    from ppl_vaebm.data import load_data
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.inference.ebm import fit_ebm, new_vaebm
    from ppl_vaebm.inference.svi import fit_svi, new_vae
    from ppl_vaebm.loading import load_vae
    from ppl_vaebm.report import write_report
    from ppl_vaebm.run import Run

    cli.set_threads(config.threads)
    data = load_data(config.data, config.seed)
    if options.dry_run:
        print(new_vaebm(config, new_vae(config, data)))
        return
    resume = _resumed(Run(folder), options)
    vae = load_vae(Run(folder), config, data) if options.stage == "ebm" else None
    new_vaebm(config, vae or new_vae(config, data))  # refuses networks that do not fit, before anything is touched
    run = Run.create(folder)
    if resume is None:
        _clear(run, options.stage)
    write_atomic(run.config_file, resolved)
    if vae is None:
        fit_svi(run, config, data, resume)
    else:
        fit_ebm(run, config, data, vae, resume)
    print(f"report: {write_report(run)}")


def _resumed(run: Run, options: Options) -> Checkpoint | None:
    """Find what to resume from; refuse to start a stage again that is there already."""
    from ppl_vaebm import checkpoint as checkpoints
    from ppl_vaebm.loading import check_same

    stage, folder = options.stage, run.checkpoints(options.stage)
    steps = checkpoints.available(folder)
    if options.resume:
        if not steps:
            raise InputError(f"expected a checkpoint of stage {stage} in {run.path}, found none; leave out --resume")
        saved = checkpoints.load(folder, "last")
        sections = ("seed", "data", "model", "svi") if stage == "svi" else tuple(to_dict(Config()))
        check_same(saved.config, options.config, sections, f"stage {stage} in {run.path}")
        return saved
    if steps and not options.overwrite:
        raise InputError(
            f"{run.path} already holds stage {stage}, {steps[-1]} steps; "
            "continue it with --resume, start it again with --overwrite, or name another --run"
        )
    return None


def _clear(run: Run, stage: Literal["svi", "ebm"]) -> None:
    """Make room for a stage. The energy belongs to its VAE, so a new stage svi makes the old stage ebm void."""
    for void in ("svi", "ebm") if stage == "svi" else ("ebm",):
        shutil.rmtree(run.checkpoints(void), ignore_errors=True)
        if run.metrics_file.is_file():
            run.rewind_metrics(void, 0)


if __name__ == "__main__":
    main()
