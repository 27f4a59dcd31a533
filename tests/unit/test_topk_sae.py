"""The sparse step of SAELens' TopK SAE against SAELens' own."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from mxd_lens.layers.sae import SparseTopKTrainingSAE
from tests.conftest import randomise

close = torch.testing.assert_close


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
    saes = theirs, ours = TopKTrainingSAE(cfg), SparseTopKTrainingSAE(cfg)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    batch = torch.randn(32, 6, dtype=torch.float64)
    step_input = TrainStepInput(batch, {}, torch.arange(20) < dead, 0, False)
    expected, found = (sae.training_forward_pass(step_input) for sae in saes)
    assert found.feature_acts.is_sparse == (dead == 0)
    assert found.losses.keys() == expected.losses.keys()
    assert (found.losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    close(found.loss, expected.loss)
    close(found.sae_out, expected.sae_out)
    close(found.feature_acts.to_dense(), expected.feature_acts)
    expected.loss.backward()
    found.loss.backward()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(parameter.grad, other.grad)
        assert parameter.grad.abs().max() > 0


def test_the_activations_can_be_hooked_during_training():
    sae = SparseTopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=20, k=3))
    seen = []
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    sae.training_forward_pass(TrainStepInput(torch.randn(4, 6), {}, None, 0, False))
    assert seen == [(4, 20)]
