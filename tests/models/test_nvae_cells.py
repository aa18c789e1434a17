"""NVAE's building blocks do what their formulas say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ppl_vaebm.devices import Process
from ppl_vaebm.models import nvae_cells
from ppl_vaebm.models.nvae_cells import (
    BatchNorm2d,
    Conv2d,
    ResidualCell,
    ShiftedDown,
    SmoothUp,
    SqueezeExcite,
    decoder_cell,
    encoder_cell,
    fold_weight_norm,
    normalized,
)
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import global_rng
from tests.small_models import shipped_vae, unsettle


def made(build: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Build a module of float64, the same at every call."""
    with global_rng(0):
        module = build(*args, **options).double()
    unsettle(module)
    return module


def images(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- weight normalisation ------------------------------------------------------------------------


def test_a_weight_is_its_direction_times_its_gain(generator: torch.Generator) -> None:
    conv, x = made(Conv2d, 3, 4, 3), images(generator, 2, 3, 5, 5)
    with torch.no_grad():
        conv.log_gain.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    direction = conv.weight.detach()
    gains = [1.0, math.e, 1 / math.e, math.exp(0.5)]
    norms = [math.sqrt(float(v.square().sum())) + 1e-5 for v in direction]
    expected = torch.stack([v * gain / norm for v, gain, norm in zip(direction, gains, norms, strict=True)])
    torch.testing.assert_close(conv.effective_weight(), expected)
    torch.testing.assert_close(conv(x), functional.conv2d(x, expected, conv.bias, padding=1))
    # The length of v says nothing, but for the 1e-5; where weights are not normalised it does.
    one, plain = conv(x), made(Conv2d, 3, 4, 3, weight_norm=False)
    two = plain(x)
    with torch.no_grad():
        conv.weight *= 3
        plain.weight *= 3
    torch.testing.assert_close(conv(x), one, rtol=0, atol=1e-4)
    assert plain.log_gain is None
    assert (plain(x) - two).abs().max() > 0.1


def test_gains_start_at_the_norms_of_pytorchs_own_weights() -> None:
    conv = made(Conv2d, 3, 4, 3)
    with global_rng(0):
        stock = nn.Conv2d(3, 4, 3, padding=1).double()
    assert all(torch.equal(conv.get_parameter(name), value) for name, value in stock.named_parameters())
    norm = stock.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_gain, (norm + 0.01).log(), rtol=1e-6, atol=1e-6)
    # So a fresh layer is PyTorch's, times 1 + 0.01 / norm.
    ratio = 1 + 0.01 / norm
    torch.testing.assert_close(conv.effective_weight(), stock.weight * ratio[:, None, None, None], rtol=1e-4, atol=0)


@pytest.fixture
def num_normalized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry at every normalisation of a weight."""
    calls: list[int] = []

    def counted(v: Tensor, log_gain: Tensor) -> Tensor:
        calls.append(len(v))
        return normalized(v, log_gain)

    monkeypatch.setattr(nvae_cells, "normalized", counted)
    return calls


def transported(vae: HierarchicalVAE, eps: dict[str, Tensor]) -> list[Tensor]:
    """Run every convolution of an NVAE, in the transport and in the guide."""
    x, z = vae.transport(eps)
    with global_rng(0):
        return [x, *z.values(), *vae.guide(x).values()]


ENDS_OF_FOLDING: dict[str, Callable[[nn.Module], object]] = {
    "training": lambda net: net.train().eval(),
    "gradients": lambda net: net.requires_grad_(True),
    "weights": lambda net: net.load_state_dict(net.state_dict()),
    "a dtype": lambda net: net.float().double(),
    "a device": lambda net: net.to("cpu"),
}


@pytest.mark.parametrize("end", ENDS_OF_FOLDING)
def test_the_weights_of_a_frozen_nvae_are_normalised_once(
    end: str, num_normalized: list[int], generator: torch.Generator
) -> None:
    vae = shipped_vae("nvae, flows, logistic mixture").requires_grad_(False)
    eps = {name: images(generator, 2, *shape) for name, shape in vae.noise_shapes.items()}
    names = vae.state_dict().keys()
    before = transported(vae, eps)
    fold_weight_norm(vae)
    num_normalized.clear()
    for _ in range(2):
        assert all(map(torch.equal, transported(vae, eps), before))
    assert not num_normalized
    assert vae.state_dict().keys() == names
    copied = copy.deepcopy(vae)
    transported(copied, eps)
    assert num_normalized  # a copy may become an average, which is updated in place
    num_normalized.clear()
    ENDS_OF_FOLDING[end](vae)
    transported(vae, eps)
    assert num_normalized


def test_a_folded_weight_is_dropped_where_others_are_loaded(generator: torch.Generator) -> None:
    one, x = made(Conv2d, 3, 4, 3).requires_grad_(False), images(generator, 2, 3, 5, 5)
    fold_weight_norm(one)
    one.load_state_dict({name: 2 * value + 1 for name, value in one.state_dict().items()})
    fresh = made(Conv2d, 3, 4, 3)
    fresh.load_state_dict(one.state_dict())
    assert torch.equal(one(x), fresh(x))
    with torch.no_grad():
        one.log_gain += 1  # in place, which nothing notices, until the next call of the function
    fold_weight_norm(one)
    assert torch.equal(one(x), functional.conv2d(x, one.effective_weight(), one.bias, padding=1))
    assert not torch.allclose(one(x), fresh(x))


def test_a_trained_convolution_is_not_folded() -> None:
    conv = made(Conv2d, 3, 4, 3)
    fold_weight_norm(conv)
    assert conv.folded is None


def test_masked_weights_are_zero_and_do_not_count_for_the_norm(generator: torch.Generator) -> None:
    mask = torch.ones(4, 3, 3, 3)
    mask[:, :, 1:] = 0
    conv = made(Conv2d, 3, 4, 3, mask=mask)
    kept = conv.weight[:, :, :1].flatten(1)
    torch.testing.assert_close(conv.log_gain, (kept.norm(dim=1) + 0.01).log(), rtol=1e-6, atol=1e-6)
    weight = conv.effective_weight()
    assert (weight[:, :, 1:] == 0).all()
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), conv.log_gain.exp(), rtol=1e-4, atol=0)
    before = conv(x := images(generator, 1, 3, 4, 4))
    with torch.no_grad():
        conv.weight[:, :, 1:] += 5
    assert torch.equal(conv(x), before)
    assert "mask" not in conv.state_dict()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_convolution_keeps_its_grid(size: int, generator: torch.Generator) -> None:
    assert made(Conv2d, 2, 3, size)(images(generator, 1, 2, 6, 6)).shape == (1, 3, 6, 6)


# --- batch normalisation -------------------------------------------------------------------------


def test_batch_normalisation_has_nvaes_constants(generator: torch.Generator) -> None:
    norm, x = BatchNorm2d(3).double(), images(generator, 4, 3, 5, 5) * 2 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(
        norm(x), (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt(), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(norm.running_mean, 0.05 * mean)
    torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * x.var((0, 2, 3)))


class Grads:
    """Output, running statistics and gradients of a normalisation."""

    def __init__(self, norm: nn.Module, x: Tensor) -> None:
        leaf = x.clone().requires_grad_()
        self.out = norm(leaf)
        weights = torch.linspace(-1, 2, self.out.numel(), dtype=x.dtype).view_as(self.out)
        (self.out * weights.sin()).sum().backward()
        assert leaf.grad is not None
        self.tensors = [self.out.detach(), leaf.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.fixture
def two_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process believe in a second one that has the same batch."""
    monkeypatch.setattr(nvae_cells, "current_process", lambda: Process(rank=0, world=2))
    monkeypatch.setattr(dist, "all_reduce", lambda value: value.mul_(2))


@pytest.mark.usefixtures("two_alike")
def test_the_statistics_of_two_processes_are_those_of_one_batch(generator: torch.Generator) -> None:
    x = images(generator, 3, 2, 4, 4) * 2 + 30
    norms = [made(BatchNorm2d, 2) for _ in range(2)]
    ours = Grads(norms[0], x)
    both = torch.cat([x, x]).requires_grad_()
    stock = nn.BatchNorm2d(2, eps=1e-5, momentum=0.05).double()
    stock.load_state_dict(norms[1].state_dict())
    out = stock(both)
    torch.testing.assert_close(ours.out, out[:3], rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(norms[0].buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 2, ours.out.numel(), dtype=x.dtype).view_as(ours.out).sin()
    (grad,) = torch.autograd.grad((out * torch.cat([weights, weights])).sum(), both)
    torch.testing.assert_close(ours.tensors[1], grad[:3], rtol=1e-8, atol=1e-8)
    # Negative control: they are not the statistics of one process's batch, which have another bias.
    alone = nn.BatchNorm2d(2, eps=1e-5, momentum=0.05).double()
    alone.load_state_dict(norms[1].state_dict())
    alone(x)
    assert (alone.get_buffer("running_var") - norms[0].running_var).abs().max() > 1e-3


@pytest.mark.usefixtures("two_alike")
@pytest.mark.parametrize("level", [3.3, 30.1, 1000.3])
def test_a_constant_channel_stays_finite_in_several_processes(level: float) -> None:
    """In float32 the mean square minus the squared mean is 1e-4 off at 30, which can make the variance negative."""
    results = Grads(BatchNorm2d(1), torch.full((4, 1, 8, 8), level))
    assert all(tensor.isfinite().all() for tensor in results.tensors)
    assert results.out.abs().max() < 0.1
    square = torch.full((256,), level).square().mean() - torch.full((256,), level).mean().square()
    assert square.abs() > 1e-7  # negative control: the naive variance is not 0


@pytest.mark.usefixtures("two_alike")
def test_statistics_of_draws_are_taken_in_one_process(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Only the first process draws from the prior, so a collective would wait for ever."""

    def refuse(value: Tensor) -> Tensor:
        raise AssertionError("waits for the other processes")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    norm, x = BatchNorm2d(2).double(), images(generator, 3, 2, 4, 4)
    with pytest.raises(AssertionError, match="waits"):
        norm(x)
    norm.momentum = None
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def test_a_constant_batch_becomes_the_bias_with_finite_gradients() -> None:
    norm, x = made(BatchNorm2d, 2), torch.full((3, 2, 4, 4), 0.5, dtype=torch.float64)
    results = Grads(norm, x)
    torch.testing.assert_close(results.out, norm.bias[:, None, None].expand_as(x))
    assert all(tensor.isfinite().all() for tensor in results.tensors)
    # Negative control: without its epsilon it would be 0 / 0.
    assert ((x - x.mean()) / x.var(correction=0).sqrt()).isnan().all()


# --- squeeze and excite, skips -------------------------------------------------------------------


def test_squeeze_and_excite_gates_channels_by_their_means(generator: torch.Generator) -> None:
    layer, x = made(SqueezeExcite, 96), images(generator, 2, 96, 3, 3)
    (weight, bias), (out_weight, out_bias) = layer.squeeze.parameters(), layer.excite.parameters()
    assert weight.shape == (6, 96)  # 96 / 16
    hidden = (x.flatten(2).mean(2) @ weight.T + bias).clamp(min=0)
    gate = 1 / (1 + (-(hidden @ out_weight.T + out_bias)).exp())
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])
    assert made(SqueezeExcite, 32).squeeze.out_features == 4  # never fewer


def test_the_skip_down_loses_no_pixel(generator: torch.Generator) -> None:
    layer, x = made(ShiftedDown, 3, 10), images(generator, 2, 3, 6, 6)
    parts = layer(x).split([2, 2, 2, 4], dim=1)  # the last takes the remainder
    swish = x * x.sigmoid()
    for part, conv, (down, right) in zip(parts, layer.convs, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True):
        pixels = swish[:, :, down::2, right::2]
        weight = conv.effective_weight().flatten(1)
        expected = torch.einsum("oc,nchw->nohw", weight, pixels) + conv.bias[:, None, None]
        torch.testing.assert_close(part, expected)
    # Every pixel reaches the output, which one of the convolutions would not let them.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert grad.abs().amin() > 0
    (grad,) = torch.autograd.grad(layer.convs[0](x[:, :, ::2, ::2]).sum(), x)
    assert grad.count_nonzero() == grad.numel() // 4


def test_the_skip_up_interpolates_between_aligned_corners(generator: torch.Generator) -> None:
    layer, x = made(SmoothUp, 4, 2), images(generator, 1, 4, 3, 3)
    assert layer.conv.bias is None
    # Row i of 6 lies at i * 2 / 5 of 3.
    position = torch.arange(6, dtype=torch.float64) * 2 / 5
    weights = (1 - (position[:, None] - torch.arange(3)).abs()).clamp(min=0)
    smooth = torch.einsum("ih,jw,nchw->ncij", weights, weights, x)
    expected = torch.einsum("oc,nchw->nohw", layer.conv.effective_weight().flatten(1), smooth)
    torch.testing.assert_close(layer(x), expected)
    other = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    assert (layer.conv(other) - expected).abs().max() > 1e-2  # negative control


# --- cells ---------------------------------------------------------------------------------------


def test_a_cell_adds_a_tenth_of_its_gated_branch_to_its_skip(generator: torch.Generator) -> None:
    x = images(generator, 2, 2, 4, 4)
    cell = ResidualCell(nn.Identity(), nn.Tanh(), nn.Softplus())
    torch.testing.assert_close(cell(x), x + 0.1 * functional.softplus(x.tanh()))


CELLS: dict[str, tuple[Callable[..., ResidualCell], bool]] = {
    "encoder": (encoder_cell, False),
    "encoder, down": (encoder_cell, True),
    "decoder": (decoder_cell, False),
    "decoder, up": (decoder_cell, True),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_its_branch_is_its_skip(name: str, generator: torch.Generator) -> None:
    build, resamples = CELLS[name]
    cell, x = made(build, 8, resamples, True), images(generator, 2, 8, 4, 4)
    shapes = {"encoder, down": (2, 16, 2, 2), "decoder, up": (2, 4, 8, 8)}
    assert cell(x).shape == shapes.get(name, (2, 8, 4, 4))
    skip = cell.skip(x)
    assert (cell(x) - skip).abs().max() > 1e-3  # negative control: the branch counts
    for parameter in cell.branch[-1].parameters():
        nn.init.zeros_(parameter)
    if resamples:
        assert torch.equal(cell(x), skip)
    else:
        assert torch.equal(cell(x), x)


def normalised(norm: BatchNorm2d, x: Tensor) -> Tensor:
    """Write out the normalisation by running statistics."""
    gain = norm.weight / (norm.running_var + 1e-5).sqrt()
    return (x - norm.running_mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("is_down", [False, True])
def test_the_branch_of_an_encoder_cell_is_twice_norm_swish_convolution(
    is_down: bool, generator: torch.Generator
) -> None:
    cell, x = made(encoder_cell, 4, is_down, True).eval(), images(generator, 2, 4, 6, 6)
    norms = [module for module in cell.modules() if isinstance(module, BatchNorm2d)]
    convs = [module for module in cell.branch.modules() if isinstance(module, Conv2d)]
    value = x
    for norm, conv, stride in zip(norms, convs, (2 if is_down else 1, 1), strict=True):
        weight = conv.effective_weight()
        assert conv.log_gain is not None and conv.bias is not None
        value = functional.conv2d(functional.silu(normalised(norm, value)), weight, conv.bias, stride, padding=1)
    torch.testing.assert_close(cell(x), cell.skip(x) + 0.1 * cell.excite(value))


@pytest.mark.parametrize("is_up", [False, True])
def test_the_branch_of_a_decoder_cell_is_an_inverted_bottleneck(is_up: bool, generator: torch.Generator) -> None:
    cell, x = made(decoder_cell, 4, is_up, True).eval(), images(generator, 2, 4, 3, 3)
    norms = [module for module in cell.modules() if isinstance(module, BatchNorm2d)]
    wide, depthwise, narrow = (module for module in cell.branch.modules() if isinstance(module, Conv2d))
    assert all(conv.log_gain is None and conv.bias is None for conv in (wide, depthwise, narrow))
    assert wide.weight.shape == (24, 4, 1, 1) and depthwise.weight.shape == (24, 1, 5, 5)
    value = x.repeat_interleave(2, -1).repeat_interleave(2, -2) if is_up else x
    value = functional.conv2d(normalised(norms[0], value), wide.weight)  # no activation before it
    value = functional.silu(normalised(norms[1], value))
    value = functional.silu(normalised(norms[2], functional.conv2d(value, depthwise.weight, padding=2, groups=24)))
    value = normalised(norms[3], functional.conv2d(value, narrow.weight))  # nor after its last norm
    torch.testing.assert_close(cell(x), cell.skip(x) + 0.1 * cell.excite(value))


@pytest.mark.parametrize("name", CELLS)
def test_squeeze_and_excite_may_be_left_out(name: str) -> None:
    build, resamples = CELLS[name]
    assert not [m for m in made(build, 8, resamples, False).modules() if isinstance(m, nn.Linear)]
    assert [m for m in made(build, 8, resamples, True).modules() if isinstance(m, nn.Linear)]


def test_cells_have_the_official_numbers_of_parameters() -> None:
    def count(build: Callable[..., nn.Module], *args: Any) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(*args).parameters())

    assert count(encoder_cell, 96, False, True) == 167_910
    assert count(decoder_cell, 384, False, True, 6) == 1_856_664
    # Negative controls: without the gate, and with half the expansion.
    assert count(encoder_cell, 96, False, False) == 18 * 96**2 + 8 * 96
    assert count(decoder_cell, 384, False, True, 3) < 1_000_000
