"""Image samples of a VAEBM at several chain lengths: how good they are, what the chains did, and how fast they were.

A sampler can be tuned to one length while the density behind it is wrong, and then longer chains are worse. So every
number stands at the run's own length and at a longer one, and at none, which is the VAE.
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
"""Samples that are kept as images, for their neighbours among the training images; chosen by us, for a standard error
of a median distance of about 5 % of the distances' spread."""
VAE_STEPS = 0
"""Steps after which a chain still stands at a draw of the VAE."""


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
    """Draw images by chains from fresh noise, and describe them block by block.

    Args:
        loaded: the fitted VAEBM, of images.
        judge: network and data; ``None`` where the first images are enough.
        steps: chain lengths; the VAE's own draws come on top.
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
    """Measure samples at every chain length.

    Returns:
        A section for each metric, with rows for data, the VAE and the VAEBM; the Frechet distance over the VAE's own;
        classes of StackedMNIST; what the chains did.
    """
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
    """Say what the chains behind samples did, and how fast.

    Times are of this machine; they include the drawing of noise and the decoding of the last position, and neither the
    warm-up that tunes the step size nor the metrics.

    Returns:
        For the VAE and for every length cost and speed, the mean square of every noise, which is 1 on average under the
        VAE, and the mean energy; for the chains also their step size, acceptance and divergent moves until then, and
        how often they exchanged the first latent, over the longest chains.
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
    """Count modes of the VAE, of exact draws of the VAEBM, and of its chains.

    Args:
        loaded: the fitted VAEBM, on data with known modes.

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
    """Describe one set of draws on data with known modes.

    Args:
        position: noise, ``(num, D)``.

    Returns:
        Share of good points, modes found, evenness of the modes, mean energy.
    """
    return {
        **data_mode_rows(decode_in_blocks(loaded.potential, position), loaded.data),
        "mean energy": mean_value(_energies(loaded.potential, position)),
    }


def data_mode_rows(x: Tensor, data: Data) -> Rows:
    """Describe samples of data with known modes.

    Args:
        x: samples, ``(n, d)``.

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
        return torch.cat([potential(rows) for rows in position.split(potential.rows_per_pass)])
