"""Pyro's own HMC and NUTS on this package's potentials, for comparison.

Pyro accepts or rejects all rows of a site together, so its chains run one after another. It samples named sites from
``U = Phi + |q|^2 / 2`` by leapfrog, with its own adaptation of step and mass.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pyro.infer import HMC, MCMC, NUTS
from torch import Tensor

from ppl_vaebm.inference.bridges.transitions import Limits, SamplerOptions, Transition, states, to_chains
from ppl_vaebm.inference.kernels.base import KernelParams, Potential
from ppl_vaebm.inference.kernels.chains import Chains, Functionals
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import global_rng, seed_for

PyroKernelName = Literal["pyro-hmc", "pyro-nuts"]

# Pyro's default, which is Stan's.
PYRO_TARGET_ACCEPTANCE = 0.8


def flat_packing(dim: int) -> Packing:
    """Make a packing with one site ``position`` of all columns, which is faster in Pyro than several sites."""
    return Packing({"position": torch.Size([dim])})


class SitePotential:
    """Pyro's ``potential_fn``: ``U = Phi + |q|^2 / 2`` of one chain as a function of named sites."""

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential = potential
        self.packing = packing
        self.num_evals = 0
        """Evaluations so far."""

    def position(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Pack the sites of one chain, each of its event shape, into ``(1, D)``."""
        return self.packing.ravel({name: site.unsqueeze(0) for name, site in sites.items()})

    def __call__(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Evaluate U, ``()``, nats."""
        self.num_evals += 1
        with torch.enable_grad():
            position = self.position(sites)
            return (self.potential(position) + 0.5 * position.square().sum(-1)).squeeze(0)


class _BudgetSpent(Exception):
    """One chain has used up its evaluations and its time."""


class _Recorder:
    """Records the transitions of a kernel of Pyro (which has no types); :meth:`hook` goes to ``pyro.infer.MCMC``."""

    def __init__(self, kernel: Any, potential: SitePotential, limits: Limits) -> None:
        self.potential = potential
        self.max_evals = math.inf if limits.max_evals is None else limits.max_evals
        self.min_seconds = limits.min_seconds
        self.draws: list[Transition] = []
        self.end_times: list[float] = []
        self.draws_evals = 0
        self._sum_acceptance = 0.0
        self._kernel = kernel
        self._draw_momentum = kernel._sample_r
        # Pyro does not return the Hamiltonian at the start of a transition; both of its parts are known here.
        kernel._sample_r = self._recorded_momentum

    def _recorded_momentum(self, name: str) -> tuple[dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
        if not self.draws:
            self.start_time = time.perf_counter()
        self._start_evals = self.potential.num_evals
        potential_energy = float(self._kernel._potential_energy_last)
        if not math.isfinite(potential_energy):
            raise ValueError(f"expected a finite U where a chain starts, found {potential_energy}: start elsewhere")
        momentum, whitened = self._draw_momentum(name)
        kinetic = 0.5 * sum(float(part.double().square().sum()) for part in whitened.values())
        self._energy = potential_energy + kinetic
        return momentum, whitened

    def hook(self, kernel: Any, sites: Mapping[str, Tensor], stage: str, index: int) -> None:
        """Record a draw, and stop the chain once it has spent its evaluations and its time."""
        if stage != "Sample":
            return
        # Pyro keeps only the running mean of the acceptance probabilities.
        sum_acceptance = kernel._mean_accept_prob * (index + 1)
        num_evals = self.potential.num_evals - self._start_evals
        self.draws.append(
            Transition(
                position=self.potential.position(sites).squeeze(0),
                potential_energy=float(kernel._potential_energy_last),
                acceptance_rate=min(1.0, max(0.0, sum_acceptance - self._sum_acceptance)),
                is_divergent=kernel._divergences[-1:] == [index],
                energy=self._energy,
                num_evals=num_evals,
            )
        )
        self.end_times.append(time.perf_counter())
        self._sum_acceptance = sum_acceptance
        self.draws_evals += num_evals
        seconds = self.end_times[-1] - self.start_time
        if self.draws_evals >= self.max_evals and seconds >= self.min_seconds:
            raise _BudgetSpent


class _Chain(NamedTuple):
    """Draws of one chain, and the parameters that its warm-up adapted."""

    draws: list[Transition]
    elapsed: list[float]
    """Seconds from the start of the draws to the end of each."""
    warmup_evals: int
    warmup_seconds: float
    step_size: float
    inverse_mass: Tensor
    """``(D,)``."""


def run_pyro(
    kernel: PyroKernelName,
    potential: Potential,
    packing: Packing | None,
    position: Tensor,
    options: SamplerOptions,
    limits: Limits,
    *,
    seed: int,
    functionals: Functionals,
) -> Chains:
    """Sample with Pyro's HMC or NUTS, one chain after another, each from its own stream of random numbers.

    Args:
        potential: Phi, relative to N(0, I).
        packing: the named sites that Pyro samples; ``None`` for one flat site.
        position: starts, ``(C, D)``.
        limits: a chain stops when its own evaluations reach ``max_evals`` and it has used its fraction ``1 / C`` of
            ``min_seconds``; all chains are cut to the shortest.
        functionals: as in :func:`~ppl_vaebm.inference.kernels.chains.run_chains`.

    Returns:
        The chains. Every chain adapts alone: in ``params`` the step size is ``(C,)`` and the inverse mass ``(C, D)``.
        ``warmup_evals`` includes the evaluation at the start and those of Pyro's search for a step; ``elapsed`` is
        summed over the chains.

    Raises:
        ValueError: an unknown kernel, or a start where U is not finite.
    """
    if kernel not in get_args(PyroKernelName):
        raise ValueError(f"expected one of the kernels {', '.join(get_args(PyroKernelName))}, found {kernel!r}")
    is_adapted = options.num_warmup > 0
    shared: dict[str, Any] = {
        "step_size": options.step_size,
        "target_accept_prob": options.target_acceptance or PYRO_TARGET_ACCEPTANCE,
        "adapt_step_size": is_adapted,
        "adapt_mass_matrix": is_adapted,
    }
    packing = packing or flat_packing(position.shape[1])
    limits = limits._replace(min_seconds=limits.min_seconds / len(position))
    chains = []
    for index, row in enumerate(position.detach().split(1)):
        site_potential = SitePotential(potential, packing)
        with global_rng(seed_for(seed, "pyro", index)):
            pyro_kernel = (
                HMC(potential_fn=site_potential, trajectory_length=options.trajectory_length, **shared)
                if kernel == "pyro-hmc"
                else NUTS(potential_fn=site_potential, max_tree_depth=options.max_tree_depth, **shared)
            )
            chains.append(_run_chain(pyro_kernel, site_potential, row, options.num_warmup, limits))
    params = KernelParams(
        position.new_tensor([chain.step_size for chain in chains]),
        torch.stack([chain.inverse_mass for chain in chains]),
        position.new_tensor(options.trajectory_length),
    )
    return _collect(kernel, chains, params, functionals, seed)


def _run_chain(kernel: HMC, potential: SitePotential, start: Tensor, num_warmup: int, limits: Limits) -> _Chain:
    sites = {name: site.squeeze(0).clone() for name, site in potential.packing.unravel(start).items()}
    recorder = _Recorder(kernel, potential, limits)
    mcmc = MCMC(kernel, limits.num_draws, num_warmup, initial_params=sites, hook_fn=recorder.hook, disable_progbar=True)
    began = time.perf_counter()
    with contextlib.suppress(_BudgetSpent):
        mcmc.run()
    return _Chain(
        draws=recorder.draws,
        elapsed=[end_time - recorder.start_time for end_time in recorder.end_times],
        warmup_evals=potential.num_evals - recorder.draws_evals,
        warmup_seconds=recorder.start_time - began,
        step_size=kernel.step_size,
        inverse_mass=_inverse_mass(kernel, potential.packing),
    )


def _inverse_mass(kernel: HMC, packing: Packing) -> Tensor:
    """Reorder Pyro's diagonal, which follows the alphabetical order of the sites, by columns."""
    ((names, diagonal),) = kernel.inverse_mass_matrix.items()
    parts = diagonal.split([packing.sizes[name] for name in names])
    by_name = dict(zip(names, parts, strict=True))
    return torch.cat([by_name[name] for name in packing.shapes])


def _collect(kernel: str, chains: list[_Chain], params: KernelParams, functionals: Functionals, seed: int) -> Chains:
    num_draws = min(len(chain.draws) for chain in chains)
    like = chains[0].draws[0].position
    # Each field by chain and draw: tensors for the positions, numbers for the others.
    positions, *numbers = zip(*(zip(*chain.draws[:num_draws], strict=True) for chain in chains), strict=True)
    position = torch.stack([torch.stack(rows) for rows in positions], dim=1).cpu().numpy()
    draws = Transition(position, *(np.array(rows).T for rows in numbers))
    return to_chains(
        kernel,
        draws,
        [functionals(state) for state in states(draws, like)],
        np.sum([chain.elapsed[:num_draws] for chain in chains], axis=0),
        params,
        like,
        warmup_seconds=sum(chain.warmup_seconds for chain in chains),
        warmup_evals=sum(chain.warmup_evals for chain in chains),
        attrs={"thin": 1, "seed": seed},
    )
