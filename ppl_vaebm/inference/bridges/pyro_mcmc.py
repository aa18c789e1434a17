"""This package's kernels inside ``pyro.infer.MCMC``: Pyro's loop, hooks and progress bar for batched chains.

A kernel of Pyro moves one chain. These move all chains at once, and a plain ``MCMC`` takes the chain axis for a part of
the event: :class:`BatchedMCMC` restores the axis, so that R-hat compares chains.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.bridges.pyro_samplers import flat_packing
from ppl_vaebm.inference.kernels.adaptation import start_averaging, update_averaging, with_step_size
from ppl_vaebm.inference.kernels.base import Kernel, KernelParams
from ppl_vaebm.inference.kernels.packing import Packing
from ppl_vaebm.rng import stream

Sites = dict[str, Tensor]


class PyroKernel(MCMCKernel):
    """A kernel for Pyro whose step moves all chains, each accepted or rejected on its own.

    Every run draws from the stream of ``seed``: Pyro's seed has no effect, and a second run repeats the first. Warm-up
    steps tune the step size by dual averaging, as :func:`~ppl_vaebm.inference.kernels.adaptation.warm_up` does. A
    kernel with its own warm-up runs all of it in :meth:`setup`, and does not move in Pyro's warm-up steps.

    Args:
        kernel: the transition.
        position: starts, ``(C, D)``.
        params: parameters of the kernel, or where its warm-up starts.
        seed: seed of the run.
        packing: the named sites that Pyro samples; ``None`` for one flat site, ``position``.
    """

    # Pyro reads these from every kernel: there is no model to trace, and noise is unconstrained.
    model = None
    transforms: Mapping[str, Any] = {}

    def __init__(
        self, kernel: Kernel, position: Tensor, params: KernelParams, *, seed: int, packing: Packing | None = None
    ) -> None:
        self.kernel = kernel
        self.packing = packing or flat_packing(position.shape[1])
        self.seed = seed
        self.start_params = self.params = params
        self._start = position.detach()
        self._begin(num_warmup=0)

    @property
    def num_chains(self) -> int:
        """C."""
        return len(self._start)

    @property
    def initial_params(self) -> Sites:
        """The chains' starts by site, ``(C, *shape)``."""
        return self.packing.unravel(self._start)

    @initial_params.setter
    def initial_params(self, sites: Sites) -> None:
        self._start = self.packing.ravel(sites).detach()

    def _begin(self, num_warmup: int) -> None:
        self.params = self.start_params
        self.warmup_evals = 0
        """Evaluations of the potential in the warm-up, over all chains."""
        self.num_evals = 0
        """Evaluations behind the draws, over all chains."""
        self._num_warmup, self._num_steps = num_warmup, 0
        self._averaging = start_averaging(float(self.params.step_size))
        self._acceptance: list[Tensor] = []
        self._is_divergent: list[Tensor] = []
        self._sites: Sites = {}

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Begin a run at the start; Pyro calls this, with arguments for a model, which there is none of here."""
        self._begin(warmup_steps)
        self._generator = stream(self.seed, "pyro-mcmc", self.kernel.name, device=self._start.device)
        self._state = self.kernel.init(self._start)
        self._sites = self.packing.unravel(self._state.position)
        if self.kernel.warm_up is not None and warmup_steps:
            self._state, self.params, self.warmup_evals = self.kernel.warm_up(
                self._generator, self._state, self.params, warmup_steps
            )
            self._sites = self.packing.unravel(self._state.position)

    def sample(self, params: Sites) -> Sites:
        """Move every chain by one step; Pyro calls this with, and gets back, positions by site ``(C, *shape)``."""
        is_warmup = self._num_steps < self._num_warmup
        self._num_steps += 1
        if is_warmup and self.kernel.warm_up is not None:
            return self._sites
        if params is not self._sites:  # a caller moved the chains between two steps
            self._state = self.kernel.init(self.packing.ravel(params).detach())
        self._state, info = self.kernel.step(self._generator, self._state, self.params)
        if is_warmup:
            self.warmup_evals += int(info.num_evals.sum())
            self._tune(float(info.acceptance_rate.mean()))
        else:
            self.num_evals += int(info.num_evals.sum())
            self._acceptance.append(info.acceptance_rate)
            self._is_divergent.append(info.is_divergent)
        self._sites = self.packing.unravel(self._state.position)
        return self._sites

    def _tune(self, acceptance_rate: float) -> None:
        if self.kernel.target_acceptance is None:
            return
        self._averaging = update_averaging(self._averaging, acceptance_rate, self.kernel.target_acceptance)
        is_last = self._num_steps == self._num_warmup
        log_step = self._averaging.log_step_average if is_last else self._averaging.log_step
        self.params = with_step_size(self.params, math.exp(log_step))

    def logging(self) -> OrderedDict[str, str]:
        """Return the text of the progress bar, under Pyro's names: step size, and mean acceptance since warm-up."""
        rate = f"{self.acceptance_rate.mean():.3f}" if self._acceptance else "-"
        return OrderedDict([("step size", f"{float(self.params.step_size):.2e}"), ("acc. prob", rate)])

    @property
    def acceptance_rate(self) -> Tensor:
        """Mean acceptance probability of each chain over the draws, ``(C,)``."""
        return torch.stack(self._acceptance).mean(0)

    @property
    def is_divergent(self) -> Tensor:
        """Whether each draw diverged, ``(C, N)``."""
        return torch.stack(self._is_divergent, dim=1)

    def diagnostics(self) -> dict[str, Any]:
        """Return the draws at which any chain diverged and the mean acceptance rate, under Pyro's names."""
        return _diagnostics(self.is_divergent.any(0), self.acceptance_rate.mean())

    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """Return the divergent draws and the mean acceptance rate of every chain, under Pyro's names."""
        return list(map(_diagnostics, self.is_divergent, self.acceptance_rate))

    def report(self) -> Mapping[str, float | list[float]]:
        """Return the kernel's report of the whole run, such as swap rates; empty for most kernels."""
        return self.kernel.report(self._state, self.params) if self.kernel.report else {}


def _diagnostics(is_divergent: Tensor, acceptance_rate: Tensor) -> dict[str, Any]:
    divergences = is_divergent.nonzero().flatten().tolist()
    return {"divergences": divergences, "acceptance rate": float(acceptance_rate)}


class BatchedMCMC(MCMC):
    """``pyro.infer.MCMC`` of a :class:`PyroKernel`, with a chain axis.

    ``get_samples(group_by_chain=True)`` has shapes ``(C, N, *shape)``, ``summary()`` and ``diagnostics()`` have R-hat
    over chains and the divergences of each chain, and ``arviz.from_pyro`` accepts it. A plain ``MCMC`` runs the kernel
    too, but returns ``(1, N, C, *shape)``, and its R-hat does not compare the chains.

    Args:
        num_samples: draws per chain, N.
        warmup_steps: number of warm-up steps; as many as draws if not given, as in Pyro.
        initial_params: starts by site, ``(C, *shape)``, instead of the kernel's.
        hook_fn: called after every step with the kernel, the sites, the stage and the index.
    """

    def __init__(
        self,
        kernel: PyroKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        *,
        initial_params: Sites | None = None,
        hook_fn: Callable[[MCMCKernel, Sites, str, int], None] | None = None,
        disable_progbar: bool = False,
    ) -> None:
        if not isinstance(kernel, PyroKernel):
            raise InputError(
                f"expected a PyroKernel, which knows its chains, found {type(kernel).__name__}: "
                "use pyro.infer.MCMC for other kernels"
            )
        options = {"initial_params": initial_params, "hook_fn": hook_fn, "disable_progbar": disable_progbar}
        super().__init__(kernel, num_samples, warmup_steps, **options)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run all chains; see :meth:`pyro.infer.MCMC.run`."""
        self.num_chains = 1  # Pyro runs a kernel once for each of its chains
        super().run(*args, **kwargs)
        samples: Sites = super().get_samples(group_by_chain=True)
        self._samples: Any = {name: draws.squeeze(0).transpose(0, 1) for name, draws in samples.items()}
        self.num_chains = self.kernel.num_chains
        self._diagnostics: list[Any] = self.kernel.chain_diagnostics()

    def diagnostics(self) -> dict[str, Any]:
        """Return ``n_eff`` and ``r_hat`` of each site, and ``divergences`` and ``acceptance rate`` of each chain.

        The names of chains, ``chain 0``, ``chain 1``, ... in Pyro, have leading zeros here, because ArviZ sorts them.
        """
        diagnostics: dict[str, Any] = super().diagnostics()
        width = len(str(self.num_chains - 1))
        for name in self._diagnostics[0]:
            diagnostics[name] = {f"chain {i:0{width}}": row[name] for i, row in enumerate(self._diagnostics)}
        return diagnostics
