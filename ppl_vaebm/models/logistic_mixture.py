"""Mixtures of logistics over the channels of every pixel: their parameters, and their densities.

PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517) with the parameters of NVAE (Vahdat and Kautz 2020). Every pixel
has M components with weights w_i; component i gives channel c a logistic of mean m_ic and scale s_ic, and the means
of later channels move with the earlier ones: green m_G + a * red, blue m_B + b * red + c * green. Pixels are
independent. Shapes below are ``(n, C, H, W)`` for images; leading axes beyond n broadcast, as a ``sample_shape`` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

# Floors of the log scales: PixelCNN++ and NVAE's mixture; NVAE's single logistic.
MIN_LOG_SCALE_MIXTURE = -7.0
MIN_LOG_SCALE_SINGLE = -8.0

# --- parameters ----------------------------------------------------------------------------------


def num_outputs(num_channels: int, num_components: int | None = None) -> int:
    """Count the network outputs per pixel: ``M * (1 + 2 C + C (C - 1) / 2)``, or ``2 C`` for a single logistic."""
    if num_components is None:
        return 2 * num_channels
    return num_components * (1 + 2 * num_channels + _num_coefs(num_channels))


def _num_coefs(num_channels: int) -> int:
    return num_channels * (num_channels - 1) // 2


@dataclass(frozen=True, eq=False)
class MixtureParams:
    """Parameters of the mixture at every pixel, at least float32."""

    log_weights: Tensor
    """``(n, M, H, W)``, normalised over M."""
    loc: Tensor
    """Means before the earlier channels move them, ``(n, C, M, H, W)``, in the units of the pixels, [-1, 1]."""
    log_scale: Tensor
    """Logarithms of the logistic scales, ``(n, C, M, H, W)``."""
    coefs: Tensor
    """Pulls of earlier channels, ``(n, C(C-1)/2, M, H, W)``, in (-1, 1): row by row of the lower triangle."""

    @staticmethod
    def from_raw(out: Tensor, num_channels: int, num_components: int) -> MixtureParams:
        """Read a mixture off a network's output ``(n, K, H, W)``, K from :func:`num_outputs`; ValueError for another K.

        The outputs are M logits, C * M means, C * M log scales, bounded to at least -7, and the raw coefficients, each
        block with M last. The official codes interleave the blocks channel by channel instead.
        """
        out = _checked_raw(out, num_outputs(num_channels, num_components))
        blocks = out.unflatten(1, (-1, num_components))
        sizes = (1, num_channels, num_channels, _num_coefs(num_channels))
        logits, loc, log_scale, coefs = blocks.split(sizes, 1)
        log_weights = torch.log_softmax(logits.squeeze(1), 1)
        return MixtureParams(log_weights, loc, log_scale.clamp_min(MIN_LOG_SCALE_MIXTURE), coefs.tanh())

    @staticmethod
    def from_raw_single(out: Tensor, num_channels: int) -> MixtureParams:
        """Read independent logistics off an output ``(n, 2 C, H, W)``: C means, then C log scales of at least -8.

        The mixture has M = 1 and coefficients 0. ValueError for another number of outputs.
        """
        loc, log_scale = _checked_raw(out, num_outputs(num_channels)).unsqueeze(2).chunk(2, 1)
        coefs = loc.new_zeros(()).expand(len(out), _num_coefs(num_channels), *loc.shape[2:])
        return MixtureParams(torch.zeros_like(loc[:, 0]), loc, log_scale.clamp_min(MIN_LOG_SCALE_SINGLE), coefs)

    @property
    def num_channels(self) -> int:
        """C."""
        return self.loc.shape[-4]

    @property
    def batch_shape(self) -> torch.Size:
        """``(n,)``."""
        return self.loc.shape[:-4]

    @property
    def event_shape(self) -> torch.Size:
        """``(C, H, W)``."""
        return torch.Size((self.num_channels, *self.loc.shape[-2:]))

    def channel_loc(self, channel: int, earlier: Sequence[Tensor]) -> Tensor:
        """Move the means of a channel, ``(n, M, H, W)``, by the channels before it, each ``(n, H, W)``."""
        loc = self.loc.select(-4, channel)
        for index, value in enumerate(earlier, start=_num_coefs(channel)):
            loc = loc + self.coefs.select(-4, index) * value.unsqueeze(-3)
        return loc

    def conditional_loc(self, x: Tensor) -> Tensor:
        """Move the means of every channel, ``(n, C, M, H, W)``, by the channels before it in x, ``(n, C, H, W)``."""
        values = x.unbind(-3)
        locs = [self.channel_loc(channel, values[:channel]) for channel in range(self.num_channels)]
        return torch.stack(torch.broadcast_tensors(*locs), -4)

    def log_density(self, x: Tensor) -> Tensor:
        """Evaluate the continuous density of any real ``(n, C, H, W)``, ``(n,)``, nats.

        It is the sum over pixels of ``logsumexp_i(log w_i + sum_c log f_ic(x_c))``.
        """
        log_densities = log_logistic(x.unsqueeze(-3), self.conditional_loc(x), self.log_scale)
        return torch.logsumexp(self.log_weights + log_densities.sum(-4), -3).sum((-2, -1))

    def pick(self, chosen: Tensor) -> MixtureParams:
        """Keep one component per pixel, chosen by ``(*sample_shape, n, H, W)``, int64; the result has M = 1."""
        indices = chosen[..., None, None, :, :]
        lead = chosen.shape[:-2]
        loc, log_scale, coefs = (
            torch.take_along_dim(block.expand(lead + block.shape[-4:]), indices, -3)
            for block in (self.loc, self.log_scale, self.coefs)
        )
        return MixtureParams(torch.zeros_like(loc.select(-4, 0)), loc, log_scale, coefs)


def _checked_raw(out: Tensor, expected: int) -> Tensor:
    if out.dim() != 4 or out.shape[1] != expected:
        raise ValueError(
            f"expected raw outputs of shape (n, {expected}, H, W), got {tuple(out.shape)}; "
            "give the output head num_outputs(num_channels, num_components) channels"
        )
    return out if out.dtype.itemsize >= 4 else out.float()


def display_mean(params: MixtureParams) -> Tensor:
    """Make the picture that NVAE shows, ``(n, C, H, W)`` in [-1, 1]: weighted parameters, channels clipped in turn.

    It is not the mixture's mean: means and coefficients are averaged before they are multiplied.
    """
    weights = params.log_weights.exp().unsqueeze(-4)
    loc, log_scale, coefs = (
        (weights * block).sum(-3, keepdim=True) for block in (params.loc, params.log_scale, params.coefs)
    )
    average = MixtureParams(torch.zeros_like(loc.select(-4, 0)), loc, log_scale, coefs)
    values: list[Tensor] = []
    for channel in range(params.num_channels):
        values.append(average.channel_loc(channel, values).squeeze(-3).clamp(-1, 1))
    return torch.stack(values, -3)


# --- one logistic --------------------------------------------------------------------------------


def log_sigmoid(z: Tensor) -> Tensor:
    """Evaluate the log of the sigmoid, elementwise."""
    # torch's logsigmoid is half as fast on a CPU, and softplus's own threshold of 20 is too coarse for float64.
    return -torch.nn.functional.softplus(-z, threshold=40)


def log_logistic(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Evaluate the log density of a logistic, elementwise, nats."""
    z = (x - loc) * (-log_scale).exp()
    return 2 * log_sigmoid(z) - z - log_scale


# --- the discretised mixture ---------------------------------------------------------------------


class DiscretizedLogisticMixture(TorchDistribution):
    """The mixture of discretised pixels, as a density that is constant over each level's cell.

    Level k of L has the cell ``[2 k / L - 1, 2 (k + 1) / L - 1)`` and the mixture's probability of it; the first and
    the last cell take the tails. Later channels see the centres of the earlier channels' cells, so that dequantisation
    noise changes no probability. The official codes put the outermost levels at -1 and 1 and spread L levels over
    cells of width 2 / (L - 1), and they replace cells of probability under 1e-5 by the density at the centre; here
    the identity ``sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))`` in logs is exact in every cell,
    so the probabilities sum to 1.

    ``validate_args`` makes ``log_prob`` refuse values outside [-1, 1]; ``None`` takes torch's setting.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.interval(-1, 1), 3)

    def __init__(self, params: MixtureParams, levels: int, validate_args: bool | None = None) -> None:
        self.params, self.levels = params, levels
        super().__init__(params.batch_shape, params.event_shape, validate_args=validate_args)

    def log_prob(self, y: Tensor) -> Tensor:
        """Evaluate the density of pixels ``(n, C, H, W)`` in [-1, 1], ``(n,)``, nats.

        Adding ``log(2 / levels)`` per coordinate gives the log probability of the levels. ValueError for a pixel
        outside [-1, 1], where validation is on.
        """
        if self._validate_args and (is_bad := ~((y >= -1) & (y <= 1))).any():
            raise ValueError(
                f"expected pixels in [-1, 1], got {int(is_bad.sum())} of {y.numel()} outside, the first of them "
                f"{float(y[is_bad][0])}; scale the pixels, or clip them"
            )
        return self.log_prob_levels(self._level(y)) + self.event_shape.numel() * math.log(self.levels / 2)

    def log_prob_levels(self, k: Tensor) -> Tensor:
        """Evaluate the log probability, ``(n,)``, nats, of levels ``(n, C, H, W)`` in {0, ..., levels - 1}."""
        k = k.to(self.params.loc.dtype)
        log_masses = self._log_mass(k.unsqueeze(-3), self.params.conditional_loc(self._centre(k)))
        return torch.logsumexp(self.params.log_weights + log_masses.sum(-4), -3).sum((-2, -1))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw centres of cells, ``(*sample_shape, n, C, H, W)``, from torch's global generator."""
        logits = self.params.log_weights.movedim(-3, -1)
        picked = self.params.pick(Categorical(logits=logits).sample(torch.Size(sample_shape)))
        values: list[Tensor] = []
        for channel in range(picked.num_channels):
            loc, log_scale = picked.channel_loc(channel, values), picked.log_scale.select(-4, channel)
            x = loc + log_scale.exp() * torch.rand_like(loc).logit()
            values.append(self._centre(self._level(x)).squeeze(-3))
        return torch.stack(values, -3)

    def _level(self, y: Tensor) -> Tensor:
        return ((y + 1) * (self.levels / 2)).floor().clamp(0, self.levels - 1)

    def _centre(self, k: Tensor) -> Tensor:
        return (2 * k + (1 - self.levels)) / self.levels

    def _log_mass(self, k: Tensor, loc: Tensor) -> Tensor:
        """Evaluate each component's log probability of level k of each channel, ``(n, C, M, H, W)``."""
        inv_scale = (-self.params.log_scale).exp()
        # Neighbouring cells must agree on their edge to the last bit, or the probabilities do not sum to 1.
        lower, upper = ((2 * k + (offset - self.levels)) / self.levels for offset in (0, 2))
        is_first, is_last = k == 0, k == self.levels - 1
        log_below = log_sigmoid((upper - loc) * inv_scale).masked_fill(is_last, 0)
        log_above = log_sigmoid((loc - lower) * inv_scale).masked_fill(is_first, 0)
        log_inside = (-torch.expm1(-2 / self.levels * inv_scale)).log()
        return log_below + log_above + log_inside.masked_fill(is_first | is_last, 0)
