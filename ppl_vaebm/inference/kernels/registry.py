"""The batched kernels by name."""

from __future__ import annotations

from torch import Tensor

from ppl_vaebm.config import KernelConfig, KernelName
from ppl_vaebm.inference.kernels import chees, gradient_free, hmc, langevin, tempered
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams, Potential, init_params
from ppl_vaebm.inference.kernels.cycle import build_mixture
from ppl_vaebm.inference.kernels.ladder import start_ladder

# Where warm-up starts from; langevin, which nothing tunes, has the eta = h^2 = 1e-3 that was the best of those
# tried on gaussians25 (experiments/README.md).
DEFAULT_STEP_SIZES = {
    "langevin": 1e-3**0.5,
    "mala": 0.1,
    "hmc": 0.1,
    "chees": 0.1,
    "pcn": 0.3,
    "independence": gradient_free.FULL_STEP,
    "elliptical": gradient_free.FULL_STEP,
    "tempered": 0.1,
}


def build_kernel(config: KernelConfig, potential: Potential) -> Kernel:
    """Make the kernel that a configuration names, on Phi relative to N(0, I).

    Raises:
        ValueError: a mixture of several kernels with a step to tune.
    """
    if config.name == "mixture":
        return build_mixture([_build_one(name, config, potential) for name in config.members])
    return _build_one(config.name, config, potential)


def _build_one(name: KernelName, config: KernelConfig, potential: Potential) -> Kernel:
    asked = config.target_acceptance
    if name == "langevin":
        return langevin.build_langevin(potential)
    if name == "mala":
        return langevin.build_mala(
            potential, integrator=config.integrator, target_acceptance=asked or langevin.MALA_TARGET_ACCEPTANCE
        )
    if name == "hmc":
        return hmc.build(
            potential,
            integrator=config.integrator,
            num_steps=config.num_steps,
            max_num_steps=config.max_num_steps or hmc.HMC_MAX_NUM_STEPS,
            jitter=config.jitter,
            target_acceptance=asked or hmc.HMC_TARGET_ACCEPTANCE,
        )
    if name == "chees":
        return chees.build(
            potential,
            integrator=config.integrator,
            max_num_steps=config.max_num_steps or chees.CHEES_MAX_NUM_STEPS,
            target_acceptance=asked or chees.CHEES_TARGET_ACCEPTANCE,
        )
    if name == "tempered":
        return tempered.build(
            potential,
            num_levels=config.num_levels,
            num_steps=config.num_steps or tempered.NUM_MOVE_STEPS,
            target_acceptance=asked or tempered.TEMPERED_TARGET_ACCEPTANCE,
        )
    if name == "pcn":
        return gradient_free.build_pcn(potential, target_acceptance=asked or gradient_free.PCN_TARGET_ACCEPTANCE)
    if name == "independence":
        return gradient_free.build_independence(potential)
    assert name == "elliptical", name
    return gradient_free.build_elliptical(potential)


def start_params(config: KernelConfig, position: Tensor) -> KernelParams:
    """Make the parameters that a configuration's kernel starts from, like a position ``(C, D)``.

    A step that is not given is the kernel's default, and the ladder of a tempered kernel is the one that its warm-up
    starts from.
    """
    step_size = config.step_size
    if step_size is None:
        names = config.members if config.name == "mixture" else (config.name,)
        step_size = min(DEFAULT_STEP_SIZES[name] for name in names)
    params = init_params(position, step_size, config.trajectory_length)
    if config.name != "tempered":
        return params
    return params._replace(ladder=start_ladder(config.num_levels, params, config.num_steps or tempered.NUM_MOVE_STEPS))
