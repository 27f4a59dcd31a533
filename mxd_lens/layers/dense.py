"""The dense control: the MxD's dense part without its experts, trained the same way.

    y = z W_dec + b_dec,  z = hidden units, see `HiddenUnits`

An MLP or GLU of the original's hidden width from a random start. What a sparse layer recovers
beyond it is what its experts add; see ``docs/results.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.registry import register_sae_class, register_sae_training_class
from torch import Tensor, nn

from mxd_lens.layers.base import TrainingPairConfig, TrainingPairLayer
from mxd_lens.layers.codes import Codes, DenseCodes
from mxd_lens.layers.hidden import HiddenConfig, HiddenUnits
from mxd_lens.layers.mlp import MLPShape


@dataclass(kw_only=True)
class DenseConfig(HiddenConfig):
    """Shape of a dense control: `HiddenConfig`'s fields, ``d_sae`` being the hidden width."""

    @classmethod
    def architecture(cls) -> str:
        return "dense"


class Dense(HiddenUnits):
    """A dense control: an MLP to TransformerLens, an SAE whose activations are z to SAELens.

    Parameters: those of `HiddenUnits`, W_dec [d_sae, d_out] and b_dec [d_out].

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), those of `HiddenUnits`,
    ``hook_sae_acts_post`` (z) [.., d_sae], ``hook_sae_recons``, ``hook_sae_output`` and
    ``hook_out`` [.., d_out].
    """

    cfg: DenseConfig
    label: ClassVar[str] = "dense control"
    default_lr: ClassVar[float] = 3e-2
    has_experts: ClassVar[bool] = False
    multiple_of: ClassVar[int] = 1
    decode_reads_input: ClassVar[bool] = False
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    @property
    def d_hidden(self) -> int:
        return self.cfg.d_sae

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the MxD's dense part: uniform in +-1/sqrt(fan_in), the decoder at zero."""
        self.initialize_hidden_units()
        self.W_dec = nn.Parameter(self._zeros(self.cfg.d_sae, self.cfg.d_out))
        self.b_dec = nn.Parameter(self._zeros(self.cfg.d_out))

    def compute(self, x: Tensor) -> tuple[Tensor, Codes]:
        acts = self.hook_sae_acts_post(self._encode(x))
        return self._decode(x, acts), DenseCodes(acts)

    def _encode(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def _decode(self, x: Any, acts: Tensor) -> Tensor:
        return self.hook_sae_recons(acts @ self.W_dec + self.b_dec)

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        """The original's hidden width, whatever the budget: that is the control."""
        return mlp.d_hidden


@dataclass(kw_only=True)
class TrainingDenseConfig(DenseConfig, TrainingPairConfig):
    """`DenseConfig`'s fields; the recipe has none."""


class TrainingDense(Dense, TrainingPairLayer):
    """The dense control as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``."""

    cfg: TrainingDenseConfig  # type: ignore[assignment]


register_sae_class("dense", Dense, DenseConfig)
register_sae_training_class("dense", TrainingDense, TrainingDenseConfig)
