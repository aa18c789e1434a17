"""R-hat and effective sample sizes of every coordinate: all at once against ArviZ one by one, and at D = 150,000.

``OMP_NUM_THREADS=1 python -m benchmarks.convergence``. The draws are stationary AR(1) chains, float32, 8 chains of 200,
the ones with ties repeat a third of their draws as a Metropolis test does. Three tables:

- milliseconds of processor time per coordinate for R-hat, bulk and tail effective sample size together, ours and
  ArviZ's in turn, and how far the two are apart;
- the same by the number of draws in a block, which is what :data:`~ppl_vaebm.inference.convergence.BLOCK_VALUES` is
  chosen by;
- 150,000 coordinates in a process of their own: seconds, and how much memory it took beyond the draws.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import parser_of, write
from ppl_vaebm.inference.diagnostics import convergence
from ppl_vaebm.inference.diagnostics.arviz_io import arviz
from ppl_vaebm.inference.diagnostics.convergence import TAIL_PROBABILITIES, Convergence, diagnose_columns

NUM_CHAINS, NUM_DRAWS, CORRELATION, REJECTED = 8, 200, 0.9, 1 / 3
NUM_OURS, NUM_ARVIZ, NUM_ROUNDS = 3_000, 100, 5
LARGE_DIM = 150_000


def chains(num_columns: int, has_ties: bool, seed: int = 0) -> NDArray[np.float32]:
    """Draw AR(1) chains ``(C, N, D)``."""
    generator = np.random.default_rng(seed)
    draws = generator.standard_normal(size=(NUM_CHAINS, NUM_DRAWS, num_columns), dtype=np.float32)
    for t in range(1, NUM_DRAWS):
        draws[:, t] = CORRELATION * draws[:, t - 1] + math.sqrt(1 - CORRELATION**2) * draws[:, t]
    if has_ties:
        for t in range(1, NUM_DRAWS):
            is_rejected = generator.random((NUM_CHAINS, num_columns)) < REJECTED
            draws[:, t] = np.where(is_rejected, draws[:, t - 1], draws[:, t])
    return draws


def by_arviz(draws: NDArray[np.float32]) -> Convergence:
    """Compute the diagnostics of one column after another with ArviZ."""
    columns = draws.astype(np.float64).transpose(2, 0, 1)
    az = arviz()
    return Convergence(
        np.array([float(az.rhat(column, method="rank")) for column in columns]),
        np.array([float(az.ess(column, method="bulk")) for column in columns]),
        np.array([float(az.ess(column, method="tail", prob=TAIL_PROBABILITIES)) for column in columns]),
    )


def milliseconds(judge: Callable[[NDArray[np.float32]], Convergence], draws: NDArray[np.float32]) -> float:
    """Time one call, processor time per column."""
    start = time.process_time()
    judge(draws)
    spent: float = time.process_time() - start
    return 1000 * spent / int(draws.shape[2])


def against_arviz(has_ties: bool) -> dict[str, Any]:
    """Time both in turn, and compare their values."""
    draws = chains(NUM_OURS, has_ties)
    few = draws[:, :, :NUM_ARVIZ]
    by_arviz(few[:, :, :2])
    diagnose_columns(few)
    rounds = [(milliseconds(diagnose_columns, draws), milliseconds(by_arviz, few)) for _ in range(NUM_ROUNDS)]
    ours, theirs = (sorted(column) for column in zip(*rounds, strict=True))
    apart = {
        name: float(np.abs(a / b - 1).max())
        for name, a, b in zip(Convergence._fields, diagnose_columns(few), by_arviz(few), strict=True)
    }
    return {
        "ms_per_column": ours,
        "arviz_ms_per_column": theirs,
        "median_ratio": float(np.median([b / a for a, b in rounds])),
        "largest_relative_difference": apart,
    }


def by_block() -> dict[str, float]:
    """Time blocks of 2^12 to 2^22 draws."""
    draws, chosen, found = chains(NUM_OURS, has_ties=False), convergence.BLOCK_VALUES, {}
    for power in range(12, 23):
        convergence.BLOCK_VALUES = 1 << power
        found[f"2^{power}"] = float(np.median([milliseconds(diagnose_columns, draws) for _ in range(3)]))
    convergence.BLOCK_VALUES = chosen
    return found


def large() -> dict[str, float]:
    """Diagnose 150,000 coordinates, and report seconds and memory of this process."""
    draws = chains(LARGE_DIM, has_ties=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    found = diagnose_columns(draws)
    result = {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "draws_mib": draws.nbytes / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_before_mib": before / 2**10,
    }
    expected = NUM_CHAINS * NUM_DRAWS * (1 - CORRELATION) / (1 + CORRELATION)
    ess, r_hat = float(np.median(found.ess_bulk)), float(found.r_hat.max())
    return {**result, "median_ess_bulk": ess, "expected_ess": expected, "largest_r_hat": r_hat}


def main() -> None:
    """Print the tables and write them to ``results/convergence.json``."""
    parser = parser_of(__doc__)
    parser.add_argument("--large-only", action="store_true", help="the last table alone, as JSON")
    if parser.parse_args().large_only:
        print(json.dumps(large()))
        return
    results: dict[str, Any] = {name: against_arviz(ties) for name, ties in (("no ties", False), ("ties", True))}
    for name, row in results.items():
        ours, theirs = (float(np.median(row[key])) for key in ("ms_per_column", "arviz_ms_per_column"))
        largest = max(row["largest_relative_difference"].values())
        print(
            f"{name}: {ours:.3f} ms per coordinate, ArviZ {theirs:.2f} ms, {row['median_ratio']:.0f} times as fast; "
            f"largest relative difference {largest:.1e}"
        )
    results["ms_per_column_by_block"] = by_block()
    print({size: round(value, 3) for size, value in results["ms_per_column_by_block"].items()})
    command = [sys.executable, "-m", "benchmarks.convergence", "--large-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results[f"D = {LARGE_DIM}"] = json.loads(done.stdout)
    print(results[f"D = {LARGE_DIM}"])
    write("convergence", {"num_chains": NUM_CHAINS, "num_draws": NUM_DRAWS, **results})


if __name__ == "__main__":
    main()
