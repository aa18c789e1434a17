"""Data-dependent initialisation: every layer starts with outputs of one mean and one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vaebm.errors import InputError
from ppl_vaebm.models.nvae_cells import Conv2d

STD = 0.2
"""Of every output channel; the mean is 0 (the code of VAEBM, Xiao et al. 2021)."""
MIN_STD = 1e-6
"""Below it a channel counts as constant: chosen by us, above the rounding of float32."""


@torch.no_grad()
def standardise_layers(net: nn.Module, layers: Sequence[nn.Module], call: Callable[[], object]) -> None:
    """Scale and shift layers, in place, so that on given data every channel of their outputs has mean 0 and sd 0.2.

    One pass, layer after layer (Salimans and Kingma 2016, section 3): each sees what those before it give once they are
    done. Weight-normalised layers change their gains, others their weights; layers without a bias keep their mean.
    Convolutions count before the mean over pixels that may follow.

    Args:
        net: that the layers belong to.
        layers: convolutions and fully connected ones; each is called once.
        call: calls the network with the data.

    Raises:
        InputError: a channel is constant on the data, or not finite, so that no scale gives it that deviation.
    """
    names = {module: name for name, module in net.named_modules()}
    handles = [layer.register_forward_pre_hook(partial(_standardise, names[layer])) for layer in layers]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()


def _standardise(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Give a layer the scale and the shift that its input asks for."""
    assert isinstance(layer, (Conv2d, nn.Linear))
    if layer.bias is not None:
        layer.bias.zero_()
    # Not by a call, which would come back here; and a subclass may go on to take a mean over pixels.
    if isinstance(layer, Conv2d):
        out: Tensor = Conv2d.forward(layer, inputs[0])
    else:
        out = nn.Linear.forward(layer, inputs[0])
    std, mean = torch.std_mean(out.double().transpose(0, 1).flatten(1), dim=1, correction=0)
    num_bad = int((~((std > MIN_STD) & std.isfinite())).sum())
    if num_bad:
        raise InputError(
            f"expected data on which every channel of the energy varies, for energy.data-init, found {num_bad} of "
            f"{len(std)} channels of {name} constant or not finite: set --no-energy.data-init, or look at the data"
        )
    scale = STD / std
    if isinstance(layer, Conv2d) and layer.log_gain is not None:
        layer.log_gain.add_(scale.log())
    else:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.copy_(-mean * scale)
