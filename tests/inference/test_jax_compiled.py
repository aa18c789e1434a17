"""Torch potentials translated to JAX: equal to torch, or refused."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

# As in the tests of the bridge, which may share this process: half the time to compile.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from torch import Tensor
from torch.nn import functional

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference import jax_compiled, targets, targets_curved, targets_modes
from ppl_vaebm.inference.base import KernelState, Potential, value_and_grad
from ppl_vaebm.inference.jax_bridge import run_jax
from ppl_vaebm.inference.jax_compiled import compiled_potential
from ppl_vaebm.inference.jax_potential import jax_precision
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.rng import stream
from tests.small_models import FEW, VECTORS, shipped_vaebm

NUM_CHAINS, DIM = 32, 4
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
FEATURES = torch.randn(7, DIM, generator=stream(0, "features"), dtype=torch.float64)
TARGETS: dict[str, tuple[Potential, int]] = {
    "reference": (targets.reference(DIM).potential, DIM),
    "gaussian": (targets.gaussian(FEATURES[0], FEATURES[1].exp()).potential, DIM),
    "rotated gaussian": (targets.conditioned_gaussian(DIM, is_rotated=True).potential, DIM),
    "ar1": (targets.ar1_gaussian(DIM, 0.6).potential, DIM),
    "two modes": (targets.two_modes().potential, 1),
    "banana": (targets_curved.banana().potential, 2),
    "funnel": (targets_curved.funnel(FEATURES[0]).potential, DIM + 1),
    "logistic regression": (targets_curved.logistic_regression(FEATURES, (FEATURES[:, 0] > 0).long()), DIM),
    "grid of modes": (targets_modes.grid_modes().potential, 2),
}
# What networks and targets leave out of the table.
PIECES: dict[str, Potential] = {
    "sqrt": lambda q: (q.square() + 1).sqrt().sum(-1),
    "reciprocal": lambda q: (q.square() + 1).reciprocal().sum(-1),
    "log1p": lambda q: q.square().log1p().sum(-1),
    "sigmoid": lambda q: q.sigmoid().sum(-1),
    "relu": lambda q: q.relu().square().sum(-1),
    "softplus far out": lambda q: functional.softplus(30 * q, beta=0.5).sum(-1),
    "where, by numbers": lambda q: torch.where((q > -0.5) & (q < 0.5), q.square(), q).sum(-1),
    "where, by numbers and equal": lambda q: torch.where((q >= -0.5) | (q <= -1.0), q.square(), q).sum(-1),
    "where, by tensors": lambda q: torch.where(q[:, :1] > q, q.cos(), torch.where(q[:, 1:2] < q, q, -q)).sum(-1),
    "scaled sums": lambda q: torch.add(q, q.sin(), alpha=2.0).sub(q.cos(), alpha=0.3).sum(-1),
    "matrix times vector": lambda q: q @ FEATURES[0].to(q),
    "scaled addmm": lambda q: torch.addmm(q, q, FEATURES[:DIM].to(q), beta=0.5, alpha=2.0).square().sum(-1),
    "whole reductions": lambda q: q.square().sum().reshape(1) + q.exp().mean() if len(q) == 1 else by_rows(q),
    "means": lambda q: q.exp().mean(-1) + q.unsqueeze(-1).mean((1, 2)) + q.sum(-1, keepdim=True).square().squeeze(1),
    "parts": lambda q: (torch.stack(q.split(3, dim=1)[0].split([1, 2], dim=1)[1].split(1, dim=1), 1)).sum((1, 2)),
    "strides": lambda q: q[:, ::2].sum(-1) + q[:, -1].exp(),
    "shapes": lambda q: q.unsqueeze(1).expand(-1, 3, -1).clone().view(-1, 3 * DIM).square().sum(-1),
    "transposed": lambda q: (q.t() * FEATURES[:DIM, :1].to(q)).square().sum(0),
}


def by_rows(q: Tensor) -> Tensor:
    """Evaluate the piece whose reductions are over one whole row."""
    return q.square().sum(1) + q.exp().mean(1)


def positions(dim: int, dtype: torch.dtype) -> Tensor:
    return 1.5 * torch.randn(NUM_CHAINS, dim, generator=stream(0, "position"), dtype=torch.float64).to(dtype)


def in_jax(potential: Potential, q: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients at all positions, by a compiled loop over halves of them, as a sampler has them."""
    phi = compiled_potential(potential, q)

    @jax.jit
    def evaluate(rows: Any) -> Any:
        return jax.lax.map(jax.vmap(jax.value_and_grad(phi)), rows.reshape(2, -1, q.shape[1]))

    with jax_precision(q.dtype):
        value, grad = (torch.from_numpy(np.array(part)) for part in evaluate(q.numpy()))
    assert value.dtype == grad.dtype == q.dtype
    return value.flatten(), grad.flatten(0, 1)


def relative_errors(potential: Potential, q: Tensor) -> list[float]:
    """Largest differences of values and of gradients, each relative to the largest of them."""
    pairs = zip(in_jax(potential, q), value_and_grad(potential, q), strict=True)
    return [float((ours - right).abs().max() / right.abs().max().clamp_min(1e-300)) for ours, right in pairs]


def vector_potential(name: str, dtype: torch.dtype) -> tuple[Potential, Tensor]:
    potential = noise_potential(shipped_vaebm(name).to(dtype))
    return potential, positions(potential.packing.dim, dtype)


FEW_VECTORS = [name for name in VECTORS if name in FEW]


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("name", [n if n in FEW_VECTORS else pytest.param(n, marks=pytest.mark.slow) for n in VECTORS])
def test_a_vector_vaebm_is_the_same_in_jax(name: str, dtype: torch.dtype) -> None:
    potential, q = vector_potential(name, dtype)
    assert max(relative_errors(potential, q)) < RTOL[dtype]


@pytest.mark.parametrize("name", TARGETS)
def test_so_are_the_targets(name: str) -> None:
    potential, dim = TARGETS[name]
    assert max(relative_errors(potential, positions(dim, torch.float64))) < RTOL[torch.float64]


@pytest.mark.parametrize("name", PIECES)
def test_so_is_every_other_operation(name: str) -> None:
    assert max(relative_errors(PIECES[name], positions(DIM, torch.float64))) < RTOL[torch.float64]


def traced(potential: Potential, q: Tensor) -> set[str]:
    nodes = jax_compiled._trace(potential, q[:1]).graph.nodes
    return {str(node.target).removeprefix("aten.") for node in nodes if node.op == "call_function"}


def test_no_row_of_the_table_is_without_a_test() -> None:
    seen = set()
    for potential, dim in [*TARGETS.values(), *((piece, DIM) for piece in PIECES.values())]:
        seen |= traced(potential, positions(dim, torch.float64))
    for name in FEW_VECTORS:
        seen |= traced(*vector_potential(name, torch.float64))
    assert set(jax_compiled.operations()) - seen == set()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("leaky_relu.default", lambda x, slope: jnp.where(x > 0, x, (slope + 1e-6) * x)),
        ("silu.default", jax.nn.gelu),
        ("addmm.default", lambda bias, x, y: bias + jax.lax.stop_gradient(x) @ y),  # only the gradient is wrong
    ],
)
def test_a_wrong_row_is_seen_and_refused(name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    potential, q = vector_potential(FEW_VECTORS[0], torch.float64)
    table = {**jax_compiled.operations(), name: wrong}
    monkeypatch.setattr(jax_compiled, "operations", lambda: table)
    with pytest.raises(InputError, match=r"expected the potential's (values|gradients) in JAX to be those in torch"):
        compiled_potential(potential, q)
    monkeypatch.setattr(jax_compiled, "_check_agreement", lambda *arguments: None)
    assert max(relative_errors(potential, q)) > RTOL[torch.float64]


def test_slopes_at_a_kink_are_torchs() -> None:
    def kinks(position: Tensor) -> Tensor:
        slopes = functional.leaky_relu(position, 0.1) + position.relu() + functional.softplus(position, threshold=0)
        return slopes.sum(-1)

    q = torch.zeros(2, DIM, dtype=torch.float64)
    for ours, right in zip(in_jax(kinks, q), value_and_grad(kinks, q), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in FEW if name.startswith("image")])
def test_convolutions_are_refused(name: str) -> None:
    potential = noise_potential(shipped_vaebm(name))
    sentence = (
        r"operations that are translated to JAX, found .*aten.convolution.default.*: sample it without is_compiled"
    )
    with pytest.raises(InputError, match=sentence):
        compiled_potential(potential, potential.draw_reference(stream(0, "position"), 2))


def branching(position: Tensor) -> Tensor:
    return position.sum(-1) if position[0, 0] > 0 else position.square().sum(-1)


def reading(position: Tensor) -> Tensor:
    return position.sum(-1) * position[0, 0].item()


def out_of_sight(position: Tensor) -> Tensor:
    return position.sum(-1) + torch.from_numpy(position.detach().numpy().sum(-1) ** 2)


def without_a_gradient(position: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = position.square()
    return (fixed * position).sum(-1)


@pytest.mark.parametrize(
    ("potential", "dtype", "sentence"),
    [
        (branching, torch.float64, "does the same for all positions, found one that reads numbers"),
        (reading, torch.float64, "does the same for all positions, found one that reads numbers"),
        (out_of_sight, torch.float64, "expected the potential's values in JAX"),
        (without_a_gradient, torch.float64, "expected the potential's gradients in JAX"),
        (lambda q: q.double().sum(-1).float(), torch.float32, "found aten._to_copy.default"),
        (lambda q: q.sum(-1, dtype=torch.float64).float(), torch.float32, "found aten._to_copy.default"),
        (lambda q: (q * FEATURES[0]).sum(-1), torch.float32, r"expected aten.mul.Tensor to give .* torch.float64"),
        (lambda q: q.sum(-1, dtype=torch.float32), torch.float64, "expected arguments of aten.sum.dim_IntList"),
        (lambda q: q.sum(-1), torch.bfloat16, "found torch.bfloat16"),
    ],
)
def test_what_would_be_wrong_is_refused(potential: Potential, dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compiled_potential(potential, positions(DIM, dtype))


def test_a_potential_of_another_shape_or_with_an_error_of_its_own_says_so_itself() -> None:
    q = positions(DIM, torch.float64)
    with pytest.raises(ValueError, match="one number per chain"):
        compiled_potential(lambda q: q.square(), q)

    def broken(position: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="^out of luck$"):
        compiled_potential(broken, q)


def test_shapes_are_any_batch_of_positions_and_others_are_refused() -> None:
    potential, dim = TARGETS["banana"]
    q = positions(dim, torch.float64)
    phi = compiled_potential(potential, q)
    with jax_precision(torch.float64):
        rows = q.numpy()
        assert jax.eval_shape(phi, rows[0]).shape == () and jax.eval_shape(phi, rows).shape == (NUM_CHAINS,)
        expected = torch.from_numpy(np.array(jax.jit(phi)(rows)))
        torch.testing.assert_close(expected, potential(q), rtol=1e-12, atol=0)
        for batched in (phi, jax.vmap(phi)):
            assert np.array(jax.jit(batched)(rows.reshape(4, 8, dim))).ravel() == pytest.approx(expected.numpy())
        with pytest.raises(InputError, match=r"expected positions of shape \(..., 2\) and torch.float64, found \(3,\)"):
            phi(np.zeros(3))
    with pytest.raises(InputError, match="found .* float32"):
        phi(jnp.zeros(dim))


def test_numbers_that_are_not_finite_pass_through() -> None:
    phi = compiled_potential(lambda q: (1 - q.square()).log().sum(-1), positions(1, torch.float64))
    with jax_precision(torch.float64):
        value = np.array(phi(np.array([[0.0], [1.0], [2.0], [math.nan]])))
    assert value[0] == 0 and value[1] == -math.inf and np.isnan(value[2:]).all()


def test_parameters_are_those_of_the_time_and_global_state_stays() -> None:
    scale = torch.ones(DIM, dtype=torch.float64, requires_grad=True)

    def potential(position: Tensor) -> Tensor:
        return (position * scale.exp()).square().sum(-1)

    q = positions(DIM, torch.float64)
    before = dict(jax.config.values)
    phi, expected = compiled_potential(potential, q), potential(q).detach()
    with torch.no_grad():
        scale.zero_()
    with jax_precision(torch.float64):
        torch.testing.assert_close(torch.from_numpy(np.array(phi(q.numpy()))), expected)
    assert scale.grad is None and dict(jax.config.values) == before


def stored(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "phi": state.potential}


class Counted:
    def __init__(self, potential: Potential) -> None:
        self.potential, self.num_calls = potential, 0

    def __call__(self, position: Tensor) -> Tensor:
        self.num_calls += 1
        return self.potential(position)


@pytest.mark.parametrize(
    "kernel",
    ["numpyro-hmc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("numpyro-nuts", "blackjax-nuts"))],
)
def test_moments_of_a_compiled_correlated_gaussian_are_right(kernel: Any) -> None:
    target = targets.ar1_gaussian(DIM, 0.6)
    potential, start = Counted(target.potential), target.exact(stream(0, "start"), NUM_CHAINS)
    options: dict[str, Any] = {"seed": 1, "num_draws": 150, "num_warmup": 60, "functionals": stored}
    chains = run_jax(kernel, potential, start, **options, is_compiled=True)
    assert potential.num_calls == 3  # the check of the start, that of the translation, and the trace

    def off(draws: Tensor, expected: float) -> Tensor:
        means = draws.mean(1)
        return (means.mean(0) - expected).abs() / (means.std(0) / math.sqrt(NUM_CHAINS))

    q = chains.draws["q"]
    products = q[..., 1:] * q[..., :-1]
    assert (off(q, 0.0) < 5).all() and (off(q.square(), 1.0) < 5).all() and (off(products, 0.6) < 5).all()
    assert (off(products, 0.0) > 5).all()  # the correlation that N(0, I) lacks is seen
    phi = target.potential(q.flatten(0, 1)).unflatten(0, q.shape[:2])
    torch.testing.assert_close(chains.draws["phi"], phi, rtol=0, atol=1e-12)
    steps, attrs = chains.stats["n_steps"], dict[str, Any](chains.attrs)
    assert attrs["is_compiled"] == 1 and attrs["num_evals_computed"] == NUM_CHAINS * steps.amax(0).sum()
    assert NUM_CHAINS * 2 <= chains.warmup_evals <= attrs["warmup_evals_computed"]


@pytest.mark.slow
def test_a_compiled_program_draws_what_the_bridge_draws_and_serves_no_other_potential() -> None:
    # Rounding differs, and chains of a chaotic integrator part: only the first draws, without adaptation.
    options: dict[str, Any] = {"seed": 1, "num_draws": 3, "num_warmup": 0, "functionals": stored, "step_size": 0.3}
    for correlation in (0.6, -0.6):
        target = targets.ar1_gaussian(DIM, correlation)
        start = target.exact(stream(0, "start"), NUM_CHAINS)
        ours, bridge = (
            run_jax("numpyro-hmc", target.potential, start, **options, is_compiled=flag) for flag in (True, False)
        )
        assert (ours.attrs["is_compiled"], bridge.attrs["is_compiled"]) == (1, 0)
        torch.testing.assert_close(ours.draws["q"], bridge.draws["q"], rtol=0, atol=1e-9)
        for name in ("num_evals_computed", "warmup_evals_computed"):
            assert ours.attrs[name] == bridge.attrs[name]
