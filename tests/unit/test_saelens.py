"""Layers and their gates against SAELens' own, written out densely."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import JumpReLUTranscoder

from mxd_lens.layers.batch_topk import JumpReLUMxD, above, largest
from mxd_lens.layers.codes import SparseCodes
from mxd_lens.layers.sae import SparseTopKTrainingSAE
from tests.conftest import randomise
from tests.helpers import SHAPE, close, make_layer, same, training_step
from tests.reference import reference


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_a_transcoder_with_all_units_allowed_is_saelens(name):
    layer, x = make_layer(f"topk_{name}", k=11), torch.randn(6, 5, dtype=torch.float64)
    cls, cfg = SAE_CLASS_REGISTRY[name]
    shape = {field.name: SHAPE[field.name] for field in fields(cfg) if field.name in SHAPE}
    other = cls(cfg(**shape, apply_b_dec_to_input=False))
    other.load_state_dict(layer.state_dict())
    close(layer(x), other(x))
    close(layer.encode(x), other.encode(x))
    close(layer.forward_with_activations(x), other.forward_with_activations(x))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("b_dec_to_input", [True, False])
@pytest.mark.parametrize("dead", [0, 2])
def test_loss_and_gradients_of_a_sparse_sae_are_saelens(rescale, b_dec_to_input, dead):
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": b_dec_to_input}
    cfg = TopKTrainingSAEConfig(d_in=6, d_sae=20, k=3, dtype="float64", **options)
    saes = theirs, ours = TopKTrainingSAE(cfg), SparseTopKTrainingSAE(cfg)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    batch = torch.randn(32, 6, dtype=torch.float64)
    step_input = TrainStepInput(batch, {}, torch.arange(20) < dead, 0, False)
    expected, found = (sae.training_forward_pass(step_input) for sae in saes)
    assert isinstance(found.feature_acts, SparseCodes) == (dead == 0)
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


K, TOKENS = 3, 50


@pytest.mark.parametrize("chunk", [7, 50])
class TestBatchTopK:
    @pytest.fixture
    def pre(self) -> torch.Tensor:
        return torch.randn(TOKENS, 40)

    def test_the_largest_of_a_batch_are_saelens(self, pre, chunk):
        codes = largest(pre.split(chunk), K * TOKENS, torch.Size([5, 10]), 40)
        same(codes.to_dense(), BatchTopK(K)(pre).view(5, 10, 40))
        assert len(codes.values) == K * TOKENS and codes.counts.unique().numel() > 1

    def test_no_more_than_the_positive_ones_are_active(self, pre, chunk):
        pre = -pre.abs()
        pre[2, 5] = 1.0
        codes = largest(pre.split(chunk), K * TOKENS, torch.Size([TOKENS]), 40)
        assert codes.counts.nonzero().tolist() == [[2]] and codes.indices.tolist() == [5]

    def test_above_a_threshold_are_the_positive_ones_beyond_it(self, pre, chunk):
        threshold = torch.randn(40)
        codes = above(pre.split(chunk), threshold, torch.Size([TOKENS]))
        same(codes.to_dense(), pre.relu() * (pre > threshold))


@pytest.mark.parametrize("name", ["mxd", "transcoder"])
def test_a_threshold_is_learned_and_saved(name, tmp_path):
    sae = make_layer(f"training_batchtopk_{name}", topk_threshold_lr=0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for _ in range(5):
        x, y = torch.randn(TOKENS, 5).double(), torch.randn(TOKENS, 4).double()
        output = training_step(sae, x, y)
        acts = output.feature_acts.to_dense()
        expected = 0.9 * expected + 0.1 * acts[acts > 0].min()
    close(sae.topk_threshold, expected)
    assert output.metrics["topk_threshold"] is sae.topk_threshold

    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is (JumpReLUMxD if name == "mxd" else JumpReLUTranscoder)
    close(loaded.threshold.data, expected.expand(11))
    close(loaded(x), reference(loaded, x))
    assert 0 < (loaded.encode(x) > 0).sum() < acts.numel()
    close(loaded.W_dec, sae.W_dec)


def test_a_checkpoint_keeps_the_threshold_to_the_bit(tmp_path):
    sae, resumed = (make_layer("training_batchtopk_mxd", dtype="float32") for _ in range(2))
    sae.topk_threshold.fill_(0.1)
    sae.save_model(tmp_path)
    resumed.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(resumed.topk_threshold, torch.tensor(0.1, dtype=torch.float64))
