"""HMC by splitting against N(0, I) versus HMC by leapfrog, in noise spaces of images: effective draws per gradient.

The target is a random convolutional decoder of several latent groups, its energy a random convolutional net whose
standard deviation under N(0, I) is 3 nats. Both integrators start from the same warm chains. A pilot run of equal
gradients finds each one's best (h, steps); then both run at it from fresh seeds, in turn. The functional is E.

Limit: a draw that is independent of the one before costs one gradient, so no more than 1000 effective draws come of
1000 gradients; and no kernel makes more gradients per second than the bare gradient.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.splitting_vs_leapfrog``.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import parser_of, write
from benchmarks.random_vaebm import RandomVAEBM, Sizes, random_vaebm
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.diagnostics.summary import summarize
from ppl_vaebm.inference.kernels import hmc, integrators
from ppl_vaebm.inference.kernels.base import KernelState, init_params, value_and_grad
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.rng import stream

MODELS = {"2 groups": Sizes(((8, 8),)), "10 groups": Sizes(((8, 8),) * 3 + ((6, 16),) * 6)}
NUM_CHAINS = 8
GOALS = {"2 groups": 2.5, "10 groups": 7.0}
ONE_STEP_SIZES = (0.3, 0.5, 0.7, 1.0)
# Leapfrog's step shrinks as D^(-1/4) (Beskos et al. 2013): the grid is in units of that.
LEAPFROG_SCALES, LEAPFROG_ANGLES = (1.0, 1.45, 2.0), (1.6, 2.0)
SPLITTING_GRID = ((1.0, 1), (0.8, 2), (0.6, 3), (0.7, 3), (0.5, 4), (0.6, 4), (0.4, 5))
WARM_TRAJECTORIES, PILOT_GRADIENTS, FINAL_GRADIENTS, SEEDS = 60, 320, 1600, (1, 2, 3)
ONE_STEP_DRAWS = 20


class Setting(NamedTuple):
    """What a pilot run chooses."""

    integrator: integrators.Integrator
    step_size: float
    num_steps: int


# A step and a length that suit leapfrog at D = 3,584, kept at every D: what a user gets who does not tune again.
UNTUNED = Setting("leapfrog", 0.187, 8)


def _store(state: KernelState) -> dict[str, Tensor]:
    return {"energy": state.potential, "mean_square": state.position.square().mean(-1)}


def _run(model: RandomVAEBM, setting: Setting, start: Tensor, seed: int, num_gradients: int) -> Chains:
    kernel = hmc.build(model, integrator=setting.integrator, num_steps=setting.num_steps)
    params = init_params(start, setting.step_size)
    num_draws = num_gradients // setting.num_steps
    generator = stream(seed, setting.integrator)
    return run_chains(kernel, generator, start, params, num_draws=num_draws, functionals=_store)


def _judge(chains: Chains) -> dict[str, float]:
    energy, mean_square = summarize(to_inference_data(chains))
    return {
        "ess_per_1000_gradients": energy.ess_per_1000_evals,
        "acceptance": float(chains.stats["acceptance_rate"].mean()),
        "r_hat": energy.r_hat,
        "mean_energy": energy.mean,
        "mcse": energy.mcse_mean,
        "mean_square": mean_square.mean,
    }


def _settings(integrator: integrators.Integrator, dim: int) -> list[Setting]:
    if integrator == "splitting":
        return [Setting(integrator, h, steps) for h, steps in SPLITTING_GRID]
    sizes = [dim**-0.25 * scale for scale in LEAPFROG_SCALES]
    return [Setting(integrator, h, round(angle / h)) for h in sizes for angle in LEAPFROG_ANGLES]


def _one_step(model: RandomVAEBM, warm: Tensor) -> dict[str, list[float]]:
    print(f"acceptance of one step from warm chains at h = {', '.join(map(str, ONE_STEP_SIZES))}")
    rates = {}
    for integrator in ("leapfrog", "splitting"):
        runs = [_run(model, Setting(integrator, h, 1), warm, 0, ONE_STEP_DRAWS) for h in ONE_STEP_SIZES]
        rates[integrator] = [float(chains.stats["acceptance_rate"].mean()) for chains in runs]
        print(f"  {integrator:10}" + "".join(f"{rate:7.2f}" for rate in rates[integrator]))
    return rates


def _pilot(model: RandomVAEBM, warm: Tensor) -> dict[str, Setting]:
    print(f"pilot, {PILOT_GRADIENTS} gradients a chain: ESS of E per 1000 gradients")
    best: dict[str, Setting] = {}
    for integrator in ("leapfrog", "splitting"):
        settings = _settings(integrator, warm.shape[1])
        found = [_judge(_run(model, setting, warm, 0, PILOT_GRADIENTS)) for setting in settings]
        scores = [row["ess_per_1000_gradients"] for row in found]
        for setting, row, score in zip(settings, found, scores, strict=True):
            print(f"  {integrator:10} h {setting.step_size:.3f}, {setting.num_steps:2} steps: {score:4.0f}", end="")
            print(f" (acceptance {row['acceptance']:.2f}, R-hat {row['r_hat']:.2f})")
        best[integrator] = settings[scores.index(max(scores))]
    return best


def _bare_rate(model: RandomVAEBM, warm: Tensor) -> float:
    start = time.process_time()
    for _ in range(20):
        value_and_grad(model, warm)
    return 20 * len(warm) / (time.process_time() - start)


def _final(model: RandomVAEBM, warm: Tensor, settings: dict[str, Setting]) -> list[dict[str, Any]]:
    print(f"final, {FINAL_GRADIENTS} gradients a chain, settings in turn")
    print("  seed integrator     h steps  ESS/1000 acceptance  R-hat  mean of E (MCSE)  |q|^2/D  of the bare rate")
    rows = []
    for seed in SEEDS:
        bare = _bare_rate(model, warm)
        for role, setting in settings.items():
            start = time.process_time()
            chains = _run(model, setting, warm, seed, FINAL_GRADIENTS)
            rate = chains.num_evals / (time.process_time() - start) / bare
            row = _judge(chains)
            rows.append({"seed": seed, "role": role, **setting._asdict(), **row, "of_the_bare_rate": rate})
            print(f"  {seed:4} {setting.integrator:10}{setting.step_size:6.3f}{setting.num_steps:6}", end="")
            print(f"{row['ess_per_1000_gradients']:10.0f}{row['acceptance']:11.2f}{row['r_hat']:7.2f}", end="")
            print(f"{row['mean_energy']:11.2f} ({row['mcse']:.2f}){row['mean_square']:9.3f}", end="")
            print(f"{rate:15.0%}")
    return rows


def _measure(name: str) -> dict[str, Any]:
    model = random_vaebm(MODELS[name])
    start = torch.randn(NUM_CHAINS, model.packing.dim, generator=stream(0, "start"))
    print(f"\n{name}, D = {model.packing.dim}")
    warm = _run(model, Setting("splitting", 0.5, 3), start, 0, 3 * WARM_TRAJECTORIES).position
    one_step = _one_step(model, warm)
    rows = _final(model, warm, {**_pilot(model, warm), "leapfrog, untuned": UNTUNED})
    scores = {
        role: [row["ess_per_1000_gradients"] for row in rows if row["role"] == role]
        for role in ("splitting", "leapfrog", "leapfrog, untuned")
    }
    ratio = {}
    for role in ("leapfrog", "leapfrog, untuned"):
        ratios = [one / other for one, other in zip(scores["splitting"], scores[role], strict=True)]
        ratio[role] = sum(scores["splitting"]) / sum(scores[role])
        spread = ", ".join(f"{value:.1f}" for value in ratios)
        print(f"  splitting over {role}: {ratio[role]:.1f}x (seeds {spread}); goal {GOALS[name]}x; limit 1000 per 1000")
    return {"dim": model.packing.dim, "one_step_acceptance": one_step, "final": rows, "ratio": ratio}


def main() -> None:
    """Print the tables and write ``results/splitting_vs_leapfrog.json``."""
    parser_of(__doc__).parse_args()
    write("splitting_vs_leapfrog", {name: _measure(name) for name in MODELS})


if __name__ == "__main__":
    main()
