"""SAELens' own SAEs and transcoders, answering as a `Layer` does."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from mxd_lens.layers.base import has_hooks
from mxd_lens.layers.codes import Codes, DenseCodes, SparseCodes
from mxd_lens.layers.kernels import topk_gate
from mxd_lens.layers.layer import Layer
from mxd_lens.layers.mlp import MLPShape


class SAELensLayer(Layer):
    """Any layer of SAELens' that it saves: its activations are what its ``encode`` gives."""

    def __init__(self, sae: Any):
        self._sae = sae

    @property
    def sae(self) -> Any:
        return self._sae

    def run_with_codes(
        self, x: Float[Tensor, "tokens d_in"]
    ) -> tuple[Float[Tensor, "tokens d_out"], Codes, Float[Tensor, "tokens d_out"]]:
        names = ["hook_sae_acts_post", self.sparse_hook]
        y, cache = self.sae.run_with_cache(x, names_filter=names)
        return y, DenseCodes(cache[names[0]].to_dense()), cache[names[1]]

    def codes(self, x: Float[Tensor, "tokens d_in"]) -> Codes:
        return DenseCodes(self.sae.encode(x).to_dense())

    def steering_directions(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """Rows of W_dec; of unit norm where the SAE scales activations by it."""
        rows = super().steering_directions(units, x)
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            return F.normalize(rows, dim=-1)
        return rows


class SAELensTranscoder(SAELensLayer):
    """One of SAELens' transcoders. It trains none: such a layer was trained elsewhere, or saved
    by a training class of this package."""

    label: ClassVar[str] = "transcoder"

    def at_codes(
        self, x: Float[Tensor, "*batch tokens d_in"], codes: Codes
    ) -> Float[Tensor, "*#batch tokens d_out"]:
        decoded = super().at_codes(x, codes)
        skip = getattr(self.sae, "W_skip", None)
        return decoded if skip is None else decoded + x @ skip.T


class OutputSAE(SAELensLayer):
    """An SAE of the MLP's output."""

    label: ClassVar[str] = "SAE of the MLP's output"
    default_lr: ClassVar[float] = 3e-3
    reads_input: ClassVar[bool] = False
    architecture: ClassVar[str]

    @classmethod
    def training_class(cls) -> Any:
        return get_sae_training_class(cls.architecture)[0]

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        return round(n_parameters / (2 * mlp.d_out))


class TopKSAELayer(OutputSAE):
    """SAELens' TopK SAE, which trains on the kernels of this package."""

    @classmethod
    def training_class(cls) -> Any:
        return SparseTopKTrainingSAE


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """`TopKTrainingSAE`, whose configuration, weights and losses it has, without [batch, d_sae]
    tensors.

    It takes SAELens' own dense step where that is needed: as long as there are dead units, for
    the auxiliary loss reads all their pre-activations, and while the activations are hooked.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Loss: mean over tokens of the summed squared error (SAELens')."""
        dead = step_input.dead_neuron_mask
        hooked = has_hooks(self.hook_sae_acts_pre) or has_hooks(self.hook_sae_acts_post)
        if hooked or (dead is not None and dead.any()):
            return super().training_forward_pass(step_input)
        W_enc, b_enc, W_dec = self.W_enc, self.b_enc, self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            norm = W_dec.norm(dim=-1)
            W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
        sae_in = self.process_sae_in(step_input.sae_in)
        codes = SparseCodes(*topk_gate(sae_in, W_enc, b_enc, self.cfg.k), self.cfg.d_sae)
        recons = self.hook_sae_recons(codes.decode(W_dec) + self.b_dec)
        sae_out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)
        loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=codes.for_counting(),
            hidden_pre=codes.values,
            loss=loss,
            losses={"mse_loss": loss, "auxiliary_reconstruction_loss": loss.new_zeros(())},
        )


def _output_sae(architecture: str) -> type[SAELensLayer]:
    named = {"architecture": architecture, "label": f"{OutputSAE.label} ({architecture})"}
    return type("OutputSAE", (OutputSAE,), named)  # type: ignore[return-value]


KNOWN: dict[str, type[SAELensLayer]] = {
    "topk": TopKSAELayer,
    **{
        name: _output_sae(name)
        for name in ("batchtopk", "gated", "jumprelu", "matryoshka_batchtopk", "standard")
    },
    **dict.fromkeys(
        ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
        SAELensTranscoder,
    ),
}
"""By SAELens' names."""
