"""Observations of x: some of its values exactly, or a function of it with Normal noise.

Each kind has two forms: the body of a Pyro program, which is the specification, and a transport of the noises that are
left free, which chains evaluate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, partial, singledispatch
from typing import NamedTuple

import pyro
import torch
from pyro.distributions import Independent, Normal
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import Decoded, DecodedLogistics, DecodedNormal
from ppl_vaebm.models.logistic_mixture import MixtureParams
from ppl_vaebm.models.vae import HierarchicalVAE, Prior
from ppl_vaebm.models.vaebm import VAEBM

BLUR_RADIUS = 3.0
"""Standard deviations after which a blur's kernel is cut off; 0.3 % of its mass is left out."""

# --- operators -----------------------------------------------------------------------------------

Operator = Callable[[Tensor], Tensor]
"""A measurement of x: ``(n, *event)`` to ``(n, *out)``, differentiable, rows independent."""


def whole(x: Tensor) -> Tensor:
    """Measure every value of x."""
    return x


def values_at(mask: Tensor) -> Operator:
    """Measure the K values of x, ``(n, *event)``, where a boolean mask ``(*event)`` is true: ``(n, K)``."""
    coordinates = cache(_coordinates(mask).to)  # one copy to each device, not one for each evaluation
    return lambda x: x.flatten(1)[:, coordinates(x.device)]


def average_pooling(factor: int) -> Operator:
    """Measure the averages over squares of an image, ``(n, C, H, W)`` to ``(n, C, H / factor, W / factor)``."""
    return partial(functional.avg_pool2d, kernel_size=factor)


def gaussian_blur(sd: float) -> Operator:
    """Measure an image ``(n, C, H, W)`` through a Gaussian blur of ``sd`` pixels; its edge is repeated outwards."""
    radius = math.ceil(BLUR_RADIUS * sd)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = cache((-0.5 * (offsets / sd).square()).softmax(0).view(1, 1, 1, -1).to)

    def blur(x: Tensor) -> Tensor:
        line = kernel(x.device, x.dtype)
        planes = functional.pad(x.flatten(0, 1).unsqueeze(1), (radius,) * 4, mode="replicate")
        blurred = functional.conv2d(functional.conv2d(planes, line), line.transpose(-1, -2))
        return blurred.view_as(x)

    return blur


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise InputError unless a mask is boolean, has the shape of x, and is true somewhere."""
    if mask.shape != shape or mask.dtype != torch.bool:
        raise InputError(
            f"expected a boolean mask of shape {tuple(shape)}, that of x, found {mask.dtype} of shape "
            f"{tuple(mask.shape)}: mark with it which values are observed"
        )
    if not mask.any():
        raise InputError("expected a mask that is true where x is observed, found nothing observed: change the mask")


def _coordinates(mask: Tensor) -> Tensor:
    """Return the places in the flat x where a mask is true, ``(K,)``."""
    return mask.flatten().nonzero().squeeze(1)


# --- parts of x ----------------------------------------------------------------------------------


@singledispatch
def at_coordinates(decoded: Decoded, coordinates: Tensor) -> Decoded:
    """Return the distribution of ``x.flatten(1)[:, coordinates]`` given z, in an event shape of its own.

    The coordinates ``(K,)`` increase, are on the device of x, and are independent of the others given z: those of a
    mixture of logistics are all channels of some pixels. InputError for a discrete x.
    """
    raise InputError(
        "expected a decoder with a density to condition on, found one of discrete values: fit one with the decoder "
        "normal or logistic-mixture"
    )


@at_coordinates.register
def _(decoded: DecodedNormal, coordinates: Tensor) -> Decoded:
    return DecodedNormal(decoded.loc.flatten(1)[:, coordinates], decoded.scale.flatten(1)[:, coordinates])


@at_coordinates.register
def _(decoded: DecodedLogistics, coordinates: Tensor) -> Decoded:
    params = decoded.params
    pixels = coordinates[: len(coordinates) // params.loc.shape[1]]  # those of the first channel come first
    blocks = (params.log_weights, params.loc, params.log_scale, params.coefs)
    return DecodedLogistics(MixtureParams(*(block.flatten(-2)[..., None, pixels] for block in blocks)), decoded.levels)


# --- observations --------------------------------------------------------------------------------


class Transported(NamedTuple):
    """Image of free noises under the transport of an observation."""

    x: Tensor
    """``(n, *event)``."""
    z: dict[str, Tensor]
    """Every latent."""
    loss: Tensor
    """Minus the log likelihood of the observation, up to a constant, ``(n,)``, nats."""


class Observation(ABC):
    """An observation of x for all rows, or G of them: the rows of the first come first, then as many of the second."""

    num: int
    """Observations, G."""

    @abstractmethod
    def check(self, vae: HierarchicalVAE) -> None:
        """Raise InputError for a model that this cannot be an observation of."""

    @abstractmethod
    def noise_shapes(self, vae: HierarchicalVAE) -> dict[str, torch.Size]:
        """Return the event shape of every noise that is left free."""

    @abstractmethod
    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Map every free noise, ``(n, *shape)``, to x, z and the loss of the observation."""

    @abstractmethod
    def program(self, vaebm: VAEBM, num: int) -> Tensor:
        """Run the VAEBM with this observed, as a Pyro program; return x, ``(num, *event)``."""


class ExactValues(Observation):
    """The values of x itself at some coordinates; the noises of the others stay free.

    The loss is ``-log p(x_observed | z)``. Where p(x | z) is a Normal it is ``eps^2 / 2 + log scale`` summed over the
    observed coordinates, with ``eps = (x_observed - loc) / scale``: the scale does not cancel, because these values are
    not transported. x, ``(G, *event)``, is on the device of the model; where the mask, ``(*event)``, boolean, is false,
    its values are not read.

    Raises:
        InputError: shapes that do not fit; nothing or everything observed; an observed value that is not finite.
    """

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        check_mask(mask, x.shape[1:])
        if mask.all():
            raise InputError(
                "expected a part of x observed and a part not, found everything observed: change the mask, or state "
                "the noise of the observation"
            )
        self.num, self.mask = len(x), mask
        self.observed, self.free = _coordinates(mask).to(x.device), _coordinates(~mask).to(x.device)
        """Places in the flat x that are observed, ``(K,)``, and those that are not, ``(M,)``."""
        self.values = x.flatten(1)[:, self.observed]
        if not self.values.isfinite().all():
            raise InputError("expected finite values where x is observed, found others: correct them or the mask")
        self._order = torch.cat([self.observed, self.free]).argsort()

    def check(self, vae: HierarchicalVAE) -> None:
        """Raise InputError for x of another shape, a discrete x, or pixels that a mixture of logistics would split."""
        if self.mask.shape != vae.model.event_shape:
            raise InputError(
                f"expected x of shape {tuple(vae.model.event_shape)}, found {tuple(self.mask.shape)}: give what was "
                "observed in the shape of the model's data"
            )
        zeros = {f"eps_{name}": self.values.new_zeros(1, *shape) for name, shape in vae.model.latent_shapes.items()}
        with torch.no_grad():
            decoded = vae.decode_noise(zeros)[0]
        if isinstance(decoded, DecodedLogistics) and not (self.mask == self.mask[0]).all():
            raise InputError(
                "expected pixels observed in all their channels or in none, for a mixture of logistics ties them, "
                "found some observed in part: give one mask for all channels"
            )
        at_coordinates(decoded, self.observed)

    def noise_shapes(self, vae: HierarchicalVAE) -> dict[str, torch.Size]:
        """Leave out the noise of the observed values; see :meth:`Observation.noise_shapes`."""
        shapes = vae.noise_shapes
        del shapes["eps_x"]
        return {**shapes, "eps_x_free": self.free.shape}

    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Transport the free part; see :meth:`Observation.transport`."""
        decoded, z = vae.decode_noise(eps)
        p_observed = at_coordinates(decoded, self.observed).distribution()
        values = _per_row(self.values, len(eps["eps_x_free"]))
        free = at_coordinates(decoded, self.free)
        x_free = free.transport(eps["eps_x_free"].view(-1, *free.distribution().event_shape)).flatten(1)
        loss: Tensor = -p_observed.log_prob(values.view(-1, *p_observed.event_shape))
        return Transported(self._joined(values, x_free), z, loss)

    def program(self, vaebm: VAEBM, num: int) -> Tensor:
        """Split the site of x in two, the first of which is observed; see :meth:`Observation.program`."""
        values = _per_row(self.values, num)
        with pyro.plate("data", num):
            z, state = vaebm.vae.model.walk(partial(_sample, temperature=vaebm.vae.model.temperature), num)
            decoded = vaebm.vae.model.decode(state)
            p_observed = at_coordinates(decoded, self.observed).distribution()
            pyro.sample("x_observed", p_observed, obs=values.view(-1, *p_observed.event_shape))
            free: Tensor = pyro.sample("x_free", at_coordinates(decoded, self.free).distribution())
            x = self._joined(values, free.flatten(1))
            pyro.factor("energy", -vaebm.energy(x, z))
        return x

    def _joined(self, observed: Tensor, free: Tensor) -> Tensor:
        """Put x together from its observed values ``(n, K)`` and its free ones ``(n, M)``."""
        return torch.cat([observed.to(free), free], dim=1)[:, self._order].view(-1, *self.mask.shape)


class NoisyValues(Observation):
    """A function of x with independent Normal noise: ``y = A x + noise``, ``(G, *out)``, A the operator.

    All noises of the model stay free, and minus the log likelihood is ``|y - A x|^2 / (2 noise_sd^2)``.

    Raises:
        InputError: a noise that is not positive, or a measured value that is not finite.
    """

    def __init__(self, y: Tensor, noise_sd: float, operator: Operator = whole) -> None:
        if not 0 < noise_sd < math.inf:
            raise InputError(f"expected a standard deviation of the noise that is positive and finite, got {noise_sd}")
        if not y.isfinite().all():
            raise InputError("expected finite values where something was measured, found others: correct them")
        self.num, self.y, self.noise_sd, self.operator = len(y), y, noise_sd, operator

    def check(self, vae: HierarchicalVAE) -> None:
        """Raise InputError where the operator makes another shape of x than that of the observation."""
        shape = self.operator(self.y.new_zeros(1, *vae.model.event_shape)).shape[1:]
        if shape != self.y.shape[1:]:
            raise InputError(
                f"expected an observation of shape {tuple(shape)}, which is what the operator makes of x, found "
                f"{tuple(self.y.shape[1:])}: give one of that shape"
            )

    def noise_shapes(self, vae: HierarchicalVAE) -> dict[str, torch.Size]:
        """Return all; see :meth:`Observation.noise_shapes`."""
        return vae.noise_shapes

    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Transport all noises; see :meth:`Observation.transport`."""
        x, z = vae.transport(eps)
        residual = (_per_row(self.y, len(x)) - self.operator(x)) / self.noise_sd
        return Transported(x, z, 0.5 * residual.square().flatten(1).sum(1))

    def program(self, vaebm: VAEBM, num: int) -> Tensor:
        """Add a site y; see :meth:`Observation.program`."""
        x, _ = vaebm(num=num)
        measured = self.operator(x)
        with pyro.plate("measurements", num):
            p_y = Independent(Normal(measured, self.noise_sd), measured.dim() - 1)
            pyro.sample("y", p_y, obs=_per_row(self.y, num))
        assert isinstance(x, Tensor)
        return x


def _sample(name: str, prior: Prior, state: Tensor, temperature: float) -> Tensor:
    value: Tensor = pyro.sample(name, prior.distribution(temperature))
    return value


def _per_row(values: Tensor, num: int) -> Tensor:
    """Repeat each observation for its rows, ``(G, ...)`` to ``(num, ...)``."""
    if num % len(values):
        raise ValueError(f"expected a multiple of {len(values)} rows, as many for each observation, got {num}")
    return values.repeat_interleave(num // len(values), 0)
