"""Sampling of the posterior of x given an observation: chains, summaries of every value of x, and files."""

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
from ppl_vaebm.runs.given import Given, GivenOptions, read_given
from ppl_vaebm.runs.loading import LoadedRun, Stage, load_run, open_fitted_vae
from ppl_vaebm.runs.run import Run

NAME = "conditional"
"""Name of the files in the samples folder."""
MAX_STORED_VALUES = 1 << 27
"""Values of x, 0.5 GB, that are kept for mean, standard deviation and R-hat; longer chains are thinned."""
NUM_FOLLOWED = 8
"""Values of x whose draws are stored, those that vary most among the starts."""
IMAGE_KERNEL: KernelName = "hmc"
"""On a digit given its upper half the worst bulk ESS per 1000 evaluations is 26 to 43 by HMC, 5 by MALA, 4 by pCN and 1
by elliptical slice sampling."""
POINT_KERNEL: KernelName = "mixture"
"""On 25 Gaussians given the first coordinate HMC stays in its first mode (R-hat 2.8 to 3.4); the cycle of independence
Metropolis and HMC has R-hat 1.04 and 1.06."""


@dataclass(frozen=True)
class Posterior:
    """Draws of x given an observation, and summaries of every value of x."""

    x: Tensor
    """``(num, *event)``, evenly spread over chains and draws."""
    mean: NDArray[np.float64]
    """Posterior mean, ``(*event)``; so are the next two."""
    sd: NDArray[np.float64]
    """Posterior standard deviation; 0 where a value was observed exactly."""
    r_hat: NDArray[np.float64]
    """Rank-normalised split R-hat; nan where the standard deviation is 0."""
    chains: Chains
    """The chains, with a few quantities of every draw."""


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
    """Sample a posterior given one observation from tempered starts; ``num`` draws of x are returned."""
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
        # By rounding, the standard deviation of values that never move would not be 0.
        sd=np.where((values == values[0, 0]).all((0, 1)), 0.0, values.std((0, 1), dtype=np.float64)).reshape(event),
        r_hat=diagnose_columns(values).r_hat.reshape(event),
        chains=replace(chains, attrs={**chains.attrs, "seed": seed, "start_levels": particles.num_levels}),
    )


def posterior_functionals(potential: ConditionalPotential, starts: Tensor) -> Functionals:
    """Make the quantities to store of a posterior's chains, which start at ``(C, D)``.

    They are those of ``noise_functionals``, but ``energy`` is E(x) alone, ``misfit`` is minus the log-likelihood of the
    observation, both ``(C,)``, nats, and ``value`` are the values of x that vary most among the starts, ``(C, V)``.
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
    """Return the named kernel with the run's options, else :data:`IMAGE_KERNEL` or :data:`POINT_KERNEL`.

    Those have trajectories of their default length, because the run's length was chosen for another target.
    """
    kernel = loaded.config.sampling.kernel
    if name is not None:
        return kernel.of(name)
    default = IMAGE_KERNEL if len(loaded.data.event_shape) == 3 else POINT_KERNEL
    return replace(kernel.of(default), num_steps=None)


def open_run(path: str, stage: Stage) -> LoadedRun:
    """Load a run for conditioning; with stage svi, the VAE with an energy of zero."""
    if stage == "ebm":
        return load_run(path)
    fitted = open_fitted_vae(path)
    vaebm = VAEBM(fitted.vae, NoEnergy())
    return LoadedRun(fitted.run, fitted.config, fitted.data, vaebm, noise_potential(vaebm))


def sample_given(loaded: LoadedRun, options: GivenOptions, config: KernelConfig, *, num: int, seed: int) -> Written:
    """Condition on the observation of the user, sample, write the files, and store ``num`` draws of x.

    The lines are the table of the chains, whether they agree, and the files.

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
    summaries = diagnostics.summarize(idata)  # before anything is written, because it refuses too few draws
    path = _save(loaded.run, given, posterior)
    save_netcdf(idata, path.with_suffix(".nc"))
    lines = [diagnostics.summary_table(summaries, idata), "", convergence_line(posterior, summaries)]
    return Written([path], lines + [str(path.with_suffix(suffix)) for suffix in (".npz", ".png", ".nc")])


def convergence_line(posterior: Posterior, summaries: list[diagnostics.QuantitySummary]) -> str:
    """Describe whether the chains agree, over quantities and over all values of x."""
    worst, fewest = diagnostics.worst(summaries)
    moving = posterior.r_hat[posterior.sd > 0]
    highest = float(np.max(moving, initial=1.0)) if np.isfinite(moving).all() else float("nan")
    text = (
        f"R-hat: largest of quantities {diagnostics.r_hat_text(worst.r_hat)} ({worst.name}), of values of x "
        f"{diagnostics.r_hat_text(highest)}; smallest bulk ESS {fewest.ess_bulk:.0f} ({fewest.name})"
    )
    if worst.r_hat <= diagnostics.MAX_R_HAT and highest <= diagnostics.MAX_R_HAT:
        return text
    return f"{text}\nNOT CONVERGED: R-hat is above {diagnostics.MAX_R_HAT}; take more --num-draws or another --kernel"


def _save(run: Run, given: Given, posterior: Posterior) -> Path:
    arrays = {
        "x": posterior.x.numpy(),
        "mean": posterior.mean,
        "sd": posterior.sd,
        "r_hat": posterior.r_hat,
        "given": given.given.numpy(),
        "mask": np.ones(posterior.mean.shape, dtype=bool) if given.mask is None else given.mask.numpy(),
    }
    return run.save_npz(NAME, **arrays)
