"""Functionals of every draw, and recorded positions within a bound on memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.functionals import PositionRecorder, noise_functionals, record_positions
from ppl_vaebm.inference.kernels.base import KernelState
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.models.vaebm import VAEBM
from tests.small_models import QuadraticEnergy, linear_vae


def plane_potential() -> NoisePotential:
    return noise_potential(VAEBM(linear_vae(dim=2), QuadraticEnergy(0.0, 1.0)))


def state_at(position: torch.Tensor) -> KernelState:
    return KernelState(position, torch.zeros(len(position), dtype=position.dtype), None)


def test_the_mode_of_a_draw_is_the_nearest_centre() -> None:
    potential = plane_potential()
    modes = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    position = potential.draw_reference(generator, 200)
    stored = noise_functionals(potential, modes)(state_at(position))
    squares = (stored["x"].unsqueeze(1) - modes).square().sum(-1)
    assert torch.equal(stored["mode"], modes.double()[squares.argmin(1)])
    assert len(stored["mode"].unique(dim=0)) == 3
    assert "mode" not in noise_functionals(potential)(state_at(position))
    position[7, 0] = torch.nan
    assert noise_functionals(potential, modes)(state_at(position))["mode"][7].isnan().all()


def recorded(recorder: PositionRecorder, num_draws: int) -> list[int]:
    """Run draws whose position is their number through a recorder, and return the numbers that it kept."""
    num_chains, _, dim = recorder._kept.shape
    for number in range(num_draws):
        recorder(state_at(torch.full((num_chains + 1, dim), float(number))))
    kept = recorder.positions
    assert kept.shape[::2] == (num_chains, dim) and (kept == kept[:1, :, :1]).all()
    return [int(number) for number in kept[0, :, 0]]


@pytest.mark.parametrize("num_draws", [1, 7, 8, 9, 16, 17, 100])
def test_recorder_keeps_every_kth_draw(num_draws: int) -> None:
    recorder = PositionRecorder(lambda state: {"energy": state.potential}, num_chains=3, dim=2, max_draws=9)
    kept = recorded(recorder, num_draws)
    assert kept == list(range(0, num_draws, recorder.stride))
    assert len(kept) <= 8 and (recorder.stride == 1 or len(kept) > 4)


def test_a_recorder_returns_the_functionals_and_keeps_float32() -> None:
    recorder = PositionRecorder(lambda state: {"energy": state.potential}, num_chains=2, dim=3, max_draws=4)
    state = state_at(torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert recorder(state)["energy"] is state.potential
    assert recorder.positions.dtype == np.float32
    np.testing.assert_allclose(recorder.positions[:, 0], state.position[:2], rtol=1e-6)


def test_memory_for_too_few_positions_is_refused() -> None:
    recorder = record_positions(lambda state: {}, num_chains=4, dim=100, max_bytes=4 * 4 * 100 * 16)
    assert recorder._kept.shape == (4, 16, 100)
    with pytest.raises(InputError, match="--position-mib 1 or more"):
        record_positions(lambda state: {}, num_chains=4, dim=100, max_bytes=4 * 4 * 100 * 15)
