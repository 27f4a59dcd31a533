"""The MxD whose output needs its choice of experts: the default recipe, and a loss on the part of
``a W_dec`` that is the same for all tokens. Less faithful; saved as an ordinary ``mxd``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig

from mxd_lens.layers.mxd import MxDConfig, TrainingMxD, TrainingMxDConfig


@dataclass(kw_only=True)
class TrainingMxDMeaningfulConfig(TrainingMxDConfig):
    """`TrainingMxDConfig`'s fields."""

    mean_gate_coefficient: float = 1.0

    @classmethod
    def architecture(cls) -> str:
        return "mxd_meaningful"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return MxDConfig


class TrainingMxDMeaningful(TrainingMxD):
    """A `TrainingMxD` with another ``mean_gate_coefficient``."""

    cfg: TrainingMxDMeaningfulConfig  # type: ignore[assignment]
    label: ClassVar[str] = "MxD, meaningful recipe"


register_sae_training_class("mxd_meaningful", TrainingMxDMeaningful, TrainingMxDMeaningfulConfig)
