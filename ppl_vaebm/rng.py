"""Random numbers with names: one stream per purpose, none of them global.

A stream is a ``torch.Generator`` whose seed is a hash of the run's seed and a key, so adding a
stream never changes another, and ranks or steps are just one more part of the key.
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
        key: the stream's name, and whatever else tells it apart (rank, epoch, step).

    Returns:
        An integer in ``[0, 2**63)``; the same on every machine and Python version.
    """
    text = "/".join([str(seed), *map(str, key)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> (64 - NUM_SEED_BITS)


def stream(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make the generator of one named stream.

    Args:
        seed: the run's seed.
        key: see :func:`seed_for`.
        device: where the generator draws.

    Returns:
        A fresh generator at the start of its stream.
    """
    return torch.Generator(device=device).manual_seed(seed_for(seed, *key))


@contextmanager
def global_rng(seed: int) -> Iterator[None]:
    """Run a block under a seeded global generator, and put the global state back afterwards.

    Pyro and ``torch.nn.init`` draw from the global generator; this is the only door to it.

    Args:
        seed: the seed inside the block.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: where no accelerator is in use yet it queues the call, with a stack trace, for when one
        # will be, and a training loop would fill the queue.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
