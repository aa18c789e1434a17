"""Configuration: frozen dataclasses that refuse bad values, and recipe + command line -> one resolved config.

A recipe is a YAML file of the form that a run's own ``config.yaml`` has. It becomes command-line tokens,
placed before the user's, so one parser checks both and the last one wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from ppl_vaebm.errors import InputError

RECIPES = Path(__file__).parent / "experiments"
"""Folder of the recipes that ship."""

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
        return dataclasses.replace(self, name=name, step_size=None, target_acceptance=None)


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


Parsed = TypeVar("Parsed")


def parse(cls: type[Parsed], argv: Sequence[str], prog: str, description: str | None = None) -> Parsed:
    """Parse command-line tokens into a dataclass.

    Args:
        cls: dataclass of options.
        argv: tokens.
        prog: the program's name in messages, and the file that tokens came from, if any.
        description: first paragraph of ``--help``; without one, as for a file, there is no ``--help``.

    Returns:
        An instance.

    Raises:
        InputError: the parser refused; the message is its own, on one line.
    """
    has_help = description is not None
    with _refusals(prog):
        return tyro.cli(cls, args=list(argv), prog=prog, description=description, add_help=has_help)


def parse_known(cls: type[Parsed], argv: Sequence[str], prog: str) -> Parsed:
    """Parse the tokens that a dataclass knows, and pass over the others.

    Args:
        cls: dataclass of options.
        argv: tokens.
        prog: the program's name in messages.

    Returns:
        An instance.

    Raises:
        InputError: as :func:`parse`.
    """
    with _refusals(prog):
        return tyro.cli(cls, args=list(argv), prog=prog, add_help=False, return_unknown_args=True)[0]


@contextlib.contextmanager
def _refusals(prog: str) -> Iterator[None]:
    """Turn the parser's exit on a mistake into an :class:`InputError`."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{prog}: {_unboxed(stderr.getvalue())}") from None


def _unboxed(box: str) -> str:
    """Take the words out of the frame that the parser draws around its message, and leave out its advice on --help."""
    lines = (line.strip(" \u2502\u2500\u256d\u256e\u2570\u256f") for line in box.splitlines()[1:])
    # The advice calls the program by its short name, or tells the user to run a YAML file.
    return " ".join(line for line in lines if line).partition(" For full helptext, ")[0]


def tokens(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Flatten a recipe into command-line tokens.

    Args:
        tree: nested mappings of option names to values.
        prefix: name of the enclosing section with its dot.

    Yields:
        Tokens that :func:`parse` reads, so ``1e-3``, lists and misspelt keys behave as on the command line.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from tokens(value, f"{name}.")
        elif isinstance(value, bool):
            section, _, last = name.rpartition(".")
            yield "--" + (name if value else f"{section}.no-{last}" if section else f"no-{last}")
        elif isinstance(value, (list, tuple)):
            yield "--" + name
            yield from map(str, value)
        else:
            yield f"--{name}={value}"


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe or a run's configuration.

    Args:
        path: YAML file.

    Returns:
        Its nested mappings.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a recipe file that exists") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold options such as 'seed: 1', found {type(tree).__name__}")
    return tree


def recipe_names() -> list[str]:
    """Name the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Find a recipe by its name or its file.

    Args:
        recipe: name of one that ships, or the path of a YAML file.

    Returns:
        Its path.

    Raises:
        InputError: neither.
    """
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    if Path(recipe).is_file():
        return Path(recipe)
    raise InputError(f"unknown recipe {recipe!r}: expected one of {', '.join(recipe_names())}, or a YAML file's path")


def to_dict(config: Config) -> dict[str, Any]:
    """Turn a configuration into plain YAML types, without the options that were left open."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {name: plain(inner) for name, inner in named.items() if inner is not None}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)  # type: ignore[no-any-return]


def from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """Turn plain YAML types into a configuration.

    Args:
        tree: as :func:`to_dict` gives, or a part of it; the rest is default.
        source: where it came from, for messages.

    Returns:
        The configuration.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    return parse(Config, list(tokens(tree)), prog=source)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the options in which two plain configurations differ, such as ``model.width``."""
    names: list[str] = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names
