"""What the benchmarks share: interleaved timing, and results with the machine that made them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def rates(tasks: Mapping[str, Callable[[], int]], num_rounds: int) -> dict[str, list[float]]:
    """Time tasks in turn, so that whatever else the machine does falls on all of them alike.

    Args:
        tasks: functions that do work and return how many evaluations it took.
        num_rounds: times that each one runs, after one run that is not timed.

    Returns:
        Evaluations per second of processor time in every round, by task. Compare within a round, with :func:`ratio`,
        and use one thread, for processor time adds up over threads.
    """
    for task in tasks.values():
        task()
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(num_rounds):
        for name, task in tasks.items():
            start = time.process_time()
            count = task()
            found[name].append(count / (time.process_time() - start))
    return found


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Take the median over rounds of the ratio within each round."""
    return float((torch.tensor(numerator) / torch.tensor(denominator)).median())


def machine() -> dict[str, Any]:
    """Describe what a benchmark ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
    }


def write(name: str, results: Mapping[str, Any]) -> None:
    """Save results to ``benchmarks/results/<name>.json`` and say so."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"\n{machine()}\nwritten to {path.relative_to(RESULTS.parent.parent)}")
