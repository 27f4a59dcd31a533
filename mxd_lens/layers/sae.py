"""SAELens' TopK SAE on the MxD's kernels: the same step, without [batch, d_sae] tensors."""

from __future__ import annotations

from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE

from mxd_lens.layers.base import has_hooks
from mxd_lens.layers.kernels import topk_gate, weighted_row_sum
from mxd_lens.layers.objective import as_coo


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """`TopKTrainingSAE`, whose configuration, weights and losses it has.

    It takes SAELens' own dense step where that is needed: as long as there are dead units, for
    the auxiliary loss reads all their pre-activations, and where somebody hooks the coefficients.
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
        values, indices = topk_gate(sae_in, W_enc, b_enc, self.cfg.k)
        recons = self.hook_sae_recons(weighted_row_sum(values, indices, W_dec) + self.b_dec)
        sae_out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)
        loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=as_coo(values.detach(), indices, self.cfg.d_sae),
            hidden_pre=values,
            loss=loss,
            losses={"mse_loss": loss, "auxiliary_reconstruction_loss": loss.new_tensor(0.0)},
        )
