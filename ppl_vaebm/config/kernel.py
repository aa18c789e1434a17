"""Options of the Markov kernels on noise space, and of the chains that sample the fitted model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Annotated, Literal, get_args

from ppl_vaebm.config.options import (
    BELOW_ONE,
    INSIDE_ONE,
    POSITIVE,
    Alias,
    Check,
    Checked,
    NonNegative,
    OnlyFor,
    Positive,
    at_least,
    hints_of,
    require,
    split_names,
)
from ppl_vaebm.errors import InputError

KernelName = Literal["langevin", "mala", "hmc", "chees", "pcn", "independence", "elliptical", "mixture", "tempered"]
TUNABLE_KERNELS = ("mala", "hmc", "chees", "pcn", "tempered")
"""Kernels whose step size warm-up tunes."""
SELF_TUNING_KERNELS = ("chees", "tempered")
"""Kernels whose own warm-up tunes more than the step size; they cannot be members of a mixture."""
CYCLED_KERNELS = tuple(name for name in TUNABLE_KERNELS if name not in SELF_TUNING_KERNELS)
"""Kernels with a step size that a mixture's warm-up tunes."""
LEAPFROG_HMC = "hmc-leapfrog"
"""Our HMC with the leapfrog integrator; ``hmc`` has the integrator of the configuration."""
PYRO_KERNELS = ("pyro-hmc", "pyro-nuts")
NUMPYRO_KERNELS = ("numpyro-hmc", "numpyro-nuts")
BLACKJAX_KERNELS = ("blackjax-nuts", "blackjax-chees", "blackjax-mclmc", "blackjax-adjusted-mclmc")
COMPARABLE_KERNELS = (*get_args(KernelName), LEAPFROG_HMC, *PYRO_KERNELS, *NUMPYRO_KERNELS, *BLACKJAX_KERNELS)
"""Kernels that `diagnose` and `compare` run."""
PACKAGES = {name: ("jax", name.partition("-")[0]) for name in (*NUMPYRO_KERNELS, *BLACKJAX_KERNELS)}
"""Packages that kernels need beyond those of every installation."""
ANGLE = Check("an angle in (0, pi/2]", lambda value: 0 < value <= math.pi / 2)


def missing_packages(name: str) -> list[str]:
    """List the packages that a kernel needs and that are not installed."""
    return [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]


def kernel_names(text: str) -> tuple[str, ...]:
    """Split names of kernels between commas.

    Raises:
        InputError: an unknown or repeated name, or a kernel whose packages are not installed.
    """
    names = split_names(text, COMPARABLE_KERNELS, "kernel")
    for name in names:
        missing = missing_packages(name)
        if missing:
            raise InputError(
                f"kernel {name} needs {' and '.join(PACKAGES[name])}, found no {' and no '.join(missing)}; "
                "install them with pip install -e '.[jax]', or leave that kernel out"
            )
    return names


@dataclass(frozen=True)
class KernelConfig(Checked):
    """Markov kernel of the chains that `sample`, `evaluate`, `diagnose` and `compare` run."""

    prefix = "kernel."
    name: KernelName = "mixture"
    """Kernel; mixture applies the kernels of `members` in turn."""
    step_size: Annotated[float | None, ANGLE, OnlyFor(("langevin", *TUNABLE_KERNELS))] = None
    """Step size h, an angle; the Langevin step size eta of the VAEBM paper is h squared. Warm-up tunes it, except for
    langevin."""
    integrator: Annotated[Literal["splitting", "leapfrog"], OnlyFor(("mala", "hmc", "chees"))] = "splitting"
    """splitting: solve the part of N(0, I) exactly; leapfrog: integrate the whole potential."""
    num_steps: Annotated[int | None, POSITIVE, OnlyFor(("hmc", "tempered"))] = None
    """Integration steps of a trajectory (hmc, default trajectory-length / step-size) or of a move at each temperature
    (tempered, default 1)."""
    max_num_steps: Annotated[int | None, POSITIVE, OnlyFor(("hmc", "chees"))] = None
    """Largest number of integration steps of a trajectory; the default is 16 for hmc and 1000 for chees."""
    trajectory_length: Annotated[float, POSITIVE, OnlyFor(("hmc", "chees"))] = math.pi / 2
    """Angle of a trajectory; a quarter turn forgets the start where E = 0. chees: initial value of the longest
    trajectory, which warm-up tunes; each trajectory has a uniform fraction of it."""
    num_levels: Annotated[int, at_least(2), OnlyFor(("tempered",))] = 6
    """Temperatures from N(0, I) to the target, both included; best is about twice the reported communication barrier,
    plus one."""
    jitter: Annotated[float, BELOW_ONE, OnlyFor(("hmc",))] = 0.2
    """Relative spread of the trajectory's angle, drawn for each step; 0 makes all trajectories equal."""
    target_acceptance: Annotated[float | None, INSIDE_ONE, OnlyFor(TUNABLE_KERNELS)] = None
    """Acceptance probability that warm-up tunes the step size to; the default is the kernel's own."""
    members: Annotated[tuple[KernelName, ...], OnlyFor(("mixture",))] = ("independence", "hmc")
    """Kernels of one cycle; at most one with a step size to tune, and neither chees nor tempered."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        require(bool(self.members), "kernel.members", "at least one kernel", self.members)
        refused = {"langevin", "mixture", *SELF_TUNING_KERNELS} & set(self.members)
        expected = f"adjusted kernels, not langevin, {', '.join(SELF_TUNING_KERNELS)} or another mixture"
        require(not refused, "kernel.members", expected, self.members)
        expected = f"a cycle with at most one kernel that has a step to tune ({', '.join(CYCLED_KERNELS)})"
        require(sum(name in CYCLED_KERNELS for name in self.members) <= 1, "kernel.members", expected, self.members)

    def ignored(self) -> list[str]:
        """Return the options that the kernel, or a mixture's members, do not have, as field names."""
        kernels = {self.name, *(self.members if self.name == "mixture" else ())}
        marked = [(name, mark) for name, (_, marks) in hints_of(KernelConfig).items() for mark in marks]
        return [name for name, mark in marked if isinstance(mark, OnlyFor) and kernels.isdisjoint(mark.kernels)]

    def useless(self) -> list[str]:
        """Return the ignored options that have another value than the default, as flags."""
        names = [name for name in self.ignored() if getattr(self, name) != getattr(KernelConfig, name)]
        return [self.prefix + name.replace("_", "-") for name in names]

    def of(self, name: KernelName) -> KernelConfig:
        """Return the options for another kernel.

        The step size and the target acceptance are left open, because they were chosen for this kernel; so is the
        number of steps between tempered and any other, because a step of tempered costs one at every temperature.
        """
        if name == self.name:
            return self
        num_steps = None if "tempered" in (name, self.name) else self.num_steps
        return replace(self, name=name, step_size=None, target_acceptance=None, num_steps=num_steps)


@dataclass(frozen=True)
class TrainingKernelConfig(KernelConfig):
    """Markov kernel of the chains that give stage ebm its negatives."""

    name: Annotated[KernelName, Alias("--kernel")] = "mixture"
    """Kernel; mixture applies the kernels of `members` in turn."""


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """Chains that sample the fitted model, from N(0, I)."""

    prefix = "sampling."
    kernel: KernelConfig = field(default_factory=KernelConfig)
    num_steps: Positive = 200
    """`sample`, `evaluate`: kernel steps from N(0, I) to a sample; other chains tune the step size before."""
    latent_steps: NonNegative = 300
    """With energy.latent-term: sweeps of replica exchange on E_1(z_1) before that, which decode nothing. The chains
    then swap their first latent with these every few steps, also in `diagnose` and `compare`; 0 switches both off."""
