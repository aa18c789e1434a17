"""Draws of a fitted VAEBM by chains from fresh noise, and of its VAE, with their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import random_subset
from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
from ppl_vaebm.inference.vae_samples import vae_samples
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.gallery import Choices, check_group, write_gallery
from ppl_vaebm.runs.loading import FittedVAE, LoadedRun
from ppl_vaebm.runs.run import Run


class Written(NamedTuple):
    """Result of a drawing."""

    files: list[Path]
    """Files of arrays, each of which can be shown as a picture."""
    lines: list[str]
    """What to print."""


def draw_vae(fitted: FittedVAE, choices: Choices, num: int, seed: int) -> Written:
    """Write ``num`` VAE samples, data beside them, and the arrays of stage 1's pictures.

    Raises:
        InputError: a latent group that the model does not have; nothing was written.
    """
    check_group(fitted.vae, choices.group)
    draws = vae_samples(fitted.sampler, num, seed)
    written = _save(fitted.run, {"data": _test_data(fitted.data, num, seed), "vae": draws})
    paths = [fitted.run.samples_dir / f"{name}.npz" for name in write_gallery(fitted, seed, choices)]
    return Written([*written.files, *paths], [*written.lines, *map(str, paths)])


def draw_vaebm(loaded: LoadedRun, kernel: KernelConfig, *, num: int, num_steps: int, seed: int) -> Written:
    """Write ``num`` samples of a VAEBM, ``num_steps`` from N(0, I), as many of its VAE, and data beside them."""
    latent_steps = loaded.config.sampling.latent_steps
    chains = sample_by_chains(
        loaded.potential, kernel, num=num, steps=[0, num_steps], seed=seed, latent_steps=latent_steps
    )
    sets = {
        "data": _test_data(loaded.data, num, seed),
        "vae": decode_in_blocks(loaded.potential, chains.positions[0]),
        "vaebm": decode_in_blocks(loaded.potential, chains.positions[num_steps]),
    }
    written = _save(loaded.run, sets)
    summary = (
        f"{kernel.name}: {num_steps} steps from fresh noise, step size {chains.step_size:.3g}, "
        f"acceptance {chains.acceptance_rate:.2f}, {chains.num_evals:.0f} evaluations a draw"
    )
    return written._replace(lines=[*written.lines, summary])


def _test_data(data: Data, num: int, seed: int) -> Tensor:
    test = random_subset(data.test, num, stream(seed, "order", "test"))
    return test.batch(torch.arange(len(test)), stream(seed, "dequantise"))


def _save(run: Run, sets: Mapping[str, Tensor]) -> Written:
    paths = [run.save_npz(name, x=x.numpy()) for name, x in sets.items()]
    lines = [
        f"{path}: {len(x)} draws, shape {tuple(x.shape[1:])}" for path, x in zip(paths, sets.values(), strict=True)
    ]
    return Written(paths, lines)
