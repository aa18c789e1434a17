"""What a run would be, in numbers: its layers, its latents, and the memory of one training batch.

Nothing is allocated and no file is read. The networks are made on the meta device, and one training step's forward pass
then runs on fake tensors, which have a shape and a device, so that its kernels and its mixed precision are those of the
real one, and no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.overrides import TorchFunctionMode

from ppl_vaebm.config import Config, DataConfig, SviConfig
from ppl_vaebm.data.load import DataForm, form_without_files
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.svi import Objective
from ppl_vaebm.models.build import build_vae, has_discrete_x
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.nvae_cells import BatchNorm2d
from ppl_vaebm.models.spectral import spectral_layers
from ppl_vaebm.models.vae import HierarchicalVAE

NUM_MOMENTS = 2  # that Adam and Adamax keep of every weight
BYTES_PER_NOISE = 4  # a position in the replay is float32


class Pass(NamedTuple):
    """What one forward pass left behind."""

    saved_bytes: int
    """Kept for the backward pass, beside weights and buffers."""
    shapes: dict[nn.Module, torch.Size]
    """Output of every module that was called, one row of it, in the order of the first calls."""


class Row(NamedTuple):
    """A line of the table of layers: a module, or several alike in a row."""

    part: str
    layers: str
    shape: torch.Size | None
    """Of the output, without the batch."""
    num_parameters: int
    """Of one of them."""
    num_alike: int = 1


def describe(config: Config) -> list[str]:
    """Describe a run before it is started.

    Args:
        config: its configuration; the data's files need not be there.

    Returns:
        Lines to print: the layers of both networks, then sizes, then memory.

    Raises:
        InputError: a network that does not fit the data, or an image folder of unknown size.
    """
    form = form_of(config.data)
    with torch.device("meta"):
        vae = build_vae(config.model, form.event_shape, form.levels, form.is_dequantized).train()
        latent_shapes = vae.model.latent_shapes
        energy = None if has_discrete_x(config) else build_energy(config.energy, form.event_shape, latent_shapes)
    svi = dry_pass(
        Objective(vae, config.svi, config.seed), config.device, (config.svi.batch_size, *form.event_shape), 0
    )
    shapes = dict(svi.shapes)
    if energy is not None:
        net = _WithLatents(energy, latent_shapes)
        shapes |= dry_pass(net, config.device, (config.ebm.batch_size, *form.event_shape)).shapes
    lines = [f"x: {_shape(form.event_shape)}", "", *_table(layer_rows(vae, energy, shapes)), ""]
    lines += _sizes(vae)
    if energy is not None:
        lines += _energy_sizes(config, vae, energy)
    return [*lines, "", *_memory(config.svi, config.device, vae, svi.saved_bytes)]


def form_of(config: DataConfig) -> DataForm:
    """Tell the form of a data set without its files; a folder of images is taken to be in colour.

    Args:
        config: which data set.

    Returns:
        The form; grey where an option of the data is for grey images only.

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


# --- the pass ------------------------------------------------------------------------------------


class _WithLatents(nn.Module):
    """An energy, called with x alone; the latents have their shapes, and no values."""

    def __init__(self, energy: Energy, latent_shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.energy, self.latent_shapes = energy, latent_shapes

    def forward(self, x: Tensor) -> Tensor:
        z = {name: x.new_empty(len(x), *shape) for name, shape in self.latent_shapes.items()}
        energy: Tensor = self.energy(x, z)
        return energy


class _Valueless(TorchFunctionMode):
    """Read tensors without values: what goes on record is 0, what is asked is not so, what is counted has begun."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.item, Tensor.__float__):
            return 0.0
        if func is Tensor.__bool__:
            return args[0].dtype != torch.bool
        return func(*args, **(kwargs or {}))


def dry_pass(net: nn.Module, device: str, batch_shape: tuple[int, ...], *inputs: Any) -> Pass:
    """Run a network forward without computing anything.

    Args:
        net: on the meta device; it is left with fake weights, good for counting alone.
        device: whose kernels it would run on.
        batch_shape: of the batch that it is called with, ``(n, ...)``.
        inputs: what it is called with besides.

    Returns:
        As :func:`forward_pass`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device=device)
        return forward_pass(net, torch.empty(batch_shape, device=device), *inputs)


def forward_pass(net: nn.Module, *inputs: Any) -> Pass:
    """Run a network forward, and look at what it keeps and at what its modules return.

    Args:
        net: called with the inputs; numbers that it takes out of tensors are 0.
        inputs: the first is a batch, ``(n, ...)``.

    Returns:
        What was found. Each storage counts once, however many tensors share it. In bfloat16 on a CPU, batch
        normalisations count a few bytes per channel too little, because a fake one misstates the type of its moments.
    """
    owned = {tensor.untyped_storage() for tensor in (*net.parameters(), *net.buffers())}
    saved: set[torch.UntypedStorage] = set()  # of objects, not of addresses, for fake ones have none

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    with _shapes_of(net) as shapes, saved_tensors_hooks(pack, lambda tensor: tensor), _Valueless():
        result = net(*inputs)  # alive until the storages are counted, and with it all that it needs
        num_bytes = sum(storage.nbytes() for storage in saved - owned)
        del result
    return Pass(num_bytes, shapes)


@contextmanager
def _shapes_of(net: nn.Module) -> Iterator[dict[nn.Module, torch.Size]]:
    """Record the output shapes of a network's modules as they are called."""
    shapes: dict[nn.Module, torch.Size] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            shapes.setdefault(module, first.shape[1:])

    handles = [module.register_forward_hook(record) for module in net.modules()]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


# --- the table -----------------------------------------------------------------------------------


def layer_rows(vae: HierarchicalVAE, energy: Energy | None, shapes: dict[nn.Module, torch.Size]) -> list[Row]:
    """List what has parameters, in the order of the computation.

    Args:
        vae: its model and guide meet on the way down, so their parts take turns.
        energy: listed last.
        shapes: of a pass through them.

    Returns:
        One row for each layer, or child of a stack of layers; rows alike that follow one another are one.
    """
    position = {module: index for index, module in enumerate(shapes)}

    def first_call(module: nn.Module) -> float:
        return min((position[inner] for inner in module.modules() if inner in position), default=len(position))

    parts: list[tuple[float, list[Row]]] = []
    for name, net in (("guide", vae.guide), ("model", vae.model)) + ((("energy", energy),) if energy else ()):
        starts = [first_call(child) for child in net.children()]
        own = net.named_parameters(recurse=False)
        bare = [Row(f"{name}.{key}", "parameter", value.shape, value.numel()) for key, value in own]
        parts.append((min(starts) - 0.5, bare))
        parts += [
            (start, _rows(f"{name}.{key}", child, shapes))
            for start, (key, child) in zip(starts, net.named_children(), strict=True)
        ]
    return [row for _, rows in sorted(parts, key=lambda part: part[0]) for row in rows]


def _rows(name: str, part: nn.Module, shapes: dict[nn.Module, torch.Size]) -> list[Row]:
    """List the children of a stack, or a part as a whole."""
    children = list(part.named_children()) if isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else []
    if not children:
        rows = [Row(name, _kinds(part), _last_shape(part, shapes), count(part))]
    else:
        rows = [Row(key, _kinds(child), _last_shape(child, shapes), count(child)) for key, child in children]
    merged = []
    for _, group in groupby((row for row in rows if row.num_parameters), key=lambda row: row[1:]):
        alike = list(group)
        span = alike[0].part if len(alike) == 1 else f"{alike[0].part}..{alike[-1].part}"
        merged.append(alike[0]._replace(part=f"{name}.{span}" if children else name, num_alike=len(alike)))
    return merged


def _kinds(module: nn.Module) -> str:
    """Name a module's class, or those of the layers with parameters that it stacks."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return type_before_parametrizations(module).__name__
    kinds = [type_before_parametrizations(child).__name__ for child in module if count(child)]
    return _joined(kinds)


def _last_shape(module: nn.Module, shapes: dict[nn.Module, torch.Size]) -> torch.Size | None:
    """Return a module's output shape, or that of the last module in it that was called."""
    if module in shapes:
        return shapes[module]
    inner = set(module.modules())
    return next((shape for called, shape in reversed(shapes.items()) if called in inner), None)


def count(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _table(rows: Iterable[Row]) -> list[str]:
    cells = [("part", "layers", "output", "parameters")]
    for row in rows:
        repeats = f" x {row.num_alike}" if row.num_alike > 1 else ""
        shape = "" if row.shape is None else _shape(row.shape)
        cells.append((row.part, row.layers, shape, f"{_human(row.num_parameters)}{repeats}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


# --- sizes ---------------------------------------------------------------------------------------


def _sizes(vae: HierarchicalVAE) -> list[str]:
    """Tell the numbers of parameters, layers and latents."""
    generator, guide = count(vae.model), count(vae.guide)
    lines = [f"VAE: {_exact(generator + guide)} parameters, generator {_exact(generator)}, guide {_exact(guide)}"]
    num_convs = len(spectral_layers(vae, has_linear=False))
    num_norms = sum(isinstance(module, BatchNorm2d) for module in vae.modules())
    if num_norms:
        lines.append(f"layers: {num_convs} convolutions, {num_norms} batch normalisations")
    shapes = list(vae.model.latent_shapes.values())
    num_latents = sum(shape.numel() for shape in shapes)
    groups = "1 group" if len(shapes) == 1 else f"{len(shapes)} groups, coarsest first"
    lines.append(f"latents: {num_latents:,} in {groups}: {_joined([_shape(shape) for shape in shapes], bracket=True)}")
    num_x = vae.model.event_shape.numel()
    return [*lines, f"noise: {num_latents + num_x:,}, of the latents and {num_x:,} of x"]


def _energy_sizes(config: Config, vae: HierarchicalVAE, energy: Energy) -> list[str]:
    """Tell the size of the energy network, and what stage ebm stores."""
    num_noise = sum(shape.numel() for shape in vae.noise_shapes.values())
    num_bytes = config.ebm.replay_size * num_noise * BYTES_PER_NOISE
    kind = type(energy).__name__
    num_convs = len(spectral_layers(energy, has_linear=False))
    layers = f", layout {config.energy.layout}, {num_convs} convolutions" if num_convs else ""
    return [
        f"energy: {kind} of {config.energy.inputs.replace('-', ' ')}, {_exact(count(energy))} parameters{layers}",
        f"replay of stage ebm: {config.ebm.replay_size:,} positions, {_human_bytes(num_bytes)}",
    ]


def _memory(loop: SviConfig, device: str, vae: HierarchicalVAE, saved_bytes: int) -> list[str]:
    """Tell what a training step holds at most; training in several processes adds a copy of the gradients."""
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
    return [f"{title}:", *(f"  {name:<18}  {_human_bytes(number):>10}" for name, number in kept.items())]


def _joined(names: list[str], bracket: bool = False) -> str:
    """Write out names, with a count before those that repeat."""
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return ", ".join(
        name if number == 1 else f"{number} x ({name})" if bracket else f"{number} x {name}" for name, number in runs
    )


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "1"


def _human(number: int) -> str:
    """Shorten a count: 130.73 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _exact(number: int) -> str:
    return f"{_human(number)} ({number:,})"


def _human_bytes(number: int) -> str:
    """Shorten a number of bytes: 1.2 GiB."""
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
