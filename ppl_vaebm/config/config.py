"""All options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppl_vaebm.config.data import DataConfig
from ppl_vaebm.config.ebm import TUNED_KERNELS, EbmConfig
from ppl_vaebm.config.energy import EnergyConfig
from ppl_vaebm.config.kernel import SamplingConfig, TrainingKernelConfig
from ppl_vaebm.config.model import ModelConfig
from ppl_vaebm.config.options import Checked, NonNegative, require
from ppl_vaebm.config.svi import SviConfig


@dataclass(frozen=True)
class Config(Checked):
    """All options that determine a run's numbers."""

    seed: int = 0
    """Seed of all random streams of the run."""
    threads: NonNegative = 0
    """CPU threads; with 0 PyTorch chooses."""
    device: str = "cpu"
    """PyTorch device: cpu, or an accelerator by its PyTorch name."""
    tensorboard: bool = False
    """Write the metrics and stage svi's pictures for TensorBoard too, to the run's folder tensorboard; needs
    pip install -e '.[log]'."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    svi: SviConfig = field(default_factory=SviConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)
    kernel: TrainingKernelConfig = field(default_factory=TrainingKernelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check_together(self) -> None:
        """Refuse values that do not fit together."""
        is_discretised = self.model.kind == "nvae" and self.model.nvae.decoder != "normal"
        expected = "0 with a discretised decoder"
        require(not (is_discretised and self.data.noise_sd), "data.noise-sd", expected, self.data.noise_sd)
        latent_steps = self.ebm.latent.steps
        has_term = self.energy.latent_term or not latent_steps
        require(has_term, "ebm.latent.steps", "0 without energy.latent-term", latent_steps)
        expected = "positive with energy.latent-balance, which needs a term that is fitted first"
        require(latent_steps > 0 or not self.energy.latent_balance, "ebm.latent.steps", expected, latent_steps)
        members = self.kernel.members if self.kernel.name == "mixture" else (self.kernel.name,)
        expected = f"one with a step size that ebm.tune can find ({', '.join(TUNED_KERNELS)}), or a mixture with one"
        has_step = bool(set(TUNED_KERNELS) & set(members))
        require(has_step or not self.ebm.tune, "kernel.name", expected, ", ".join(members))
