from __future__ import annotations

import math
from typing import Any

import arviz
import pytest
import torch
from pyro.infer import HMC, MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges.pyro_mcmc import BatchedMCMC, PyroKernel
from ppl_vaebm.inference.kernels import hmc, targets
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, KernelState, Potential, init_params
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.inference.kernels.registry import build_kernel, start_params
from ppl_vaebm.rng import stream

# Not in alphabetical order, which is Pyro's.
PACKING = Packing({"z": torch.Size([2]), "a": torch.Size([1, 3])})
AR1 = targets.ar1_gaussian(PACKING.dim, 0.6)
MAX_Z = 5.0


def start(num_chains: int) -> Tensor:
    return AR1.exact(stream(0, "start"), num_chains)


def pyro_kernel(potential: Potential = AR1.potential, num_chains: int = 4, **options: Any) -> PyroKernel:
    position = options.pop("position", start(num_chains))
    kernel = hmc.build(potential, num_steps=2)
    return PyroKernel(kernel, position, init_params(position, 0.3), **{"seed": 1, "packing": PACKING, **options})


def run(kernel: PyroKernel, num_samples: int = 6, warmup_steps: int = 0, **options: Any) -> BatchedMCMC:
    mcmc = BatchedMCMC(kernel, num_samples, warmup_steps, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def flat(samples: dict[str, Tensor]) -> Tensor:
    return torch.cat([samples["z"], samples["a"].flatten(-2)], dim=-1)


def fails_in_first_chain(position: Tensor) -> Tensor:
    """Phi = 0, but not a number in the first chain once it has left its start."""
    is_bad = (torch.arange(len(position)) == 0) & (position != start(len(position))).any(1)
    return torch.where(is_bad, math.nan, 0.0).to(position.dtype)


def test_samples_are_grouped_by_chain_and_site() -> None:
    mcmc = run(pyro_kernel(num_chains=4), 6, 3)
    grouped, pooled = mcmc.get_samples(group_by_chain=True), mcmc.get_samples()
    assert {name: tuple(draws.shape) for name, draws in grouped.items()} == {"z": (4, 6, 2), "a": (4, 6, 1, 3)}
    assert {name: tuple(draws.shape) for name, draws in pooled.items()} == {"z": (24, 2), "a": (24, 1, 3)}
    assert pooled["z"].equal(grouped["z"].flatten(0, 1))
    assert mcmc.num_chains == 4
    assert mcmc.get_samples(num_samples=0)["z"].shape == (0, 2)


def test_one_flat_site_is_the_default() -> None:
    mcmc = run(pyro_kernel(num_chains=4, packing=None))
    assert mcmc.get_samples(group_by_chain=True)["position"].shape == (4, 6, PACKING.dim)
    assert mcmc.get_samples(group_by_chain=True)["position"].equal(flat(run(pyro_kernel()).get_samples(None, True)))


@pytest.mark.parametrize("name", ["hmc", "mala", "langevin", "pcn", "elliptical", "mixture", "chees", "tempered"])
def test_draws_are_those_of_run_chains(name: KernelName) -> None:
    config = KernelConfig(name=name)
    kernel, position = build_kernel(config, AR1.potential), start(5)
    params = start_params(config, position)
    adapted = PyroKernel(kernel, position, params, seed=3, packing=PACKING)
    mcmc = run(adapted, 10, 20)
    chains = run_chains(
        kernel,
        stream(3, "pyro-mcmc", kernel.name),
        position,
        params,
        num_draws=10,
        num_warmup=20,
        functionals=lambda state: {"q": state.position},
    )
    assert flat(mcmc.get_samples(group_by_chain=True)).equal(chains.draws["q"])
    assert adapted.params.step_size.equal(chains.params.step_size)
    assert adapted.num_evals == chains.num_evals and adapted.warmup_evals == chains.warmup_evals
    assert adapted.is_divergent.equal(chains.stats["diverging"])
    torch.testing.assert_close(adapted.acceptance_rate, chains.stats["acceptance_rate"].mean(1))
    assert adapted.report() == (kernel.report(adapted._state, adapted.params) if kernel.report else {})


def test_warm_up_moves_the_step_and_draws_keep_it() -> None:
    seen: list[tuple[str, float]] = []
    kernel = pyro_kernel()
    run(kernel, 5, 20, hook_fn=lambda kernel, sites, stage, index: seen.append((stage, float(kernel.params.step_size))))
    steps = {stage: [step for where, step in seen if where == stage] for stage in ("Warmup", "Sample")}
    assert len(steps["Warmup"]) == 20 and len(set(steps["Warmup"])) > 10
    assert steps["Sample"] == [float(kernel.params.step_size)] * 5 and steps["Sample"][0] == steps["Warmup"][-1] != 0.3


def test_a_kernels_own_warm_up_runs_once_and_pyros_warm_up_steps_do_not_move() -> None:
    calls: list[int] = []

    def warm_up(
        generator: torch.Generator, state: KernelState, params: KernelParams, num_steps: int
    ) -> tuple[KernelState, KernelParams, int]:
        calls.append(num_steps)
        return state, params._replace(step_size=params.step_size * 0.5), 70

    plain = hmc.build(AR1.potential, num_steps=2)
    kernel = PyroKernel(plain._replace(warm_up=warm_up), start(3), init_params(start(3), 0.3), seed=1, packing=PACKING)
    stages: list[tuple[str, Tensor]] = []
    run(kernel, 2, 7, hook_fn=lambda kernel, sites, stage, index: stages.append((stage, flat(sites))))
    assert calls == [7] and kernel.warmup_evals == 70 and float(kernel.params.step_size) == pytest.approx(0.15)
    assert [stage for stage, _ in stages] == ["Warmup"] * 7 + ["Sample"] * 2
    assert all(position.equal(start(3)) for stage, position in stages if stage == "Warmup")
    assert not stages[-1][1].equal(start(3))
    run(kernel, 2, 0)
    assert calls == [7]  # without warm-up steps there is no warm-up


def test_moments_of_batched_mcmc_are_those_of_the_target() -> None:
    kernel = build_kernel(KernelConfig(name="hmc"), AR1.potential)
    position = start(200)
    mcmc = run(PyroKernel(kernel, position, init_params(position, 0.1), seed=5, packing=PACKING), 40, 40)
    q = flat(mcmc.get_samples(group_by_chain=True)).mean(1)  # chains are independent, so their means are
    neighbours = flat(mcmc.get_samples(group_by_chain=True))
    products = (neighbours[..., 1:] * neighbours[..., :-1]).mean(1)

    def z(values: Tensor, expected: float) -> Tensor:
        return (values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(len(values)))

    assert (z(q, 0.0) < MAX_Z).all() and (z(products, 0.6) < MAX_Z).all()
    assert (z(products, 0.0) > MAX_Z).all()  # the correlation that N(0, I) lacks is seen


def test_r_hat_compares_chains_and_plain_mcmc_does_not() -> None:
    modes = targets.two_modes()
    position = torch.tensor([[-2.0], [-2.0], [2.0], [2.0]], dtype=torch.float64)
    kernel = pyro_kernel(modes.potential, position=position, packing=None)
    apart = run(kernel, 60, 20).diagnostics()["position"]["r_hat"]
    assert apart.shape == (1,) and apart.item() > 2
    together = run(pyro_kernel(num_chains=4), 200, 50).diagnostics()["z"]["r_hat"]
    assert (together < 1.1).all()
    plain = MCMC(kernel, 60, 20, disable_progbar=True)
    plain.run()
    assert plain.get_samples(group_by_chain=True)["position"].shape == (1, 60, 4, 1)
    assert plain.diagnostics()["position"]["r_hat"].shape == (4, 1)
    assert (plain.diagnostics()["position"]["r_hat"] < 1.5).all()  # the modes' distance goes unseen


def test_divergences_and_acceptance_are_reported_for_each_chain() -> None:
    mcmc = run(pyro_kernel(fails_in_first_chain, num_chains=3), 5)
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {"chain 0": [0, 1, 2, 3, 4], "chain 1": [], "chain 2": []}
    assert diagnostics["acceptance rate"] == {"chain 0": 0.0, "chain 1": 1.0, "chain 2": 1.0}
    assert mcmc.kernel.diagnostics() == {"divergences": [0, 1, 2, 3, 4], "acceptance rate": pytest.approx(2 / 3)}
    assert flat(mcmc.get_samples(group_by_chain=True))[0].equal(start(3)[0].expand(5, -1))


@pytest.mark.parametrize("num_chains", [3, 12])
def test_arviz_accepts_the_mcmc_with_the_divergences_of_every_chain(num_chains: int) -> None:
    def diverges_in_chain_2(position: Tensor) -> Tensor:
        is_bad = (torch.arange(len(position)) == 2) & (position != start(num_chains)).any(1)
        return torch.where(is_bad, math.nan, 0.0).to(position.dtype)

    mcmc = run(
        pyro_kernel(diverges_in_chain_2, num_chains=num_chains), 15
    )  # fewer draws than chains would look swapped
    idata = arviz.from_pyro(mcmc)
    assert dict(idata["posterior"].sizes)["chain"] == num_chains
    assert idata["posterior"]["a"].shape == (num_chains, 15, 1, 3)
    diverging = idata["sample_stats"]["diverging"].to_numpy()
    assert diverging.tolist() == [[chain == 2] * 15 for chain in range(num_chains)]


def test_summary_has_r_hat_and_the_number_of_divergences(capsys: pytest.CaptureFixture[str]) -> None:
    run(pyro_kernel(fails_in_first_chain, num_chains=3), 6).summary()
    text = capsys.readouterr().out
    assert "r_hat" in text and "a[0,2]" in text and "Number of divergences: 6" in text


def test_a_run_repeats_and_follows_its_seed_only() -> None:
    kernel = pyro_kernel()
    first, again, other = (run(k).get_samples()["z"] for k in (kernel, kernel, pyro_kernel(seed=2)))
    assert first.equal(again) and not first.equal(other)
    state = torch.get_rng_state()
    run(kernel)
    assert torch.get_rng_state().equal(state)


def test_initial_params_replace_the_starts() -> None:
    kernel, elsewhere = pyro_kernel(), start(4) + 1
    assert flat(kernel.initial_params).equal(start(4))
    moved = run(kernel, initial_params=PACKING.unravel(elsewhere)).get_samples()["z"]
    assert flat(kernel.initial_params).equal(elsewhere)
    assert moved.equal(run(pyro_kernel(position=elsewhere)).get_samples()["z"])


def test_chains_that_a_caller_moves_continue_from_there() -> None:
    kernel = pyro_kernel(targets.reference(PACKING.dim).potential)
    kernel.setup(0)
    kernel.sample(kernel.initial_params)
    far = PACKING.unravel(start(4) + 100)
    assert (flat(kernel.sample(far)) - 100).abs().max() < 60  # a short trajectory from there, not from where it was
    assert kernel._state.position.abs().min() > 40


def test_progress_bar_uses_pyros_names() -> None:
    kernel = pyro_kernel()
    kernel.setup(0)
    assert dict(kernel.logging()) == {"step size": "3.00e-01", "acc. prob": "-"}
    kernel.sample(kernel.initial_params)
    assert float(kernel.logging()["acc. prob"]) > 0.5


def test_streaming_mcmc_accepts_the_kernel() -> None:
    kernel = pyro_kernel()
    mcmc = StreamingMCMC(kernel, 6, 3, disable_progbar=True)
    mcmc.run()
    expected = run(kernel, 6, 3).get_samples(group_by_chain=True)["z"]
    torch.testing.assert_close(mcmc.get_statistics()[(0, "z")]["mean"], expected.mean(1))


def test_batched_mcmc_refuses_other_kernels() -> None:
    kernel: Kernel = hmc.build(AR1.potential)
    for other in (kernel, HMC(potential_fn=lambda sites: sites["q"].sum())):
        with pytest.raises(InputError, match="expected a PyroKernel"):
            BatchedMCMC(other, 5)  # type: ignore[arg-type]
