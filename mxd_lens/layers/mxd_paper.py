"""The MxD trained as in its paper (Oldfield et al. 2025, arXiv 2505.21364): gate with a bias, all
weights started at random, no other loss than the output's error. Saved as an ordinary ``mxd``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig

from mxd_lens.layers.base import TrainingPairConfig, TrainingSparseLayer
from mxd_lens.layers.mxd import MxD, MxDConfig


@dataclass(kw_only=True)
class TrainingMxDPaperConfig(MxDConfig, TrainingPairConfig):
    """`MxDConfig`'s fields; the recipe has none."""

    @classmethod
    def architecture(cls) -> str:
        return "mxd_paper"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return MxDConfig


class TrainingMxDPaper(MxD, TrainingSparseLayer):
    """The MxD with the paper's recipe as `SAETrainer` trains it. Rows of W_dec have unit norm."""

    cfg: TrainingMxDPaperConfig  # type: ignore[assignment]
    label: ClassVar[str] = "MxD, paper's recipe"
    default_lr: ClassVar[float] = 1e-2

    def init_from(self, *_: Any) -> None:
        """Nothing: all weights start at random."""


register_sae_training_class("mxd_paper", TrainingMxDPaper, TrainingMxDPaperConfig)
