"""Posteriors in noise space: equal to the conditioned Pyro program, to closed forms and to quadrature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vaebm.config import KernelConfig, ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.conditioning import ConditionalPotential, ConditionalProgram, condition
from ppl_vaebm.inference.diagnostics.functionals import noise_functionals
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.likelihood import exact_draws
from ppl_vaebm.inference.observations import (
    ExactValues,
    NoisyValues,
    Observation,
    Operator,
    Transported,
    at_coordinates,
    average_pooling,
    gaussian_blur,
    values_at,
    whole,
)
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.decoders import Decoded, DecodedNormal
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vae import Choose, Generator, HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM, build_vae
from ppl_vaebm.rng import global_rng, stream
from tests.small_models import (
    FEW,
    NVAES,
    QUANTILE_NVAES,
    VARIANCE,
    LinearGenerator,
    LinearGuide,
    ZeroEnergy,
    draw_noise,
    linear_vae,
    nvae_options,
    shipped_vaebm,
    sites_of,
)

SOME = [*FEW, next(iter(NVAES)), *QUANTILE_NVAES]
LOCAL = "vector, 3 groups, local scale"


# --- the specification -----------------------------------------------------------------------------


def half(shape: torch.Size) -> Tensor:
    """Mask a part of x that is no rectangle and treats all channels alike."""
    grid = torch.arange(math.prod(shape[-2:]) if len(shape) == 3 else shape.numel())
    mask = (grid % 3 != 1) & (grid != grid.max())
    return mask.view(shape[-2:]).expand(shape).clone() if len(shape) == 3 else mask


def some_x(vaebm: VAEBM, num: int, seed: int = 7) -> Tensor:
    with torch.no_grad():
        x: Tensor = vaebm.vae.transport(draw_noise(vaebm.vae, num, seed))[0]
    return x


def observations(vaebm: VAEBM, num: int = 1) -> dict[str, Observation]:
    """Make one of every kind that fits the model."""
    x = some_x(vaebm, 3)[:num]
    mask = half(x.shape[1:])
    found: dict[str, Observation] = {
        "exact": ExactValues(x, mask),
        "noisy": NoisyValues(x, 0.3),
        "noisy at a mask": NoisyValues(x[:, mask], 0.2, values_at(mask)),
    }
    if x.dim() == 4:
        for name, operator in {"pooled": average_pooling(2), "blurred": gaussian_blur(0.8)}.items():
            found[name] = NoisyValues(operator(x), 0.1, operator)
    return found


class Evaluated(NamedTuple):
    value: Tensor
    grad: Tensor


def row_log_prob(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
    return torch.stack([site["log_prob"] for site in sites]).sum(0)


def decentred_program(potential: ConditionalPotential, position: Tensor, hidden: list[str] | None = None) -> Evaluated:
    """Evaluate minus the log density of the conditioned program whose free sites Pyro made noises."""
    noises = potential.packing.unravel(position)
    sites = [name.removeprefix("eps_") for name in noises]
    config: dict[str, Reparam] = {site: LocScaleReparam(0.0) for site in sites}
    data = {f"{site}_decentered": noise for site, noise in zip(sites, noises.values(), strict=True)}
    vae, x_site = potential.vaebm.vae, sites[-1]
    decoded = vae.decode_noise(noises)[0]
    if isinstance(decoded.distribution(), TransformedDistribution):
        config[x_site] = TransformReparam()
        base = data.pop(f"{x_site}_decentered")
        if isinstance(potential.observation, ExactValues):
            base = base.view(-1, *at_coordinates(decoded, potential.observation.free).distribution().event_shape)
        data[f"{x_site}_base"] = base
    program = ConditionalProgram(potential.vaebm, potential.observation)
    conditioned = poutine.condition(poutine.reparam(program, config=config), data=data)
    trace = poutine.trace(poutine.block(conditioned, hide=hidden or [])).get_trace(num=len(position))
    value = -row_log_prob(trace)
    return Evaluated(value, torch.autograd.grad(value.sum(), position)[0])


def evaluated(potential: ConditionalPotential, position: Tensor) -> Evaluated:
    value = potential(position) + 0.5 * position.square().sum(-1)
    return Evaluated(value, torch.autograd.grad(value.sum(), position)[0])


def spread(one: Evaluated, other: Evaluated) -> tuple[float, float]:
    """Return how far two functions are from one constant apart: range of the values' gap, largest gradient gap."""
    gap = (one.value - other.value).detach()
    # Relative, for a sharp likelihood of 3,072 pixels has values of 1e5 nats, whose own rounding is 1e-11.
    scale = max(1.0, float(one.value.detach().abs().max()))
    return float(gap.max() - gap.min()) / scale, float((one.grad - other.grad).abs().max()) / scale


@pytest.mark.parametrize("name", SOME)
def test_the_potential_is_minus_the_log_density_of_the_conditioned_program(name: str) -> None:
    vaebm = shipped_vaebm(name)
    for kind, observation in observations(vaebm).items():
        potential = ConditionalPotential(vaebm, observation)
        position = potential.draw_reference(stream(1, "positions"), 4).requires_grad_()
        ours = evaluated(potential, position)
        value_spread, grad_spread = spread(ours, decentred_program(potential, position))
        assert value_spread < 1e-10 and grad_spread < 1e-10, kind
        # Negative control: without what was observed the program is another.
        site = "x_observed" if kind == "exact" else "y"
        value_spread, grad_spread = spread(ours, decentred_program(potential, position, hidden=[site]))
        assert value_spread > 1e-3 and grad_spread > 1e-5, kind


@pytest.mark.parametrize("name", SOME)
def test_the_split_program_has_the_density_of_the_vaebm(name: str) -> None:
    """What ties the split program, and with it the potential, to the VAEBM itself."""
    vaebm = shipped_vaebm(name)
    eps = draw_noise(vaebm.vae, 3)
    with torch.no_grad():
        x, z = vaebm.vae.transport(eps)
        mask = half(x.shape[1:])
        observation = ExactValues(x, mask)
        free = x[:, ~mask]
        free = free.view(
            -1, *at_coordinates(vaebm.vae.decode_noise(eps)[0], observation.free).distribution().event_shape
        )
        program = poutine.condition(ConditionalProgram(vaebm, observation), data={**z, "x_free": free})
        split = poutine.trace(program).get_trace(num=len(x))
        whole_x = poutine.trace(poutine.condition(vaebm, data=z)).get_trace(x)
    torch.testing.assert_close(row_log_prob(split), row_log_prob(whole_x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sites_of(split)["_RETURN"]["value"], x)


def test_of_a_normal_the_loss_is_half_the_squared_noise_and_the_log_scale() -> None:
    vaebm = shipped_vaebm(LOCAL)
    vae = vaebm.vae
    x = some_x(vaebm, 5)
    potential = condition(vaebm, given=x, mask=torch.tensor([False, True]))
    position = potential.draw_reference(stream(2, "positions"), 5)
    decoded = vae.decode_noise(potential.packing.unravel(position))[0]
    normal = decoded.distribution().base_dist
    noise, scale = decoded.noise_of(x)[:, 1], normal.scale[:, 1]
    expected = vaebm.energy(potential.decode(position)) + 0.5 * noise.square() + scale.log()
    torch.testing.assert_close(potential(position), expected + 0.5 * math.log(2 * math.pi))
    assert scale.log().std() > 0.05  # so that it could not be left out
    assert torch.equal(potential.decode(position)[:, 1], x[:, 1])
    assert potential.packing.shapes["eps_x_free"] == torch.Size([1])


@pytest.mark.parametrize("name", FEW[1:3])
def test_several_observations_are_each_their_own(name: str) -> None:
    vaebm = shipped_vaebm(name)
    together, alone = observations(vaebm, 3), observations(vaebm, 1)
    x = some_x(vaebm, 3)
    for kind in together:
        several = ConditionalPotential(vaebm, together[kind])
        position = several.draw_reference(stream(3, "positions"), 6)
        first = ConditionalPotential(vaebm, alone[kind])
        torch.testing.assert_close(several(position)[:2], first(position[:2]))
        assert (several(position)[2:] - first(position[2:])).abs().min() > 1e-6
        with pytest.raises(ValueError, match="expected a multiple of 3 rows"):
            several(position[:4])
    mask = half(x.shape[1:])
    exact = condition(vaebm, given=x, mask=mask)
    decoded = exact.decode(exact.draw_reference(stream(4, "positions"), 6))
    assert torch.equal(decoded[:, mask], x[:, mask].repeat_interleave(2, 0))


# --- copies ----------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of the operations that run in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Of these each waits for the device, or copies to it or from it.
COPIES = {"nonzero", "_to_copy", "_local_scalar_dense", "is_nonzero"}


@pytest.mark.parametrize("name", SOME)
def test_an_observation_copies_nothing_between_devices_at_an_evaluation(name: str) -> None:
    vaebm = shipped_vaebm(name)
    for kind, observation in observations(vaebm).items():
        potential = ConditionalPotential(vaebm, observation)
        noises = potential.packing.unravel(potential.draw_reference(stream(5, "positions"), 2))
        with torch.no_grad(), pyro.validation_enabled(False):  # distributions read their arguments to check them
            observation.transport(vaebm.vae, noises)
            with Operations() as unconditioned:
                vaebm.vae.transport(draw_noise(vaebm.vae, 2))
            with Operations() as operations:
                observation.transport(vaebm.vae, noises)
        for copy in COPIES:
            assert operations.names.count(copy) <= unconditioned.names.count(copy), (kind, copy)


@pytest.mark.parametrize("operator", [values_at(torch.eye(6).bool().unsqueeze(0)), gaussian_blur(0.8)])
def test_an_operator_is_copied_to_a_device_once(operator: Operator) -> None:
    with Operations() as operations:
        for _ in range(3):
            operator(torch.zeros(2, 1, 6, 6, device="meta"))
    assert operations.names.count("_to_copy") == 1 and "nonzero" not in operations.names


# --- operators -------------------------------------------------------------------------------------


def test_a_blur_keeps_constants_and_has_its_standard_deviation() -> None:
    blur = gaussian_blur(1.5)
    assert torch.allclose(blur(torch.full((2, 3, 7, 9), 0.4)), torch.tensor(0.4))
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1.0
    spread_out = blur(point)[0, 0]
    offsets = torch.arange(41.0, dtype=torch.float64) - 20
    assert float(spread_out.sum()) == pytest.approx(1.0)
    for axis in (0, 1):
        # Cut off at 3 standard deviations or a little beyond it has lost 3 % of its variance at the most.
        assert float((spread_out.sum(axis) * offsets**2).sum()) == pytest.approx(1.5**2, rel=0.03)


def test_pooling_averages_squares() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert average_pooling(2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


# --- known posteriors ------------------------------------------------------------------------------

PRECISION = torch.tensor([[1.5, -0.9], [-0.9, 2.0]], dtype=torch.float64)
CENTRE = torch.tensor([0.4, -0.3], dtype=torch.float64)
SEEN = 1.8


class Coupled(Energy):
    """``E = (x - c)' P (x - c) / 2``: ties the coordinates, and leaves h a Gaussian."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 0.5 * torch.einsum("ni,ij,nj->n", x - CENTRE, PRECISION, x - CENTRE)


def gaussian_of_h(noise_sd: float | None) -> tuple[float, float]:
    """Mean and variance of x_2 under the Gaussian h, given x_1 or a noisy x_1."""
    precision = PRECISION + torch.eye(2, dtype=torch.float64) / VARIANCE
    shift = PRECISION @ CENTRE
    if noise_sd is None:
        return float((shift[1] - precision[1, 0] * SEEN) / precision[1, 1]), float(1 / precision[1, 1])
    likelihood = torch.tensor([1 / noise_sd**2, 0.0], dtype=torch.float64)
    covariance = torch.linalg.inv(precision + torch.diag(likelihood))
    return float((covariance @ (shift + likelihood * SEEN))[1]), float(covariance[1, 1])


FIRST = torch.tensor([True, False])


def seen(value: float) -> Tensor:
    return torch.tensor([value, math.nan], dtype=torch.float64)


@pytest.mark.parametrize("noise_sd", [None, 0.4])
@pytest.mark.parametrize("kernel", ["mala", "hmc", "elliptical"])
def test_every_kernel_finds_the_gaussian_posterior(kernel: str, noise_sd: float | None, seed: int) -> None:
    potential = condition(VAEBM(linear_vae(dim=2), Coupled()), given=seen(SEEN), mask=FIRST, noise_sd=noise_sd)
    num = 2_000
    start = potential.draw_reference(stream(seed, "start"), num)
    config = KernelConfig(kernel, num_steps=4)  # type: ignore[arg-type]
    functionals = noise_functionals(potential)
    chains = run_chains(
        build_kernel(config, potential),
        stream(seed, "chains"),
        start,
        init_params(start, 0.3),
        num_draws=1,
        num_warmup=30,
        functionals=functionals,
    )
    x_2 = chains.draws["x"][:, 0, 1]
    mean, variance = gaussian_of_h(noise_sd)
    assert abs(float(x_2.mean()) - mean) < 5 * math.sqrt(variance / num)
    assert abs(float(x_2.var()) / variance - 1) < 5 * math.sqrt(2 / num)
    unconditional = gaussian_of_h(1e6)  # negative control: the observation matters
    assert abs(float(x_2.mean()) - unconditional[0]) > 20 * math.sqrt(variance / num)


class Curved(Energy):
    """A smooth energy of both coordinates, bounded, which no decoder's Normal absorbs."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        return 1.5 * torch.sin(2 * x[:, 0] * x[:, 1] + x[:, 1])


class Quadrature(NamedTuple):
    """The posterior of x_2 on a grid."""

    grid: Tensor
    cdf: Tensor
    mean: float
    sd: float


class BentGenerator(Generator):
    """One latent, so that it can be integrated out on a grid, and scales that vary strongly with it."""

    def __init__(self) -> None:
        super().__init__()
        self.event_shape, self.latent_shapes = torch.Size([2]), {"z_1": torch.Size([1])}
        self.steepness = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        prior = self.first_prior(num)
        z = choose("z_1", prior, prior.loc)
        return {"z_1": z}, z

    def decode(self, state: Tensor) -> Decoded:
        loc = torch.cat([0.4 * state, (1.5 * state).sin()], 1)
        scale = torch.cat([0.15 + 0.8 * torch.sigmoid(self.steepness * state), 0.3 + 0.2 * state.cos()], 1)
        return DecodedNormal(loc, scale)


def bent_vaebm() -> VAEBM:
    generator = BentGenerator()
    guide = LinearGuide(LinearGenerator(1.0, 1.0, 1), 1.0, 1.0)  # not used
    return VAEBM(HierarchicalVAE(generator, guide), Curved())


def quadrature(vaebm: VAEBM, x_1: float, noise_sd: float | None) -> Quadrature:
    """Integrate the latent out, and x_1 too where it was observed with noise."""
    z = torch.linspace(-8, 8, 1_201, dtype=torch.float64)
    grid = torch.linspace(-8, 8, 1_001, dtype=torch.float64)
    line = torch.linspace(-6, 6, 301, dtype=torch.float64) if noise_sd else torch.tensor([x_1]).double()
    with torch.no_grad():
        normal = vaebm.vae.decode_noise({"eps_z_1": z.unsqueeze(1)})[0].distribution().base_dist
        given_z = [
            (-0.5 * ((values.unsqueeze(1) - normal.loc[:, i]) / normal.scale[:, i]).square()).exp() / normal.scale[:, i]
            for i, values in enumerate((line, grid))
        ]
        joint = (given_z[0] * (-0.5 * z.square()).exp()) @ given_z[1].T
        energy = vaebm.energy(torch.cartesian_prod(line, grid)).view_as(joint)
        likelihood = (-0.5 * ((x_1 - line) / noise_sd).square()).exp() if noise_sd else torch.ones_like(line)
        density = likelihood @ (joint * (-energy).exp())
    cdf = density.cumsum(0) / density.sum()
    mean = float((grid * density).sum() / density.sum())
    return Quadrature(grid, cdf, mean, math.sqrt(float((grid**2 * density).sum() / density.sum()) - mean**2))


def errors(x_2: Tensor, expected: Quadrature) -> tuple[float, float]:
    """Return errors of independent draws: of the mean in standard errors, and Kolmogorov's distance times root n."""
    z = abs(float(x_2.mean()) - expected.mean) / (expected.sd / math.sqrt(len(x_2)))
    ordered = x_2.sort().values
    found = torch.searchsorted(ordered, expected.grid, right=True) / len(x_2)
    # The sum over cells is the CDF at the upper edge of a cell, half a cell beyond its point.
    half_cell = 0.5 * expected.cdf.diff(prepend=expected.cdf.new_zeros(1))
    return z, float((found - (expected.cdf - half_cell)).abs().max()) * math.sqrt(len(x_2))


MAX_KOLMOGOROV = 2.0  # probability 7e-4 for independent draws


def kolmogorov(
    potential: ConditionalPotential, expected: Quadrature, seed: int, num: int = 4_000
) -> tuple[float, float]:
    draws = exact_draws(potential, stream(seed, "exact"), num)
    return errors(potential.decode(draws.position)[:, 1], expected)


@pytest.mark.parametrize("x_1", [-0.6, 0.5])
@pytest.mark.parametrize("noise_sd", [None, 0.3])
def test_the_posterior_is_that_of_quadrature(x_1: float, noise_sd: float | None, seed: int) -> None:
    vaebm = bent_vaebm()
    potential = condition(vaebm, given=seen(x_1), mask=FIRST, noise_sd=noise_sd)
    z, distance = kolmogorov(potential, quadrature(vaebm, x_1, noise_sd), seed)
    assert z < 5 and distance < MAX_KOLMOGOROV


class WithoutScale(ExactValues):
    """The likely mistake: observed values treated as transported ones, whose scale cancels."""

    def transport(self, vae: HierarchicalVAE, eps: Mapping[str, Tensor]) -> Transported:
        p_observed = at_coordinates(vae.decode_noise(eps)[0], self.observed).distribution()
        right = super().transport(vae, eps)
        return right._replace(loss=right.loss - p_observed.base_dist.scale.log().sum(1))


def test_without_the_log_scale_it_is_not(seed: int) -> None:
    """Negative control of quadrature, with the same number of draws."""
    vaebm = bent_vaebm()
    potential = ConditionalPotential(vaebm, WithoutScale(seen(0.5).unsqueeze(0), FIRST))
    z, distance = kolmogorov(potential, quadrature(vaebm, 0.5, None), seed)
    assert max(z / 5, distance / MAX_KOLMOGOROV) > 1.5


def test_chains_find_the_posterior_of_quadrature_too(seed: int) -> None:
    vaebm = bent_vaebm()
    potential = condition(vaebm, given=seen(0.5), mask=FIRST)
    kernel = build_kernel(KernelConfig("hmc", num_steps=5), potential)
    start = potential.draw_reference(stream(seed, "start"), 3_000)
    chains = run_chains(
        kernel,
        stream(seed, "chains"),
        start,
        init_params(start, 0.3),
        num_draws=1,
        num_warmup=60,
        functionals=noise_functionals(potential),
    )
    z, distance = errors(chains.draws["x"][:, 0, 1], quadrature(vaebm, 0.5, None))
    assert z < 5 and distance < MAX_KOLMOGOROV


def test_without_an_energy_and_with_much_noise_the_posterior_is_the_vae(seed: int) -> None:
    vaebm = VAEBM(linear_vae(dim=2), ZeroEnergy())
    potential = condition(vaebm, given=torch.zeros(2), noise_sd=1e5)
    position = potential.draw_reference(stream(seed, "position"), 100)
    assert potential(position).abs().max() < 1e-8
    assert torch.equal(potential.decode(position), noise_potential(vaebm).decode(position))


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"given": torch.zeros(2)}, "expected a mask of the values that were observed exactly"),
        ({"given": torch.zeros(2), "mask": torch.tensor([1, 0])}, "expected a boolean mask of shape"),
        ({"given": torch.zeros(2), "mask": torch.ones(3).bool()}, "expected a boolean mask of shape"),
        ({"given": torch.zeros(2), "mask": torch.ones(2).bool()}, "found everything observed"),
        ({"given": torch.zeros(2), "mask": torch.zeros(2).bool()}, "found nothing observed"),
        ({"given": torch.zeros(2), "mask": torch.zeros(2).bool(), "noise_sd": 1.0}, "found nothing observed"),
        ({"given": torch.zeros(2), "mask": torch.zeros(3).bool(), "noise_sd": 1.0}, "expected a boolean mask"),
        ({"given": torch.tensor([math.nan, 0.0]), "mask": FIRST}, "expected finite values where x is observed"),
        ({"given": torch.tensor([math.inf, 0.0]), "noise_sd": 1.0}, "expected finite values"),
        ({"given": torch.zeros(3), "mask": FIRST}, "expected something observed of shape (2,)"),
        ({"given": torch.zeros(1, 1, 2), "mask": FIRST}, "expected something observed of shape (2,)"),
        ({"given": torch.zeros(0, 2), "mask": FIRST}, "expected something observed of shape (2,)"),
        ({"given": torch.zeros(2), "noise_sd": 0.0}, "expected a standard deviation of the noise"),
        ({"given": torch.zeros(2), "noise_sd": math.nan}, "expected a standard deviation of the noise"),
        ({"given": torch.zeros(2), "mask": FIRST, "noise_sd": 0.1, "operator": whole}, "found both"),
        ({"given": torch.zeros(2), "operator": whole}, "expected a mask of the values"),
    ],
)
def test_bad_observations_are_refused(options: dict[str, Tensor], because: str) -> None:
    vaebm = VAEBM(linear_vae(dim=2), ZeroEnergy())
    with pytest.raises(InputError) as error:
        condition(vaebm, **options)  # type: ignore[arg-type]
    assert because in str(error.value)


def test_an_observation_of_another_model_is_refused() -> None:
    vaebm = VAEBM(linear_vae(dim=2), ZeroEnergy())
    three = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"expected x of shape \(2,\), found \(3,\)"):
        ConditionalPotential(vaebm, ExactValues(three, torch.tensor([True, False, False])))
    with pytest.raises(InputError, match=r"expected an observation of shape \(2,\)"):
        ConditionalPotential(vaebm, NoisyValues(three, 0.1))


def test_a_mixture_of_logistics_wants_whole_pixels() -> None:
    vaebm = shipped_vaebm("nvae, flows, logistic mixture")
    x = some_x(vaebm, 1)
    mask = half(x.shape[1:])
    mask[0] = ~mask[0]
    with pytest.raises(InputError, match="observed in all their channels or in none"):
        condition(vaebm, given=x, mask=mask)
    normal = shipped_vaebm(next(iter(NVAES)))  # whose channels are independent
    assert condition(normal, given=some_x(normal, 1), mask=mask).packing.dim < noise_potential(normal).packing.dim


def test_a_discrete_x_is_refused() -> None:
    options = {**nvae_options(groups_per_scale=1, decoder="bernoulli")}
    with global_rng(0):
        vae = build_vae(ModelConfig(**options), torch.Size([1, 8, 8]), 2).eval()
    mask = half(torch.Size([1, 8, 8]))
    with pytest.raises(InputError, match="found one of discrete values"):
        condition(VAEBM(vae, ZeroEnergy()), given=torch.ones(1, 8, 8), mask=mask)


def test_a_model_in_training_mode_is_refused() -> None:
    vaebm = VAEBM(linear_vae(dim=2), ZeroEnergy()).train()
    with pytest.raises(ValueError, match="training mode"):
        condition(vaebm, given=torch.zeros(2), mask=FIRST)
