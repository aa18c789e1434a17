"""Run by torchrun in test_devices.py: a gradient of stage svi on this process's half of a batch, and a short fit."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vaebm.config import Config, DataConfig, ModelConfig, NvaeConfig, SviConfig
from ppl_vaebm.data.load import load_data
from ppl_vaebm.devices import Process, current_process, joined
from ppl_vaebm.inference.svi.svi import Objective, fit_svi, new_vae
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.run import Run

normal: Any = import_module("torch.distributions.normal")
"""Where Pyro's Normal takes its noise from."""
NVAE = NvaeConfig(
    channels=4, num_latents=2, num_scales=2, groups_per_scale=2, num_flows=1, pre_cells=1, post_cells=1, encoder_cells=1
)
LOOP = SviConfig(
    steps=3, batch_size=4, optimizer="adamax", epsilon=1e-3, kl_warmup_steps=100, kl_balance=True, spectral_penalty=0.1
)
CONFIG = Config(data=DataConfig(name="digits"), model=ModelConfig(kind="nvae", nvae=NVAE), svi=LOOP)
BATCH = 8
"""Images of both processes together."""
STEP = 40
"""Of the gradient: the KL's weight is 0.4 there."""


def gradients(process: Process) -> dict[str, Tensor]:
    """Differentiate the objective on this process's share of a fixed batch, every row with noise of its own."""
    vae = new_vae(CONFIG, load_data(CONFIG.data, 0)).double().train()
    objective = Objective(vae, CONFIG.svi, seed=0).double()
    share = slice(process.rank * BATCH // process.world, (process.rank + 1) * BATCH // process.world)
    x = (2 * torch.rand(BATCH, 1, 8, 8, generator=stream(0, "x"), dtype=torch.float64) - 1)[share]
    num_draws = iter(range(1_000))

    def rows_of_noise(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = torch.randn(BATCH, *shape[1:], generator=stream(0, "noise", next(num_draws)), dtype=dtype)
        return whole[share]

    sampler, normal._standard_normal = normal._standard_normal, rows_of_noise
    try:
        objective(x, STEP).backward()
    finally:
        normal._standard_normal = sampler
    assert next(num_draws) == len(vae.model.latent_shapes)
    found = {name: parameter.grad for name, parameter in vae.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None} | {
        f"statistics of {name}": buffer for name, buffer in vae.named_buffers() if "running" in name
    }


def fitted(folder: Path) -> dict[str, Tensor]:
    """Fit a few steps and return the first noise that was drawn for the posterior, and a weight in the end."""
    draws = []
    sampler = normal._standard_normal

    def recorded(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        draws.append(sampler(shape, dtype, device))
        return draws[-1]

    normal._standard_normal = recorded
    try:
        run = Run.create(folder) if current_process().is_first else Run(folder)
        fit_svi(run, CONFIG, load_data(CONFIG.data, 0))
    finally:
        normal._standard_normal = sampler
    return {"noise": draws[0]}


def main() -> None:
    """Write what this process found to the folder of the first argument."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined(os.environ, "cpu") as process:
        torch.save(gradients(process), folder / f"gradients-{process.world}-{process.rank}.pt")
        torch.save(fitted(folder / f"run-{process.world}"), folder / f"noise-{process.world}-{process.rank}.pt")


if __name__ == "__main__":
    main()
