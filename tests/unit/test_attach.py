"""Layers attached to language models by SAELens: add_sae and the run_with_saes family."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sae_lens.saes.sae import SAE, SAEMetadata
from torch import Tensor

from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.layers.mxd import MxD, MxDConfig
from mxd_lens.layers.transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)
from mxd_lens.models.splice import splice
from tests.conftest import randomise

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
pytestmark = pytest.mark.usefixtures("one_thread")

HOOK_OUT = {"tiny_hooked": "blocks.{}.hook_mlp_out", "tiny_bridge": "blocks.{}.mlp.hook_out"}
LAYERS = {
    "mxd": (MxD, MxDConfig, {"d_hidden": 32}),
    "topk_transcoder": (TopKTranscoder, TopKTranscoderConfig, {}),
    "topk_skip_transcoder": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
}


@pytest.fixture(params=HOOK_OUT)
def model(request) -> str:
    return request.param


@pytest.fixture
def lm(request, model):
    return request.getfixturevalue(model)


@pytest.fixture
def metadata(model):
    def at(block: int) -> SAEMetadata:
        return SAEMetadata(
            hook_name=f"blocks.{block}.mlp.hook_in", hook_name_out=HOOK_OUT[model].format(block)
        )

    return at


@pytest.fixture(params=LAYERS)
def make(request, metadata):
    """``make(block)``: a random layer, unlike the block's MLP."""

    def make(block: int = 1) -> SAE:
        cls, cfg, fields = LAYERS[request.param]
        layer = cls(cfg(d_in=16, d_out=16, d_sae=40, k=4, metadata=metadata(block), **fields))
        randomise(layer, 0.5)
        return layer

    return make


@pytest.fixture
def layer(make) -> SAE:
    return make()


# SAELens leaves a bridge's hook point dead once an SAE was on it: hooked runs come first.
def hooked(lm, tokens: Tensor, *layers: SAE, output=lambda y, layer, x: layer(x)) -> Tensor:
    """Logits with each layer's ``output(MLP's output, layer, MLP's input)`` in place of the MLP's,
    by hooks alone."""
    hooks = []
    for layer in layers:
        seen = {}

        def read(x, hook, seen=seen):
            seen["x"] = x

        def write(y, hook, seen=seen, layer=layer):
            return output(y, layer, seen["x"])

        metadata = layer.cfg.metadata
        hooks += [(metadata.hook_name, read), (metadata.hook_name_out, write)]
    return lm.run_with_hooks(tokens, fwd_hooks=hooks)


def test_the_mlps_own_mxd_changes_nothing(lm, metadata, tokens):
    mxd = MxD.from_mlp(lm.blocks[1].mlp, d_sae=8, k=3)
    mxd.cfg.metadata = metadata(1)
    expected = lm(tokens)
    assert expected.std() > 0.1
    close(lm.run_with_saes(tokens, saes=[mxd]), expected)


def test_replaces_the_mlps_output(lm, layer, tokens):
    original, expected = lm(tokens), hooked(lm, tokens, layer)
    assert (expected - original).abs().max() > 0.1
    with splice(lm, {1: layer}):
        close(lm(tokens), expected)
    close(lm.run_with_saes(tokens, saes=[layer]), expected)
    close(lm(tokens), original)


def test_stays_until_it_is_reset(lm, layer, tokens):
    original, expected = lm(tokens), hooked(lm, tokens, layer)
    lm.add_sae(layer)
    for _ in range(2):
        close(lm(tokens), expected)
    lm.reset_saes()
    close(lm(tokens), original)


def test_several_at_once(lm, make, tokens):
    layers = [make(0), make(2)]
    expected = hooked(lm, tokens, *layers)
    assert (expected - hooked(lm, tokens, layers[0])).abs().max() > 0.1
    close(lm.run_with_saes(tokens, saes=layers), expected)


def test_error_term_makes_up_for_the_layer(lm, layer, tokens):
    original = lm(tokens)
    close(lm.run_with_saes(tokens, saes=[layer], use_error_term=True), original)
    lm.add_sae(layer, use_error_term=True)
    close(lm(tokens), original)


def test_coefficients_are_cached(lm, layer, tokens):
    _, cache = lm.run_with_cache(tokens)
    metadata = layer.cfg.metadata
    mlp_in, mlp_out = cache[metadata.hook_name], cache[metadata.hook_name_out]
    acts, y = layer.encode(mlp_in), layer(mlp_in)
    _, cache = lm.run_with_cache_with_saes(tokens, saes=[layer], use_error_term=True)
    at = metadata.hook_name_out
    close(cache[f"{at}.hook_sae_acts_post"], acts)
    close(cache[f"{at}.hook_sae_input"], mlp_in)
    close(cache[f"{at}.hook_sae_error"], mlp_out - y)
    assert ((acts > 0).sum(-1) <= 4).all() and acts.max() > 0.1


def added(acts: Tensor, hook) -> Tensor:
    return acts + 0.3


def edited(layer: SAE, x: Tensor) -> Tensor:
    return layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", added)])


def test_coefficients_can_be_edited(lm, layer, tokens):
    expected = hooked(lm, tokens, layer, output=lambda y, layer, x: edited(layer, x))
    assert (expected - hooked(lm, tokens, layer)).abs().max() > 0.1
    name = f"{layer.cfg.metadata.hook_name_out}.hook_sae_acts_post"
    found = lm.run_with_hooks_with_saes(tokens, saes=[layer], fwd_hooks=[(name, added)])
    close(found, expected)


def test_the_error_term_keeps_an_edits_effect(lm, layer, tokens):
    def steered(y: Tensor, layer: SAE, x: Tensor) -> Tensor:
        return y + edited(layer, x) - layer(x)

    expected = hooked(lm, tokens, layer, output=steered)
    assert (expected - lm(tokens)).abs().max() > 0.1
    name = f"{layer.cfg.metadata.hook_name_out}.hook_sae_acts_post"
    lm.add_sae(layer, use_error_term=True)
    close(lm.run_with_hooks(tokens, fwd_hooks=[(name, added)]), expected)


@pytest.mark.parametrize("model", ["tiny_hooked"], indirect=True)  # bridges cannot
@pytest.mark.parametrize("use_error_term", [False, True])
def test_special_tokens_can_be_left_out(lm, layer, tokens, use_error_term):
    special = [int(tokens[0, 0]), int(tokens[1, 3])]
    masked = torch.isin(tokens, torch.tensor(special))[..., None]

    def output(y: Tensor, layer: SAE, x: Tensor) -> Tensor:
        return torch.where(masked, y, layer(x))

    expected = lm(tokens) if use_error_term else hooked(lm, tokens, layer, output=output)
    found = lm.run_with_saes(
        tokens, saes=[layer], exclude_special_tokens=special, use_error_term=use_error_term
    )
    close(found, expected)
    assert (lm.run_with_saes(tokens, saes=[layer]) - found).abs().max() > 0.01


@pytest.mark.parametrize("model", ["tiny_bridge"], indirect=True)
def test_a_model_that_was_attached_to_is_measured_alike(lm, layer, tokens, documents):
    layer.cfg.metadata.context_size = 8
    before, _ = evaluate(lm, layer, documents, n_sequences=8, n_tokens=200)
    lm.run_with_saes(tokens, saes=[layer])
    after, _ = evaluate(lm, layer, documents, n_sequences=8, n_tokens=200)
    assert before["ce_zero_ablation"] != before["ce_original"] != before["ce_replaced"]
    assert after == before
