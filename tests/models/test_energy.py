"""What every energy net has: a value per row, gradients, and refusals of data and options that do not fit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import global_rng
from tests.small_models import shipped_vae, strengthen

SHAPES = [(2,), (1, 8, 8), (3, 32, 32)]
LATENTS = {"z_1": torch.Size([3]), "z_2": torch.Size([2, 4, 4])}


class Case(NamedTuple):
    """A shape of data and the options of an energy for it."""

    shape: tuple[int, ...]
    options: dict[str, Any]


CASES = {
    **{f"standard {shape}": Case(shape, {}) for shape in SHAPES},
    "spectral norm, vector": Case((2,), {"spectral_norm": True}),
    "spectral norm, image": Case((1, 8, 8), {"spectral_norm": True}),
    "weight norm": Case((1, 8, 8), {"weight_norm": True}),
    "depthwise": Case((1, 16, 16), {"block": "depthwise", "weight_norm": True}),
    "stride in the stem": Case((3, 16, 16), {"stem_stride": 2}),
    "published": Case((1, 32, 32), {"layout": "mnist", "weight_norm": True, "data_init": True}),
    "x and z, vector": Case((2,), {"inputs": "x-and-z"}),
    "x and z, image": Case((1, 16, 16), {"inputs": "x-and-z", "weight_norm": True}),
}


def energy_with(shape: tuple[int, ...], **options: Any) -> Energy:
    config = EnergyConfig(**{"width": 16, "channels": 4, "num_fourier": 8, **options})
    with global_rng(0):
        energy = build_energy(config, torch.Size(shape), LATENTS)
    strengthen(energy.double(), 1.5)
    return energy


def new_energy(shape: tuple[int, ...], num_fourier: int = 8, depth: int = 2) -> Energy:
    return energy_with(shape, num_fourier=num_fourier, depth=depth)


def draws(shape: tuple[int, ...], num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, *shape, generator=generator, dtype=torch.float64)


def latents(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: draws(tuple(shape), num, generator) for name, shape in LATENTS.items()}


def with_first(rows: Tensor) -> Tensor:
    """Change the first row."""
    return torch.cat([rows[:1] + 5, rows[1:]])


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_one_energy_that_no_other_row_changes(name: str, generator: torch.Generator) -> None:
    shape, options = CASES[name]
    energy, x, z = energy_with(shape, **options), draws(shape, 5, generator), latents(5, generator)
    one = energy(x, z)
    assert one.shape == (5,)
    changed = energy(with_first(x), {key: with_first(value) for key, value in z.items()}) - one
    assert changed[1:].abs().max() < 1e-12
    assert changed[0].abs() > 1e-3
    flipped = energy(x.flip(0), {key: value.flip(0) for key, value in z.items()})
    torch.testing.assert_close(flipped, one.flip(0))
    # In training mode, too: there are no batch statistics.
    torch.testing.assert_close(energy.train()(x, z), energy.eval()(x, z))


def test_a_batch_norm_fails_that(generator: torch.Generator) -> None:
    energy, x = new_energy((2,), num_fourier=0), draws((2,), 5, generator)
    net = nn.Sequential(nn.BatchNorm1d(2).double(), energy)
    assert (net(torch.cat([x[:1] + 5, x[1:]])) - net(x))[1:].abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str, generator: torch.Generator) -> None:
    shape, options = CASES[name]
    energy, x, z = energy_with(shape, **options), draws(shape, 3, generator), latents(3, generator)
    for parameter in (next(energy.parameters()), [*energy.parameters()][-2], x.requires_grad_()):
        (grad,) = torch.autograd.grad(energy(x, z).sum(), parameter)
        index = int(grad.abs().argmax())
        sums = []
        for shift in (-1e-5, 1e-5):
            with torch.no_grad():
                parameter.view(-1)[index] += shift
                sums.append(float(energy(x, z).sum()))
                parameter.view(-1)[index] -= shift
        assert (sums[1] - sums[0]) / 2e-5 == pytest.approx(float(grad.flatten()[index]), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_gradient(name: str, generator: torch.Generator) -> None:
    shape, options = CASES[name]
    energy = energy_with(shape, **options)
    energy(draws(shape, 3, generator), latents(3, generator)).sum().backward()
    for parameter in energy.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        # What a fused optimiser walks through in step with the parameter.
        assert parameter.grad.is_contiguous() and parameter.is_contiguous()


def test_a_net_without_hidden_layers_or_features_is_linear(generator: torch.Generator) -> None:
    energy, x = new_energy((3,), num_fourier=0, depth=1), draws((3,), 4, generator)
    weight, bias, out_weight, out_bias = energy.parameters()
    hidden = x @ weight.T + bias
    torch.testing.assert_close(energy(x), (hidden * hidden.sigmoid() @ out_weight.T + out_bias).squeeze(-1))


@pytest.mark.parametrize("side", [8, 32])
def test_an_image_energy_sums_over_pixels_what_a_linear_unit_reads(side: int, generator: torch.Generator) -> None:
    energy = new_energy((1, side, side))
    grids = []
    last, head = list(energy.get_submodule("blocks").children())[-1], energy.get_submodule("head")
    handle = last.register_forward_hook(lambda _module, _inputs, out: grids.append(out))
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
    ("shape", "options", "message"),
    [
        ((1, 8, 16), {}, r"multiple of 4, got shape \(1, 8, 16\)"),
        ((1, 5, 5), {"stem_stride": 2}, r"at least 6 pixels a side for energy.stem-stride 2, found shape \(1, 5, 5\)"),
        ((2,), {"layout": "mnist"}, r"images for energy.layout mnist, found data of shape \(2,\): leave"),
        ((2,), {"stem_stride": 2}, "images for energy.stem-stride 2"),
        ((2,), {"block": "depthwise"}, "images for energy.block depthwise"),
        ((2,), {"weight_norm": True}, "images for energy.weight-norm True"),
    ],
)
def test_data_that_an_energy_cannot_take_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_energy(EnergyConfig(**options), torch.Size(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "energy.stem-stride must be one of 1, 2, got 3"),
        ({"stem_stride": 2, "layout": "cifar10"}, "energy.stem-stride must be 1 with energy.layout cifar10"),
        ({"spectral_norm": True, "weight_norm": True}, "energy.weight-norm must be off with energy.spectral-norm"),
        ({"spectral_norm": True, "data_init": True}, "energy.data-init must be off with energy.spectral-norm"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyConfig(**options)


# --- E(x, z) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (1, 16, 16)])
def test_an_energy_of_x_and_z_depends_on_every_latent_and_not_linearly(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    energy, x, z = energy_with(shape, inputs="x-and-z"), draws(shape, 4, generator), latents(4, generator)
    for name in LATENTS:
        up, down = ({**z, name: z[name] + sign} for sign in (1.0, -1.0))
        slope = energy(x, up) - energy(x, down)
        curvature = energy(x, up) - 2 * energy(x, z) + energy(x, down)
        assert slope.abs().min() > 1e-4 and curvature.abs().min() > 1e-5
        # What z does depends on x: the energy is no sum of one of x and one of z.
        other = energy(x + 0.5, up) - energy(x + 0.5, down)
        assert (other - slope).abs().min() > 1e-6


def test_an_energy_of_x_ignores_z(generator: torch.Generator) -> None:
    energy, x, z = energy_with((1, 16, 16)), draws((1, 16, 16), 4, generator), latents(4, generator)
    assert torch.equal(energy(x, z), energy(x))
    with_z = energy_with((1, 16, 16), inputs="x-and-z")
    assert (
        with_z(x, z) - with_z(x, {name: -value for name, value in z.items()})
    ).abs().min() > 1e-4  # negative control


@pytest.mark.parametrize("shape", [(2,), (1, 16, 16)])
def test_an_energy_of_x_and_z_asks_for_z(shape: tuple[int, ...], generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="a function of x and z, got no z"):
        energy_with(shape, inputs="x-and-z")(draws(shape, 4, generator))
    with pytest.raises(ValueError, match="needs the shapes of the latents, got none"):
        build_energy(EnergyConfig(inputs="x-and-z"), torch.Size(shape))


@pytest.mark.parametrize(
    "name",
    ["vector, 3 groups, local scale", "image (1, 8, 8), 3 groups, local scale", "nvae, 2 scales of 2 groups, normal"],
)
def test_the_program_and_its_potential_have_the_energy_of_x_and_z(name: str, generator: torch.Generator) -> None:
    vae = shipped_vae(name)
    with global_rng(1):
        config = EnergyConfig(width=16, num_fourier=8, channels=4, inputs="x-and-z")
        energy = build_energy(config, vae.model.event_shape, vae.model.latent_shapes).double()
    vaebm = VAEBM(vae, energy)
    potential = noise_potential(vaebm)
    position = potential.draw_reference(generator, 4)
    x, z = vae.transport(potential.packing.unravel(position))
    conditioned = poutine.condition(vaebm, data={**z, "x": x})
    factor: Any = poutine.trace(conditioned).get_trace(None, 4).nodes["energy"]
    torch.testing.assert_close(-factor["fn"].log_factor, potential(position), rtol=1e-10, atol=1e-12)
    # Negative control: the latents of other rows have other energies.
    others = {key: value.flip(0) for key, value in z.items()}
    assert (energy(x, others) - potential(position)).abs().min() > 1e-6


def test_latents_enter_where_the_grid_is_their_own() -> None:
    """A vector and one pixel on the coarsest grid; one finer than all on the finest; between two on the finer."""
    sides = {"vector": 1, "pixel": 1, "coarse": 8, "same": 16, "between": 9, "finer": 64}
    shapes = {name: torch.Size([2, side, side]) for name, side in sides.items()} | {"vector": torch.Size([5])}
    with global_rng(0):
        config = EnergyConfig(layout="cifar10", channels=2, inputs="x-and-z")
        energy: Any = build_energy(config, torch.Size([3, 32, 32]), shapes)
    # Sides of the grids that the six blocks take: 32, 16, 16, 8, 8, 4.
    assert energy.entries == {0: ("finer",), 1: ("same", "between"), 3: ("coarse",), 5: ("vector", "pixel")}
    assert [each.in_channels for each in energy.latent_maps.values()] == [2, 4, 2, 7]


def test_a_latent_on_a_finer_grid_enters_by_its_means(generator: torch.Generator) -> None:
    shapes = {"z_1": torch.Size([2, 32, 32])}
    with global_rng(0):
        config = EnergyConfig(channels=2, stem_stride=2, inputs="x-and-z")
        energy = build_energy(config, torch.Size([1, 32, 32]), shapes).double()
    x, z = draws((1, 32, 32), 3, generator), draws((2, 32, 32), 3, generator)
    means = nn.functional.avg_pool2d(z, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(energy(x, {"z_1": z}), energy(x, {"z_1": means}))
    assert (energy(x, {"z_1": z}) - energy(x, {"z_1": z.roll(1, 3)})).abs().min() > 1e-6  # negative control


@pytest.mark.parametrize("options", [{}, {"inputs": "x-and-z", "latent_term": True}], ids=["x", "x and z"])
def test_energies_of_vectors_keep_float32_under_autocast(options: dict[str, Any], generator: torch.Generator) -> None:
    with global_rng(0):
        energy = build_energy(EnergyConfig(**options), torch.Size([2]), {"z_1": torch.Size([3])})
    last = energy.last_layer()
    assert last is not None
    last.bias.data += 300.0  # where bfloat16 has steps of 2 nats
    x, z = torch.randn(200, 2, generator=generator), {"z_1": torch.randn(200, 3, generator=generator)}
    with torch.no_grad():
        exact = energy(x, z)
        with torch.autocast("cpu", torch.bfloat16):
            half = energy(x, z)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.01
    assert (half.bfloat16().float() - exact).abs().max() > 0.1  # negative control
