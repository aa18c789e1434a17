"""Study: stage 2 by every objective and kernel on one VAE of gaussians25.

``python -m ppl_vaebm.experiments.objectives FOLDER`` fits the VAE and then each setting below (about half an hour on
one core), and writes FOLDER/objectives.json and a table. Samples of short chains can look perfect while the density is
worthless, so each line has both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from ppl_vaebm.config import Config
from ppl_vaebm.data.load import Data, load_data
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.evaluation.likelihood import likelihood
from ppl_vaebm.evaluation.samples import mode_rows
from ppl_vaebm.evaluation.sections import Effort, Rows
from ppl_vaebm.experiments.studies import (
    folder_of,
    load_results,
    recipe,
    run_of,
    save_results,
    shared_vae,
    with_options,
)
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.sampling import sample_by_chains
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run

# Langevin's eta is step_size squared: 0.0316 is 1e-3.
LANGEVIN = {"name": "langevin", "step_size": 0.0316}
# A gradient step takes a lower rate than the other settings, or its energies explode at once.
GENTLE = {"learning_rate": 2e-4, "final_learning_rate": 2e-6}
REGULARISED = {**GENTLE, "energy_l2": 0.2}

SETTINGS: dict[str, dict[str, Any]] = {
    "ratio": {"ebm": {"objective": "ratio"}},
    "mle, importance weights": {"ebm": {"negatives": "importance"}},
    "mle, independence": {"kernel": {"name": "independence"}},
    "mle, mixture (independence + hmc)": {"kernel": {"name": "mixture", "num_steps": 5}, "ebm": {"num_transitions": 2}},
    "mle, mixture, p .95": {
        "kernel": {"name": "mixture", "num_steps": 5},
        "ebm": {"num_transitions": 2, "replay_probability": 0.95},
    },
    "mle, pcn": {"kernel": {"name": "pcn"}, "ebm": {"replay_probability": 0.95}},
    "mle, elliptical": {"kernel": {"name": "elliptical"}, "ebm": {"num_transitions": 3, "replay_probability": 0.95}},
    "mle, mala, p .95, L2 .2": {"kernel": {"name": "mala"}, "ebm": {**REGULARISED, "replay_probability": 0.95}},
    "mle, hmc, L2 .2": {"kernel": {"name": "hmc", "num_steps": 5}, "ebm": {**REGULARISED, "num_transitions": 2}},
    "mle, langevin, p .6, L2 .2": {"kernel": LANGEVIN, "ebm": {**REGULARISED, "replay_probability": 0.6}},
    "mle, langevin, short run (the paper's style)": {"kernel": LANGEVIN, "ebm": GENTLE},
    "the same, stopped after 800 steps": {"kernel": LANGEVIN, "ebm": {**GENTLE, "steps": 800}},
    "mle, langevin, p .95": {"kernel": LANGEVIN, "ebm": {**GENTLE, "replay_probability": 0.95}},
    "ratio for 500 steps, then mle, mala, L2 .02": {
        "kernel": {"name": "mala"},
        "ebm": {**GENTLE, "ratio_steps": 500, "energy_l2": 0.02, "learning_rate": 1e-3},
    },
}
DEFAULTS = {"ebm": {"objective": "mle", "energy_l2": 0.0, "guard": False}}
"""Options of every setting that does not name them."""
EFFORT = Effort(num_test=2_000, num_importance=300, num_z_draws=100_000, num_samples=5_000, steps=())
SEED = 0


def measure(run: Run, config: Config, data: Data, vae: HierarchicalVAE) -> dict[str, Rows | float]:
    """Fit one setting, and measure processor seconds, likelihood, and modes of exact draws and of its own chains."""
    start = time.process_time()
    vaebm = fit_ebm(run, config, data, vae)
    seconds = time.process_time() - start
    loaded = LoadedRun(run, config, data, vaebm, noise_potential(vaebm))
    result: dict[str, Rows | float] = {"seconds": seconds, "likelihood": likelihood(loaded, EFFORT, SEED)}
    try:
        exact = exact_draws(loaded.potential, stream(SEED, "exact"), EFFORT.num_samples, max_proposals=2_000_000)
        result["exact"] = mode_rows(loaded, exact.position)
    except RuntimeError as error:
        result["exact"] = {"none": str(error)}
    if config.ebm.objective == "mle" and config.ebm.negatives == "chains":
        steps = config.ebm.num_transitions
        chains = sample_by_chains(
            loaded.potential, config.kernel, num=EFFORT.num_samples, steps=[steps, 20 * steps], seed=SEED
        )
        result["chains"] = mode_rows(loaded, chains.positions[steps])
        result["chains, 20 times as long"] = mode_rows(loaded, chains.positions[20 * steps])
    return result


def row(name: str, result: Mapping[str, Any]) -> str:
    """Format one setting as a line of a Markdown table."""

    def modes(key: str) -> str:
        section = result.get(key, {"none": ""})
        if "none" in section:
            return "none" if key in result else "-"
        share, found = section["share within 3 std of a mode"]["value"], section["modes of 25"]
        return f"{100 * share:.1f} % / {found} / {section['KL of the mode histogram to uniform (nats)']:.4f}"

    density = result["likelihood"]
    log_h, ess = density["log h (VAEBM)"], density["effective draws behind log Z"]
    mark = "" if density["log Z certified"] == "yes" else " (not certified)"
    return (
        f"| {name} | {result['seconds']:.0f} | {log_h['value']:.3f}{mark} | {ess:.0f} | {modes('exact')} "
        f"| {modes('chains')} | {modes('chains, 20 times as long')} |"
    )


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run all settings into the folder that is named, except those that it already holds."""
    torch.set_num_threads(1)
    folder = folder_of(argv)
    base = recipe("gaussians25")
    data = load_data(base.data, base.seed)
    vae = shared_vae(folder, base, data)
    file = folder / "objectives.json"
    results = load_results(file)
    for name, setting in SETTINGS.items():
        if name not in results:
            results[name] = measure(run_of(folder, name), with_options(base, DEFAULTS, setting), data, vae)
            save_results(file, results)
        print(row(name, results[name]), flush=True)


if __name__ == "__main__":
    main()
