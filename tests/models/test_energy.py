"""The energy nets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.rng import global_rng
from tests.small_models import strengthen

SHAPES = [(2,), (1, 8, 8), (3, 32, 32)]


def new_energy(shape: tuple[int, ...], num_fourier: int = 8, depth: int = 2) -> Energy:
    config = EnergyConfig(width=16, channels=4, num_fourier=num_fourier, depth=depth)
    with global_rng(0):
        energy = build_energy(config, torch.Size(shape))
    strengthen(energy.double(), 1.5)
    return energy


def draws(shape: tuple[int, ...], num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_one_energy_that_no_other_row_changes(shape: tuple[int, ...], generator: torch.Generator) -> None:
    energy, x = new_energy(shape), draws(shape, 5, generator)
    one = energy(x)
    assert one.shape == (5,)
    changed = torch.cat([x[:1] + 5, x[1:]])
    assert (energy(changed) - one)[1:].abs().max() < 1e-12
    assert (energy(changed) - one)[0].abs() > 1e-3
    torch.testing.assert_close(energy(x.flip(0)), one.flip(0))
    # In training mode, too: there are no batch statistics.
    torch.testing.assert_close(energy.train()(x), energy.eval()(x))


def test_a_batch_norm_fails_that(generator: torch.Generator) -> None:
    energy, x = new_energy((2,), num_fourier=0), draws((2,), 5, generator)
    net = nn.Sequential(nn.BatchNorm1d(2).double(), energy)
    assert (net(torch.cat([x[:1] + 5, x[1:]])) - net(x))[1:].abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...], generator: torch.Generator) -> None:
    energy, x = new_energy(shape), draws(shape, 3, generator)
    for parameter in (next(energy.parameters()), [*energy.parameters()][-2]):
        (grad,) = torch.autograd.grad(energy(x).sum(), parameter)
        index = int(grad.abs().argmax())
        sums = []
        for shift in (-1e-5, 1e-5):
            with torch.no_grad():
                parameter.view(-1)[index] += shift
                sums.append(float(energy(x).sum()))
                parameter.view(-1)[index] -= shift
        assert (sums[1] - sums[0]) / 2e-5 == pytest.approx(float(grad.view(-1)[index]), rel=1e-6)


def test_a_net_without_hidden_layers_or_features_is_linear(generator: torch.Generator) -> None:
    energy, x = new_energy((3,), num_fourier=0, depth=1), draws((3,), 4, generator)
    weight, bias, out_weight, out_bias = energy.parameters()
    hidden = x @ weight.T + bias
    torch.testing.assert_close(energy(x), (hidden * hidden.sigmoid() @ out_weight.T + out_bias).squeeze(-1))


@pytest.mark.parametrize("side", [8, 32])
def test_an_image_energy_sums_over_pixels_what_a_linear_unit_reads(side: int, generator: torch.Generator) -> None:
    energy = new_energy((1, side, side))
    grids = []
    blocks, head = energy.get_submodule("blocks"), energy.get_submodule("head")
    handle = blocks.register_forward_hook(lambda _module, _inputs, out: grids.append(out))
    value = energy(draws((1, side, side), 3, generator))
    handle.remove()
    assert isinstance(head, nn.Linear)
    assert grids[0].shape[-2:] == ((2, 2) if side == 8 else (4, 4))
    torch.testing.assert_close(value, torch.einsum("ncij,c->n", grids[0], head.weight[0]) + head.bias)


def test_a_side_that_does_not_halve_is_padded_with_black(generator: torch.Generator) -> None:
    with global_rng(0):
        energy = build_energy(EnergyConfig(channels=2), torch.Size([1, 30, 30]))
    x = torch.rand(3, 1, 30, 30, generator=generator) * 2 - 1
    framed = torch.full((3, 1, 32, 32), -1.0)
    framed[:, :, 1:-1, 1:-1] = x
    with global_rng(0):
        whole = build_energy(EnergyConfig(channels=2), torch.Size([1, 32, 32]))
    torch.testing.assert_close(energy(x), whole(framed))
    assert (energy(x) - whole(framed.clamp_min(-0.5))).abs().min() > 1e-4  # negative control: grey is another frame


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((2,), "image", "energy.kind 'image' does not fit"),
        ((1, 8, 8), "vector", "energy.kind 'vector' does not fit"),
        ((1, 8, 16), "auto", r"multiple of 4, got shape \(1, 8, 16\)"),
    ],
)
def test_data_that_an_energy_cannot_take_is_refused(shape: tuple[int, ...], kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_energy(EnergyConfig(kind=kind), torch.Size(shape))  # type: ignore[arg-type]
