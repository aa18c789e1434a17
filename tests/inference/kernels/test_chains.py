"""Chains are the kernel's own steps, and every evaluation is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vaebm.inference.kernels import gradient_free, hmc, langevin, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelState, init_params, log_density_energy
from ppl_vaebm.inference.kernels.chains import Chains, run_chains
from ppl_vaebm.rng import stream

TARGET = targets.ar1_gaussian(3)
START = TARGET.exact(stream(0, "start"), 4)


def functionals(state: KernelState) -> dict[str, Tensor]:
    return {"q": state.position, "phi": state.potential}


def chains_of(kernel: Kernel, **options: int) -> Chains:
    return run_chains(kernel, stream(1, "chains"), START, init_params(START, 0.4), functionals=functionals, **options)


def test_shapes_have_chains_first_and_draws_second() -> None:
    chains = chains_of(hmc.build(TARGET.potential, num_steps=2), num_draws=7)
    assert chains.draws["q"].shape == (4, 7, 3) and chains.draws["phi"].shape == (4, 7)
    assert set(chains.stats) == {"lp", "acceptance_rate", "diverging", "energy", "n_steps"}
    assert all(stat.shape == (4, 7) for stat in chains.stats.values())
    assert torch.equal(chains.position, chains.draws["q"][:, -1])
    assert (chains.kernel, chains.warmup_evals, chains.attrs["thin"]) == ("hmc", 0, 1)


def test_draws_are_every_thin_th_state_of_the_kernel_run_by_hand() -> None:
    kernel = langevin.build_mala(TARGET.potential)
    chains = chains_of(kernel, num_draws=5, thin=3)
    state, generator, params = kernel.init(START), stream(1, "chains"), init_params(START, 0.4)
    for draw in range(5):
        infos = []
        for _ in range(3):
            state, info = kernel.step(generator, state, params)
            infos.append(info)
        assert torch.equal(chains.draws["q"][:, draw], state.position)
        assert torch.equal(chains.draws["phi"][:, draw], state.potential)
        assert torch.equal(chains.stats["lp"][:, draw], -log_density_energy(state))
        assert torch.equal(chains.stats["energy"][:, draw], infos[-1].energy)
        mean = (infos[0].acceptance_rate + infos[1].acceptance_rate + infos[2].acceptance_rate) / 3
        torch.testing.assert_close(chains.stats["acceptance_rate"][:, draw], mean)


def test_thinning_and_warm_up_count_all_their_evaluations() -> None:
    chains = chains_of(hmc.build(TARGET.potential, num_steps=3), num_draws=5, thin=2, num_warmup=10)
    assert (chains.stats["n_steps"] == 3 * 2).all()
    assert chains.num_evals == 4 * 5 * 2 * 3
    assert chains.warmup_evals == 4 * 10 * 3


def test_counts_that_differ_between_chains_stay_with_their_chain() -> None:
    rows = 0

    def counted(position: Tensor) -> Tensor:
        nonlocal rows
        rows += len(position)
        return TARGET.potential(position)

    chains = chains_of(gradient_free.build_elliptical(counted), num_draws=6, thin=2, num_warmup=5)
    assert chains.num_evals + chains.warmup_evals == rows - len(START)  # the start itself is not counted
    assert chains.stats["n_steps"].unique().numel() > 1


def test_warm_up_comes_first_and_its_step_is_kept() -> None:
    kernel = gradient_free.build_pcn(TARGET.potential)
    tuned, again = chains_of(kernel, num_draws=3, num_warmup=20), chains_of(kernel, num_draws=3, num_warmup=20)
    assert tuned.params.step_size != 0.4
    assert torch.equal(tuned.draws["q"], again.draws["q"])
    assert chains_of(kernel, num_draws=3).params.step_size == 0.4


def test_a_divergence_in_any_thinned_step_marks_the_draw() -> None:
    def broken(position: Tensor) -> Tensor:
        return torch.where(position[:, 0] > 1, torch.nan, TARGET.potential(position))

    start = torch.zeros(200, 3, dtype=torch.float64)
    kernel, params = gradient_free.build_pcn(broken), init_params(start, 0.8)
    chains = run_chains(kernel, stream(2, "broken"), start, params, num_draws=4, thin=3, functionals=functionals)
    singly = run_chains(kernel, stream(2, "broken"), start, params, num_draws=12, thin=1, functionals=functionals)
    flags = singly.stats["diverging"]
    assert flags.any() and not flags.all()
    assert torch.equal(chains.stats["diverging"], flags.reshape(200, 4, 3).any(-1))
    assert chains.draws["q"].isfinite().all()


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    chains_of(hmc.build(TARGET.potential, jitter=0.2), num_draws=3, num_warmup=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_budget_of_evaluations_stops_after_the_draw_that_reaches_it() -> None:
    kernel = hmc.build(TARGET.potential, num_steps=3)
    for max_evals, num_draws in ((1, 1), (6, 1), (7, 2), (12, 2), (1000, 5)):
        chains = chains_of(kernel, num_draws=5, thin=2, num_warmup=4, max_evals=max_evals)
        assert chains.draws["q"].shape == (4, num_draws, 3)
        assert chains.num_evals == 4 * 6 * num_draws
