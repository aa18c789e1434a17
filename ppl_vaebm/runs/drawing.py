"""Draws of a fitted VAEBM by chains from fresh noise, and of its VAE, with their files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.data.load import Data, random_subset
from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
from ppl_vaebm.inference.vae_draws import prior_draws
from ppl_vaebm.reports.gallery import Choices, check_group, write_gallery
from ppl_vaebm.reports.samples import save_samples_png
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.fitted_vae import FittedVAE
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run


def draw_vae(fitted: FittedVAE, choices: Choices, num: int, seed: int) -> list[str]:
    """Write draws of a VAE, data beside them, and stage 1's pictures.

    Args:
        fitted: stage 1 of a run.
        choices: what the pictures show.
        num: draws.
        seed: of the draws.

    Returns:
        A line for each file.

    Raises:
        InputError: a latent group that the model does not have; nothing was written.
    """
    check_group(fitted.vae, choices.group)
    draws = prior_draws(fitted.sampler, num, seed)
    lines = _save(fitted.run, {"data": _test_data(fitted.data, num, seed), "vae": draws})
    return lines + [str(path) for path in write_gallery(fitted, seed, choices)]


def draw_vaebm(loaded: LoadedRun, kernel: KernelConfig, *, num: int, num_steps: int, seed: int) -> list[str]:
    """Write draws of a VAEBM, of its VAE, and data beside them.

    Args:
        loaded: the fitted run.
        kernel: of the chains.
        num: draws of each.
        num_steps: steps from fresh noise to a draw.
        seed: of the chains.

    Returns:
        A line for each file, and one on the chains.
    """
    latent_steps = loaded.config.sampling.latent_steps
    chains = sample_by_chains(
        loaded.potential, kernel, num=num, steps=[0, num_steps], seed=seed, latent_steps=latent_steps
    )
    sets = {
        "data": _test_data(loaded.data, num, seed),
        "vae": decode_in_blocks(loaded.potential, chains.positions[0]),
        "vaebm": decode_in_blocks(loaded.potential, chains.positions[num_steps]),
    }
    return [
        *_save(loaded.run, sets),
        f"{kernel.name}: {num_steps} steps from fresh noise, step size {chains.step_size:.3g}, "
        f"acceptance {chains.acceptance_rate:.2f}, {chains.num_evals:.0f} evaluations a draw",
    ]


def _test_data(data: Data, num: int, seed: int) -> Tensor:
    test = random_subset(data.test, num, stream(seed, "order", "test"))
    return test.batch(torch.arange(len(test)), stream(seed, "dequantise"))


def _save(run: Run, sets: Mapping[str, Tensor]) -> list[str]:
    lines = []
    for name, x in sets.items():
        path = run.save_npz(name, x=x.numpy())
        save_samples_png(path.with_suffix(".png"), x.numpy())
        lines.append(f"{path}: {len(x)} draws, shape {tuple(x.shape[1:])}")
    return lines
