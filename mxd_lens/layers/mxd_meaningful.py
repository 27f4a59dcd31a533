"""The MxD whose output needs its choice of experts: the default recipe, and a loss on the part of
``a W_dec`` that is the same for all tokens. Less faithful; saved as an ordinary ``mxd``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig
from torch import Tensor

from mxd_lens.layers.base import pair_loss
from mxd_lens.layers.codes import Codes
from mxd_lens.layers.mxd import MxDConfig, TrainingMxD, TrainingMxDConfig


@dataclass(kw_only=True)
class TrainingMxDMeaningfulConfig(TrainingMxDConfig):
    """`TrainingMxDConfig`'s fields and one more."""

    mean_gate_coefficient: float = 1.0
    """Weight of `constant_share` of the gate, in units of the loss of an output of zero. The more
    it weighs, the more the layer needs its choice of experts, and the less faithful it is:
    ``docs/recipe.md``, experiment 5."""

    @classmethod
    def architecture(cls) -> str:
        return "mxd_meaningful"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return MxDConfig


class TrainingMxDMeaningful(TrainingMxD):
    """A `TrainingMxD` with that loss, which is of all tokens of a batch together."""

    cfg: TrainingMxDMeaningfulConfig  # type: ignore[assignment]
    label: ClassVar[str] = "MxD, meaningful recipe"
    splits_batches: ClassVar[bool] = False

    def losses(self, y_hat: Tensor, y: Tensor, codes: Codes) -> dict[str, Tensor]:
        losses = super().losses(y_hat, y, codes)
        constant = constant_share(codes.decode(self.W_dec, unit_norm=self.unit_norm_decoder))
        of_zero = pair_loss(torch.zeros_like(y), y)
        losses["mean_gate_loss"] = self.cfg.mean_gate_coefficient * constant * of_zero
        return losses


def constant_share(gate: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Squared norm of the mean over the mean squared norm: 0 if the gate averages to nothing, 1 if
    it is the same for all tokens."""
    return gate.mean(0).square().sum() / gate.square().sum(-1).mean().clamp_min(1e-12)


register_sae_training_class("mxd_meaningful", TrainingMxDMeaningful, TrainingMxDMeaningfulConfig)
