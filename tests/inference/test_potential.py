"""The potential that the kernels sample is minus the log density of the decentred Pyro program."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference import sampling
from ppl_vaebm.inference.kernels.base import Kernel, Potential, init_params
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.inference.kernels.registry import build_kernel
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import sample_by_chains
from ppl_vaebm.models import saved_bytes as models_saved_bytes
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.saved_bytes import bytes_per_row, saved_bytes
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from tests.small_models import (
    FEW,
    QUANTILE_NVAES,
    SHIPPED,
    QuadraticEnergy,
    ZeroEnergy,
    linear_vae,
    shipped_vae,
    shipped_vaebm,
    sites_of,
)

EVERY_VAE = SHIPPED | QUANTILE_NVAES
SITES = {"a": torch.Size([2]), "b": torch.Size([1, 2, 2])}


def test_packing_lays_sites_side_by_side_in_their_order() -> None:
    packing = Packing(SITES)
    position = torch.arange(12.0).reshape(2, 6)
    sites = packing.unravel(position)
    assert packing.dim == 6
    assert sites["a"].tolist() == [[0.0, 1.0], [6.0, 7.0]]
    assert sites["b"].tolist() == [[[[2.0, 3.0], [4.0, 5.0]]], [[[8.0, 9.0], [10.0, 11.0]]]]
    assert torch.equal(packing.ravel(sites), position)
    assert torch.equal(packing.ravel(dict(reversed(sites.items()))), position)


def test_packing_gives_the_mean_square_of_each_site() -> None:
    mean_square = Packing(SITES).mean_square(torch.tensor([[1.0, 7.0, 1.0, 1.0, 3.0, 5.0]]))
    assert {name: value.tolist() for name, value in mean_square.items()} == {"a": [25.0], "b": [9.0]}


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (6,), (1, 2, 6)])
def test_packing_refuses_positions_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected positions of shape \(chains, 6\), got \("):
        Packing(SITES).unravel(torch.zeros(shape))


class Evaluated(NamedTuple):
    """A function of noise and its gradient, row by row."""

    value: Tensor
    grad: Tensor


def row_log_prob(trace: poutine.Trace) -> Tensor:
    """Sum a trace's log densities over sites, ``(n,)``."""
    trace.compute_log_prob()
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and not site_is_subsample(node)]
    return torch.stack([node["log_prob"] for node in nodes]).sum(0)


def decentred_program(vaebm: VAEBM, position: Tensor, with_factor: bool = True) -> Evaluated:
    """Evaluate minus the log density of the program whose sites Pyro made noises."""
    noises = Packing(vaebm.vae.noise_shapes).unravel(position)
    sites = [name.removeprefix("eps_") for name in noises]
    config: dict[str, Reparam] = {site: LocScaleReparam(0.0) for site in sites}
    data = {f"{site}_decentered": noise for site, noise in zip(sites, noises.values(), strict=True)}
    if isinstance(vaebm.vae.decode_noise(noises)[0].distribution(), TransformedDistribution):
        config["x"], data["x_base"] = TransformReparam(), data.pop("x_decentered")
    conditioned = poutine.condition(poutine.reparam(vaebm, config=config), data=data)
    hidden = poutine.block(conditioned, hide=[] if with_factor else ["energy"])
    value = -row_log_prob(poutine.trace(hidden).get_trace(num=len(position)))
    return Evaluated(value, torch.autograd.grad(value.sum(), position)[0])


def official_potential(potential: NoisePotential) -> Potential:
    """The official code's potential (NVlabs/VAEBM), relative to N(0, I).

    It is ``E(x) - log p(z) - log p(x | z)`` at the transported point, without the Jacobian of the transport.
    """
    vae = potential.vaebm.vae

    def phi(position: Tensor) -> Tensor:
        x, z = vae.transport(potential.packing.unravel(position))
        log_p = row_log_prob(poutine.trace(poutine.condition(vae.model, data=z)).get_trace(x, is_discretized=False))
        return potential.vaebm.energy(x, z) - log_p - 0.5 * position.square().sum(-1)

    return phi


def evaluated(potential: Potential, position: Tensor) -> Evaluated:
    value = potential(position) + 0.5 * position.square().sum(-1)
    return Evaluated(value, torch.autograd.grad(value.sum(), position)[0])


def spread(one: Evaluated, other: Evaluated) -> tuple[float, float]:
    """Return how far two functions are from one constant apart: range of the values' gap, largest gradient gap."""
    gap = (one.value - other.value).detach()
    return float(gap.max() - gap.min()), float((one.grad - other.grad).abs().max())


def positions(potential: NoisePotential, num: int = 6) -> Tensor:
    return potential.draw_reference(stream(1, "positions"), num).requires_grad_()


@pytest.mark.parametrize("name", EVERY_VAE)
def test_the_potential_is_minus_the_log_density_of_the_decentred_program(name: str) -> None:
    vaebm = shipped_vaebm(name)
    potential = noise_potential(vaebm)
    position = positions(potential)
    ours, program = evaluated(potential, position), decentred_program(vaebm, position)
    value_spread, grad_spread = spread(ours, program)
    assert value_spread < 1e-10 and grad_spread < 1e-10
    # The one constant is that of the Gaussian.
    constant = float((program.value - ours.value).detach().mean())
    assert constant == pytest.approx(potential.packing.dim * math.log(2 * math.pi) / 2)
    # Negative control: without its factor the program is another.
    value_spread, grad_spread = spread(ours, decentred_program(vaebm, position, with_factor=False))
    assert value_spread > 1e-2 and grad_spread > 1e-4


def log_slopes(potential: NoisePotential, position: Tensor) -> Tensor:
    """Return the log of the transport's Jacobian, ``(C,)``: the slopes of every value by its own noise."""
    eps = potential.packing.unravel(position.detach())
    for noise in eps.values():
        noise.requires_grad_()
    x, z = potential.vaebm.vae.transport(eps)
    total = torch.zeros(len(position), dtype=position.dtype)
    for site, value in {**z, "x": x}.items():
        for channel in range(value.shape[1]):  # one at a time: within a pixel, x has a triangle
            grad = torch.autograd.grad(value[:, channel].sum(), eps[f"eps_{site}"], retain_graph=True)[0]
            total += grad[:, channel].reshape(len(position), -1).log().sum(1)
    return total


@pytest.mark.parametrize("name", EVERY_VAE)
def test_the_official_potential_differs_by_the_log_scales(name: str) -> None:
    vaebm = shipped_vaebm(name)
    potential = noise_potential(vaebm)
    position = positions(potential)
    ours, official = evaluated(potential, position), evaluated(official_potential(potential), position)
    log_scales = log_slopes(potential, position)
    constant = potential.packing.dim * math.log(2 * math.pi) / 2
    torch.testing.assert_close((official.value - ours.value).detach(), log_scales + constant)
    value_spread, grad_spread = spread(ours, official)
    if "1 groups, global" in name:  # the only scale is one number: what is left out is a constant
        assert value_spread < 1e-9 and grad_spread < 1e-9
    else:
        assert value_spread > 0.1 and grad_spread > 1e-2


class EnergyOfLatents(Energy):
    """An energy of x and of the first latent group."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        assert z is not None
        return x.flatten(1).square().mean(1) * z["z_1"].sum(1).cos()


@pytest.mark.parametrize("name", FEW)
def test_an_energy_may_read_the_latents_too(name: str) -> None:
    vaebm = VAEBM(shipped_vae(name), EnergyOfLatents())
    potential = noise_potential(vaebm)
    position = positions(potential)
    value_spread, grad_spread = spread(evaluated(potential, position), decentred_program(vaebm, position))
    assert value_spread < 1e-10 and grad_spread < 1e-10


def test_a_vae_in_training_mode_is_refused() -> None:
    vaebm = shipped_vaebm(FEW[0])
    with pytest.raises(ValueError, match=r"training mode.*call vaebm.eval\(\)"):
        noise_potential(vaebm.train())
    assert noise_potential(vaebm.eval()).packing.shapes == vaebm.vae.noise_shapes


@pytest.mark.parametrize("name", FEW)
def test_decoding_is_the_transport_and_takes_no_gradient(name: str) -> None:
    potential = noise_potential(shipped_vaebm(name))
    position = positions(potential)
    decoded = potential.decode(position)
    expected, z = potential.vaebm.vae.transport(potential.packing.unravel(position))
    assert torch.equal(decoded, expected) and not decoded.requires_grad
    torch.testing.assert_close(potential(position), potential.vaebm.energy(expected, z))


def test_reference_draws_are_standard_normal_in_the_models_dtype(generator: torch.Generator) -> None:
    potential = noise_potential(shipped_vaebm(FEW[1]))
    draws = potential.draw_reference(generator, 5_000)
    assert draws.dtype == torch.float64 and draws.shape == (5_000, potential.packing.dim)
    assert draws.mean(0).abs().max() < 5 / math.sqrt(5_000)
    assert (draws.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 5_000)
    potential.vaebm.float()
    assert potential.draw_reference(generator, 2).dtype == torch.float32
    again = [potential.draw_reference(stream(0, "again"), 3) for _ in range(2)]
    assert torch.equal(*again)


KERNELS = {
    "mala": KernelConfig("mala"),
    "mala leapfrog": KernelConfig("mala", integrator="leapfrog"),
    "hmc": KernelConfig("hmc", num_steps=3),
    "hmc leapfrog": KernelConfig("hmc", num_steps=3, integrator="leapfrog"),
    "pcn": KernelConfig("pcn"),
    "independence": KernelConfig("independence"),
    "elliptical": KernelConfig("elliptical"),
    "mixture": KernelConfig("mixture", members=("independence", "hmc"), num_steps=2),
}
EVERY = list(KERNELS)


def new_kernel(name: str, potential: Potential) -> Kernel:
    return build_kernel(KERNELS[name], potential)


def hierarchy_without_energy() -> NoisePotential:
    """Phi of a VAE whose scales depend strongly on the groups above, with E = 0."""
    return noise_potential(VAEBM(shipped_vae("vector, 3 groups, local scale", gain=2.0), ZeroEnergy()))


def worst_error(potential: NoisePotential, kernel: Kernel, step_size: float, num_steps: int, num_chains: int) -> float:
    """Start chains in N(0, I), and return the worst error of a site's mean square, in standard errors."""
    generator = stream(0, "stationarity", kernel.name, str(step_size))
    start = potential.draw_reference(generator, num_chains)
    state, params = kernel.init(start), init_params(start, step_size)
    for _ in range(num_steps):
        state, _ = kernel.step(generator, state, params)
    errors = [
        abs(float(value.mean()) - 1) / math.sqrt(2 / (num_chains * potential.packing.sizes[name]))
        for name, value in potential.packing.mean_square(state.position).items()
    ]
    return max(errors)


def test_the_hierarchy_has_scales_that_vary() -> None:
    vae = hierarchy_without_energy().vaebm.vae
    potential = hierarchy_without_energy()
    with torch.no_grad():
        x, z = vae.transport(potential.packing.unravel(positions(potential, 1_000)))
        trace = poutine.trace(poutine.condition(vae.model, data=z)).get_trace(x)
    for site in ("z_2", "z_3", "x"):
        assert sites_of(trace)[site]["fn"].base_dist.scale.log().std(0).min() > 0.2, site


@pytest.mark.parametrize("name", EVERY)
def test_without_an_energy_the_noise_stays_standard_normal(name: str) -> None:
    potential = hierarchy_without_energy()
    for step_size in (0.1, 0.7, 1.5):
        assert worst_error(potential, new_kernel(name, potential), step_size, num_steps=10, num_chains=1_000) < 4


@pytest.mark.parametrize("name", ["hmc", "pcn", "elliptical"])  # by gradients, by proposals, by slices
def test_under_the_official_potential_it_does_not(name: str) -> None:
    """Negative control: the same chains, with the Jacobian left out."""
    potential = hierarchy_without_energy()
    kernel = new_kernel(name, official_potential(potential))
    assert worst_error(potential, kernel, 0.4, num_steps=30, num_chains=1_000) > 8


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.1, 0.7, 1.5])
@pytest.mark.parametrize("name", EVERY)
def test_it_stays_so_for_a_thousand_steps(name: str, step_size: float) -> None:
    potential = hierarchy_without_energy()
    assert worst_error(potential, new_kernel(name, potential), step_size, num_steps=1_000, num_chains=500) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hmc", "mala"])
def test_under_the_official_potential_it_has_not_after_a_thousand_steps(name: str) -> None:
    potential = hierarchy_without_energy()
    kernel = new_kernel(name, official_potential(potential))
    assert worst_error(potential, kernel, 0.4, num_steps=1_000, num_chains=500) > 8


MEMORY_CASES = ["vector, 2 groups, a scale for every sample", "image (1, 8, 8), 3 groups, local scale"]


@pytest.mark.parametrize("name", [*MEMORY_CASES, "nvae, 2 scales of 2 groups, normal"])
def test_the_bytes_per_row_are_those_that_many_rows_save(name: str) -> None:
    vaebm, num = shipped_vaebm(name), 50
    potential = noise_potential(vaebm)
    position = positions(potential, num)
    expected = saved_bytes(vaebm, lambda: potential(position)) / num
    assert bytes_per_row(vaebm, potential, position[:1]) == pytest.approx(expected, rel=0.1)
    assert expected > 8 * potential.packing.dim  # float64 noise alone


def test_half_of_the_free_memory_bounds_the_rows_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    vaebm = shipped_vaebm(MEMORY_CASES[0])
    per_row = bytes_per_row(vaebm, noise_potential(vaebm), positions(noise_potential(vaebm), 1))
    for free, expected in ((20 * per_row, 10), (per_row, 1)):
        monkeypatch.setattr(models_saved_bytes, "free_bytes", lambda device, free=free: free)
        assert noise_potential(vaebm).rows_per_pass == expected


@pytest.mark.parametrize("kernel", ["mala", "mixture", "tempered"])
def test_free_memory_decides_passes_but_no_draw(kernel: KernelName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, for a model without products of matrices, which round otherwise with fewer rows."""
    vaebm, most = VAEBM(linear_vae(), QuadraticEnergy(0.6, 0.5)), [0]
    plain = NoisePotential.__call__

    def recorded(self: NoisePotential, position: Tensor) -> Tensor:
        most[0] = max(most[0], len(position))
        return plain(self, position)

    monkeypatch.setattr(NoisePotential, "__call__", recorded)
    monkeypatch.setattr(sampling, "BLOCK", 30)
    found, passes = [], []
    per_row = bytes_per_row(vaebm, noise_potential(vaebm), positions(noise_potential(vaebm), 1))
    for free in (1 << 40, 14 * per_row):
        monkeypatch.setattr(models_saved_bytes, "free_bytes", lambda device, free=free: free)
        most[0] = 0
        found.append(sample_by_chains(noise_potential(vaebm), KernelConfig(kernel), num=40, steps=[0, 3], seed=0))
        passes.append(most[0])
    assert passes[0] >= 30 and passes[1] == 7
    assert all(torch.equal(found[0].positions[step], found[1].positions[step]) for step in (0, 3))


def test_energies_are_computed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    noise_potential(VAEBM(linear_vae(), ZeroEnergy()))
    assert not torch.backends.cudnn.allow_tf32
