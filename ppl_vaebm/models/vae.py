"""The small hierarchical VAE, as a Pyro model and guide over one top-down pass.

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
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.cells import FourierFeatures, ResidualBlock, leaky_relu, mlp, num_halvings
from ppl_vaebm.models.distributions import diagonal_normal, positive_scale, soft_clamp

ENCODER_FOURIER_SCALE = 4.0  # radians per unit of x; the energy network's value, chosen by us


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


class VectorGenerator(Generator):
    """Fully connected hierarchy for points.

    Args:
        config: sizes.
        event_shape: ``(d,)``.
    """

    def __init__(self, config: ModelConfig, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.latent_shapes = {f"z_{i}": torch.Size([size]) for i, size in enumerate(config.latents, 1)}
        above = [sum(config.latents[:i]) for i in range(len(config.latents) + 1)]
        self.priors = nn.ModuleList(
            mlp(above[i], config.width, config.depth, 2 * config.latents[i], leaky_relu)
            for i in range(1, len(config.latents))
        )
        self.x_scale = XScale(config)
        num_out = event_shape[0] * self.x_scale.num_outputs
        self.decoder = mlp(above[-1], config.width, config.depth, num_out, leaky_relu)

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy; see :meth:`Generator.walk`."""
        z: dict[str, Tensor] = {}
        state = next(self.parameters()).new_zeros(num, 0)
        for index, name in enumerate(self.latent_shapes):
            if index == 0:
                loc, scale = self._reference(name, num)
            else:
                raw_loc, raw_scale = self.priors[index - 1](state).chunk(2, dim=-1)
                loc, scale = soft_clamp(raw_loc), positive_scale(raw_scale)
            z[name] = choose(name, loc, scale, state)
            state = torch.cat([state, z[name]], dim=-1)
        return z, state

    def decode(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decode; see :meth:`Generator.decode`."""
        loc, scale = self.x_scale(self.decoder(state))
        return loc, scale


class ImageGenerator(Generator):
    """Convolutional hierarchy for small square images: a vector first, then grids twice as fine each.

    Args:
        config: sizes.
        event_shape: ``(channels, side, side)``.

    Raises:
        InputError: the image cannot be halved often enough, or there are more groups than grids.
    """

    def __init__(self, config: ModelConfig, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape
        num_ups = num_halvings(event_shape[-1])
        check_side(event_shape, num_ups)
        if len(config.latents) > num_ups + 1:
            raise InputError(
                f"model.latents has {len(config.latents)} groups, but images of side {event_shape[-1]} "
                f"have {num_ups + 1} grids: give at most that many"
            )
        side = event_shape[-1] >> num_ups
        widths = [config.channels << (num_ups - level) for level in range(num_ups + 1)]
        self.base = torch.Size([widths[0], side, side])
        shapes = [torch.Size([config.latents[0]])]
        shapes += [torch.Size([n, side << i, side << i]) for i, n in enumerate(config.latents[1:], 1)]
        self.latent_shapes = {f"z_{i}": shape for i, shape in enumerate(shapes, 1)}
        self.stem = nn.Linear(config.latents[0], self.base.numel())
        self.ups = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], nn.SiLU, "up") for i in range(num_ups))
        self.priors = nn.ModuleList(nn.Conv2d(widths[i], 2 * n, 1) for i, n in enumerate(config.latents[1:], 1))
        self.combiners = nn.ModuleList(nn.Conv2d(n, widths[i], 1) for i, n in enumerate(config.latents[1:], 1))
        self.x_scale = XScale(config)
        num_out = event_shape[0] * self.x_scale.num_outputs
        self.head = nn.Conv2d(widths[-1], num_out, 3, padding=1)

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy; see :meth:`Generator.walk`."""
        loc, scale = self._reference("z_1", num)
        z = {"z_1": choose("z_1", loc, scale, loc)}
        state = nn.functional.silu(self.stem(z["z_1"])).unflatten(1, self.base)
        for index, up in enumerate(self.ups):
            state = up(state)
            if index < len(self.priors):
                raw_loc, raw_scale = self.priors[index](state).chunk(2, dim=1)
                name = f"z_{index + 2}"
                z[name] = choose(name, soft_clamp(raw_loc), positive_scale(raw_scale), state)
                state = state + self.combiners[index](z[name])
        return z, state

    def decode(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decode; see :meth:`Generator.decode`."""
        loc, scale = self.x_scale(self.head(state))
        return loc, scale


def check_side(event_shape: torch.Size, halvings: int) -> None:
    """Refuse images that are not square or cannot be halved that often.

    Raises:
        InputError: with the shape and the multiple that it takes.
    """
    multiple = 1 << halvings
    if event_shape[-1] != event_shape[-2] or event_shape[-1] % multiple:
        raise InputError(
            f"the small convolutional nets take square images whose side is a multiple of {multiple}, "
            f"got shape {tuple(event_shape)}: set data.image-size"
        )


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


class VectorGuide(Guide):
    """Fully connected posterior heads over shared features of ``x``.

    Args:
        generator: the model.
        config: sizes.
    """

    def __init__(self, generator: VectorGenerator, config: ModelConfig) -> None:
        super().__init__(generator)
        dim = generator.event_shape[0]
        self.fourier = FourierFeatures(dim, config.num_fourier, ENCODER_FOURIER_SCALE) if config.num_fourier else None
        num_in = 2 * config.num_fourier or dim
        above = [sum(config.latents[:i]) for i in range(len(config.latents))]
        self.heads = nn.ModuleDict(
            {
                f"z_{i}": mlp(num_in + above[i - 1], config.width, config.depth, 2 * size, leaky_relu)
                for i, size in enumerate(config.latents, 1)
            }
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Give every head ``x``, or its Fourier features."""
        features = self.fourier(x) if self.fourier is not None else x
        return dict.fromkeys(self.heads, features)

    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Run one head; see :meth:`Guide.head`."""
        out: Tensor = self.heads[name](torch.cat([features, state], dim=-1))
        return out


class ImageGuide(Guide):
    """A bottom-up tower whose features meet the top-down state on each group's grid.

    Args:
        generator: the model.
        config: sizes.
    """

    def __init__(self, generator: ImageGenerator, config: ModelConfig) -> None:
        super().__init__(generator)
        num_downs = len(generator.ups)
        widths = [config.channels << level for level in range(num_downs + 1)]
        self.stem = nn.Conv2d(generator.event_shape[0], widths[0], 3, padding=1)
        self.downs = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], nn.SiLU, "down") for i in range(num_downs))
        self.vector_head = nn.Linear(generator.base.numel(), 2 * config.latents[0])
        self.grid_heads = nn.ModuleDict(
            {
                f"z_{i + 1}": nn.Conv2d(2 * widths[num_downs - i], 2 * size, 3, padding=1)
                for i, size in enumerate(config.latents[1:], 1)
            }
        )

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Run the tower, and give each group the features of its grid."""
        features = [nn.functional.silu(self.stem(x))]
        for down in self.downs:
            features.append(down(features[-1]))
        return {f"z_{i}": level for i, level in enumerate(reversed(features), 1)}

    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Run one head; see :meth:`Guide.head`."""
        if name == "z_1":
            out: Tensor = self.vector_head(features.flatten(1))
        else:
            out = self.grid_heads[name](torch.cat([features, state], dim=1))
        return out


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


def build_vae(config: ModelConfig, event_shape: torch.Size) -> HierarchicalVAE:
    """Make the VAE that fits the data.

    Args:
        config: kind and sizes.
        event_shape: ``(d,)`` for points, ``(channels, side, side)`` for images.

    Returns:
        The VAE, freshly initialised from the global generator.

    Raises:
        InputError: a kind that does not fit the data's shape.
    """
    kind = net_kind(config.kind, event_shape, "model.kind")
    if kind == "vector":
        vector = VectorGenerator(config, event_shape)
        return HierarchicalVAE(vector, VectorGuide(vector, config))
    image = ImageGenerator(config, event_shape)
    return HierarchicalVAE(image, ImageGuide(image, config))


def net_kind(kind: str, event_shape: torch.Size, option: str) -> str:
    """Resolve ``auto`` and refuse a kind that does not fit the data.

    Args:
        kind: ``auto``, ``vector`` or ``image``.
        event_shape: of the data.
        option: the option's name, for the message.

    Returns:
        ``vector`` or ``image``.

    Raises:
        InputError: the kind does not fit.
    """
    fitting = {1: "vector", 3: "image"}.get(len(event_shape))
    if fitting is None or kind not in ("auto", fitting):
        raise InputError(f"{option} {kind!r} does not fit data of shape {tuple(event_shape)}: leave it at auto")
    return fitting
