"""Named streams of random numbers, one per purpose, none of them global.

A stream is a ``torch.Generator`` whose seed is a hash of the run's seed and a key. A new stream therefore changes no
other one, and ranks or steps are further parts of the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NUM_SEED_BITS = 63  # torch.Generator.manual_seed takes a signed 64-bit integer


def seed_for(seed: int, *key: str | int) -> int:
    """Hash a run's seed and a key to the seed of one stream.

    Args:
        seed: the run's seed.
        key: the stream's name, and what else distinguishes it (rank, epoch, step).

    Returns:
        An integer in ``[0, 2**63)``; the same on every machine and Python version.
    """
    text = "/".join([str(seed), *map(str, key)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> (64 - NUM_SEED_BITS)


def stream(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make the generator of a named stream, at its start; for the key see :func:`seed_for`."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, *key))


@contextmanager
def global_rng(seed: int) -> Iterator[None]:
    """Seed the global generators for a block, and restore their state afterwards.

    Pyro and ``torch.nn.init`` draw from the global generators; they are used in such blocks only.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Before an accelerator is in use, torch.manual_seed queues a call with a stack trace for it, and a training
        # loop would fill the queue.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
