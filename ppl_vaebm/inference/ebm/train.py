"""Stage 2: learn the energy on top of a frozen VAE, by contrastive maximum likelihood or as a density ratio.

:func:`fit_ebm` is the whole stage, from top to bottom.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vaebm.config import Config, EbmConfig
from ppl_vaebm.config.parsing import to_dict
from ppl_vaebm.data.load import Data
from ppl_vaebm.inference.ebm import losses
from ppl_vaebm.inference.ebm.guard import STAGE, Guard, go_back
from ppl_vaebm.inference.ebm.latent_term import TERM_STAGE, lacks_balance, load_or_fit_latent_term
from ppl_vaebm.inference.ebm.negatives import Moved, PersistentChains, replay_probability
from ppl_vaebm.inference.ebm.state import Training
from ppl_vaebm.inference.ebm.validation import Gain, likelihood_gain
from ppl_vaebm.inference.kernels.base import value_only
from ppl_vaebm.inference.log_z.base import weights_ess
from ppl_vaebm.inference.optim import DivergedError
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import seed_for, stream
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.run import Run

OBJECTIVES = {"ratio": losses.density_ratio, "importance": losses.importance_weighted, "chains": losses.contrastive}
WEIGHT_ESS_EVERY = 50
"""Steps between evaluations of VAE samples where the negatives are chains: they cost a batch of their own. Chosen by
us."""


def fit_ebm(
    run: Run, config: Config, data: Data, vae: HierarchicalVAE, resume: checkpoints.Checkpoint | None = None
) -> VAEBM:
    """Fit the energy, writing metrics and checkpoints into the run.

    All randomness of a step is a function of the seed, the step and the number of returns of the guard, so a resumed
    fit repeats an uninterrupted one bit for bit on a CPU.

    The VAE is frozen; ``resume`` is the checkpoint to continue from. Returns the VAEBM with averaged energy weights.

    Raises:
        InputError: the chains of the checkpoint are of another model.
        DivergedError: the energy diverged, and there is no guard or it has no checkpoint to go back to; or the first
            latent's term did, before the loop.
    """
    loop, guard, start = config.ebm, Guard(config), time.perf_counter()
    if resume is None:
        checkpoints.delete_after(run.checkpoints(TERM_STAGE), -1)
    else:
        guard.load(resume.state["guard"])
        guard.rewind(run, resume.step)
    training = begin(run, config, data, vae, guard, resume)
    if guard.is_stopped:
        print(guard.describe())
    progress = tqdm(total=loop.steps, desc="stage ebm", initial=training.num_done, disable=None, mininterval=1)
    while training.num_done < loop.steps and not guard.is_stopped:
        step, energy, chains = training.num_done, training.vaebm.energy, training.chains

        # Data.
        x, z = training.batch(step)

        # Negatives: ends of chains, or VAE samples. Networks and kernels may run in half precision, losses do not.
        kind, moved, x_negatives = negatives_at(loop, step), None, None
        generator = stream(guard.seed, "negatives", step, device=config.device)
        with torch.autocast(x.device.type, torch.bfloat16) if loop.bf16 else nullcontext():
            energy_data = energy(x, z)
            if kind == "chains":
                moved = chains.advance(generator, len(x), replay_probability(loop, step))
                position = moved.end
                x_negatives, z_negatives = chains.negatives(position)
                energy_negatives = energy(x_negatives, z_negatives)
                chains.put_back(moved, ~energy_negatives.isfinite())
            else:
                position = chains.potential.draw_reference(generator, loop.num_importance)
                energy_negatives = chains.potential(position)

        # Loss.
        loss = objective = OBJECTIVES[kind](energy_data, energy_negatives)
        if loop.energy_l2:
            learnt = chains.without_fixed_term(energy_data, z, energy_negatives, position)
            loss = loss + loop.energy_l2 * losses.mean_square(*learnt)
        if loop.spectral_penalty:
            loss = loss + loop.spectral_penalty * training.spectral()

        # Update.
        grad_norm = training.optimizer.step(loss, step, guard.rate_factor)
        training.average.update(energy)
        training.num_done = step + 1

        # Monitors, in one transfer from the device; the guard goes back to a checkpoint, or stops the stage.
        tensors = monitors_of(energy_data, energy_negatives, moved, x_negatives)
        values = torch.stack([value.float() for value in tensors.values()]).tolist()
        monitors = dict(zip(tensors, values, strict=True)) | {"grad_norm": grad_norm}
        reason = training.optimizer.failure(loss) or guard.watch(monitors)
        if reason is None and training.num_done == loop.steps:
            reason = training.fit_balance(run)
        if reason is not None:
            if not loop.guard:
                raise DivergedError(step, reason)
            saved = go_back(run, guard, step, reason)
            progress.write(guard.describe())
            training = begin(run, config, data, vae, guard, saved)
            progress.update(training.num_done - progress.n)
            continue

        # Record.
        done, is_last = training.num_done, training.num_done == loop.steps
        if done % loop.log_every == 0 or is_last:
            model = energy_negatives.mean() if moved is not None else losses.weighted_mean(energy_negatives)
            mean_data, mean_model = float(energy_data.detach().mean()), float(model.detach())
            record: dict[str, float | int | str] = {
                "stage": STAGE,
                "step": done,
                "seconds": time.perf_counter() - start,
                "loss": float(objective.detach()),
                "energy_data": mean_data,
                "energy_model": mean_model,
                "energy_gap": mean_data - mean_model,
                "lr": training.optimizer.learning_rate,
                "num_skipped": training.optimizer.num_skipped,
                "num_rollbacks": guard.num_rollbacks,
            }
            run.log(record | monitors | negatives_record(config, chains, moved, energy_negatives, step))
            progress.set_postfix(gap=f"{record['energy_gap']:.3f}", refresh=False)
        progress.update()

        # Checkpoint.
        is_checkpoint = done % loop.checkpoint_every == 0 or is_last
        if is_checkpoint or done % loop.validate_every == 0:
            gain = validate(run, config, data, training)
            if is_checkpoint:
                save(run, config, training, guard, gain)
    progress.close()

    if lacks_balance(training.average.module):  # the guard stopped the stage before its last step
        reason = training.fit_balance(run)
        if reason is not None:
            raise DivergedError(training.num_done - 1, reason)
        save(run, config, training, guard, validate(run, config, data, training))
    return training.averaged()


def begin(
    run: Run, config: Config, data: Data, vae: HierarchicalVAE, guard: Guard, saved: checkpoints.Checkpoint | None
) -> Training:
    """Begin an attempt, at a checkpoint or at the start.

    Where the first latent's term is a part of its own, the start has that term finished and frozen, and is saved as the
    checkpoint of step 0.
    """
    training = Training(config, data, vae, guard.seed)
    if saved is not None:
        training.load(saved)
    elif config.ebm.latent.steps:
        assert training.chains.partners is not None
        load_or_fit_latent_term(run, config, data.train, training.vaebm, training.chains.partners)
        training.average.module.load_state_dict(training.vaebm.energy.state_dict())
        training.chains.restart(guard.seed)
        save(run, config, training, guard, validate(run, config, data, training))
    return training


def negatives_at(loop: EbmConfig, step: int) -> Literal["ratio", "importance", "chains"]:
    """Return which objective a step has, by its negatives."""
    return "ratio" if loop.objective == "ratio" or step < loop.ratio_steps else loop.negatives


def monitors_of(
    energy_data: Tensor, energy_negatives: Tensor, moved: Moved | None, x_negatives: Tensor | None
) -> dict[str, Tensor]:
    """Return what the guard watches, ``()`` each; not the gap of VAE samples, which is noise if few weights count."""
    monitors = {"energy_sd": losses.largest_sd(energy_data, energy_negatives)}
    if moved is None or x_negatives is None:
        return monitors
    monitors["energy_gap"] = (energy_data.mean() - energy_negatives.mean()).detach()
    monitors["acceptance_rate"] = moved.acceptance_rate
    if moved.swap_rate is not None:
        monitors["exchange_rate"] = moved.swap_rate
    if x_negatives.dim() == 4:  # images
        monitors["saturation"] = (x_negatives.abs() > 1).float().mean()
    return monitors


def negatives_record(
    config: Config, chains: PersistentChains, moved: Moved | None, energy_negatives: Tensor, step: int
) -> dict[str, float]:
    """Return what is logged of the negatives of a step."""
    if moved is None:
        return {"weight_ess": weights_ess(-energy_negatives.detach())}
    record = chains.record(moved)
    if step == 0 or (step + 1) % WEIGHT_ESS_EVERY == 0:  # counted as log-every counts, or the two might never meet
        generator = stream(config.seed, "weight_ess", step, device=config.device)
        draws = chains.potential.draw_reference(generator, len(moved.end))
        record["weight_ess"] = weights_ess(-value_only(chains.potential, draws))
    return record


def validate(run: Run, config: Config, data: Data, training: Training) -> Gain:
    """Measure the likelihood gain of the averaged energy on held-out data, log and print it."""
    seed, done = seed_for(config.seed, "validation"), training.num_done
    gain = likelihood_gain(config, noise_potential(training.averaged()), data.validation, seed)
    record = {"validation_gain_nats": gain.nats, "validation_gain_error_nats": gain.error}
    run.log({"stage": STAGE, "step": done, **record, "log_z": gain.log_z.value, "log_z_ess": gain.log_z.ess})
    tqdm.write(f"step {done}: validation gain {gain.nats:.3f} nats, log Z {gain.log_z.value:.3f}")
    return gain


def save(run: Run, config: Config, training: Training, guard: Guard, gain: Gain) -> None:
    """Write a checkpoint."""
    checkpoints.save(
        run.checkpoints(STAGE),
        stage=STAGE,
        step=training.num_done,
        weights={name: module.state_dict() for name, module in training.modules().items()},
        state={"guard": guard.state(), **training.state()},
        config=to_dict(config),
        score=gain.score,
    )
