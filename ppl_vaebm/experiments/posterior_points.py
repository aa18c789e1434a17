"""Study: posteriors of a fitted VAEBM of points against quadrature.

``python -m ppl_vaebm.experiments.posterior_points --run RUN`` takes a run of the recipe gaussians25, integrates its
latents out by Monte Carlo and its coordinates on a grid, draws the second coordinate given the first, exact or noisy,
by rejection and by chains, and compares mean, variance and distribution function, in Monte Carlo standard errors. It
writes posterior-points.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.experiments.studies import RESULTS, load_results, save_results
from ppl_vaebm.inference.conditioning import ConditionalPotential, condition
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns, ess_of_means
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.conditional import sample_posterior
from ppl_vaebm.runs.loading import LoadedRun, load_run

NUM_Z = 200_000
GRID = torch.linspace(-3, 3, 1_201)  # step 0.005, a tenth of a mode's standard deviation
LINE = torch.linspace(-3, 3, 601)  # of the first coordinate, where it is seen with noise
# In a column of modes, on the flank of one, and between two.
CASES: tuple[tuple[float, float | None], ...] = ((1.0, None), (-0.08, None), (1.0, 0.1), (0.5, 0.3))
CDF_AT = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # between modes and at their centres
KERNEL = KernelConfig("mixture", members=("independence", "mala"))
NUM_EXACT = 20_000

Method = Literal["rejection", "chains"]


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    run: str
    """Folder of a fitted run of the recipe gaussians25."""
    methods: tuple[Method, ...] = ("rejection", "chains")
    """How to draw; results of the other stay in the file."""
    seed: int = 0
    """Seed of everything."""
    out: str = str(RESULTS)
    """Folder of posterior-points.json."""


@torch.no_grad()
def quadrature(loaded: LoadedRun, x_1: float, noise_sd: float | None, seed: int) -> Tensor:
    """Return the posterior's probabilities of the cells around :data:`GRID`, ``(points,)``, float64.

    ``p(x)`` is the mean of ``p(x | z)`` over draws of the prior.
    """
    potential = loaded.potential
    line = torch.tensor([x_1]) if noise_sd is None else LINE
    joint = torch.zeros(len(line), len(GRID), dtype=torch.float64)
    position = potential.draw_reference(stream(seed, "quadrature"), NUM_Z)
    for rows in position.split(20_000):
        decoded = loaded.vaebm.vae.decode_noise(potential.packing.unravel(rows))[0]
        normal = decoded.distribution().base_dist
        loc, scale = normal.loc.double(), normal.scale.double()
        first, second = (
            (-0.5 * ((values.double().unsqueeze(1) - loc[:, i]) / scale[:, i]).square()).exp() / scale[:, i]
            for i, values in enumerate((line, GRID))
        )
        joint += first @ second.T
    energy = loaded.vaebm.energy(torch.cartesian_prod(line, GRID)).double().view_as(joint)
    likelihood = torch.ones(len(line)).double()
    if noise_sd is not None:
        likelihood = (-0.5 * ((x_1 - line.double()) / noise_sd).square()).exp()
    density: Tensor = likelihood @ (joint * (-energy).exp())
    return density / density.sum()


def chain_draws(potential: ConditionalPotential, seed: int) -> Tensor:
    """Draw the second coordinate by chains, ``(C, N)``."""
    posterior = sample_posterior(potential, KERNEL, num=1, num_chains=32, num_warmup=200, num_draws=1_000, seed=seed)
    return posterior.chains.draws["value"][..., -1].double()


def rejection_draws(potential: ConditionalPotential, seed: int) -> Tensor:
    """Draw the second coordinate independently, as 32 chains, ``(C, N)``."""
    draws = exact_draws(potential, stream(seed, "exact"), NUM_EXACT)
    return potential.decode(draws.position)[:, 1].double().view(32, -1)


def compare(x_2: Tensor, probability: Tensor) -> dict[str, Any]:
    """Compare draws of the second coordinate, ``(C, N)``, with the probabilities of :func:`quadrature`.

    Returns:
        By quantity: draws, quadrature and their difference in standard errors; and the R-hat of x_2.
    """
    grid = GRID.double()
    mean = float((probability * grid).sum())
    half_cells = probability.cumsum(0) - 0.5 * probability
    expected = {"mean": mean, "variance": float((probability * (grid - mean).square()).sum())}
    quantities = {"mean": x_2, "variance": (x_2 - mean).square()}
    for edge in CDF_AT:
        quantities[f"P(x_2 < {edge:g})"] = (x_2 < edge).double()
        expected[f"P(x_2 < {edge:g})"] = float(half_cells[int((grid - edge).abs().argmin())])
    draws = torch.stack(list(quantities.values())).numpy()
    ess = ess_of_means(draws)
    error, means = draws.std((1, 2)) / np.sqrt(ess), draws.mean((1, 2))
    rows = {
        name: {
            "draws": float(means[i]),
            "quadrature": expected[name],
            "error": float(error[i]),
            "z": float(means[i] - expected[name]) / float(error[i]),
        }
        for i, name in enumerate(quantities)
    }
    return {
        "worst |z|": max(abs(row["z"]) for row in rows.values()),
        "R-hat of x_2": float(diagnose_columns(x_2.unsqueeze(-1).numpy()).r_hat[0]),
        "smallest ESS": float(ess.min()),
        "functionals": rows,
    }


METHODS: dict[Method, Callable[[ConditionalPotential, int], Tensor]] = {
    "rejection": rejection_draws,
    "chains": chain_draws,
}


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Compare every case by every method."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "experiments.posterior_points", __doc__)
    torch.set_num_threads(1)
    loaded = load_run(options.run)
    results: dict[str, Any] = {}
    for x_1, noise_sd in CASES:
        given_text = f"x_1 = {x_1:g}" + ("" if noise_sd is None else f" with noise of sd {noise_sd:g}")
        given = torch.tensor([x_1, math.nan])
        potential = condition(loaded.vaebm, given=given, mask=~given.isnan(), noise_sd=noise_sd)
        probability = quadrature(loaded, x_1, noise_sd, options.seed)
        for name in options.methods:
            result = results[f"{given_text}, {name}"] = compare(METHODS[name](potential, options.seed), probability)
            print(
                f"{given_text}, {name}: worst |z| {result['worst |z|']:.2f}, R-hat {result['R-hat of x_2']:.4f}, "
                f"smallest ESS {result['smallest ESS']:.0f}"
            )
    file = Path(options.out) / "posterior-points.json"
    save_results(file, load_results(file) | results)


if __name__ == "__main__":
    main()
