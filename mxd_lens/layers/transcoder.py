"""TopK transcoders, the MxD's baselines: SAELens' (skip) transcoders with a top-k gate.

    a = topk_k(relu(x W_enc + b_enc))               [.., d_sae]
    y = a W_dec + b_dec                             [.., d_out]    transcoder
    y = a W_dec + b_dec + x W_skip^T                [.., d_out]    skip transcoder

Their gate runs on the MxD's kernels. Initialisation, norms and loss are those of the baselines in
the MxD paper's reference code (Oldfield et al. 2025, arXiv 2505.21364).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.saes.transcoder import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor, nn

from mxd_lens.layers.base import TopKLayer, TrainingTopKLayer, check_topk


@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """Shape of a TopK transcoder.

    Args:
        d_out: width of the output (``d_in``, ``d_sae`` and the rest as in `SAEConfig`).
        k: units active per token, 1 <= k <= d_sae.

    Raises:
        ValueError: k out of range, or an SAE option a transcoder cannot honour.
    """

    k: int = 32
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_topk(self, "units")


@dataclass
class TopKSkipTranscoderConfig(TopKTranscoderConfig, SkipTranscoderConfig):
    """As `TopKTranscoderConfig`, for a `TopKSkipTranscoder`."""

    @classmethod
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKTranscoder(TopKLayer, Transcoder):
    """A TopK transcoder for inference: an MLP to TransformerLens, an SAE to SAELens.

    Parameters (``cfg.dtype``): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out],
    b_dec [d_out].

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), ``hook_sae_acts_pre``
    and ``hook_sae_acts_post`` [.., d_sae], ``hook_sae_recons`` (``a W_dec + b_dec``),
    ``hook_sae_output`` and ``hook_out`` [.., d_out].
    """

    cfg: TopKTranscoderConfig
    decode_reads_input: ClassVar[bool] = False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_dec = nn.Parameter(self._zeros(self.cfg.d_out))

    def _combine(self, x: Any, decoded: Tensor) -> Tensor:
        return self.hook_sae_recons(decoded + self.b_dec)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        # Not Transcoder's, which makes a TranscoderConfig and loses k.
        return super(Transcoder, cls).from_dict(config_dict)


class TopKSkipTranscoder(TopKTranscoder, SkipTranscoder):
    """A TopK transcoder beside a linear map of its input, ``W_skip`` [d_out, d_in].

    Parameters and hook points are `TopKTranscoder`'s; the skip term comes after
    ``hook_sae_recons``. Decoder and skip start at zero.
    """

    cfg: TopKSkipTranscoderConfig
    decode_reads_input: ClassVar[bool] = True

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec.zero_()

    def _combine(self, x: Tensor, decoded: Tensor) -> Tensor:
        return super()._combine(x, decoded) + x @ self.W_skip.T


@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TrainingSAEConfig):
    """`TopKTranscoderConfig`'s fields; the recipe has none."""

    d_out: int
    k: int = 32
    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = None

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_topk(self, "units")


@dataclass(kw_only=True)
class TrainingTopKSkipTranscoderConfig(TrainingTopKTranscoderConfig):
    """As `TrainingTopKTranscoderConfig`, for a `TrainingTopKSkipTranscoder`."""

    @classmethod
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TrainingTopKTranscoder(TopKTranscoder, TrainingTopKLayer):
    """The TopK transcoder as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``.

    Rows of W_dec are kept at unit norm.
    """

    cfg: TrainingTopKTranscoderConfig  # type: ignore[assignment]


class TrainingTopKSkipTranscoder(TopKSkipTranscoder, TrainingTopKTranscoder):
    """The TopK skip transcoder, likewise. Rows of W_dec, which start at zero, have any norm."""

    cfg: TrainingTopKSkipTranscoderConfig  # type: ignore[assignment]

    unit_norm_decoder = False


register_sae_class("topk_transcoder", TopKTranscoder, TopKTranscoderConfig)

register_sae_class("topk_skip_transcoder", TopKSkipTranscoder, TopKSkipTranscoderConfig)

register_sae_training_class("topk_transcoder", TrainingTopKTranscoder, TrainingTopKTranscoderConfig)

register_sae_training_class(
    "topk_skip_transcoder", TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig
)
