"""Options of the hierarchical VAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ppl_vaebm.config.options import POSITIVE, Checked, NonNegative, Positive, PositiveFloat, at_least, one_of, require

ModelKind = Literal["auto", "vector", "image", "nvae"]
DecoderName = Literal["normal", "bernoulli", "logistic", "logistic-mixture"]


@dataclass(frozen=True)
class NvaeConfig(Checked):
    """NVAE (Vahdat and Kautz 2020): towers of residual cells with groups of latents on several grids."""

    prefix = "model.nvae."
    channels: Annotated[int, at_least(2)] = 32
    """Channels at full resolution; they double each time the grid is halved."""
    num_latents: Positive = 20
    """Channels of each latent group."""
    num_scales: Positive = 1
    """Number of latent grids; each is half as wide as the finer one."""
    groups_per_scale: Positive = 10
    """Latent groups on the finest grid, and on each other grid unless adaptive-groups is set."""
    adaptive_groups: bool = False
    """Halve the number of groups from one grid to the next coarser one, rounded down."""
    min_groups_per_scale: Positive = 1
    """Smallest number of groups on a grid, with adaptive-groups."""
    encoder_cells: Positive = 2
    """Residual cells per group in the encoder."""
    decoder_cells: Positive = 2
    """Residual cells per group in the decoder."""
    num_pre_blocks: NonNegative = 1
    """Times the image's grid is halved before the first latent grid, and doubled after it in the decoder."""
    pre_cells: Positive = 2
    """Encoder cells of each such block; the last one halves the grid."""
    post_cells: Positive = 2
    """Decoder cells of each such block; the first one doubles the grid."""
    num_flows: NonNegative = 0
    """Pairs of autoregressive flow cells in each group's posterior."""
    squeeze_excite: bool = True
    """Use squeeze-and-excitation in every cell."""
    residual_posterior: bool = True
    """Parameterize the posterior relative to the prior."""
    padding: NonNegative = 0
    """Pixels added on each side inside the network so that the grids divide the image; the likelihood ignores them."""
    decoder: DecoderName = "normal"
    """Distribution of x given z. The logistic ones are discretised to the pixels' values; bernoulli is for binarised
    images and has no stage ebm."""
    num_mixtures: Positive = 10
    """Components of the logistic mixture."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of latent groups on each grid, finest first."""
        counts = [self.groups_per_scale]
        while len(counts) < self.num_scales:
            halved = max(self.min_groups_per_scale, counts[-1] // 2)
            counts.append(halved if self.adaptive_groups else self.groups_per_scale)
        return tuple(counts)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The hierarchical VAE."""

    prefix = "model."
    kind: ModelKind = "auto"
    """vector: fully connected, for points; image: convolutional; auto: one of these two, by the data; nvae: for images,
    with the options model.nvae."""
    latents: Annotated[tuple[int, ...], POSITIVE] = (2,)
    """Size of each latent group, coarsest first. For images the first is a vector, and each later one has that many
    channels on a grid twice as fine as the one before."""
    width: Positive = 128
    """Hidden units of the fully connected networks."""
    depth: Positive = 3
    """Hidden layers of the fully connected networks."""
    channels: Positive = 16
    """Channels of the convolutional networks at full resolution, or at that of the patches."""
    stem_depth: NonNegative = 0
    """Hidden layers of model.width units between the first latent and the convolutional networks. They cost little, and
    make the first grid a non-linear function of the latent."""
    patch: Annotated[int, one_of(1, 2, 4)] = 1
    """Side of the squares of pixels that the convolutional networks treat as one place with more channels. With 2 a
    sample and its gradient cost about a quarter."""
    x_scale: Literal["global", "sample", "local"] = "global"
    """Standard deviation of x given z: one number (global), or a function of z with one value for the whole of x
    (sample) or one for each coordinate (local)."""
    init_x_scale: float = 0.08
    """Initial value of that standard deviation."""
    min_x_scale: PositiveFloat = 0.03
    """Lower bound of that standard deviation."""
    nvae: NvaeConfig = field(default_factory=NvaeConfig)

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        require(bool(self.latents), "model.latents", "at least one size", self.latents)
        expected = f"above model.min-x-scale ({self.min_x_scale})"
        require(self.init_x_scale > self.min_x_scale, "model.init-x-scale", expected, self.init_x_scale)
