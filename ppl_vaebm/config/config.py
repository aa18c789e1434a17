"""All options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppl_vaebm.config.checks import require, require_finite
from ppl_vaebm.config.data import DataConfig
from ppl_vaebm.config.ebm import EbmConfig
from ppl_vaebm.config.energy import EnergyConfig
from ppl_vaebm.config.kernel import SamplingConfig, TrainingKernelConfig
from ppl_vaebm.config.model import ModelConfig
from ppl_vaebm.config.svi import SviConfig


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers."""

    seed: int = 0
    """Seed of every random stream of the run."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    device: str = "cpu"
    """PyTorch device to compute on."""
    tensorboard: bool = False
    """Mirror the metrics and stage 1's pictures for TensorBoard, in the run's folder tensorboard; needs the packages of
    ppl_vaebm[log]."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    svi: SviConfig = field(default_factory=SviConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)
    kernel: TrainingKernelConfig = field(default_factory=TrainingKernelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        require_finite(self)
        require(self.threads >= 0, "threads", "0 or more", self.threads)
        scores_levels = self.model.kind == "nvae" and self.model.nvae.decoder != "normal"
        expected = "0 with a decoder that scores levels"
        require(not (scores_levels and self.data.noise_sd), "data.noise-sd", expected, self.data.noise_sd)
        has_term = self.energy.latent_term or not self.ebm.latent.steps
        require(has_term, "ebm.latent.steps", "0 without energy.latent-term", self.ebm.latent.steps)
        holds_term = self.ebm.latent.steps > 0 or not self.energy.latent_balance
        expected = "positive with energy.latent-balance, which keeps what a held term says"
        require(holds_term, "ebm.latent.steps", expected, self.ebm.latent.steps)
