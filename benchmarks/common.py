"""Shared code of the benchmarks: arguments, interleaved timing, and results with the machine that made them."""

from __future__ import annotations

import json
import os
import platform
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parser_of(doc: str | None) -> ArgumentParser:
    """Make the parser of a benchmark, whose description is the script's docstring."""
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)


def rates(tasks: Mapping[str, Callable[[], int]], num_rounds: int) -> dict[str, list[float]]:
    """Time tasks in turn, so that other load on the machine affects all of them alike.

    Args:
        tasks: functions that return their number of evaluations.
        num_rounds: timed runs of each task, after one that is not timed.

    Returns:
        Evaluations per second of processor time in every round, by task. Compare within a round, with :func:`ratio`,
        and use one thread, because processor time adds up over threads.
    """
    for task in tasks.values():
        task()
    rounds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(num_rounds):
        for name, task in tasks.items():
            start = time.process_time()
            count = task()
            rounds[name].append(count / (time.process_time() - start))
    return rounds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median over rounds of the ratio within each round."""
    return float((torch.tensor(numerator) / torch.tensor(denominator)).median())


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of a benchmark."""
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
    """Save results to ``benchmarks/results/<name>.json`` and print the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"\n{machine()}\nwritten to {path.relative_to(RESULTS.parent.parent)}")
