"""What a user can set: frozen dataclasses that refuse wrong values, and how they are read. Imports no torch."""

from ppl_vaebm.config.config import Config as Config
from ppl_vaebm.config.data import DataConfig as DataConfig
from ppl_vaebm.config.data import DataName as DataName
from ppl_vaebm.config.ebm import EbmConfig as EbmConfig
from ppl_vaebm.config.ebm import LatentTermConfig as LatentTermConfig
from ppl_vaebm.config.energy import EnergyConfig as EnergyConfig
from ppl_vaebm.config.kernel import KernelConfig as KernelConfig
from ppl_vaebm.config.kernel import KernelName as KernelName
from ppl_vaebm.config.kernel import SamplingConfig as SamplingConfig
from ppl_vaebm.config.kernel import TrainingKernelConfig as TrainingKernelConfig
from ppl_vaebm.config.model import ModelConfig as ModelConfig
from ppl_vaebm.config.model import NvaeConfig as NvaeConfig
from ppl_vaebm.config.svi import SviConfig as SviConfig
