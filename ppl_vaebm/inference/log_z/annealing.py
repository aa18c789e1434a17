"""The path from N(0, I) to the target: ``exp(-b Phi(q)) N(q; 0, I)`` for b from 0 to 1, and moves at one b.

Kernels are built for ``b * Phi``. Between moves the states hold Phi and its gradient themselves, so that a change of b
costs no evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels import gradient_free, hmc
from ppl_vaebm.inference.kernels.adaptation import MAX_STEP_SIZE, warm_up
from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelState, Ladder, Potential, init_params, select
from ppl_vaebm.inference.kernels.cycle import build_mixture
from ppl_vaebm.inference.log_z.base import weights_ess

BuildKernel = Callable[[Potential], Kernel]
"""Makes the kernel of one temperature from its ``b * Phi``; one that leaves its target invariant, so not langevin."""

NUM_STEPS = 3
"""Integration steps of the default kernel's trajectories. Chosen by us: with HMC alone, at 600 evaluations on 25
Gaussians, the mean log weight was 1.3, 0.18 and 0.21 nats below log Z with 1, 3 and 5 of them."""


def default_kernel(potential: Potential) -> Kernel:
    """Make a cycle of independence Metropolis and HMC by splitting.

    The first crosses between modes as long as N(0, I) still reaches them, the second moves on within one. At 300
    evaluations the mean log weight fell short of log Z by 0.04 nats on 25 Gaussians where HMC alone fell short by 0.19;
    on digits the two did not differ beyond their errors (``benchmarks/log_z.py``).
    """
    members = [gradient_free.build_independence(potential), hmc.build(potential, num_steps=NUM_STEPS)]
    return build_mixture(members)


def kernel_at(potential: Potential, inverse_temperature: float, build: BuildKernel) -> Kernel:
    """Make the kernel of one temperature.

    Args:
        potential: Phi.
        inverse_temperature: b, in (0, 1].
        build: makes kernels.

    Returns:
        A kernel for ``b * Phi``; its states are those of :func:`tempered`.
    """
    return build(lambda position: inverse_temperature * potential(position))


def tempered(state: KernelState, inverse_temperature: float) -> KernelState:
    """Turn a state of Phi into the one of ``b * Phi``."""
    grad = None if state.grad is None else inverse_temperature * state.grad
    return KernelState(state.position, inverse_temperature * state.potential, grad)


def untempered(state: KernelState, inverse_temperature: float) -> KernelState:
    """Turn a state of ``b * Phi`` into the one of Phi; b is positive."""
    return tempered(state, 1 / inverse_temperature)


def move(
    potential: Potential,
    build: BuildKernel,
    generator: torch.Generator,
    state: KernelState,
    inverse_temperature: float,
    step_size: float,
) -> tuple[KernelState, KernelInfo]:
    """Move every particle once at one temperature.

    Args:
        potential: Phi.
        build: makes the kernel.
        generator: source of the randomness.
        state: of Phi.
        inverse_temperature: b, in (0, 1].
        step_size: angle of the move.

    Returns:
        The new state, of Phi; and what the kernel says of its step.
    """
    kernel = kernel_at(potential, inverse_temperature, build)
    params = init_params(state.position, step_size)
    new, info = kernel.step(generator, tempered(state, inverse_temperature), params)
    # A particle that stayed keeps its numbers: scaled there and back they would be rounded anew at every temperature.
    return select(info.is_accepted, untempered(new, inverse_temperature), state), info


def check_ladder(ladder: Ladder) -> None:
    """Refuse a ladder that does not lead from N(0, I) to the target.

    Raises:
        InputError: saying what is wrong with it.
    """
    levels, steps = ladder
    listed = ", ".join(f"{level:g}" for level in levels.tolist()[:8]) + (", ..." if len(levels) > 8 else "")
    if len(levels) < 2 or float(levels[0]) != 0 or float(levels[-1]) != 1 or not bool((levels.diff() > 0).all()):
        raise InputError(f"expected inverse temperatures that increase from 0 to 1, found {listed}: give such a ladder")
    if steps.shape != levels.shape or not bool((steps > 0).all()):
        raise InputError(
            f"expected a positive step size for each of {len(levels)} inverse temperatures, found "
            f"{int((steps > 0).sum())} positive ones of {len(steps)}: give one for each"
        )


def check_particles(position: Tensor) -> None:
    """Refuse too few particles.

    Raises:
        InputError: fewer than two.
    """
    if position.dim() != 2 or len(position) < 2:
        found = len(position) if position.dim() == 2 else f"a tensor of shape {tuple(position.shape)}"
        raise InputError(
            f"expected positions of at least 2 particles for an error to be known, found {found}: give more particles"
        )


def resample(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Choose particles in proportion to their weights by systematic resampling (Carpenter, Clifford, Fearnhead 1999).

    Args:
        log_weights: ``(N,)``, nats, finite or minus infinity.
        generator: source of one uniform.

    Returns:
        Indices ``(N,)``; particle i occurs ``floor(N W_i)`` times or once more.
    """
    n = len(log_weights)
    shares = log_weights.double().softmax(0).cumsum(0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device=log_weights.device)
    points = (torch.arange(n, dtype=torch.float64, device=log_weights.device) + uniform) / n
    # The last share may be 1 - 1e-16, and a point behind it would have no particle.
    return torch.searchsorted(shares / shares[-1], points, right=True).clamp(max=n - 1)


def take(state: KernelState, index: Tensor) -> KernelState:
    """Return the particles with these indices."""
    grad = None if state.grad is None else state.grad[index]
    return KernelState(state.position[index], state.potential[index], grad)


START_STEP_SIZE = 0.5
"""Where the first level's tuning begins; every other level's begins where the one before ended."""
EVEN_SHARE = 1e-3
"""Share of evenly spaced b that is mixed into the spacing by barrier, so that b increases where Phi does not vary.
Chosen by us."""


class Pilot(NamedTuple):
    """What a pilot run found. Levels are those where it stopped, ``b_0 = 0`` to ``b_J = 1``."""

    inverse_temperatures: Tensor
    """``(J + 1,)``, float64."""
    step_sizes: Tensor
    """Tuned angle at each, ``(J + 1,)``; at 0 any step is exact, and it is a quarter turn."""
    energy_sd: Tensor
    """Standard deviation of Phi at each, ``(J + 1,)``, nats."""
    num_evals: int
    """Evaluations of Phi, over all particles."""

    @property
    def barrier(self) -> float:
        """The integral of the standard deviation of Phi over b, nats: the length of the path.

        With K temperatures spaced evenly in it, and moves that forget where they came from, log weights have variance
        ``barrier^2 / K``, and so the gap between the two bounds is that.
        """
        return float(_cumulative(self)[-1])


def run_pilot(
    potential: Potential,
    generator: torch.Generator,
    position: Tensor,
    *,
    build: BuildKernel = default_kernel,
    target_ess: float = 0.9,
    num_moves: int = 15,
    max_levels: int = 1_000,
) -> Pilot:
    """Send particles down the path by an adaptive sequential sampler (Del Moral, Doucet and Jasra 2012).

    From level to level b rises until the weights of the step have ``target_ess`` of the particles as effective size
    (they are equal before it, so that is the conditional effective size of Zhou, Johansen and Aston 2016). Then the
    particles are resampled, and move while the step size is tuned.

    Args:
        potential: Phi.
        generator: source of the randomness.
        position: draws of N(0, I), ``(P, D)``.
        build: makes the kernels.
        target_ess: effective share of the particles after each rise of b, in (0, 1).
        num_moves: moves with tuning at every level.
        max_levels: levels after which to give up.

    Returns:
        What it found.

    Raises:
        InputError: fewer than two particles, a particle without a finite Phi, or a path that is too long.
    """
    check_particles(position)
    state = kernel_at(potential, 1.0, build).init(position)
    num_evals, step_size, level = len(position), START_STEP_SIZE, 0.0
    levels, steps, deviations = [level], [MAX_STEP_SIZE], [_sd(state)]
    while level < 1:
        if len(levels) > max_levels:
            raise InputError(
                f"expected the path to the target to take at most {max_levels} levels of the pilot, found b = "
                f"{level:.3g} there: the energy varies too much for annealing, so regularise it or allow more levels"
            )
        level = _next_level(state.potential.double(), level, target_ess)
        index = resample(-(level - levels[-1]) * state.potential.double(), generator)
        kernel = kernel_at(potential, level, build)
        params = init_params(position, step_size)
        moved, params, evals = warm_up(kernel, generator, tempered(take(state, index), level), params, num_moves)
        state, step_size, num_evals = untempered(moved, level), float(params.step_size), num_evals + evals
        levels.append(level)
        steps.append(step_size)
        deviations.append(_sd(state))
    found = torch.tensor([levels, steps, deviations], dtype=torch.float64)
    return Pilot(found[0], found[1], found[2], num_evals)


def _sd(state: KernelState) -> float:
    num_bad = int((~state.potential.isfinite()).sum())
    if num_bad:
        raise InputError(
            f"expected a finite energy of every pilot particle, found {num_bad} of {len(state.potential)} without: "
            "the energy network or the decoder overflows on draws of the VAE, so fit again with regularisation"
        )
    return float(state.potential.double().std())


def _next_level(energy: Tensor, level: float, target_ess: float) -> float:
    """Find the largest b in (level, 1] whose step leaves at least the target effective size, by bisection."""

    def share(rise: float) -> float:
        return weights_ess(-rise * energy) / len(energy)

    if share(1 - level) >= target_ess:
        return 1.0
    low, high = 0.0, 1 - level
    for _ in range(60):  # to the last bit of a float
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= target_ess else (low, middle)
    return level + high


def _cumulative(pilot: Pilot) -> Tensor:
    """Integrate the standard deviation of Phi from 0 to every level by trapezoids, ``(J + 1,)``."""
    pieces = 0.5 * (pilot.energy_sd[1:] + pilot.energy_sd[:-1]) * pilot.inverse_temperatures.diff()
    return torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])


def spaced_ladder(pilot: Pilot, num_temperatures: int) -> Ladder:
    """Space temperatures evenly in the barrier (Syed, Bouchard-Cote, Deligiannidis and Doucet 2021).

    Args:
        pilot: what a pilot run found.
        num_temperatures: K, steps from b = 0 to b = 1.

    Returns:
        The ladder, K + 1 levels; step sizes are interpolated in log scale between the pilot's.

    Raises:
        InputError: fewer than one step.
    """
    if num_temperatures < 1:
        raise InputError(f"expected at least 1 temperature, found {num_temperatures}: give a larger number")
    cumulative = _cumulative(pilot)
    even = EVEN_SHARE * float(cumulative[-1]) or 1.0
    distance = (cumulative + even * pilot.inverse_temperatures).numpy()
    places = np.linspace(0, distance[-1], num_temperatures + 1)
    levels = np.interp(places, distance, pilot.inverse_temperatures.numpy())
    levels[0], levels[-1] = 0.0, 1.0
    steps = np.exp(np.interp(places, distance, pilot.step_sizes.log().numpy()))
    return Ladder(torch.from_numpy(levels), torch.from_numpy(steps))


def num_temperatures_for(pilot: Pilot, gap_nats: float, least: int, most: int) -> int:
    """Choose how many temperatures would leave a given gap between the bounds, were moves to forget their start.

    Args:
        pilot: what a pilot run found.
        gap_nats: the gap, positive.
        least: fewest temperatures.
        most: most of them.

    Returns:
        ``barrier^2 / gap`` between these.
    """
    return max(least, min(most, math.ceil(pilot.barrier**2 / gap_nats)))
