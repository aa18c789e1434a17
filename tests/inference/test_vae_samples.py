"""VAE samples, reconstructions and traversals have known moments, and depend on no noise of other images."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ppl_vaebm.inference.vae_samples import image_noise, reconstructions, rotated, tempered, traversal, vae_samples
from ppl_vaebm.models import vae as vae_module
from ppl_vaebm.rng import stream
from tests.small_models import POSTERIOR_SLOPE, POSTERIOR_SPREAD, VARIANCE, A, linear_vae, shipped_vae

ANGLES = torch.linspace(-2, 2, 5)


def test_reconstructions_of_the_linear_model_are_those_of_its_posterior() -> None:
    vae, num = linear_vae(), 20_000
    x = torch.full((num, 1), 1.5)
    means = reconstructions(vae, x, seed=0)
    assert means.shape == (num, 1)
    spread = A * POSTERIOR_SPREAD
    assert float(means.mean()) == pytest.approx(A * POSTERIOR_SLOPE * 1.5, abs=5 * spread / math.sqrt(num))
    assert float(means.std()) == pytest.approx(spread, rel=0.03)
    wrong = reconstructions(linear_vae(slope=0.1), x, seed=0)
    assert abs(float(wrong.mean()) - A * POSTERIOR_SLOPE * 1.5) > 50 * spread / math.sqrt(num)


def test_samples_of_the_linear_model_have_its_moments() -> None:
    vae, num = linear_vae(), 20_000
    assert float(vae_samples(vae, num, 0).var()) == pytest.approx(VARIANCE, rel=0.05)
    for temperature in (0.5, 1.0):
        expected = (temperature * A) ** 2
        assert float(vae_samples(vae, num, 0, temperature, is_mean=True).var()) == pytest.approx(expected, rel=0.05)


def test_a_temperature_leaves_the_noise_of_x() -> None:
    noise = {"eps_z_1": torch.ones(1, 2), "eps_x": torch.ones(1, 2)}
    cold = tempered(noise, 0.0)
    assert not cold["eps_z_1"].any() and cold["eps_x"].all()


@pytest.mark.parametrize("is_mean", [True, False])
def test_an_image_depends_neither_on_the_number_of_images_nor_on_the_size_of_a_pass(
    is_mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = shipped_vae("image (1, 8, 8), 3 groups, local scale").eval()
    draw = partial(vae_samples, is_mean=is_mean)
    many = draw(vae, 7, 3)
    assert torch.allclose(draw(vae, 4, 3), many[:4], atol=1e-12)
    monkeypatch.setattr(vae_module, "MAX_VALUES_PER_BLOCK", 1)
    assert vae.rows_per_block == 1
    assert torch.allclose(draw(vae, 7, 3), many, atol=1e-12)
    assert not torch.allclose(draw(vae, 7, 4), many)


def test_a_rotation_changes_the_chosen_noise_and_no_other() -> None:
    vae = shipped_vae("image (1, 8, 8), 3 groups, local scale")
    noise = image_noise(vae, range(3), seed=0)
    direction = torch.ones(noise["eps_z_2"].shape[1:], dtype=torch.float64)
    turned = {name: value.unflatten(0, (3, 5)) for name, value in rotated(noise, "eps_z_2", direction, ANGLES).items()}
    for name, value in turned.items():
        is_chosen = name == "eps_z_2"
        for index, angle in enumerate(ANGLES.tolist()):
            assert torch.equal(value[:, index], noise[name]) == (not is_chosen or angle == 0.0), (name, angle)
    quarter = rotated(noise, "eps_z_2", direction, torch.tensor([math.pi / 2]))["eps_z_2"]
    assert torch.allclose(quarter, direction.expand_as(quarter), atol=1e-6)


def test_rotated_noise_stays_standard_normal() -> None:
    noise = {"eps_z_1": torch.randn(500, 200, generator=stream(0, "a"))}
    direction = torch.randn(200, generator=stream(0, "b"))
    turned = rotated(noise, "eps_z_1", direction, ANGLES)["eps_z_1"].unflatten(0, (500, 5))
    assert turned.square().mean((0, 2)).allclose(torch.ones(5), atol=0.15)


def test_a_traversal_at_angle_0_is_the_vae_sample() -> None:
    vae = shipped_vae("image (1, 8, 8), 3 groups, local scale").eval()
    x = traversal(vae, "z_2", 3, 5, ANGLES, temperature=0.8)
    assert x.shape == (3, 5, 1, 8, 8)
    assert torch.allclose(x[:, 2], vae_samples(vae, 3, 5, 0.8, is_mean=True), atol=1e-12)
    assert not torch.allclose(x[:, 0], x[:, 2], atol=1e-3)


def test_reconstructions_and_traversals_leave_the_vae_unchanged() -> None:
    vae = shipped_vae("nvae, one group, normal")
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    reconstructions(vae, torch.zeros(3, 1, 8, 8, dtype=torch.float64), 0)
    traversal(vae, "z_1", 2, 0, ANGLES)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
