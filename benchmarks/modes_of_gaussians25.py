"""Which kernels join the 25 modes: R-hat of the mode that a draw belongs to, at equal evaluations of the potential.

The target is a fitted run of the recipe gaussians25 (``--run``), where a draw's mode is the nearest to the x that it
stands for; without one, 25 modes behind a map that is known. Chains start from N(0, I), that is from draws of the VAE,
so that every mode has some; a kernel that never leaves a mode is seen by the chains' disagreement over it. Judged are
E and the two coordinates of the mode on its 5 x 5 grid.

Limit: a draw that is independent of the one before costs one evaluation, so no more than 1000 effective draws come of
1000 evaluations.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.modes_of_gaussians25 --run runs/gaussians25``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import parser_of, write
from ppl_vaebm.config import KernelConfig
from ppl_vaebm.inference.bridges.pyro_samplers import run_pyro
from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.diagnostics.summary import MAX_R_HAT, summarize
from ppl_vaebm.inference.kernels.base import KernelState, Potential
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.registry import DEFAULT_STEP_SIZES, build_kernel, start_params
from ppl_vaebm.inference.kernels.targets import NUM_PER_AXIS, grid_modes
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import load_run

NUM_CHAINS, NUM_WARMUP, NUM_EVALS = 16, 300, 12_000
OURS = (
    KernelConfig("mala"),
    KernelConfig("hmc"),
    KernelConfig("chees"),
    KernelConfig("mixture", members=("independence", "mala")),
    KernelConfig("tempered"),
)
SEEDS = (1, 2, 3)
# Pyro's chains run one after another: its tree is bounded, as by python -m ppl_vaebm.compare, and one seed has to do.
MAX_TREE_DEPTH, PYRO_SEED = 6, SEEDS[0]


class Modes(NamedTuple):
    """A target with 25 modes."""

    name: str
    potential: Potential
    dim: int
    dtype: torch.dtype
    mode: Callable[[Tensor], Tensor]
    """Index of a position's mode, ``(C, D)`` to ``(C,)``."""


def _fitted(folder: Path) -> Modes:
    loaded = load_run(folder)
    modes = loaded.data.modes
    if modes is None:
        raise SystemExit(f"expected a run of gaussians25 in {folder}, found one of {loaded.config.data.name}")

    def mode(position: Tensor) -> Tensor:
        return torch.cdist(loaded.potential.decode(position), modes).argmin(1)

    dtype = next(loaded.vaebm.parameters()).dtype
    return Modes(loaded.run.path.name, loaded.potential, loaded.potential.packing.dim, dtype, mode)


def _known() -> Modes:
    target = grid_modes()
    assert target.mode is not None
    return Modes(target.name, target.potential, len(target.mean), target.mean.dtype, target.mode)


def _store(target: Modes) -> Callable[[KernelState], dict[str, Tensor]]:
    def functionals(state: KernelState) -> dict[str, Tensor]:
        mode = target.mode(state.position)
        return {
            "energy": state.potential,
            "row": torch.div(mode, NUM_PER_AXIS, rounding_mode="floor").double(),
            "column": (mode % NUM_PER_AXIS).double(),
        }

    return functionals


def _run(name: str, target: Modes, seed: int) -> Chains:
    start = torch.randn(NUM_CHAINS, target.dim, generator=stream(seed, "start"), dtype=target.dtype)
    if name == "pyro-nuts":
        return run_pyro(
            "pyro-nuts",
            target.potential,
            None,
            start,
            SamplerOptions(NUM_WARMUP, DEFAULT_STEP_SIZES["hmc"], max_tree_depth=MAX_TREE_DEPTH),
            Limits(NUM_EVALS, max_evals=NUM_EVALS),
            seed=seed,
            functionals=_store(target),
        )
    (config,) = (config for config in OURS if config.name == name)
    return run_chains(
        build_kernel(config, target.potential),
        stream(seed, name),
        start,
        start_params(config, start),
        num_draws=NUM_EVALS,
        num_warmup=NUM_WARMUP,
        functionals=_store(target),
        max_evals=NUM_EVALS,
    )


def _judge(name: str, target: Modes, seed: int) -> dict[str, Any]:
    chains = _run(name, target, seed)
    rows = {row.name: row for row in summarize(to_inference_data(chains))}
    row: dict[str, Any] = {
        "kernel": name,
        "seed": seed,
        "evals_per_chain": chains.num_evals / NUM_CHAINS,
        "warmup_evals_per_chain": chains.warmup_evals / NUM_CHAINS,
        "draws_per_chain": chains.stats["lp"].shape[1],
        "acceptance": float(chains.stats["acceptance_rate"].mean()),
        "divergent": int(chains.stats["diverging"].sum()),
        "r_hat": {key: summary.r_hat for key, summary in rows.items()},
        "ess_per_1000_evals": {key: summary.ess_per_1000_evals for key, summary in rows.items()},
        "mean": {key: summary.mean for key, summary in rows.items()},
        "mcse": {key: summary.mcse_mean for key, summary in rows.items()},
        "attrs": dict(chains.attrs),
    }
    row["is_converged"] = max(row["r_hat"].values()) <= MAX_R_HAT
    return row


def _print(row: dict[str, Any]) -> None:
    r_hat, ess = row["r_hat"], row["ess_per_1000_evals"]
    print(f"{row['kernel']:11}{row['seed']:5}{row['evals_per_chain']:8.0f}{row['warmup_evals_per_chain']:9.0f}", end="")
    print(f"{r_hat['energy']:9.4g}{r_hat['row']:10.4g}{r_hat['column']:10.4g}", end="")
    print(f"{ess['energy']:10.3g}{min(ess['row'], ess['column']):9.3g}", end="")
    print(f"   {'yes' if row['is_converged'] else 'no':5}", end="")
    if "round_trips_per_1000_sweeps" in row["attrs"]:
        print(f"{row['attrs']['round_trips_per_1000_sweeps']:.0f} round trips per 1000 sweeps", end="")
    print(flush=True)


def main() -> None:
    """Print the table and write ``results/modes_of_gaussians25.json``."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a fitted run of gaussians25; a known target if not given")
    folder = parser.parse_args().run
    target = _fitted(folder) if folder else _known()
    print(f"{target.name}, D = {target.dim}: {NUM_CHAINS} chains, R-hat at most {MAX_R_HAT} of all three is converged")
    print("kernel      seed   evals  warm-up  R-hat E       row    column    ESS/1k E     mode   converged")
    rows = []
    for seed in SEEDS:
        for name in (*(config.name for config in OURS), *(["pyro-nuts"] if seed == PYRO_SEED else [])):
            rows.append(_judge(name, target, seed))
            _print(rows[-1])
    print("limit 1000 effective draws per 1000 evaluations")
    write("modes_of_gaussians25", {"target": target.name, "dim": target.dim, "max_r_hat": MAX_R_HAT, "rows": rows})


if __name__ == "__main__":
    main()
