"""TopK transcoders, the MxD's baselines.

    a = topk_k(relu(x W_enc + b_enc))               [.., d_sae]
    y = a W_dec + b_dec                             [.., d_out]    transcoder
    y = a W_dec + b_dec + x W_skip^T                [.., d_out]    skip transcoder

Names and shapes are those of SAELens' transcoders. Initialisation, norms and loss are those of the
baselines in the MxD paper's reference code (Oldfield et al. 2025, arXiv 2505.21364).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.registry import register_sae_class, register_sae_training_class
from torch import Tensor, nn

from mxd_lens.layers.base import PairConfig, SparseLayer, TrainingPairConfig, TrainingSparseLayer
from mxd_lens.layers.codes import Codes
from mxd_lens.layers.mlp import MLPShape


@dataclass(kw_only=True)
class TopKTranscoderConfig(PairConfig):
    """Shape of a TopK transcoder: `PairConfig`'s fields and k, units active per token."""

    k: int = 32

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"


class TopKTranscoder(SparseLayer):
    """A TopK transcoder for inference: an MLP to TransformerLens, an SAE to SAELens.

    Parameters (``cfg.dtype``): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out],
    b_dec [d_out].

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), ``hook_sae_acts_pre``
    [.., d_sae], ``hook_codes`` (a `SparseCodes`), ``hook_sae_acts_post`` [.., d_sae],
    ``hook_sae_recons`` (``a W_dec + b_dec``), ``hook_sae_output`` and ``hook_out`` [.., d_out].
    """

    cfg: TopKTranscoderConfig
    label: ClassVar[str] = "transcoder"
    default_lr: ClassVar[float] = 3e-2
    decode_reads_input: ClassVar[bool] = False
    b_dec: nn.Parameter

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_dec = nn.Parameter(self._zeros(self.cfg.d_out))

    def combine(self, x: Any, codes: Codes) -> Tensor:
        decoded = codes.decode(self.W_dec, unit_norm=self.unit_norm_decoder)
        return self.hook_sae_recons(decoded + self.b_dec)


@dataclass(kw_only=True)
class TopKSkipTranscoderConfig(TopKTranscoderConfig):
    """As `TopKTranscoderConfig`, for a `TopKSkipTranscoder`."""

    @classmethod
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKSkipTranscoder(TopKTranscoder):
    """A TopK transcoder beside a linear map of its input, ``W_skip`` [d_out, d_in].

    Parameters and hook points are `TopKTranscoder`'s; the skip term comes after
    ``hook_sae_recons``. Decoder and skip start at zero.
    """

    cfg: TopKSkipTranscoderConfig
    label: ClassVar[str] = "skip transcoder"
    default_lr: ClassVar[float] = 1e-2
    decode_reads_input: ClassVar[bool] = True
    W_skip: nn.Parameter

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec.zero_()
        self.W_skip = nn.Parameter(self._zeros(self.cfg.d_out, self.cfg.d_in))

    def combine(self, x: Tensor, codes: Codes) -> Tensor:
        return super().combine(x, codes) + x @ self.W_skip.T

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        return super().width_for(n_parameters - mlp.d_in * mlp.d_out, mlp)


@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TopKTranscoderConfig, TrainingPairConfig):
    """`TopKTranscoderConfig`'s fields; the recipe has none."""


@dataclass(kw_only=True)
class TrainingTopKSkipTranscoderConfig(TopKSkipTranscoderConfig, TrainingPairConfig):
    """As `TrainingTopKTranscoderConfig`, for a `TrainingTopKSkipTranscoder`."""


class TrainingTopKTranscoder(TopKTranscoder, TrainingSparseLayer):
    """The TopK transcoder as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``.

    Rows of W_dec are kept at unit norm.
    """

    cfg: TrainingTopKTranscoderConfig  # type: ignore[assignment]


class TrainingTopKSkipTranscoder(TopKSkipTranscoder, TrainingSparseLayer):
    """The TopK skip transcoder, likewise. Rows of W_dec, which start at zero, have any norm."""

    cfg: TrainingTopKSkipTranscoderConfig  # type: ignore[assignment]
    unit_norm_decoder: ClassVar[bool] = False


register_sae_class("topk_transcoder", TopKTranscoder, TopKTranscoderConfig)
register_sae_class("topk_skip_transcoder", TopKSkipTranscoder, TopKSkipTranscoderConfig)
register_sae_training_class("topk_transcoder", TrainingTopKTranscoder, TrainingTopKTranscoderConfig)
register_sae_training_class(
    "topk_skip_transcoder", TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig
)
