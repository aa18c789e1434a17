"""The energy network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppl_vaebm.config.checks import require

NetKind = Literal["auto", "vector", "image"]
EnergyLayout = Literal["halving", "cifar10", "celeba64", "lsun-church64", "celebahq256", "mnist"]


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
            require(getattr(self, name) > 0, flag, "positive", getattr(self, name))
        require(self.num_fourier >= 0, "energy.num-fourier", "0 or more", self.num_fourier)
        require(self.stem_stride in (1, 2), "energy.stem-stride", "1 or 2", self.stem_stride)
        expected = f"1 with energy.layout {self.layout}, whose stem is as published"
        require(self.stem_stride == 1 or self.layout == "halving", "energy.stem-stride", expected, self.stem_stride)
        require(
            self.inputs == "x-and-z" or not self.latent_term, "energy.latent-term", "off with energy.inputs x", "on"
        )
        require(
            self.latent_term or not self.latent_balance, "energy.latent-balance", "off without energy.latent-term", "on"
        )
        for name in ("weight_norm", "data_init"):
            is_free = not (self.spectral_norm and getattr(self, name))
            expected = "off with energy.spectral-norm, which leaves weights no scale of their own"
            require(is_free, f"energy.{name.replace('_', '-')}", expected, getattr(self, name))
