"""Data-dependent initialisation: every layer's outputs have mean 0 and standard deviation 0.2, once and for all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.optim import AveragedWeights
from ppl_vaebm.models.energy import Energy, build_energy, initialise_from_data
from ppl_vaebm.models.nvae_cells import Conv2d
from ppl_vaebm.rng import global_rng, stream

LATENTS = {"z_1": torch.Size([3]), "z_2": torch.Size([2, 4, 4])}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "cifar10": ((3, 32, 32), {"layout": "cifar10", "weight_norm": True}),
    "depthwise": ((1, 16, 16), {"block": "depthwise", "weight_norm": True, "stem_stride": 2}),
    "without weight norm": ((1, 16, 16), {}),
    "x and z": ((1, 16, 16), {"inputs": "x-and-z", "weight_norm": True}),
    "vector": ((2,), {}),
    "vector, x and z": ((2,), {"inputs": "x-and-z", "num_fourier": 0}),
}


def energy_of(name: str, **options: Any) -> Energy:
    shape, own = CASES[name]
    config = EnergyConfig(**{"width": 16, "channels": 4, "num_fourier": 8, "data_init": True, **own, **options})
    with global_rng(0):
        return build_energy(config, torch.Size(shape), LATENTS).double()


def data_of(name: str, seed: int = 0, num: int = 40) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw data and latents, neither centred nor of unit size."""
    generator = stream(seed, "data")
    shapes = {"x": torch.Size(CASES[name][0]), **LATENTS}
    parts = {
        key: 0.5 + 3 * torch.rand(num, *shape, generator=generator, dtype=torch.float64)
        for key, shape in shapes.items()
    }
    return parts.pop("x"), parts


def outputs(energy: Energy, x: Tensor, z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect every hidden layer's outputs, ``(channels, values)``, before any mean over pixels."""
    names = {module: name for name, module in energy.named_modules()}
    found: dict[str, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, Conv2d):
            out = functional.conv2d(
                inputs[0], layer.effective_weight(), layer.bias, layer.stride, layer.padding, groups=layer.groups
            )
        else:
            assert isinstance(layer, nn.Linear)
            out = functional.linear(inputs[0], layer.weight, layer.bias)
        found[names[layer]] = out.detach().transpose(0, 1).flatten(1)

    handles = [layer.register_forward_pre_hook(note) for layer in energy.hidden_layers()]
    energy(x, z)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_output_has_mean_0_and_standard_deviation_0_2(name: str) -> None:
    energy, (x, z) = energy_of(name), data_of(name)
    before = outputs(energy, x, z)
    last = energy.last_layer()
    assert last is not None
    kept = last.weight.clone()
    initialise_from_data(energy, x, z)
    after = outputs(energy, x, z)
    assert after.keys() == before.keys() and len(after) == len(energy.hidden_layers()) > 1
    for key, out in after.items():
        layer = energy.get_submodule(key)
        torch.testing.assert_close(out.std(1, correction=0), torch.full_like(out[:, 0], 0.2), rtol=1e-9, atol=0)
        if layer.bias is not None:
            assert out.mean(1).abs().max() < 1e-12
        # Negative control: they were others.
        assert (before[key].std(1, correction=0) - 0.2).abs().max() > 0.01
    assert torch.equal(last.weight, kept)


def test_gain_and_bias_are_those_of_the_formula() -> None:
    """Salimans and Kingma 2016: with t the output of unit weights, gain 1/(5 sd t) and bias -mean t / (5 sd t)."""
    energy, (x, z) = energy_of("cifar10"), data_of("cifar10")
    stem = energy.get_submodule("stem")
    assert isinstance(stem, Conv2d) and stem.log_gain is not None and stem.bias is not None
    unit = stem.weight / (stem.weight.flatten(1).norm(dim=1)[:, None, None, None] + 1e-5)
    out = functional.conv2d(x, unit, padding=1).transpose(0, 1).flatten(1)
    initialise_from_data(energy, x, z)
    torch.testing.assert_close(stem.log_gain, -(5 * out.std(1, correction=0)).log())
    torch.testing.assert_close(stem.bias, -out.mean(1) / (5 * out.std(1, correction=0)))


def test_a_second_call_does_nothing() -> None:
    energy = energy_of("without weight norm")
    assert energy.is_initialised is not None and not energy.is_initialised
    initialise_from_data(energy, *data_of("without weight norm"))
    assert energy.is_initialised
    once = copy.deepcopy(energy.state_dict())
    initialise_from_data(energy, *data_of("without weight norm", seed=1))
    assert all(torch.equal(value, once[name]) for name, value in energy.state_dict().items())
    # Negative control: on a fresh network those data do something.
    other = energy_of("without weight norm")
    initialise_from_data(other, *data_of("without weight norm", seed=1))
    assert not torch.equal(other.state_dict()["stem.weight"], once["stem.weight"])


def test_a_loaded_network_is_done() -> None:
    name = "cifar10"
    energy, fresh = energy_of(name), energy_of(name)
    initialise_from_data(energy, *data_of(name))
    fresh.load_state_dict(energy.state_dict())
    initialise_from_data(fresh, *data_of(name, seed=1))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in energy.state_dict().items())
    # And one that was saved before is not.
    late = energy_of(name)
    late.load_state_dict(energy_of(name).state_dict())
    initialise_from_data(late, *data_of(name))
    assert torch.equal(late.state_dict()["stem.log_gain"], energy.state_dict()["stem.log_gain"])


def test_an_average_begins_initialised() -> None:
    name = "cifar10"
    energy, (x, z) = energy_of(name), data_of(name)
    initialise_from_data(energy, x, z)
    average = AveragedWeights(energy, 0.9)
    average.update(energy)
    assert average.module.is_initialised is not None and average.module.is_initialised
    torch.testing.assert_close(average.module(x, z), energy(x, z))


def test_without_the_option_there_is_no_flag_and_nothing_happens() -> None:
    name = "cifar10"
    energy = energy_of(name, data_init=False)
    before = copy.deepcopy(energy.state_dict())
    initialise_from_data(energy, *data_of(name))
    assert energy.is_initialised is None and "is_initialised" not in before
    assert all(torch.equal(value, before[key]) for key, value in energy.state_dict().items())


@pytest.mark.parametrize(("value", "num_bad"), [(float("nan"), 4), (float("inf"), 4), (0.0, 4)])
def test_data_that_do_not_vary_are_refused(value: float, num_bad: int) -> None:
    energy, (x, z) = energy_of("without weight norm"), data_of("without weight norm")
    with pytest.raises(InputError, match=rf"for energy.data-init, found {num_bad} of 4 channels of stem constant or"):
        initialise_from_data(energy, torch.full_like(x, value), z)
    assert energy.is_initialised is not None and not energy.is_initialised
    assert not energy.get_submodule("stem")._forward_pre_hooks
    initialise_from_data(energy, x, z)
    assert energy.is_initialised


def test_it_needs_the_latents_that_the_energy_reads() -> None:
    energy, (x, _) = energy_of("x and z"), data_of("x and z")
    with pytest.raises(ValueError, match="got no z"):
        initialise_from_data(energy, x)
