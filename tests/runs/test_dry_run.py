"""What a dry run says of a run: counted by hand, and measured on the real networks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.config import Config, DataConfig, EbmConfig, EnergyConfig, ModelConfig, NvaeConfig, SviConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.svi import Objective
from ppl_vaebm.models.energy import build_energy
from ppl_vaebm.models.saved_bytes import Pass, dry_pass, forward_pass
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.rng import global_rng
from ppl_vaebm.runs.dry_run import LayerRow, count, describe, form_of, layer_rows
from tests.small_models import nvae_options
from tests.tiny import needs_bfloat16

SMALL: dict[str, Any] = {"channels": 4, "num_latents": 3, "num_scales": 2, "groups_per_scale": 2}
# Shape of x, its levels, and the VAE's options.
CASES: dict[str, tuple[tuple[int, ...], int | None, dict[str, Any]]] = {
    "vector": ((2,), None, {"latents": (2, 3), "width": 8, "depth": 2}),
    "image": ((3, 16, 16), 256, {"latents": (4, 2), "channels": 4, "x_scale": "local"}),
    "nvae, flows": ((3, 16, 16), 256, nvae_options(**SMALL, num_flows=1)),
    "nvae, one group": ((1, 8, 8), None, nvae_options(groups_per_scale=1)),
    "nvae, logistic mixture": ((3, 8, 8), 256, nvae_options(**SMALL, decoder="logistic-mixture")),
    "nvae, bernoulli": ((1, 12, 12), 2, nvae_options(**SMALL, decoder="bernoulli", padding=2)),
}
LOOPS = {
    "plain": SviConfig(kl_warmup_steps=0),
    "penalties": SviConfig(kl_balance=True, free_bits=0.1, spectral_penalty=0.1, spectral_penalty_start=10.0),
}


class TinyNet(nn.Module):
    """Two convolutions; the activation keeps its output, which is what the second one keeps too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).square().sum()


def test_what_a_tiny_net_saves_is_counted_by_hand() -> None:
    with torch.device("meta"):
        net = TinyNet()
    found = dry_pass(net, "cpu", (2, 3, 8, 8))
    # x for the first weight's gradient, the activation, and what is squared; no weights.
    assert found.saved_bytes == 4 * 2 * 8 * 8 * (3 + 4 + 1)
    assert list(found.shapes.values()) == [torch.Size([4, 8, 8]), torch.Size([1, 8, 8]), torch.Size([])]


@cache
def dry(name: str, loop: SviConfig) -> tuple[HierarchicalVAE, Pass]:
    """Return a VAE without memory, and what a step of it keeps on fake tensors."""
    shape, levels, options = CASES[name]
    with torch.device("meta"):
        vae = build_vae(ModelConfig(**options), torch.Size(shape), levels).train()
    return vae, dry_pass(Objective(vae, loop, 0), "cpu", (5, *shape), 0)


def both_passes(name: str, loop: SviConfig) -> tuple[Pass, Pass]:
    """Return what a step keeps on fake tensors, and on real ones."""
    shape, levels, options = CASES[name]
    with global_rng(0):
        real = build_vae(ModelConfig(**options), torch.Size(shape), levels).train()
        real_pass = forward_pass(Objective(real, loop, 0), torch.ones(5, *shape), 0)
    return dry(name, loop)[1], real_pass


@pytest.mark.parametrize(
    ("name", "loop"), [*((name, "plain") for name in CASES), ("image", "penalties"), ("nvae, flows", "penalties")]
)
def test_a_dry_pass_saves_what_a_real_one_does(name: str, loop: str) -> None:
    fake, real = both_passes(name, LOOPS[loop])
    assert fake.saved_bytes == real.saved_bytes > 0
    assert list(fake.shapes.values()) == list(real.shapes.values())


@needs_bfloat16
def test_half_precision_is_respected() -> None:
    fake, real = both_passes("nvae, flows", SviConfig(bf16=True, kl_warmup_steps=0))
    # The moments of the batch normalisations are counted as bfloat16 and are float32.
    assert 0.98 * real.saved_bytes < fake.saved_bytes <= real.saved_bytes
    assert fake.saved_bytes < 0.75 * dry("nvae, flows", LOOPS["plain"])[1].saved_bytes


@pytest.mark.parametrize("name", CASES)
def test_the_table_has_every_parameter_once(name: str) -> None:
    vae, kept = dry(name, LOOPS["plain"])
    shape = vae.model.event_shape
    with torch.device("meta"):
        energy = build_energy(EnergyConfig(channels=2), shape) if shape[-1] != 12 else None
    rows = layer_rows(vae, energy, kept.shapes)
    assert sum(row.num_parameters * row.num_alike for row in rows) == count(vae) + (count(energy) if energy else 0)


def test_the_table_follows_the_computation() -> None:
    vae, kept = dry("nvae, flows", LOOPS["plain"])
    rows = layer_rows(vae, None, kept.shapes)
    assert [row.part for row in rows] == [
        "guide.stem",
        "guide.pre.0",
        "guide.pre.1",
        "guide.tower.0..1",
        "guide.tower.2",
        "guide.tower.3",
        "guide.top",
        "guide.heads.z_1..z_2",
        "guide.heads.z_3..z_4",
        "guide.flows.z_1..z_2",
        "guide.flows.z_3..z_4",
        "model.h",
        "model.combiners.0..1",
        "model.combiners.2..3",
        "model.cells.0",
        "model.cells.1",
        "model.cells.2",
        "model.priors.0",
        "model.priors.1..2",
        "guide.combiners.0..1",
        "guide.combiners.2",
        "model.post.0",
        "model.post.1",
        "model.head",
    ]
    assert rows[0] == LayerRow("guide.stem", "Conv2d", torch.Size([4, 16, 16]), 3 * 4 * 9 + 4 + 4)
    assert rows[4][1:3] == ("2 x ResidualCell", torch.Size([16, 4, 4]))
    assert rows[9][1:3] == ("2 x AutoregressiveShift", torch.Size([3, 4, 4])) and rows[9].num_alike == 2


NVAE = Config(
    data=DataConfig(name="cifar10", root="nowhere", image_size=16),
    model=ModelConfig(kind="nvae", nvae=NvaeConfig(**SMALL)),
    svi=SviConfig(batch_size=6, optimizer="adamax"),
    energy=EnergyConfig(channels=2),
    ebm=EbmConfig(replay_size=1000, batch_size=2),
)


def test_the_text_of_an_nvae() -> None:
    lines = describe(NVAE)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 120
    num_latents = 2 * 3 * (8 * 8 + 4 * 4)
    assert f"latents: {num_latents} in 4 groups, coarsest first: 2 x (3 x 4 x 4), 2 x (3 x 8 x 8)" in text
    assert f"noise: {num_latents + 768:,}, of the latents and 768 of x" in text
    assert f"replay of stage ebm: 1,000 positions, {4000 * (num_latents + 768) / 2**20:.1f} MiB" in text
    assert "ImageEnergy" in text and " convolutions, " in text and " batch normalisations" in text
    assert "a process with 6 data points a step, float32 on cpu:" in text


def test_the_text_of_an_energy_of_x_and_z() -> None:
    """Its layers have outputs, for the pass gives it latents; the names are those of the layers before any bound."""
    config = replace(NVAE, energy=EnergyConfig(channels=2, inputs="x-and-z", spectral_norm=True, block="depthwise"))
    rows = [line.split() for line in describe(config) if line.startswith("energy")]
    parts = {row[0]: row[1:] for row in rows}
    assert parts["energy.stem"][:6] == ["Conv2d", "2", "x", "16", "x", "16"]
    # Latents of 3 channels: two on the grid of 8 x 8 that the second block takes; on that of 4 x 4 there is no block.
    assert parts["energy.latent_maps.1"][:6] == ["Conv2d", "4", "x", "8", "x", "8"]
    assert parts["energy.latent_maps.1"][6:] == [str(4 * 3 * 4)]
    assert " ".join(parts["energy:"][:5]) == "ImageEnergy of x and z,"
    assert " ".join(parts["energy:"][-5:]) == "parameters, layout halving, 10 convolutions"


def test_the_memory_is_that_of_the_parts() -> None:
    with torch.device("meta"):
        vae = build_vae(NVAE.model, torch.Size([3, 16, 16]), 256)
    trained = 4 * count(vae)
    buffers = sum(buffer.nbytes for buffer in vae.buffers())
    saved = dry_pass(Objective(vae.train(), NVAE.svi, 0), "cpu", (6, 3, 16, 16), 0).saved_bytes
    memory = dict(line.strip().split("  ", 1) for line in describe(NVAE)[-6:])
    assert {name: text.strip() for name, text in memory.items()} == {
        "weights": f"{(trained + buffers) / 2**10:.1f} KiB",
        "gradients": f"{trained / 2**10:.1f} KiB",
        "adamax state": f"{2 * trained / 2**10:.1f} KiB",
        "averaged weights": f"{(trained + buffers) / 2**10:.1f} KiB",
        "saved for backward": f"{saved / 2**20:.1f} MiB",
        "in all": f"{(5 * trained + 2 * buffers + saved) / 2**20:.1f} MiB",
    }


def test_a_bernoulli_decoder_has_no_energy() -> None:
    model = ModelConfig(kind="nvae", nvae=NvaeConfig(**SMALL, decoder="bernoulli"))
    config = replace(NVAE, model=model, data=DataConfig(name="mnist", root="nowhere", binarize=True))
    assert not any("energy" in line or "replay" in line for line in describe(config))


def test_what_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="model.nvae.decoder bernoulli does not fit"):
        describe(replace(NVAE, model=ModelConfig(kind="nvae", nvae=NvaeConfig(decoder="bernoulli"))))


def test_a_folder_of_images_has_to_have_a_size() -> None:
    with pytest.raises(InputError, match=r"^a dry run does not read the files of image-folder: .*data.image-size$"):
        form_of(DataConfig(name="image-folder"))
    colour = form_of(DataConfig(name="image-folder", image_size=24, num_bits=5))
    assert (colour.event_shape, colour.levels, colour.is_dequantized) == ((3, 24, 24), 32, True)
    grey = form_of(DataConfig(name="image-folder", image_size=24, binarize=True))
    assert (grey.event_shape, grey.levels, grey.is_dequantized) == ((1, 24, 24), 2, False)
    assert form_of(DataConfig(name="celeba-hq")).event_shape == (3, 256, 256)
