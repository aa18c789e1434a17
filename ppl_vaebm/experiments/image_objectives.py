"""Study: stage 2 of images by every objective and kernel at equal cost.

``python -m ppl_vaebm.experiments.image_objectives FOLDER`` fits the VAE of the recipe digits and then each setting
below, with the same number of evaluations of the potential for training (twenty minutes on one core), and writes
FOLDER/image-objectives.json and a table. One adjusted kernel, the same for all, samples each density at the chain
length of training, at ten times and at thirty times that: samples of a short-run sampler get worse with length, and
those of a good density do not. A second table compares kernels as samplers of one energy, at equal evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ppl_vaebm.config import Config, KernelConfig
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.experiments.objectives import DEFAULTS
from ppl_vaebm.experiments.studies import (
    DataDistance,
    folder_of,
    load_results,
    load_vaebm,
    recipe,
    run_of,
    save_results,
    shared_vae,
    with_options,
)
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.ebm.validation import likelihood_gain
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import chain_blocks
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import seed_for
from ppl_vaebm.runs.run import Run

RECIPE = "digits"
SEED = 0
NUM_EVALS = 3_300
"""Evaluations per chain of a batch for training: 300 updates of ten gradient steps and one for the start."""
NUM_SAMPLES = 600
JUDGED_BY = KernelConfig("mala", target_acceptance=0.75)
LENGTHS = (10, 100, 300)
NUM_Z_DRAWS = 100_000

PERSISTENT = {"replay_probability": 0.95}
GENTLE = {**PERSISTENT, "energy_l2": 0.02, "learning_rate": 5e-4, "final_learning_rate": 5e-6}
# The paper's Langevin does not adjust; eta = 1e-2 here, which moved digits best of what was tried.
LANGEVIN = {"name": "langevin", "step_size": 0.1, "target_acceptance": None}

SETTINGS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "mala": (11, {"kernel": {"name": "mala"}, "ebm": PERSISTENT}),
    "hmc": (10, {"kernel": {"name": "hmc", "num_steps": 3}, "ebm": {**PERSISTENT, "num_transitions": 3}}),
    "chees": (10, {"kernel": {"name": "chees", "max_num_steps": 6}, "ebm": {**PERSISTENT, "num_transitions": 3}}),
    "pcn": (11, {"kernel": {"name": "pcn", "target_acceptance": None}, "ebm": PERSISTENT}),
    "mixture": (
        10,
        {
            "kernel": {"name": "mixture", "num_steps": 3, "members": ["independence", "hmc"]},
            "ebm": {**PERSISTENT, "num_transitions": 2},
        },
    ),
    "tempered": (13, {"kernel": {"name": "tempered", "num_levels": 6}, "ebm": {**PERSISTENT, "num_transitions": 2}}),
    "langevin, persistent, L2": (11, {"kernel": LANGEVIN, "ebm": GENTLE}),
    "langevin, short run (the paper's)": (11, {"kernel": LANGEVIN, "ebm": {"energy_l2": 0.0, "learning_rate": 1e-3}}),
    "ratio": (11, {"ebm": {"objective": "ratio", "num_importance": 704}}),
    "ratio, then mala": (11, {"kernel": {"name": "mala"}, "ebm": {**PERSISTENT, "ratio_steps": 100}}),
}
"""By name: evaluations of one update per chain, and what differs from the recipe."""

SAMPLERS = {
    "langevin": KernelConfig("langevin", step_size=0.1),
    "mala": JUDGED_BY,
    "mala, leapfrog": replace(JUDGED_BY, integrator="leapfrog"),
    "hmc": KernelConfig("hmc", num_steps=3),
    "pcn": KernelConfig("pcn"),
    "chees": KernelConfig("chees"),
    "mixture": KernelConfig("mixture", num_steps=3),
    "tempered": KernelConfig("tempered"),
}
SAMPLED = "mala"
"""The setting whose energy they sample."""
BUDGETS = (12, 120, 360)
"""Evaluations per sample of the second table."""


def fit_setting(
    run: Run, base: Config, name: str, data: Data, vae: HierarchicalVAE, distance: DataDistance
) -> dict[str, Any]:
    """Fit one setting, and measure processor seconds, likelihood gain, and samples by chain length.

    Where the training diverges, the result is its message.
    """
    evals_per_update, options = SETTINGS[name]
    config = with_options(base, DEFAULTS, {"ebm": {"energy_l2": base.ebm.energy_l2}}, options)
    steps = NUM_EVALS // evals_per_update
    config = replace(config, ebm=replace(config.ebm, steps=steps, checkpoint_every=steps, validate_every=steps))
    start = time.process_time()
    try:
        vaebm = fit_ebm(run, config, data, vae)
    except DivergedError as error:
        return {"ended by": str(error), "seconds": time.process_time() - start}
    seconds = time.process_time() - start
    potential = noise_potential(vaebm.requires_grad_(False))
    measured = replace(config, ebm=replace(config.ebm, num_validation_draws=NUM_Z_DRAWS))
    gain = likelihood_gain(measured, potential, data.test, seed_for(SEED, "gain"))
    return {
        "seconds": seconds,
        "updates": steps,
        "returns of the guard": max(record.get("num_rollbacks", 0) for record in run.metrics()),
        "gain_nats": gain.nats,
        "gain_error_nats": gain.error,
        "log_z_ess": gain.log_z.ess,
        "lengths": by_length(potential, JUDGED_BY, LENGTHS, distance),
    }


def by_length(
    potential: NoisePotential, kernel: KernelConfig, lengths: tuple[int, ...], distance: DataDistance
) -> dict[str, dict[str, float | None]]:
    """Run chains from N(0, I) by a kernel whose step is tuned, and measure them after each number of steps.

    Returns:
        By length: Frechet distance, mean energy, mean square of all noise, acceptance, evaluations per chain.
    """
    blocks = list(chain_blocks(potential, kernel, num=NUM_SAMPLES, steps=lengths, seed=SEED))
    results: dict[str, dict[str, float | None]] = {}
    for count in lengths:
        position = torch.cat([block.positions[count] for block in blocks])
        with torch.no_grad():
            energy = torch.cat([potential(rows) for rows in position.split(500)])
        results[str(count)] = {
            "frechet_distance": distance(potential, position),
            "mean_energy": float(energy.mean()),
            "eps_mean_square": float(position.square().mean()),
            "acceptance": float(torch.cat([block.acceptance_rate for block in blocks]).mean()),
            "evaluations": sum(block.num_evals[count] for block in blocks) / len(blocks),
        }
    return results


def compare_samplers(potential: NoisePotential, distance: DataDistance) -> dict[str, Any]:
    """Measure every kernel on one energy, by kernel and budget of evaluations, as :func:`by_length` does."""
    results = {}
    for name, kernel in SAMPLERS.items():
        pilot = next(chain_blocks(potential, kernel, num=10, steps=[10], seed=SEED))
        cost = pilot.num_evals[10] / 10
        lengths = tuple(max(1, round(budget / cost)) for budget in BUDGETS)
        measured = by_length(potential, kernel, lengths, distance)
        results[name] = dict(zip(map(str, BUDGETS), measured.values(), strict=True))
    return results


def row(name: str, result: Mapping[str, Any]) -> str:
    """Format one setting as a line of a Markdown table."""
    if "ended by" in result:
        return f"| {name} | {result['seconds']:.0f} | {result['ended by']} |"
    mark = "" if result["log_z_ess"] >= 100 else " (not certified)"
    lengths = [result["lengths"][str(count)] for count in LENGTHS]
    distances = " | ".join(_text(length["frechet_distance"]) for length in lengths)
    mean_square = lengths[-1]["eps_mean_square"]
    return (
        f"| {name} | {result['seconds']:.0f} | {result['updates']} | {distances} | {mean_square:.3f} "
        f"| {result['gain_nats']:.2f} ± {result['gain_error_nats']:.2f}{mark} | {result['returns of the guard']} |"
    )


def sampler_row(name: str, result: Mapping[str, Mapping[str, Any]]) -> str:
    """Format one kernel as a line of a Markdown table."""
    cells = [f"{_text(cost['frechet_distance'])} ({cost['mean_energy']:.2f})" for cost in result.values()]
    last = list(result.values())[-1]
    return f"| {name} | {' | '.join(cells)} | {last['eps_mean_square']:.3f} | {last['acceptance']:.2f} |"


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1f}"


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run all settings into the folder that is named, except those that it already holds."""
    torch.set_num_threads(1)
    folder = folder_of(argv)
    base = recipe(RECIPE)
    data = load_data(base.data, base.seed)
    vae = shared_vae(folder, base, data)
    distance = DataDistance(folder, data, SEED)
    file = folder / "image-objectives.json"
    results = {"settings": {}, "samplers": {}} | load_results(file)
    results["data, as many images"] = distance.of_data(NUM_SAMPLES)
    for name in SETTINGS:
        if name not in results["settings"]:
            results["settings"][name] = fit_setting(run_of(folder, name), base, name, data, vae, distance)
            save_results(file, results)
        print(row(name, results["settings"][name]), flush=True)
    print(f"Frechet distance of {NUM_SAMPLES} training images to all others: {results['data, as many images']:.1f}")
    if not results["samplers"]:
        vaebm = load_vaebm(run_of(folder, SAMPLED).checkpoints("ebm"), base, vae)
        results["samplers"] = compare_samplers(noise_potential(vaebm), distance)
        save_results(file, results)
    for name, result in results["samplers"].items():
        print(sampler_row(name, result))


if __name__ == "__main__":
    main()
