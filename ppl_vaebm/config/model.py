"""The VAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ppl_vaebm.config.checks import require

ModelKind = Literal["auto", "vector", "image", "nvae"]
DecoderName = Literal["normal", "bernoulli", "logistic", "logistic-mixture"]


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
            require(getattr(self, name) > 0, f"model.nvae.{name.replace('_', '-')}", "positive", getattr(self, name))
        require(self.channels > 1, "model.nvae.channels", "at least 2, for a halving shares them out", self.channels)
        for name in ("num_pre_blocks", "num_flows", "padding"):
            flag = f"model.nvae.{name.replace('_', '-')}"
            require(getattr(self, name) >= 0, flag, "0 or more", getattr(self, name))

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
        require(bool(self.latents) and min(self.latents) > 0, "model.latents", "positive sizes", self.latents)
        for name in ("width", "depth", "channels"):
            require(getattr(self, name) > 0, f"model.{name}", "positive", getattr(self, name))
        require(self.stem_depth >= 0, "model.stem-depth", "0 or more", self.stem_depth)
        require(self.patch in (1, 2, 4), "model.patch", "1, 2 or 4", self.patch)
        require(self.num_fourier >= 0, "model.num-fourier", "0 or more", self.num_fourier)
        require(self.min_x_scale > 0, "model.min-x-scale", "positive", self.min_x_scale)
        require(
            self.init_x_scale > self.min_x_scale,
            "model.init-x-scale",
            f"above model.min-x-scale ({self.min_x_scale})",
            self.init_x_scale,
        )
