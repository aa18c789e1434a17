"""Options of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ppl_vaebm.config.options import NOT_NEGATIVE, POSITIVE, Alias, Checked, at_least, between, require

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


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data that are modelled."""

    prefix = "data."
    name: Annotated[DataName, Alias("--data")] = "gaussians25"
    """Data set."""
    root: str = "data"
    """Folder of the files: torchvision's root, or the image folder itself."""
    download: bool = False
    """Download missing files with torchvision."""
    image_size: Annotated[int | None, at_least(4)] = None
    """Resize images to this side, in pixels; without it they keep the data set's size."""
    padding: Annotated[int | None, NOT_NEGATIVE] = None
    """Add this many black pixels on each side before resizing; the default is 2 for MNIST's relatives, 0 for others."""
    num_bits: Annotated[int, between(1, 8)] = 8
    """Bits kept of each 8-bit channel; pixels then have 2**num_bits values."""
    binarize: bool = False
    """Grey images: draw each pixel of a batch as white (1) with probability value / 255, else as black (-1)."""
    noise_sd: Annotated[float, NOT_NEGATIVE] = 0.0
    """Standard deviation of Gaussian noise that is added to images in [-1, 1], where one 8-bit step is 2 / 256. The
    model is then of the noisy images. Without noise an energy mostly learns that a VAE's backgrounds are not clean."""
    flips: Literal["auto", "random", "never"] = "auto"
    """Mirror training images left to right with probability 1/2; auto follows the data set's usual recipe."""
    num_validation: Annotated[int | None, at_least(1)] = None
    """Training images held out for validation, for data sets without a validation part; the default is a tenth."""
    skip_unreadable: bool = False
    """Image folders: skip unreadable files instead of refusing the folder. This reads every file at the start."""
    spacing: Annotated[float, POSITIVE] = 1.0
    """gaussians25: distance between neighbouring modes."""
    std: Annotated[float, POSITIVE] = 0.05
    """gaussians25: standard deviation of each mode."""
    num_points: Annotated[int, at_least(10)] = 100_000
    """gaussians25: training points; validation and test have a fifth of it each."""

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        if self.binarize:
            expected = "8 with data.binarize, which needs 8-bit values"
            require(self.num_bits == 8, "data.num-bits", expected, self.num_bits)
            require(not self.noise_sd, "data.noise-sd", "0 with data.binarize", self.noise_sd)
