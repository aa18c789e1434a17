"""What a device must be able to do, and training in several processes, each on its share of a batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ppl_vaebm.errors import InputError


def set_threads(threads: int) -> None:
    """Set PyTorch's CPU threads; 0 leaves them."""
    if threads:
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Refuse a device that cannot do what every stage needs: draw float64 from a generator of its own.

    Raises:
        InputError: no device of this name, which is PyTorch's, here; or it lacks float64.
    """
    try:
        generator = torch.Generator(device=device)
        torch.rand((), generator=generator, dtype=torch.float64, device=device).item()
    # torch raises these for unknown names, missing drivers, a build without the device, and a missing dtype.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # a list of 22 names, most of them of no use here
            reason = "PyTorch knows no such device"
        raise InputError(
            f"expected a device that PyTorch can use here with float64, found {device!r} ({reason}); set --device cpu"
        ) from None


def without_tf32() -> None:
    """Let this process compute in float32 on NVIDIA GPUs, convolutions too, for which PyTorch allows TF32.

    A Metropolis step takes differences of energies, which the 10 bits of TF32 spoil. Stage svi takes none and keeps
    PyTorch's default. On a CPU equal seeds and threads give equal results bit for bit; on accelerators convolutions and
    sums may round otherwise from run to run, and no deterministic algorithms are asked for.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that new tensors can take on a device."""
    if device.type != "cpu":
        cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return int(torch.accelerator.get_memory_info(device)[0] + cached)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux, so no count of pages in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def has_bfloat16(device: str) -> bool:
    """Return whether networks run in bfloat16 on a device.

    On a CPU without instructions for it PyTorch emulates it: ten times slower than float32, and convolutions can crash
    the process (PyTorch 2.14).
    """
    if torch.device(device).type != "cpu":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_bfloat16(device: str, option: str) -> None:
    """Raise InputError for an option that asks for bfloat16 on a device without; see :func:`has_bfloat16`."""
    if not has_bfloat16(device):
        raise InputError(
            f"expected a device with instructions for bfloat16 for {option}, found a CPU without: set "
            f"--{option.replace('.', '.no-')}, which is faster here"
        )


FIRST_ALONE = timedelta(hours=6)
"""Longest that the other processes wait for the first one, which validates and writes alone. PyTorch's own limit for
accelerators, 10 minutes, is shorter than a validation of large models. Chosen by us."""


class Process(NamedTuple):
    """Which of the processes this is."""

    rank: int = 0
    world: int = 1
    """Processes in all."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes to the run and to the screen."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """Return what tells this process's random streams from the first's; the first has those of a lone one."""
        return (self.rank,) if self.rank else ()


def current_process() -> Process:
    """Return this process's place; a lone one's outside of :func:`joined`."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    return Process()


def own_device(environment: Mapping[str, str], device: str) -> str:
    """Return the device that the run asks for, or the accelerator of that kind with this process's number.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK, the number on this machine, in the environment.

    Raises:
        InputError: several processes on one numbered accelerator.
    """
    kind, _, number = device.partition(":")
    if "RANK" not in environment or kind == "cpu":
        return device
    if number and int(environment["WORLD_SIZE"]) > 1:
        raise InputError(f"expected a device for every process, found {device!r} for all of them; set --device {kind}")
    return device if number else f"{kind}:{environment['LOCAL_RANK']}"


@contextmanager
def joined(environment: Mapping[str, str], device: str) -> Iterator[Process]:
    """Join the other processes that torchrun started, for the length of a block; yields this process's place."""
    if "RANK" not in environment:
        yield Process()
        return
    kind, _, number = device.partition(":")
    if kind != "cpu":
        torch.accelerator.set_device_index(int(number))
    dist.init_process_group("gloo" if kind == "cpu" else None, timeout=FIRST_ALONE)
    try:
        with warnings.catch_warnings():
            # Of sides of length one, where strides mean nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield current_process()
        dist.barrier()  # none leaves before the first has written what it has to
    finally:
        dist.destroy_process_group()
