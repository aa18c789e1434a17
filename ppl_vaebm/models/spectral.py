"""How far a network can stretch its input: penalties on spectral norms and on gains of normalisations, and a bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ppl_vaebm.models.nvae_cells import BatchNorm2d, Conv2d, normalized

# NVAE's schedule: so many power iterations a call on vectors that persist, more at the start.
NUM_POWER_ITERATIONS = 4
NUM_FIRST_ITERATIONS = 40
NORM_EPSILON = 1e-3


class SpectralPenalty(nn.Module):
    """Sum of the largest singular values of a network's weight matrices, by power iteration.

    A convolution counts as its matrix ``(out, in * k * k)``, after weight normalisation, as in NVAE's spectral
    regularisation (Vahdat and Kautz 2020, section 3.2). Matrices of equal shape are iterated in one batched product.
    The vectors are buffers, so they are saved with the run and each call refines the last one's.

    Args:
        layers: the layers whose weights count; held, not owned.
    """

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d]) -> None:
        super().__init__()
        alike: dict[tuple[object, ...], list[nn.Linear | nn.Conv2d]] = defaultdict(list)
        for layer in layers:
            is_normalized = isinstance(layer, Conv2d) and layer.log_gain is not None
            alike[(*layer.weight.shape, is_normalized)].append(layer)
        self._groups = tuple(tuple(group) for group in alike.values())
        for index, group in enumerate(self._groups):
            weight = group[0].weight
            u = torch.randn(len(group), weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
            self.register_buffer(f"u_{index}", normalize(u, dim=1, eps=NORM_EPSILON))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return the sum, ``()``; its gradient flows through the weights, not through the vectors."""
        if not self._groups:
            return torch.zeros(())
        num_iterations = NUM_POWER_ITERATIONS if self.get_buffer("num_calls") else NUM_FIRST_ITERATIONS
        self.get_buffer("num_calls").add_(1)
        norms = [
            _largest_singular_values(_stacked_weights(group), self.get_buffer(f"u_{index}"), num_iterations).sum()
            for index, group in enumerate(self._groups)
        ]
        return torch.stack(norms).sum()


def _stacked_weights(group: Sequence[nn.Linear | nn.Conv2d]) -> Tensor:
    """Return the weights in use of layers of one shape, as matrices ``(layers, out, in)``."""
    v = torch.stack([layer.direction() if isinstance(layer, Conv2d) else layer.weight for layer in group])
    gains: list[Tensor] = [
        layer.log_gain for layer in group if isinstance(layer, Conv2d) and layer.log_gain is not None
    ]
    return (normalized(v, torch.stack(gains)) if gains else v).flatten(2)


def _largest_singular_values(matrices: Tensor, u: Tensor, num_iterations: int) -> Tensor:
    """Refine u, ``(layers, out, 1)``, in place, and return ``u^T W v`` of every matrix, ``(layers,)``."""
    with torch.no_grad():
        for _ in range(num_iterations):
            v = normalize(matrices.mT @ u, dim=1, eps=NORM_EPSILON)
            u.copy_(normalize(matrices @ v, dim=1, eps=NORM_EPSILON))
    return (u.clone().mT @ matrices @ v).flatten()


def spectral_layers(net: nn.Module, has_linear: bool) -> list[nn.Linear | nn.Conv2d]:
    """List the layers of a network that a spectral penalty is put on.

    Args:
        net: the network.
        has_linear: whether fully connected layers count; NVAE's squeeze-excite layers do not.

    Returns:
        The layers, in the network's order.
    """
    kinds = (nn.Linear, nn.Conv2d) if has_linear else (nn.Conv2d,)
    return [module for module in net.modules() if isinstance(module, kinds)]


def norm_gain_penalty(net: nn.Module) -> Tensor:
    """Sum the largest absolute gain of every batch normalisation, ``()`` (Vahdat and Kautz 2020, section 3.2)."""
    gains: dict[int, list[Tensor]] = defaultdict(list)
    for module in net.modules():
        if isinstance(module, BatchNorm2d):
            gains[len(module.weight)].append(module.weight)
    if not gains:
        return torch.zeros(())
    return torch.stack([torch.stack(alike).abs().amax(1).sum() for alike in gains.values()]).sum()


def bound_spectral_norm(layer: nn.Linear | nn.Conv2d) -> None:
    """Divide a layer's weight by its largest singular value (Miyato et al. 2018), by PyTorch's own parametrisation.

    Its power iterations run in every backward pass that reaches the weight, and never in a call. Calls between two
    updates are thus of one function, whatever their number, as kernels need; theirs are derivatives by positions and
    reach no weight. The norm lags a little behind weights that move. A convolution counts as its matrix
    ``(out, in * k * k)``. A deep copy takes the vectors as they are and does not refine them: it is for averages, which
    take over the buffers, and not for training.

    Args:
        layer: changed in place; its vectors are buffers, saved with the weights.
    """
    bounded = parametrizations.spectral_norm(layer, n_power_iterations=NUM_POWER_ITERATIONS)
    norm, original = _spectral_norm_of(bounded)

    def refine(weight: Tensor) -> None:
        norm.train()
        with torch.no_grad():
            norm(weight)
        norm.eval()

    norm.eval()
    original.register_post_accumulate_grad_hook(refine)


def hold_spectral_norms(net: nn.Module) -> None:
    """Keep the power iterations of :func:`bound_spectral_norm` out of calls; training mode would run them there."""
    for module in net.modules():
        if is_parametrized(module, "weight"):
            _spectral_norm_of(module)[0].eval()


def _spectral_norm_of(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return a layer's parametrisation, and the weight that it divides."""
    parametrised = layer.get_submodule("parametrizations.weight")
    assert isinstance(parametrised, ParametrizationList)
    return parametrised[0], parametrised.original
