"""Batch top-k gates: transcoders and MxDs with k active units per token on average.

Of a batch of n tokens the ``k n`` largest activations are kept, whichever tokens they are of
(Bussmann et al. 2024, arXiv 2412.06410). As in SAELens' `BatchTopKTrainingSAE`, training learns
one threshold, a moving average of the smallest activation that was kept, and the layer is saved
with it as a JumpReLU layer, whose codes do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig
from torch import Tensor, nn

from mxd_lens.layers.base import TrainingSparseLayer
from mxd_lens.layers.codes import SparseCodes
from mxd_lens.layers.mxd import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig
from mxd_lens.layers.transcoder import TrainingTopKTranscoder, TrainingTopKTranscoderConfig


def largest(
    chunks: Iterable[Float[Tensor, "chunk d_sae"]], n: int, batch: torch.Size, d_sae: int
) -> SparseCodes:
    """The n largest of the positive entries of all chunks together."""
    first, floor = 0, 0.0
    values, places = [], []  # places: in the flattened [tokens, d_sae]
    for pre in chunks:
        token, unit = (pre > floor).nonzero(as_tuple=True)
        values.append(pre[token, unit])
        places.append((first + token) * d_sae + unit)
        first += len(pre)
        if sum(map(len, values)) > n:
            kept, order = torch.cat(values).topk(n, sorted=False)
            values, places = [kept], [torch.cat(places)[order]]
            floor = kept.min()
    place, order = torch.cat(places).sort()
    counts = _count(place // d_sae, batch.numel())
    return SparseCodes(torch.cat(values)[order], place % d_sae, d_sae, counts.view(batch))


def above(
    chunks: Iterable[Float[Tensor, "chunk d_sae"]],
    threshold: Float[Tensor, "d_sae"],
    batch: torch.Size,
) -> SparseCodes:
    """The positive entries above their unit's threshold."""
    floor = threshold.clamp_min(0)
    values, units, counts = [], [], []
    for pre in chunks:
        token, unit = (pre > floor).nonzero(as_tuple=True)
        values.append(pre[token, unit])
        units.append(unit)
        counts.append(_count(token, len(pre)))
    return SparseCodes(
        torch.cat(values), torch.cat(units), len(threshold), torch.cat(counts).view(batch)
    )


def _count(token: Int[Tensor, "n"], n_tokens: int) -> Int[Tensor, "n_tokens"]:
    """How often each token occurs: ``bincount``, for which a GPU need not be waited for."""
    return token.new_zeros(n_tokens).index_add_(0, token, torch.ones_like(token))


class TrainingBatchTopK(TrainingSparseLayer):
    """The gate while it is trained; cfg has k and topk_threshold_lr."""

    splits_batches: ClassVar[bool] = False
    topk_threshold: Tensor
    """[], a buffer in float64."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.register_buffer("topk_threshold", zero)

    def pick(self, chunks: Iterable[Tensor], batch: torch.Size) -> SparseCodes:
        codes = largest(chunks, int(self.cfg.k * batch.numel()), batch, self.cfg.d_sae)
        return codes.with_values(codes.values.to(self.dtype))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        kept, threshold = output.hidden_pre.detach().double(), self.topk_threshold
        if len(kept):
            smallest = torch.where(kept > 0, kept, torch.inf).min()
            smallest = torch.where(smallest.isfinite(), smallest, threshold)
            threshold.lerp_(smallest, self.cfg.topk_threshold_lr)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        threshold = state_dict.pop("topk_threshold").to(self.dtype)
        state_dict["threshold"] = threshold.repeat(self.cfg.d_sae)


@dataclass(kw_only=True)
class TrainingBatchTopKTranscoderConfig(TrainingTopKTranscoderConfig):
    """As `TrainingTopKTranscoderConfig`; k is the average of a batch."""

    topk_threshold_lr: float = 0.01
    """Share of a step in the threshold's moving average."""

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


class TrainingBatchTopKTranscoder(TrainingBatchTopK, TrainingTopKTranscoder):
    """The batch top-k transcoder as `SAETrainer` trains it; saved as SAELens' JumpReLU one."""

    cfg: TrainingBatchTopKTranscoderConfig  # type: ignore[assignment]
    label: ClassVar[str] = "batch top-k transcoder"


@dataclass(kw_only=True)
class JumpReLUMxDConfig(MxDConfig):
    """As `MxDConfig`; k is the average that the gate was trained with."""

    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_mxd"


class JumpReLUMxD(MxD):
    """An MxD whose experts are active above a threshold: any number of them on a token."""

    cfg: JumpReLUMxDConfig
    label: ClassVar[str] = "batch top-k MxD"
    threshold: nn.Parameter
    """[d_sae]"""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = nn.Parameter(self._zeros(self.cfg.d_sae))

    def pick(self, chunks: Iterable[Tensor], batch: torch.Size) -> SparseCodes:
        codes = above(chunks, self.threshold, batch)
        return codes.with_values(codes.values.to(self.dtype))


@dataclass(kw_only=True)
class TrainingBatchTopKMxDConfig(TrainingMxDConfig):
    """As `TrainingMxDConfig`; k is the average of a batch."""

    topk_threshold_lr: float = 0.01
    """Share of a step in the threshold's moving average."""

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_mxd"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUMxDConfig


class TrainingBatchTopKMxD(TrainingBatchTopK, TrainingMxD):
    """The batch top-k MxD as `SAETrainer` trains it, with the default recipe."""

    cfg: TrainingBatchTopKMxDConfig  # type: ignore[assignment]
    label: ClassVar[str] = "batch top-k MxD"


register_sae_class("jumprelu_mxd", JumpReLUMxD, JumpReLUMxDConfig)
register_sae_training_class(
    "batchtopk_transcoder", TrainingBatchTopKTranscoder, TrainingBatchTopKTranscoderConfig
)
register_sae_training_class("batchtopk_mxd", TrainingBatchTopKMxD, TrainingBatchTopKMxDConfig)
