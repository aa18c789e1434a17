"""What a user can set: frozen dataclasses that refuse wrong values, and how they are read. Imports no torch."""

from ppl_vaebm.config.config import Config
from ppl_vaebm.config.data import DataConfig, DataName
from ppl_vaebm.config.ebm import EbmConfig, LatentTermConfig, Negatives, Objective
from ppl_vaebm.config.energy import EnergyConfig, EnergyLayout, NetKind
from ppl_vaebm.config.kernel import (
    SELF_TUNING_KERNELS,
    TUNABLE_KERNELS,
    KernelConfig,
    KernelName,
    SamplingConfig,
    TrainingKernelConfig,
)
from ppl_vaebm.config.model import DecoderName, ModelConfig, ModelKind, NvaeConfig
from ppl_vaebm.config.svi import SviConfig

__all__ = [
    "Config",
    "DataConfig",
    "DataName",
    "DecoderName",
    "EbmConfig",
    "EnergyConfig",
    "EnergyLayout",
    "KernelConfig",
    "KernelName",
    "LatentTermConfig",
    "ModelConfig",
    "ModelKind",
    "Negatives",
    "NetKind",
    "NvaeConfig",
    "Objective",
    "SELF_TUNING_KERNELS",
    "SamplingConfig",
    "SviConfig",
    "TUNABLE_KERNELS",
    "TrainingKernelConfig",
]
