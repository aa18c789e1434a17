"""Study: stage 2 of digits in a setting that explodes, without the guard and with it.

``python -m ppl_vaebm.experiments.stability FOLDER`` fits the VAE and then the energy twice, from the same seed with the
same settings: persistent unadjusted chains with a large step, a high learning rate, and no limit on the scale of the
energy. It measures the Frechet distance of every checkpoint that either fit wrote and of its final weights, and writes
stability.json and stability.png to the folder (a quarter of an hour on one core).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator

from ppl_vaebm.config import Config, KernelConfig
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.experiments.studies import (
    DataDistance,
    folder_of,
    load_vaebm,
    recipe,
    save_results,
    shared_vae,
    with_options,
)
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.sampling import sample_by_chains
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.reports.figures import TITLE_POINTS, axes_grid, png_of
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

RECIPE = "digits"
# Euler's step of eta = 0.25, and no L2: the energy steepens until the steps are too large for it.
SETTING: dict[str, Mapping[str, Any]] = {
    "ebm": {
        "steps": 600,
        "batch_size": 32,
        "num_transitions": 5,
        "learning_rate": 5e-3,
        "final_learning_rate": 5e-3,
        "energy_l2": 0.0,
        "checkpoint_every": 50,
        "validate_every": 50,
        "num_validation_draws": 2_000,
        # Before the energy gap explodes the Langevin step becomes too large for the energy: its acceptance falls from
        # 0.87 to 0.55, and the draws get worse.
        "min_acceptance": 0.6,
    },
    "kernel": {"name": "langevin", "step_size": 0.5, "target_acceptance": None},
}
NUM_STEPS = 50
"""Of the training's kernel, from fresh noise: ten times as many as in training."""
NUM_SAMPLES = 2_000
"""Of each distance: with 500 its standard deviation over three sets of chains was 1 to 3."""
SEED = 0


@dataclass
class Attempt:
    """Result of one of the two fits."""

    records: list[Mapping[str, Any]] = field(default_factory=list)
    """All records, also those that the guard removed from the run."""
    error: str | None = None
    """Message of the error that ended it."""
    seconds: float = 0.0
    """Processor seconds."""
    vaebm: VAEBM | None = None
    """The fitted VAEBM, unless an error ended the fit."""


@dataclass
class Keeper:
    """Mirror of a run with the records and checkpoints that the guard removes."""

    run: Run
    """The run; copies go into its folder ``kept``, by the number of rollbacks and the step."""
    records: list[Mapping[str, Any]]
    """All records, each once."""
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Step and time of the checkpoints that were copied."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Keep a record; at every rollback the guard logs the rollbacks before it again."""
        if "event" not in record or record not in self.records:
            self.records.append(record)
        self.keep_new()

    def rewind(self, stage: str, step: int) -> None:
        """Keep all records."""

    def keep_new(self) -> None:
        """Copy new checkpoints."""
        written = self.run.checkpoints("ebm")
        for step in checkpoints.available(written):
            path = written / f"step-{step:08d}"
            key = (step, path.stat().st_mtime_ns)
            if key not in self.seen:
                self.seen.add(key)
                num_rollbacks = checkpoints.load(written, step).state["guard"]["num_rollbacks"]
                shutil.copytree(path, self.run.path / "kept" / str(num_rollbacks) / path.name, dirs_exist_ok=True)


def setting(has_guard: bool) -> Config:
    """Return the recipe with the setting that explodes."""
    return with_options(recipe(RECIPE), SETTING, {"ebm": {"guard": has_guard}})


def attempt(folder: Path, config: Config, data: Data, vae: HierarchicalVAE) -> Attempt:
    """Fit the energy once in a folder, which is emptied, and keep a copy of every checkpoint in ``kept``."""
    shutil.rmtree(folder, ignore_errors=True)
    result, run = Attempt(), Run.create(folder)
    keeper = Keeper(run, result.records)
    run = replace(run, mirror=keeper)
    start = time.process_time()
    try:
        result.vaebm = fit_ebm(run, config, data, vae)
    except DivergedError as error:
        result.error = str(error)
    result.seconds = time.process_time() - start
    keeper.keep_new()
    return result


def distance_of(vaebm: VAEBM, kernel: KernelConfig, distance: DataDistance) -> float | None:
    """Return the Frechet distance of chains from N(0, I) to the training data; ``None`` where one is not finite."""
    potential = noise_potential(vaebm.requires_grad_(False))
    chains = sample_by_chains(potential, kernel, num=NUM_SAMPLES, steps=[NUM_STEPS], seed=SEED)
    return distance(potential, chains.positions[NUM_STEPS])


def distances(
    folder: Path, config: Config, vae: HierarchicalVAE, distance: DataDistance
) -> list[dict[str, float | int | None]]:
    """Measure every checkpoint that :func:`attempt` kept: rollbacks before it, step and Frechet distance."""
    return [
        {
            "num_rollbacks": int(parent.name),
            "step": step,
            "frechet_distance": distance_of(load_vaebm(parent, config, vae, step), config.kernel, distance),
        }
        for parent in sorted((folder / "kept").iterdir())
        for step in checkpoints.available(parent)
    ]


def summary(result: Attempt, measured: Sequence[Mapping[str, Any]], end: float | None, limit: float) -> dict[str, Any]:
    """Summarize an attempt with its measured checkpoints and the Frechet distance of its end, in plain numbers."""
    steps = [record for record in result.records if "energy_gap" in record]
    gaps = [float(record["energy_gap"]) for record in steps]
    beyond = [r["step"] for r, gap in zip(steps, gaps, strict=True) if not abs(gap) <= limit]
    scored = [point["frechet_distance"] for point in measured if point["frechet_distance"] is not None]
    finite = [abs(gap) for gap in gaps if math.isfinite(gap)]
    return {
        "first step with the energy gap beyond its limit or not finite": beyond[0] if beyond else None,
        "steps with the energy gap beyond its limit or not finite": len(beyond),
        "largest finite energy gap (nats)": max(finite),
        "last energy gap (nats)": str(gaps[-1]) if not math.isfinite(gaps[-1]) else gaps[-1],
        "events": [record for record in result.records if "event" in record],
        "ended by": result.error,
        "Frechet distance of the result": end,
        "least Frechet distance of a checkpoint": min(scored) if scored else None,
        "Frechet distance of the last checkpoint": measured[-1]["frechet_distance"] if measured else None,
        "checkpoints": list(measured),
        "processor seconds": round(result.seconds, 1),
    }


def figure_of(attempts: Mapping[str, Attempt], results: Mapping[str, Any], limit: float) -> bytes:
    """Draw the energy gap and the Frechet distance of both attempts against the updates made, as a PNG file."""
    figure, axes = axes_grid(1, 2)
    gap_axes, distance_axes = axes[0]
    # Set before anything is drawn, so that the margins are those of this scale.
    gap_axes.set_yscale("symlog", linthresh=limit, linscale=10)
    for name, result in attempts.items():
        gaps = [float(record["energy_gap"]) for record in result.records if "energy_gap" in record]
        gap_axes.plot(range(1, len(gaps) + 1), gaps, linewidth=0.8, label=name)
        measured = results[name]["checkpoints"]
        updates = _updates(result.records, measured)
        distance_axes.plot(updates, [point["frechet_distance"] for point in measured], ".-", linewidth=0.8, label=name)
    for bound in (-limit, limit):
        gap_axes.axhline(bound, color="grey", linestyle="--", linewidth=0.8)
    gap_axes.set_yticks([*(-(10.0**power) for power in range(20, 2, -6)), -limit, 0, limit])
    gap_axes.minorticks_off()
    gap_axes.set_title("energy gap, data minus chains (nats); dashed: its limit", fontsize=TITLE_POINTS)
    distance_axes.set_yscale("log")
    distance_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    distance_axes.yaxis.set_major_formatter("{x:g}")
    distance_axes.minorticks_off()
    distance_axes.set_title(f"Frechet distance of {NUM_STEPS} steps, by checkpoint", fontsize=TITLE_POINTS)
    for ax in axes[0]:
        ax.set_xlabel("updates made, including those that were undone", fontsize=TITLE_POINTS)
        ax.legend(fontsize=TITLE_POINTS, loc="lower left" if ax is gap_axes else "upper left")
    return png_of(figure)


def _updates(records: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> list[int]:
    """Count the updates before each checkpoint.

    The guard's last checkpoint is written again after the last rollback, so its step belongs to an earlier attempt.
    """
    made = [(record["num_rollbacks"], record["step"]) for record in records if "energy_gap" in record]
    return [
        1 + max(i for i, (back, step) in enumerate(made) if step == point["step"] and back <= point["num_rollbacks"])
        for point in measured
    ]


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the study in the folder that is named."""
    torch.set_num_threads(1)
    folder = folder_of(argv)
    configs = {"guard off": setting(has_guard=False), "guard on": setting(has_guard=True)}
    base = configs["guard on"]
    data, limit = load_data(base.data, base.seed), base.ebm.max_energy_gap
    vae = shared_vae(folder, base, data)
    distance = DataDistance(folder, data, SEED)
    attempts, results = {}, {}
    for name, config in configs.items():
        own_folder = folder / name.replace(" ", "-")
        attempts[name] = attempt(own_folder, config, data, vae)
        measured = distances(own_folder, config, vae, distance)
        vaebm = attempts[name].vaebm
        end = None if vaebm is None else distance_of(vaebm, config.kernel, distance)
        results[name] = summary(attempts[name], measured, end, limit)
    save_results(folder / "stability.json", {"setting": SETTING, "energy gap's limit (nats)": limit, **results})
    write_atomic(folder / "stability.png", figure_of(attempts, results, limit))
    for name, result in results.items():
        print(name, {key: value for key, value in result.items() if key != "checkpoints"})


if __name__ == "__main__":
    main()
