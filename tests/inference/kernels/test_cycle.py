"""Cycles: their members in turn, and the modes that they join."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import gradient_free, hmc, langevin, targets
from ppl_vaebm.inference.kernels.base import Kernel, init_params
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.inference.kernels.cycle import build_mixture
from ppl_vaebm.rng import stream

TARGET = targets.ar1_gaussian(4)


def test_a_step_runs_the_members_in_turn_and_reports_the_tunable_one() -> None:
    phi = TARGET.potential
    members = [gradient_free.build_independence(phi), hmc.build(phi, num_steps=3), gradient_free.build_elliptical(phi)]
    start = TARGET.exact(stream(0, "start"), 40)
    params = init_params(start, 0.5)
    cycle = build_mixture(members)
    state, info = cycle.step(stream(1, "step"), cycle.init(start), params)

    expected, generator, infos = members[0].init(start), stream(1, "step"), []
    for member in members:
        expected, one = member.step(generator, expected, params)
        infos.append(one)
    assert torch.equal(state.position, expected.position)
    assert torch.equal(info.acceptance_rate, infos[1].acceptance_rate)
    assert torch.equal(info.energy, infos[1].energy)
    # 1 of independence, 3 of HMC and 1 to fill in the gradient, and what the slices took.
    assert torch.equal(info.num_evals, 5 + infos[2].num_evals)
    assert info.is_accepted.all()  # slices always move
    assert cycle.target_acceptance == hmc.HMC_TARGET_ACCEPTANCE


def test_any_member_that_moves_accepts_and_any_that_diverges_diverges() -> None:
    narrow = targets.gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.01, dtype=torch.float64))
    members = [langevin.build_mala(narrow.potential), gradient_free.build_elliptical(narrow.potential)]
    start = narrow.exact(stream(2, "start"), 10)
    for order in (members, members[::-1]):
        cycle = build_mixture(order)
        _, info = cycle.step(stream(3, "step"), cycle.init(start), init_params(start, 1.0))
        assert info.is_accepted.all() and info.is_divergent.all() and (info.acceptance_rate == 0).all()


def test_without_a_tunable_member_the_last_one_reports() -> None:
    phi = TARGET.potential
    cycle = build_mixture([gradient_free.build_elliptical(phi), gradient_free.build_independence(phi)])
    start = TARGET.exact(stream(4, "start"), 40)
    _, info = cycle.step(stream(5, "step"), cycle.init(start), init_params(start, 0.5))
    assert cycle.target_acceptance is None
    assert info.acceptance_rate.min() < 0.5  # elliptical would report 1


def run_from_the_right_mode(kernel: Kernel) -> Chains:
    start = torch.full((100, 1), 1.5, dtype=torch.float64)
    return run_chains(
        kernel,
        stream(6, "modes"),
        start,
        init_params(start, 0.2),
        num_draws=100,
        thin=2,
        functionals=lambda state: {"is_left": (state.position[:, 0] < 0).double()},
    )


def share_left(chains: Chains) -> Tensor:
    return chains.draws["is_left"][:, -1].mean()


def test_it_crosses_between_modes_that_hmc_alone_does_not() -> None:
    phi = targets.two_modes(distance=1.5).potential
    local = hmc.build(phi, num_steps=3)
    alone = run_from_the_right_mode(local)
    mixed = run_from_the_right_mode(build_mixture([gradient_free.build_independence(phi), local]))
    assert not alone.draws["is_left"].any()
    # Chains are independent, and started so far ago that the last draws are even between the modes.
    assert abs(share_left(mixed) - 0.5) < 5 * math.sqrt(0.25 / 100)
    halves = torch.cat([mixed.draws["is_left"][:50, 50:], mixed.draws["is_left"][50:, 50:]])
    assert abs(halves.mean() - 0.5) < 0.1


def test_r_hat_sees_the_modes_that_hmc_alone_does_not_join() -> None:
    target = targets.two_modes(distance=1.5)
    start = torch.tensor([[-1.5], [-1.5], [1.5], [1.5]], dtype=torch.float64)
    local = hmc.build(target.potential, num_steps=3)
    r_hats = []
    for kernel in (local, build_mixture([gradient_free.build_independence(target.potential), local])):
        chains = run_chains(
            kernel,
            stream(7, "modes"),
            start,
            init_params(start, 0.2),
            num_draws=500,
            functionals=lambda state: {"q": state.position[:, 0]},
        )
        r_hats.append(diagnostics.summarize(to_inference_data(chains))[0].r_hat)
    assert r_hats[0] > 1.5
    assert r_hats[1] < 1.05


def test_members_that_cannot_be_tuned_together_are_refused() -> None:
    phi = TARGET.potential
    with pytest.raises(ValueError, match="one kernel with a step to tune, got mala, pcn"):
        build_mixture([langevin.build_mala(phi), gradient_free.build_pcn(phi)])
    fixed = gradient_free.build_pcn(phi, step_size=0.3)
    assert build_mixture([langevin.build_mala(phi), fixed]).target_acceptance is not None
    with pytest.raises(ValueError, match="at least one member"):
        build_mixture([])
