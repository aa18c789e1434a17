"""Modes that the data are known to have: which of them draws find, and how evenly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.evaluation.base import Effort, Section, mean_cell
from ppl_vaebm.evaluation.metrics.classification import mode_statistics
from ppl_vaebm.inference.likelihood import RejectionError, exact_draws
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun


def modes(loaded: LoadedRun, effort: Effort, seed: int) -> dict[str, Section]:
    """Count modes of the VAE, of exact draws of the VAEBM, and of its chains.

    Args:
        loaded: the fitted VAEBM, on data with known modes.
        effort: number of samples and chain lengths.
        seed: of all draws.

    Returns:
        A section for each set of draws; where rejection gives up, that of the exact draws says so.
    """
    chains = sample_by_chains(
        loaded.potential,
        loaded.config.sampling.kernel,
        num=effort.num_samples,
        steps=[0, *effort.steps],
        seed=seed,
        latent_steps=loaded.config.sampling.latent_steps,
    )
    sections = {"modes: VAE": mode_section(loaded, chains.positions[0])}
    try:
        exact = exact_draws(
            loaded.potential, stream(seed, "exact", device=loaded.config.device), effort.num_samples
        ).position
        sections["modes: VAEBM, exact draws"] = mode_section(loaded, exact)
    except RejectionError as error:
        sections["modes: VAEBM, exact draws"] = {"none": str(error)}
    for count in effort.steps:
        name = f"modes: VAEBM, {loaded.config.sampling.kernel.name} chains, {count} steps"
        sections[name] = mode_section(loaded, chains.positions[count])
    return sections


def mode_section(loaded: LoadedRun, position: Tensor) -> Section:
    """Describe one set of draws on data with known modes.

    Args:
        loaded: the fitted VAEBM.
        position: noise, ``(num, D)``.

    Returns:
        Share of good points, modes found, evenness of the modes, mean energy.
    """
    return {
        **mode_cells(decode_in_blocks(loaded.potential, position), loaded.data),
        "mean energy": mean_cell(_energies(loaded.potential, position)),
    }


def mode_cells(x: Tensor, data: Data) -> Section:
    """Describe samples of data with known modes.

    Args:
        x: samples, ``(n, d)``.
        data: what they should look like.

    Returns:
        Share of good points, modes found, evenness of the modes.
    """
    assert data.modes is not None and data.mode_std is not None
    found = mode_statistics(x, data.modes, data.mode_std)
    share = found.high_quality
    return {
        "share within 3 std of a mode": {"value": share, "error": math.sqrt(share * (1 - share) / len(x))},
        f"modes of {len(data.modes)}": found.num_modes,
        "KL of the mode histogram to uniform (nats)": (
            found.kl_to_uniform if share else "undefined: no point is near a mode"
        ),
    }


def _energies(potential: NoisePotential, position: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([potential(rows) for rows in position.split(1_000)])
