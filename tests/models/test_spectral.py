"""The penalties on spectral norms and on gains are the sums that they stand for; the bound on norms holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import EnergyConfig
from ppl_vaebm.inference.optim import AveragedWeights
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.layers import SpectralPenalty, norm_gain_penalty, spectral_layers
from ppl_vaebm.models.nvae_cells import BatchNorm2d, Conv2d
from ppl_vaebm.rng import global_rng
from tests.small_models import shipped_vae, shipped_vaebm

Layer = nn.Linear | nn.Conv2d


def energy_of(name: str) -> Energy:
    return shipped_vaebm(name).energy


NETS: dict[str, Callable[[], nn.Module]] = {
    "vector energy": lambda: energy_of("vector, 1 groups, global scale"),
    "image energy": lambda: energy_of("image (3, 32, 32), 2 groups, global scale"),
    "nvae": lambda: shipped_vae("nvae, 2 scales of 2 groups, normal"),
    "nvae with flows": lambda: shipped_vae("nvae, flows, logistic mixture"),
}


def layers_of(name: str) -> list[Layer]:
    return spectral_layers(NETS[name](), has_linear="energy" in name)


def penalty_on(layers: list[Layer]) -> SpectralPenalty:
    with global_rng(3):
        return SpectralPenalty(layers)


def matrix_of(layer: Layer) -> Tensor:
    """Write out the matrix that a layer counts as: after its mask and its weight normalisation."""
    if not isinstance(layer, Conv2d):
        return layer.weight.flatten(1)
    v = (layer.weight if layer.mask is None else layer.weight * layer.mask).flatten(1)
    if layer.log_gain is None:
        return v
    return layer.log_gain.exp()[:, None] * v / (v.square().sum(1, keepdim=True).sqrt() + 1e-5)


def largest(layer: Layer) -> Tensor:
    return torch.linalg.svdvals(matrix_of(layer))[0]


def vectors(penalty: SpectralPenalty) -> list[tuple[Layer, Tensor]]:
    """Return every layer with its vector, a view of the buffer."""
    return [
        (layer, u)
        for index, group in enumerate(penalty._groups)
        for layer, u in zip(group, penalty.get_buffer(f"u_{index}"), strict=True)
    ]


def settle(penalty: SpectralPenalty) -> None:
    """Put in the singular vectors that the iterations lead to."""
    for layer, u in vectors(penalty):
        u.copy_(torch.linalg.svd(matrix_of(layer).detach()).U[:, :1])


@pytest.mark.parametrize("name", NETS)
def test_the_penalty_becomes_the_sum_of_spectral_norms(name: str) -> None:
    layers = layers_of(name)
    penalty = penalty_on(layers)
    total = math.fsum(float(largest(layer).detach()) for layer in layers)
    first = penalty().item()
    for _ in range(50):
        value = penalty()
    assert first < total * (1 - 1e-9)  # power iteration comes from below: one call is not enough, and calls go on
    assert value.item() == pytest.approx(total, rel=1e-3)
    assert value.item() <= total * (1 + 1e-12)
    settle(penalty)
    assert penalty().item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("name", ["nvae", "nvae with flows"])
def test_weight_norm_and_masks_count(name: str) -> None:
    """Negative control: the sums of the raw weights are others."""
    layers = layers_of(name)
    total = sum(float(largest(layer).detach()) for layer in layers)
    raw = sum(float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]) for layer in layers)
    assert abs(raw - total) > 0.1
    masked = [layer for layer in layers if isinstance(layer, Conv2d) and layer.mask is not None]
    assert bool(masked) == ("flows" in name)
    for layer in masked:
        if layer.log_gain is None:
            assert torch.linalg.svdvals(layer.weight.detach().flatten(1))[0] > largest(layer) + 1e-3


@pytest.mark.parametrize("name", NETS)
def test_layers_in_one_product_are_as_one_by_one(name: str) -> None:
    layers = layers_of(name)
    together = penalty_on(layers)
    apart = [penalty_on([layer]) for layer, _ in vectors(together)]
    assert (len(together._groups) < len(layers)) == (name != "image energy")
    for single, (_, u) in zip(apart, vectors(together), strict=True):
        single.get_buffer("u_0").copy_(u[None])
    for _ in range(3):
        value = together()
        assert value.item() == pytest.approx(sum(single().item() for single in apart), rel=1e-12)
    # Negative control: from other vectors it is another sum.
    with global_rng(4):
        other = SpectralPenalty(layers)
    assert other().item() != pytest.approx(penalty_on(layers)().item(), rel=1e-12)


def test_the_first_call_is_forty_power_iterations_and_every_other_four() -> None:
    with global_rng(0):
        net = nn.Linear(6, 5).double()
    penalty = penalty_on([net])
    square = net.weight.detach() @ net.weight.detach().T
    for num in (40, 4, 4):
        u = penalty.get_buffer("u_0")[0].clone()
        assert float(u.norm()) == pytest.approx(1)
        penalty()
        expected, other = torch.linalg.matrix_power(square, num) @ u, torch.linalg.matrix_power(square, 44 - num) @ u
        after = penalty.get_buffer("u_0")[0]
        torch.testing.assert_close(after, expected / expected.norm(), rtol=1e-9, atol=1e-12)
        if num == 40:  # negative control: afterwards the vectors move too little to tell
            assert (after - other / other.norm()).abs().max() > 1e-6


@pytest.mark.parametrize("name", NETS)
def test_its_gradient_is_that_of_the_norms(name: str) -> None:
    layers = layers_of(name)
    for layer in layers:
        layer.requires_grad_()
    penalty = penalty_on(layers)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]

    def grads(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)

    settle(penalty)
    expected = grads(torch.stack([largest(layer) for layer in layers]).sum())
    for grad, truth in zip(grads(penalty()), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-6, atol=1e-7)
    # Negative control: vectors that are not the singular ones give another.
    with global_rng(5):
        for _, u in vectors(penalty):
            u.copy_(nn.functional.normalize(torch.randn_like(u), dim=0))
    assert max(float((g - t).abs().max()) for g, t in zip(grads(penalty()), expected, strict=True)) > 1e-2


def test_the_gradient_of_one_norm_is_the_outer_product_of_its_singular_vectors() -> None:
    with global_rng(0):
        net = nn.Conv2d(2, 3, 3).double()
    penalty = penalty_on([net])
    settle(penalty)
    penalty().backward()
    u, _, vh = torch.linalg.svd(net.weight.detach().flatten(1))
    assert net.weight.grad is not None and net.bias is not None and net.bias.grad is None
    torch.testing.assert_close(net.weight.grad.flatten(1), torch.outer(u[:, 0], vh[0]))


def test_a_convolution_counts_as_its_matrix_of_patches() -> None:
    with global_rng(0):
        net = nn.Conv2d(2, 3, 3, bias=False).double()
    nn.init.ones_(net.weight)
    # A matrix of ones, (3, 18).
    assert penalty_on([net])().item() == pytest.approx(math.sqrt(3 * 18))


def test_a_depthwise_convolution_counts_as_one_row_per_channel() -> None:
    with global_rng(0):
        net = Conv2d(4, 4, 5, groups=4, weight_norm=False).double()
    settle(penalty := penalty_on([net]))
    assert penalty().item() == pytest.approx(float(torch.linalg.svdvals(net.weight.detach().reshape(4, 25))[0]))


def test_its_vectors_are_saved_and_go_on_where_they_were() -> None:
    layers = layers_of("nvae")
    one = penalty_on(layers)
    with global_rng(9):
        other = SpectralPenalty(layers)
    for _ in range(3):
        one()
    other.load_state_dict(one.state_dict())
    assert one().item() == other().item()
    assert not list(one.parameters())
    assert {buffer.dtype for name, buffer in one.named_buffers() if name != "num_calls"} == {torch.float64}


def test_without_layers_there_is_nothing_to_pay() -> None:
    assert SpectralPenalty([])().item() == 0
    assert norm_gain_penalty(nn.SiLU()).item() == 0


def test_the_layers_of_an_nvae_are_its_convolutions() -> None:
    vae = NETS["nvae with flows"]()
    convs, both = spectral_layers(vae, has_linear=False), spectral_layers(vae, has_linear=True)
    assert convs == [module for module in vae.modules() if isinstance(module, nn.Conv2d)]
    assert {type(layer) for layer in both} == {Conv2d, nn.Linear}
    assert len(both) > len(convs)


# --- the bound -----------------------------------------------------------------------------------


def bounded_energy(shape: tuple[int, ...] = (1, 8, 8)) -> Energy:
    with global_rng(0):
        return build_energy(EnergyConfig(width=16, channels=4, spectral_norm=True), torch.Size(shape)).double()


def hidden_norms(energy: Energy) -> Tensor:
    return torch.stack([torch.linalg.svdvals(layer.weight.detach().flatten(1))[0] for layer in energy.hidden_layers()])


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_a_bounded_layer_has_spectral_norm_one(shape: tuple[int, ...], generator: torch.Generator) -> None:
    energy = bounded_energy(shape)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    for _ in range(50):  # every backward pass is a few power iterations
        energy(x).sum().backward()
    norms = hidden_norms(energy)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=0)
    # Negative control: the weights that are divided have other norms, and so has the last layer.
    free = [p for name, p in energy.named_parameters() if name.endswith("original")]
    assert max(abs(float(torch.linalg.svdvals(p.detach().flatten(1))[0]) - 1) for p in free) > 0.05
    last = energy.last_layer()
    assert last is not None and abs(float(torch.linalg.svdvals(last.weight.detach())[0]) - 1) > 0.05


def test_the_bound_follows_the_weights_in_training(generator: torch.Generator) -> None:
    energy = bounded_energy()
    x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    rule = torch.optim.Adam(energy.parameters(), 0.003)
    for _ in range(50):
        rule.zero_grad()
        energy(x).mean().backward()
        rule.step()
    assert hidden_norms(energy).max() < 1.05
    unbounded = [p for name, p in energy.named_parameters() if name.endswith("original")]
    assert max(float(torch.linalg.svdvals(p.detach().flatten(1))[0]) for p in unbounded) > 1.5  # negative control


@pytest.mark.parametrize("is_training", [False, True])
def test_calls_and_derivatives_by_positions_leave_a_bounded_energy_as_it_is(
    is_training: bool, generator: torch.Generator
) -> None:
    energy = bounded_energy().train(is_training)
    x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    before = energy(x).detach()
    for _ in range(3):
        torch.autograd.grad(energy(x).sum(), x)
    assert torch.equal(energy(x), before)
    energy(x).sum().backward()
    assert not torch.equal(energy(x), before)  # the vectors moved, and nothing else


def test_by_pytorch_alone_calls_in_training_mode_are_of_different_functions(generator: torch.Generator) -> None:
    """Negative control of the test above."""
    with global_rng(0):
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 20).double())
    x = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))


def test_the_vectors_of_the_bound_are_saved_and_averaged(generator: torch.Generator) -> None:
    energy, x = bounded_energy(), torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    average = AveragedWeights(energy, 0.0)
    energy(x).sum().backward()
    average.update(energy)
    with global_rng(1):
        config = EnergyConfig(width=16, channels=4, spectral_norm=True)
        loaded = build_energy(config, torch.Size([1, 8, 8])).double()
    assert not torch.allclose(loaded(x), energy(x))
    loaded.load_state_dict(energy.state_dict())
    assert torch.equal(loaded(x), energy(x)) and torch.equal(average.module(x), energy(x))


# --- gains ---------------------------------------------------------------------------------------


def norm_with(*gains: float) -> BatchNorm2d:
    norm = BatchNorm2d(len(gains))
    norm.weight.data = torch.tensor(gains)
    return norm


def test_the_penalty_on_gains_is_the_largest_of_every_normalisation() -> None:
    net: Any = nn.Sequential(norm_with(0.5, -3.0), nn.SiLU(), norm_with(1.0, 2.0, 0.0), norm_with(0.25, 0.5))
    penalty = norm_gain_penalty(net)
    assert penalty.item() == 3.0 + 2.0 + 0.5
    penalty.backward()
    assert [net[index].weight.grad.tolist() for index in (0, 2, 3)] == [[0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 1.0]]
    assert net[2].bias.grad is None


def test_the_gains_of_an_nvae_all_count() -> None:
    vae = NETS["nvae"]()
    norms = [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]
    expected = sum(float(norm.weight.detach().abs().max()) for norm in norms)
    assert norm_gain_penalty(vae).item() == pytest.approx(expected, rel=1e-12)
    assert expected > len(norms)  # negative control: fresh gains are 1
