"""Configuration: frozen dataclasses that refuse bad values where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

DataName = Literal[
    "gaussians25",
    "digits",
    "image-folder",
    "mnist",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "svhn",
    "celeba",
    "lsun-church",
    "stacked-mnist",
]
NetKind = Literal["auto", "vector", "image"]
KernelName = Literal["langevin", "mala", "hmc", "pcn", "independence", "elliptical", "mixture"]
TUNABLE_KERNELS = ("mala", "hmc", "pcn")
"""Kernels whose step warm-up tunes."""
Objective = Literal["mle", "ratio"]
Negatives = Literal["chains", "importance"]


def _require(condition: bool, field_name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{field_name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class DataConfig:
    """What to model."""

    name: Annotated[DataName, tyro.conf.arg(aliases=["--data"])] = "gaussians25"
    """Data set."""
    root: str = "data"
    """Folder that holds the files: a torchvision root, or the image folder itself."""
    download: bool = False
    """Let torchvision fetch missing files."""
    image_size: int | None = None
    """Side in pixels to resize to; the data set's own size if not given."""
    spacing: float = 1.0
    """gaussians25: distance of neighbouring modes."""
    std: float = 0.05
    """gaussians25: standard deviation of each mode."""
    num_points: int = 100_000
    """gaussians25: training points; validation and test have a fifth each."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require(self.spacing > 0, "data.spacing", "positive", self.spacing)
        _require(self.std > 0, "data.std", "positive", self.std)
        _require(self.num_points >= 10, "data.num-points", "at least 10", self.num_points)
        _require(self.image_size is None or self.image_size >= 4, "data.image-size", "at least 4", self.image_size)


@dataclass(frozen=True)
class ModelConfig:
    """The hierarchical VAE."""

    kind: NetKind = "auto"
    """Fully connected for points, convolutional for images; auto follows the data."""
    latents: tuple[int, ...] = (2,)
    """Size of each latent group, coarsest first. For images the first is a vector; each later group has that many
    channels on a grid twice as fine as the one before."""
    width: int = 128
    """Hidden units of the fully connected nets."""
    depth: int = 3
    """Hidden layers of the fully connected nets."""
    num_fourier: int = 0
    """Random Fourier features of x for the fully connected encoder; 0 gives it x."""
    channels: int = 16
    """Channels of the convolutional nets at full resolution."""
    x_scale: Literal["global", "local"] = "global"
    """Standard deviation of x given z: one number, or a function of z for every coordinate."""
    init_x_scale: float = 0.08
    """Its starting value."""
    min_x_scale: float = 0.03
    """Its floor."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require(bool(self.latents) and min(self.latents) > 0, "model.latents", "positive sizes", self.latents)
        for name in ("width", "depth", "channels"):
            _require(getattr(self, name) > 0, f"model.{name}", "positive", getattr(self, name))
        _require(self.num_fourier >= 0, "model.num-fourier", "0 or more", self.num_fourier)
        _require(self.min_x_scale > 0, "model.min-x-scale", "positive", self.min_x_scale)
        _require(
            self.init_x_scale > self.min_x_scale,
            "model.init-x-scale",
            f"above model.min-x-scale ({self.min_x_scale})",
            self.init_x_scale,
        )


@dataclass(frozen=True)
class SviConfig:
    """Stage 1: variational inference."""

    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 256
    """Data points per step."""
    learning_rate: float = 4e-3
    """Adam's, at the start of the cosine."""
    final_learning_rate: float = 4e-5
    """At its end."""
    kl_warmup_steps: int = 5_000
    """Steps over which the weight of the KL term rises from 0 to 1."""
    ema_decay: float = 0.999
    """Of the averaged weights, which validation and stage 2 use."""
    grad_clip: float = 100.0
    """Largest gradient norm; a larger gradient is scaled down to it."""
    validate_every: int = 1_000
    """Steps between validation ELBOs."""
    checkpoint_every: int = 2_000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_loop("svi", self)
        _require(self.kl_warmup_steps >= 0, "svi.kl-warmup-steps", "0 or more", self.kl_warmup_steps)


@dataclass(frozen=True)
class EnergyConfig:
    """The energy network E(x)."""

    kind: NetKind = "auto"
    """Fully connected for points, convolutional for images; auto follows the data."""
    width: int = 128
    """Hidden units of the fully connected net."""
    depth: int = 2
    """Hidden layers of the fully connected net."""
    num_fourier: int = 64
    """Random Fourier features of x; 0 gives it x."""
    fourier_scale: float = 4.0
    """Standard deviation of their frequencies, radians per unit of x."""
    channels: int = 16
    """Channels of the convolutional net at full resolution."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("width", "depth", "channels", "fourier_scale"):
            flag = f"energy.{name.replace('_', '-')}"
            _require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        _require(self.num_fourier >= 0, "energy.num-fourier", "0 or more", self.num_fourier)


@dataclass(frozen=True)
class EbmConfig:
    """Stage 2: learning the energy."""

    objective: Annotated[Objective, tyro.conf.arg(aliases=["--objective"])] = "ratio"
    """mle: contrastive maximum likelihood; ratio: logistic density ratio of data against draws of the VAE."""
    negatives: Annotated[Negatives, tyro.conf.arg(aliases=["--negatives"])] = "chains"
    """Where mle's negatives come from: the kernel's chains, or self-normalised weights over draws of the VAE."""
    ratio_steps: Annotated[int, tyro.conf.arg(aliases=["--ratio-steps"])] = 0
    """Steps of the ratio objective before mle starts."""
    steps: int = 2_000
    """Optimiser steps."""
    batch_size: int = 256
    """Data points, and chains, per step."""
    num_importance: int = 2_048
    """Draws of the VAE per step for importance negatives and for the ratio."""
    num_transitions: int = 10
    """Kernel steps per optimiser step, for chain negatives."""
    replay_probability: float = 0.0
    """Probability that a chain continues from the replay buffer; otherwise it starts from N(0, I)."""
    replay_anneal_steps: int = 0
    """Steps over which that probability rises from 0."""
    replay_size: int = 2_000
    """Positions (of every noise, eps_x included) that the replay buffer holds."""
    learning_rate: float = 2e-3
    """Adam's, at the start of the cosine."""
    final_learning_rate: float = 2e-5
    """At its end."""
    energy_l2: float = 0.0
    """Weight of mean E^2 over data and negatives."""
    spectral_penalty: float = 0.0
    """Weight of the sum of the weight matrices' largest singular values."""
    grad_clip: float = 100.0
    """Largest gradient norm; a larger gradient is scaled down to it."""
    ema_decay: float = 0.999
    """Of the averaged energy, which validation and sampling use."""
    validate_every: int = 500
    """Steps between validations."""
    num_validation_draws: int = 20_000
    """Draws of the VAE behind each validation's log Z."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_loop("ebm", self)
        _require(0 <= self.replay_probability <= 1, "ebm.replay-probability", "in [0, 1]", self.replay_probability)
        for name in ("ratio_steps", "replay_anneal_steps", "energy_l2", "spectral_penalty"):
            flag = f"ebm.{name.replace('_', '-')}"
            _require(getattr(self, name) >= 0, flag, "0 or more", getattr(self, name))
        for name in ("num_importance", "num_transitions", "num_validation_draws"):
            flag = f"ebm.{name.replace('_', '-')}"
            _require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        _require(
            self.replay_size >= self.batch_size,
            "ebm.replay-size",
            f"at least ebm.batch-size ({self.batch_size})",
            self.replay_size,
        )


@dataclass(frozen=True)
class KernelConfig:
    """The Markov kernel on noise space."""

    name: KernelName = "mixture"
    """Kernel. mixture runs `members` in turn."""
    step_size: float | None = None
    """Angle h of one step (the paper's Langevin eta is h squared); tuned in warm-up where the kernel is adjusted."""
    integrator: Literal["splitting", "leapfrog"] = "splitting"
    """mala, hmc: split off N(0, I) and follow it exactly, or leapfrog on the whole. langevin is Euler's step."""
    num_steps: int | None = None
    """hmc: integration steps per trajectory; if not given, trajectory-length over step-size, at most 16."""
    trajectory_length: float = math.pi / 2
    """hmc: angle of one trajectory; a quarter turn forgets the start where E = 0."""
    jitter: float = 0.2
    """hmc: relative spread of the trajectory's angle, one draw per step; 0 is a fixed trajectory."""
    target_acceptance: float | None = None
    """What warm-up tunes the step size to; the kernel's own target if not given."""
    members: tuple[KernelName, ...] = ("independence", "hmc")
    """mixture: the kernels of one cycle; at most one of them may have a step to tune."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        h = self.step_size
        _require(h is None or 0 < h <= math.pi / 2, "kernel.step-size", "an angle in (0, pi/2]", h)
        _require(self.num_steps is None or self.num_steps > 0, "kernel.num-steps", "positive", self.num_steps)
        angle = self.trajectory_length
        _require(0 < angle < math.inf, "kernel.trajectory-length", "positive and finite", angle)
        _require(0 <= self.jitter < 1, "kernel.jitter", "in [0, 1)", self.jitter)
        target = self.target_acceptance
        _require(target is None or 0 < target < 1, "kernel.target-acceptance", "in (0, 1)", target)
        _require(bool(self.members), "kernel.members", "at least one kernel", self.members)
        refused = {"mixture", "langevin"} & set(self.members)
        _require(not refused, "kernel.members", "adjusted kernels, not langevin or another mixture", self.members)
        expected = f"a cycle with at most one kernel that has a step to tune ({', '.join(TUNABLE_KERNELS)})"
        num_tunable = sum(name in TUNABLE_KERNELS for name in self.members)
        _require(num_tunable <= 1, "kernel.members", expected, self.members)

    def of(self, name: KernelName) -> KernelConfig:
        """Return the options of another kernel.

        Args:
            name: of the kernel.

        Returns:
            The same options, but for the step size and the target acceptance, which belong to the kernel that they
            were chosen for.
        """
        if name == self.name:
            return self
        return replace(self, name=name, step_size=None, target_acceptance=None)


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

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require(self.num_steps > 0, "sampling.num-steps", "positive", self.num_steps)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers."""

    seed: int = 0
    """Seed of every random stream of the run."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    device: str = "cpu"
    """PyTorch device to compute on."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    svi: SviConfig = field(default_factory=SviConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)
    kernel: TrainingKernelConfig = field(default_factory=TrainingKernelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require(self.threads >= 0, "threads", "0 or more", self.threads)


def _require_loop(section: str, loop: SviConfig | EbmConfig) -> None:
    """Check what both training loops have."""
    positive = ("steps", "batch_size", "learning_rate", "grad_clip", "validate_every", "checkpoint_every", "log_every")
    for name in positive:
        flag = f"{section}.{name.replace('_', '-')}"
        _require(getattr(loop, name) > 0, flag, "positive", getattr(loop, name))
    final = loop.final_learning_rate
    _require(0 <= final <= loop.learning_rate, f"{section}.final-learning-rate", "in [0, learning-rate]", final)
    _require(0 <= loop.ema_decay < 1, f"{section}.ema-decay", "in [0, 1)", loop.ema_decay)
