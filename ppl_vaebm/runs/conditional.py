"""Sampling the posterior of x given an observation: chains, what they say of every value of x, and the files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference.conditioning import ConditionalPotential, annealed_starts, condition
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import save_netcdf, to_inference_data
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns
from ppl_vaebm.inference.diagnostics.functionals import PositionRecorder, noise_functionals
from ppl_vaebm.inference.kernels.base import KernelState
from ppl_vaebm.inference.kernels.chains import Chains, Functionals, run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.inference.sampling import decode_in_blocks
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.drawing import Written
from ppl_vaebm.runs.fitted_vae import Stage, open_fitted_vae
from ppl_vaebm.runs.given import Given, GivenOptions, read_given
from ppl_vaebm.runs.loading import LoadedRun, load_run
from ppl_vaebm.runs.run import Run

NAME = "conditional"
"""Of the files in the samples folder."""
MAX_STORED_VALUES = 1 << 27
"""Values of x of all draws together that are kept for its mean, spread and R-hat, 0.5 GB; longer chains are thinned."""
NUM_FOLLOWED = 8
"""Values of x whose draws are stored one by one, those with the largest posterior spread among the starts."""
IMAGE_KERNEL: KernelName = "hmc"
"""On digits given their upper half the worst bulk ESS per 1000 evaluations was 26 to 43 of HMC with trajectories of 8
steps (16 chains, 1,500 evaluations each), and, with fewer evaluations, 5 of MALA, 4 of pCN and 1 of elliptical slice
sampling; one digit."""
POINT_KERNEL: KernelName = "mixture"
"""On 25 Gaussians given the first coordinate HMC stayed in the mode where it began, with an R-hat of 2.8 to 3.4 for
three observations; that of the cycle of independence Metropolis and HMC was 1.04 and 1.06 for two of them (32 chains of
500 draws)."""


@dataclass(frozen=True)
class Posterior:
    """Draws of x given an observation, and what they say of every value of x."""

    x: Tensor
    """``(num, *event)``, evenly spread over chains and draws."""
    mean: NDArray[np.float64]
    """Posterior mean, ``(*event)``; so are the next two."""
    sd: NDArray[np.float64]
    """Posterior standard deviation; 0 where a value was observed exactly."""
    r_hat: NDArray[np.float64]
    """Rank-normalised split R-hat; nan where the standard deviation is 0."""
    chains: Chains
    """The chains, with a few functionals of every draw."""


class NoEnergy(Energy):
    """``E = 0``: the VAE alone, as a VAEBM."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Return zeros; see :class:`Energy`."""
        return torch.zeros_like(x[:, :1]).flatten(1).sum(1)


def sample_posterior(
    potential: ConditionalPotential,
    config: KernelConfig,
    *,
    num: int,
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    seed: int,
) -> Posterior:
    """Sample a posterior from starts that tempering finds.

    Args:
        potential: of the posterior, of one observation.
        config: kernel.
        num: draws of x to return.
        num_chains: chains.
        num_warmup: steps of warm-up.
        num_draws: draws per chain.
        seed: of starts and chains.

    Returns:
        The posterior.
    """
    device = next(potential.vaebm.parameters()).device
    starts, particles = annealed_starts(potential, stream(seed, "starts", device=device), num_chains)
    size = max(potential.packing.dim, potential.vaebm.vae.model.event_shape.numel())
    max_draws = min(num_draws + 1, max(2, MAX_STORED_VALUES // (num_chains * size)))
    functionals = posterior_functionals(potential, starts)
    recorder = PositionRecorder(functionals, num_chains, potential.packing.dim, max_draws)
    chains = run_chains(
        build_kernel(config, potential),
        stream(seed, "chains", config.name, device=device),
        starts,
        start_params(config, starts),
        num_draws=num_draws,
        num_warmup=num_warmup,
        functionals=recorder,
    )
    positions = torch.from_numpy(recorder.positions).to(starts)
    x = decode_in_blocks(potential, positions.flatten(0, 1))
    values = x.flatten(1).unflatten(0, positions.shape[:2]).numpy()
    chosen = torch.linspace(0, len(x) - 1, min(num, len(x))).round().long()
    event = x.shape[1:]
    return Posterior(
        x=x[chosen],
        mean=values.mean((0, 1), dtype=np.float64).reshape(event),
        # Rounding would give values that never move a spread.
        sd=np.where((values == values[0, 0]).all((0, 1)), 0.0, values.std((0, 1), dtype=np.float64)).reshape(event),
        r_hat=diagnose_columns(values).r_hat.reshape(event),
        chains=replace(chains, attrs={**chains.attrs, "seed": seed, "start_levels": particles.num_levels}),
    )


def posterior_functionals(potential: ConditionalPotential, starts: Tensor) -> Functionals:
    """Make the functionals of a posterior's chains.

    Args:
        potential: of the posterior.
        starts: where its chains begin, ``(C, D)``; the values of x that differ most there are followed.

    Returns:
        As :func:`~ppl_vaebm.inference.functionals.noise_functionals`, but ``energy`` is E(x) alone, ``misfit`` minus
        the log likelihood of what was observed, both ``(C,)``, nats; and ``value`` are some values of x, ``(C, V)``.
    """
    spread = potential.decode(starts).flatten(1).std(0)
    followed = spread.topk(min(NUM_FOLLOWED, int((spread > 0).sum()))).indices.sort().values
    of_noise = noise_functionals(potential)

    def functionals(state: KernelState) -> dict[str, Tensor]:
        with torch.no_grad():
            sites = potential.packing.unravel(state.position)
            x, _, misfit = potential.observation.transport(potential.vaebm.vae, sites)
        stored = dict(of_noise(state))
        stored.pop("x", None)
        stored |= {"energy": state.potential - misfit, "misfit": misfit, "value": x.flatten(1)[:, followed]}
        return stored

    return functionals


def kernel_of(loaded: LoadedRun, name: KernelName | None) -> KernelConfig:
    """Choose the kernel of a posterior.

    Args:
        loaded: the fitted run.
        name: asked for by the user, if at all.

    Returns:
        The kernel asked for, with the run's options; else :data:`IMAGE_KERNEL` or :data:`POINT_KERNEL` with
        trajectories of their own length, for those of the run were chosen for another target.
    """
    kernel = loaded.config.sampling.kernel
    if name is not None:
        return kernel.of(name)
    default = IMAGE_KERNEL if len(loaded.data.event_shape) == 3 else POINT_KERNEL
    return replace(kernel.of(default), num_steps=None)


def open_run(path: str, stage: Stage) -> LoadedRun:
    """Load a run for conditioning; of stage svi, the VAE with an energy of zero.

    Args:
        path: the run's folder.
        stage: what to condition.

    Returns:
        The run.

    Raises:
        InputError: not a run, or the stage is missing.
    """
    if stage == "ebm":
        return load_run(path)
    fitted = open_fitted_vae(path)
    vaebm = VAEBM(fitted.vae, NoEnergy())
    return LoadedRun(fitted.run, fitted.config, fitted.data, vaebm, noise_potential(vaebm))


def sample_given(loaded: LoadedRun, options: GivenOptions, config: KernelConfig, *, num: int, seed: int) -> Written:
    """Condition on what the user observed, sample, and write the files.

    Args:
        loaded: the fitted run.
        options: what was observed, and the chains.
        config: kernel.
        num: draws of x to store.
        seed: of everything.

    Returns:
        The file of arrays, and as lines the table of the chains, whether they agree, and the files.

    Raises:
        InputError: an observation that does not fit; nothing was written.
    """
    given = read_given(options, loaded.data, loaded.config.data)
    potential = condition(loaded.vaebm, **given._asdict())
    posterior = sample_posterior(
        potential,
        config,
        num=num,
        num_chains=options.num_chains,
        num_warmup=options.num_warmup,
        num_draws=options.num_draws,
        seed=seed,
    )
    idata = to_inference_data(posterior.chains)
    summaries = diagnostics.summarize(idata)  # before anything is written, for it refuses too few draws
    path = _save(loaded.run, given, posterior)
    save_netcdf(idata, path.with_suffix(".nc"))
    lines = [diagnostics.summary_table(summaries, idata), "", verdict(posterior, summaries)]
    return Written([path], lines + [str(path.with_suffix(suffix)) for suffix in (".npz", ".png", ".nc")])


def verdict(posterior: Posterior, summaries: list[diagnostics.QuantitySummary]) -> str:
    """Say in one line whether the chains agree, over functionals and over all values of x."""
    worst, fewest = diagnostics.worst(summaries)
    moving = posterior.r_hat[posterior.sd > 0]
    highest = float(np.max(moving, initial=1.0)) if np.isfinite(moving).all() else float("nan")
    text = (
        f"R-hat: largest of functionals {diagnostics.r_hat_text(worst.r_hat)} ({worst.name}), of values of x "
        f"{diagnostics.r_hat_text(highest)}; smallest bulk ESS {fewest.ess_bulk:.0f} ({fewest.name})"
    )
    if worst.r_hat <= diagnostics.MAX_R_HAT and highest <= diagnostics.MAX_R_HAT:
        return text
    return f"{text}\nNOT CONVERGED: R-hat is above {diagnostics.MAX_R_HAT}; take more --num-draws or another --kernel"


def _save(run: Run, given: Given, posterior: Posterior) -> Path:
    mask = np.ones(posterior.mean.shape, dtype=bool) if given.mask is None else given.mask.numpy()
    arrays = {
        "x": posterior.x.numpy(),
        "mean": posterior.mean,
        "sd": posterior.sd,
        "r_hat": posterior.r_hat,
        "given": given.given.numpy(),
        "mask": mask,
    }
    return run.save_npz(NAME, **arrays)
