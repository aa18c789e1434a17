"""The Markov kernels on noise space, and the chains that sampling runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from ppl_vaebm.config.checks import require

KernelName = Literal["langevin", "mala", "hmc", "chees", "pcn", "independence", "elliptical", "mixture", "tempered"]
TUNABLE_KERNELS = ("mala", "hmc", "chees", "pcn", "tempered")
"""Kernels whose step warm-up tunes."""
SELF_TUNING_KERNELS = ("chees", "tempered")
"""Kernels with a warm-up of their own, which tunes more than the step; a mixture has no room for it."""


@dataclass(frozen=True)
class KernelConfig:
    """The Markov kernel on noise space."""

    name: KernelName = "mixture"
    """Kernel. mixture runs `members` in turn."""
    step_size: float | None = None
    """Angle h of one step (the paper's Langevin eta is h squared); tuned in warm-up where the kernel is adjusted."""
    integrator: Literal["splitting", "leapfrog"] = "splitting"
    """mala, hmc, chees: split off N(0, I) and follow it exactly, or leapfrog on the whole. langevin is Euler's step."""
    num_steps: int | None = None
    """hmc: integration steps per trajectory; trajectory-length over step-size if not given. tempered: integration steps
    of a move at every level; 1 if not given."""
    max_num_steps: int | None = None
    """hmc, chees: most integration steps of one trajectory; 16 for hmc and 1000 for chees if not given."""
    trajectory_length: float = math.pi / 2
    """hmc: angle of one trajectory; a quarter turn forgets the start where E = 0. chees: where warm-up starts from for
    the longest trajectory, of which each goes a uniform share."""
    fit_reference: bool = True
    """chees: fit a Gaussian with independent coordinates to the chains in warm-up, as leapfrog's inverse mass and as
    what splitting splits off instead of N(0, I)."""
    num_levels: int = 6
    """tempered: levels between N(0, I) and the target, both included; about twice the communication barrier that it
    reports, and one more, are best."""
    jitter: float = 0.2
    """hmc: relative spread of the trajectory's angle, one draw per step; 0 is a fixed trajectory."""
    target_acceptance: float | None = None
    """What warm-up tunes the step size to; the kernel's own target if not given."""
    members: tuple[KernelName, ...] = ("independence", "hmc")
    """mixture: the kernels of one cycle; at most one of them may have a step to tune, and neither chees nor tempered is
    one."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        h = self.step_size
        require(h is None or 0 < h <= math.pi / 2, "kernel.step-size", "an angle in (0, pi/2]", h)
        for name in ("num_steps", "max_num_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"kernel.{name.replace('_', '-')}", "positive", value)
        require(self.num_levels >= 2, "kernel.num-levels", "at least 2", self.num_levels)
        angle = self.trajectory_length
        require(0 < angle < math.inf, "kernel.trajectory-length", "positive and finite", angle)
        require(0 <= self.jitter < 1, "kernel.jitter", "in [0, 1)", self.jitter)
        target = self.target_acceptance
        require(target is None or 0 < target < 1, "kernel.target-acceptance", "in (0, 1)", target)
        require(bool(self.members), "kernel.members", "at least one kernel", self.members)
        refused = {"langevin", "mixture", *SELF_TUNING_KERNELS} & set(self.members)
        expected = f"adjusted kernels, not langevin, {', '.join(SELF_TUNING_KERNELS)} or another mixture"
        require(not refused, "kernel.members", expected, self.members)
        tunable = [name for name in TUNABLE_KERNELS if name not in SELF_TUNING_KERNELS]
        expected = f"a cycle with at most one kernel that has a step to tune ({', '.join(tunable)})"
        require(sum(name in tunable for name in self.members) <= 1, "kernel.members", expected, self.members)

    def of(self, name: KernelName) -> KernelConfig:
        """Return the options of another kernel.

        Args:
            name: of the kernel.

        Returns:
            The same options, but for the step size and the target acceptance, which belong to the kernel that they
            were chosen for. So does a number of steps between HMC and tempered, whose every move costs it at all
            levels.
        """
        if name == self.name:
            return self
        num_steps = None if "tempered" in (name, self.name) else self.num_steps
        return replace(self, name=name, step_size=None, target_acceptance=None, num_steps=num_steps)


@dataclass(frozen=True)
class TrainingKernelConfig(KernelConfig):
    """The kernel of stage 2's negatives."""

    name: Annotated[KernelName, tyro.conf.arg(aliases=["--kernel"])] = "mixture"
    """Kernel. mixture runs `members` in turn."""


@dataclass(frozen=True)
class SamplingConfig:
    """How chains on the trained energy run, from fresh noise."""

    kernel: KernelConfig = field(default_factory=KernelConfig)
    """Kernel of `sample`, `evaluate`, `diagnose` and `compare`; the training kernel is `kernel`."""
    num_steps: int = 200
    """`sample`, `evaluate`: steps from fresh noise to a sample. The step size is tuned before, on other chains."""
    latent_steps: int = 300
    """Before them, with energy.latent-term: sweeps of replica exchange on that term alone, which decode nothing. These
    chains then stand behind the others, which exchange the first latent with them every few steps; 0 does without.
    `diagnose` and `compare` start from N(0, I), and exchange all the same."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        require(self.num_steps > 0, "sampling.num-steps", "positive", self.num_steps)
        require(self.latent_steps >= 0, "sampling.latent-steps", "0 or more", self.latent_steps)
