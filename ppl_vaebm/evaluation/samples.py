"""Image samples of a VAEBM at several chain lengths: how good they are, what the chains did, and how fast they were.

A sampler can be tuned to one length while the density behind it is wrong, and then longer chains are worse. So every
number stands at the run's own length and at a longer one, and at none, which is the VAE.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.evaluation.base import Effort, Measured, Section, mean_cell
from ppl_vaebm.evaluation.image_metrics import (
    FRECHET,
    Judge,
    Row,
    class_sections,
    joined,
    metric_arrays,
    metric_rows,
    metric_sections,
    remarks,
)
from ppl_vaebm.evaluation.metrics.features import Outputs
from ppl_vaebm.inference.kernels.base import value_only
from ppl_vaebm.inference.sampling import ChainBlock, chain_blocks, decode_in_blocks, num_blocks
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
        num: samples.
        steps: chain lengths; the VAE's own draws come on top.
        seed: of the chains.

    Returns:
        The samples.
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

    Args:
        loaded: the fitted VAEBM.
        judge: network and data.
        samples: described by that judge.
        effort: number of samples and chain lengths.

    Returns:
        A section for each metric, with rows for data, the VAE and the VAEBM; the Frechet distance over the VAE's own;
        classes of StackedMNIST; what the chains did.
    """
    num, kernel = effort.num_samples, loaded.config.sampling.kernel.name
    names = {count: f"VAEBM, {count} {kernel} steps" if count else "VAE" for count in samples.after}
    sets = {names[count]: _described(drawn) for count, drawn in samples.after.items()}
    rows = metric_rows(judge, sets, num)
    sections = {
        **metric_sections(judge, rows, num),
        f"{FRECHET} over the VAE's [{judge.net.name}], {num} samples": _over_the_vae(rows),
        **class_sections(judge, sets, num),
        **remarks(judge, next(iter(sets.values())), num),
        **chain_sections(samples, kernel),
    }
    arrays = metric_arrays(rows, steps=list(samples.after), net=judge.net.name, num=num, kernel=kernel)
    return Measured(sections, arrays)


def _described(drawn: Drawn) -> Outputs:
    if drawn.described is None:
        raise ValueError("these samples were drawn without a network to describe them: give draw_samples a judge")
    return drawn.described


def _over_the_vae(rows: list[Row]) -> Section:
    distances = {row.name: row.cells[FRECHET] for row in rows}
    vae = distances.pop("VAE")
    assert isinstance(vae, float)
    return {name: distance / vae for name, distance in distances.items() if isinstance(distance, float)}


def chain_sections(samples: Samples, kernel: str) -> dict[str, Section]:
    """Say what the chains behind samples did, and how fast.

    Times are of this machine; they include the drawing of noise and the decoding of the last position, and neither the
    warm-up that tunes the step size nor the metrics.

    Args:
        samples: with their chains.
        kernel: its name.

    Returns:
        For the VAE and for every length cost and speed, the mean square of every noise, which is 1 on average under the
        VAE, and the mean energy; for the chains also their step size, acceptance and divergent moves until then, and
        how often they exchanged the first latent, over the longest chains.
    """
    family = f"[chains of {kernel}], {len(samples.after[VAE_STEPS].energy)} samples"
    return {
        f"{f'{count} steps' if count else 'VAE'} {family}": _chain_section(samples, count) for count in samples.after
    }


def _chain_section(samples: Samples, count: int) -> Section:
    blocks, drawn = samples.blocks, samples.after[count]
    num_run = sum(block.size for block in blocks)
    seconds = sum(block.seconds[count] for block in blocks)
    # As many chains ran as the blocks hold, and as many images were decoded as were asked for.
    per_image = seconds / num_run + drawn.decoding_seconds / len(drawn.energy)
    section: Section = {"images per second": 1 / per_image}
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
    section |= {f"mean square of {noise}": mean_cell(value) for noise, value in drawn.mean_squares.items()}
    section["mean energy (nats)"] = mean_cell(drawn.energy)
    return section
