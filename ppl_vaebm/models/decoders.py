"""Decoders: the distribution of x given the latents, and its transport ``x = T(eps)`` of standard normal noise.

The transport gives VAEBM's potential one form, ``E(x(eps)) + |eps|^2 / 2``, for all decoders.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import Bernoulli, Independent, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus
from torch.special import ndtri

from ppl_vaebm.config import ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.logistic_mixture import DiscretizedLogisticMixture, MixtureParams, display_mean, num_outputs
from ppl_vaebm.models.quantile_transport import logistic_mixture

# NVAE (Vahdat and Kautz 2020): raw outputs u pass through 5 tanh(u / 5), and a standard deviation has a floor of 0.01.
CLAMP = 5.0
MIN_SCALE = 0.01


def at_least_float32(raw: Tensor) -> Tensor:
    """Convert half precision, which networks may return, to float32, in which every density is computed."""
    return raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw


def soft_clamp(raw: Tensor) -> Tensor:
    """Bound a raw network output smoothly to (-5, 5); near 0 it is the identity."""
    return CLAMP * torch.tanh(raw / CLAMP)


def positive_scale(raw: Tensor) -> Tensor:
    """Turn a raw network output into a standard deviation in (0.0167, 148.4); raw 0 gives 1.01."""
    return soft_clamp(raw).exp() + MIN_SCALE


def diagonal_normal(loc: Tensor, scale: Tensor) -> Independent:
    """Make a diagonal Normal of batch shape ``(n,)`` from a mean ``(n, *event)`` and a scale that broadcasts to it."""
    return Independent(Normal(loc, scale.expand_as(loc)), loc.dim() - 1)


class Decoded(ABC):
    """``p(x | z)`` for one batch of latents."""

    @abstractmethod
    def distribution(self) -> TorchDistribution:
        """Return the distribution of x that :meth:`transport` draws from; batch shape ``(n,)``."""

    def discretized(self) -> TorchDistribution:
        """Return the density that observed data are scored by: the distribution, unless the decoder is discretised.

        Then it is constant over the cell of each pixel value, so that log densities of all decoders compare.
        """
        return self.distribution()

    @abstractmethod
    def transport(self, eps: Tensor) -> Tensor:
        """Map noise ``(n, *event)``, standard normal, to x of the same shape."""

    @abstractmethod
    def noise_of(self, x: Tensor) -> Tensor:
        """Invert :meth:`transport`; InputError for a discrete x, which many noises map to."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Return the x to plot for these latents, ``(n, *event)``."""


class DecodedNormal(Decoded):
    """A diagonal Normal with mean and positive scale ``(n, *event)``."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale

    def distribution(self) -> TorchDistribution:
        """Return the Normal."""
        return diagonal_normal(self.loc, self.scale)

    def transport(self, eps: Tensor) -> Tensor:
        """Shift and scale the noise."""
        return self.loc + self.scale * eps

    def noise_of(self, x: Tensor) -> Tensor:
        """Standardise x."""
        return (x - self.loc) / self.scale

    def mean(self) -> Tensor:
        """Return the Normal's mean."""
        return self.loc


class XScale(nn.Module):
    """Standard deviation of x given z: one trained number, or computed from the decoder's output.

    The kind ``sample`` averages that output over all coordinates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.min_scale = config.min_x_scale
        self.kind = config.x_scale
        self.raw = nn.Parameter(torch.tensor(math.log(config.init_x_scale - config.min_x_scale)))

    @property
    def num_outputs(self) -> int:
        """Decoder outputs per value of x."""
        return 1 if self.kind == "global" else 2

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Split the decoder's output along axis 1 into the mean and standard deviation of x, of one shape."""
        if self.kind == "global":
            return out, (self.min_scale + self.raw.exp()).expand_as(out)
        loc, raw = out.chunk(2, dim=1)
        if self.kind == "sample":
            raw = raw.mean(dim=tuple(range(1, raw.dim())), keepdim=True)
        return loc, (self.min_scale + (self.raw + soft_clamp(raw)).exp()).expand_as(loc)


class SignBernoulli(TorchDistribution):
    """Independent signs, the pixels of binarised images: 1 with probability ``sigmoid(logits)``, else -1."""

    arg_constraints = {"logits": constraints.real}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Return the integers from -1 to 1."""
        return constraints.integer_interval(-1, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SignBernoulli:
        """Broadcast to a batch shape."""
        return SignBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw signs from the global generator, ``(*sample_shape, *batch_shape)``."""
        drawn: Tensor = 2 * Bernoulli(logits=self.logits).sample(torch.Size(sample_shape)) - 1
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of signs, elementwise, nats."""
        if self._validate_args:
            self._validate_sample(value)
        return -softplus(-value * self.logits)


class DecodedBernoulli(Decoded):
    """Independent signs with logits ``(n, *event)`` of +1."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def distribution(self) -> TorchDistribution:
        """Return the signs' distribution."""
        return Independent(SignBernoulli(self.logits), self.logits.dim() - 1)

    def transport(self, eps: Tensor) -> Tensor:
        """Threshold the noise; the gradient of this step function is zero."""
        return torch.where(eps > -ndtri(self.logits.sigmoid()), 1.0, -1.0).to(eps.dtype)

    def noise_of(self, x: Tensor) -> Tensor:
        """Raise InputError: a half-line of noises maps to each sign."""
        raise InputError("a Bernoulli decoder has no noise for a given x; use the decoder normal or logistic-mixture")

    def mean(self) -> Tensor:
        """Return the mean sign, in (-1, 1)."""
        return torch.tanh(self.logits / 2)


class DecodedLogistics(Decoded):
    """A mixture of logistics in every pixel, with channels that depend on the ones before.

    :meth:`distribution` is continuous; :meth:`discretized` gives each of ``levels`` pixel values the mass of its cell.
    """

    def __init__(self, params: MixtureParams, levels: int) -> None:
        self.params, self.levels = params, levels
        self.continuous: TorchDistribution = logistic_mixture(params)

    def distribution(self) -> TorchDistribution:
        """Return the continuous mixture."""
        return self.continuous

    def discretized(self) -> TorchDistribution:
        """Return the discretised mixture."""
        return DiscretizedLogisticMixture(self.params, self.levels)

    def transport(self, eps: Tensor) -> Tensor:
        """Apply the quantile function, channel by channel."""
        x: Tensor = self.continuous.transforms[0](eps)
        return x

    def noise_of(self, x: Tensor) -> Tensor:
        """Apply the distribution function, channel by channel."""
        eps: Tensor = self.continuous.transforms[0].inv(x)
        return eps

    def mean(self) -> Tensor:
        """Return the mixture's mean, channel by channel within [-1, 1]."""
        return display_mean(self.params)


def num_decoder_outputs(decoder: str, num_channels: int, num_mixtures: int) -> int:
    """Count the network outputs per pixel that a decoder reads; ``decoder`` as in :class:`NvaeConfig`."""
    counts = {"bernoulli": num_channels, "normal": 2 * num_channels, "logistic": 2 * num_channels}
    return counts.get(decoder) or num_outputs(num_channels, num_mixtures)


def decoded(decoder: str, out: Tensor, num_channels: int, num_mixtures: int, levels: int | None) -> Decoded:
    """Convert a network's output, ``(n, outputs, H, W)``, to the distribution of x, in float32 at least.

    ``outputs`` is that of :func:`num_decoder_outputs`, and ``levels`` the number of pixel values, for the logistic
    decoders.
    """
    raw = at_least_float32(out)
    if decoder == "bernoulli":
        return DecodedBernoulli(raw)
    if decoder == "normal":
        raw_loc, raw_scale = raw.chunk(2, dim=1)
        return DecodedNormal(soft_clamp(raw_loc), positive_scale(raw_scale))
    assert levels is not None
    if decoder == "logistic":
        return DecodedLogistics(MixtureParams.from_raw_single(raw, num_channels), levels)
    return DecodedLogistics(MixtureParams.from_raw(raw, num_channels, num_mixtures), levels)
