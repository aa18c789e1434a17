"""The flow on a posterior shifts every element by a function of the elements before it, and keeps volumes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor, nn

from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import diagonal_normal
from ppl_vaebm.models.nvae import AutoregressiveShift, autoregressive_mask, flow
from ppl_vaebm.rng import global_rng
from tests.small_models import strengthen

SHAPE = (3, 4, 4)
SIZE = 48
ORDERS = pytest.mark.parametrize("mirror", [False, True])


def new_flow(num_pairs: int = 1, gain: float = 4.0) -> Any:
    """Make a flow of float64 that moves much."""
    with global_rng(0):
        transforms = flow(SHAPE[0], num_pairs).double()
    strengthen(transforms, gain)
    return transforms


def shift_of(mirror: bool) -> AutoregressiveShift:
    transform = new_flow()[mirror]
    assert isinstance(transform, AutoregressiveShift)
    return transform


def draws(generator: torch.Generator, num: int = 2) -> Tensor:
    return torch.randn(num, *SHAPE, generator=generator, dtype=torch.float64)


def in_order(z: Tensor, mirror: bool = False) -> Tensor:
    """Lay elements in the order of the flow: pixels as one reads, or backwards, and channels within a pixel."""
    pixels = z.movedim(-3, -1)
    return (pixels.flip((-3, -2)) if mirror else pixels).flatten(-3)


def jacobian(transform: nn.Module, z: Tensor, mirror: bool = False) -> Tensor:
    """Differentiate every element by every other, ``(48, 48)`` in the order of the flow."""

    def ordered(flat: Tensor) -> Tensor:
        pixels = flat.reshape(4, 4, 3)
        return in_order(transform((pixels.flip((0, 1)) if mirror else pixels).movedim(-1, 0)[None])[0], mirror)

    matrix: Tensor = torch.autograd.functional.jacobian(ordered, in_order(z, mirror))
    return matrix


def through(transforms: Any, z: Tensor) -> Tensor:
    for transform in transforms:
        z = transform(z)
    return z


# --- the order -----------------------------------------------------------------------------------


@ORDERS
def test_the_jacobian_is_triangular_with_a_unit_diagonal(mirror: bool, generator: torch.Generator) -> None:
    matrix = jacobian(shift_of(mirror), draws(generator, 1)[0], mirror)
    earlier, later = matrix.tril(-1), matrix.triu(1)
    assert torch.equal(matrix.diagonal(), torch.ones(SIZE, dtype=torch.float64))
    assert (later == 0).all()
    sign, log_det = torch.linalg.slogdet(matrix)
    assert sign == 1 and abs(float(log_det)) < 1e-12
    # It sees every earlier element within its reach: 1 + 2 rows up, and as many columns to each side.
    position = torch.arange(SIZE) // 3
    row, column = position // 4, position % 4
    is_near = ((row[:, None] - row).abs() <= 3) & ((column[:, None] - column).abs() <= 3)
    is_earlier = torch.ones(SIZE, SIZE).tril(-1).bool()
    seen = earlier != 0
    assert (seen & is_earlier & is_near).sum() == seen.sum()
    in_a_pixel_or_row = (torch.arange(SIZE - 1) + 1) % 12 != 0
    assert seen.diagonal(-1)[in_a_pixel_or_row].all()
    assert earlier.abs().max() > 0.1
    # Negative control: in the other order of the pixels it is not triangular.
    assert jacobian(shift_of(mirror), draws(generator, 1)[0], not mirror).triu(1).abs().max() > 0.1


@ORDERS
def test_the_jacobian_without_masks_is_not_triangular(mirror: bool, generator: torch.Generator) -> None:
    """Negative control."""
    transform = shift_of(mirror)
    for conv in (transform.first, transform.mix, transform.last):
        conv.mask = None
    strengthen(transform, 2.0)  # the norms are now those of all weights, so every weight is smaller
    matrix = jacobian(transform, draws(generator, 1)[0])
    assert matrix.tril(-1).abs().max() > 0.1 and matrix.triu(1).abs().max() > 0.1
    assert abs(float(torch.linalg.slogdet(matrix).logabsdet)) > 1e-3


@ORDERS
@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(("num_out", "num_in", "size"), [(3, 3, 3), (6, 3, 3), (3, 6, 1), (1, 1, 5), (6, 2, 5)])
def test_a_mask_keeps_what_is_earlier_and_nothing_else(
    num_out: int, num_in: int, size: int, is_strict: bool, mirror: bool
) -> None:
    mask = autoregressive_mask(num_out, num_in, size, is_strict, mirror)
    num_latent = min(num_out, num_in)
    for out in range(num_out):
        for channel in range(num_in):
            for row in range(size):
                for column in range(size):
                    here = (size // 2, size // 2, out * num_latent // num_out)
                    there = (row, column, channel * num_latent // num_in)
                    pixel, other = here[:2], there[:2]
                    before = other > pixel if mirror else other < pixel
                    before |= other == pixel and there[2] < here[2]
                    assert mask[out, channel, row, column] == float(before or (there == here and not is_strict))


def test_a_pair_of_opposite_orders_lets_every_element_see_others(generator: torch.Generator) -> None:
    transforms, z = new_flow(), draws(generator, 1)[0]
    matrix = jacobian(nn.Sequential(*transforms), z)
    off_diagonal = matrix - matrix.diagonal().diag()
    assert (off_diagonal.abs().amax(1) > 1e-4).all()
    assert off_diagonal.tril(-1).any() and off_diagonal.triu(1).any()
    # Alone, one order has a first element that sees none.
    for transform, mirror in zip(transforms, (False, True), strict=True):
        assert torch.equal(jacobian(transform, z, mirror)[0], torch.eye(SIZE, dtype=torch.float64)[0])


# --- the density ---------------------------------------------------------------------------------


@ORDERS
def test_it_inverts_to_the_last_bits(mirror: bool, generator: torch.Generator) -> None:
    transform, z = shift_of(mirror), draws(generator)
    y = transform(z).detach().clone()  # a copy, which is not in the transform's cache
    back = transform.inv(y)
    assert back is not z
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)
    # Negative control: one round of the iteration does not suffice.
    assert (y + transform.shift(y) - z).abs().max() > 1e-2
    assert torch.equal(transform.log_abs_det_jacobian(z, y), torch.zeros(2, dtype=torch.float64))


def test_rows_settle_apart(generator: torch.Generator) -> None:
    transform, z = shift_of(False), draws(generator, 3)
    y = transform(z).detach()
    torch.testing.assert_close(transform.inv(y.clone())[1:], transform.inv(y[1:].clone()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_the_density_is_that_of_the_change_of_variables(num_pairs: int, generator: torch.Generator) -> None:
    transforms = new_flow(num_pairs)
    assert [bool(transform.first.mask[0, 0, 0, 0]) for transform in transforms] == [True, False] * num_pairs
    base = diagonal_normal(draws(generator), draws(generator).exp())
    flowed = TransformedDistribution(base, [*transforms])
    assert (flowed.batch_shape, flowed.event_shape) == ((2,), SHAPE)
    z0 = draws(generator)
    z = through(transforms, z0).detach().clone()
    matrices = [jacobian(nn.Sequential(*transforms), row) for row in z0]
    log_dets = torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in matrices])
    expected = base.log_prob(z0) - log_dets
    torch.testing.assert_close(flowed.log_prob(z), expected, rtol=1e-10, atol=1e-10)
    assert (base.log_prob(z) - expected).abs().min() > 1  # negative control: the flow changed the distribution
    # The sample's own density comes from the cache, and is the same.
    with global_rng(0):
        drawn = flowed.rsample()
    torch.testing.assert_close(flowed.log_prob(drawn), flowed.log_prob(drawn.detach().clone()), rtol=1e-10, atol=1e-10)


def test_the_density_integrates_to_one(generator: torch.Generator) -> None:
    """Two latents on one pixel, summed over a grid."""
    with global_rng(0):
        transforms: Any = flow(2, 1).double()
    strengthen(transforms, 2.0)
    with torch.no_grad():
        for transform in transforms:
            transform.last.bias.normal_(generator=generator)
    loc, scale = (torch.full((1, 2, 1, 1), value, dtype=torch.float64) for value in (0.3, 0.8))
    flowed = TransformedDistribution(diagonal_normal(loc, scale), [*transforms])
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        total = flowed.expand((len(z),)).log_prob(z).exp().sum() * 0.1**2
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_the_density_of_a_value_from_elsewhere_has_its_gradient(generator: torch.Generator) -> None:
    """Against central differences, by the value and by every weight; a one-step gradient would be off."""
    with global_rng(0):
        transforms: Any = flow(2, 1).double()
    strengthen(transforms, 3.0)
    base = diagonal_normal(torch.zeros(1, 2, 3, 3, dtype=torch.float64), torch.ones(1, 2, 3, 3, dtype=torch.float64))
    y = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)

    def log_prob(y: Tensor) -> Tensor:
        return TransformedDistribution(base, [*transforms]).log_prob(y.clone()).sum()

    leaves = [y.clone().requires_grad_(), *transforms.parameters()]
    grads = torch.autograd.grad(log_prob(leaves[0]), leaves)
    step = 1e-6
    for leaf, grad in zip(leaves, grads, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                ends.append(float(log_prob(leaves[0])))
                leaf -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-7)


# --- as a module ---------------------------------------------------------------------------------


def test_a_fresh_flow_moves_little(generator: torch.Generator) -> None:
    z = draws(generator, 100)

    def spread(transforms: Any) -> float:
        """Return how much what is added varies; the output layer's bias is the same for every z."""
        with torch.no_grad():
            return float((through(transforms, z) - z).std(0).mean())

    fresh, loud = new_flow(gain=1.0), new_flow(gain=1.0)
    for transform in loud:
        transform.last.log_gain.data += math.log(10)
    assert 0 < spread(fresh) < 0.01
    assert spread(loud) == pytest.approx(10 * spread(fresh), rel=0.1)  # negative control: without the gain of a tenth


def test_gains_start_at_the_norms_and_that_of_the_output_layer_at_a_tenth() -> None:
    for transform in new_flow(gain=1.0):
        last = transform.last
        norm = last.direction().flatten(1).norm(dim=1)
        torch.testing.assert_close(last.log_gain.exp(), 0.1 * (norm + 0.01), rtol=1e-6, atol=0)
        for conv in (transform.first, transform.mix):
            norm = conv.direction().flatten(1).norm(dim=1)
            torch.testing.assert_close(conv.log_gain.exp(), norm + 0.01, rtol=1e-6, atol=0)
            assert conv.bias is None
        assert last.bias is not None


def test_it_can_be_copied_after_a_forward_pass(generator: torch.Generator) -> None:
    """Its cache then holds part of a graph, which PyTorch refuses to copy."""
    transforms, z = new_flow(), draws(generator)
    y = through(transforms, z.requires_grad_())
    assert transforms[1]._cached_x_y[1] is y and transforms[1].inv(y) is transforms[0]._cached_x_y[1]
    for twin in (copy.deepcopy(transforms), pickle.loads(pickle.dumps(transforms))):
        assert twin[1]._cached_x_y == (None, None)
        assert torch.equal(through(twin, z.clone()), y)
        with torch.no_grad():
            twin[0].last.bias += 1
        assert not torch.equal(through(twin, z.clone()), y)
    assert torch.equal(through(transforms, z.clone()), y)


def test_weights_of_flows_without_gains_are_refused() -> None:
    weights = new_flow().state_dict()
    new_flow().load_state_dict(weights)
    earlier = {name: value for name, value in weights.items() if not name.endswith(("first.log_gain", "mix.log_gain"))}
    with pytest.raises(InputError, match=r"found none in 0\.first: .* fit stage svi again with --overwrite"):
        new_flow().load_state_dict(earlier)


def test_without_pairs_there_is_no_flow() -> None:
    assert len(flow(3, 0)) == 0
