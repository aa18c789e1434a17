"""Statistics of the batch normalisations for draws of the prior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import ModelConfig, NvaeConfig
from ppl_vaebm.inference.svi.batch_norm import BATCH, norms_of, prior_statistics, set_statistics
from ppl_vaebm.models.decoders import Decoded, DecodedNormal
from ppl_vaebm.models.nvae_cells import NORM_MOMENTUM, BatchNorm2d
from ppl_vaebm.models.vae import Choose, HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.rng import global_rng
from tests.small_models import LinearGenerator, LinearGuide


class NormalizedGenerator(LinearGenerator):
    """``z ~ N(0, I)`` through ``3 z + 1`` into a batch normalisation: its statistics are 1 and ``9 t^2``."""

    def __init__(self) -> None:
        super().__init__(1.0, 1.0, dim=4)
        self.latent_shapes = {"z_1": torch.Size([4, 2, 2])}
        self.event_shape = torch.Size([4, 2, 2])
        self.norm = BatchNorm2d(4).double()

    def walk(self, choose: Choose, num: int) -> tuple[dict[str, Tensor], Tensor]:
        prior = self.first_prior(num)
        z = choose("z_1", prior, prior.loc)
        return {"z_1": z}, self.norm(3 * z + 1)

    def decode(self, state: Tensor) -> Decoded:
        return DecodedNormal(state, torch.ones_like(state))


def normalized_vae() -> HierarchicalVAE:
    generator = NormalizedGenerator()
    return HierarchicalVAE(generator, LinearGuide(generator, 1.0, 1.0)).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_they_are_the_moments_of_the_layers_input(temperature: float) -> None:
    num_batches = 200
    found = prior_statistics(normalized_vae(), temperature, num_batches, seed=0)
    assert found.keys() == {"norm.running_mean", "norm.running_var"}
    num = num_batches * BATCH * 4
    std = 3 * temperature
    assert (found["norm.running_mean"] - 1).abs().max() < 5 * std / math.sqrt(num)
    assert (found["norm.running_var"] / std**2 - 1).abs().max() < 5 * math.sqrt(2 / num)


def nvae() -> HierarchicalVAE:
    config = NvaeConfig(channels=4, num_latents=2, num_scales=2, groups_per_scale=2, decoder="normal")
    with global_rng(0):
        return build_vae(ModelConfig(kind="nvae", nvae=config), torch.Size([1, 8, 8])).eval()


def test_nothing_else_changes_and_the_draws_are_the_seeds_own() -> None:
    vae = nvae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    found = prior_statistics(vae, 1.0, 5, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not any(module.training for module in vae.modules())
    assert {layer.momentum for layer in norms_of(vae.model).values()} == {NORM_MOMENTUM}
    again, other = prior_statistics(vae, 1.0, 5, seed=3), prior_statistics(vae, 1.0, 5, seed=4)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not all(torch.equal(found[name], other[name]) for name in found)


def test_with_prior_statistics_vae_samples_are_normalised() -> None:
    vae = nvae()
    set_statistics(vae.model, prior_statistics(vae, 1.0, 100, seed=0))
    layer, outputs = list(norms_of(vae.model).values())[-2], list[Tensor]()
    random = torch.Generator().manual_seed(1)
    eps = {f"eps_{name}": torch.randn(500, *shape, generator=random) for name, shape in vae.model.latent_shapes.items()}

    def spread() -> tuple[float, float]:
        """Return how far the layer's output is from mean 0 and variance 1, at worst."""
        outputs.clear()
        with layer_recording(layer, outputs), torch.no_grad():
            vae.decode_noise(eps)
        mean, var = outputs[0].mean((0, 2, 3)), outputs[0].var((0, 2, 3))
        return float(mean.abs().max()), float((var - 1).abs().max())

    assert spread()[0] < 0.1 and spread()[1] < 0.2
    # Negative control: with a fresh net's statistics, 0 and 1, they are not.
    for norm in norms_of(vae.model).values():
        norm.reset_running_stats()
    assert spread()[1] > 0.5


@contextmanager
def layer_recording(layer: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        yield
    finally:
        handle.remove()


def test_a_generator_without_batch_normalisation_has_none() -> None:
    with global_rng(0):
        vae = build_vae(ModelConfig(latents=(3, 2), channels=4), torch.Size([1, 8, 8]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in vae.modules())
    assert prior_statistics(vae, 1.0, 5, seed=0) == {}
