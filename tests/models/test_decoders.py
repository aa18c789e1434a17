"""What the decoders say of x agrees with their map from noise to x."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import Bernoulli
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.models.decoders import (
    Decoded,
    DecodedBernoulli,
    DecodedLogistics,
    DecodedNormal,
    SignBernoulli,
    decoded,
    diagonal_normal,
    num_decoder_outputs,
    positive_scale,
    soft_clamp,
)
from ppl_vaebm.models.logistic_mixture import DiscretizedLogisticMixture
from ppl_vaebm.rng import global_rng

SMOOTH = ["normal", "logistic", "logistic-mixture"]
EVENT = (3, 2, 2)


def draws(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_decoded(decoder: str, generator: torch.Generator, num: int = 3, levels: int | None = 8) -> Decoded:
    """Read random outputs of a network, float64."""
    out = 0.7 * draws(generator, num, num_decoder_outputs(decoder, EVENT[0], 2), *EVENT[1:])
    return decoded(decoder, out, EVENT[0], 2, levels)


@pytest.mark.parametrize(
    ("decoder", "num_channels", "expected"),
    [
        ("bernoulli", 1, 1),
        ("normal", 1, 2),
        ("normal", 3, 6),
        ("logistic", 1, 2),
        ("logistic", 3, 6),
        ("logistic-mixture", 1, 30),
        ("logistic-mixture", 3, 100),
    ],
)
def test_the_head_has_as_many_outputs_as_the_decoder_reads(decoder: str, num_channels: int, expected: int) -> None:
    assert num_decoder_outputs(decoder, num_channels, 10) == expected
    one = decoded(decoder, torch.zeros(2, expected, 4, 4), num_channels, 10, 256)
    assert one.mean().shape == (2, num_channels, 4, 4)
    assert (one.distribution().batch_shape, one.distribution().event_shape) == ((2,), (num_channels, 4, 4))


@pytest.mark.parametrize("decoder", SMOOTH)
def test_the_transport_inverts(decoder: str, generator: torch.Generator) -> None:
    one, eps = random_decoded(decoder, generator), draws(generator, 3, *EVENT)
    x = one.transport(eps)
    torch.testing.assert_close(one.noise_of(x.clone()), eps, rtol=0, atol=1e-10)
    assert (one.noise_of(x + 0.1) - eps).abs().min() > 1e-3  # negative control


@pytest.mark.parametrize("decoder", SMOOTH)
def test_the_law_is_that_of_the_transported_noise(decoder: str, generator: torch.Generator) -> None:
    one, eps = random_decoded(decoder, generator), draws(generator, 3, *EVENT)
    x = one.transport(eps)
    matrices = torch.autograd.functional.jacobian(lambda noise: one.transport(noise).sum(0), eps).movedim(3, 0)
    log_dets = torch.linalg.slogdet(matrices.reshape(3, 12, 12)).logabsdet
    normal = -0.5 * (eps.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    torch.testing.assert_close(one.distribution().log_prob(x.clone()), normal - log_dets, rtol=1e-9, atol=1e-9)
    assert log_dets.abs().min() > 0.1  # negative control: the volumes count


@pytest.mark.parametrize("decoder", SMOOTH)
def test_the_law_draws_by_the_transport(decoder: str, generator: torch.Generator) -> None:
    one = random_decoded(decoder, generator)
    with global_rng(0):
        drawn = one.distribution().rsample()
    with global_rng(0):
        eps = torch.randn(3, *EVENT, dtype=torch.float64)
    torch.testing.assert_close(drawn, one.transport(eps))


def test_a_normal_has_nvaes_soft_clamps(generator: torch.Generator) -> None:
    raw = torch.cat([10 * draws(generator, 2, 3, 2, 2), 10 * draws(generator, 2, 3, 2, 2)], dim=1)
    one, eps = decoded("normal", raw, 3, 1, None), draws(generator, 2, *EVENT)
    assert isinstance(one, DecodedNormal)
    loc = 5 * (raw[:, :3] / 5).tanh()
    scale = (5 * (raw[:, 3:] / 5).tanh()).exp() + 0.01
    torch.testing.assert_close(one.mean(), loc)
    torch.testing.assert_close(one.transport(eps), loc + scale * eps)
    log_prob = -0.5 * eps.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(one.distribution().log_prob(loc + scale * eps), log_prob.flatten(1).sum(1))
    assert (raw[:, :3] - loc).abs().max() > 1  # negative control: the clamp is felt
    bounds = decoded("normal", torch.tensor([-1e9, -1e9, 1e9, 1e9]).double().reshape(2, 2, 1, 1), 1, 1, None)
    assert isinstance(bounds, DecodedNormal)
    assert bounds.loc.flatten().tolist() == [-5.0, 5.0]
    assert bounds.scale.flatten().tolist() == pytest.approx([math.exp(-5) + 0.01, math.exp(5) + 0.01])


# --- Bernoulli -----------------------------------------------------------------------------------


LOGITS = torch.tensor([-40.0, -3.0, -0.2, 0.0, 1.5, 40.0], dtype=torch.float64).reshape(1, 1, 2, 3)


def test_signs_have_the_probabilities_of_a_bernoulli() -> None:
    signs = SignBernoulli(LOGITS)
    reference = Bernoulli(logits=LOGITS)
    ones = torch.ones_like(LOGITS)
    torch.testing.assert_close(signs.log_prob(ones), reference.log_prob(ones))
    torch.testing.assert_close(signs.log_prob(-ones), reference.log_prob(0 * ones))
    torch.testing.assert_close(signs.log_prob(ones).exp() + signs.log_prob(-ones).exp(), ones)
    assert (signs.log_prob(ones) - signs.log_prob(-ones)).flatten().tolist() == pytest.approx(LOGITS.flatten().tolist())
    whole = DecodedBernoulli(LOGITS).distribution()
    assert (whole.batch_shape, whole.event_shape) == ((1,), (1, 2, 3))
    torch.testing.assert_close(whole.log_prob(ones), reference.log_prob(ones).sum((1, 2, 3)))
    with pytest.raises(ValueError, match="support"):
        whole.log_prob(ones * 0.5)


@pytest.mark.parametrize("route", ["transport", "distribution"])
def test_signs_come_as_often_as_they_should(route: str, generator: torch.Generator, seed: int) -> None:
    num = 20_000
    one = DecodedBernoulli(LOGITS.expand(num, -1, -1, -1))
    if route == "distribution":
        with global_rng(seed):
            x = one.distribution().sample()
    else:
        x = one.transport(draws(generator, num, 1, 2, 3))
    assert set(x.unique().tolist()) == {-1.0, 1.0} and x.dtype == torch.float64
    share, expected = (x == 1).double().mean(0)[None], LOGITS.sigmoid()
    error = (expected * (1 - expected) / num).sqrt()
    assert ((share - expected).abs() <= 5 * error + 1e-12).all()
    assert ((share - (1 - expected)).abs() > 5 * error).any()  # negative control: the other sign's are not these
    torch.testing.assert_close(one.mean()[:1], 2 * expected - 1)


def test_signs_have_no_noise_and_their_transport_no_gradient(generator: torch.Generator) -> None:
    one, eps = DecodedBernoulli(LOGITS), draws(generator, 1, 1, 2, 3).requires_grad_()
    with pytest.raises(InputError, match="no noise for a given x; use the decoder normal or logistic-mixture"):
        one.noise_of(torch.ones_like(LOGITS))
    assert not one.transport(eps).requires_grad


# --- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["normal", "bernoulli"])
def test_only_the_logistics_score_levels(decoder: str, generator: torch.Generator) -> None:
    one = random_decoded(decoder, generator)
    x = torch.ones(3, *EVENT, dtype=torch.float64)
    torch.testing.assert_close(one.discretized().log_prob(x), one.distribution().log_prob(x))


@pytest.mark.parametrize("levels", [2, 8, 32])
@pytest.mark.parametrize("decoder", ["logistic", "logistic-mixture"])
def test_the_law_of_levels_sums_to_one(decoder: str, levels: int, generator: torch.Generator) -> None:
    out = draws(generator, 1, num_decoder_outputs(decoder, 1, 2), 1, 1)
    one = decoded(decoder, out, 1, 2, levels)
    assert isinstance(one, DecodedLogistics) and isinstance(one.discretized(), DiscretizedLogisticMixture)
    centres = (2 * torch.arange(levels, dtype=torch.float64) + 1) / levels - 1
    x = centres.reshape(-1, 1, 1, 1)
    density = one.discretized().log_prob(x).exp()
    assert float(density.sum()) * 2 / levels == pytest.approx(1, abs=1e-12)
    # It is constant over a level's cell, and not the density of the samples, which have tails beyond [-1, 1].
    torch.testing.assert_close(one.discretized().log_prob(x + 0.9 / levels).exp(), density)
    assert abs(float(one.distribution().log_prob(x).exp().sum()) * 2 / levels - 1) > 1e-2


def test_with_many_levels_the_two_laws_agree_inside(generator: torch.Generator) -> None:
    one = random_decoded("logistic-mixture", generator, levels=1 << 16)
    x = 0.5 * draws(generator, 3, *EVENT).tanh()
    torch.testing.assert_close(one.discretized().log_prob(x), one.distribution().log_prob(x), rtol=0, atol=1e-2)
    coarse = random_decoded("logistic-mixture", generator, levels=4)
    assert (coarse.discretized().log_prob(x) - coarse.distribution().log_prob(x)).abs().min() > 1e-2  # negative control


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoder", [*SMOOTH, "bernoulli"])
def test_half_precision_is_read_in_float32(decoder: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    out = draws(generator, 3, num_decoder_outputs(decoder, EVENT[0], 2), *EVENT[1:])
    one, wide = (decoded(decoder, raw, EVENT[0], 2, 8) for raw in (out.to(dtype), out.to(dtype).float()))
    eps = draws(generator, 3, *EVENT).float()
    x = one.transport(eps)
    assert x.dtype == one.distribution().log_prob(x).dtype == one.mean().dtype == torch.float32
    assert torch.equal(x, wide.transport(eps))
    assert torch.equal(one.distribution().log_prob(x), wide.distribution().log_prob(x))


@pytest.mark.parametrize("decoder", [*SMOOTH, "bernoulli"])
def test_float64_stays_float64(decoder: str, generator: torch.Generator) -> None:
    one, eps = random_decoded(decoder, generator), draws(generator, 3, *EVENT)
    assert (
        one.transport(eps).dtype
        == one.mean().dtype
        == one.distribution().log_prob(one.transport(eps)).dtype
        == torch.float64
    )


def test_soft_clamp_is_the_identity_near_zero_and_stays_within_five() -> None:
    raw = torch.tensor([-1e9, -5.0, -1e-4, 0.0, 1e-4, 5.0, 1e9], dtype=torch.float64)
    five = 5 * math.tanh(1)
    assert soft_clamp(raw).tolist() == pytest.approx([-5.0, -five, -1e-4, 0.0, 1e-4, five, 5.0], rel=1e-8)


def test_positive_scale_is_between_its_bounds() -> None:
    raw = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    assert positive_scale(raw).tolist() == pytest.approx([math.exp(-5) + 0.01, 1.01, math.exp(5) + 0.01])


def test_diagonal_normal_sums_over_all_but_the_first_axis(generator: torch.Generator) -> None:
    loc = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    value = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    normal = diagonal_normal(loc, scale)
    assert (normal.batch_shape, normal.event_shape) == ((4,), (3, 2, 2))
    terms = -0.5 * ((value - loc) / 0.7).square() - math.log(0.7) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(normal.log_prob(value), terms.sum(dim=(1, 2, 3)))
