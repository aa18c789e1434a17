"""A torch potential translated to JAX, operation by operation, so that XLA compiles it together with its sampler.

The potential is traced once, on one row, into a graph of ATen operations. What does not depend on the position, among
it the parameters, is computed then, by torch, and is constant; the rest is looked up in a table, which has what fully
connected networks and analytic targets need. Anything else is refused, and a translation that does not agree with
torch is never handed out. The other way is :class:`~ppl_vaebm.inference.jax_potential.JaxPotential`.

Convolutions are left out on purpose: on a processor, one of 96 channels took 38 times as long within a loop of XLA's,
where every sampler evaluates its potential, as outside (*measured*, ``benchmarks/jax_compiled.py``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.base import Potential, value_and_grad
from ppl_vaebm.inference.jax_potential import check_positions, jax_precision
from ppl_vaebm.rng import stream

if TYPE_CHECKING:
    from jax import Array

# Draws of N(0, I) on which a translation has to agree with torch, and to which part of the largest number among
# values or gradients. Chosen by us: the shipped vector models agree to 1e-5 and 1e-10 in
# tests/inference/test_jax_compiled.py.
NUM_CHECKED = 16
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}

_ADVICE = "sample it without is_compiled, where JAX calls torch"


def compiled_potential(potential: Potential, like: Tensor) -> Callable[[Array | NDArray[Any]], Array]:
    """Translate Phi to a function of JAX arrays that can be compiled, vectorised and differentiated.

    Args:
        potential: Phi; its parameters are taken as they are now.
        like: positions ``(C, D)``, for their D, dtype and device.

    Returns:
        Phi, ``(..., D)`` to ``(...)``, nats; to be called within ``jax_precision(like.dtype)``.

    Raises:
        InputError: an operation without a translation, a computation that depends on the numbers it meets, a position
            of another dtype than float32 or float64, or a translation that does not agree with torch.
        ValueError: the potential does not return one number per chain.
    """
    from jax import numpy as jnp

    dim, dtype = like.shape[-1], like.dtype
    with jax_precision(dtype):
        generator = stream(0, "check of a translation to JAX")
        rows = torch.randn(NUM_CHECKED, dim, generator=generator, dtype=dtype).to(like.device)
        expected = value_and_grad(potential, rows)
        one_row = _Translation(_trace(potential, rows[:1]))

        def phi(position: Array | NDArray[Any]) -> Array:
            check_positions(position, dim, dtype)
            value: Array = jnp.vectorize(one_row, signature="(d)->()")(position)
            return value

        _check_agreement(phi, rows, expected)
    return phi


class _Translation:
    """A traced graph as a function of one position, ``(D,)`` to ``()``."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.constants: dict[fx.Node, Any] = {}
        self.steps: list[tuple[fx.Node, Callable[..., Any]]] = []
        table, missing = operations(), []
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.position = node
            elif node.op == "output":
                (self.output,) = node.all_input_nodes
            elif node.op == "get_attr":
                self.constants[node] = operator.attrgetter(node.target)(graph)
            elif all(argument in self.constants for argument in node.all_input_nodes):
                self.constants[node] = self._computed_once(node)
            elif node.target is operator.getitem:
                self.steps.append((node, operator.getitem))
            elif (name := str(node.target).removeprefix("aten.")) in table:
                self.steps.append((node, table[name]))
            else:
                missing.append(str(node.target))
        if missing:
            raise InputError(
                "expected a potential of operations that are translated to JAX, found "
                f"{', '.join(dict.fromkeys(missing))}: {_ADVICE}"
            )
        self.constants = {node: _array(value) for node, value in self.constants.items()}

    def _computed_once(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.constants.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, position: Array) -> Array:
        known = self.constants | {self.position: position[None]}
        for node, function in self.steps:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            try:
                known[node] = function(*args, **kwargs)
            except TypeError as error:
                raise InputError(
                    f"expected arguments of {node.target} that are translated to JAX, found {node.kwargs}: {_ADVICE}"
                ) from error
            _check_form(node, known[node])
        phi: Array = known[self.output][0]
        return phi


def _trace(potential: Potential, row: Tensor) -> fx.GraphModule:
    """Record what the potential does with one position, ``(1, D)``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with torch.no_grad():
            graph: fx.GraphModule = make_fx(potential)(row)
    except RuntimeError as error:
        # What torch's tracer says where a number is asked for, by float(), if or while.
        if "_local_scalar_dense" not in str(error):
            raise
        raise InputError(
            f"expected a potential that does the same for all positions, found one that reads numbers: {_ADVICE}"
        ) from None
    graph.graph.eliminate_dead_code()
    return graph


def _array(value: Any) -> Any:
    """Turn what torch computed once into arrays; several parts stay several."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else [_array(part) for part in value]


def _check_form(node: fx.Node, found: Any) -> None:
    """Refuse an operation whose result has not the shape and dtype that torch gave it.

    So are numbers of 64 bits among float32, which JAX would round in silence.
    """
    expected = node.meta.get("tensor_meta")  # none of several parts, which are nodes of their own
    if expected is None or (tuple(expected.shape), str(expected.dtype)) == (found.shape, f"torch.{found.dtype}"):
        return
    raise InputError(
        f"expected {node.target} to give shape {tuple(expected.shape)} and {expected.dtype}, found {found.shape} and "
        f"{found.dtype} in JAX: {_ADVICE}"
    )


def _check_agreement(
    phi: Callable[[Array | NDArray[Any]], Array], rows: Tensor, expected: tuple[Tensor, Tensor]
) -> None:
    """Refuse a translation whose values or gradients are not torch's.

    It would come of what a trace does not see: gradients of the potential's own making, or numbers from elsewhere.
    """
    import jax

    found = jax.jit(jax.vmap(jax.value_and_grad(phi)))(rows.cpu().numpy())
    for name, ours, torchs in zip(("values", "gradients"), found, expected, strict=True):
        right = torchs.cpu().numpy()
        scale = np.abs(right[np.isfinite(right)]).max(initial=0.0)
        tolerance = TOLERANCES[rows.dtype] * scale
        if not np.allclose(np.asarray(ours), right, rtol=0, atol=tolerance, equal_nan=True):
            raise InputError(
                f"expected the potential's {name} in JAX to be those in torch, found a difference of "
                f"{np.abs(np.asarray(ours) - right).max():.3g} where the largest is {scale:.3g}: {_ADVICE}"
            )


@functools.cache
def operations() -> dict[str, Callable[..., Any]]:
    """Make the table: names of ATen's overloads to functions of JAX with the same arguments."""
    return _arithmetic() | _activations() | _reductions() | _shapes()


def _arithmetic() -> dict[str, Callable[..., Any]]:
    from jax import numpy as jnp
    from jax.scipy import special

    return {
        "add.Tensor": lambda x, y, *, alpha=1: x + y if alpha == 1 else x + alpha * y,
        "add.Scalar": operator.add,
        "sub.Tensor": lambda x, y, *, alpha=1: x - y if alpha == 1 else x - alpha * y,
        "rsub.Scalar": lambda x, y: y - x,
        "mul.Tensor": operator.mul,
        "mul.Scalar": operator.mul,
        "div.Tensor": operator.truediv,
        "neg.default": operator.neg,
        "reciprocal.default": lambda x: 1 / x,
        "pow.Tensor_Scalar": jnp.power,
        "sqrt.default": jnp.sqrt,
        "exp.default": jnp.exp,
        "log.default": jnp.log,
        "log1p.default": jnp.log1p,
        "sin.default": jnp.sin,
        "cos.default": jnp.cos,
        "erf.default": special.erf,
        "gt.Scalar": operator.gt,
        "ge.Scalar": operator.ge,
        "lt.Scalar": operator.lt,
        "le.Scalar": operator.le,
        "gt.Tensor": operator.gt,
        "lt.Tensor": operator.lt,
        "bitwise_and.Tensor": operator.and_,
        "bitwise_or.Tensor": operator.or_,
        "where.self": jnp.where,
        "mm.default": operator.matmul,
        "mv.default": operator.matmul,
        "addmm.default": lambda bias, x, y, *, beta=1, alpha=1: beta * bias + alpha * (x @ y),
    }


def _activations() -> dict[str, Callable[..., Any]]:
    import jax
    from jax import numpy as jnp

    def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
        return jnp.where(beta * x > threshold, x, jnp.logaddexp(beta * x, 0) / beta)

    return {
        "tanh.default": jnp.tanh,
        "sigmoid.default": jax.nn.sigmoid,
        "silu.default": jax.nn.silu,
        "relu.default": jax.nn.relu,
        # JAX's own has another slope at zero.
        "leaky_relu.default": lambda x, slope=0.01: jnp.where(x > 0, x, slope * x),
        "softplus.default": softplus,
    }


def _reductions() -> dict[str, Callable[..., Any]]:
    from jax import numpy as jnp
    from jax.scipy import special

    def over_axes(reduce: Callable[..., Array]) -> Callable[..., Array]:
        # No axes are all axes.
        return lambda x, dims=None, keepdim=False: reduce(x, axis=tuple(dims) if dims else None, keepdims=keepdim)

    return {
        "sum.default": jnp.sum,
        "sum.dim_IntList": over_axes(jnp.sum),
        "mean.default": jnp.mean,
        "mean.dim": over_axes(jnp.mean),
        "logsumexp.default": over_axes(special.logsumexp),
    }


def _shapes() -> dict[str, Callable[..., Any]]:
    from jax import numpy as jnp

    def at(x: Array, dim: int, index: int | slice) -> Array:
        return x[(slice(None),) * (dim % x.ndim) + (index,)]

    def expand(x: Array, sizes: list[int]) -> Array:
        own = (1,) * (len(sizes) - x.ndim) + x.shape
        return jnp.broadcast_to(x, [old if size == -1 else size for size, old in zip(sizes, own, strict=True)])

    def split(x: Array, sizes: Iterable[int], dim: int = 0) -> list[Array]:
        return jnp.split(x, np.cumsum(list(sizes))[:-1], axis=dim)

    return {
        "view.default": lambda x, shape: x.reshape(shape),
        "t.default": jnp.transpose,
        "squeeze.dim": jnp.squeeze,
        "unsqueeze.default": jnp.expand_dims,
        "expand.default": expand,
        "clone.default": lambda x, **_: x,
        "select.int": at,
        "slice.Tensor": lambda x, dim=0, start=None, end=None, step=1: at(x, dim, slice(start, end, step)),
        "split.Tensor": lambda x, size, dim=0: jnp.split(x, list(range(size, x.shape[dim], size)), axis=dim),
        "split_with_sizes.default": split,
        "cat.default": lambda parts, dim=0: jnp.concatenate(parts, axis=dim),
        "stack.default": lambda parts, dim=0: jnp.stack(parts, axis=dim),
        "zeros_like.default": lambda x, **_: jnp.zeros_like(x),
    }
