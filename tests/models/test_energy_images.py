"""The image energies: sizes of the published ones, and what a block computes, written out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.energy import ImageEnergy, build_energy
from ppl_vaebm.models.energy_nets import BlockShape, EnergyBlock, PooledConv2d, build_block
from ppl_vaebm.models.nvae_cells import Conv2d
from ppl_vaebm.rng import global_rng


class Published(NamedTuple):
    """What is known of an energy network of the code of VAEBM."""

    side: int
    channels: int
    millions: float
    num_convs: int
    last_side: int


PUBLISHED = {
    "cifar10": Published(32, 128, 5.14, 16, 4),
    "celeba64": Published(64, 64, 4.34, 22, 4),
    "lsun-church64": Published(64, 64, 5.81, 26, 4),
    "celebahq256": Published(256, 64, 14.21, 31, 4),
    "mnist": Published(32, 64, 0.68, 11, 8),
}


def energy_of(shape: tuple[int, ...], **options: Any) -> ImageEnergy:
    with global_rng(0):
        energy = build_energy(EnergyConfig(**options), torch.Size(shape))
    assert isinstance(energy, ImageEnergy)
    return energy.double()


def draws(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_published_layouts_have_the_published_sizes(layout: str) -> None:
    known = PUBLISHED[layout]
    num_colours = 1 if layout == "mnist" else 3
    with torch.device("meta"):
        energy = energy_of(
            (num_colours, known.side, known.side), layout=layout, channels=known.channels, weight_norm=True
        )
        grids: list[torch.Size] = []
        energy.blocks[-1].register_forward_hook(lambda _module, _inputs, out: grids.append(out.shape))
        value = energy(torch.empty(2, num_colours, known.side, known.side, dtype=torch.float64))
    convs = [module for module in energy.modules() if isinstance(module, nn.Conv2d)]
    num_parameters = sum(parameter.numel() for parameter in energy.parameters())
    assert round(num_parameters / 1e6, 2) == known.millions and len(convs) == known.num_convs
    assert grids[0][-2:] == (known.last_side, known.last_side) and value.shape == (2,)
    # By hand: a convolution has weights and a gain, and a bias unless it is a skip.
    skips = {block.skip for block in energy.blocks.children()}
    by_hand = sum(conv.weight.numel() + (1 if conv in skips else 2) * conv.out_channels for conv in convs)
    assert num_parameters == by_hand + energy.head.in_features + 1


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_published_layout_refuses_images_of_another_size(layout: str) -> None:
    side, last = PUBLISHED[layout].side, PUBLISHED[layout].last_side
    for shape in ((1, side // 2, side // 2), (3, side, side + 1), (1, 28, 28)):
        with pytest.raises(InputError, match=rf"expected images of {side} x {side} pixels .* {last} x {last}, found"):
            energy_of(shape, layout=layout)


def test_a_stride_in_the_stem_saves_a_grid() -> None:
    plain, strided = energy_of((1, 32, 32), channels=4), energy_of((1, 32, 32), channels=4, stem_stride=2)
    assert (plain.sides, strided.sides) == ((32, 16, 8), (16, 8))
    assert (plain.head.in_features, strided.head.in_features) == (32, 16)
    assert strided.stem(torch.zeros(1, 1, 32, 32, dtype=torch.float64)).shape == (1, 4, 16, 16)
    assert strided.stem.kernel_size == (4, 4)


def test_every_pixel_counts_alike_in_a_stem_with_a_stride() -> None:
    stem = energy_of((1, 32, 32), channels=4, stem_stride=2).stem
    nn.init.ones_(stem.weight)
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(stem(x).sum(), x)
    inner = grad[0, 0, 1:-1, 1:-1]
    assert torch.equal(inner, torch.full_like(inner, 4 * 4))
    # Negative control: with an odd kernel some pixels count four times as much as others.
    (odd,) = torch.autograd.grad(functional.conv2d(x, torch.ones_like(stem.weight[..., :3, :3]), stride=2).sum(), x)
    assert odd[0, 0, 1:-2, 1:-2].max() == 4 * odd[0, 0, 1:-2, 1:-2].min() > 0


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_pooled_convolution_is_a_convolution_and_then_the_mean(weight_norm: bool, generator: torch.Generator) -> None:
    with global_rng(0):
        conv = PooledConv2d(3, 5, weight_norm=weight_norm).double()
    x = draws((2, 3, 8, 6), generator).requires_grad_()
    along = draws((2, 5, 4, 3), generator)

    def value_and_grads(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * along).sum(), [x, *conv.parameters()])]

    expected = value_and_grads(functional.avg_pool2d(Conv2d.forward(conv, x), 2))
    found = value_and_grads(conv(x))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))
    # Negative control: the strided convolution alone is not the mean.
    strided = functional.conv2d(x, conv.effective_weight(), conv.bias, stride=2, padding=1)
    assert (strided - expected[0]).abs().max() > 0.1


def plain(x: Tensor, conv: nn.Module) -> Tensor:
    """Convolve by PyTorch's own function, the grid kept; a skip that is an identity leaves x as it is."""
    if isinstance(conv, nn.Identity):
        return x
    assert isinstance(conv, Conv2d)
    size = conv.weight.shape[-1]
    weight = conv.weight
    if conv.log_gain is not None:
        norm = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        weight = conv.log_gain.exp()[:, None, None, None] * weight / (norm + 1e-5)
    return functional.conv2d(x, weight, conv.bias, conv.stride, size // 2, groups=conv.groups)


def lip_swish(u: Tensor) -> Tensor:
    return u * u.sigmoid() / 1.1


SHAPES = [BlockShape(4, 4, False), BlockShape(4, 6, False), BlockShape(4, 4, True), BlockShape(4, 8, True)]


def block_of(shape: BlockShape, **options: Any) -> EnergyBlock:
    with global_rng(0):
        return build_block(EnergyConfig(**options), shape).double()


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_standard_block_is_the_published_formula(
    shape: BlockShape, weight_norm: bool, generator: torch.Generator
) -> None:
    block, x = block_of(shape, weight_norm=weight_norm), draws((2, 4, 8, 8), generator)
    out = plain(lip_swish(plain(x, block.first)), block.second) + plain(x, block.skip)
    expected = lip_swish(functional.avg_pool2d(out, 2) if shape.is_down else out)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)
    assert isinstance(block.skip, nn.Identity) == (shape.num_in == shape.num_out and not shape.is_down)
    assert all(not isinstance(each, Conv2d) or each.bias is None for each in block.skip.modules())
    if shape.is_down:  # negative control: the activation does not commute with the mean
        assert (functional.avg_pool2d(lip_swish(out), 2) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_light_block_has_one_depthwise_convolution(shape: BlockShape, generator: torch.Generator) -> None:
    block, x = block_of(shape, block="depthwise"), draws((2, 4, 8, 8), generator)
    depthwise, pointwise = block.first.children()
    assert isinstance(depthwise, Conv2d) and depthwise.groups == 4 and depthwise.weight.shape == (4, 1, 5, 5)
    out = plain(lip_swish(plain(plain(x, depthwise), pointwise)), block.second)
    skipped = plain(functional.avg_pool2d(x, 2) if shape.is_down else x, block.skip)
    torch.testing.assert_close(block(x), lip_swish(out + skipped), rtol=1e-10, atol=1e-12)
    assert block(x).shape == (2, shape.num_out, *((4, 4) if shape.is_down else (8, 8)))


def test_a_light_block_sees_as_far_as_a_standard_one(generator: torch.Generator) -> None:
    x = draws((1, 4, 9, 9), generator).requires_grad_()
    for kind in ("standard", "depthwise"):
        block = block_of(BlockShape(4, 4, False), block=kind)
        (grad,) = torch.autograd.grad(block(x)[..., 4, 4].sum(), x)
        assert (grad[0].abs().amax(0) > 0).nonzero().aminmax(dim=0)[0].tolist() == [2, 2]
        assert (grad[0].abs().amax(0) > 0).nonzero().aminmax(dim=0)[1].tolist() == [6, 6]


# --- the default ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 30, 30)])
def test_the_default_is_what_it_was(shape: tuple[int, ...], generator: torch.Generator) -> None:
    """The network that older checkpoints hold, under the names that they hold, in PyTorch's own functions."""
    num_blocks = 2 if shape[-1] == 8 else 3
    energy, x = energy_of(shape, channels=4), draws((3, *shape), generator)
    weights = energy.state_dict()
    in_a_block = ["first.weight", "first.bias", "second.weight", "second.bias", "skip.weight"]
    names = [f"blocks.{index}.{name}" for index in range(num_blocks) for name in in_a_block]
    assert list(weights) == ["stem.weight", "stem.bias", *names, "head.weight", "head.bias"]

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    padded = functional.pad(x, (1, 1, 1, 1), value=-1.0) if shape[-1] == 30 else x
    features = lip_swish(conv(padded, "stem"))
    for index in range(num_blocks):
        name = f"blocks.{index}"
        out = conv(features, f"{name}.skip") + conv(lip_swish(conv(features, f"{name}.first")), f"{name}.second")
        features = lip_swish(functional.avg_pool2d(out, 2))
    expected = features.sum((2, 3)) @ weights["head.weight"][0] + weights["head.bias"]
    torch.testing.assert_close(energy(x), expected, rtol=1e-10, atol=1e-12)


def test_with_weight_norm_the_length_of_a_weight_is_nothing(generator: torch.Generator) -> None:
    x = draws((3, 1, 8, 8), generator)
    for weight_norm in (True, False):
        energy = energy_of((1, 8, 8), channels=4, weight_norm=weight_norm)
        before = energy(x)
        for parameter in energy.parameters():
            if parameter.dim() == 4:
                parameter.data *= 3
        change = (energy(x) - before).abs().max()
        # The norm's epsilon of 1e-5 is what is left; negative control: without weight norm it is everything.
        assert change < 1e-3 * before.abs().max() if weight_norm else change > 0.1 * before.abs().max()


def test_a_gain_scales_its_channel(generator: torch.Generator) -> None:
    stem, x = energy_of((1, 8, 8), channels=4, weight_norm=True).stem, draws((3, 1, 8, 8), generator)
    assert stem.log_gain is not None and stem.bias is not None
    before = stem(x) - stem.bias[:, None, None]
    stem.log_gain.data[1] += torch.tensor(2.0).log()
    after = stem(x) - stem.bias[:, None, None]
    torch.testing.assert_close(
        after / before,
        torch.tensor([1.0, 2.0, 1.0, 1.0])[:, None, None].expand(after.shape).double(),
        rtol=1e-6,
        atol=0,
    )
