"""Study: simulation-based calibration of the posteriors of a fitted VAEBM of digits, given their upper halves.

``python -m ppl_vaebm.experiments.sbc_digits --run RUN`` draws digits from the VAEBM, observes the upper half of each,
with noise or exactly, samples all posteriors at once, and ranks each digit among the draws of its posterior. Each
setting runs correctly and with a planted fault, which the ranks must show. It writes sbc-digits.json and a picture of
the histograms.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vaebm.config import KernelConfig
from ppl_vaebm.config.parsing import parse
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.experiments.studies import RESULTS, load_results, save_results
from ppl_vaebm.files import write_atomic
from ppl_vaebm.inference.conditioning import ConditionalPotential, annealed_starts
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns
from ppl_vaebm.inference.diagnostics.sbc import ranks, uniformity
from ppl_vaebm.inference.kernels.base import init_params, value_only
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.inference.observations import ExactValues, NoisyValues, Transported, at_coordinates, values_at
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.reports.figures import TITLE_POINTS, axes_grid, png_of
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun, load_run

NOISE_SD = 0.3  # of a pixel in [-1, 1]
ROWS_PER_BLOCK = 1_000  # more of them are slower on a CPU
NUM_CHAINS = 4  # per simulation
NUM_PARTICLES = 8  # per simulation, of which the chains begin at half
NUM_WARMUP = 30
NUM_DRAWS = 8  # per chain: 32 in all, hence ranks 0 to 32
THIN = 8  # transitions; long chains have 1 effective draw in 3 to 5 of them
NUM_BINS = 11
KERNEL = KernelConfig("hmc", num_steps=10)
PIXELS = (3, 13, 18, 28)  # of the 32 in the lower half, row by row
ALPHA = 0.01  # over the number of quantities (Bonferroni)
Setting = Literal["noisy", "noisy, noise-sd halved", "exact", "exact, log scale left out"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


@dataclass(frozen=True)
class Options:
    """Options of the calibration."""

    run: str
    """Folder of a fitted run of the recipe digits."""
    settings: tuple[Setting, ...] = SETTINGS
    """Settings to run; results of the others stay in the file."""
    num_simulations: int = 256
    """Digits drawn from the VAEBM."""
    seed: int = 0
    """Seed of everything."""
    out: str = str(RESULTS)
    """Folder of sbc-digits.json and sbc-digits.png."""


class WithoutScale(ExactValues):
    """A planted fault: observed values whose transport leaves out the scale."""

    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Transport, without the log scale of p(x_observed | z)."""
        scale = at_coordinates(vae.decode_noise(eps)[0], self.observed).distribution().base_dist.scale
        correct = super().transport(vae, eps)
        return correct._replace(loss=correct.loss - scale.log().sum(1))


def observed(setting: Setting, loaded: LoadedRun, x: Tensor, seed: int) -> ConditionalPotential:
    """Observe the upper half of every digit ``(S, 1, 8, 8)``, and return the potential of the posteriors.

    The seed is that of the noise.
    """
    mask = upper_half(x)
    if setting.startswith("exact"):
        exact = ExactValues if setting == "exact" else WithoutScale
        return ConditionalPotential(loaded.vaebm, exact(x, mask))
    noise = torch.randn(x.shape, generator=stream(seed, "sbc-noise"))
    claimed_sd = NOISE_SD if setting == "noisy" else NOISE_SD / 2
    y = (x + NOISE_SD * noise)[:, mask]
    return ConditionalPotential(loaded.vaebm, NoisyValues(y, claimed_sd, values_at(mask)))


def upper_half(x: Tensor) -> Tensor:
    """Return the mask that is true in the upper half of an image."""
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[:, : x.shape[-2] // 2] = True
    return mask


def quantities(potential: NoisePotential, position: Tensor) -> dict[str, Tensor]:
    """Compute what is ranked, ``(C,)`` each: energy, unobserved pixels, directions in these and in latents."""
    x = potential.decode(position)
    noises = potential.packing.unravel(position)
    latents = torch.cat([value.flatten(1) for name, value in noises.items() if name.startswith("eps_z")], dim=1)
    unseen = x[:, ~upper_half(x)]
    ranked = {"energy": value_only(potential.vaebm.energy, x)}
    ranked |= {f"unobserved pixel {index}": unseen[:, index] for index in PIXELS}
    for name, values in (("unobserved pixels", unseen), ("latents' noise", latents)):
        directions = torch.randn(values.shape[1], 2, generator=stream(0, "sbc-directions", name))
        for number, projection in enumerate((values @ directions).unbind(1), 1):
            ranked[f"direction {number} in {name}"] = projection
    return ranked


def calibrate(setting: Setting, loaded: LoadedRun, prior: Tensor, seed: int) -> dict[str, Any]:
    """Run one setting from the noise ``(S, D)`` of VAEBM samples, and test the ranks of every quantity."""
    begin = time.perf_counter()
    posterior = observed(setting, loaded, loaded.potential.decode(prior), seed)
    generator = stream(seed, "sbc-posterior", setting)
    starts, particles = annealed_starts(posterior, generator, NUM_CHAINS, num_particles=NUM_PARTICLES)

    chains = run_chains(
        build_kernel(KERNEL, posterior),
        generator,
        starts,
        init_params(starts, float(particles.ladder.step_sizes[-1])),
        num_draws=NUM_DRAWS,
        num_warmup=NUM_WARMUP,
        thin=THIN,
        functionals=lambda state: quantities(posterior, state.position),
    )
    num_draws = NUM_CHAINS * NUM_DRAWS
    tests = {}
    for name, truth in quantities(loaded.potential, prior).items():
        draws = chains.draws[name].unflatten(0, (len(prior), NUM_CHAINS))
        tests[name] = uniformity(ranks(truth, draws.flatten(1)), num_draws, NUM_BINS)._asdict()
    stored = torch.stack(list(chains.draws.values()), -1).unflatten(0, (len(prior), NUM_CHAINS)).numpy()
    r_hat = np.stack([diagnose_columns(draws).r_hat for draws in stored])
    acceptance = chains.stats["acceptance_rate"].mean(1)
    worst_p = min(test["p_value"] for test in tests.values())
    return {
        "smallest p-value": worst_p,
        "uniform": worst_p > ALPHA / len(tests),
        "tests": tests,
        "R-hat over simulations and functionals, median and 95 %": np.quantile(r_hat, (0.5, 0.95)).tolist(),
        "acceptance, mean and smallest of a chain": [float(acceptance.mean()), float(acceptance.min())],
        "divergent draws": int(chains.stats["diverging"].sum()),
        "levels of tempering": particles.num_levels,
        "evaluations per chain": (particles.num_evals + chains.warmup_evals + chains.num_evals)
        // (len(prior) * NUM_CHAINS),
        "seconds": time.perf_counter() - begin,
    }


def histograms(settings: Mapping[str, Mapping[str, Any]], num_simulations: int) -> Figure:
    """Draw the histograms of the ranks, a row for each setting, with the band that holds 99 % of uniform counts."""
    mean = num_simulations / NUM_BINS
    spread = 2.576 * math.sqrt(mean * (1 - 1 / NUM_BINS))
    names = [*next(iter(settings.values()))["tests"]]
    figure, rows = axes_grid(len(settings), len(names), height=1.7)
    for axes, (setting, result) in zip(rows, settings.items(), strict=True):
        for ax, name in zip(axes, names, strict=True):
            test = result["tests"][name]
            ax.axhspan(mean - spread, mean + spread, color="0.85")
            ax.bar(range(NUM_BINS), test["counts"], width=0.9)
            ax.set(xticks=[], ylim=(0, 4 * mean))
            ax.set_title(f"{name}\np = {test['p_value']:.2g}".replace(" in ", "\nin "), fontsize=6)
        axes[0].set_ylabel(setting.replace(", ", ",\n"), fontsize=TITLE_POINTS - 2)
    return figure


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the settings, and write results and histograms."""
    options = parse(Options, sys.argv[1:] if argv is None else argv, "experiments.sbc_digits", __doc__)
    torch.set_num_threads(1)
    loaded = load_run(options.run)
    loaded.potential.rows_per_block = ROWS_PER_BLOCK
    prior = exact_draws(loaded.potential, stream(options.seed, "sbc-prior"), options.num_simulations)
    file = Path(options.out) / "sbc-digits.json"
    setup = {
        "simulations": options.num_simulations,
        "posterior draws": NUM_CHAINS * NUM_DRAWS,
        "bins": NUM_BINS,
        "noise sd": NOISE_SD,
        "seed": options.seed,
        "prior": f"exact draws by rejection, {options.num_simulations} of {prior.num_proposals} VAE samples",
    }
    old = load_results(file)
    settings = old.get("settings", {}) if old.get("setup") == setup else {}
    for setting in options.settings:
        result = settings[setting] = calibrate(setting, loaded, prior.position, options.seed)
        save_results(file, {"setup": setup, "settings": settings})
        answer = "uniform" if result["uniform"] else "not uniform"
        print(f"{setting}: {answer}, smallest p of {len(result['tests'])} {result['smallest p-value']:.3g}", flush=True)
    settings = {name: settings[name] for name in SETTINGS if name in settings}
    write_atomic(file.with_suffix(".png"), png_of(histograms(settings, options.num_simulations)))


if __name__ == "__main__":
    main()
