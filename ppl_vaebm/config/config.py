"""Configuration: frozen dataclasses that refuse bad values where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

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
    "celeba-hq",
    "lsun-church",
    "stacked-mnist",
]
NetKind = Literal["auto", "vector", "image"]
ModelKind = Literal["auto", "vector", "image", "nvae"]
DecoderName = Literal["normal", "bernoulli", "logistic", "logistic-mixture"]
EnergyLayout = Literal["halving", "cifar10", "celeba64", "lsun-church64", "celebahq256", "mnist"]
KernelName = Literal["langevin", "mala", "hmc", "chees", "pcn", "independence", "elliptical", "mixture", "tempered"]
TUNABLE_KERNELS = ("mala", "hmc", "chees", "pcn", "tempered")
"""Kernels whose step warm-up tunes."""
SELF_TUNING_KERNELS = ("chees", "tempered")
"""Kernels with a warm-up of their own, which tunes more than the step; a mixture has no room for it."""
Objective = Literal["mle", "ratio", "ladder"]
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
    padding: int | None = None
    """Black pixels to add on each side, before image-size resizes; 2 for the MNIST family and 0 else if not given."""
    num_bits: int = 8
    """Bits to keep of each channel's 8: an image has 2**num_bits levels."""
    binarize: bool = False
    """Grey images: draw every pixel of a batch anew, white (1) with probability level / 255, else black (-1)."""
    noise_sd: float = 0.0
    """Standard deviation of Gaussian noise added to images, of which a level is 2 / 256: what is modelled is then the
    law of noisy images. Without it an energy learns first of all that a VAE's backgrounds are not clean."""
    flips: Literal["auto", "random", "never"] = "auto"
    """Mirror training images left to right with probability 1/2; auto: where the data set's own recipe does."""
    num_validation: int | None = None
    """Training images to hold out for validation, where the data set has no such part; a tenth if not given."""
    skip_unreadable: bool = False
    """Image folders: leave out files that cannot be read instead of refusing them; reads every file at the start."""
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
        _require(self.padding is None or self.padding >= 0, "data.padding", "0 or more", self.padding)
        _require(1 <= self.num_bits <= 8, "data.num-bits", "in 1..8", self.num_bits)
        expected = "8 with data.binarize, which draws from all levels"
        _require(self.num_bits == 8 or not self.binarize, "data.num-bits", expected, self.num_bits)
        _require(self.noise_sd >= 0, "data.noise-sd", "0 or more", self.noise_sd)
        _require(not (self.binarize and self.noise_sd), "data.noise-sd", "0 with data.binarize", self.noise_sd)
        num = self.num_validation
        _require(num is None or num >= 1, "data.num-validation", "at least 1", num)


@dataclass(frozen=True)
class NvaeConfig:
    """NVAE (Vahdat and Kautz 2020): towers of residual cells, latent groups on several grids."""

    channels: int = 32
    """Channels at full resolution; every halving of the grid doubles them."""
    num_latents: int = 20
    """Channels of every latent group."""
    num_scales: int = 1
    """Latent grids; each is half as wide as the one before."""
    groups_per_scale: int = 10
    """Latent groups on the finest grid, and on every other unless adaptive-groups is set."""
    adaptive_groups: bool = False
    """Each coarser grid has half the groups of the one before, rounded down."""
    min_groups_per_scale: int = 1
    """Fewest groups of a grid with adaptive-groups."""
    encoder_cells: int = 2
    """Residual cells per group on the way up."""
    decoder_cells: int = 2
    """Residual cells per group on the way down."""
    num_pre_blocks: int = 1
    """Halvings before the first latent grid, and doublings after it on the way down."""
    pre_cells: int = 2
    """Cells of each such block on the way up; the last one halves the grid."""
    post_cells: int = 2
    """Cells of each such block on the way down; the first one doubles the grid."""
    num_flows: int = 0
    """Pairs of autoregressive flow cells on each group's posterior."""
    squeeze_excite: bool = True
    """Rescale the channels of every cell by what the whole image says."""
    residual_posterior: bool = True
    """The posterior's raw outputs add to the prior's."""
    padding: int = 0
    """Pixels added on each side inside the network, so that the grids divide the image; the likelihood leaves them
    out."""
    decoder: DecoderName = "normal"
    """Distribution of x given z. The logistic ones score the levels of pixels; bernoulli is for binarised images and
    has no stage ebm."""
    num_mixtures: int = 10
    """Components of the logistic mixture."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        positive = ("channels", "num_latents", "num_scales", "groups_per_scale", "min_groups_per_scale")
        for name in (*positive, "encoder_cells", "decoder_cells", "pre_cells", "post_cells", "num_mixtures"):
            _require(getattr(self, name) > 0, f"model.nvae.{name.replace('_', '-')}", "positive", getattr(self, name))
        _require(self.channels > 1, "model.nvae.channels", "at least 2, for a halving shares them out", self.channels)
        for name in ("num_pre_blocks", "num_flows", "padding"):
            flag = f"model.nvae.{name.replace('_', '-')}"
            _require(getattr(self, name) >= 0, flag, "0 or more", getattr(self, name))

    @property
    def groups(self) -> tuple[int, ...]:
        """Latent groups of every grid, finest first."""
        counts = [self.groups_per_scale]
        while len(counts) < self.num_scales:
            halved = max(self.min_groups_per_scale, counts[-1] // 2)
            counts.append(halved if self.adaptive_groups else self.groups_per_scale)
        return tuple(counts)


@dataclass(frozen=True)
class ModelConfig:
    """The hierarchical VAE."""

    kind: ModelKind = "auto"
    """Fully connected for points, convolutional for images; auto follows the data. nvae is for images, with options of
    its own."""
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
    """Channels of the convolutional nets at full resolution, which is that of the patches where those are given."""
    stem_depth: int = 0
    """Hidden layers, of model.width units, between the first latent and the convolutional nets, in the decoder and in
    the encoder. They cost a draw little, and the first grid is no longer linear in the latent."""
    patch: int = 1
    """Side of the squares of pixels that the convolutional nets take as one place with more channels. At 2 a draw and
    its gradient cost about a quarter."""
    x_scale: Literal["global", "sample", "local"] = "global"
    """Standard deviation of x given z: one number (global), or functions of z, one for all coordinates (sample) or one
    for every coordinate (local)."""
    init_x_scale: float = 0.08
    """Its starting value."""
    min_x_scale: float = 0.03
    """Its floor."""
    nvae: NvaeConfig = field(default_factory=NvaeConfig)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require(bool(self.latents) and min(self.latents) > 0, "model.latents", "positive sizes", self.latents)
        for name in ("width", "depth", "channels"):
            _require(getattr(self, name) > 0, f"model.{name}", "positive", getattr(self, name))
        _require(self.stem_depth >= 0, "model.stem-depth", "0 or more", self.stem_depth)
        _require(self.patch in (1, 2, 4), "model.patch", "1, 2 or 4", self.patch)
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
    epochs: float | None = None
    """Passes over the training data; sets the steps, and the options that are shares or epochs of them."""
    batch_size: int = 256
    """Data points per step, and process."""
    optimizer: Literal["adam", "adamax"] = "adam"
    """Update rule; adamax is NVAE's."""
    epsilon: float = 1e-8
    """Added to the update rule's denominator."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    learning_rate: float = 4e-3
    """At the start of the cosine."""
    final_learning_rate: float = 4e-5
    """At its end."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0, before the cosine."""
    warmup_epochs: float | None = None
    """The same in passes over the data."""
    kl_warmup_steps: int = 5_000
    """Steps over which the weight of the KL term rises from 0 to 1."""
    kl_warmup_share: float | None = None
    """The same as a share of all steps."""
    min_kl_weight: float = 0.0
    """Floor of that weight."""
    kl_balance: bool = False
    """While the weight rises, weigh the latent groups so that each takes a share of the KL in proportion to its grid
    (NVAE)."""
    free_bits: float = 0.0
    """Nats of KL that each latent group has for nothing."""
    spectral_penalty: float = 0.0
    """Weight of the convolutions' largest singular values and the normalisations' largest gains (NVAE's lambda)."""
    spectral_penalty_start: float | None = None
    """Its value at the start; it moves to the final one in log scale as the KL's weight rises."""
    ema_decay: float = 0.999
    """Of the averaged weights, which validation and stage 2 use."""
    grad_clip: float = 100.0
    """Largest gradient norm; a larger gradient is scaled down to it."""
    bf16: bool = False
    """Run the networks in bfloat16; log densities stay in float32."""
    norm_temperature: float | None = None
    """Temperature of prior draws, from which a second set of statistics for the generator's batch normalisations is
    taken at every checkpoint; draws of the VAE alone use it. If not given, there are those of training only."""
    norm_batches: int = 500
    """Batches of 16 such draws."""
    validate_every: int = 1_000
    """Steps between validation ELBOs."""
    checkpoint_every: int = 2_000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_loop("svi", self)
        for name in ("warmup_steps", "kl_warmup_steps", "weight_decay", "free_bits", "spectral_penalty"):
            _require(getattr(self, name) >= 0, f"svi.{name.replace('_', '-')}", "0 or more", getattr(self, name))
        for name in ("epochs", "warmup_epochs", "spectral_penalty_start", "norm_temperature"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"svi.{name.replace('_', '-')}", "positive", value)
        share = self.kl_warmup_share
        _require(share is None or 0 <= share <= 1, "svi.kl-warmup-share", "in [0, 1]", share)
        _require(self.epsilon > 0, "svi.epsilon", "positive", self.epsilon)
        _require(0 <= self.min_kl_weight <= 1, "svi.min-kl-weight", "in [0, 1]", self.min_kl_weight)
        _require(self.norm_batches > 0, "svi.norm-batches", "positive", self.norm_batches)
        if self.spectral_penalty_start is not None:
            _require(self.spectral_penalty > 0, "svi.spectral-penalty", "positive with a start", self.spectral_penalty)

    def resolved(self, steps_per_epoch: int) -> SviConfig:
        """Turn epochs and shares into steps.

        Args:
            steps_per_epoch: steps of one pass over the training data.

        Returns:
            Options in which ``steps``, ``warmup_steps`` and ``kl_warmup_steps`` say it all.
        """
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * steps_per_epoch))
        warmup = self.warmup_steps if self.warmup_epochs is None else round(self.warmup_epochs * steps_per_epoch)
        kl_warmup = self.kl_warmup_steps if self.kl_warmup_share is None else round(self.kl_warmup_share * steps)
        counts = replace(self, steps=steps, warmup_steps=warmup, kl_warmup_steps=kl_warmup)
        return replace(counts, epochs=None, warmup_epochs=None, kl_warmup_share=None)


@dataclass(frozen=True)
class EnergyConfig:
    """The energy network."""

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
    """Channels of the convolutional net's stem."""
    layout: EnergyLayout = "halving"
    """Blocks of the convolutional net. halving: one for each grid, with twice the channels of the one before; the
    others are the published lists (Xiao et al. 2021), each for one size of images."""
    stem_stride: int = 1
    """halving: 2 halves the grid in the stem, with a 4x4 kernel, and leaves out a block."""
    block: Literal["standard", "depthwise"] = "standard"
    """Of the convolutional net: two 3x3 convolutions; or, faster, a depthwise 5x5 and two 1x1."""
    weight_norm: bool = False
    """Convolutional net: give every output channel's weights a gain that is learnt, and a norm that is not."""
    data_init: bool = False
    """Before the first step, scale all layers but the last by what five batches of data do in them, to a mean of 0 and
    a standard deviation of 0.2."""
    spectral_norm: bool = False
    """Divide the weights of all layers but the last by their largest singular value."""
    inputs: Literal["x", "x-and-z"] = "x"
    """What the energy is a function of: x, or x and the latents."""
    latent_term: bool = False
    """x-and-z: add a fully connected net's energy of the first latent alone (the correction of its prior), which can be
    learnt and sampled without an image; see ebm.latent."""
    latent_balance: bool = False
    """With a term of the first latent: add another, fitted after all else, that keeps the rest of the energy from
    changing what the first one says of the first latent; see ebm.latent.balance-steps."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("width", "depth", "channels", "fourier_scale"):
            flag = f"energy.{name.replace('_', '-')}"
            _require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        _require(self.num_fourier >= 0, "energy.num-fourier", "0 or more", self.num_fourier)
        _require(self.stem_stride in (1, 2), "energy.stem-stride", "1 or 2", self.stem_stride)
        expected = f"1 with energy.layout {self.layout}, whose stem is as published"
        _require(self.stem_stride == 1 or self.layout == "halving", "energy.stem-stride", expected, self.stem_stride)
        _require(
            self.inputs == "x-and-z" or not self.latent_term, "energy.latent-term", "off with energy.inputs x", "on"
        )
        _require(
            self.latent_term or not self.latent_balance, "energy.latent-balance", "off without energy.latent-term", "on"
        )
        for name in ("weight_norm", "data_init"):
            is_free = not (self.spectral_norm and getattr(self, name))
            expected = "off with energy.spectral-norm, which leaves weights no scale of their own"
            _require(is_free, f"energy.{name.replace('_', '-')}", expected, getattr(self, name))


@dataclass(frozen=True)
class LatentTermConfig:
    """Stage 2's first part: the first latent's own term, by maximum likelihood, with chains that decode nothing."""

    steps: int = 0
    """Optimiser steps before all others, which then leave that term as it is; needs energy.latent-term. 0 trains it
    with the rest."""
    batch_size: int = 512
    """Data points per step."""
    num_chains: int = 128
    """Chains that a step moves, by replica exchange."""
    store_size: int = 256
    """Chains that there are. The more, the later they follow the term from one mode to another."""
    num_sweeps: int = 4
    """Sweeps of the chains per step, two at least."""
    learning_rate: float = 2e-3
    """Adam's, at the start of a cosine that ends at a hundredth of it."""
    ema_decay: float = 0.998
    """Of the average of the weights that is the result."""
    energy_l2: float = 1e-5
    """Weight of mean E^2 over data and negatives."""
    balance_steps: int = 400
    """With energy.latent-balance: optimiser steps of that term, after all others. Each decodes as many draws as there
    are chains."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("batch_size", "num_chains", "store_size", "learning_rate", "balance_steps"):
            _require(getattr(self, name) > 0, f"ebm.latent.{name.replace('_', '-')}", "positive", getattr(self, name))
        for name in ("steps", "energy_l2"):
            _require(getattr(self, name) >= 0, f"ebm.latent.{name.replace('_', '-')}", "0 or more", getattr(self, name))
        _require(self.num_sweeps >= 2, "ebm.latent.num-sweeps", "2 or more", self.num_sweeps)
        _require(0 <= self.ema_decay < 1, "ebm.latent.ema-decay", "in [0, 1)", self.ema_decay)
        expected = f"at most ebm.latent.store-size ({self.store_size})"
        _require(self.num_chains <= self.store_size, "ebm.latent.num-chains", expected, self.num_chains)


@dataclass(frozen=True)
class EbmConfig:
    """Stage 2: learning the energy."""

    objective: Annotated[Objective, tyro.conf.arg(aliases=["--objective"])] = "ratio"
    """mle: contrastive maximum likelihood; ratio: logistic density ratio of data against draws of the VAE; ladder: such
    ratios one upon the other, each against chains of the density of the one before (Rhodes et al. 2020)."""
    negatives: Annotated[Negatives, tyro.conf.arg(aliases=["--negatives"])] = "chains"
    """Where mle's negatives come from: the kernel's chains, or self-normalised weights over draws of the VAE."""
    ratio_steps: Annotated[int, tyro.conf.arg(aliases=["--ratio-steps"])] = 0
    """Steps of the ratio objective before mle starts."""
    rung_steps: int = 500
    """Steps on each rung of the ladder, of which the first is the ratio."""
    latent: LatentTermConfig = field(default_factory=LatentTermConfig)
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
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient, as Adam itself has it."""
    energy_l2: float = 0.0
    """Weight of mean E^2 over data and negatives."""
    spectral_penalty: float = 0.0
    """Weight of the sum of the weight matrices' largest singular values."""
    spectral_head: bool = True
    """Count the last layer, which gives the energy, in that sum."""
    negative_image: Literal["draw", "mean"] = "draw"
    """What the loss takes the energy of where a chain ends: the x that it moved, or the decoder's mean at its latents.
    The chain itself always moves the draw."""
    temperature: float = 1.0
    """Factor on the standard deviation of every latent's prior in the VAE that the energy is learned for, and that the
    fitted density then has."""
    prior_statistics: bool = False
    """Take the VAE with the batch statistics of prior draws (svi.norm-temperature), not with those of training; log p
    of the data is lower with them."""
    clip: Literal["norm", "adam-moments"] = "norm"
    """How gradients are clipped: norm scales a larger one down to grad-clip; adam-moments bounds every element by
    3 sqrt(v) + 0.1 from the second step on, v being Adam's estimate of its mean square."""
    grad_clip: float = 100.0
    """Largest gradient norm of clip norm."""
    guard: bool = True
    """Watch the training: when one of the averages below passes its limit, go back to the last checkpoint, with a lower
    learning rate."""
    guard_patience: int = 20
    """Steps that those averages look back on, exponentially."""
    max_energy_gap: float = 100.0
    """Limit of the mean energy of data minus that of chains, either way, nats."""
    max_energy_sd: float = 1_000.0
    """Limit of the standard deviation of the energies of data or negatives, nats."""
    max_grad_norm: float = 1e6
    """Limit of the gradient's norm before it is clipped."""
    min_acceptance: float | None = None
    """Limit of the chains' Metropolis acceptance, for langevin that which its steps would have had. If not given, 0.4
    for langevin, whose step does not follow the energy, and 0.01 for the others."""
    min_exchange: float = 0.1
    """Limit of the acceptance with which chains exchange their first latent, where its term is held. Below it the rest
    of the energy has grown beyond what those chains can follow."""
    max_saturation: float = 0.9
    """Limit of the share of the negatives' pixels beyond [-1, 1]."""
    max_rollbacks: int = 3
    """How often to go back; after that the stage stops, with the last checkpoint as its result."""
    rollback_factor: float = 0.3
    """What going back multiplies the learning rate by."""
    tune: Annotated[bool, tyro.conf.arg(aliases=["--tune"])] = False
    """Before training, find the kernel's step size and the number of transitions: the largest fall of the energy per
    gradient, on a copy of the energy that the ratio has trained for a while."""
    tune_rejection: float = 0.25
    """Largest Metropolis rejection that the step found may have, or would have had."""
    tune_steps: int = 500
    """Steps of the ratio that train that copy; after few the energy is flat, and the step found too large."""
    bf16: bool = False
    """Run the networks of training's chains and losses in bfloat16; energies stay in float32. The chains are then
    adjusted to the energy as it rounds. Sampling and evaluation are in float32 all the same."""
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
        for name in ("ratio_steps", "replay_anneal_steps", "energy_l2", "spectral_penalty", "weight_decay"):
            flag = f"ebm.{name.replace('_', '-')}"
            _require(getattr(self, name) >= 0, flag, "0 or more", getattr(self, name))
        _require(all(0 <= beta < 1 for beta in self.adam_betas), "ebm.adam-betas", "two in [0, 1)", self.adam_betas)
        limits = ("max_energy_gap", "max_energy_sd", "max_grad_norm", "max_saturation", "guard_patience")
        counts = ("num_importance", "num_transitions", "num_validation_draws", "rung_steps", "temperature")
        for name in (*counts, *limits):
            flag = f"ebm.{name.replace('_', '-')}"
            _require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        rate = self.min_acceptance
        _require(rate is None or 0 <= rate < 1, "ebm.min-acceptance", "in [0, 1)", rate)
        _require(0 <= self.min_exchange < 1, "ebm.min-exchange", "in [0, 1)", self.min_exchange)
        _require(self.max_rollbacks >= 0, "ebm.max-rollbacks", "0 or more", self.max_rollbacks)
        _require(0 < self.rollback_factor < 1, "ebm.rollback-factor", "in (0, 1)", self.rollback_factor)
        _require(0 < self.tune_rejection < 1, "ebm.tune-rejection", "in (0, 1)", self.tune_rejection)
        _require(self.tune_steps > 0, "ebm.tune-steps", "positive", self.tune_steps)
        _require(self.has_chains or not self.tune, "ebm.tune", "off where no chains are run", self.tune)
        # Its trials are on an energy that the ratio has trained, which does not reach the first latent's term.
        expected = "off with ebm.latent.steps, whose term is learnt after the step would be found"
        _require(not (self.tune and self.latent.steps), "ebm.tune", expected, self.tune)
        _require(
            self.replay_size >= self.batch_size,
            "ebm.replay-size",
            f"at least ebm.batch-size ({self.batch_size})",
            self.replay_size,
        )

    @property
    def has_chains(self) -> bool:
        """Whether the objective takes its negatives from chains; the ladder does whatever ``negatives`` says."""
        return self.objective == "ladder" or (self.objective == "mle" and self.negatives == "chains")


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
        _require(h is None or 0 < h <= math.pi / 2, "kernel.step-size", "an angle in (0, pi/2]", h)
        for name in ("num_steps", "max_num_steps"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"kernel.{name.replace('_', '-')}", "positive", value)
        _require(self.num_levels >= 2, "kernel.num-levels", "at least 2", self.num_levels)
        angle = self.trajectory_length
        _require(0 < angle < math.inf, "kernel.trajectory-length", "positive and finite", angle)
        _require(0 <= self.jitter < 1, "kernel.jitter", "in [0, 1)", self.jitter)
        target = self.target_acceptance
        _require(target is None or 0 < target < 1, "kernel.target-acceptance", "in (0, 1)", target)
        _require(bool(self.members), "kernel.members", "at least one kernel", self.members)
        refused = {"langevin", "mixture", *SELF_TUNING_KERNELS} & set(self.members)
        expected = f"adjusted kernels, not langevin, {', '.join(SELF_TUNING_KERNELS)} or another mixture"
        _require(not refused, "kernel.members", expected, self.members)
        tunable = [name for name in TUNABLE_KERNELS if name not in SELF_TUNING_KERNELS]
        expected = f"a cycle with at most one kernel that has a step to tune ({', '.join(tunable)})"
        _require(sum(name in tunable for name in self.members) <= 1, "kernel.members", expected, self.members)

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
        _require(self.num_steps > 0, "sampling.num-steps", "positive", self.num_steps)
        _require(self.latent_steps >= 0, "sampling.latent-steps", "0 or more", self.latent_steps)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers."""

    seed: int = 0
    """Seed of every random stream of the run."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    device: str = "cpu"
    """PyTorch device to compute on."""
    tensorboard: bool = False
    """Mirror the metrics and stage 1's pictures for TensorBoard, in the run's folder tensorboard; needs the packages of
    ppl_vaebm[log]."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    svi: SviConfig = field(default_factory=SviConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)
    kernel: TrainingKernelConfig = field(default_factory=TrainingKernelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_finite(self)
        _require(self.threads >= 0, "threads", "0 or more", self.threads)
        scores_levels = self.model.kind == "nvae" and self.model.nvae.decoder != "normal"
        expected = "0 with a decoder that scores levels"
        _require(not (scores_levels and self.data.noise_sd), "data.noise-sd", expected, self.data.noise_sd)
        has_term = self.energy.latent_term or not self.ebm.latent.steps
        _require(has_term, "ebm.latent.steps", "0 without energy.latent-term", self.ebm.latent.steps)
        holds_term = self.ebm.latent.steps > 0 or not self.energy.latent_balance
        expected = "positive with energy.latent-balance, which keeps what a held term says"
        _require(holds_term, "ebm.latent.steps", expected, self.ebm.latent.steps)


def _require_finite(section: Any, prefix: str = "") -> None:
    """Check all numbers, of sections too: a checkpoint's configuration is JSON, which has no word for others."""
    for each in fields(section):
        flag, value = f"{prefix}{each.name.replace('_', '-')}", getattr(section, each.name)
        if is_dataclass(value):
            _require_finite(value, f"{flag}.")
        for number in value if isinstance(value, tuple) else (value,):
            _require(not isinstance(number, float) or math.isfinite(number), flag, "finite", value)


def _require_loop(section: str, loop: SviConfig | EbmConfig) -> None:
    """Check what both training loops have."""
    positive = ("steps", "batch_size", "learning_rate", "grad_clip", "validate_every", "checkpoint_every", "log_every")
    for name in positive:
        flag = f"{section}.{name.replace('_', '-')}"
        _require(getattr(loop, name) > 0, flag, "positive", getattr(loop, name))
    final = loop.final_learning_rate
    _require(0 <= final <= loop.learning_rate, f"{section}.final-learning-rate", "in [0, learning-rate]", final)
    _require(0 <= loop.ema_decay < 1, f"{section}.ema-decay", "in [0, 1)", loop.ema_decay)
