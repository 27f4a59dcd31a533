"""The sparse step of SAELens' TopK SAE against SAELens' own."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from mxd_lens.layers.sae import SparseTopKTrainingSAE


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("b_dec_to_input", [True, False])
@pytest.mark.parametrize("dead", [0, 2])
def test_loss_and_gradients_are_saelens(rescale, b_dec_to_input, dead):
    cfg = TopKTrainingSAEConfig(
        d_in=6,
        d_sae=20,
        k=3,
        dtype="float64",
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=b_dec_to_input,
    )
    saes = [TopKTrainingSAE(cfg), SparseTopKTrainingSAE(cfg)]
    with torch.no_grad():
        for parameter in saes[0].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    saes[1].load_state_dict(saes[0].state_dict())
    y = torch.randn(32, 6, dtype=torch.float64)
    outputs = []
    for sae in saes:
        step_input = TrainStepInput(y, {}, torch.arange(20) < dead, 0, False)
        outputs.append(sae.training_forward_pass(step_input))
        outputs[-1].loss.backward()
    theirs, ours = outputs
    assert ours.feature_acts.is_sparse == (dead == 0)
    assert ours.losses.keys() == theirs.losses.keys()
    assert (ours.losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out)
    fired = ours.feature_acts.to_dense() if dead == 0 else ours.feature_acts
    torch.testing.assert_close(fired, theirs.feature_acts)
    for parameter, other in zip(saes[1].parameters(), saes[0].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
        assert parameter.grad.abs().max() > 0


def test_the_coefficients_can_be_hooked_during_training():
    sae = SparseTopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=20, k=3))
    seen = []
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    sae.training_forward_pass(TrainStepInput(torch.randn(4, 6), {}, None, 0, False))
    assert seen == [(4, 20)]
