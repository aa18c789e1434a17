"""Describe a run before it starts: layers, latents, and the memory of one training step.

Nothing is allocated and no file is read: the networks are on the meta device, and the forward pass of one training step
runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ppl_vaebm.config import Config, DataConfig, SviConfig
from ppl_vaebm.data.load import DataForm, form_without_files
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.svi import Objective
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.layers import spectral_layers
from ppl_vaebm.models.nvae_cells import BatchNorm2d
from ppl_vaebm.models.saved_bytes import dry_pass
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae, has_discrete_x
from ppl_vaebm.tables import text_table

NUM_MOMENTS = 2  # per weight, in Adam and Adamax
BYTES_PER_NOISE = 4  # of a position in the replay buffer, float32


class LayerRow(NamedTuple):
    """A row of the table of layers: a module, or several equal ones that follow each other."""

    part: str
    layers: str
    shape: torch.Size | None
    """Of the output, without the batch."""
    num_parameters: int
    """Of one module."""
    num_alike: int = 1


def describe(config: Config) -> list[str]:
    """Describe a run before it starts.

    The lines to print are the layers of both networks, then sizes, then memory.

    Raises:
        InputError: a network that does not fit the data, or an image folder of unknown size.
    """
    form = form_of(config.data)
    with torch.device("meta"):
        vae = build_vae(config.model, form.event_shape, form.levels, form.is_dequantized).train()
        latent_shapes = vae.model.latent_shapes
        energy = None if has_discrete_x(config) else build_energy(config.energy, form.event_shape, latent_shapes)
    objective = Objective(vae, config.svi, config.seed)
    svi = dry_pass(objective, config.device, (config.svi.batch_size, *form.event_shape), 0)
    shapes = dict(svi.shapes)
    if energy is not None:
        net = _WithLatents(energy, latent_shapes)
        shapes |= dry_pass(net, config.device, (config.ebm.batch_size, *form.event_shape)).shapes
    lines = [f"x: {_by(form.event_shape)}", "", _table(layer_rows(vae, energy, shapes)), "", *_sizes(vae)]
    if energy is not None:
        lines += _energy_sizes(config, vae, energy)
    return "\n".join([*lines, "", *_memory(config.svi, config.device, vae, svi.saved_bytes)]).splitlines()


def form_of(config: DataConfig) -> DataForm:
    """Return the form of a data set without its files; a folder of images is assumed to be in color.

    Raises:
        InputError: an image folder of unknown size, or an option that does not fit the data set.
    """
    form = form_without_files(config)
    if form is not None:
        return form
    if config.image_size is None:
        raise InputError(f"a dry run does not read the files of {config.name}: give the images' side, data.image-size")
    shape = torch.Size([1 if config.binarize else 3, config.image_size, config.image_size])
    return DataForm(shape, 2 if config.binarize else 2**config.num_bits, not config.binarize)


class _WithLatents(nn.Module):
    """An energy that is called with x alone; its latents have shapes and no values."""

    def __init__(self, energy: Energy, latent_shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.energy, self.latent_shapes = energy, latent_shapes

    def forward(self, x: Tensor) -> Tensor:
        z = {name: x.new_empty(len(x), *shape) for name, shape in self.latent_shapes.items()}
        energy: Tensor = self.energy(x, z)
        return energy


# --- the table of layers ---------------------------------------------------------------------------


def layer_rows(vae: HierarchicalVAE, energy: Energy | None, shapes: dict[nn.Module, torch.Size]) -> list[LayerRow]:
    """List the modules with parameters, in the order of the computation.

    ``shapes`` are those of a pass through them. One row is a layer, or a child of a stack of layers; equal rows that
    follow each other are merged. The energy stands last.
    """
    position = {module: index for index, module in enumerate(shapes)}

    def first_call(module: nn.Module) -> float:
        return min((position[inner] for inner in module.modules() if inner in position), default=len(position))

    parts: list[tuple[float, list[LayerRow]]] = []
    for name, net in (("guide", vae.guide), ("model", vae.model)) + ((("energy", energy),) if energy else ()):
        own = [
            LayerRow(f"{name}.{key}", "parameter", value.shape, value.numel())
            for key, value in net.named_parameters(recurse=False)
        ]
        children = [(first_call(child), _rows(f"{name}.{key}", child, shapes)) for key, child in net.named_children()]
        parts += [(min(start for start, _ in children) - 0.5, own), *children]
    return [row for _, rows in sorted(parts, key=lambda part: part[0]) for row in rows]


def _rows(name: str, part: nn.Module, shapes: dict[nn.Module, torch.Size]) -> list[LayerRow]:
    """List the children of a stack, or a part as a whole."""
    is_stack = isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and len(part) > 0
    children = [(f".{key}", child) for key, child in part.named_children()] if is_stack else [("", part)]
    rows = [LayerRow(key, _kinds(child), _last_shape(child, shapes), count(child)) for key, child in children]
    merged = []
    for _, group in groupby((row for row in rows if row.num_parameters), key=lambda row: row[1:]):
        first, *rest = group
        span = f"..{rest[-1].part.removeprefix('.')}" if rest else ""
        merged.append(first._replace(part=f"{name}{first.part}{span}", num_alike=1 + len(rest)))
    return merged


def _kinds(module: nn.Module) -> str:
    """Name a module's class, or those of the layers with parameters that it stacks."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return type_before_parametrizations(module).__name__
    return _joined([type_before_parametrizations(child).__name__ for child in module if count(child)])


def _last_shape(module: nn.Module, shapes: dict[nn.Module, torch.Size]) -> torch.Size | None:
    """Return a module's output shape, or that of the last module in it that was called."""
    if module in shapes:
        return shapes[module]
    inner = set(module.modules())
    return next((shape for called, shape in reversed(shapes.items()) if called in inner), None)


def count(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _table(rows: Iterable[LayerRow]) -> str:
    cells = []
    for row in rows:
        repeats = f" x {row.num_alike}" if row.num_alike > 1 else ""
        shape = "" if row.shape is None else _by(row.shape)
        cells.append((row.part, row.layers, shape, f"{_human(row.num_parameters)}{repeats}"))
    return text_table(cells, ("part", "layers", "output", "parameters"))


# --- sizes -----------------------------------------------------------------------------------------


def _sizes(vae: HierarchicalVAE) -> list[str]:
    """Describe the numbers of parameters, layers and latents."""
    generator, guide = count(vae.model), count(vae.guide)
    lines = [f"VAE: {_exact(generator + guide)} parameters, generator {_exact(generator)}, guide {_exact(guide)}"]
    num_norms = sum(isinstance(module, BatchNorm2d) for module in vae.modules())
    if num_norms:
        num_convs = len(spectral_layers(vae, has_linear=False))
        lines.append(f"layers: {num_convs} convolutions, {num_norms} batch normalisations")
    shapes = list(vae.model.latent_shapes.values())
    num_latents, num_x = sum(shape.numel() for shape in shapes), vae.model.event_shape.numel()
    groups = "1 group" if len(shapes) == 1 else f"{len(shapes)} groups, coarsest first"
    lines.append(f"latents: {num_latents:,} in {groups}: {_joined([_by(shape) for shape in shapes], bracket=True)}")
    return [*lines, f"noise: {num_latents + num_x:,}, of the latents and {num_x:,} of x"]


def _energy_sizes(config: Config, vae: HierarchicalVAE, energy: Energy) -> list[str]:
    """Describe the size of the energy network and of the replay buffer."""
    num_noise = sum(shape.numel() for shape in vae.noise_shapes.values())
    num_bytes = config.ebm.replay_size * num_noise * BYTES_PER_NOISE
    num_convs = len(spectral_layers(energy, has_linear=False))
    layers = f", layout {config.energy.layout}, {num_convs} convolutions" if num_convs else ""
    inputs = config.energy.inputs.replace("-", " ")
    return [
        f"energy: {type(energy).__name__} of {inputs}, {_exact(count(energy))} parameters{layers}",
        f"replay of stage ebm: {config.ebm.replay_size:,} positions, {_human_bytes(num_bytes)}",
    ]


def _memory(loop: SviConfig, device: str, vae: HierarchicalVAE, saved_bytes: int) -> list[str]:
    """Describe the largest memory of a training step; several processes need a copy of the gradients more."""
    trained = sum(parameter.nbytes for parameter in vae.parameters())
    with_buffers = trained + sum(buffer.nbytes for buffer in vae.buffers())
    kept = {
        "weights": with_buffers,
        "gradients": trained,
        f"{loop.optimizer} state": NUM_MOMENTS * trained,
        "averaged weights": with_buffers,
        "saved for backward": saved_bytes,
    }
    kept["in all"] = sum(kept.values())
    precision = "bfloat16 and float32" if loop.bf16 else "float32"
    title = f"memory of stage svi, a process with {loop.batch_size} data points a step, {precision} on {device}"
    return [f"{title}:", text_table([(name, _human_bytes(number)) for name, number in kept.items()], numbers=(1,))]


def _joined(names: list[str], bracket: bool = False) -> str:
    """List names, with a count before those that repeat."""
    runs = [(f"({name})" if bracket else name, name, len(list(group))) for name, group in groupby(names)]
    return ", ".join(name if number == 1 else f"{number} x {repeated}" for repeated, name, number in runs)


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "1"


def _human(number: int) -> str:
    """Shorten a count: 130.73 M."""
    return _short(number, ("", " k", " M", " G"), 1000, 2)


def _exact(number: int) -> str:
    return f"{_human(number)} ({number:,})"


def _human_bytes(number: int) -> str:
    """Shorten a number of bytes: 1.2 GiB."""
    return _short(number, (" B", " KiB", " MiB", " GiB"), 1024, 1)


def _short(number: int, units: tuple[str, ...], base: int, digits: int) -> str:
    power = next(power for power in reversed(range(len(units))) if number >= base**power or not power)
    return f"{number / base**power:,.{digits if power else 0}f}{units[power]}"
