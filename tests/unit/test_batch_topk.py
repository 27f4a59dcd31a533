"""Batch top-k gates against SAELens' own, written out densely."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.transcoder import JumpReLUTranscoder

from mxd_lens.layers.batch_topk import (
    JumpReLUMxD,
    TrainingBatchTopKMxD,
    TrainingBatchTopKMxDConfig,
    TrainingBatchTopKTranscoder,
    TrainingBatchTopKTranscoderConfig,
    above,
    largest,
)

K, TOKENS = 3, 50
SHAPE = {"d_in": 8, "d_out": 6, "d_sae": 40, "k": K, "topk_threshold_lr": 0.1}


def make(name):
    torch.manual_seed(0)
    if name == "mxd":
        cfg = TrainingBatchTopKMxDConfig(**SHAPE, d_hidden=10)
        sae = TrainingBatchTopKMxD(cfg)
        sae.W_shared.data.normal_()
        sae.gate_mean.normal_()
        sae.log_gate_scale.data.fill_(0.3)
        return sae
    return TrainingBatchTopKTranscoder(TrainingBatchTopKTranscoderConfig(**SHAPE))


@pytest.mark.parametrize("chunk", [7, 50])
def test_the_largest_of_a_batch_are_saelens(chunk):
    pre = torch.randn(TOKENS, 40, generator=torch.Generator().manual_seed(1))
    codes = largest(pre.split(chunk), K * TOKENS, torch.Size([5, 10]), 40)
    torch.testing.assert_close(codes.dense(), BatchTopK(K)(pre).view(5, 10, 40), rtol=0, atol=0)
    assert len(codes.values) == K * TOKENS and codes.counts.unique().numel() > 1


def test_no_more_than_the_positive_ones_are_active():
    pre = -torch.ones(4, 40)
    pre[2, 5] = 1.0
    codes = largest(pre.split(3), 12, torch.Size([4]), 40)
    assert codes.counts.tolist() == [0, 0, 1, 0] and codes.indices.tolist() == [5]


@pytest.mark.parametrize("chunk", [7, 50])
def test_above_a_threshold_are_the_positive_ones_beyond_it(chunk):
    generator = torch.Generator().manual_seed(2)
    pre = torch.randn(TOKENS, 40, generator=generator)
    threshold = torch.randn(40, generator=generator)
    plain = pre.relu() * (pre > threshold)
    codes = above(pre.split(chunk), threshold, torch.Size([TOKENS]))
    torch.testing.assert_close(codes.dense(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mxd", "transcoder"])
def test_the_threshold_is_learned_and_saved(name, tmp_path):
    sae = make(name)
    generator = torch.Generator().manual_seed(3)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        pairs = torch.randn(TOKENS, 14, generator=generator)
        output = sae.training_forward_pass(TrainStepInput(pairs, {}, None, i, False))
        acts = output.feature_acts.to_dense()
        expected = 0.9 * expected + 0.1 * acts[acts > 0].min().double()
    torch.testing.assert_close(sae.topk_threshold, expected)
    assert output.metrics["topk_threshold"] is sae.topk_threshold

    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is (JumpReLUMxD if name == "mxd" else JumpReLUTranscoder)
    x = torch.randn(2, 9, 8)
    pre = x @ loaded.W_enc + loaded.b_enc
    acts = pre.relu() * (pre > expected)
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(loaded.encode(x), acts)
    y = acts @ loaded.W_dec
    if name == "mxd":
        y = y * (loaded.hidden(x) @ loaded.W_shared)
    torch.testing.assert_close(loaded(x), y + loaded.b_dec)
    sae.normalize_decoder()
    torch.testing.assert_close(loaded.W_dec, sae.W_dec)


def test_a_checkpoint_keeps_the_threshold_to_the_bit(tmp_path):
    sae = make("mxd")
    sae.topk_threshold.fill_(0.1)
    sae.save_model(tmp_path)
    resumed = make("mxd")
    resumed.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(resumed.topk_threshold, torch.tensor(0.1, dtype=torch.float64))
