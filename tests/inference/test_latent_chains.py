"""Chains of the first latent alone, against densities in closed form; and the part of training that they serve."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from ppl_vaebm.config import Config, EbmConfig, EnergyConfig, KernelConfig, LatentTermConfig, TrainingKernelConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.data.load import load_data
from ppl_vaebm.data.splits import Points
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm import train as ebm
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.inference.ebm.latent_term import NUM_DRAWS, aggregate_posterior, fit_latent_term
from ppl_vaebm.inference.ebm.learner import EnergyLearner
from ppl_vaebm.inference.ebm.negatives import NegativePhase
from ppl_vaebm.inference.ebm.train import fit_ebm
from ppl_vaebm.inference.kernels.adaptation import warm_up
from ppl_vaebm.inference.kernels.base import KernelParams, init_params
from ppl_vaebm.inference.kernels.langevin import build_mala
from ppl_vaebm.inference.latent_chains import (
    NUM_LEVELS,
    LatentPotential,
    LatentStore,
    num_first,
    run_first_latent,
    with_first,
)
from ppl_vaebm.inference.latent_exchange import STEPS_PER_EXCHANGE
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import NoisePotential, noise_potential
from ppl_vaebm.inference.sampling import sample_by_chains
from ppl_vaebm.inference.svi.svi import new_vae
from ppl_vaebm.models.energy import Energy, build_energy
from ppl_vaebm.models.vaebm import VAEBM, build_vaebm
from ppl_vaebm.rng import global_rng, stream
from ppl_vaebm.runs import checkpoint
from ppl_vaebm.runs.run import Run
from tests.inference.wells import Wells
from tests.small_models import (
    FEW,
    NVAES,
    POSTERIOR_SLOPE,
    POSTERIOR_SPREAD,
    QUANTILE_NVAES,
    draw_noise,
    linear_vae,
    shipped_vae,
)
from tests.tiny import IMAGES

TILT = 0.7


class Tilted(Energy):
    """``E = TILT z_1``, all of it in the first latent's own term: under h the noise of z_1 is ``N(-TILT, 1)``."""

    def __init__(self) -> None:
        super().__init__()
        with global_rng(0):
            layer = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(layer.weight, TILT)
        self.first_latent, self.latent_net = "z_1", nn.Sequential(layer)

    def joint_term(self, x: Tensor, z: object) -> Tensor:
        return torch.zeros_like(x[:, 0])


def tilted(temperature: float = 1.0) -> VAEBM:
    vae = linear_vae()
    vae.model.temperature = temperature
    return VAEBM(vae, Tilted()).requires_grad_(False)


# --- the potential and its chains ------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FEW, *NVAES, *QUANTILE_NVAES])
def test_the_first_latent_is_the_transports(name: str) -> None:
    vae = shipped_vae(name)
    vae.model.temperature = 0.7
    eps = draw_noise(vae, 5)
    first, (_, z) = vae.first_latent(eps["eps_z_1"]), vae.transport(eps)
    torch.testing.assert_close(first["z_1"], z["z_1"], rtol=0, atol=0)
    assert list(first) == ["z_1"]


@pytest.mark.parametrize("name", [*FEW, *NVAES, *QUANTILE_NVAES])
def test_the_first_posterior_is_the_guides(name: str, seed: int) -> None:
    vae = shipped_vae(name)
    eps = draw_noise(vae, 3)
    x = vae.transport(eps)[0].detach()
    with global_rng(seed), torch.no_grad():
        z = vae.guide(x)["z_1"]
    with global_rng(seed), torch.no_grad():
        draw = vae.first_posterior(x).sample()
    torch.testing.assert_close(draw, z)


def test_phi_is_the_term_at_the_first_latent() -> None:
    vaebm = tilted(temperature=0.5)
    position = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    torch.testing.assert_close(LatentPotential(vaebm)(position), 0.5 * TILT * position[:, 0])


def run(
    potential: NoisePotential, num: int, num_steps: int, params: KernelParams | None = None
) -> tuple[Tensor, KernelParams]:
    generator = stream(0, "first latent")
    fresh = potential.draw_reference(generator, num)
    state, params = run_first_latent(potential, generator, fresh, num_steps, params)
    return state.position, params


def test_its_chains_have_the_terms_density() -> None:
    potential, num = noise_potential(tilted()), 4_000
    first, params = run(potential, num, 60)
    again, kept = run(potential, num, 20, params)
    assert kept is params
    for found in (first, again):
        assert abs(float(found.mean()) + TILT) < 4 / math.sqrt(num)
        assert float(found.var()) == pytest.approx(1.0, rel=4 * math.sqrt(2 / num))
    start, _ = run(potential, num, 0)
    assert abs(float(start.mean()) + TILT) > 20 / math.sqrt(num)  # negative control: where they began


def test_the_rest_of_the_noise_stays_as_it_is(generator: torch.Generator) -> None:
    potential = noise_potential(tilted())
    fresh = potential.draw_reference(generator, 3)
    moved = with_first(fresh, fresh[:, :1] + 1)
    assert num_first(potential) == 1
    torch.testing.assert_close(moved - fresh, torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64))
    potential.vaebm.energy.latent_net = None
    with pytest.raises(ValueError, match="set energy.latent-term"):
        potential.vaebm.energy.latent_term({"z_1": fresh})


def store_of(vaebm: VAEBM, num: int) -> LatentStore:
    return LatentStore(vaebm, stream(0, "store"), num)


def test_the_store_keeps_its_chains_and_its_ladder() -> None:
    store, other = store_of(tilted(), 20), store_of(tilted(), 20)
    start = store.positions.clone()
    rows, slots, infos = store.advance(stream(0, "advance"), 5, 3)
    is_moved = (store.positions != start).flatten(1).any(1)
    assert start.shape == (20, NUM_LEVELS, 1) and int(is_moved.sum()) == 5 and len(infos) == 3
    assert sorted(rows.flatten().tolist()) == sorted(store.positions[is_moved][:, -1].flatten().tolist())
    torch.testing.assert_close(rows, store.positions[slots, -1], rtol=0, atol=0)
    assert float(store.params.step_size) > 0.5  # all accept, so it grows
    other.load(store.state())
    again = [each.advance(stream(1, "advance"), 5, 3)[0] for each in (store, other)]
    assert torch.equal(*again)
    store.put(slots, rows + 1)
    is_put = torch.zeros_like(start)
    is_put[slots, -1] = 1
    torch.testing.assert_close(store.positions - other.positions, is_put)
    with pytest.raises(InputError, match="start the stage again with --overwrite"):
        store_of(tilted(), 21).load(store.state())


def test_replica_exchange_gives_the_modes_their_weights() -> None:
    num = 1_000
    vaebm = VAEBM(linear_vae(), Wells()).requires_grad_(False)
    store, generator = store_of(vaebm, num), stream(0, "wells")
    for _ in range(40):
        rows, _, _ = store.advance(generator, num, 5)
    error = math.sqrt(0.1 * 0.9 / num)
    potential = noise_potential(vaebm)
    for draws in (rows, run(potential, num, 400)[0]):
        assert abs(float((draws < 0).double().mean()) - 0.1) < 4 * error
        assert float(draws[draws > 0].std()) == pytest.approx(0.3, rel=4 / math.sqrt(1.8 * num))
    # Negative control: single chains from N(0, I) stay on the side that they came from, half of them on each.
    kernel = build_mala(LatentPotential(vaebm))
    fresh = potential.draw_reference(generator, num)[:, :1]
    state, params, _ = warm_up(kernel, generator, kernel.init(fresh), init_params(fresh, 0.5), 200)
    for _ in range(200):
        state, _ = kernel.step(generator, state, params)
    assert float((state.position < 0).double().mean()) > 0.3


def test_chains_restart_from_the_first_latents_own_chains() -> None:
    num = 4_000
    config = Config(
        ebm=EbmConfig(objective="mle", batch_size=num, replay_size=num, num_transitions=1, replay_probability=0.0),
        kernel=TrainingKernelConfig("mala", step_size=1e-6, target_acceptance=None),
    )
    phase = NegativePhase(config, noise_potential(tilted()))
    for step in range(3):
        phase(torch.zeros(num, 1, dtype=torch.float64), step, {"z_1": torch.zeros(num, 1, dtype=torch.float64)})
    sites = phase.potential.packing.unravel(phase.replay.positions)
    assert abs(float(sites["eps_z_1"].mean()) + TILT) < 4 / math.sqrt(num)
    assert abs(float(sites["eps_x"].mean())) < 4 / math.sqrt(num)
    assert "latents" in phase.state()


@pytest.mark.parametrize("objective", ["mle", "ratio", "importance"])
def test_the_penalty_leaves_a_held_term_out(objective: str) -> None:
    x, z = (torch.full((8, 1), 2.0, dtype=torch.float64) for _ in range(2))
    found = []
    for latent_steps in (5, 0):
        loop = EbmConfig(
            objective="ratio" if objective == "ratio" else "mle",
            negatives="importance" if objective == "importance" else "chains",
            num_importance=50,
            batch_size=8,
            replay_size=8,
            latent=LatentTermConfig(steps=latent_steps, store_size=8, num_chains=8),
        )
        energy = EnergyConfig(inputs="x-and-z", latent_term=True)
        phase = NegativePhase(Config(ebm=loop, energy=energy), noise_potential(tilted()))
        found.append(float(phase(x, 0, {"z_1": z}).energy_square))
    assert found[0] == pytest.approx(0.0, abs=1e-12)  # all of this energy is the term
    assert found[1] > (2 * TILT) ** 2  # negative control: what trains with the rest is penalised with it


@pytest.mark.parametrize("latent_steps", [0, 60])
def test_samples_may_start_from_them(latent_steps: int) -> None:
    num, config = 2_000, KernelConfig("mala", step_size=1e-6, target_acceptance=None)
    potential = noise_potential(tilted())
    potential.vaebm.energy.joint_term = lambda x, z: 0.0 * x[:, 0]  # type: ignore[method-assign]
    steps = [0, 1, STEPS_PER_EXCHANGE]
    chains = sample_by_chains(potential, replace(config), num=num, steps=steps, seed=0, latent_steps=latent_steps)
    start, end, _ = (chains.positions[count][:, 0].mean() for count in steps)
    assert abs(float(start)) < 4 / math.sqrt(num)
    if latent_steps:
        assert abs(float(end) + TILT) < 4 / math.sqrt(num)
    # The first latent's own sweeps evaluate no energy of x, an exchange evaluates one.
    assert chains.num_evals == STEPS_PER_EXCHANGE + (1 if latent_steps else 0)


# --- learning the term -----------------------------------------------------------------------------


def test_the_aggregate_posterior_is_the_guides_law_over_the_data() -> None:
    num, spread = 20_000, 0.8
    x = torch.full((num, 1), 1.5, dtype=torch.float64) + spread * torch.randn(
        num, 1, generator=stream(0, "x"), dtype=torch.float64
    )
    z = aggregate_posterior(Config(), Points(x), VAEBM(linear_vae().float(), Tilted().float()))
    variance = (POSTERIOR_SLOPE * spread) ** 2 + POSTERIOR_SPREAD**2
    assert z.shape == (NUM_DRAWS * num, 1)
    assert abs(float(z.mean()) - 1.5 * POSTERIOR_SLOPE) < 5 * math.sqrt(variance / num)
    assert float(z.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / num))


def shifted_config(**options: object) -> Config:
    latent = LatentTermConfig(**{"steps": 150, "num_sweeps": 5, "learning_rate": 1e-2, **options})  # type: ignore[arg-type]
    energy = EnergyConfig(width=16, num_fourier=0, inputs="x-and-z", latent_term=True)
    return Config(energy=energy, ebm=EbmConfig(objective="mle", replay_size=500, log_every=50, latent=latent))


def learnt(folder: Path, config: Config) -> tuple[VAEBM, LatentStore, Tensor]:
    vae = linear_vae().float()
    with global_rng(0):
        vaebm = VAEBM(vae, build_energy(config.energy, torch.Size([1]), vae.model.latent_shapes))
    x = 1.2 + 0.3 * torch.randn(5_000, 1, generator=stream(0, "x"))
    store = store_of(vaebm, 500)
    fit_latent_term(Run.create(folder), config, Points(x), vaebm, store)
    return vaebm, store, aggregate_posterior(config, Points(x), vaebm)


def test_chains_of_the_learnt_term_have_the_aggregate_posteriors_moments(tmp_path: Path) -> None:
    vaebm, store, z = learnt(tmp_path, shifted_config())
    potential = noise_potential(vaebm.requires_grad_(False))
    found = run(potential, 4_000, 200)[0][:, 0]
    for draws in (found, store.positions[:, -1, 0]):  # fresh chains, and those of training
        assert float(draws.mean()) == pytest.approx(float(z.mean()), abs=0.1)
        assert float(draws.std()) == pytest.approx(float(z.std()), rel=0.12)
    assert abs(float(z.mean())) > 0.5  # negative control: the prior has mean 0
    records = [json.loads(line) for line in Run(tmp_path).metrics_file.read_text().splitlines()]
    assert [record["step"] for record in records] == [50, 100, 150]
    assert all(record["stage"] == "ebm-latent" and math.isfinite(record["energy_gap"]) for record in records)


def test_the_result_is_the_average_of_its_weights(tmp_path: Path) -> None:
    ends = [
        torch.cat([part.detach().flatten() for part in learnt(tmp_path / str(decay), config)[0].energy.parameters()])
        for decay, config in ((decay, shifted_config(steps=1, ema_decay=decay)) for decay in (0.0, 0.9))
    ]
    with global_rng(0):
        energy = build_energy(shifted_config().energy, torch.Size([1]), linear_vae().model.latent_shapes)
    first = torch.cat([part.detach().flatten() for part in energy.parameters()])
    # After one step the average keeps a tenth of the start, if it averages at all.
    torch.testing.assert_close(ends[1] - first, 0.9 * (ends[0] - first))
    assert float((ends[0] - first).abs().max()) > 1e-3


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="first latent's term"):
        learnt(tmp_path, shifted_config(learning_rate=1e30))


def tiny_images(**latent: int) -> Config:
    tree = yaml.safe_load(IMAGES)
    tree["energy"] |= {"inputs": "x-and-z", "latent_term": True, "width": 8}
    part = {"steps": 3, "batch_size": 8, "num_chains": 4, "store_size": 8, "num_sweeps": 2, **latent}
    tree["ebm"] |= {"latent": part}
    return from_dict(tree, "a test")


def test_the_rest_of_stage_2_leaves_the_term_as_it_is(tmp_path: Path) -> None:
    config = tiny_images()
    data = load_data(config.data, config.seed)
    vae = new_vae(config, data).eval()
    learner = EnergyLearner(config, data, build_vaebm(config, vae), Guard(config))
    assert learner.energy.latent_net is not None
    fresh = [parameter.clone() for parameter in learner.energy.latent_net.parameters()]
    learner.learn_latent_term(Run.create(tmp_path / "a"))
    term = [parameter.clone() for parameter in learner.energy.latent_net.parameters()]
    assert any(not torch.equal(old, new) for old, new in zip(fresh, term, strict=True))
    learner.step(0, is_logged=True)
    assert all(torch.equal(old, new) for old, new in zip(term, learner.energy.latent_net.parameters(), strict=True))
    fitted = fit_ebm(Run.create(tmp_path / "b"), config, data, vae)
    assert fitted.energy.latent_net is not None
    for old, new in zip(term, fitted.energy.latent_net.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_a_fit_cut_off_after_the_first_part_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_images()
    data = load_data(config.data, config.seed)
    vae = new_vae(config, data).eval()
    whole = fit_ebm(Run.create(tmp_path / "whole"), config, data, vae)
    run = Run.create(tmp_path / "cut")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ebm, "_attempt", cut)
        fit_ebm(run, config, data, vae)
    assert checkpoint.available(run.checkpoints("ebm")) == [0]
    monkeypatch.setattr(EnergyLearner, "learn_latent_term", cut)  # it is not learnt again
    resumed = fit_ebm(run, config, data, vae, resume=checkpoint.load(run.checkpoints("ebm"), "last"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: EnergyConfig(latent_term=True), "energy.latent-term"),
        (lambda: Config(ebm=EbmConfig(latent=LatentTermConfig(steps=5))), "ebm.latent.steps"),
        (lambda: LatentTermConfig(steps=-1), "ebm.latent.steps"),
        (lambda: LatentTermConfig(batch_size=0), "ebm.latent.batch-size"),
        (lambda: LatentTermConfig(num_sweeps=1), "ebm.latent.num-sweeps"),
        (lambda: LatentTermConfig(ema_decay=1.0), "ebm.latent.ema-decay"),
        (lambda: LatentTermConfig(num_chains=65, store_size=64), "ebm.latent.num-chains"),
    ],
)
def test_options_that_cannot_work_are_refused(make: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()  # type: ignore[operator]
