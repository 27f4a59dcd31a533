"""Layers attached to language models by SAELens: add_sae and the run_with_saes family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from mxd_lens.analysis.faithfulness import evaluate
from tests.helpers import MODEL_SHAPE, close32, make_layer, placed, substituted

KINDS = ["mxd", "molt", "topk_transcoder", "topk_skip_transcoder", "jumprelu_mxd", "dense"]


@pytest.fixture(params=KINDS)
def make(request, lm):
    """``make(block)``: a random layer, unlike the block's MLP."""
    return lambda block: placed(make_layer(request.param, 0.5, **MODEL_SHAPE), lm, block)


@pytest.fixture
def layer(make) -> SAE:
    return make(1)


# SAELens leaves a bridge's hook point dead once an SAE was on it: hooked runs come first.
def hooked(lm: Any, tokens: Tensor, *layers: SAE, **output: Any) -> Tensor:
    hooks = [(layer.cfg.metadata.hook_name, layer.cfg.metadata.hook_name_out) for layer in layers]
    return substituted(lm, tokens, dict(zip(hooks, layers, strict=True)), **output)


def test_replaces_the_mlps_output_until_it_is_reset(lm, layer, tokens):
    original, expected = lm(tokens), hooked(lm, tokens, layer)
    assert (expected - original).abs().max() > 0.1
    close32(lm.run_with_saes(tokens, saes=[layer]), expected)
    close32(lm(tokens), original)
    lm.add_sae(layer)
    for _ in range(2):
        close32(lm(tokens), expected)
    lm.reset_saes()
    close32(lm(tokens), original)


def test_several_at_once(lm, make, tokens):
    layers = [make(0), make(2)]
    expected = hooked(lm, tokens, *layers)
    assert (expected - hooked(lm, tokens, layers[0])).abs().max() > 0.1
    close32(lm.run_with_saes(tokens, saes=layers), expected)


def test_error_term_makes_up_for_the_layer(lm, layer, tokens):
    original = lm(tokens)
    close32(lm.run_with_saes(tokens, saes=[layer], use_error_term=True), original)
    lm.add_sae(layer, use_error_term=True)
    close32(lm(tokens), original)


def test_activations_are_cached(lm, layer, tokens):
    _, cache = lm.run_with_cache(tokens)
    metadata = layer.cfg.metadata
    mlp_in, mlp_out = cache[metadata.hook_name], cache[metadata.hook_name_out]
    acts, y = layer.encode(mlp_in), layer(mlp_in)
    _, cache = lm.run_with_cache_with_saes(tokens, saes=[layer], use_error_term=True)
    at = metadata.hook_name_out
    close32(cache[f"{at}.hook_sae_acts_post"], acts)
    close32(cache[f"{at}.hook_sae_input"], mlp_in)
    close32(cache[f"{at}.hook_sae_error"], mlp_out - y)
    assert acts.max() > 0.1


def added(acts: Tensor, hook) -> Tensor:
    return acts + 0.3


def edited(layer: SAE, x: Tensor) -> Tensor:
    return layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", added)])


def test_activations_can_be_edited(lm, layer, tokens):
    expected = hooked(lm, tokens, layer, output=lambda y, layer, x: edited(layer, x))
    assert (expected - hooked(lm, tokens, layer)).abs().max() > 0.1
    name = f"{layer.cfg.metadata.hook_name_out}.hook_sae_acts_post"
    found = lm.run_with_hooks_with_saes(tokens, saes=[layer], fwd_hooks=[(name, added)])
    close32(found, expected)


def test_the_error_term_keeps_an_edits_effect(lm, layer, tokens):
    def steered(y: Tensor, layer: SAE, x: Tensor) -> Tensor:
        return y + edited(layer, x) - layer(x)

    expected = hooked(lm, tokens, layer, output=steered)
    assert (expected - lm(tokens)).abs().max() > 0.1
    name = f"{layer.cfg.metadata.hook_name_out}.hook_sae_acts_post"
    lm.add_sae(layer, use_error_term=True)
    close32(lm.run_with_hooks(tokens, fwd_hooks=[(name, added)]), expected)


@pytest.mark.parametrize("lm", ["tiny_hooked"], indirect=True)  # bridges cannot
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
    close32(found, expected)
    assert (lm.run_with_saes(tokens, saes=[layer]) - found).abs().max() > 0.01


@pytest.mark.parametrize("lm", ["tiny_bridge"], indirect=True)
def test_a_model_that_was_attached_to_is_measured_alike(lm, layer, tokens, documents):
    before, _ = evaluate(lm, layer, documents, n_sequences=8, n_tokens=200)
    lm.run_with_saes(tokens, saes=[layer])
    after, _ = evaluate(lm, layer, documents, n_sequences=8, n_tokens=200)
    assert before["ce_zero_ablation"] != before["ce_original"] != before["ce_replaced"]
    assert after == before
