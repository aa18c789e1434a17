"""A torch potential as a function of JAX: one call of the host gives values and gradients of all chains.

The call is ``jax.pure_callback``; ``jax.custom_vjp`` keeps the gradient that came with the value, so that
``jax.value_and_grad`` costs one evaluation and not two. Under ``jax.vmap`` the whole batch is one call. Values and
gradients are torch's to the last bit, and numbers that are not finite pass through: a sampler sees its divergences.
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

# Compiled programs take a potential by number, so that one program per shape serves every potential.
_NUMBERS = itertools.count()
_POTENTIALS: WeakValueDictionary[int, JaxPotential] = WeakValueDictionary()


def require(*packages: str) -> None:
    """Refuse to go on without optional packages.

    Raises:
        InputError: one of them is not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InputError(
            f"expected the packages {', '.join(packages)} for JAX's samplers, found no {', '.join(missing)}: "
            "install them with pip install 'ppl_vaebm[jax]'"
        )


@contextmanager
def jax_precision(dtype: torch.dtype) -> Iterator[None]:
    """Let JAX compute in a torch dtype, on the processor, within a block; its global configuration stays as it is.

    Args:
        dtype: float32 or float64.

    Raises:
        InputError: another dtype.
    """
    import jax

    if dtype not in NUMPY_DTYPES:
        raise InputError(f"expected positions of float32 or float64 for JAX, found {dtype}: convert them first")
    with jax.enable_x64(dtype == torch.float64), jax.default_device(jax.devices("cpu")[0]):
        yield


def check_positions(position: Array | NDArray[Any], dim: int, dtype: torch.dtype) -> None:
    """Check what a function of JAX that was made for some positions is called with.

    Args:
        position: ``(..., D)``.
        dim: D.
        dtype: as in torch.

    Raises:
        InputError: positions of another D or dtype.
    """
    if position.shape[-1:] != (dim,) or position.dtype != NUMPY_DTYPES[dtype]:
        raise InputError(
            f"expected positions of shape (..., {dim}) and {dtype}, found {position.shape} and {position.dtype}: "
            f"call within jax_precision({dtype})"
        )


class JaxPotential:
    """Phi as a function of JAX arrays, ``(..., D)`` to ``(...)``: differentiable in reverse mode, and for ``jax.vmap``.

    Args:
        potential: Phi.
        like: positions ``(C, D)``, for their D, dtype and device.
    """

    def __init__(self, potential: Potential, like: Tensor) -> None:
        self.potential = potential
        self.dim = like.shape[-1]
        self.dtype = like.dtype
        self.device = like.device
        self.num_calls = 0
        """Calls of the host so far."""
        self.num_rows = 0
        """Evaluations of Phi in them."""
        self.error: Exception | None = None
        """What the potential raised last; JAX hides it in a report of its own."""
        self.number = next(_NUMBERS)
        _POTENTIALS[self.number] = self

    def __call__(self, position: Array | NDArray[Any]) -> Array:
        """Evaluate Phi, nats.

        Raises:
            InputError: positions of another D or dtype.
        """
        check_positions(position, self.dim, self.dtype)
        return numbered_potential()(np.int32(self.number), position)

    def on_host(self, position: NDArray[Any], with_grad: bool) -> tuple[NDArray[Any], ...]:
        """Evaluate Phi in torch; JAX calls this.

        Args:
            position: ``(..., D)``, which JAX does not let us write to.
            with_grad: whether the gradient is wanted too.

        Returns:
            Phi, ``(...)``; with its gradient, ``(..., D)``.
        """
        try:
            rows = torch.from_numpy(np.array(position).reshape(-1, self.dim)).to(self.device)
            self.num_calls += 1
            self.num_rows += len(rows)
            found = value_and_grad(self.potential, rows) if with_grad else (value_only(self.potential, rows),)
        except Exception as error:
            self.error = error
            raise
        shapes = (position.shape[:-1], position.shape)
        return tuple(
            part.to("cpu", self.dtype).numpy().reshape(shape) for part, shape in zip(found, shapes, strict=False)
        )

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Raise what the potential raised, where JAX would wrap it in a report of a failed callback."""
        import jax

        self.error = None
        log = logging.getLogger("jax._src.callback")
        log.addFilter(self._is_news)
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self.error is None:
                raise
            raise self.error from None
        finally:
            log.removeFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Tell whether a record of JAX's log says more than the error that will be raised."""
        return self.error is None


@functools.cache
def numbered_potential() -> Callable[[Any, Any], Array]:
    """Make the function of a potential's number and positions ``(..., D)`` that every :class:`JaxPotential` is.

    Returns:
        Phi of the potential with that number, ``(...)``; the number may be traced.
    """
    import jax

    def call(with_grad: bool, number: Array, position: Array) -> list[Array]:
        words = jax.lax.bitcast_convert_type(position, np.uint32)
        value_words = jax.ShapeDtypeStruct((*position.shape[:-1], *words.shape[position.ndim :]), np.uint32)
        results = (value_words, jax.ShapeDtypeStruct(words.shape, np.uint32))[: 1 + with_grad]
        host = functools.partial(_on_host, with_grad, np.dtype(position.dtype))
        # "expand_dims" hands the whole batch over in one call, and the number as it is.
        found = jax.pure_callback(host, results, number, words, vmap_method="expand_dims")
        return [jax.lax.bitcast_convert_type(part, position.dtype) for part in found]

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
    with_grad: bool, dtype: np.dtype[Any], number: NDArray[np.int32], words: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], ...]:
    """Evaluate the potential with a number, on numbers that travel as words of 32 bits.

    JAX may call from a thread of its own, where ``jax.enable_x64`` of the caller's thread is not in force and
    float64 would be rounded to float32 on the way, in both directions. Words are left alone.
    """
    position = _from_words(np.asarray(words), dtype)
    found = _POTENTIALS[np.asarray(number).item()].on_host(position, with_grad)
    return tuple(_to_words(part) for part in found)


def _from_words(words: NDArray[np.uint32], dtype: np.dtype[Any]) -> NDArray[Any]:
    # float64 has two words to a number, on an axis of their own.
    return words.view(dtype)[..., 0] if dtype == np.float64 else words.view(dtype)


def _to_words(values: NDArray[Any]) -> NDArray[np.uint32]:
    words = np.ascontiguousarray(values[..., None]).view(np.uint32)
    return words if values.dtype == np.float64 else words[..., 0]
