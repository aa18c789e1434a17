"""What every hierarchical VAE is here: a Pyro model and guide over one top-down pass.

The generator walks down its latent groups, ``z_1`` to ``z_L``, each a diagonal Normal given the groups
above, and ends in ``x`` given all of them. Who walks decides how each value is chosen: the
Pyro model samples, the guide samples its posterior, :meth:`HierarchicalVAE.transport` computes
``loc + scale * eps``. There is one description of the pass, so the three cannot disagree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.effect import GuideMessenger  # type: ignore[attr-defined]  # in no __all__
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_vaebm.models.decoders import Decoded, at_least_float32, diagonal_normal, soft_clamp

MAX_VALUES_PER_BLOCK = 1 << 21
"""Values of noise that are drawn together on a CPU. Chosen by us."""
ACCELERATOR_FACTOR = 16
"""Blocks are larger by it on accelerators, where short kernels cost more to launch than to run. Chosen by us."""


class Prior(NamedTuple):
    """A latent group under the generator, given the groups above: a diagonal Normal."""

    loc: Tensor
    """Mean, ``(n, *event)``."""
    scale: Tensor
    """Standard deviation, same shape."""
    raw: tuple[Tensor, Tensor] | None = None
    """What the network said of the two, before it was bounded; a residual posterior adds to it."""

    def distribution(self, temperature: float = 1.0) -> TorchDistribution:
        """Return it as a distribution, batch shape ``(n,)``, with the standard deviation times a temperature."""
        return diagonal_normal(self.loc, temperature * self.scale)


class Choose(Protocol):
    """Decides the value of one site on the way down."""

    def __call__(self, name: str, prior: Prior, state: Tensor) -> Tensor:
        """Choose a value.

        Args:
            name: of the site.
            prior: its distribution under the generator.
            state: the top-down features that it was computed from.

        Returns:
            The value, ``(n, *event)``.
        """
        ...


class Generator(PyroModule):
    """The Pyro model ``p(x, z)``; its forward pass is the program."""

    latent_shapes: dict[str, torch.Size]
    """Event shape of each latent site, coarsest first."""
    event_shape: torch.Size
    """Event shape of ``x``."""
    temperature: float = 1.0
    """Factor on the standard deviation of every latent's prior, in the program and in the transport alike; posteriors
    do not see it. It belongs to a VAEBM: a VAE is trained at 1."""

    def __init__(self) -> None:
        # The prefix of its parameters' names. Without one, pyro.infer.SVI takes layers of model and guide that have the
        # same attribute name for one parameter, and never trains the first of them.
        super().__init__("model")

    @abstractmethod
    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy.

        Args:
            choose: decides each latent's value.
            num: rows.

        Returns:
            The latents, and the features that :meth:`decode` reads.
        """

    @abstractmethod
    def decode(self, state: Tensor) -> Decoded:
        """Compute the distribution of ``x`` from the end of a walk."""

    def forward(
        self, x: Tensor | None = None, num: int | None = None, by_level: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program.

        Args:
            x: data to observe, ``(n, *event_shape)``; ``None`` samples it.
            num: rows to sample where ``x`` is not given.
            by_level: score data by the law of their levels, where the decoder has one; if not, by the law that samples
                have.

        Returns:
            ``x`` and the latents.

        Raises:
            ValueError: neither ``x`` nor ``num`` was given.
        """
        rows = num_rows(x, num)
        with pyro.plate("data", rows):
            return self.sites(x, rows, by_level and x is not None)

    def sites(self, x: Tensor | None, num: int, by_level: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program's body, inside a plate of ``num`` rows that the caller opened.

        Args:
            x: as in :meth:`forward`.
            num: rows.
            by_level: whether ``x`` has the decoder's law of levels; if not, the one that :meth:`Decoded.transport`
                draws from, which is VAEBM's base measure.

        Returns:
            ``x`` and the latents.
        """
        z, state = self.walk(partial(_sample, temperature=self.temperature), num)
        decoded = self.decode(state)
        return pyro.sample("x", decoded.level_law() if by_level else decoded.law(), obs=x), z

    def first_prior(self, num: int) -> Prior:
        """Return the prior of the first group, which nothing is above: N(0, I), for ``num`` rows."""
        like = next(self.parameters())
        shape = (num, *next(iter(self.latent_shapes.values())))
        return Prior(like.new_zeros(shape), like.new_ones(shape))

    def first_state(self, num: int) -> Tensor:
        """Return the features that the first group's posterior meets, for ``num`` rows; here its prior's mean."""
        return self.first_prior(num).loc


def num_rows(x: Tensor | None, num: int | None) -> int:
    """Return the number of rows of a program that was given data or a number of draws."""
    if x is not None:
        return len(x)
    if num is None:
        raise ValueError("give the data x, or the number of draws num")
    return num


def _sample(name: str, prior: Prior, state: Tensor, temperature: float) -> Tensor:
    # OnePass reads what stands under "group".
    infer: Any = {"group": (prior, state)}
    value: Tensor = pyro.sample(name, prior.distribution(temperature), infer=infer)
    return value


class Guide(PyroModule):
    """The Pyro guide ``q(z | x)``: the generator's walk with each group's posterior in place of its prior.

    Args:
        generator: the model; held, not owned, so that its weights are stored once.
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
        """Compute what each group's posterior reads of ``x``: site name to features."""

    @abstractmethod
    def posterior(self, name: str, prior: Prior, features: Tensor, state: Tensor) -> TorchDistribution:
        """Compute the posterior of one group, given ``x`` and the groups above.

        Args:
            name: of the site.
            prior: the group under the generator.
            features: what :meth:`encode` returned for it.
            state: the top-down features that the prior was computed from.

        Returns:
            The distribution, batch shape ``(n,)``.
        """

    def forward(self, x: Tensor, num: int | None = None) -> dict[str, Tensor]:
        """Run the program.

        Args:
            x: data, ``(n, *event_shape)``.
            num: ignored; models take it, and Pyro calls both with the same arguments.

        Returns:
            The latents.
        """
        features = self.encode(x)

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            value: Tensor = pyro.sample(name, self.posterior(name, prior, features[name], state))
            return value

        with pyro.plate("data", len(x)):
            return self.generator.walk(choose, len(x))[0]


class RelativeGuide(Guide):
    """A guide whose posteriors are relative to the priors they meet.

    Each is ``N(loc_p + scale_p * shift, (scale_p * exp(log ratio))^2)``, so a head that gives zeros is the prior.
    """

    @abstractmethod
    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Compute shift and log ratio of one group, stacked along axis 1: ``(n, 2 * event[0], ...)``."""

    def posterior(self, name: str, prior: Prior, features: Tensor, state: Tensor) -> TorchDistribution:
        """Shift and scale the prior; see :meth:`Guide.posterior`."""
        shift, log_ratio = at_least_float32(self.head(name, features, state)).chunk(2, dim=1)
        return diagonal_normal(prior.loc + prior.scale * shift, prior.scale * soft_clamp(log_ratio).exp())


class OnePass(GuideMessenger):
    """Model and guide in one walk instead of two; for :meth:`pyro.infer.ELBO.loss` it stands in for the guide.

    The walk of a guide computes every prior on its way, so walking again for the model's trace computes all of the
    top-down networks twice. As an effect handler on the model, the guide replaces each group's distribution where the
    model samples it, and both traces come out of the one run.

    Args:
        guide: of the model.
        num_draws: rows of latents per row of data; the tower that reads x runs once for all of them.
        by_level: as in :meth:`Generator.forward`.
    """

    def __init__(self, guide: Guide, num_draws: int = 1, by_level: bool = True) -> None:
        super().__init__(guide.generator)
        self.guide, self.num_draws, self.by_level = guide, num_draws, by_level

    def __call__(self, x: Tensor, num: int | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Run the model under the guide.

        Args:
            x: data, ``(n, *event_shape)``.
            num: ignored, as in :meth:`Guide.forward`.

        Returns:
            The value of every sample site, ``n * num_draws`` rows, those of one data point together.
        """
        features = self.guide.encode(x)
        if self.num_draws > 1:
            features = {name: value.repeat_interleave(self.num_draws, 0) for name, value in features.items()}
            x = x.repeat_interleave(self.num_draws, 0)
        self._features = features
        return super().__call__(x, by_level=self.by_level)

    def _pyro_sample(self, msg: Any) -> None:
        self._group = msg["infer"].get("group")
        super()._pyro_sample(msg)

    def get_posterior(self, name: str, prior: TorchDistribution) -> TorchDistribution:
        """Return the guide's posterior at a site of the model; called by Pyro."""
        group, state = self._group
        return self.guide.posterior(name, group, self._features[name], state)


class HierarchicalVAE(nn.Module):
    """A model and guide pair with its transport; the interface that every VAE here has.

    Args:
        model: the Pyro program ``p(x, z)``.
        guide: the Pyro program ``q(z | x)``, over the same generator.
    """

    def __init__(self, model: Generator, guide: Guide) -> None:
        super().__init__()
        self.model = model
        self.guide = guide

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
        """Map noise to what it stands for: ``z_l = loc_l + t * scale_l * eps_l``, then x by its decoder's transport.

        The temperature t is the model's own, 1 unless a VAEBM sets it; another one is a factor on eps here.

        Args:
            eps: every noise, ``(n, *shape)`` with the shapes of :attr:`noise_shapes`.

        Returns:
            ``x``, ``(n, *event_shape)``, and the latents.
        """
        decoded, z = self.decode_noise(eps)
        return decoded.transport(eps["eps_x"]), z

    def decode_noise(self, eps: Mapping[str, Tensor]) -> tuple[Decoded, dict[str, Tensor]]:
        """Map the latents' noise to the distribution of x, and the latents.

        Args:
            eps: every noise of a latent; that of x is not used.

        Returns:
            ``p(x | z)`` and z.
        """

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            return prior.loc + self.model.temperature * prior.scale * eps[f"eps_{name}"]

        z, state = self.model.walk(choose, len(next(iter(eps.values()))))
        return self.model.decode(state), z

    def first_latent(self, eps: Tensor) -> dict[str, Tensor]:
        """Map the first group's noise to that group, which needs no network.

        Args:
            eps: ``(n, *shape)``.

        Returns:
            The first latent by its name, ``(n, *shape)``.
        """
        prior = self.model.first_prior(len(eps))
        name = next(iter(self.model.latent_shapes))
        return {name: prior.loc + self.model.temperature * prior.scale * eps}

    def first_posterior(self, x: Tensor) -> TorchDistribution:
        """Compute the guide's law of the first latent, without the walk through those below.

        Args:
            x: data, ``(n, *event_shape)``.

        Returns:
            The distribution, batch shape ``(n,)``.
        """
        name = next(iter(self.model.latent_shapes))
        prior, state = self.model.first_prior(len(x)), self.model.first_state(len(x))
        return self.guide.posterior(name, prior, self.guide.encode(x)[name], state)

    def noise_of(self, x: Tensor, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Invert :meth:`transport`.

        Args:
            x: ``(n, *event_shape)``.
            z: every latent.

        Returns:
            The noises.

        Raises:
            InputError: x is discrete.
        """
        eps: dict[str, Tensor] = {}

        def choose(name: str, prior: Prior, state: Tensor) -> Tensor:
            eps[f"eps_{name}"] = (z[name] - prior.loc) / (self.model.temperature * prior.scale)
            return z[name]

        state = self.model.walk(choose, len(x))[1]
        eps["eps_x"] = self.model.decode(state).noise_of(x)
        return eps
