"""What every hierarchical VAE is here: a Pyro model and guide over one top-down pass.

The generator walks down its latent groups, ``z_1`` to ``z_L``, each a diagonal Normal given the groups
above, and ends in ``x``, a Normal given all of them. Who walks decides how each value is chosen: the
Pyro model samples, the guide samples its posterior, :meth:`HierarchicalVAE.transport` computes
``loc + scale * eps``. There is one description of the pass, so the three cannot disagree.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_vaebm.config import ModelConfig
from ppl_vaebm.models.distributions import diagonal_normal, soft_clamp


class Choose(Protocol):
    """Decides the value of one site on the way down."""

    def __call__(self, name: str, loc: Tensor, scale: Tensor, state: Tensor) -> Tensor:
        """Choose a value.

        Args:
            name: of the site.
            loc: mean under the generator, ``(n, *event)``.
            scale: standard deviation under the generator, same shape.
            state: the top-down features that both were computed from.

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
    def decode(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean and standard deviation of ``x``, ``(num, *event_shape)``, from the end of a walk."""

    def forward(self, x: Tensor | None = None, num: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program.

        Args:
            x: data to observe, ``(n, *event_shape)``; ``None`` samples it.
            num: rows to sample where ``x`` is not given.

        Returns:
            ``x`` and the latents.

        Raises:
            ValueError: neither ``x`` nor ``num`` was given.
        """
        rows = num_rows(x, num)
        with pyro.plate("data", rows):
            return self.sites(x, rows)

    def sites(self, x: Tensor | None, num: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the program's body, inside a plate of ``num`` rows that the caller opened."""
        z, state = self.walk(_sample, num)
        return pyro.sample("x", diagonal_normal(*self.decode(state)), obs=x), z

    def _reference(self, name: str, num: int) -> tuple[Tensor, Tensor]:
        """Mean and scale of the first group: N(0, I)."""
        like = next(self.parameters())
        return like.new_zeros(num, *self.latent_shapes[name]), like.new_ones(num, *self.latent_shapes[name])


def num_rows(x: Tensor | None, num: int | None) -> int:
    """Return the number of rows of a program that was given data or a number of draws."""
    if x is not None:
        return len(x)
    if num is None:
        raise ValueError("give the data x, or the number of draws num")
    return num


def _sample(name: str, loc: Tensor, scale: Tensor, state: Tensor) -> Tensor:
    value: Tensor = pyro.sample(name, diagonal_normal(loc, scale))
    return value


class XScale(nn.Module):
    """Standard deviation of x given z: one trained number, or the exponential of the decoder's own output.

    Args:
        config: floor and starting value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.min_scale = config.min_x_scale
        self.is_local = config.x_scale == "local"
        self.raw = nn.Parameter(torch.tensor(math.log(config.init_x_scale - config.min_x_scale)))

    @property
    def num_outputs(self) -> int:
        """Decoder outputs per value of x."""
        return 2 if self.is_local else 1

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Split the decoder's output along axis 1 into the mean and standard deviation of x, of one shape."""
        loc, raw = out.chunk(2, dim=1) if self.is_local else (out, None)
        log_excess = self.raw if raw is None else self.raw + soft_clamp(raw)
        return loc, (self.min_scale + log_excess.exp()).expand_as(loc)


class Guide(PyroModule):
    """The Pyro guide ``q(z | x)``: the generator's walk with each group's posterior in place of its prior.

    A posterior is relative to the prior it meets, ``loc_p + scale_p * shift`` and ``scale_p * exp(log ratio)``
    (NVAE's residual Normal, scaled), so a head that gives zeros is the prior.

    Args:
        generator: the model; held, not owned, so that its weights are stored once.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__("guide")
        self._generator = (generator,)  # in a tuple, which hides it from nn.Module's registration

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Compute what each group's posterior head reads of ``x``: site name to features."""

    @abstractmethod
    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Compute shift and log ratio of one group, stacked along axis 1: ``(n, 2 * event[0], ...)``."""

    def forward(self, x: Tensor, num: int | None = None) -> dict[str, Tensor]:
        """Run the program.

        Args:
            x: data, ``(n, *event_shape)``.
            num: ignored; models take it, and Pyro calls both with the same arguments.

        Returns:
            The latents.
        """
        features = self.encode(x)

        def choose(name: str, loc: Tensor, scale: Tensor, state: Tensor) -> Tensor:
            shift, log_ratio = self.head(name, features[name], state).chunk(2, dim=1)
            posterior = diagonal_normal(loc + scale * shift, scale * soft_clamp(log_ratio).exp())
            value: Tensor = pyro.sample(name, posterior)
            return value

        with pyro.plate("data", len(x)):
            return self._generator[0].walk(choose, len(x))[0]


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
    def noise_shapes(self) -> dict[str, torch.Size]:
        """Event shape of every noise, ``eps_z_1`` to ``eps_x``."""
        shapes = {f"eps_{name}": shape for name, shape in self.model.latent_shapes.items()}
        return {**shapes, "eps_x": self.model.event_shape}

    def transport(self, eps: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Map noise to what it stands for: ``z_l = loc_l + scale_l * eps_l``, then x likewise.

        Args:
            eps: every noise, ``(n, *shape)`` with the shapes of :attr:`noise_shapes`.

        Returns:
            ``x``, ``(n, *event_shape)``, and the latents.
        """

        def choose(name: str, loc: Tensor, scale: Tensor, state: Tensor) -> Tensor:
            return loc + scale * eps[f"eps_{name}"]

        z, state = self.model.walk(choose, len(eps["eps_x"]))
        loc, scale = self.model.decode(state)
        return loc + scale * eps["eps_x"], z

    def noise_of(self, x: Tensor, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Invert :meth:`transport`.

        Args:
            x: ``(n, *event_shape)``.
            z: every latent.

        Returns:
            The noises.
        """
        eps: dict[str, Tensor] = {}

        def choose(name: str, loc: Tensor, scale: Tensor, state: Tensor) -> Tensor:
            eps[f"eps_{name}"] = (z[name] - loc) / scale
            return z[name]

        loc, scale = self.model.decode(self.model.walk(choose, len(x))[1])
        eps["eps_x"] = (x - loc) / scale
        return eps
