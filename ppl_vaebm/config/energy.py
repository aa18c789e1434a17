"""Options of the energy network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ppl_vaebm.config.options import Checked, NonNegative, Positive, PositiveFloat, one_of, require

EnergyLayout = Literal["halving", "cifar10", "celeba64", "lsun-church64", "celebahq256", "mnist"]


@dataclass(frozen=True)
class EnergyConfig(Checked):
    """The energy network."""

    prefix = "energy."
    width: Positive = 128
    """Hidden units of the fully connected network."""
    depth: Positive = 2
    """Hidden layers of the fully connected network."""
    num_fourier: NonNegative = 64
    """Random Fourier features of x; with 0 the network reads x."""
    fourier_scale: PositiveFloat = 4.0
    """Standard deviation of their frequencies, in radians per unit of x."""
    channels: Positive = 16
    """Channels of the convolutional network's first layer."""
    layout: EnergyLayout = "halving"
    """Blocks of the convolutional network. halving: one block per grid, each with twice the channels of the one before;
    the others are published (Xiao et al. 2021), each for one size of images."""
    stem_stride: Annotated[int, one_of(1, 2)] = 1
    """halving: with 2 the first layer halves the grid with a 4x4 kernel and replaces one block."""
    block: Literal["standard", "depthwise"] = "standard"
    """Convolutional block: two 3x3 convolutions (standard), or a depthwise 5x5 and two 1x1, which is faster."""
    weight_norm: bool = False
    """Convolutional network: normalize the weights of each output channel and give them a learned gain."""
    data_init: bool = False
    """Before the first step, scale all layers but the last so that five batches of data give them mean 0 and standard
    deviation 0.2."""
    spectral_norm: bool = False
    """Divide the weights of all layers but the last by their largest singular value."""
    inputs: Literal["x", "x-and-z"] = "x"
    """Arguments of the energy: x alone, or x and the latents."""
    latent_term: bool = False
    """x-and-z: add an energy E_1(z_1) of the first latent alone, which is learned and sampled without decoding; see
    ebm.latent."""
    latent_balance: bool = False
    """With latent-term: add a second energy of the first latent, fitted last, that keeps the marginal of z_1 as E_1 has
    it; see ebm.latent.balance-steps."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        expected = f"1 with energy.layout {self.layout}, whose first layer is as published"
        require(self.stem_stride == 1 or self.layout == "halving", "energy.stem-stride", expected, self.stem_stride)
        has_latents = self.inputs == "x-and-z"
        require(has_latents or not self.latent_term, "energy.latent-term", "off with energy.inputs x", True)
        has_term = self.latent_term or not self.latent_balance
        require(has_term, "energy.latent-balance", "off without energy.latent-term", True)
        for name in ("weight_norm", "data_init") if self.spectral_norm else ():
            expected = "off with energy.spectral-norm, which fixes the scale of the weights"
            require(not getattr(self, name), f"energy.{name.replace('_', '-')}", expected, True)
