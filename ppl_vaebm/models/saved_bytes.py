"""Count the bytes that a forward pass saves for the backward pass, and the rows that fit in memory with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ppl_vaebm.devices import free_bytes

MEMORY_FRACTION = 0.5
"""Fraction of the free memory that saved tensors may take; the backward pass needs some beside them. Chosen by us."""


class Pass(NamedTuple):
    """Result of one forward pass."""

    saved_bytes: int
    """Bytes saved for the backward pass, without weights and buffers."""
    shapes: dict[nn.Module, torch.Size]
    """Shape of one row of each module's output, in the order of the first calls."""


class _WithoutValues(TorchFunctionMode):
    """Answer questions about tensors that have no values: numbers are 0, conditions false, counters not 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.item, Tensor.__float__):
            return 0.0
        if func is Tensor.__bool__:
            return args[0].dtype != torch.bool
        return func(*args, **(kwargs or {}))


def dry_pass(net: nn.Module, device: str, batch_shape: tuple[int, ...], *inputs: Any) -> Pass:
    """Run a network forward on fake tensors, which have shapes and a device but no values and no memory.

    The kernels and the mixed precision are those of the device. In bfloat16 on a CPU, batch normalizations count a few
    bytes per channel too little, because fake ones give their moments the wrong type. The network is on the meta
    device, and its weights are fake afterwards; it takes a batch of this shape, ``(n, ...)``, and the inputs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device=device)
        return forward_pass(net, torch.empty(batch_shape, device=device), *inputs)


def forward_pass(net: nn.Module, *inputs: Any) -> Pass:
    """Run a network forward; count what it saves, each storage once, and record the shapes of its modules' outputs.

    Its first input is a batch, ``(n, ...)``. Numbers that it reads from tensors are 0.
    """
    with _shapes_of(net) as shapes, _WithoutValues():
        num_bytes = saved_bytes(net, lambda: net(*inputs))
    return Pass(num_bytes, shapes)


def saved_bytes(net: nn.Module, call: Callable[[], object]) -> int:
    """Count the bytes that a call saves for its backward pass, without the weights and buffers of a network."""
    owned = {tensor.untyped_storage() for tensor in (*net.parameters(), *net.buffers())}
    saved: set[torch.UntypedStorage] = set()  # objects, because fake tensors have no addresses

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # keeps what the backward pass needs alive until it is counted
        num_bytes = sum(storage.nbytes() for storage in saved - owned)
        del result
    return num_bytes


def bytes_per_row(net: nn.Module, call: Callable[[Tensor], object], row: Tensor) -> int:
    """Count the bytes that a call of rows saves for each, by calls with one and with two copies of ``(1, ...)``.

    The network's weights and buffers do not count.
    """
    one = row.detach().clone().requires_grad_()
    two = torch.cat([row, row]).detach().requires_grad_()
    with torch.enable_grad():
        return saved_bytes(net, lambda: call(two)) - saved_bytes(net, lambda: call(one))


def rows_that_fit(net: nn.Module, call: Callable[[Tensor], object], row: Tensor) -> int:
    """Return how many rows a call can take with its gradient in the free memory, at least 1; see :func:`bytes_per_row`.

    It is for passes only. Random numbers are drawn in blocks whose size does not depend on memory.
    """
    budget = int(MEMORY_FRACTION * free_bytes(row.device))
    return max(1, budget // max(1, bytes_per_row(net, call, row)))


@contextmanager
def _shapes_of(net: nn.Module) -> Iterator[dict[nn.Module, torch.Size]]:
    """Record the shapes of the modules' outputs during a block."""
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
