"""The ELBO with a weight on its KL term."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vaebm.inference.elbo import BalancedELBO, balance_coefficients
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.rng import global_rng
from tests.small_models import (
    FEW,
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    VARIANCE,
    A,
    S,
    draw_noise,
    linear_vae,
    log_normal,
    shipped_vae,
    sites_of,
)

Program = Callable[..., Any]


def data_for(vae: HierarchicalVAE, num: int) -> Tensor:
    with torch.no_grad():
        return vae.transport(draw_noise(vae, num, seed=2))[0]


def annealed(kl_weight: float, **options: Any) -> BalancedELBO:
    elbo = BalancedELBO(**options)
    elbo.kl_weight = kl_weight
    return elbo


def loss_and_grads(
    elbo: TraceMeanField_ELBO, vae: HierarchicalVAE, x: Tensor, seed: int, num_walks: int = 1
) -> tuple[Tensor, list[Tensor]]:
    # A model that is not known to be the guide's own is traced apart.
    model: Program = vae.model if num_walks == 1 else partial(vae.model)
    with global_rng(seed):
        loss = elbo.differentiable_loss(model, vae.guide, x)
    grads = torch.autograd.grad(loss, [*vae.parameters()], allow_unused=True, materialize_grads=True)
    return loss.detach(), [*grads]


def terms(vae: HierarchicalVAE, x: Tensor, seed: int) -> tuple[float, dict[str, float]]:
    """Return log p(x | z) summed over rows, and the KL of every group by the formula for diagonal Normals."""
    with torch.no_grad(), global_rng(seed):
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    kl = {}
    for name in vae.model.latent_shapes:
        q, p = sites_of(guide)[name]["fn"].base_dist, sites_of(model)[name]["fn"].base_dist
        ratio = q.scale / p.scale
        kl[name] = float((0.5 * (ratio.square() + ((q.loc - p.loc) / p.scale).square() - 1) - ratio.log()).sum())
    return float(sites_of(model)["x"]["fn"].log_prob(x).sum()), kl


@pytest.mark.parametrize("name", FEW)
def test_with_weight_one_it_is_pyros_own_to_the_last_bit(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    x = data_for(vae, 4)
    expected, expected_grads = loss_and_grads(TraceMeanField_ELBO(), vae, x, seed)
    loss, grads = loss_and_grads(annealed(1.0), vae, x, seed, num_walks=2)
    assert torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected_grads, strict=True))
    # In one walk too, but for the order in which the gradients of the two programs are added.
    loss, grads = loss_and_grads(annealed(1.0), vae, x, seed)
    assert torch.equal(loss, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # Negative control: no other weight is.
    other, _ = loss_and_grads(annealed(0.999), vae, x, seed)
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", FEW)
def test_it_is_the_log_likelihood_minus_the_weighted_kl(name: str, kl_weight: float, seed: int) -> None:
    vae = shipped_vae(name)
    x = data_for(vae, 4)
    log_likelihood, kl = terms(vae, x, seed)
    elbo = annealed(kl_weight)
    loss, _ = loss_and_grads(elbo, vae, x, seed)
    assert float(loss) == pytest.approx(kl_weight * sum(kl.values()) - log_likelihood, rel=1e-12)
    with torch.no_grad(), global_rng(seed):
        assert elbo.loss(vae.model, vae.guide, x) == pytest.approx(float(loss), rel=1e-14)
    assert elbo.kl_nats == pytest.approx(kl, rel=1e-10)
    assert min(kl.values()) > 0.01


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_so_is_its_gradient(kl_weight: float, seed: int) -> None:
    vae = shipped_vae(FEW[1])
    x = data_for(vae, 4)
    with global_rng(seed):
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    kl = [kl_divergence(sites_of(guide)[name]["fn"], sites_of(model)[name]["fn"]) for name in vae.model.latent_shapes]
    loss = (kl_weight * torch.stack(kl).sum(0) - sites_of(model)["x"]["fn"].log_prob(x)).sum()
    expected = torch.autograd.grad(loss, [*vae.parameters()], allow_unused=True, materialize_grads=True)
    grads = loss_and_grads(annealed(kl_weight), vae, x, seed)[1]
    other_grads = loss_and_grads(annealed(1.0), vae, x, seed)[1]
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth)
    # Negative control: the plain ELBO has another.
    assert max(float((other - truth).abs().max()) for other, truth in zip(other_grads, expected, strict=True)) > 1


def test_it_follows_pyros_scales_and_masks(seed: int) -> None:
    vae = shipped_vae(FEW[1])
    x = data_for(vae, 4)
    with torch.no_grad(), global_rng(seed):
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    kl = [kl_divergence(sites_of(guide)[name]["fn"], sites_of(model)[name]["fn"]) for name in vae.model.latent_shapes]
    rows = 0.3 * torch.stack(kl).sum(0) - sites_of(model)["x"]["fn"].log_prob(x)

    def loss(handler: Callable[[Program], Program]) -> float:
        with torch.no_grad(), global_rng(seed):
            return annealed(0.3).loss(handler(vae.model), handler(vae.guide), x)

    total, mask = float(rows.sum()), torch.BoolTensor([True, False, False, True])
    assert loss(lambda program: program) == pytest.approx(total, rel=1e-10)
    assert loss(poutine.scale(scale=0.25)) == pytest.approx(0.25 * total, rel=1e-10)
    assert loss(lambda program: poutine.mask(program, mask=mask)) == pytest.approx(float(rows[mask].sum()), rel=1e-10)


def test_particles_are_averaged(seed: int) -> None:
    vae = linear_vae()
    x = data_for(vae, 3)
    with torch.no_grad(), global_rng(seed):
        both = annealed(0.4, num_particles=2).loss(vae.model, vae.guide, x)
    with torch.no_grad(), global_rng(seed):
        apart = [annealed(0.4).loss(vae.model, vae.guide, x) for _ in range(2)]
    assert apart[0] != apart[1]
    assert both == pytest.approx(sum(apart) / 2, rel=1e-12)


X = 0.9
"""A data point of the linear model."""


def mean_elbo(slope: float, spread: float, seed: int, num: int = 100_000) -> tuple[float, float]:
    """Estimate the linear model's ELBO at X with a guide; return it with its standard error, in closed form."""
    vae = linear_vae(slope, spread)
    x = torch.full((num, 1), X, dtype=torch.float64)
    with torch.no_grad(), global_rng(seed):
        elbo = -annealed(1.0).loss(vae.model, vae.guide, x) / num
    # log p(x | z) is -(r - A spread n)^2 / (2 S^2) with r = x - A slope x; n is standard normal.
    residual, deviation = X * (1 - A * slope), A * spread
    variance = (2 * deviation**4 + 4 * residual**2 * deviation**2) / (4 * S**4)
    return elbo, math.sqrt(variance / num)


EVIDENCE = float(log_normal(torch.tensor([[X]], dtype=torch.float64), 0.0, VARIANCE))


def test_the_exact_posterior_gives_the_exact_evidence(seed: int) -> None:
    elbo, error = mean_elbo(POSTERIOR_SLOPE, POSTERIOR_SPREAD, seed)
    assert elbo == pytest.approx(EVIDENCE, abs=5 * error)
    assert error < 5e-3
    # Each draw of z says so, where Pyro samples the KL as well.
    vae = linear_vae()
    x = torch.tensor([[X], [-2.0]], dtype=torch.float64)
    with torch.no_grad(), global_rng(seed):
        sampled = -Trace_ELBO().loss(vae.model, vae.guide, x)
    assert sampled == pytest.approx(float(log_normal(x, 0.0, VARIANCE).sum()), rel=1e-12)


def test_another_guide_falls_short_by_its_kl_to_the_posterior(seed: int) -> None:
    slope, spread = 0.5, 0.7
    elbo, error = mean_elbo(slope, spread, seed)
    ratio, shift = spread / POSTERIOR_SPREAD, X * (slope - POSTERIOR_SLOPE) / POSTERIOR_SPREAD
    gap = 0.5 * (ratio**2 + shift**2 - 1) - math.log(ratio)
    assert gap > 0.05
    assert elbo == pytest.approx(EVIDENCE - gap, abs=5 * error)


# --- the weights of the groups -----------------------------------------------------------------------


def shapes_of(groups: dict[int, int]) -> dict[str, torch.Size]:
    """Return the shapes of so many groups on grids of such sides, coarsest first."""
    sides = [side for side in sorted(groups) for _ in range(groups[side])]
    return {f"z_{index}": torch.Size([20, side, side]) for index, side in enumerate(sides, 1)}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({8: 5, 16: 5, 32: 5}, [1, 4, 16]),
        ({8: 4, 16: 4, 32: 4, 64: 4, 128: 4}, [1, 4, 16, 64, 256]),
        ({8: 5, 16: 10, 32: 20}, [1, 2, 4]),
        ({8: 4, 16: 4, 32: 4, 64: 8, 128: 16}, [1, 4, 16, 32, 64]),
        ({16: 30}, [1]),
    ],
)
def test_the_coefficients_are_nvaes(groups: dict[int, int], expected: list[float]) -> None:
    alpha = balance_coefficients(shapes_of(groups))
    of_grid = {side: alpha[f"z_{sum(groups[s] for s in groups if s < side) + 1}"] for side in sorted(groups)}
    assert list(of_grid.values()) == expected
    assert sorted(set(alpha.values())) == expected and len(alpha) == sum(groups.values())


def test_a_vector_counts_as_one_pixel() -> None:
    shapes = {"z_1": torch.Size([16]), "z_2": torch.Size([2, 4, 4])}
    assert balance_coefficients(shapes) == {"z_1": 1.0, "z_2": 16.0}


def test_while_the_kl_warms_up_a_group_weighs_by_its_share_of_it_over_its_grid(seed: int) -> None:
    vae = shipped_vae("image (1, 8, 8), 3 groups, local scale")
    alpha = balance_coefficients(vae.model.latent_shapes)
    x = data_for(vae, 4)
    log_likelihood, kl = terms(vae, x, seed)
    elbo = annealed(0.3, balance=alpha)
    loss, _ = loss_and_grads(elbo, vae, x, seed)
    shares = {name: (value / 4 + 0.01) / alpha[name] for name, value in kl.items()}  # a KL of Normals is positive
    mean = sum(shares.values()) / len(shares)
    gammas = {name: share / mean for name, share in shares.items()}
    assert {name: float(value) for name, value in elbo.gammas.items()} == pytest.approx(gammas, rel=1e-6)
    weighted = sum(gammas[name] * kl[name] for name in kl)
    assert float(loss) == pytest.approx(0.3 * weighted - log_likelihood, rel=1e-6)
    assert elbo.elbo_nats == pytest.approx(log_likelihood - sum(kl.values()), rel=1e-10)
    # Once the weight is one, no group is favoured.
    full, _ = loss_and_grads(annealed(1.0, balance=alpha), vae, x, seed)
    assert float(full) == pytest.approx(sum(kl.values()) - log_likelihood, rel=1e-10)
    assert max(gammas.values()) > 1.2


def test_no_gradient_flows_through_the_weights(seed: int) -> None:
    vae = shipped_vae(FEW[1])
    alpha = balance_coefficients(vae.model.latent_shapes)
    x = data_for(vae, 4)
    elbo = annealed(0.3, balance=alpha)
    grads = loss_and_grads(elbo, vae, x, seed)[1]
    fixed = annealed(0.3)
    fixed._gammas = lambda kl: elbo.gammas  # type: ignore[method-assign]
    for grad, expected in zip(grads, loss_and_grads(fixed, vae, x, seed)[1], strict=True):
        torch.testing.assert_close(grad, expected)


def test_free_bits_cost_nothing_and_pull_nowhere(seed: int) -> None:
    vae = shipped_vae(FEW[1])
    x = data_for(vae, 4)
    log_likelihood, kl = terms(vae, x, seed)
    means = {name: value / 4 for name, value in kl.items()}
    free = sorted(means.values())[1]  # between the smallest group's KL and the largest's, or one of them
    elbo = annealed(1.0, free_bits=free + 1e-6)
    loss, grads = loss_and_grads(elbo, vae, x, seed)
    paid = 4 * sum(max(value, free + 1e-6) for value in means.values())
    assert float(loss) == pytest.approx(paid - log_likelihood, rel=1e-10)
    # With more bits free than any group has, only the likelihood has a gradient.
    everything = annealed(1.0, free_bits=1e6)
    grads = loss_and_grads(everything, vae, x, seed)[1]
    for grad, expected in zip(grads, loss_and_grads(annealed(0.0), vae, x, seed)[1], strict=True):
        torch.testing.assert_close(grad, expected)
