"""The VAE that a configuration asks for."""

from __future__ import annotations

import torch

from ppl_vaebm.config import ModelConfig
from ppl_vaebm.errors import InputError
from ppl_vaebm.models.nvae import build_nvae
from ppl_vaebm.models.small_vae import build_small_vae
from ppl_vaebm.models.vae import HierarchicalVAE


def build_vae(
    config: ModelConfig, event_shape: torch.Size, levels: int | None = None, is_dequantized: bool = False
) -> HierarchicalVAE:
    """Make the VAE that fits the data.

    Args:
        config: kind and sizes.
        event_shape: ``(d,)`` for points, ``(channels, side, side)`` for images.
        levels: of a pixel: 2 for binarised images, ``None`` where x is continuous.
        is_dequantized: whether noise fills the levels up, so that two levels are not the signs of binarised images.

    Returns:
        The VAE, freshly initialised from the global generator.

    Raises:
        InputError: a kind, a size or a decoder that does not fit the data.
    """
    if config.kind == "nvae":
        if levels == 2 and is_dequantized:
            raise InputError(
                "model.kind nvae takes images of at least 2 bits, got 1: set data.binarize for black and white"
            )
        return build_nvae(config.nvae, event_shape, levels)
    return build_small_vae(config, event_shape)
