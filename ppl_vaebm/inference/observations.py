"""What may be observed of an x: some of its values exactly, or a function of it with Normal noise.

Each kind of observation says the same thing twice: as the body of a Pyro program, which is the specification, and as a
transport of the noises that are left free, which is what chains evaluate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial, singledispatch
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
"""Standard deviations after which a blur's kernel is cut off; what is left out is 0.3 % of its mass."""

# --- operators -----------------------------------------------------------------------------------

Operator = Callable[[Tensor], Tensor]
"""What is measured of x: ``(n, *event)`` to ``(n, *out)``, differentiable, rows independent."""


def whole(x: Tensor) -> Tensor:
    """Measure every value of x."""
    return x


def values_at(mask: Tensor) -> Operator:
    """Measure the values of x at some coordinates.

    Args:
        mask: of the shape of x, true where it is measured.

    Returns:
        The operator, to ``(n, K)``.
    """
    return lambda x: x[:, mask]


def average_pooling(factor: int) -> Operator:
    """Measure an image at a lower resolution.

    Args:
        factor: side of the squares whose averages are measured, a divisor of the image's sides.

    Returns:
        The operator, ``(n, C, H, W)`` to ``(n, C, H / factor, W / factor)``.
    """
    return partial(functional.avg_pool2d, kernel_size=factor)


def gaussian_blur(sd: float) -> Operator:
    """Measure an image through a Gaussian blur; beyond its edge an image goes on as at its edge.

    Args:
        sd: of the blur, pixels.

    Returns:
        The operator, on ``(n, C, H, W)``.
    """
    radius = math.ceil(BLUR_RADIUS * sd)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sd).square()).softmax(0)

    def blur(x: Tensor) -> Tensor:
        line = weights.to(x).view(1, 1, 1, -1)
        planes = functional.pad(x.flatten(0, 1).unsqueeze(1), (radius,) * 4, mode="replicate")
        blurred = functional.conv2d(functional.conv2d(planes, line), line.transpose(-1, -2))
        return blurred.view_as(x)

    return blur


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Refuse what is no mask, or one that observes nothing.

    Args:
        mask: should be boolean.
        shape: of x.

    Raises:
        InputError: naming what it is instead.
    """
    if mask.shape != shape or mask.dtype != torch.bool:
        raise InputError(
            f"expected a boolean mask of shape {tuple(shape)}, that of x, found {mask.dtype} of shape "
            f"{tuple(mask.shape)}: mark with it which values are observed"
        )
    if not mask.any():
        raise InputError("expected a mask that is true where x is observed, found nothing observed: change the mask")


# --- parts of x ----------------------------------------------------------------------------------


@singledispatch
def at_mask(decoded: Decoded, mask: Tensor) -> Decoded:
    """Take the marginal of p(x | z) at some coordinates, which has to be independent of the others given z.

    Args:
        decoded: the distribution of x.
        mask: of the shape of x, on the CPU; true at the coordinates, which is at least one.

    Returns:
        The distribution of ``x[:, mask]``, in an event shape of its own.

    Raises:
        InputError: a discrete x; some channels of a pixel whose channels depend on each other.
    """
    raise InputError(
        "expected a decoder with a density to condition on, found one of discrete values: fit one with the decoder "
        "normal or logistic-mixture"
    )


@at_mask.register
def _(decoded: DecodedNormal, mask: Tensor) -> Decoded:
    return DecodedNormal(decoded.loc[:, mask], decoded.scale[:, mask])


@at_mask.register
def _(decoded: DecodedLogistics, mask: Tensor) -> Decoded:
    pixels = mask[0]
    if not (mask == pixels).all():
        raise InputError(
            "expected pixels observed in all their channels or in none, for a mixture of logistics ties them, found "
            "some observed in part: give one mask for all channels"
        )
    params = decoded.params
    blocks = (params.log_weights, params.loc, params.log_scale, params.coefs)
    return DecodedLogistics(MixtureParams(*(block[..., pixels].unsqueeze(-2) for block in blocks)), decoded.levels)


# --- observations --------------------------------------------------------------------------------


class Transported(NamedTuple):
    """What free noises stand for, given an observation."""

    x: Tensor
    """``(n, *event)``."""
    z: dict[str, Tensor]
    """Every latent."""
    loss: Tensor
    """Minus the log likelihood of what was observed, up to a constant, ``(n,)``, nats."""


class Observation(ABC):
    """Something observed of every x; one for all rows, or one for each of several groups of rows.

    Of G observations the rows of the first come first, then as many of the second, and so on.
    """

    num: int
    """Observations, G."""

    @abstractmethod
    def check(self, vae: HierarchicalVAE) -> None:
        """Refuse a model that this cannot be an observation of.

        Raises:
            InputError: naming what does not fit.
        """

    @abstractmethod
    def noise_shapes(self, vae: HierarchicalVAE) -> dict[str, torch.Size]:
        """Return the event shape of every noise that is left free."""

    @abstractmethod
    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Map free noises to what they stand for.

        Args:
            vae: the base measure.
            eps: every free noise, ``(n, *shape)``.

        Returns:
            x and z, and how well they agree with the observation.
        """

    @abstractmethod
    def program(self, vaebm: VAEBM, num: int) -> Tensor:
        """Run the VAEBM with this observed, as a Pyro program.

        Args:
            vaebm: the model.
            num: rows.

        Returns:
            x, ``(num, *event)``.
        """


class ExactValues(Observation):
    """The values of x itself at some coordinates.

    The others' noises stay free. The observed ones have the density ``p(x_observed | z)``: where p(x | z) is a Normal,
    minus its log is ``eps^2 / 2 + log scale`` summed over them, with ``eps = (x_observed - loc) / scale`` solved from
    what was observed. The scale does not cancel here, for nothing is transported.

    Args:
        x: ``(G, *event)``; where the mask is false its values are not read.
        mask: ``(*event)``, boolean, true where x is observed.

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
        self.num = len(x)
        self.mask = mask.cpu()
        self.values = x[:, mask]
        if not self.values.isfinite().all():
            raise InputError("expected finite values where x is observed, found others: correct them or the mask")
        flat = self.mask.flatten()
        self._order = torch.cat([flat.nonzero(), (~flat).nonzero()]).squeeze(1).argsort()

    def check(self, vae: HierarchicalVAE) -> None:
        """Refuse; see :meth:`Observation.check`."""
        if self.mask.shape != vae.model.event_shape:
            raise InputError(
                f"expected x of shape {tuple(vae.model.event_shape)}, found {tuple(self.mask.shape)}: give what was "
                "observed in the shape of the model's data"
            )
        zeros = {f"eps_{name}": self.values.new_zeros(1, *shape) for name, shape in vae.model.latent_shapes.items()}
        with torch.no_grad():
            at_mask(vae.decode_noise(zeros)[0], self.mask)

    def noise_shapes(self, vae: HierarchicalVAE) -> dict[str, torch.Size]:
        """Leave out the noise of the observed values; see :meth:`Observation.noise_shapes`."""
        shapes = vae.noise_shapes
        del shapes["eps_x"]
        return {**shapes, "eps_x_free": torch.Size([int((~self.mask).sum())])}

    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        """Transport the free part; see :meth:`Observation.transport`."""
        decoded, z = vae.decode_noise(eps)
        law = at_mask(decoded, self.mask).law()
        values = _per_row(self.values, len(eps["eps_x_free"]))
        free = at_mask(decoded, ~self.mask)
        x_free = free.transport(eps["eps_x_free"].view(-1, *free.law().event_shape)).flatten(1)
        loss: Tensor = -law.log_prob(values.view(-1, *law.event_shape))
        return Transported(self.compose(values, x_free), z, loss)

    def program(self, vaebm: VAEBM, num: int) -> Tensor:
        """Split the site of x in two, the first of which is observed; see :meth:`Observation.program`."""
        values = _per_row(self.values, num)
        with pyro.plate("data", num):
            z, state = vaebm.vae.model.walk(partial(_sample, temperature=vaebm.vae.model.temperature), num)
            decoded = vaebm.vae.model.decode(state)
            law = at_mask(decoded, self.mask).law()
            pyro.sample("x_observed", law, obs=values.view(-1, *law.event_shape))
            free: Tensor = pyro.sample("x_free", at_mask(decoded, ~self.mask).law())
            x = self.compose(values, free.flatten(1))
            pyro.factor("energy", -vaebm.energy(x, z))
        return x

    def compose(self, observed: Tensor, free: Tensor) -> Tensor:
        """Put x together.

        Args:
            observed: values where the mask is true, ``(n, K)``.
            free: values where it is false, ``(n, M)``.

        Returns:
            ``(n, *event)``.
        """
        joined = torch.cat([observed.to(free), free], dim=1)
        return joined[:, self._order.to(joined.device)].view(-1, *self.mask.shape)


class NoisyValues(Observation):
    """A function of x, with independent Normal noise: ``y = A x + noise``.

    All noises of the model stay free, and minus the log likelihood is ``|y - A x|^2 / (2 noise_sd^2)``.

    Args:
        y: what was measured, ``(G, *out)``.
        noise_sd: standard deviation of the noise, in the units of y.
        operator: A; any function of x that keeps rows apart.

    Raises:
        InputError: a noise that is not positive, or a measured value that is not finite.
    """

    def __init__(self, y: Tensor, noise_sd: float, operator: Operator = whole) -> None:
        if not 0 < noise_sd < math.inf:
            raise InputError(f"expected a standard deviation of the noise that is positive and finite, got {noise_sd}")
        if not y.isfinite().all():
            raise InputError("expected finite values where something was measured, found others: correct them")
        self.num = len(y)
        self.y, self.noise_sd, self.operator = y, noise_sd, operator

    def check(self, vae: HierarchicalVAE) -> None:
        """Refuse; see :meth:`Observation.check`."""
        found = self.operator(self.y.new_zeros(1, *vae.model.event_shape)).shape[1:]
        if found != self.y.shape[1:]:
            raise InputError(
                f"expected an observation of shape {tuple(found)}, which is what the operator makes of x, found "
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
            law = Independent(Normal(measured, self.noise_sd), measured.dim() - 1)
            pyro.sample("y", law, obs=_per_row(self.y, num))
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
