"""ChEES-HMC on 64 chains at once versus Pyro's NUTS, chain after chain: effective draws per gradient and per second.

The target is a Gaussian of 20 coordinates with standard deviations from 1 to 5 and correlation 0.8^|i - j|. Both start
from N(0, I) and tune themselves: ChEES its step, trajectory and the Gaussian that splitting splits off, NUTS its
step and diagonal mass. Judged is the worst of 40 functionals: every coordinate, and its square.

Limit: a draw that is independent of the one before costs one gradient, so no more than 1000 effective draws come of
1000 gradients; and no kernel makes more gradients per second than the bare gradient at its number of chains.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.chees_vs_nuts``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser_of, ratio, write
from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.bridges.pyro_samplers import run_pyro
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.diagnostics.summary import summarize
from ppl_vaebm.inference.kernels import targets
from ppl_vaebm.inference.kernels.base import KernelState, value_and_grad
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.rng import stream

DIM, CORRELATION, SCALES = 20, 0.8, (1.0, 5.0)
CHEES_CHAINS, CHEES_WARMUP, CHEES_DRAWS = 64, 300, 1000
# Stan's numbers. Few chains, for Pyro's cost as much again for every one; 4 are what R-hat needs.
NUTS_CHAINS, NUTS_WARMUP, NUTS_DRAWS = 4, 1000, 1000
STEP_SIZE = 0.1
SEEDS = (1, 2, 3)
BARE_GRADIENTS = 2000
GOALS = {"ESS per 1000 gradients": 20.0, "R-hat": 1.01, "ESS per second over Pyro's NUTS": 50.0}

TARGET = targets.ar1_gaussian(DIM, CORRELATION, torch.float32, scales=torch.linspace(*SCALES, DIM))


def _store(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "square": state.position.square()}


def _start(num_chains: int, seed: int) -> Tensor:
    return torch.randn(num_chains, DIM, generator=stream(seed, "start"))


def _chees(seed: int) -> Chains:
    start, config = _start(CHEES_CHAINS, seed), KernelConfig("chees", step_size=STEP_SIZE)
    return run_chains(
        build_kernel(config, TARGET.potential),
        stream(seed, "chees"),
        start,
        start_params(config, start),
        num_draws=CHEES_DRAWS,
        num_warmup=CHEES_WARMUP,
        functionals=_store,
    )


def _nuts(seed: int) -> Chains:
    return run_pyro(
        "pyro-nuts",
        TARGET.potential,
        None,
        _start(NUTS_CHAINS, seed),
        SamplerOptions(NUTS_WARMUP, STEP_SIZE),
        Limits(NUTS_DRAWS),
        seed=seed,
        functionals=_store,
    )


def _judge(name: str, seed: int, sample: Callable[[int], Chains]) -> dict[str, Any]:
    start = time.process_time()
    chains = sample(seed)
    processor = time.process_time() - start
    seconds = processor * chains.seconds / (chains.seconds + chains.warmup_seconds)
    rows = summarize(to_inference_data(chains))
    truth = torch.cat([TARGET.mean, TARGET.variance]).tolist()
    ess = min(row.ess_bulk for row in rows)
    return {
        "kernel": name,
        "seed": seed,
        "ess": ess,
        "ess_per_1000_gradients": min(row.ess_per_1000_evals for row in rows),
        "ess_per_second": ess / seconds,
        "ess_per_second_with_warmup": ess / processor,
        "r_hat": max(row.r_hat for row in rows),
        "worst_z": max(abs(row.mean - value) / row.mcse_mean for row, value in zip(rows, truth, strict=True)),
        "gradients_per_draw": chains.num_evals / chains.stats["lp"].numel(),
        "acceptance": float(chains.stats["acceptance_rate"].mean()),
        "step_size": float(chains.params.step_size.mean()),
        "trajectory_length": float(chains.params.trajectory_length) if name == "chees" else None,
        "gradients_per_second": chains.num_evals / seconds,
        "warmup_gradients_per_chain": chains.warmup_evals / len(chains.position),
    }


def _bare_rate(num_chains: int) -> float:
    position = _start(num_chains, 0)
    start = time.process_time()
    for _ in range(BARE_GRADIENTS):
        value_and_grad(TARGET.potential, position)
    return BARE_GRADIENTS * num_chains / (time.process_time() - start)


def main() -> None:
    """Print the table and write ``results/chees_vs_nuts.json``."""
    parser_of(__doc__).parse_args()
    kernels = {"chees": _chees, "pyro-nuts": _nuts}
    chains = {"chees": CHEES_CHAINS, "pyro-nuts": NUTS_CHAINS}
    print(f"worst of {2 * DIM} quantities; chees {CHEES_CHAINS} chains, pyro-nuts {NUTS_CHAINS}; processor seconds")
    print("kernel      seed  ESS/1000 grads   ESS/s  with warm-up   R-hat  worst z  grads/draw  grads/s  of the bare")
    rows = []
    for seed in SEEDS:
        for name, sample in kernels.items():
            row = _judge(name, seed, sample)
            row["of_the_bare_rate"] = row["gradients_per_second"] / _bare_rate(chains[name] if name == "chees" else 1)
            rows.append(row)
            print(f"{name:10}{seed:6}{row['ess_per_1000_gradients']:16.1f}{row['ess_per_second']:8.0f}", end="")
            print(f"{row['ess_per_second_with_warmup']:14.0f}{row['r_hat']:8.4f}{row['worst_z']:9.1f}", end="")
            print(f"{row['gradients_per_draw']:12.1f}{row['gradients_per_second']:9.0f}", end="")
            print(f"{row['of_the_bare_rate']:13.0%}")
    speed = {}
    for key in ("ess_per_second", "ess_per_second_with_warmup", "ess_per_1000_gradients"):
        chees, nuts = ([row[key] for row in rows if row["kernel"] == name] for name in kernels)
        speed[key] = ratio(chees, nuts)
        spread = ", ".join(f"{one / other:.1f}" for one, other in zip(chees, nuts, strict=True))
        print(f"chees over pyro-nuts in {key}: {speed[key]:.1f}x (seeds {spread})")
    print(f"goals: {GOALS}; limit 1000 effective draws per 1000 gradients")
    write("chees_vs_nuts", {"goals": GOALS, "rows": rows, "chees_over_nuts": speed})


if __name__ == "__main__":
    main()
