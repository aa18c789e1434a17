"""Named sites as the flat rows that kernels move, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Packing:
    """The only translator between named sites, whose event shapes it takes in order, and the rows of kernels."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self.dim = sum(self.sizes.values())

    def ravel(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Lay sites ``(C, *shape)`` side by side as ``(C, D)``."""
        return torch.cat([sites[name].flatten(1) for name in self.shapes], dim=1)

    def unravel(self, position: Tensor) -> dict[str, Tensor]:
        """Cut ``(C, D)`` into sites ``(C, *shape)``; ValueError for another number of columns."""
        if position.dim() != 2 or position.shape[1] != self.dim:
            raise ValueError(f"expected positions of shape (chains, {self.dim}), got {tuple(position.shape)}")
        parts = position.split(list(self.sizes.values()), dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def mean_square(self, position: Tensor) -> dict[str, Tensor]:
        """Return the mean square of each site's noise per chain, ``(C,)`` each; 1 on average under N(0, I)."""
        return {name: site.flatten(1).square().mean(1) for name, site in self.unravel(position).items()}
