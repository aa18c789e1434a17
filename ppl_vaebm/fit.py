"""Fit a VAEBM: stage svi (the VAE), then stage ebm (the energy). ``python -m ppl_vaebm.fit --help``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from ppl_vaebm import cli
from ppl_vaebm.config import Config
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.options import load_yaml, parse, parse_known, recipe_names, recipe_path, to_dict, tokens

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
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options, folder = resolve(sys.argv[1:] if argv is None else argv)
    config = options.config
    resolved = yaml.safe_dump(to_dict(config), sort_keys=False)
    print(f"run: {folder}\nstage: {options.stage}\n{resolved}", end="")
    if options.stage == "ebm" and (config.ebm.objective == "ratio" or config.ebm.negatives == "importance"):
        unused = "kernel, ebm.negatives and" if config.ebm.objective == "ratio" else "kernel and"
        print(f"note: this stage learns from draws of the VAE and runs no chains; {unused} ebm.replay-* are not used")

    from ppl_vaebm.data import KeyedSampler, load_data
    from ppl_vaebm.files import write_atomic
    from ppl_vaebm.inference.ebm import fit_ebm, new_vaebm
    from ppl_vaebm.inference.svi import fit_svi, new_vae
    from ppl_vaebm.loading import check_absent, check_device, clear, load_finished_vae, load_to_resume
    from ppl_vaebm.report import write_report
    from ppl_vaebm.run import Run

    cli.set_threads(config.threads)
    check_device(config.device)
    data = load_data(config.data, config.seed)
    if options.dry_run:
        print(new_vaebm(config, new_vae(config, data)))
        return
    # Whatever may be refused is refused here, before anything is touched.
    run, resume = Run(folder), None
    if options.resume:
        resume = load_to_resume(run, options.stage, config)
    elif not options.overwrite:
        check_absent(run, options.stage)
    vae = load_finished_vae(run, config, data) if options.stage == "ebm" else None
    new_vaebm(config, vae or new_vae(config, data))
    KeyedSampler(len(data.train), (config.svi if vae is None else config.ebm).batch_size, config.seed)
    run = Run.create(folder)
    if resume is None:
        clear(run, options.stage)
    write_atomic(run.config_file, resolved)
    if vae is None:
        fit_svi(run, config, data, resume)
    else:
        fit_ebm(run, config, data, vae, resume)
    print(f"report: {write_report(run)}")


if __name__ == "__main__":
    main()
