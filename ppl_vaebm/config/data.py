"""What to model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ppl_vaebm.config.checks import require

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
        require(self.spacing > 0, "data.spacing", "positive", self.spacing)
        require(self.std > 0, "data.std", "positive", self.std)
        require(self.num_points >= 10, "data.num-points", "at least 10", self.num_points)
        require(self.image_size is None or self.image_size >= 4, "data.image-size", "at least 4", self.image_size)
        require(self.padding is None or self.padding >= 0, "data.padding", "0 or more", self.padding)
        require(1 <= self.num_bits <= 8, "data.num-bits", "in 1..8", self.num_bits)
        expected = "8 with data.binarize, which draws from all levels"
        require(self.num_bits == 8 or not self.binarize, "data.num-bits", expected, self.num_bits)
        require(self.noise_sd >= 0, "data.noise-sd", "0 or more", self.noise_sd)
        require(not (self.binarize and self.noise_sd), "data.noise-sd", "0 with data.binarize", self.noise_sd)
        num = self.num_validation
        require(num is None or num >= 1, "data.num-validation", "at least 1", num)
