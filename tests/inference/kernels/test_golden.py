"""The kernels' numbers are the stored ones; regenerate with ``python tests/inference/golden_kernels.py``."""

from __future__ import annotations

import json

import pytest

from tests.inference import golden_kernels

STORED: golden_kernels.Numbers = json.loads(golden_kernels.PATH.read_text())


@pytest.fixture(scope="module")
def computed() -> golden_kernels.Numbers:
    return golden_kernels.compute()


def test_every_kernel_has_golden_numbers(computed: golden_kernels.Numbers) -> None:
    assert set(computed) == set(STORED)


@pytest.mark.parametrize("name", sorted(STORED))
def test_two_steps_give_the_stored_numbers(name: str, computed: golden_kernels.Numbers) -> None:
    for step, stored in zip(computed[name], STORED[name], strict=True):
        assert set(step) == set(stored)
        for field, values in stored.items():
            assert step[field] == pytest.approx(values, rel=1e-10, abs=1e-12), field


def test_the_numbers_tell_kernels_apart() -> None:
    positions = {tuple(steps[-1]["position"]) for steps in STORED.values()}
    assert len(positions) == len(STORED)
