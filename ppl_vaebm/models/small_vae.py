"""The small hierarchical VAEs: fully connected for points, convolutional for small square images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import Decoded, DecodedNormal, XScale, at_least_float32, positive_scale, soft_clamp
from ppl_vaebm.models.layers import ResidualBlock, check_side, leaky_relu, mlp, net_kind, num_halvings
from ppl_vaebm.models.vae import Choose, Generator, HierarchicalVAE, Prior, RelativeGuide

# Of what the convolutions compute: a fifth faster on a CPU than the default, with 16 to 32 channels. The parameters
# stay as they are: Pyro's store, which pyro.optim reads, would train copies of others.
MEMORY_FORMAT = torch.channels_last


class VectorGenerator(Generator):
    """Fully connected hierarchy for points, of event shape ``(d,)``."""

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

    def first_state(self, num: int) -> Tensor:
        """Return no features; see :meth:`Generator.first_state`."""
        return next(self.parameters()).new_zeros(num, 0)

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy; see :meth:`Generator.walk`."""
        z: dict[str, Tensor] = {}
        state = self.first_state(num)
        for index, name in enumerate(self.latent_shapes):
            if index == 0:
                prior = self.first_prior(num)
            else:
                raw_loc, raw_scale = at_least_float32(self.priors[index - 1](state)).chunk(2, dim=-1)
                prior = Prior(soft_clamp(raw_loc), positive_scale(raw_scale))
            z[name] = choose(name, prior, state)
            state = torch.cat([state, z[name]], dim=-1)
        return z, state

    def decode(self, state: Tensor) -> Decoded:
        """Decode; see :meth:`Generator.decode`."""
        return DecodedNormal(*self.x_scale(at_least_float32(self.decoder(state))))


class VectorGuide(RelativeGuide):
    """Fully connected posterior heads over shared features of ``x``."""

    def __init__(self, generator: VectorGenerator, config: ModelConfig) -> None:
        super().__init__(generator)
        dim = generator.event_shape[0]
        above = [sum(config.latents[:i]) for i in range(len(config.latents))]
        self.heads = nn.ModuleDict()
        for i, size in enumerate(config.latents, 1):
            self.heads[f"z_{i}"] = mlp(dim + above[i - 1], config.width, config.depth, 2 * size, leaky_relu)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Give every head ``x``."""
        return dict.fromkeys(self.heads, x)

    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Run one head; see :meth:`RelativeGuide.head`."""
        out: Tensor = self.heads[name](torch.cat([features, state], dim=-1))
        return out


class ImageGenerator(Generator):
    """Convolutional hierarchy for small square images: a vector first, then grids twice as fine each.

    Raises:
        InputError: the image cannot be halved often enough, or there are more groups than grids.
    """

    def __init__(self, config: ModelConfig, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape
        num_ups = num_grids(event_shape, config.patch)
        if len(config.latents) > num_ups + 1:
            raise InputError(
                f"model.latents has {len(config.latents)} groups, but images of side {event_shape[-1]} "
                f"have {num_ups + 1} grids: give at most that many"
            )
        side = event_shape[-1] // config.patch >> num_ups
        widths = [config.channels << (num_ups - level) for level in range(num_ups + 1)]
        self.base = torch.Size([widths[0], side, side])
        shapes = [torch.Size([config.latents[0]])]
        shapes += [torch.Size([n, side << i, side << i]) for i, n in enumerate(config.latents[1:], 1)]
        self.latent_shapes = {f"z_{i}": shape for i, shape in enumerate(shapes, 1)}
        self.stem = Stem(config.latents[0], config, self.base.numel())
        self.ups = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], nn.SiLU, "up") for i in range(num_ups))
        self.priors = nn.ModuleList(nn.Conv2d(widths[i], 2 * n, 1) for i, n in enumerate(config.latents[1:], 1))
        self.combiners = nn.ModuleList(nn.Conv2d(n, widths[i], 1) for i, n in enumerate(config.latents[1:], 1))
        self.x_scale = XScale(config)
        num_out = event_shape[0] * self.x_scale.num_outputs * config.patch**2
        self.head = nn.Conv2d(widths[-1], num_out, 3, padding=1)
        self.patch = config.patch

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy; see :meth:`Generator.walk`."""
        reference = self.first_prior(num)
        z = {"z_1": choose("z_1", reference, reference.loc)}
        state = functional.silu(self.stem(z["z_1"])).unflatten(1, self.base).contiguous(memory_format=MEMORY_FORMAT)
        for index, up in enumerate(self.ups):
            state = up(state)
            if index < len(self.priors):
                raw_loc, raw_scale = at_least_float32(self.priors[index](state)).chunk(2, dim=1)
                name = f"z_{index + 2}"
                z[name] = choose(name, Prior(soft_clamp(raw_loc), positive_scale(raw_scale)), state)
                state = state + self.combiners[index](z[name])
        return z, state

    def decode(self, state: Tensor) -> Decoded:
        """Decode; see :meth:`Generator.decode`."""
        return DecodedNormal(*self.x_scale(functional.pixel_shuffle(at_least_float32(self.head(state)), self.patch)))


class ImageGuide(RelativeGuide):
    """A bottom-up tower whose features meet the top-down state on each group's grid."""

    def __init__(self, generator: ImageGenerator, config: ModelConfig) -> None:
        super().__init__(generator)
        num_downs = len(generator.ups)
        widths = [config.channels << level for level in range(num_downs + 1)]
        self.patch = config.patch
        self.stem = nn.Conv2d(generator.event_shape[0] * self.patch**2, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], nn.SiLU, "down") for i in range(num_downs))
        self.vector_head = Stem(generator.base.numel(), config, 2 * config.latents[0])
        self.grid_heads = nn.ModuleDict()
        for i, size in enumerate(config.latents[1:], 1):
            self.grid_heads[f"z_{i + 1}"] = nn.Conv2d(2 * widths[num_downs - i], 2 * size, 3, padding=1)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Run the tower, and give each group the features of its grid."""
        patches = functional.pixel_unshuffle(x, self.patch).contiguous(memory_format=MEMORY_FORMAT)
        features = [functional.silu(self.stem(patches))]
        for down in self.downs:
            features.append(down(features[-1]))
        return {f"z_{i}": level for i, level in enumerate(reversed(features), 1)}

    def head(self, name: str, features: Tensor, state: Tensor) -> Tensor:
        """Run one head; see :meth:`RelativeGuide.head`."""
        if name == "z_1":
            out: Tensor = self.vector_head(features.flatten(1))
        else:
            out = self.grid_heads[name](torch.cat([features, state], dim=1))
        return out


class Stem(nn.Linear):
    """The map between the first latent and the first grid, in either direction: linear, with a net beside it.

    With a ``stem_depth`` of 0 there is no net.
    """

    def __init__(self, num_in: int, config: ModelConfig, num_out: int) -> None:
        super().__init__(num_in, num_out)
        depth = config.stem_depth
        self.beside = mlp(num_in, config.width, depth, num_out, nn.SiLU) if depth else None

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(n, num_in)`` to ``(n, num_out)``."""
        out = super().forward(u)
        return out if self.beside is None else out + self.beside(u)


def num_grids(event_shape: torch.Size, patch: int) -> int:
    """Return how often the convolutional nets halve the grid of patches, whose side is a power of two.

    That is as often as without patches, less the halvings that patches stand for, but at least once.

    Raises:
        InputError: the image cannot be cut so.
    """
    num_in_patch = patch.bit_length() - 1
    num = max(1, num_halvings(event_shape[-1]) - num_in_patch)
    check_side(event_shape, num + num_in_patch)
    return num


def build_small_vae(config: ModelConfig, event_shape: torch.Size) -> HierarchicalVAE:
    """Make the small VAE for points ``(d,)`` or images ``(channels, side, side)``, from the global generator.

    Raises:
        InputError: a kind that does not fit the data's shape.
    """
    kind = net_kind(config.kind, event_shape, "model.kind")
    if kind == "vector":
        vector = VectorGenerator(config, event_shape)
        return HierarchicalVAE(vector, VectorGuide(vector, config))
    image = ImageGenerator(config, event_shape)
    return HierarchicalVAE(image, ImageGuide(image, config))
