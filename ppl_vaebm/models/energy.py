"""The energy networks E(x) and E(x, z).

An energy is called as ``energy(x, z)`` and returns nats per row. One of x alone ignores z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.energy_nets import Layout, build_block, build_layout
from ppl_vaebm.models.layers import (
    FourierFeatures,
    LipSwish,
    bound_spectral_norm,
    full_precision,
    hold_spectral_norms,
    mlp,
    spectral_layers,
)
from ppl_vaebm.models.nvae_cells import Conv2d

IMAGE_OPTIONS = ("layout", "stem_stride", "block", "weight_norm")


class Energy(nn.Module):
    """What every energy has: a call with x and the latents, and no batch statistics.

    It is the sum of a joint term, of x and, for an energy of x and z, all latents, and of terms of the first latent
    alone where it is configured with them: its own one, and the balance of the joint term, 0 until it is fitted.
    """

    is_initialised: Tensor | None
    """Whether :func:`initialise_from_data` is done, ``()``, saved with the weights; None where the energy is configured
    without it."""
    latent_net: nn.Sequential | None
    """The net of the first latent's own term, if the energy has one."""
    balance_net: nn.Sequential | None
    """The net of the joint term's balance, if the energy has one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_initialised", None)
        self.latent_net = None
        self.balance_net = None

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        """Evaluate all but the terms of the first latent alone; see :meth:`forward`."""
        raise NotImplementedError

    def latent_term(self, z: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the first latent's own term, ``(n,)``, nats, given all latents; ValueError without that term."""
        if self.latent_net is None:
            raise ValueError("this energy has no term of the first latent alone: set energy.latent-term")
        return self._of_first_latent(self.latent_net, z)

    def balance_term(self, z: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the balance of the joint term, as :meth:`latent_term` its own."""
        if self.balance_net is None:
            raise ValueError("this energy has no balance of its joint term: set energy.latent-balance")
        return self._of_first_latent(self.balance_net, z)

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        """Evaluate the energy, ``(n,)``, nats, of x ``(n, *event_shape)`` and the latents, ``(n, *shape)`` each.

        An energy of x alone ignores z; one of x and z raises ValueError without it.
        """
        energy = self.joint_term(x, z)
        if self.latent_net is not None:
            energy = energy + self.latent_term(_given(z))
        if self.balance_net is not None:
            energy = energy + self.balance_term(_given(z))
        return energy

    def train(self, mode: bool = True) -> Self:
        """Set the mode, in which these networks do not differ; see :func:`bound_spectral_norm` for the norms."""
        super().train(mode)
        hold_spectral_norms(self)
        return self

    def last_layer(self) -> nn.Linear | None:
        """Return the layer that gives the joint term, if there is one."""
        return None

    def layers(self) -> list[nn.Linear | nn.Conv2d]:
        """List the layers that are trained together, in the network's order: all but those of the balance."""
        apart = set(self.balance_net or ())
        return [layer for layer in spectral_layers(self, has_linear=True) if layer not in apart]

    def hidden_layers(self) -> list[nn.Linear | nn.Conv2d]:
        """List those of them that give no energy; initialisation and norms are theirs."""
        last = [self.last_layer(), *(() if self.latent_net is None else (self.latent_net[-1],))]
        return [layer for layer in self.layers() if all(layer is not each for each in last)]

    def _complete(self, config: EnergyConfig, latent_shapes: Mapping[str, torch.Size]) -> None:
        """Add the terms of the first latent alone; set up what concerns hidden layers, when the others are there."""
        if config.latent_term:
            self.first_latent, shape = next(iter(latent_shapes.items()))
            self.latent_net = mlp(shape.numel(), config.width, config.depth, 1, nn.SiLU)
        if config.latent_balance:
            self.balance_net = mlp(shape.numel(), config.width, config.depth, 1, nn.SiLU)
            for parameter in self.balance_net[-1].parameters():
                nn.init.zeros_(parameter)
        if config.data_init:
            self.register_buffer("is_initialised", torch.zeros((), dtype=torch.bool))
        if config.spectral_norm:
            for layer in self.hidden_layers():
                bound_spectral_norm(layer)

    def _of_first_latent(self, net: nn.Sequential, z: Mapping[str, Tensor]) -> Tensor:
        first = z[self.first_latent].flatten(1)
        with full_precision(first):
            out: Tensor = net(first.to(next(net.parameters()).dtype))
        return out.squeeze(-1)


def _given(z: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if z is None:
        raise ValueError("this energy is a function of x and z, got no z: give the latents, for data draws of q(z | x)")
    return z


class VectorEnergy(Energy):
    """Fourier features of x, ``(n, dim)``, and the latents that the energy reads, into a fully connected net."""

    def __init__(self, config: EnergyConfig, dim: int, latent_shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.latent_names = tuple(latent_shapes)
        self.fourier = FourierFeatures(dim, config.num_fourier, config.fourier_scale) if config.num_fourier else None
        num_in = (2 * config.num_fourier or dim) + sum(shape.numel() for shape in latent_shapes.values())
        self.net = mlp(num_in, config.width, config.depth, 1, nn.SiLU)
        self._complete(config, latent_shapes)

    def last_layer(self) -> nn.Linear:
        """Return the last layer; see :class:`Energy`."""
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        return last

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        """Evaluate the joint term; see :class:`Energy`."""
        features = self.fourier(x) if self.fourier is not None else x
        if self.latent_names:
            given = _given(z)
            features = torch.cat([features, *(given[name].flatten(1) for name in self.latent_names)], dim=1)
        hidden = self.net[:-1](features)
        with full_precision(x):  # as in ImageEnergy
            out: Tensor = self.net[-1](hidden.to(self.last_layer().weight.dtype))
        return out.squeeze(-1)


class ImageEnergy(Energy):
    """Residual blocks down to a small grid, summed over pixels, into one linear unit.

    Latents are added to what a block takes, through a 1x1 convolution: each to the first block with the coarsest grid
    that is not coarser than its own. A vector is a grid of one pixel. On other grids they are means or repetitions.
    InputError for images that the layout is not for.
    """

    def __init__(self, config: EnergyConfig, event_shape: torch.Size, latent_shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        layout, norm = build_layout(config, event_shape), config.weight_norm
        self.padding = layout.padding * 2
        if layout.stem_stride == 1:
            self.stem = Conv2d(event_shape[0], config.channels, 3, weight_norm=norm)
        else:
            self.stem = Conv2d(event_shape[0], config.channels, 4, stride=2, weight_norm=norm)
            self.stem.padding = (1, 1)  # an even kernel halves the grid with a row less than its half
        self.activation = LipSwish()
        self.blocks = nn.ModuleList(build_block(config, shape) for shape in layout.blocks)
        self.head = nn.Linear(layout.blocks[-1].num_out, 1)
        self.sides, self.entries = layout.sides, _entries(layout, latent_shapes)
        self.latent_maps = nn.ModuleDict()
        for index, names in self.entries.items():
            num_in, num_out = sum(latent_shapes[name][0] for name in names), layout.blocks[index].num_in
            self.latent_maps[str(index)] = Conv2d(num_in, num_out, 1, bias=False, weight_norm=norm)
        self._complete(config, latent_shapes)

    def last_layer(self) -> nn.Linear:
        """Return the head; see :class:`Energy`."""
        return self.head

    def joint_term(self, x: Tensor, z: Mapping[str, Tensor] | None) -> Tensor:
        """Evaluate the joint term; see :class:`Energy`."""
        padded = functional.pad(x, self.padding, value=-1.0) if any(self.padding) else x
        features = self.activation(self.stem(padded))
        for index, block in enumerate(self.blocks):
            if index in self.entries:
                features = features + self._entering(index, _given(z))
            features = block(features)
        # An energy in bfloat16 would have steps of a sixteenth at 16 nats.
        with full_precision(x):
            out: Tensor = self.head(features.to(self.head.weight.dtype).sum(dim=(-2, -1)))
        return out.squeeze(-1)

    def _entering(self, index: int, z: Mapping[str, Tensor]) -> Tensor:
        """Map the latents that enter at a block to its features, ``(n, num_in, side, side)``."""
        size = (self.sides[index], self.sides[index])
        grids = [z[name] if z[name].dim() == 4 else z[name][:, :, None, None] for name in self.entries[index]]
        # Area: the mean of the pixels that a larger one covers, and copies the other way.
        out: Tensor = self.latent_maps[str(index)](
            torch.cat([functional.interpolate(grid, size=size, mode="area") for grid in grids], dim=1)
        )
        return out


def _entries(layout: Layout, latent_shapes: Mapping[str, torch.Size]) -> dict[int, tuple[str, ...]]:
    """Find the block at which each latent enters: index of the block to names."""
    entries: dict[int, tuple[str, ...]] = {}
    for name, shape in latent_shapes.items():
        side = shape[-1] if len(shape) == 3 else 1
        index = layout.sides.index(min((each for each in layout.sides if each >= side), default=layout.sides[0]))
        entries[index] = (*entries.get(index, ()), name)
    return dict(sorted(entries.items()))


def build_energy(
    config: EnergyConfig, event_shape: torch.Size, latent_shapes: Mapping[str, torch.Size] | None = None
) -> Energy:
    """Make the energy network that fits the data, initialised from the global generator.

    Args:
        config: sizes and options.
        event_shape: ``(d,)`` for points, ``(channels, side, side)`` for images.
        latent_shapes: of every latent by name, as the VAE's model has them; only an energy of x and z needs them.

    Raises:
        InputError: a layout or an option that does not fit the data's shape.
        ValueError: no latents' shapes for an energy of x and z.
    """
    if config.inputs == "x-and-z" and not latent_shapes:
        raise ValueError("an energy of x and z needs the shapes of the latents, got none")
    read = latent_shapes if config.inputs == "x-and-z" and latent_shapes else {}
    if len(event_shape) == 3:
        return ImageEnergy(config, event_shape, read)
    standard = EnergyConfig()
    for name in IMAGE_OPTIONS:
        if getattr(config, name) != getattr(standard, name):
            raise InputError(
                f"expected images for energy.{name.replace('_', '-')} {getattr(config, name)}, found data of shape "
                f"{tuple(event_shape)}: leave this option out"
            )
    return VectorEnergy(config, event_shape[0], read)


def initialise_from_data(energy: Energy, x: Tensor, z: dict[str, Tensor] | None = None) -> None:
    """Give every hidden layer outputs of mean 0 and standard deviation 0.2 on data, in place; before it is copied.

    Only the first call does anything, as a flag in the weights records, and only on an energy configured with it. The
    data are x, ``(n, *event_shape)``, of which VAEBM takes five batches, and their latents for an energy of x and z.
    For errors see :func:`standardise_layers`.
    """
    flag = energy.is_initialised
    if flag is not None and not flag:
        standardise_layers(energy, energy.hidden_layers(), lambda: energy(x, z))
        flag.fill_(True)


STD = 0.2
"""Of every output channel; the mean is 0 (the code of VAEBM, Xiao et al. 2021)."""
MIN_STD = 1e-6
"""Below it a channel counts as constant: chosen by us, above the rounding of float32."""


@torch.no_grad()
def standardise_layers(net: nn.Module, layers: Sequence[nn.Module], call: Callable[[], object]) -> None:
    """Scale and shift layers, in place, so that on given data every channel of their outputs has mean 0 and sd 0.2.

    One pass, layer after layer (Salimans and Kingma 2016, section 3): each sees what those before it give once they are
    done. Weight-normalised layers change their gains, others their weights; layers without a bias keep their mean.
    Convolutions count before the mean over pixels that may follow. ``call`` calls the network with the data, and so
    each of its ``layers`` once.

    Raises:
        InputError: a channel is constant on the data, or not finite, so that no scale gives it that deviation.
    """
    names = {module: name for name, module in net.named_modules()}
    handles = [layer.register_forward_pre_hook(partial(_standardise, names[layer])) for layer in layers]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()


def _standardise(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Give a layer the scale and the shift that its input asks for."""
    assert isinstance(layer, (Conv2d, nn.Linear))
    if layer.bias is not None:
        layer.bias.zero_()
    # Not by a call, which would come back here; and a subclass may go on to take a mean over pixels.
    out: Tensor = (Conv2d if isinstance(layer, Conv2d) else nn.Linear).forward(layer, inputs[0])  # type: ignore[arg-type]
    std, mean = torch.std_mean(out.double().transpose(0, 1).flatten(1), dim=1, correction=0)
    num_bad = int((~((std > MIN_STD) & std.isfinite())).sum())
    if num_bad:
        raise InputError(
            f"expected data on which every channel of the energy varies, for energy.data-init, found {num_bad} of "
            f"{len(std)} channels of {name} constant or not finite: set --no-energy.data-init, or look at the data"
        )
    scale = STD / std
    if isinstance(layer, Conv2d) and layer.log_gain is not None:
        layer.log_gain.add_(scale.log())
    else:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.copy_(-mean * scale)
