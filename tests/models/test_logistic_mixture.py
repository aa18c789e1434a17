"""The mixture of logistics: its transport, its density and its levels have their known answers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import pyro
import pytest
import torch
from torch import Tensor

from ppl_vaebm.models.logistic_mixture import DiscretizedLogisticMixture, MixtureParams, display_mean, num_outputs
from ppl_vaebm.models.quantile_transport import QuantileTransport, logistic_mixture
from ppl_vaebm.rng import global_rng

SINGLE = torch.finfo(torch.float32).eps


def random_raw(
    generator: torch.Generator,
    num_channels: int = 3,
    num_components: int = 3,
    num: int = 2,
    size: tuple[int, int] = (1, 2),
    log_scale: float = -1.5,
) -> Tensor:
    """Draw raw outputs whose components overlap in part, float64."""
    shape = (num, num_outputs(num_channels, num_components), *size)
    raw = torch.randn(shape, generator=generator, dtype=torch.float64)
    block = num_channels * num_components
    start = num_components + block
    raw[:, num_components:start] *= 0.7
    raw[:, start : start + block] = 0.5 * raw[:, start : start + block] + log_scale
    return raw


def random_params(
    generator: torch.Generator,
    num_channels: int = 3,
    num_components: int = 3,
    num: int = 2,
    size: tuple[int, int] = (1, 2),
    log_scale: float = -1.5,
) -> MixtureParams:
    raw = random_raw(generator, num_channels, num_components, num, size, log_scale)
    return MixtureParams.from_raw(raw, num_channels, num_components)


def converted(params: MixtureParams, dtype: torch.dtype) -> MixtureParams:
    return MixtureParams(*(value.to(dtype) for value in vars(params).values()))


def one_pixel(weights: Sequence[float], loc: Sequence[float], log_scale: float | Sequence[float]) -> MixtureParams:
    """Make a grey mixture of one pixel, float64."""
    w, m = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (weights, loc))
    s = torch.tensor(log_scale, dtype=torch.float64).view(-1, 1, 1).expand_as(w)
    return MixtureParams(w.log(), m.unsqueeze(1), s.unsqueeze(1), m.new_zeros(1, 0, len(weights), 1, 1))


def normal_noise(params: MixtureParams, generator: torch.Generator) -> Tensor:
    return torch.randn(params.batch_shape + params.event_shape, generator=generator, dtype=params.loc.dtype)


def ancestral_sample(params: MixtureParams, num: int, generator: torch.Generator) -> Tensor:
    """Draw from the mixture by its definition, ``(num, C, 1, 1)``: a component, then logistic noise per channel."""
    weights = params.log_weights.exp().flatten()
    chosen = torch.multinomial(weights, num, replacement=True, generator=generator)
    x = torch.empty(num, params.num_channels, 1, 1, dtype=torch.float64)
    for channel in range(params.num_channels):
        loc = params.loc[0, channel, chosen, 0, 0]
        for earlier in range(channel):
            coef = params.coefs[0, channel * (channel - 1) // 2 + earlier, chosen, 0, 0]
            loc = loc + coef * x[:, earlier, 0, 0]
        noise = torch.rand(num, generator=generator, dtype=torch.float64).logit()
        x[:, channel, 0, 0] = loc + params.log_scale[0, channel, chosen, 0, 0].exp() * noise
    return x


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_channels", "per_component"), [(1, 3), (3, 10)])
def test_outputs_are_three_per_grey_component_and_ten_per_colour_component(
    num_channels: int, per_component: int
) -> None:
    assert num_outputs(num_channels, 5) == 5 * per_component
    assert num_outputs(num_channels) == 2 * num_channels


def test_raw_outputs_become_parameters_in_range(generator: torch.Generator) -> None:
    raw = 10 * torch.randn(2, 50, 4, 3, generator=generator)
    params = MixtureParams.from_raw(raw.half(), 3, 5)
    assert {value.dtype for value in vars(params).values()} == {torch.float32}
    assert (params.batch_shape, params.event_shape) == ((2,), (3, 4, 3))
    torch.testing.assert_close(params.log_weights.exp().sum(1), torch.ones(2, 4, 3))
    assert (float(params.log_scale.min()), params.coefs.shape) == (-7.0, (2, 3, 5, 4, 3))
    assert float(params.coefs.abs().max()) <= 1
    single = MixtureParams.from_raw_single(raw[:, :6], 3)
    assert torch.equal(single.loc[:, :, 0], raw[:, :3])
    assert (float(single.log_scale.min()), float(single.coefs.abs().max())) == (-8.0, 0.0)


@pytest.mark.parametrize("shape", [(2, 49, 4, 3), (50, 4, 3)])
def test_another_number_of_outputs_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected raw outputs of shape .n, 50, H, W., got"):
        MixtureParams.from_raw(torch.zeros(shape), 3, 5)


def test_display_mean_clips_the_channels_in_turn() -> None:
    weights = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    loc = torch.tensor([[2.0, 4.0], [0.0, 0.4], [0.1, 0.1]]).view(1, 3, 2, 1, 1)
    coefs = torch.tensor([[0.4, 0.4], [-0.8, 0.0], [0.5, 0.5]]).view(1, 3, 2, 1, 1)
    params = MixtureParams(weights.log(), loc, torch.zeros_like(loc), coefs)
    # Red clip(3.5) = 1; green 0.3 + 0.4 * 1; blue 0.1 - 0.2 * 1 + 0.5 * 0.7.
    assert display_mean(params).flatten().tolist() == pytest.approx([1.0, 0.7, 0.25])


# --- the transport -------------------------------------------------------------------------------

SHAPES: dict[str, tuple[list[float], list[float], float | list[float]]] = {
    "narrow": ([0.2, 0.35, 0.45], [-0.1, 0.0, 0.2], -7.0),
    "separated": ([0.45, 0.55], [-1.0, 1.0], -7.0),
    "unequal": ([0.3, 0.7], [0.5, 0.0], [-7.0, 1.0]),
}
LADDER = torch.tensor([-12.0, -8, -4, -2, -1, -0.3, 0.0, 0.1, 0.7, 1.5, 3, 6, 9, 12], dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_noise_up_to_twelve_survives_a_round_trip_in_float64(name: str) -> None:
    transport = QuantileTransport(one_pixel(*SHAPES[name]))
    eps = LADDER.view(-1, 1, 1, 1)
    x = transport(eps)
    torch.testing.assert_close(transport.inv(x), eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport(transport.inv(x)), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_noise_up_to_twelve_survives_a_round_trip_in_float32(name: str) -> None:
    params = converted(one_pixel(*SHAPES[name]), torch.float32)
    transport = QuantileTransport(params)
    eps = LADDER.float().view(-1, 1, 1, 1).requires_grad_()
    x = transport(eps)
    (slope,) = torch.autograd.grad(x.sum(), eps)
    # Neither x nor eps is known better than to a few units in the last place; the first passes through the slope.
    bound = 8 * SINGLE * ((x.abs() + 1) / slope + eps.abs() + 1)
    error = (transport.inv(x) - eps).abs()
    assert (error <= bound).all(), (error / bound).max()
    other = QuantileTransport(dataclasses.replace(params, loc=params.loc + 1e-3))
    assert not ((other.inv(x) - eps).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_colour_images_survive_a_round_trip(generator: torch.Generator, dtype: torch.dtype, tolerance: float) -> None:
    params = converted(random_params(generator, num_components=5, num=4, size=(5, 6), log_scale=-3.0), dtype)
    transport = QuantileTransport(params)
    eps = normal_noise(params, generator)
    x = transport(eps)
    # float32: scales go down to about e^-5, so a last place of a pixel near 1 is 2e-5 of noise.
    torch.testing.assert_close(transport.inv(x), eps, rtol=0, atol=tolerance)
    assert (QuantileTransport(params).inv(x.flip(0)) - eps).abs().max() > 0.1


def test_pixels_fifty_scales_away_survive_a_round_trip_in_float32() -> None:
    transport = QuantileTransport(converted(one_pixel([0.3, 0.7], [-0.5, 0.5], 0.0), torch.float32))
    x = torch.tensor([-1e4, -300, -50.0, 50.0, 300, 1e4]).view(-1, 1, 1, 1)
    eps = transport.inv(x)
    assert eps.flatten().tolist()[2] == pytest.approx(-9.68, abs=0.1)  # log Phi = -50
    torch.testing.assert_close(transport(eps), x, rtol=1e-5, atol=0)


def test_a_single_logistic_is_its_closed_form(generator: torch.Generator) -> None:
    raw = torch.randn(2, 6, 3, 4, generator=generator, dtype=torch.float64)
    params = MixtureParams.from_raw_single(raw, 3)
    eps = normal_noise(params, generator)
    expected = raw[:, :3] + raw[:, 3:].exp() * torch.special.ndtr(eps).logit()
    torch.testing.assert_close(QuantileTransport(params)(eps), expected, rtol=1e-12, atol=1e-12)
    z = (expected - raw[:, :3]) / raw[:, 3:].exp()
    terms = -raw[:, 3:] - z - 2 * torch.log1p((-z).exp())
    torch.testing.assert_close(params.log_density(expected), terms.sum((1, 2, 3)))


def test_the_density_is_exact_in_the_tails() -> None:
    z = torch.tensor([-60.0, -35, -21, -1, 0, 1, 21, 35, 60], dtype=torch.float64)
    found = one_pixel([1.0], [0.0], 0.0).log_density(z.view(-1, 1, 1, 1))
    torch.testing.assert_close(found, -z.abs() - 2 * (-z.abs()).exp().log1p(), rtol=1e-14, atol=0)


def test_one_component_without_coefficients_is_independent_logistics(generator: torch.Generator) -> None:
    params = random_params(generator, num_components=1)
    eps = normal_noise(params, generator)
    independent = dataclasses.replace(params, coefs=torch.zeros_like(params.coefs))
    alone = [
        MixtureParams(params.log_weights, params.loc[:, [c]], params.log_scale[:, [c]], params.coefs[:, :0])
        for c in range(3)
    ]
    x = QuantileTransport(independent)(eps)
    torch.testing.assert_close(x, torch.cat([QuantileTransport(p)(eps[:, [c]]) for c, p in enumerate(alone)], 1))
    log_densities = torch.stack([p.log_density(x[:, [c]]) for c, p in enumerate(alone)])
    torch.testing.assert_close(independent.log_density(x), log_densities.sum(0))
    assert (QuantileTransport(params)(eps) - x).abs().max() > 0.01


def test_an_image_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    params = converted(random_params(generator, num=4, size=(3, 3)), torch.float32)
    eps = normal_noise(params, generator)
    first = MixtureParams(*(value[:1] for value in vars(params).values()))
    alone, together = QuantileTransport(first)(eps[:1]), QuantileTransport(params)(eps)
    # Only the order in which torch adds may differ, by the last places of numbers up to about 4.
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=16 * SINGLE)
    assert (alone - together[1:]).abs().max() > 0.1


def test_nan_stays_in_its_pixel(generator: torch.Generator) -> None:
    params = random_params(generator, num_channels=1)
    eps = normal_noise(params, generator)
    eps[0, 0, 0, 1] = math.nan
    assert torch.equal(QuantileTransport(params)(eps).isnan(), eps.isnan())


# --- gradients -----------------------------------------------------------------------------------


def central_differences(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    moves = step * torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape)
    return torch.stack([(f(at + move) - f(at - move)) / (2 * step) for move in moves]).view_as(at)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_gradients_are_those_of_finite_differences(generator: torch.Generator, num_channels: int) -> None:
    raw = random_raw(generator, num_channels)
    eps = 2 * torch.randn(2, num_channels, 1, 2, generator=generator, dtype=torch.float64)
    eps[0, 0, 0, 0] = 0.0
    pull = torch.randn(eps.shape, generator=generator, dtype=torch.float64)

    def pulled(eps: Tensor, raw: Tensor) -> Tensor:
        transport = QuantileTransport(MixtureParams.from_raw(raw, num_channels, 3))
        return (pull * transport(eps)).sum()

    leaves = (eps.requires_grad_(), raw.requires_grad_())
    by_eps, by_raw = torch.autograd.grad(pulled(*leaves), leaves)
    with torch.no_grad():
        torch.testing.assert_close(
            by_eps, central_differences(lambda value: pulled(value, raw), eps), rtol=1e-6, atol=1e-8
        )
        torch.testing.assert_close(
            by_raw, central_differences(lambda value: pulled(eps, value), raw), rtol=1e-6, atol=1e-8
        )


class ForgetfulParams(MixtureParams):
    """Parameters whose means move with the earlier channels but pass no gradient to them."""

    def channel_loc(self, channel: int, earlier: Sequence[Tensor]) -> Tensor:
        return super().channel_loc(channel, [value.detach() for value in earlier])


def test_finite_differences_catch_a_gradient_lost_between_channels(generator: torch.Generator) -> None:
    params = ForgetfulParams(*vars(random_params(generator)).values())
    eps = normal_noise(params, generator).requires_grad_()
    (by_eps,) = torch.autograd.grad(QuantileTransport(params)(eps).sum(), eps)
    with torch.no_grad():
        expected = central_differences(lambda value: QuantileTransport(params)(value).sum(), eps)
    torch.testing.assert_close(by_eps[:, 2], expected[:, 2], rtol=1e-6, atol=1e-8)
    assert (by_eps[:, 0] - expected[:, 0]).abs().max() > 1e-3


def test_the_inverse_has_the_inverse_gradient(generator: torch.Generator) -> None:
    params = random_params(generator)
    transport = QuantileTransport(params)
    x = transport(normal_noise(params, generator)).requires_grad_()
    (by_x,) = torch.autograd.grad(transport.inv(x).sum(), x)
    with torch.no_grad():
        expected = central_differences(lambda value: transport.inv(value).sum(), x)
    torch.testing.assert_close(by_x, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("is_inverse", [False, True])
def test_a_second_derivative_raises(generator: torch.Generator, is_inverse: bool) -> None:
    params = random_params(generator)
    value = normal_noise(params, generator).requires_grad_()
    transport = QuantileTransport(params)
    image = transport.inv(value) if is_inverse else transport(value)
    (first,) = torch.autograd.grad(image.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(first.sum(), value)
    (first,) = torch.autograd.grad(params.log_density(value).sum(), value, create_graph=True)
    assert torch.autograd.grad(first.sum(), value)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_that_falls_between_far_components_keeps_finite_gradients(dtype: torch.dtype) -> None:
    params = converted(one_pixel([0.5, 0.5], [-1.0, 1.0], -7.0), dtype)
    eps = torch.zeros(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    loc = params.loc.requires_grad_()
    x = QuantileTransport(params)(eps)
    by_eps, by_loc = torch.autograd.grad(x.sum(), (eps, loc))
    # The pixel is at the edge of a component, where the density is as small as the dtype resolves, not underflowed.
    assert x.abs().item() == pytest.approx(1, abs=0.05)
    assert 1 < by_eps.item() < 1 / torch.finfo(dtype).eps
    assert by_loc.sum().item() == pytest.approx(1)


def test_noise_far_out_is_finite_with_finite_gradients_in_float32(generator: torch.Generator) -> None:
    params = converted(random_params(generator, num_components=10, num=64, log_scale=-7.0), torch.float32)
    size = torch.tensor([[13.0, 40.0]]).expand(64, 3, 1, 2)
    eps = torch.where(torch.randn(size.shape, generator=generator) > 0, size, -size).requires_grad_()
    x = QuantileTransport(params)(eps)
    (by_eps,) = torch.autograd.grad(x.sum(), eps)
    assert x.isfinite().all() and by_eps.isfinite().all()
    torch.testing.assert_close(QuantileTransport(params).inv(x), eps, rtol=1e-4, atol=0)


# --- the continuous mixture --------------------------------------------------------------------------


def test_log_abs_det_jacobian_is_that_of_the_whole_jacobian(generator: torch.Generator) -> None:
    params = random_params(generator, num=1)
    transport = QuantileTransport(params)
    eps = normal_noise(params, generator)
    jacobian = torch.autograd.functional.jacobian(transport, eps).view(6, 6)
    sign, expected = torch.linalg.slogdet(jacobian)
    found = transport.log_abs_det_jacobian(eps, transport(eps))
    assert (sign.item(), found.item()) == (transport.sign, pytest.approx(expected.item(), abs=1e-9))
    # The Jacobian is not diagonal: what is checked is the coupling, too.
    assert (jacobian - jacobian.diag().diag()).abs().max() > 0.01


def test_the_transported_normal_has_the_mixture_density_and_its_gradient(generator: torch.Generator) -> None:
    raw = random_raw(generator, num_components=4, size=(3, 2)).requires_grad_()
    params = MixtureParams.from_raw(raw, 3, 4)
    mixture = logistic_mixture(params)
    assert (mixture.batch_shape, mixture.event_shape) == ((2,), (3, 3, 2))
    x = (0.5 * normal_noise(params, generator)).requires_grad_()
    found, expected = mixture.log_prob(x), params.log_density(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for by_law, by_density in zip(
        torch.autograd.grad(found.sum(), (x, raw), retain_graph=True),
        torch.autograd.grad(expected.sum(), (x, raw)),
        strict=True,
    ):
        torch.testing.assert_close(by_law, by_density, rtol=1e-8, atol=1e-8)
    other = MixtureParams.from_raw(raw.flip(0), 3, 4)
    assert (other.log_density(x) - expected).abs().min() > 0.1


def test_the_density_integrates_to_one() -> None:
    params = one_pixel([0.2, 0.5, 0.3], [-1.0, 0.1, 0.6], [-3.0, -1.0, 0.0])
    grid = torch.linspace(-40, 40, 400001, dtype=torch.float64)
    density = params.log_density(grid.view(-1, 1, 1, 1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)
    heavy = dataclasses.replace(params, log_weights=params.log_weights + 0.01)
    density = heavy.log_density(grid.view(-1, 1, 1, 1)).exp()
    assert torch.trapezoid(density, grid).item() != pytest.approx(1, abs=1e-3)


def is_standard_normal(eps: Tensor) -> bool:
    """Test moments and cross-moments within 5 standard errors, and each channel by Kolmogorov and Smirnov."""
    num = len(eps)
    statistics = [(eps, 1.0), (eps**2 - 1, 2.0), (eps**3, 15.0), (eps**4 - 3, 96.0)]
    pairs = list(itertools.combinations(range(eps.shape[1]), 2))
    statistics += [(eps[:, [i]] * eps[:, [j]], 1.0) for i, j in pairs]
    statistics += [((eps[:, [i]] ** 2 - 1) * (eps[:, [j]] ** 2 - 1), 4.0) for i, j in pairs]
    are_moments = all((value.mean(0).abs() <= 5 * math.sqrt(variance / num)).all() for value, variance in statistics)
    cdf = torch.special.ndtr(eps.sort(0).values)
    ranks = torch.arange(num, dtype=eps.dtype).unsqueeze(1)
    distance = torch.maximum((cdf - ranks / num).abs(), (cdf - (ranks + 1) / num).abs()).max().item()
    # 2.7 / sqrt(num) is exceeded with probability 2 exp(-2 * 2.7**2) = 1e-6.
    return are_moments and distance < 2.7 / math.sqrt(num)


def test_noise_of_independent_draws_is_standard_normal(generator: torch.Generator) -> None:
    params = random_params(generator, num_components=4, num=1, size=(1, 1), log_scale=-2.0)
    x = ancestral_sample(params, 20_000, generator)
    assert is_standard_normal(QuantileTransport(params).inv(x).flatten(1))
    other = dataclasses.replace(params, coefs=0.8 * params.coefs)
    assert not is_standard_normal(QuantileTransport(other).inv(x).flatten(1))
    assert not is_standard_normal(x.flatten(1))


def test_pyro_samples_and_scores_the_law(generator: torch.Generator, seed: int) -> None:
    params = random_params(generator)

    def model() -> Tensor:
        with pyro.plate("data", 2):
            x: Tensor = pyro.sample("x", logistic_mixture(params))
            return x

    with global_rng(seed):
        trace = pyro.poutine.trace(model).get_trace()
        draws = logistic_mixture(params).sample(torch.Size((5,)))
    x = trace.nodes["x"]["value"]
    assert isinstance(x, Tensor)
    torch.testing.assert_close(trace.log_prob_sum(), params.log_density(x).sum())
    assert params.log_density(draws).shape == (5, 2)


def test_transports_are_equal_when_their_parameters_are(generator: torch.Generator) -> None:
    params = random_params(generator)
    transport = QuantileTransport(params)
    assert transport == QuantileTransport(converted(params, torch.float64))
    assert transport != QuantileTransport(dataclasses.replace(params, loc=params.loc + 1))
    assert transport != torch.distributions.AffineTransform(0.0, 1.0)
    cached = transport.with_cache()
    eps = normal_noise(params, generator)
    assert cached.inv(cached(eps)) is eps
    assert transport.inv(transport(eps)) is not eps


# --- the discretised mixture -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("log_scale", [-9.0, -3.0, 2.0])
def test_probabilities_of_the_levels_sum_to_one(
    generator: torch.Generator, dtype: torch.dtype, tolerance: float, log_scale: float
) -> None:
    params = converted(random_params(generator, 1, 5, 8, (1, 1), log_scale), dtype)
    k = torch.arange(256).view(-1, 1, 1, 1, 1)
    probs = DiscretizedLogisticMixture(params, 256).log_prob_levels(k).exp()
    assert probs.shape == (256, 8)
    torch.testing.assert_close(probs.sum(0), torch.ones(8, dtype=dtype), rtol=0, atol=tolerance)


def all_colours(levels: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(levels)] * 3).view(-1, 1, 3, 1, 1)


def test_probabilities_of_all_colours_sum_to_one(generator: torch.Generator) -> None:
    params = random_params(generator, num=3, size=(1, 1))
    probs = DiscretizedLogisticMixture(params, 4).log_prob_levels(all_colours(4)).exp()
    torch.testing.assert_close(probs.sum(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    # The continuous density at the centres, which the official code falls back on, does not.
    density = params.log_density((2 * all_colours(4) - 3) / 4.0).exp() / 8
    assert (density.sum(0) - 1).abs().min() > 0.01


def test_a_colour_has_the_mass_of_its_cells_given_the_centres(generator: torch.Generator) -> None:
    params = random_params(generator, num=1, size=(1, 1))
    w, (m, s), (a, b, c) = params.log_weights[0].exp(), (params.loc[0], params.log_scale[0].exp()), params.coefs[0]
    y = (2.0 * torch.tensor([1, 2, 1], dtype=torch.float64) - 3) / 4
    expected = w
    for mean, scale, centre in zip((m[0], m[1] + a * y[0], m[2] + b * y[0] + c * y[1]), s, y, strict=True):
        expected = expected * (((centre + 0.25 - mean) / scale).sigmoid() - ((centre - 0.25 - mean) / scale).sigmoid())
    found = DiscretizedLogisticMixture(params, 4).log_prob_levels(torch.tensor([1, 2, 1]).view(1, 3, 1, 1))
    torch.testing.assert_close(found, expected.sum().log().view(1), rtol=1e-12, atol=0)


def test_a_grey_level_has_the_mass_of_its_cell_with_the_tails_in_the_outermost(generator: torch.Generator) -> None:
    params = random_params(generator, 1, 4, 1, (1, 1), -2.0)
    edges = torch.arange(17, dtype=torch.float64) / 8 - 1
    cdf = torch.special.ndtr(QuantileTransport(params).inv(edges.view(-1, 1, 1, 1)).flatten())
    inside = cdf.diff()
    folded = torch.cat([cdf[1:2], inside[1:-1], 1 - cdf[-2:-1]])
    k = torch.arange(16).view(-1, 1, 1, 1)
    probs = DiscretizedLogisticMixture(params, 16).log_prob_levels(k).exp()
    torch.testing.assert_close(probs, folded, rtol=1e-10, atol=1e-12)
    assert (probs - inside)[[0, -1]].min() > 1e-6


def test_the_density_is_constant_over_cells_and_counts_their_width(generator: torch.Generator) -> None:
    params = random_params(generator, num=2, size=(3, 2))
    mixture = DiscretizedLogisticMixture(params, 8)
    assert (mixture.batch_shape, mixture.event_shape) == ((2,), (3, 3, 2))
    k = torch.randint(8, (2, 3, 3, 2), generator=generator)
    u = torch.rand(k.shape, generator=generator, dtype=torch.float64)
    y = 2 * (k + u) / 8 - 1
    torch.testing.assert_close(mixture.log_prob(y) + 18 * math.log(2 / 8), mixture.log_prob_levels(k))
    assert (params.log_density(y) - params.log_density((2 * k + 1) / 8.0 - 1)).abs().min() > 1e-3
    corners = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 3, 2)
    outermost = torch.tensor([0, 7]).view(2, 1, 1, 1).expand(2, 3, 3, 2)
    torch.testing.assert_close(mixture.log_prob(corners) + 18 * math.log(2 / 8), mixture.log_prob_levels(outermost))


def test_the_density_has_finite_gradients_in_the_tails_in_float32(generator: torch.Generator) -> None:
    raw = random_raw(generator, 1, 3, 2, (1, 1), -8.0).float().requires_grad_()
    mixture = DiscretizedLogisticMixture(MixtureParams.from_raw(raw, 1, 3), 256)
    log_probs = mixture.log_prob_levels(torch.arange(256).view(-1, 1, 1, 1, 1))
    (by_raw,) = torch.autograd.grad(log_probs.sum(), raw)
    assert log_probs.isfinite().all() and by_raw.isfinite().all()
    assert log_probs.min() < -200


def test_sampled_colours_have_the_probabilities_of_the_levels(generator: torch.Generator, seed: int) -> None:
    params = random_params(generator, num=2, size=(1, 1), log_scale=-1.0)
    mixture = DiscretizedLogisticMixture(params, 4)
    with global_rng(seed):
        draws = mixture.sample((20_000,))
    assert draws.shape == (20_000, 2, 3, 1, 1)
    assert set(draws.flatten().tolist()) <= {-0.75, -0.25, 0.25, 0.75}
    red, green, blue = ((4 * draws + 3) / 2).long().flatten(2).unbind(-1)
    counts = torch.stack([torch.bincount(row, minlength=64) for row in (16 * red + 4 * green + blue).T], 1)
    expected = 20_000 * mixture.log_prob_levels(all_colours(4)).exp()

    def chi_squared(expected: Tensor) -> Tensor:
        return ((counts - expected).square() / expected).sum(0)

    # Mean 63, variance 2 * 63 plus the sum of 1 / expected of cells hardly ever drawn.
    bound = 63 + 5 * (2 * 63 + (1 / expected).sum(0)).sqrt()
    assert (chi_squared(expected) < bound).all()
    assert (chi_squared(expected.flip(1)) > bound).all()


@pytest.mark.parametrize("bad", [1.5, -1.001, math.nan])
def test_pixels_out_of_range_are_refused_in_one_sentence(generator: torch.Generator, bad: float) -> None:
    params = random_params(generator)
    y = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    y[1, 2, 0, 1] = bad
    with pytest.raises(
        ValueError, match=rf"expected pixels in \[-1, 1\], got 1 of 12 outside, the first of them {bad}"
    ):
        DiscretizedLogisticMixture(params, 256, validate_args=True).log_prob(y)
    assert DiscretizedLogisticMixture(params, 256, validate_args=False).log_prob(y).shape == (2,)
