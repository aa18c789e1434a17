"""Cycles of kernels: one step runs every member in turn, so global and local moves share one chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppl_vaebm.inference.kernels.base import Kernel, KernelInfo, KernelParams, KernelState


def build_mixture(members: Sequence[Kernel], *, name: str = "mixture") -> Kernel:
    """Make the cycle of several kernels on one target; each leaves it invariant, so the cycle does.

    ``num_evals`` is the members' sum; acceptance rate and energy are those of the tunable member, or of the last one if
    none is. The cycle accepts if any member moved.

    Raises:
        ValueError: no members, more than one tunable member (they would share one step size), or a member with a
            warm-up of its own, which would not be run.
    """
    tunable = [index for index, member in enumerate(members) if member.target_acceptance is not None]
    if not members:
        raise ValueError("a mixture needs at least one member")
    if len(tunable) > 1:
        names = ", ".join(members[index].name for index in tunable)
        raise ValueError(f"a mixture may have one kernel with a step to tune, got {names}: fix the others' steps")
    for member in members:
        if member.warm_up is not None:
            raise ValueError(f"a mixture runs no warm-up of a member's own, which {member.name} has: leave it out")
    leading = tunable[0] if tunable else len(members) - 1

    def step(generator: torch.Generator, state: KernelState, params: KernelParams) -> tuple[KernelState, KernelInfo]:
        infos = []
        for member in members:
            state, info = member.step(generator, state, params)
            infos.append(info)
        return state, KernelInfo(
            infos[leading].acceptance_rate,
            torch.stack([info.is_accepted for info in infos]).any(0),
            torch.stack([info.is_divergent for info in infos]).any(0),
            infos[leading].energy,
            torch.stack([info.num_evals for info in infos]).sum(0),
        )

    return Kernel(name, members[0].init, step, members[leading].target_acceptance)
