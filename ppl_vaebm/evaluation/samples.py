"""Image samples of a VAEBM at several chain lengths: their metrics, and the statistics and speed of the chains.

If a density is right only for chains of the length that it was trained with, longer chains are worse. Therefore samples
are measured at the run's own length, at a longer one, and at 0, which gives VAE samples.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.evaluation.image_metrics import (
    FRECHET,
    Judge,
    MetricRow,
    class_columns,
    joined,
    metric_arrays,
    metric_rows,
    metric_section,
    remarks,
)
from ppl_vaebm.evaluation.metrics.features_base import Outputs
from ppl_vaebm.evaluation.metrics.modes import mode_statistics
from ppl_vaebm.evaluation.sections import Effort, Measured, Rows, Section, mean_value
from ppl_vaebm.inference.kernels.base import value_only
from ppl_vaebm.inference.likelihood import RejectionError, exact_draws
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.sampling import ChainBlock, chain_blocks, decode_in_blocks, num_blocks, sample_by_chains
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun

NUM_KEPT = 500
"""Samples kept as images, for their nearest training images. Chosen by us: the standard error of a median distance is
about 5 % of the distances' spread."""
VAE_STEPS = 0
"""Number of steps at which a chain's position is a VAE sample."""


class Drawn(NamedTuple):
    """Samples after one number of steps."""

    images: Tensor
    """The first :data:`NUM_KEPT`, rounded to levels, ``(n, C, H, W)``."""
    mean_squares: dict[str, Tensor]
    """Of every noise, ``(num,)`` each."""
    energy: Tensor
    """``(num,)``, nats."""
    decoding_seconds: float
    """From noise to images."""
    described: Outputs | None
    """Of all of them; ``None`` where there is no network."""


class Samples(NamedTuple):
    """Samples by the number of steps, and the chains that they come from."""

    after: dict[int, Drawn]
    blocks: list[ChainBlock]
    """Without their positions."""


def draw_samples(loaded: LoadedRun, judge: Judge | None, num: int, steps: Sequence[int], seed: int) -> Samples:
    """Draw images by chains from N(0, I), and compute their features block by block.

    Args:
        judge: ``None`` where only images are needed.
        steps: chain lengths; VAE samples are added.
    """
    kernel, potential = loaded.config.sampling.kernel, loaded.potential
    lengths = sorted({VAE_STEPS, *steps})
    total = num_blocks(potential, num) * max(lengths)
    note = f"{kernel.name}: {num_blocks(potential, num)} blocks of chains, {max(lengths)} steps of every chain, "
    tqdm.write(note + "each at least one evaluation of the energy and its gradient", file=sys.stderr)
    parts: dict[int, list[Drawn]] = {count: [] for count in lengths}
    blocks = []
    with tqdm(total=total, desc=f"{num} chains, {max(lengths)} steps of {kernel.name}", disable=None) as bar:
        for block in chain_blocks(
            potential,
            kernel,
            num=num,
            steps=lengths,
            seed=seed,
            latent_steps=loaded.config.sampling.latent_steps,
            on_step=bar.update,
        ):
            for count, position in block.positions.items():
                parts[count].append(_drawn(loaded, judge, position))
            blocks.append(block._replace(positions={}))
    return Samples({count: _joined(found) for count, found in parts.items()}, blocks)


def _drawn(loaded: LoadedRun, judge: Judge | None, position: Tensor) -> Drawn:
    start = time.perf_counter()
    x = decode_in_blocks(loaded.potential, position)
    seconds = time.perf_counter() - start
    mean_squares = loaded.potential.packing.mean_square(position)
    blocks = position.split(loaded.potential.rows_per_pass)
    return Drawn(
        images=quantised_as(x[:NUM_KEPT], loaded.data),
        mean_squares={name: value.cpu() for name, value in mean_squares.items()},
        energy=torch.cat([value_only(loaded.potential, rows).cpu() for rows in blocks]),
        decoding_seconds=seconds,
        described=None if judge is None else judge.describe(x),
    )


def _joined(parts: list[Drawn]) -> Drawn:
    described = [part.described for part in parts if part.described is not None]
    return Drawn(
        images=torch.cat([part.images for part in parts])[:NUM_KEPT],
        mean_squares={name: torch.cat([part.mean_squares[name] for part in parts]) for name in parts[0].mean_squares},
        energy=torch.cat([part.energy for part in parts]),
        decoding_seconds=sum(part.decoding_seconds for part in parts),
        described=joined(described) if described else None,
    )


def measure_samples(loaded: LoadedRun, judge: Judge, samples: Samples, effort: Effort) -> Measured:
    """Measure data, VAE samples and samples at each chain length, and report the chains."""
    num, kernel = effort.num_samples, loaded.config.sampling.kernel.name
    names = {count: f"VAEBM, {count} {kernel} steps" if count else "VAE" for count in samples.after}
    sets = {names[count]: _described(drawn) for count, drawn in samples.after.items()}
    rows = metric_rows(judge, sets, num)
    more = {f"{FRECHET} over the VAE's": _over_the_vae(rows), **class_columns(judge, sets, num)}
    sections = [
        metric_section(judge, rows, num, more),
        remarks(judge, next(iter(sets.values())), num),
        chain_section(samples, kernel),
    ]
    arrays = metric_arrays(rows, steps=list(samples.after), net=judge.net.name, num=num, kernel=kernel)
    return Measured(sections, arrays)


def _described(drawn: Drawn) -> Outputs:
    if drawn.described is None:
        raise ValueError("these samples were drawn without a network to describe them: give draw_samples a judge")
    return drawn.described


def _over_the_vae(rows: list[MetricRow]) -> Rows:
    distances = {row.name: row.cells[FRECHET] for row in rows}
    vae = distances.pop("VAE")
    assert isinstance(vae, float)
    return {name: distance / vae for name, distance in distances.items() if isinstance(distance, float)}


def chain_section(samples: Samples, kernel: str) -> Section:
    """Report the statistics and speed of the chains at each length.

    Times include the drawing of noise and the decoding of the last position, but neither warm-up nor metrics. The mean
    square of each noise is 1 on average under the VAE. Swaps of the first latent are those of the longest chains.
    """
    columns = {f"{count} steps" if count else "VAE": _chain_rows(samples, count) for count in samples.after}
    return Section(f"chains of {kernel}, {len(samples.after[VAE_STEPS].energy)} samples", columns)


def _chain_rows(samples: Samples, count: int) -> Rows:
    blocks, drawn = samples.blocks, samples.after[count]
    num_run = sum(block.size for block in blocks)
    seconds = sum(block.seconds[count] for block in blocks)
    # As many chains ran as the blocks hold, and as many images were decoded as were asked for.
    per_image = seconds / num_run + drawn.decoding_seconds / len(drawn.energy)
    section: Rows = {"images per second": 1 / per_image}
    if count:
        num_evals = sum(block.size * block.num_evals[count] for block in blocks)
        section |= {
            "step size": blocks[0].step_size,
            "acceptance": float(torch.cat([block.acceptance_rate[:count] for block in blocks]).mean()),
            "divergent moves": sum(int(block.num_divergent[:count].sum()) for block in blocks),
            "evaluations per image": num_evals / num_run,
            "evaluations per second": num_evals / seconds,
        }
        rates = [block.report["exchange_rate"] for block in blocks if "exchange_rate" in block.report]
        if rates:
            section["acceptance of exchanges, longest chains"] = float(torch.tensor(rates).mean())
    section |= {f"mean square of {noise}": mean_value(value) for noise, value in drawn.mean_squares.items()}
    section["mean energy (nats)"] = mean_value(drawn.energy)
    return section


def modes(loaded: LoadedRun, effort: Effort, seed: int) -> list[Section]:
    """Count modes of VAE samples, of exact draws of the VAEBM, and of its chains, on data with known modes.

    A second section has the reason where there are no exact draws.
    """
    chains = sample_by_chains(
        loaded.potential,
        loaded.config.sampling.kernel,
        num=effort.num_samples,
        steps=[0, *effort.steps],
        seed=seed,
        latent_steps=loaded.config.sampling.latent_steps,
    )
    columns, failures = {"VAE": mode_rows(loaded, chains.positions[0])}, []
    try:
        exact = exact_draws(
            loaded.potential, stream(seed, "exact", device=loaded.config.device), effort.num_samples
        ).position
        columns["VAEBM, exact draws"] = mode_rows(loaded, exact)
    except RejectionError as error:
        failures = [Section("modes of exact draws of the VAEBM", {"": {"none": str(error)}})]
    for count in effort.steps:
        name = f"VAEBM, {loaded.config.sampling.kernel.name} chains, {count} steps"
        columns[name] = mode_rows(loaded, chains.positions[count])
    return [Section("modes", columns), *failures]


def mode_rows(loaded: LoadedRun, position: Tensor) -> Rows:
    """Return the rows of :func:`data_mode_rows` and the mean energy of noise ``(num, D)``."""
    return {
        **data_mode_rows(decode_in_blocks(loaded.potential, position), loaded.data),
        "mean energy": mean_value(_energies(loaded.potential, position)),
    }


def data_mode_rows(x: Tensor, data: Data) -> Rows:
    """Return the fraction of samples ``(n, d)`` near a mode, the modes found, and the evenness of the modes."""
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
        return torch.cat([potential(rows) for rows in position.split(potential.rows_per_pass)])
