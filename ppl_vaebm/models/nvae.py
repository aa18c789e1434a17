"""NVAE (Vahdat and Kautz 2020, arXiv:2007.03898) as a Pyro model and guide over one top-down pass.

Latent groups lie on square grids, ``z_1`` on the coarsest. On the way down the state passes a group as

    cells -> prior of the group from the state -> its value -> combiner(state, value)

and the posterior of a group sees the same state and the features that the bottom-up tower kept at that depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from ppl_vaebm.config import NvaeConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import (
    Decoded,
    at_least_float32,
    decoded,
    diagonal_normal,
    num_decoder_outputs,
    positive_scale,
    soft_clamp,
)
from ppl_vaebm.models.nvae_cells import POST_EXPANSION, Conv2d, decoder_cell, encoder_cell
from ppl_vaebm.models.vae import Choose, Generator, Guide, HierarchicalVAE, Prior

FLOW_EXPANSION = 6  # hidden channels per latent channel
MIX_SIZE = 5
OUTPUT_GAIN = 0.1  # of the last layer's initial weight norm, so that a fresh flow moves little


def autoregressive_mask(num_out: int, num_in: int, size: int, is_strict: bool, mirror: bool) -> Tensor:
    """Make the mask ``(num_out, num_in, size, size)``, ones and zeros, of a convolution that reads earlier elements.

    Elements are ordered by pixel in raster order, and within a pixel by channel; where a layer has several channels
    per latent channel, they come in blocks. The kernel's side ``size`` is odd.

    Args:
        is_strict: leave out the element itself (the first layer); else it is seen too.
        mirror: reverse the order of the pixels; channels keep theirs, as in NVAE.
    """
    num_latent = min(num_out, num_in)
    row = torch.arange(num_out)[:, None] // (num_out // num_latent)
    column = torch.arange(num_in)[None, :] // (num_in // num_latent)
    centre = size // 2
    mask = torch.zeros(num_out, num_in, size, size)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    mask[:, :, centre, centre] = (column < row if is_strict else column <= row).float()
    return mask.flip((2, 3)) if mirror else mask


class AutoregressiveShift(TransformModule):
    """``z' = z - m(z)``, where every element of m depends on earlier elements of z only (Kingma et al. 2016).

    The Jacobian is triangular with a unit diagonal, so the log determinant is 0. The group has ``num_latents``
    channels; ``mirror`` reverses the order of the pixels.
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)
    bijective = True
    sign = 1

    def __init__(self, num_latents: int, mirror: bool) -> None:
        # With the cache, Pyro does not invert a value that this transform has just computed.
        super().__init__(cache_size=1)
        hidden = FLOW_EXPANSION * num_latents
        first = autoregressive_mask(hidden, num_latents, 3, is_strict=True, mirror=mirror)
        mix = autoregressive_mask(1, 1, MIX_SIZE, is_strict=False, mirror=mirror)
        last = autoregressive_mask(num_latents, hidden, 1, is_strict=False, mirror=mirror)
        self.first = Conv2d(num_latents, hidden, 3, mask=first, bias=False)
        self.mix = Conv2d(hidden, hidden, MIX_SIZE, mask=mix, groups=hidden, bias=False)
        self.last = Conv2d(hidden, num_latents, 1, mask=last)
        assert self.last.log_gain is not None
        self.last.log_gain.data += math.log(OUTPUT_GAIN)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached pair: it is part of a graph, which cannot be copied."""
        return {**super().__getstate__(), "_cached_x_y": (None, None)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the weights of earlier versions, whose first two layers have no gain and which mirror channels too."""
        if f"{prefix}first.weight" in state_dict and f"{prefix}first.log_gain" not in state_dict:
            raise InputError(
                f"expected a gain of every masked convolution of the NVAE's flows, found none in {prefix}first: "
                "these weights are of an earlier version; fit stage svi again with --overwrite, then stage ebm"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def shift(self, z: Tensor) -> Tensor:
        """Compute m, ``(n, num_latents, h, w)`` to the same shape."""
        shift: Tensor = self.last(functional.elu(self.mix(functional.elu(self.first(z)))))
        return shift

    def _call(self, z: Tensor) -> Tensor:
        return z - self.shift(z)

    def _inverse(self, y: Tensor) -> Tensor:
        """Iterate ``z = y + m(z)``; each round makes one more element exact, so the iteration ends at the inverse."""
        with torch.no_grad():
            z = _settled(lambda z: y + self.shift(z), y)
        return self._with_gradient(y, z) if torch.is_grad_enabled() else z

    def _with_gradient(self, y: Tensor, z: Tensor) -> Tensor:
        """Attach the gradient to the inverse: ``(1 - J)^-T grad`` for y and for m(z), where J is m's Jacobian at z."""
        point = z.detach().requires_grad_()
        shift = self.shift(point)

        def solved(grad: Tensor) -> Tensor:
            def pulled_back(value: Tensor) -> Tensor:
                return grad + torch.autograd.grad(shift, point, value, retain_graph=True)[0]

            return _settled(pulled_back, grad)

        out: Tensor = y + self.shift(z)
        if out.requires_grad:
            out.register_hook(solved)
        return out

    def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
        """Return zeros, ``(n,)``."""
        return z.new_zeros(z.shape[:-3])


def _settled(update: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Apply an update of triangular structure until nothing changes."""
    value = start
    for _ in range(start[0].numel()):
        value, before = update(value), value
        if torch.equal(value, before):
            break
    return value


def flow(num_latents: int, num_pairs: int) -> nn.ModuleList:
    """Make pairs of shifts with opposite orders of the pixels, first to last."""
    return nn.ModuleList(AutoregressiveShift(num_latents, mirror) for _ in range(num_pairs) for mirror in (False, True))


class LatentGrids:
    """Grids on which the latent groups lie, for x of shape ``(channels, side, side)``.

    Raises:
        InputError: images that are not square, or a side that the grids do not divide.
    """

    def __init__(self, config: NvaeConfig, event_shape: torch.Size) -> None:
        if len(event_shape) != 3 or event_shape[-1] != event_shape[-2]:
            raise InputError(f"model.kind nvae takes square images, got data of shape {tuple(event_shape)}")
        side = event_shape[-1] + 2 * config.padding
        halvings = config.num_pre_blocks + config.num_scales - 1
        multiple = 1 << halvings
        if side % multiple:
            padding = next((p for p in range(multiple) if (event_shape[-1] + 2 * p) % multiple == 0), None)
            option = "data.image-size to a multiple" if padding is None else f"model.nvae.padding to {padding}"
            raise InputError(
                f"model.nvae with {halvings} halving(s) takes images whose side and padding must be a multiple of "
                f"{multiple}, got {side}: set {option}, or use fewer scales"
            )
        if side == multiple:
            raise InputError(
                f"model.nvae would have a coarsest grid of one pixel on images of side {side}, where batches have no "
                "spread to normalise by: use fewer scales or pre-blocks, or set model.nvae.padding"
            )
        self.groups = config.groups
        """Groups of every grid, finest first."""
        self.sides = [side >> (config.num_pre_blocks + scale) for scale in range(config.num_scales)]
        """Side of every grid."""
        self.widths = [config.channels << (config.num_pre_blocks + scale) for scale in range(config.num_scales)]
        """Channels of the towers on every grid."""
        self.scale_of = [s for s in reversed(range(config.num_scales)) for _ in range(self.groups[s])]
        """Grid of every group, in the order of the way down."""
        self.is_plain = sum(self.groups) == 1
        """One group: an ordinary VAE, without towers."""

    def name(self, group: int) -> str:
        """Return the site of a group, counted from 0."""
        return f"z_{group + 1}"


class NVAEGenerator(Generator):
    """The top-down tower, for x of ``event_shape``; ``levels`` as in :func:`build_nvae`."""

    def __init__(self, config: NvaeConfig, event_shape: torch.Size, levels: int | None) -> None:
        super().__init__()
        layout = LatentGrids(config, event_shape)
        self.config, self.layout, self.levels, self.event_shape = config, layout, levels, event_shape
        self.latent_shapes = {
            layout.name(index): torch.Size([config.num_latents, layout.sides[s], layout.sides[s]])
            for index, s in enumerate(layout.scale_of)
        }
        widths = [layout.widths[s] for s in layout.scale_of]
        if layout.is_plain:
            self.stem = Conv2d(config.num_latents, widths[0], 1)
        else:
            self.h = nn.Parameter(torch.rand(widths[0], layout.sides[-1], layout.sides[-1]))
        self.cells = nn.ModuleList(self._cells(index) for index in range(1, len(widths)))
        self.priors = nn.ModuleList(Conv2d(width, 2 * config.num_latents, 1) for width in widths[1:])
        combined = [] if layout.is_plain else widths
        self.combiners = nn.ModuleList(Conv2d(width + config.num_latents, width, 1) for width in combined)
        self.post = nn.Sequential(
            *(
                decoder_cell(config.channels << (block + (cell == 0)), cell == 0, config.squeeze_excite, POST_EXPANSION)
                for block in reversed(range(config.num_pre_blocks))
                for cell in range(config.post_cells)
            )
        )
        num_out = num_decoder_outputs(config.decoder, event_shape[0], config.num_mixtures)
        self.head = Conv2d(config.channels, num_out, 3)

    def _cells(self, group: int) -> nn.Sequential:
        """Make the layers between a group and the one above it: the step to a finer grid, if any, and cells."""
        here, above = self.layout.scale_of[group], self.layout.scale_of[group - 1]
        excite = self.config.squeeze_excite
        up = [decoder_cell(self.layout.widths[above], True, excite)] if here != above else []
        cells = [decoder_cell(self.layout.widths[here], False, excite) for _ in range(self.config.decoder_cells)]
        return nn.Sequential(*up, *cells)

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Walk down the hierarchy; see :meth:`Generator.walk`."""
        state = self.first_state(num)
        z = {"z_1": choose("z_1", self.first_prior(num), state)}
        if self.layout.is_plain:
            return z, self.stem(z["z_1"])
        state = self._combine(0, state, z["z_1"])
        for index, (cells, head) in enumerate(zip(self.cells, self.priors, strict=True), 1):
            state = cells(state)
            raw_loc, raw_scale = at_least_float32(head(functional.elu(state))).chunk(2, dim=1)
            prior = Prior(soft_clamp(raw_loc), positive_scale(raw_scale), (raw_loc, raw_scale))
            name = self.layout.name(index)
            z[name] = choose(name, prior, state)
            state = self._combine(index, state, z[name])
        return z, state

    def first_state(self, num: int) -> Tensor:
        """Return the trained features at the top, if there is a hierarchy; see :meth:`Generator.first_state`."""
        return super().first_state(num) if self.layout.is_plain else self.h.expand(num, *self.h.shape)

    def first_prior(self, num: int) -> Prior:
        """Return the prior of the first group: raw zeros, so its scale is 1.01, as in NVAE."""
        zeros = next(self.parameters()).new_zeros(num, *self.latent_shapes["z_1"])
        return Prior(zeros, positive_scale(zeros), (zeros, zeros))

    def _combine(self, index: int, state: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.combiners[index](torch.cat([state, z.to(state.dtype)], dim=1))
        return out

    def decode(self, state: Tensor) -> Decoded:
        """Decode; see :meth:`Generator.decode`."""
        out = self.head(functional.elu(self.post(state)))
        edge = self.config.padding
        if edge:
            out = out[:, :, edge:-edge, edge:-edge]
        return decoded(self.config.decoder, out, self.event_shape[0], self.config.num_mixtures, self.levels)


class NVAEGuide(Guide):
    """The bottom-up tower and the posterior of every group."""

    def __init__(self, generator: NVAEGenerator) -> None:
        super().__init__(generator)
        self.config, self.layout = generator.config, generator.layout
        config, layout = self.config, self.layout
        self.stem = Conv2d(generator.event_shape[0], config.channels, 3)
        self.pre = nn.Sequential(
            *(
                encoder_cell(config.channels << block, cell == config.pre_cells - 1, config.squeeze_excite)
                for block in range(config.num_pre_blocks)
                for cell in range(config.pre_cells)
            )
        )
        way_up = [] if layout.is_plain else layout.scale_of[::-1]
        self.tower = nn.ModuleList(self._cells(index, way_up) for index in range(len(way_up)))
        self.combiners = nn.ModuleList(Conv2d(layout.widths[s], layout.widths[s], 1) for s in way_up[:-1])
        self.top = Conv2d(layout.widths[-1], layout.widths[-1], 1)
        self.heads = nn.ModuleDict(
            {
                layout.name(index): Conv2d(layout.widths[s], 2 * config.num_latents, 3)
                for index, s in enumerate(layout.scale_of)
            }
        )
        self.flows = nn.ModuleDict({name: flow(config.num_latents, config.num_flows) for name in self.heads})

    def _cells(self, index: int, way_up: list[int]) -> nn.Sequential:
        """Make the cells of one group on the way up, and the step to a coarser grid before them, if any."""
        here = way_up[index]
        below = way_up[index - 1] if index else here
        excite = self.config.squeeze_excite
        down = [encoder_cell(self.layout.widths[below], True, excite)] if here != below else []
        cells = [encoder_cell(self.layout.widths[here], False, excite) for _ in range(self.config.encoder_cells)]
        return nn.Sequential(*down, *cells)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Run the tower, and keep its state at the depth of every group."""
        black = -1.0
        padded = functional.pad(x, (self.config.padding,) * 4, value=black) if self.config.padding else x
        state = self.pre(self.stem(padded))
        kept = []
        for cells in self.tower:
            state = cells(state)
            kept.append(state)
        top = functional.elu(self.top(functional.elu(state)))
        return {self.layout.name(index): level for index, level in enumerate([top, *kept[-2::-1]])}

    def posterior(self, name: str, prior: Prior, features: Tensor, state: Tensor) -> TorchDistribution:
        """Add to the prior's raw outputs, then flow; see :meth:`Guide.posterior`."""
        index = len(self.combiners) - int(name.removeprefix("z_")) + 1
        if index < len(self.combiners):
            features = features + self.combiners[index](state)
        raw_loc, raw_scale = at_least_float32(self.heads[name](features)).chunk(2, dim=1)
        if self.config.residual_posterior:
            assert prior.raw is not None
            raw_loc, raw_scale = raw_loc + prior.raw[0], raw_scale + prior.raw[1]
        normal = diagonal_normal(soft_clamp(raw_loc), positive_scale(raw_scale))
        transforms = [*self.flows[name].children()]
        return TransformedDistribution(normal, transforms) if transforms else normal


def build_nvae(config: NvaeConfig, event_shape: torch.Size, levels: int | None) -> HierarchicalVAE:
    """Make an NVAE for x of ``event_shape``, ``(channels, side, side)``, with weights from the global generator.

    Args:
        levels: number of values of a pixel: 2 for binarised images, ``None`` where x is continuous.

    Raises:
        InputError: the images do not fit the grids, or the decoder does not fit the pixels.
    """
    if (config.decoder == "bernoulli") != (levels == 2):
        found = "binarised images" if levels == 2 else "images that are not binarised"
        raise InputError(
            f"model.nvae.decoder {config.decoder} does not fit {found}: bernoulli and data.binarize go together"
        )
    if config.decoder.startswith("logistic") and levels is None:
        raise InputError(
            f"model.nvae.decoder {config.decoder} scores levels of pixels, which these data lack: use normal"
        )
    generator = NVAEGenerator(config, event_shape, levels)
    return HierarchicalVAE(generator, NVAEGuide(generator))
