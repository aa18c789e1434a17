from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges import jax_potential
from ppl_vaebm.inference.bridges.jax_potential import JaxPotential, jax_precision, require
from ppl_vaebm.inference.kernels.base import value_and_grad
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.rng import stream
from tests.small_models import FEW, shipped_vaebm

NUM_CHAINS = 64  # so many that torch's vector instructions treat the rows of every batch alike
DTYPES = [torch.float32, torch.float64]


def quartic(position: Tensor) -> Tensor:
    return 0.25 * position.pow(4).sum(-1) + position[:, 0].sin()


def positions(dtype: torch.dtype, dim: int = 6) -> Tensor:
    return torch.randn(NUM_CHAINS, dim, generator=stream(0, "position"), dtype=torch.float64).to(dtype)


def in_a_vmap(phi: JaxPotential) -> Callable[[Any], Any]:
    return jax.vmap(jax.value_and_grad(phi))


NUM_BATCHES = 4


def in_a_compiled_loop(phi: JaxPotential) -> Callable[[Any], Any]:
    """Evaluate batch after batch in one program, where XLA may call from a thread of its own."""

    @jax.jit
    def evaluate(q: Any) -> Any:
        batches = q.reshape(NUM_BATCHES, -1, q.shape[1])
        value, grad = jax.lax.map(jax.vmap(jax.value_and_grad(phi)), batches)
        return value.reshape(-1), grad.reshape(q.shape)

    return evaluate


@pytest.mark.parametrize("ways", [in_a_vmap, in_a_compiled_loop])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_torchs_to_the_last_bit(
    dtype: torch.dtype, ways: Callable[[JaxPotential], Callable[[Any], Any]]
) -> None:
    q = positions(dtype)
    phi = JaxPotential(quartic, q)
    with jax_precision(dtype):
        value, grad = (torch.from_numpy(np.array(part)) for part in ways(phi)(q.numpy()))
    expected = value_and_grad(quartic, q)
    assert value.dtype == grad.dtype == dtype
    assert value.equal(expected[0]) and grad.equal(expected[1])
    assert not value.equal(value_and_grad(quartic, q.bfloat16().to(dtype))[0])  # rounded positions would be seen


@pytest.mark.parametrize("name", FEW)
def test_values_and_gradients_of_a_vaebm_are_torchs_to_the_last_bit(name: str) -> None:
    potential = noise_potential(shipped_vaebm(name))
    q = potential.draw_reference(stream(0, "position"), 5)
    phi = JaxPotential(potential, q)
    with jax_precision(q.dtype):
        value, grad = (torch.from_numpy(np.array(part)) for part in in_a_vmap(phi)(q.numpy()))
    expected = value_and_grad(potential, q)
    assert value.equal(expected[0]) and grad.equal(expected[1])


def test_a_batch_is_one_host_call() -> None:
    q = positions(torch.float32)
    phi = JaxPotential(quartic, q)
    with jax_precision(torch.float32):
        jax.vmap(phi)(q.numpy())
        assert (phi.num_calls, phi.num_rows) == (1, NUM_CHAINS)
        in_a_vmap(phi)(q.numpy())  # the value and its gradient
        assert (phi.num_calls, phi.num_rows) == (2, 2 * NUM_CHAINS)
        in_a_compiled_loop(phi)(q.numpy())[0].block_until_ready()
        assert (phi.num_calls, phi.num_rows) == (2 + NUM_BATCHES, 3 * NUM_CHAINS)
        [jax.value_and_grad(phi)(row) for row in q.numpy()[:8]]  # a call for each chain
        assert (phi.num_calls, phi.num_rows) == (2 + NUM_BATCHES + 8, 3 * NUM_CHAINS + 8)


def test_phi_takes_any_batch_of_positions() -> None:
    q = positions(torch.float32).reshape(16, 4, 6)
    phi = JaxPotential(quartic, q)
    with jax_precision(torch.float32):
        assert phi(q.numpy()).shape == (16, 4)
        assert jax.vmap(jax.vmap(phi))(q.numpy()).shape == (16, 4)
        assert jax.grad(lambda q: 2 * phi(q).sum())(q.numpy()).shape == q.shape
        assert phi(q[0, 0].numpy()).shape == ()
        chain_rule = jax.grad(lambda q: (3 * phi(2 * q)).sum())(q.numpy())
    expected = 6 * value_and_grad(quartic, 2 * q.flatten(0, 1))[1]
    torch.testing.assert_close(torch.from_numpy(np.array(chain_rule)).flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_reach_jax(dtype: torch.dtype) -> None:
    def bad(position: Tensor) -> Tensor:
        return torch.stack([position[0, 0] * math.nan, position[1, 0] * math.inf, position[2].sum().sqrt()])

    q = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=dtype)
    phi = JaxPotential(bad, q)
    with jax_precision(dtype):
        # All chains in one call: each of these rows has its own place.
        value, grad = np.array(phi(q.numpy())), np.array(jax.grad(lambda q: phi(q).sum())(q.numpy()))
    assert np.isnan(value[0]) and value[1] == math.inf and value[2] == 0
    assert np.isnan(grad[0, 0]) and grad[1, 0] == math.inf and (grad[2] == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_precision_restores_the_configuration_of_jax(dtype: torch.dtype) -> None:
    before = dict(jax.config.values)
    q = positions(dtype)
    with jax_precision(dtype):
        assert jax.config.read("jax_enable_x64") == (dtype == torch.float64)
        in_a_vmap(JaxPotential(quartic, q))(q.numpy())
    assert dict(jax.config.values) == before
    assert not jax.config.read("jax_enable_x64")


def test_positions_of_another_dtype_or_size_are_refused() -> None:
    q = positions(torch.float64)
    phi = JaxPotential(quartic, q)
    with pytest.raises(InputError, match=r"expected positions of shape \(..., 6\) and torch.float64, found .* float32"):
        phi(jnp.zeros(6))
    with jax_precision(torch.float64), pytest.raises(InputError, match=r"found \(7,\)"):
        phi(jnp.zeros(7))
    with pytest.raises(InputError, match="found torch.bfloat16"), jax_precision(torch.bfloat16):
        pass


def test_errors_of_the_potential_are_raised_unwrapped(caplog: pytest.LogCaptureFixture) -> None:
    q = positions(torch.float32)
    phi = JaxPotential(lambda position: position.square(), q)
    with pytest.raises(ValueError, match=r"one number per chain, shape \(16,\)"), phi.own_errors():
        in_a_compiled_loop(phi)(q.numpy())[0].block_until_ready()
    assert not caplog.records
    with pytest.raises(jax.errors.JaxRuntimeError, match="one number per chain"), caplog.at_level(logging.ERROR):
        in_a_compiled_loop(phi)(q.numpy())[0].block_until_ready()
    assert caplog.records  # JAX's own report, which is kept where nothing replaces it


def test_errors_of_jax_are_raised_as_they_are() -> None:
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="another"),
        JaxPotential(quartic, positions(torch.float32)).own_errors(),
    ):
        raise jax.errors.JaxRuntimeError("another")


def test_one_compiled_program_evaluates_every_potential() -> None:
    q = positions(torch.float32)
    one, other = JaxPotential(quartic, q), JaxPotential(lambda position: position.sum(-1), q)
    traces = []

    @jax.jit
    def evaluate(number: Any, q: Any) -> Any:
        traces.append(1)
        return jax.vmap(jax_potential.numbered_potential(), in_axes=(None, 0))(number, q)

    with jax_precision(torch.float32):
        values = [torch.from_numpy(np.array(evaluate(np.int32(phi.number), q.numpy()))) for phi in (one, other)]
    assert len(traces) == 1
    assert values[0].equal(quartic(q)) and values[1].equal(q.sum(-1))


def test_potentials_are_not_kept_alive() -> None:
    phi = JaxPotential(quartic, positions(torch.float32))
    number = phi.number
    assert number in jax_potential._POTENTIALS
    del phi
    assert number not in jax_potential._POTENTIALS


def test_gradients_are_taken_under_no_grad_and_positions_may_be_written_to() -> None:
    def writes(position: Tensor) -> Tensor:
        kept = position.detach()
        kept += 1.0  # JAX's own memory is read-only
        return quartic(position)

    q = positions(torch.float32)
    phi = JaxPotential(writes, q)
    with torch.no_grad(), jax_precision(torch.float32):
        value, grad = in_a_vmap(phi)(q.numpy())
    expected = value_and_grad(quartic, q + 1.0)
    assert torch.from_numpy(np.array(value)).equal(expected[0]) and torch.from_numpy(np.array(grad)).equal(expected[1])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require("jax", "numpyro", "blackjax")
    monkeypatch.setattr(jax_potential, "find_spec", lambda name: None if name == "numpyro" else object())
    with pytest.raises(InputError, match=r"found no numpyro: .*pip install -e '\.\[jax\]'"):
        require("jax", "numpyro")
