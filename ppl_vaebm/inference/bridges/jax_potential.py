"""A torch potential as a function of JAX arrays: one host call returns values and gradients of all chains.

The call is ``jax.pure_callback``, one for a whole batch under ``jax.vmap``; ``jax.custom_vjp`` keeps the gradient that
is computed with the value, so that ``jax.value_and_grad`` costs one evaluation. Values and gradients are torch's to the
last bit, those that are not finite included.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.kernels.base import Potential, value_and_grad, value_only

if TYPE_CHECKING:
    from jax import Array

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}

# A compiled program identifies a potential by number, so one program per shape works for every potential.
_NUMBERS = itertools.count()
_POTENTIALS: WeakValueDictionary[int, JaxPotential] = WeakValueDictionary()


def require(*packages: str) -> None:
    """Raise an InputError if one of the packages is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InputError(
            f"expected the packages {', '.join(packages)} for JAX's samplers, found no {', '.join(missing)}: "
            "type pip install -e '.[jax]' in the repository"
        )


@contextmanager
def jax_precision(dtype: torch.dtype) -> Iterator[None]:
    """Let JAX compute in float32 or float64, on the CPU, within a block, without a change of its configuration."""
    import jax

    if dtype not in NUMPY_DTYPES:
        raise InputError(f"expected positions of float32 or float64 for JAX, found {dtype}: convert them first")
    with jax.enable_x64(dtype == torch.float64), jax.default_device(jax.devices("cpu")[0]):
        yield


class JaxPotential:
    """Phi as a function of JAX arrays, ``(..., D)`` to ``(...)``, for ``jax.grad`` and ``jax.vmap``.

    Positions ``like``, ``(C, D)``, give D, dtype and device.
    """

    def __init__(self, potential: Potential, like: Tensor) -> None:
        self.potential = potential
        self.dim, self.dtype, self.device = like.shape[-1], like.dtype, like.device
        self.num_calls = 0
        """Host calls so far."""
        self.num_rows = 0
        """Evaluations of Phi in them."""
        self.error: Exception | None = None
        """The last error of the potential, which JAX hides in an error of its own."""
        self.number = next(_NUMBERS)
        _POTENTIALS[self.number] = self

    def __call__(self, position: Array | NDArray[Any]) -> Array:
        """Evaluate Phi, nats; InputError for positions of another D or dtype."""
        if position.shape[-1:] != (self.dim,) or position.dtype != NUMPY_DTYPES[self.dtype]:
            raise InputError(
                f"expected positions of shape (..., {self.dim}) and {self.dtype}, found {position.shape} and "
                f"{position.dtype}: call within jax_precision({self.dtype})"
            )
        return numbered_potential()(np.int32(self.number), position)

    def on_host(self, position: NDArray[Any], with_grad: bool) -> tuple[NDArray[Any], ...]:
        """Evaluate Phi, ``(...)``, in torch, and its gradient, ``(..., D)``, if asked for; JAX calls this.

        The positions are memory of JAX that is read-only.
        """
        try:
            rows = torch.from_numpy(np.array(position).reshape(-1, self.dim)).to(self.device)
            self.num_calls += 1
            self.num_rows += len(rows)
            results = value_and_grad(self.potential, rows) if with_grad else (value_only(self.potential, rows),)
        except Exception as error:
            self.error = error
            raise
        shapes = (position.shape[:-1], position.shape)
        return tuple(
            part.to("cpu", self.dtype).numpy().reshape(shape) for part, shape in zip(results, shapes, strict=False)
        )

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Raise the potential's own errors, which JAX wraps in an error of its callback and logs."""
        import jax

        self.error = None
        log = logging.getLogger("jax._src.callback")
        log.addFilter(self._has_no_error)
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self.error is None:
                raise
            raise self.error from None
        finally:
            log.removeFilter(self._has_no_error)

    def _has_no_error(self, record: logging.LogRecord) -> bool:
        return self.error is None


@functools.cache
def numbered_potential() -> Callable[[Any, Any], Array]:
    """Make the function of a potential's number, which may be traced, and positions ``(..., D)`` to Phi, ``(...)``."""
    import jax

    def call(with_grad: bool, number: Array, position: Array) -> list[Array]:
        bits = jax.lax.bitcast_convert_type(position, np.uint32)
        value_bits = jax.ShapeDtypeStruct((*position.shape[:-1], *bits.shape[position.ndim :]), np.uint32)
        results = (value_bits, jax.ShapeDtypeStruct(bits.shape, np.uint32))[: 1 + with_grad]
        host = functools.partial(_on_host, with_grad, np.dtype(position.dtype))
        # "expand_dims" passes the whole batch in one call, and the number without a batch axis.
        parts = jax.pure_callback(host, results, number, bits, vmap_method="expand_dims")
        return [jax.lax.bitcast_convert_type(part, position.dtype) for part in parts]

    @jax.custom_vjp
    def phi(number: Array, position: Array) -> Array:
        (value,) = call(False, number, position)
        return value

    def forward(number: Array, position: Array) -> tuple[Array, Array]:
        value, grad = call(True, number, position)
        return value, grad

    def backward(grad: Array, cotangent: Array) -> tuple[None, Array]:
        return None, cotangent[..., None] * grad

    phi.defvjp(forward, backward)
    return phi


def _on_host(
    with_grad: bool, dtype: np.dtype[Any], number: NDArray[np.int32], bits: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], ...]:
    """Evaluate the potential with a number, on floats that are passed as integers of 32 bits.

    JAX may call from a thread of its own, where the caller's ``jax.enable_x64`` does not hold and float64 would be
    rounded to float32 in both directions; integers are not.
    """
    has_axis = dtype == np.float64  # two integers to a number, on an axis of their own
    floats = np.asarray(bits).view(dtype)
    results = _POTENTIALS[np.asarray(number).item()].on_host(floats[..., 0] if has_axis else floats, with_grad)
    parts = (np.ascontiguousarray(part[..., None]).view(np.uint32) for part in results)
    return tuple(part if has_axis else part[..., 0] for part in parts)
