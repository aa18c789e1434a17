"""How far draws are from the data: what experiments judge densities by."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.data.load import Data
from ppl_vaebm.data.pixels import quantised_as
from ppl_vaebm.data.splits import without_noise
from ppl_vaebm.evaluation.metrics.classification import frechet_distance
from ppl_vaebm.evaluation.metrics.features import FeatureNet, network_outputs
from ppl_vaebm.inference.potential import NoisePotential
from ppl_vaebm.inference.sampling import decode_in_blocks
from ppl_vaebm.rng import stream


class Judge:
    """Measures the Frechet distance of draws to the training data.

    Args:
        net: whose features count.
        data: the data; both they and the draws are rounded to their levels.
        seed: of the dequantisation, which the rounding undoes.
    """

    def __init__(self, net: FeatureNet, data: Data, seed: int) -> None:
        self.net, self.data = net, data
        self.real = self._features(
            without_noise(data.train).batch(torch.arange(len(data.train)), stream(seed, "judge"))
        )

    def __call__(self, potential: NoisePotential, position: Tensor) -> float | None:
        """Measure draws.

        Args:
            potential: of the VAEBM.
            position: noise, ``(n, D)``.

        Returns:
            The distance; ``None`` where a draw is not finite.
        """
        x = decode_in_blocks(potential, position)
        return frechet_distance(self._features(x), self.real) if bool(x.isfinite().all()) else None

    def of_data(self, num: int) -> float:
        """Measure as many training images against the others: what no sample of this size can be expected to beat."""
        return frechet_distance(self.real[:num], self.real[num:])

    def _features(self, x: Tensor) -> Tensor:
        return network_outputs(self.net, quantised_as(x, self.data)).features
