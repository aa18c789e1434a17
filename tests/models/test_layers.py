"""The building blocks do what their formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ppl_vaebm.models.layers import FourierFeatures, LipSwish, ResidualBlock, leaky_relu, mlp, num_halvings
from ppl_vaebm.rng import global_rng


def test_lipswish_has_its_formula_and_a_lipschitz_constant_just_below_one() -> None:
    u = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    value = LipSwish()(u)
    torch.testing.assert_close(value, u / (1 + torch.exp(-u)) / 1.1)
    (slope,) = torch.autograd.grad(value.sum(), u)
    # The largest slope of u sigmoid(u) is 1.09984, at u = 2.3994.
    assert float(slope.abs().max()) == pytest.approx(1.09984 / 1.1, abs=1e-5)
    assert float(u[slope.argmax()].detach()) == pytest.approx(2.3994, abs=1e-3)


def test_without_its_constant_it_would_expand_distances() -> None:
    u = torch.tensor([2.3, 2.5], dtype=torch.float64)
    assert functional.silu(u).diff() > u.diff() > LipSwish()(u).diff()


@pytest.mark.parametrize("distance", [0.0, 0.2, 0.5, 2.0])
def test_fourier_features_have_the_gaussian_kernel(distance: float, seed: int) -> None:
    num, scale = 100_000, 3.0
    with global_rng(seed):
        features = FourierFeatures(2, num, scale).double()
    x = torch.tensor([[0.3, -0.1], [0.3 + 0.6 * distance, -0.1 + 0.8 * distance]], dtype=torch.float64)
    one, other = features(x)
    assert float(one @ one) == pytest.approx(num)
    # E cos(w . d) = exp(-(scale |d|)^2 / 2) and Var cos = (1 + e^-2(scale |d|)^2) / 2 - e^-(scale |d|)^2.
    square = (scale * distance) ** 2
    error = math.sqrt(max((1 + math.exp(-2 * square)) / 2 - math.exp(-square), 0.0) / num)
    assert float(one @ other) / num == pytest.approx(math.exp(-square / 2), abs=5 * error + 1e-6)


def test_fourier_frequencies_are_saved_with_the_weights(seed: int) -> None:
    with global_rng(seed):
        one, other = FourierFeatures(2, 5, 1.0), FourierFeatures(2, 5, 1.0)
    x = torch.ones(3, 2)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert not list(one.parameters())


def test_an_mlp_of_depth_zero_is_linear_and_of_depth_one_has_one_activation(seed: int) -> None:
    with global_rng(seed):
        line, net = mlp(3, 7, 0, 2, leaky_relu), mlp(3, 7, 1, 2, leaky_relu)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    (only,) = line
    assert isinstance(only, nn.Linear) and only.weight.shape == (2, 3)
    weight, bias, out_weight, out_bias = net.parameters()
    hidden = x @ weight.T + bias
    torch.testing.assert_close(net(x), torch.where(hidden > 0, hidden, 0.1 * hidden) @ out_weight.T + out_bias)


def test_an_mlp_has_as_many_hidden_layers_as_its_depth() -> None:
    with global_rng(0):
        shapes = [tuple(p.shape) for p in mlp(3, 7, 3, 2, nn.SiLU).parameters() if p.dim() == 2]
    assert shapes == [(7, 3), (7, 7), (7, 7), (2, 7)]


def silent_block(num_in: int, num_out: int, resample: str) -> ResidualBlock:
    """Make a block whose convolutions give zero, so that its skip is what is left."""
    with global_rng(0):
        block = ResidualBlock(num_in, num_out, nn.ReLU, resample)
    for parameter in block.second.parameters():
        nn.init.zeros_(parameter)
    return block


IMAGE = torch.tensor([[1.0, 3.0], [5.0, -20.0]]).reshape(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("resample", "expected"),
    [
        ("same", [[1.0, 3.0], [5.0, 0.0]]),
        ("down", [[0.0]]),  # the mean is -2.75, and the activation comes after it
        ("up", [[1.0, 1.0, 3.0, 3.0]] * 2 + [[5.0, 5.0, 0.0, 0.0]] * 2),
    ],
)
def test_a_block_without_its_convolutions_resamples_its_input(resample: str, expected: list[list[float]]) -> None:
    assert silent_block(1, 1, resample)(IMAGE)[0, 0].tolist() == expected


def test_the_mean_of_down_is_over_two_by_two_pixels() -> None:
    assert silent_block(1, 1, "down")(IMAGE.abs())[0, 0].tolist() == [[29 / 4]]


def test_a_change_of_channels_goes_through_a_linear_skip() -> None:
    block = silent_block(1, 2, "same")
    assert isinstance(block.skip, nn.Conv2d) and block.skip.bias is None
    nn.init.constant_(block.skip.weight, 2.0)
    assert torch.equal(block(IMAGE), (2 * IMAGE).relu().expand(1, 2, 2, 2))


def test_a_block_adds_its_two_convolutions_to_the_skip(generator: torch.Generator) -> None:
    with global_rng(0):
        block = ResidualBlock(2, 2, nn.SiLU)
    x = torch.randn(3, 2, 4, 4, generator=generator)
    expected = functional.silu(x + block.second(functional.silu(block.first(x))))
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("side", "halvings"), [(4, 1), (8, 2), (16, 2), (28, 3), (32, 3), (64, 4)], ids=lambda value: str(value)
)
def test_halvings_end_on_two_to_four_pixels(side: int, halvings: int) -> None:
    assert num_halvings(side) == halvings
    assert 2 <= side / 2**halvings <= 4
