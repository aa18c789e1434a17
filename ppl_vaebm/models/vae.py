"""Interface of the hierarchical VAEs: a Pyro model and guide over one top-down pass.

The pass goes down the latent groups, ``z_1`` to ``z_L``, each a diagonal Normal given the groups above. Its caller
chooses every value: the model samples the prior, the guide the posterior, the transport computes ``loc + scale * eps``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.effect import GuideMessenger  # type: ignore[attr-defined]  # in no __all__
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_vaebm.models.decoders import Decoded, at_least_float32, diagonal_normal, soft_clamp

MAX_VALUES_PER_BLOCK = 1 << 21  # values of noise that are drawn together on a CPU; chosen by us
# Factor on that number on accelerators, where short kernels cost more to launch than to run. Chosen by us.
ACCELERATOR_FACTOR = 16


class Prior(NamedTuple):
    """Prior of a latent group, given the groups above: a diagonal Normal."""

    loc: Tensor
    """Mean, ``(n, *event)``."""
    scale: Tensor
    """Standard deviation, same shape."""
    raw: tuple[Tensor, Tensor] | None = None
    """Network outputs for the two before they are bounded; a residual posterior adds to them."""

    def distribution(self, temperature: float) -> TorchDistribution:
        """Return the Normal with its standard deviation times a temperature, batch shape ``(n,)``."""
        return diagonal_normal(self.loc, temperature * self.scale)


Choose = Callable[[str, Prior, Tensor], Tensor]
"""Chooses the value of a site, ``(n, *event)``, from its name, its prior and the features that gave the prior."""


class Generator(PyroModule):
    """The Pyro model ``p(x, z)``; its forward pass is the program."""

    latent_shapes: dict[str, torch.Size]
    """Event shape of each latent site, coarsest first."""
    event_shape: torch.Size
    """Event shape of ``x``."""
    temperature: float = 1.0
    """Factor on the standard deviation of every prior, in program and transport; 1 in training, set by a VAEBM."""

    def __init__(self) -> None:
        # The prefix of its parameters' names. Without one, pyro.infer.SVI takes layers of model and guide that have the
        # same attribute name for one parameter, and never trains the first of them.
        super().__init__("model")

    @abstractmethod
    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy with ``num`` rows; return the latents, and the features that :meth:`decode` reads."""

    @abstractmethod
    def decode(self, state: Tensor) -> Decoded:
        """Compute the distribution of ``x`` from the features at the end of a walk."""

    def forward(
        self, x: Tensor | None = None, num: int | None = None, is_discretized: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program.

        Args:
            x: data to observe, ``(n, *event_shape)``; ``None`` samples it.
            num: rows to sample where ``x`` is not given; ValueError if neither is.
            is_discretized: score data by :meth:`Decoded.discretized`, not by the distribution of samples.

        Returns:
            ``x`` and the latents.
        """
        rows = num_rows(x, num)
        with pyro.plate("data", rows):
            return self.sites(x, rows, is_discretized and x is not None)

    def sites(self, x: Tensor | None, num: int, is_discretized: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the body of :meth:`forward`, inside a plate of ``num`` rows that the caller opened."""
        z, state = self.walk(partial(_sample, temperature=self.temperature), num)
        decoded = self.decode(state)
        return pyro.sample("x", decoded.discretized() if is_discretized else decoded.distribution(), obs=x), z

    def first_prior(self, num: int) -> Prior:
        """Return the prior of the first group for ``num`` rows: N(0, I)."""
        like = next(self.parameters())
        shape = (num, *next(iter(self.latent_shapes.values())))
        return Prior(like.new_zeros(shape), like.new_ones(shape))

    def first_state(self, num: int) -> Tensor:
        """Return the features that the first group's posterior reads, for ``num`` rows; by default the prior's mean."""
        return self.first_prior(num).loc


def num_rows(x: Tensor | None, num: int | None) -> int:
    """Return the number of rows of a program: those of the data, else ``num``."""
    if x is not None:
        return len(x)
    if num is None:
        raise ValueError("give the data x, or the number of draws num")
    return num


def _sample(name: str, prior: Prior, state: Tensor, temperature: float) -> Tensor:
    # OnePass reads "group".
    infer: Any = {"group": (prior, state)}
    value: Tensor = pyro.sample(name, prior.distribution(temperature), infer=infer)
    return value


class Guide(PyroModule):
    """The Pyro guide ``q(z | x)``: the generator's walk with each group's posterior in place of its prior.

    The generator is no submodule, so that its weights are stored once.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__("guide")
        self._generator = (generator,)  # in a tuple, which hides it from nn.Module's registration

    @property
    def generator(self) -> Generator:
        """The model."""
        return self._generator[0]

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of ``x`` that each group's posterior reads, by site name."""

    @abstractmethod
    def posterior(self, name: str, prior: Prior, features: Tensor, state: Tensor) -> TorchDistribution:
        """Compute the posterior of the group at a site, batch shape ``(n,)``, given ``x`` and the groups above.

        ``features`` of ``x`` are from :meth:`encode`; ``state`` are the features that gave the group's prior.
        """

    def forward(self, x: Tensor, num: int | None = None) -> dict[str, Tensor]:
        """Run the program on data ``(n, *event_shape)`` and return the latents; Pyro passes ``num`` to models too."""
        features = self.encode(x)

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            value: Tensor = pyro.sample(name, self.posterior(name, prior, features[name], state))
            return value

        with pyro.plate("data", len(x)):
            return self.generator.walk(choose, len(x))[0]


class RelativeGuide(Guide):
    """A guide with posteriors relative to the priors, ``N(loc_p + scale_p * shift, (scale_p * exp(log ratio))^2)``."""

    @abstractmethod
    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Compute shift and log ratio of one group, stacked along axis 1: ``(n, 2 * event[0], ...)``."""

    def posterior(self, name: str, prior: Prior, features: Tensor, state: Tensor) -> TorchDistribution:
        """Shift and scale the prior; see :meth:`Guide.posterior`."""
        shift, log_ratio = at_least_float32(self.head(name, features, state)).chunk(2, dim=1)
        return diagonal_normal(prior.loc + prior.scale * shift, prior.scale * soft_clamp(log_ratio).exp())


class OnePass(GuideMessenger):
    """Model and guide in one walk; for :meth:`pyro.infer.ELBO.loss` it stands in for the guide.

    A guide's walk computes every prior, so a second walk for the model's trace would run the top-down networks again.
    As an effect handler on the model, the guide replaces each group's distribution, and one run gives both traces.

    Args:
        guide: of the model.
        num_draws: rows of latents per row of data; the encoder runs once for all of them.
        is_discretized: as in :meth:`Generator.forward`.
    """

    def __init__(self, guide: Guide, num_draws: int = 1, is_discretized: bool = True) -> None:
        super().__init__(guide.generator)
        self.guide, self.num_draws, self.is_discretized = guide, num_draws, is_discretized

    def __call__(self, x: Tensor, num: int | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Run the model under the guide on data ``(n, *event_shape)``; ``num`` as in :meth:`Guide.forward`.

        Returns:
            The value of every sample site, ``n * num_draws`` rows, those of one data point together.
        """
        features = self.guide.encode(x)
        if self.num_draws > 1:
            features = {name: value.repeat_interleave(self.num_draws, 0) for name, value in features.items()}
            x = x.repeat_interleave(self.num_draws, 0)
        self._features = features
        return super().__call__(x, is_discretized=self.is_discretized)

    def _pyro_sample(self, msg: Any) -> None:
        self._group = msg["infer"].get("group")
        super()._pyro_sample(msg)

    def get_posterior(self, name: str, prior: TorchDistribution) -> TorchDistribution:
        """Return the guide's posterior at a site of the model; called by Pyro."""
        group, state = self._group
        return self.guide.posterior(name, group, self._features[name], state)


class HierarchicalVAE(nn.Module):
    """A VAE: the Pyro programs ``p(x, z)`` and ``q(z | x)`` over one generator, and its transport."""

    def __init__(self, model: Generator, guide: Guide) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    @property
    def rows_per_block(self) -> int:
        """Rows whose random numbers are drawn together. Memory does not change it: see ``NoisePotential``."""
        values = sum(shape.numel() for shape in self.noise_shapes.values())
        factor = 1 if next(self.parameters()).device.type == "cpu" else ACCELERATOR_FACTOR
        return max(1, factor * MAX_VALUES_PER_BLOCK // values)

    @property
    def noise_shapes(self) -> dict[str, torch.Size]:
        """Event shape of every noise, ``eps_z_1`` to ``eps_x``."""
        shapes = {f"eps_{name}": shape for name, shape in self.model.latent_shapes.items()}
        return {**shapes, "eps_x": self.model.event_shape}

    def transport(self, eps: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Map noise, ``(n, *shape)`` each, to ``z_l = loc_l + t * scale_l * eps_l``, and then to x.

        t is the model's temperature. Returns ``x``, ``(n, *event_shape)``, and the latents; for the shapes of the noise
        see :attr:`noise_shapes`.
        """
        decoded, z = self.decode_noise(eps)
        return decoded.transport(eps["eps_x"]), z

    def decode_noise(self, eps: Mapping[str, Tensor]) -> tuple[Decoded, dict[str, Tensor]]:
        """Map the noise of the latents to ``p(x | z)`` and z; the noise of x is not read."""

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            return prior.loc + self.model.temperature * prior.scale * eps[f"eps_{name}"]

        z, state = self.model.walk(choose, len(next(iter(eps.values()))))
        return self.model.decode(state), z

    def first_latent(self, eps: Tensor) -> dict[str, Tensor]:
        """Map the first group's noise, ``(n, *shape)``, to the first latent by its name; no network runs."""
        prior = self.model.first_prior(len(eps))
        name = next(iter(self.model.latent_shapes))
        return {name: prior.loc + self.model.temperature * prior.scale * eps}

    def first_posterior(self, x: Tensor) -> TorchDistribution:
        """Compute the first latent's posterior, batch shape ``(n,)``, given data ``(n, *event_shape)``."""
        name = next(iter(self.model.latent_shapes))
        prior, state = self.model.first_prior(len(x)), self.model.first_state(len(x))
        return self.guide.posterior(name, prior, self.guide.encode(x)[name], state)

    def noise_of(self, x: Tensor, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Invert :meth:`transport`: map ``x`` and every latent to the noises; InputError where x is discrete."""
        eps: dict[str, Tensor] = {}

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            eps[f"eps_{name}"] = (z[name] - prior.loc) / (self.model.temperature * prior.scale)
            return z[name]

        state = self.model.walk(choose, len(x))[1]
        eps["eps_x"] = self.model.decode(state).noise_of(x)
        return eps
