"""Building blocks of the networks, penalties on spectral norms and gains, and a bound on spectral norms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ppl_vaebm.errors import InputError
from ppl_vaebm.models.nvae_cells import BatchNorm2d, Conv2d, normalized

LEAK = 0.1  # of LeakyReLU: with SiLU the VAE of a staircase-like density reached -2.5 nats, with this -0.7
LIPSWISH_SCALE = 1.1  # swish(u) / 1.1 has a Lipschitz constant of about 1 (Chen et al. 2019, residual flows)


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for a block on a tensor's device; tensors without storage have no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


class LipSwish(nn.Module):
    """``u * sigmoid(u) / 1.1``, the energy network's activation (Xiao et al. 2021, appendix C)."""

    def forward(self, u: Tensor) -> Tensor:
        """Apply it elementwise."""
        return functional.silu(u) / LIPSWISH_SCALE


class FourierFeatures(nn.Module):
    """Random Fourier features (Tancik et al. 2020), with which a small net can fit a density with narrow modes.

    The output has cosines and sines of ``num`` frequencies of standard deviation ``scale``, radians per unit of input.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(dim, num))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, dim)`` to ``(n, 2 num)``."""
        with full_precision(x):  # bfloat16 would round an angle of 10 radians by up to 0.03
            angles = x.to(self.frequencies.dtype) @ self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def mlp(num_in: int, width: int, depth: int, num_out: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Make a network of ``depth`` hidden layers, ``(..., num_in)`` to ``(..., num_out)``; the output is linear."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(width if index else num_in, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width if depth else num_in, num_out))


def leaky_relu() -> nn.Module:
    """Make the activation of the fully connected nets."""
    return nn.LeakyReLU(LEAK)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, without normalisation, so rows of a batch stay independent.

    ``resample`` is ``same``; ``down``, a 2x2 mean at the end; or ``up``, nearest neighbour x2 at the start.
    """

    def __init__(self, num_in: int, num_out: int, activation: Callable[[], nn.Module], resample: str = "same") -> None:
        super().__init__()
        assert resample in ("same", "down", "up")
        self.resample = resample
        self.first = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.second = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.skip = nn.Conv2d(num_in, num_out, 1, bias=False) if num_in != num_out else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, num_in, s, s)`` to ``(n, num_out, s', s')`` with s' = s, s/2 or 2s."""
        if self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        out = self.skip(x) + self.second(self.activation(self.first(x)))
        if self.resample == "down":
            out = functional.avg_pool2d(out, 2)
        activated: Tensor = self.activation(out)
        return activated


def num_halvings(side: int) -> int:
    """Return how often the small nets halve an image of this side in pixels, at least once: 8 to 2, 32 to 4."""
    return max(1, round(math.log2(side)) - (1 if side < 16 else 2))


def check_side(event_shape: torch.Size, halvings: int) -> None:
    """Raise InputError for images that are not square or cannot be halved that often."""
    multiple = 1 << halvings
    if event_shape[-1] != event_shape[-2] or event_shape[-1] % multiple:
        raise InputError(
            f"the small convolutional nets take square images whose side is a multiple of {multiple}, "
            f"got shape {tuple(event_shape)}: set data.image-size"
        )


def net_kind(kind: str, event_shape: torch.Size, option: str) -> str:
    """Return ``vector`` or ``image``: the kind asked for, or that of the data for ``auto``.

    Raises:
        InputError: the kind does not fit data of this shape; the message names the option.
    """
    fitting = {1: "vector", 3: "image"}.get(len(event_shape))
    if fitting is None or kind not in ("auto", fitting):
        raise InputError(f"{option} {kind!r} does not fit data of shape {tuple(event_shape)}: leave it at auto")
    return fitting


# NVAE's schedule: power iterations per call on vectors that persist, and at the first call.
NUM_POWER_ITERATIONS = 4
NUM_FIRST_ITERATIONS = 40
NORM_EPSILON = 1e-3


class SpectralPenalty(nn.Module):
    """Sum of the largest singular values of a network's weight matrices, by power iteration.

    A convolution counts as its matrix ``(out, in * k * k)``, after weight normalisation, as in NVAE's spectral
    regularisation (Vahdat and Kautz 2020, section 3.2). Matrices of equal shape are iterated in one batched product.
    The vectors are buffers, so they are saved with the run and each call refines the last one's. The layers are no
    submodules.
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
    """List the layers that a spectral penalty covers, in the network's order; linear ones if asked."""
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

    Power iterations run in backward passes that reach the weight, and never in a call, so that all calls between two
    updates evaluate one function, as kernels need. The norm lags a little behind moving weights. A convolution counts
    as its matrix ``(out, in * k * k)``. The layer is changed in place; its vectors are buffers, saved with the weights.
    A deep copy does not refine them: use it for averages, which copy the buffers, and not for training.
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
