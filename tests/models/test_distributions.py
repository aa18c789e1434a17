"""The clamps and the diagonal Normal have their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_vaebm.models.distributions import diagonal_normal, positive_scale, soft_clamp


def test_soft_clamp_is_the_identity_near_zero_and_stays_within_five() -> None:
    raw = torch.tensor([-1e9, -5.0, -1e-4, 0.0, 1e-4, 5.0, 1e9], dtype=torch.float64)
    five = 5 * math.tanh(1)
    assert soft_clamp(raw).tolist() == pytest.approx([-5.0, -five, -1e-4, 0.0, 1e-4, five, 5.0], rel=1e-8)


def test_positive_scale_is_between_its_bounds() -> None:
    raw = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    assert positive_scale(raw).tolist() == pytest.approx([math.exp(-5) + 0.01, 1.01, math.exp(5) + 0.01])


def test_diagonal_normal_sums_over_all_but_the_first_axis(generator: torch.Generator) -> None:
    loc = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    value = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    normal = diagonal_normal(loc, scale)
    assert (normal.batch_shape, normal.event_shape) == ((4,), (3, 2, 2))
    terms = -0.5 * ((value - loc) / 0.7).square() - math.log(0.7) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(normal.log_prob(value), terms.sum(dim=(1, 2, 3)))
