"""What the dimension of noise space does to a kernel: step, acceptance and effective draws of E, D from 96 to 153,600.

The targets are random VAEBMs of images of side s, from 4 to 160, with three latent groups of side s / 2: D = 6 s^2. The
energy has a standard deviation of 3 nats under N(0, I) at every size, and the decoder is as deep, so that D is all that
grows. From the same warm chains each kernel is tuned by the package's own warm-up to its own target acceptance, and
then runs on a budget of evaluations. ``langevin`` has nothing to tune: it takes the step at which its Metropolis form,
``mala leapfrog``, accepts 0.65, and its bias in E and in the mean square of the noise is against the exact kernel with
the smallest error. HMC's trajectories are a quarter turn long at every step size. Gradient-free kernels get three times
the evaluations, since a gradient costs about two more; all rates are per evaluation. One more model is as large as the
largest and 28 groups deep, for depth makes a density rougher, and that no splitting can take away.

Prediction (Beskos, Pillai, Roberts, Sanz-Serna and Stuart 2013; Beskos, Pinski, Sanz-Serna and Stuart 2011): leapfrog's
step shrinks as D^(-1/4) in HMC and as D^(-1/6) in one step; kernels that keep N(0, I) have steps that do not shrink.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.growth_with_dimension``; it takes about 18 minutes of a busy core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import parser_of, write
from benchmarks.random_vaebm import RandomVAEBM, Sizes, random_vaebm
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.diagnostics.summary import summarize
from ppl_vaebm.inference.kernels import gradient_free, hmc, langevin
from ppl_vaebm.inference.kernels.base import Kernel, KernelState, Potential, init_params
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.rng import stream

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "growth_with_dimension.png"
SIDES = (4, 8, 16, 32, 64, 160)
DEEP = Sizes(((21, 16),) * 28)
DEEP_METHODS = ("hmc splitting", "hmc leapfrog")
NUM_CHAINS, SEED = 8, 1
# A quarter turn at the smallest step that leapfrog may need.
MAX_NUM_STEPS = 64
JITTER = 0.2  # the default of the configuration
BURN_IN = 60  # trajectories of splitting HMC from N(0, I), before any kernel starts
NUM_EVALS, GRADIENT_FREE_EVALS = 1000, 3000  # per chain and kernel
COLOURS = {
    "hmc splitting": "#0072b2",
    "mala splitting": "#56b4e9",
    "hmc leapfrog": "#d55e00",
    "mala leapfrog": "#e69f00",
    "langevin": "#999999",
    "pcn": "#009e73",
    "elliptical": "#cc79a7",
}  # Okabe and Ito 2008: told apart by colour-blind readers


class Method(NamedTuple):
    """A kernel and how long it is tuned."""

    build: Callable[[Potential], Kernel]
    num_warmup: int
    """Steps of warm-up; trajectories for HMC."""
    num_evals: int = NUM_EVALS
    """Evaluations per chain after it."""


METHODS = {
    "hmc splitting": Method(lambda phi: hmc.build(phi, max_num_steps=MAX_NUM_STEPS, jitter=JITTER), 50),
    "mala splitting": Method(langevin.build_mala, 150),
    "hmc leapfrog": Method(
        lambda phi: hmc.build(phi, integrator="leapfrog", max_num_steps=MAX_NUM_STEPS, jitter=JITTER), 50
    ),
    "mala leapfrog": Method(lambda phi: langevin.build_mala(phi, integrator="leapfrog"), 150),
    "langevin": Method(langevin.build_langevin, 0),
    "pcn": Method(gradient_free.build_pcn, 200, GRADIENT_FREE_EVALS),
    "elliptical": Method(gradient_free.build_elliptical, 0, GRADIENT_FREE_EVALS),
}
EXACT = tuple(name for name in METHODS if name != "langevin")
IS_TUNED = tuple(name for name in METHODS if METHODS[name].num_warmup)


def _store(state: KernelState) -> dict[str, Tensor]:
    return {"energy": state.potential, "mean_square": state.position.square().mean(-1)}


def _run(model: RandomVAEBM, name: str, start: Tensor, step_size: float) -> Chains:
    method = METHODS[name]
    return run_chains(
        method.build(model),
        stream(SEED, name, model.packing.dim),
        start,
        init_params(start, step_size),
        num_draws=method.num_evals,
        num_warmup=method.num_warmup,
        max_evals=method.num_evals,
        functionals=_store,
    )


def _judge(name: str, chains: Chains) -> dict[str, float]:
    energy, mean_square = summarize(to_inference_data(chains))
    return {
        "step_size": float(chains.params.step_size) if name != "elliptical" else math.nan,
        "evals_per_draw": chains.num_evals / chains.stats["n_steps"].numel(),
        "acceptance": float(chains.stats["acceptance_rate"].mean()),
        "ess_per_1000_evals": energy.ess_per_1000_evals,
        "r_hat": energy.r_hat,
        "energy": energy.mean,
        "energy_mcse": energy.mcse_mean,
        "mean_square": mean_square.mean,
        "mean_square_mcse": mean_square.mcse_mean,
        "seconds": chains.seconds,
    }


def _of_side(side: int) -> Sizes:
    return Sizes(((4, side // 2),) * 3, x_side=side, channels=4)


def _measure(sizes: Sizes, names: Iterable[str] = tuple(METHODS)) -> dict[str, Any]:
    model = random_vaebm(sizes)
    dim = model.packing.dim
    print(f"\nD = {dim:,}, {len(sizes.groups)} groups")
    print(f"{'':16}{'h':>7}{'evals':>7}{'accepts':>9}{'ESS/1000':>10}{'R-hat':>7}", end="")
    print(f"{'E':>9} (MCSE){'|eps|^2/D - 1':>16} (MCSE)", flush=True)
    normal = torch.randn(NUM_CHAINS, dim, generator=stream(SEED, "start", dim))
    burn_in = run_chains(
        hmc.build(model, num_steps=3),
        stream(SEED, "burn-in", dim),
        normal,
        init_params(normal, 0.5),
        num_draws=BURN_IN,
        functionals=_store,
    )
    found: dict[str, dict[str, float]] = {}
    for name in names:
        step_size = found["mala leapfrog"]["step_size"] if name == "langevin" else 0.1
        found[name] = row = _judge(name, _run(model, name, burn_in.position, step_size))
        cells = f"{row['step_size']:7.3f}{row['evals_per_draw']:7.1f}{row['acceptance']:9.2f}"
        cells += f"{row['ess_per_1000_evals']:10.1f}{row['r_hat']:7.3f}{row['energy']:9.2f} ({row['energy_mcse']:.2f})"
        cells += f"{row['mean_square'] - 1:16.5f} ({row['mean_square_mcse']:.5f})"
        print(f"{name:16}{cells}", flush=True)
    return {"dim": dim, "methods": found}


def _bias_of_langevin(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Compare it with the exact kernel that has the smallest error, beside what its bias is where E = 0."""
    row = found["langevin"]
    bias = {"mean_square_at_e_0": 1 / (1 - row["step_size"] ** 2 / 4) - 1}
    for key in ("energy", "mean_square"):
        best = min((found[name] for name in EXACT), key=lambda other: other[f"{key}_mcse"])
        bias[key] = row[key] - best[key]
        bias[f"{key}_error"] = math.hypot(row[f"{key}_mcse"], best[f"{key}_mcse"])
    print(f"langevin's bias: {bias['energy']:+.2f} nats (error {bias['energy_error']:.2f}) in E, ", end="")
    print(f"{bias['mean_square']:+.5f} ({bias['mean_square_error']:.5f}) in |eps|^2/D; ", end="")
    print(f"1/(1 - h^2/4) - 1 = {bias['mean_square_at_e_0']:.5f}", flush=True)
    return bias


def _growth(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit the power of D by which every tuned step changes, and the ratio of its largest to its smallest."""
    log_dims = torch.tensor([math.log(row["dim"]) for row in results])
    centred = log_dims - log_dims.mean()
    print(f"\ntuned step from D = {results[0]['dim']:,} to {results[-1]['dim']:,}")
    growth = {}
    for name in IS_TUNED:
        steps = torch.tensor([row["methods"][name]["step_size"] for row in results])
        power = float((centred * steps.log()).sum() / centred.square().sum())
        growth[name] = {"power_of_dim": power, "largest_over_smallest": float(steps.max() / steps.min())}
        print(f"  {name:16} D^{power:+.2f}, largest over smallest {growth[name]['largest_over_smallest']:.1f}")
    return growth


def _draw(results: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    steps, draws = figure.subplots(1, 2)
    _curves(steps, results, "step_size", IS_TUNED)
    _curves(draws, results, "ess_per_1000_evals", tuple(METHODS))
    dims = [results[0]["dim"], results[-1]["dim"]]
    first = results[0]["methods"]["hmc leapfrog"]["step_size"]
    steps.plot(dims, [first, first * (dims[1] / dims[0]) ** -0.25], color="black", linewidth=0.8, linestyle=":")
    steps.annotate(r"$D^{-1/4}$", (dims[1], first * (dims[1] / dims[0]) ** -0.25), ha="right", va="top")
    steps.set_title("Tuned step size h (angle)", loc="left", fontsize=10)
    draws.set_title("Effective draws of E per 1000 evaluations of the potential", loc="left", fontsize=10)
    figure.legend(*draws.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside right center")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=144)
    print(f"drawn to {FIGURE.relative_to(FIGURE.parents[2])}")


def _curves(axes: Axes, results: list[dict[str, Any]], key: str, names: tuple[str, ...]) -> None:
    dims = [row["dim"] for row in results]
    for name in names:
        values = [row["methods"][name][key] for row in results]
        style = "--" if name == "langevin" else "-"
        axes.plot(dims, values, style, color=COLOURS[name], marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="dimension D of noise space")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)


def main() -> None:
    """Print the tables, write ``results/growth_with_dimension.json``, and draw the figure."""
    parser_of(__doc__).parse_args()
    results = []
    for side in SIDES:
        row = _measure(_of_side(side))
        results.append({**row, "bias_of_langevin": _bias_of_langevin(row["methods"])})
    growth = _growth(results)
    deep = _measure(DEEP, DEEP_METHODS)
    minutes = time.process_time() / 60
    print(f"{minutes:.1f} minutes of processor time")
    write("growth_with_dimension", {"processor_minutes": minutes, "sizes": results, "growth": growth, "deep": deep})
    _draw(results)


if __name__ == "__main__":
    main()
