"""Pyro's own HMC and NUTS on our potentials, as a yardstick.

Pyro accepts or rejects whatever it is given all together, so its chains run one after another. It sees
named sites and the whole ``U = Phi + |q|^2 / 2``: leapfrog, with Pyro's own adaptation of step and mass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from pyro.infer import HMC, MCMC, NUTS
from torch import Tensor

from ppl_vaebm.inference.kernels.base import KernelParams, KernelState, Potential
from ppl_vaebm.inference.kernels.chains import Chains, Functionals
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import global_rng, seed_for

PyroKernelName = Literal["pyro-hmc", "pyro-nuts"]

# Pyro's defaults, which are Stan's.
TARGET_ACCEPTANCE = 0.8
MAX_TREE_DEPTH = 10


def flat_packing(dim: int) -> Packing:
    """Make one site ``position`` of all columns: names cost Pyro time, and not everybody needs them."""
    return Packing({"position": torch.Size([dim])})


class SitePotential:
    """``U = Phi + |q|^2 / 2`` of one chain as a function of named sites, and a count of its evaluations.

    It is what Pyro calls a ``potential_fn``, of the form that ``pyro.infer.mcmc.util.initialize_model`` gives.

    Args:
        potential: Phi.
        packing: from the sites to the columns of a position.
    """

    def __init__(self, potential: Potential, packing: Packing) -> None:
        self.potential = potential
        self.packing = packing
        self.num_evals = 0

    def position(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Lay the sites of one chain, each of its event shape, out as ``(1, D)``."""
        return self.packing.ravel({name: site.unsqueeze(0) for name, site in sites.items()})

    def __call__(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Evaluate U, ``()``, nats."""
        self.num_evals += 1
        with torch.enable_grad():
            position = self.position(sites)
            return (self.potential(position) + 0.5 * position.square().sum(-1)).squeeze(0)


class _Draw(NamedTuple):
    """One transition of one chain."""

    position: Tensor
    """``(D,)``."""
    potential_energy: float
    """U there."""
    acceptance_rate: float
    is_divergent: bool
    energy: float
    num_evals: int
    end_time: float


class _Budget(NamedTuple):
    """What one chain may spend on its draws."""

    max_evals: float
    """Evaluations after which it stops,"""
    min_seconds: float
    """but not before so much time."""


class _BudgetSpent(Exception):
    """The budget of one chain is used up."""


class _Recorder:
    """Watches one of Pyro's kernels, which carry no types; its :meth:`hook` goes to ``pyro.infer.MCMC``."""

    def __init__(self, kernel: Any, potential: SitePotential, budget: _Budget) -> None:
        self.potential = potential
        self.budget = budget
        self.draws: list[_Draw] = []
        self.draws_evals = 0
        self._sum_acceptance = 0.0
        self._kernel = kernel
        self._draw_momentum = kernel._sample_r
        # Pyro tells nobody the Hamiltonian that a transition starts from; here is where its parts meet.
        kernel._sample_r = self._watched_momentum

    def _watched_momentum(self, name: str) -> tuple[dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
        if not self.draws:
            self.start_time = time.perf_counter()
        self._start_evals = self.potential.num_evals
        potential_energy = float(self._kernel._potential_energy_last)
        if not math.isfinite(potential_energy):
            raise ValueError(f"U must be finite where a chain starts, got {potential_energy}: start elsewhere")
        momentum, whitened = self._draw_momentum(name)
        kinetic = 0.5 * sum(float(part.double().square().sum()) for part in whitened.values())
        self._energy = potential_energy + kinetic
        return momentum, whitened

    def hook(self, kernel: Any, sites: Mapping[str, Tensor], stage: str, index: int) -> None:
        """Record a draw, and stop once the budget is spent."""
        if stage != "Sample":
            return
        # Pyro keeps the running mean of the acceptance probabilities only.
        sum_acceptance = kernel._mean_accept_prob * (index + 1)
        num_evals = self.potential.num_evals - self._start_evals
        self.draws.append(
            _Draw(
                position=self.potential.position(sites).squeeze(0),
                potential_energy=float(kernel._potential_energy_last),
                acceptance_rate=min(1.0, max(0.0, sum_acceptance - self._sum_acceptance)),
                is_divergent=kernel._divergences[-1:] == [index],
                energy=self._energy,
                num_evals=num_evals,
                end_time=time.perf_counter(),
            )
        )
        self._sum_acceptance = sum_acceptance
        self.draws_evals += num_evals
        seconds = self.draws[-1].end_time - self.start_time
        if self.draws_evals >= self.budget.max_evals and seconds >= self.budget.min_seconds:
            raise _BudgetSpent


class _Chain(NamedTuple):
    """One chain and the parameters that its warm-up left."""

    draws: list[_Draw]
    start_time: float
    """When the draws began."""
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
    *,
    seed: int,
    num_draws: int,
    num_warmup: int,
    step_size: float,
    trajectory_length: float,
    target_acceptance: float = TARGET_ACCEPTANCE,
    max_tree_depth: int = MAX_TREE_DEPTH,
    functionals: Functionals,
    max_evals: int | None = None,
    min_seconds: float = 0.0,
) -> Chains:
    """Sample with Pyro's HMC or NUTS, chain after chain, each from its own stream of random numbers.

    Args:
        kernel: ``pyro-hmc`` or ``pyro-nuts``.
        potential: Phi, relative to N(0, I).
        packing: the named sites that Pyro sees; ``None`` for one flat site.
        position: starts, ``(C, D)``.
        seed: the run's seed.
        num_draws: draws per chain, at least 1; with ``max_evals``, the most of them.
        num_warmup: steps per chain in which Pyro adapts step size and diagonal mass; 0 keeps ``step_size``
            and unit mass.
        step_size: leapfrog step, or where its adaptation starts.
        trajectory_length: of HMC; Pyro takes ``int(trajectory_length / step_size)`` steps, at least one.
        target_acceptance: what the adaptation aims at.
        max_tree_depth: bound on NUTS's doublings.
        functionals: what to store of each draw; it sees all chains at once, without gradients.
        max_evals: a chain stops after the draw with which its evaluations reach this number, warm-up not
            counted, and all chains are cut to the shortest.
        min_seconds: draws go on beyond ``max_evals`` until so much time has passed, of which every chain has an equal
            share; ``num_draws`` bounds both.

    Returns:
        The chains. In ``params`` the step size is ``(C,)`` and the inverse mass ``(C, D)``, for every chain
        adapts alone; ``warmup_evals`` includes the evaluation at the start and those of Pyro's search for a step;
        ``elapsed`` is the sum over chains of the time that their first draws took.

    Raises:
        ValueError: an unknown kernel, or a start where U is not finite.
    """
    if kernel not in get_args(PyroKernelName):
        raise ValueError(f"kernel must be one of {', '.join(get_args(PyroKernelName))}, got {kernel!r}")
    options: dict[str, Any] = {
        "step_size": step_size,
        "target_accept_prob": target_acceptance,
        "adapt_step_size": num_warmup > 0,
        "adapt_mass_matrix": num_warmup > 0,
    }
    packing = packing or flat_packing(position.shape[1])
    budget = _Budget(math.inf if max_evals is None else max_evals, min_seconds / len(position))
    chains = []
    for index, row in enumerate(position.detach().split(1)):
        site_potential = SitePotential(potential, packing)
        with global_rng(seed_for(seed, "pyro", index)):
            pyro_kernel = (
                HMC(potential_fn=site_potential, trajectory_length=trajectory_length, **options)
                if kernel == "pyro-hmc"
                else NUTS(potential_fn=site_potential, max_tree_depth=max_tree_depth, **options)
            )
            chains.append(_run_chain(pyro_kernel, site_potential, row, num_draws, num_warmup, budget))
    params = KernelParams(
        position.new_tensor([chain.step_size for chain in chains]),
        torch.stack([chain.inverse_mass for chain in chains]),
        position.new_tensor(trajectory_length),
    )
    return _collect(kernel, chains, params, functionals, seed)


def _run_chain(
    kernel: HMC, potential: SitePotential, start: Tensor, num_draws: int, num_warmup: int, budget: _Budget
) -> _Chain:
    sites = {name: site.squeeze(0).clone() for name, site in potential.packing.unravel(start).items()}
    recorder = _Recorder(kernel, potential, budget)
    mcmc = MCMC(kernel, num_draws, num_warmup, initial_params=sites, hook_fn=recorder.hook, disable_progbar=True)
    began = time.perf_counter()
    try:
        mcmc.run()
    except _BudgetSpent:
        pass
    return _Chain(
        draws=recorder.draws,
        start_time=recorder.start_time,
        warmup_evals=potential.num_evals - recorder.draws_evals,
        warmup_seconds=recorder.start_time - began,
        step_size=kernel.step_size,
        inverse_mass=_inverse_mass(kernel, potential.packing),
    )


def _inverse_mass(kernel: HMC, packing: Packing) -> Tensor:
    """Put Pyro's diagonal, which is in alphabetical order of the sites, into the order of the columns."""
    ((names, diagonal),) = kernel.inverse_mass_matrix.items()
    parts = diagonal.split([packing.sizes[name] for name in names])
    by_name = dict(zip(names, parts, strict=True))
    return torch.cat([by_name[name] for name in packing.shapes])


def _collect(kernel: str, chains: list[_Chain], params: KernelParams, functionals: Functionals, seed: int) -> Chains:
    num_draws = min(len(chain.draws) for chain in chains)
    draws = [chain.draws[:num_draws] for chain in chains]
    positions = torch.stack([torch.stack([draw.position for draw in row]) for row in draws])

    def column(field: str, dtype: torch.dtype) -> Tensor:
        values = [[getattr(draw, field) for draw in row] for row in draws]
        return torch.tensor(values, dtype=dtype, device=positions.device)

    energies = column("potential_energy", torch.float64)
    phi = (energies - 0.5 * positions.double().square().sum(-1)).to(positions.dtype)
    elapsed = torch.tensor(
        [[draw.end_time - chain.start_time for draw in row] for chain, row in zip(chains, draws, strict=True)],
        dtype=torch.float64,
    ).sum(0)
    states = [KernelState(positions[:, n], phi[:, n], None) for n in range(num_draws)]
    rows = [functionals(state) for state in states]
    return Chains(
        kernel=kernel,
        draws={name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]},
        stats={
            "lp": -energies,
            "acceptance_rate": column("acceptance_rate", torch.float64),
            "diverging": column("is_divergent", torch.bool),
            "energy": column("energy", torch.float64),
            "n_steps": column("num_evals", torch.int64),
        },
        position=positions[:, -1],
        params=params,
        seconds=float(elapsed[-1]),
        elapsed=elapsed,
        warmup_seconds=sum(chain.warmup_seconds for chain in chains),
        warmup_evals=sum(chain.warmup_evals for chain in chains),
        attrs={"thin": 1, "seed": seed},
    )
