"""Putting layers in place of MLPs, and taking them out again without a trace."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from mxd_lens import train
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site
from mxd_lens.models.splice import get_mlp, splice
from tests.helpers import INFERENCE, MODEL_SHAPE, close32, make_layer, substituted

HOOKED = ["tiny_hooked", "tiny_hooked_mlp"]
BRIDGES = ["tiny_bridge", "tiny_bridge_gpt2"]
PLAIN_BRIDGES = ["plain_bridge", "plain_bridge_gpt2"]  # SAELens' bridges hide aliases

new_mxd = partial(make_layer, "mxd", 0.2, **MODEL_SHAPE)


@pytest.fixture(params=HOOKED + BRIDGES)
def lm(request) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def mxd() -> MxD:
    return new_mxd()


def in_place(lm: Any, tokens: Tensor, layers: dict[int, nn.Module]) -> Tensor:
    """Logits of the untouched model with hooks that read MLP inputs and replace MLP outputs."""
    return substituted(lm, tokens, {Site.at(lm, at).hooks: mxd for at, mxd in layers.items()})


@pytest.fixture
def untouched(lm, tokens) -> Any:
    """``untouched()`` asserts that the model is what it has been."""
    hooks, logits = dict(lm.hook_dict), lm(tokens)

    def check() -> None:
        assert lm.hook_dict.keys() == hooks.keys()
        assert [key for key, hook in lm.hook_dict.items() if hook is not hooks[key]] == []
        assert torch.equal(lm(tokens), logits)

    return check


@pytest.mark.parametrize("kind", INFERENCE)
def test_logits_are_those_with_the_mlps_output_substituted(lm, kind, tokens):
    layer, other = (make_layer(kind, 0.2, **MODEL_SHAPE) for _ in range(2))
    expected = in_place(lm, tokens, {1: layer})
    assert (expected - lm(tokens)).abs().max() > 0.1
    both = in_place(lm, tokens, {2: other, 1: layer})
    assert (both - expected).abs().max() > 0.1
    with splice(lm, {1: layer}):
        close32(lm(tokens), expected)
    with splice(lm, {2: other, 1: layer}):
        close32(lm(tokens), both)


class TestHooks:
    @pytest.mark.parametrize("kind", ["mxd", "topk_transcoder"])
    def test_the_cache_has_the_layers_hook_points_for_the_mlps(self, lm, kind, tokens):
        layer, key = make_layer(kind, 0.2, **MODEL_SHAPE), "blocks.1.mlp.hook_sae_recons"
        _, before = lm.run_with_cache(tokens)
        others = [name for name in before if ".1.mlp." not in name]
        assert len(others) > 20
        _, expected = layer.run_with_cache(before["blocks.1.mlp.hook_in"])
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            _, alone = lm.run_with_cache(tokens, names_filter=key)
            hooks = {name for name in lm.hook_dict if name.startswith("blocks.1.mlp.")}
        assert [name for name in cache if ".1.mlp." not in name] == others
        assert [name for name in cache if ".1.mlp." in name] == [
            f"blocks.1.mlp.{name}" for name in expected
        ]
        for name in {*expected} - {"hook_codes"}:
            close32(cache[f"blocks.1.mlp.{name}"], expected[name])
        assert list(alone) == [key] and alone[key].shape == (2, 7, 16)
        assert hooks == {f"blocks.1.mlp.{name}" for name in layer.hook_dict}

    @pytest.mark.parametrize("hook", ["hook_in", "hook_experts", "hook_sae_acts_post", "hook_out"])
    def test_editing_one_has_its_effect_downstream(self, lm, mxd, tokens, hook):
        def double(t: Tensor, hook: Any) -> Tensor:
            return 2 * t + 1

        class Edited(nn.Module):
            def forward(self, x):
                return mxd.run_with_hooks(x, fwd_hooks=[(hook, double)])

        expected = in_place(lm, tokens, {1: Edited()})
        with splice(lm, {1: mxd}):
            found = lm.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.mlp.{hook}", double)])
            close32(found, expected)
            assert (found - lm(tokens)).abs().max() > 0.05

    @pytest.mark.parametrize("lm", HOOKED + PLAIN_BRIDGES, indirect=True)
    def test_hook_mlp_out_is_whichever_output_there_is(self, lm, mxd, tokens, untouched):
        alias = "blocks.1.hook_mlp_out"
        assert alias in lm.hook_dict

        def seen_and_zeroed() -> tuple[Tensor, Tensor]:
            seen = []

            def zero(tensor, hook):
                seen.append(tensor)
                return 0 * tensor

            zeroed = lm.run_with_hooks(tokens, fwd_hooks=[(alias, zero)])
            assert len(seen) == 1
            return seen[0], zeroed

        old_output, zeroed = seen_and_zeroed()
        with splice(lm, {1: mxd}):
            _, cache = lm.run_with_cache(tokens)
            new_output, zeroed_now = seen_and_zeroed()
            close32(new_output, cache["blocks.1.mlp.hook_out"])
            assert (new_output - old_output).abs().max() > 0.1
            close32(zeroed_now, zeroed)
        restored, zeroed_again = seen_and_zeroed()
        assert torch.equal(restored, old_output) and torch.equal(zeroed_again, zeroed)
        untouched()

    def test_gradients_reach_the_layer_and_the_model(self, lm, mxd, tokens):
        with splice(lm, {1: mxd}):
            lm(tokens).square().mean().backward()
        assert mxd.W_shared.grad.abs().max() > 0 and mxd.W_enc.grad.abs().max() > 0

    @pytest.mark.parametrize("lm", PLAIN_BRIDGES, indirect=True)
    def test_looking_at_the_hooks_warns_of_nothing(self, lm, mxd, tokens):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with splice(lm, {1: mxd}):
                lm.run_with_cache(tokens)
            lm.run_with_cache(tokens)


class TestRestoring:
    def test_on_exit_and_after_an_exception(self, lm, mxd, tokens, untouched):
        mlp = lm.blocks[1].mlp
        with splice(lm, {1: mxd, 2: new_mxd()}):
            lm.run_with_cache(tokens)
            assert get_mlp(lm, 1) is mxd
        assert lm.blocks[1].mlp is mlp
        untouched()
        with pytest.raises(KeyError, match="inside"), splice(lm, {1: mxd}):
            lm(tokens)
            raise KeyError("inside")
        untouched()

    def test_nested(self, lm, tokens, untouched):
        first, second, other = new_mxd(), new_mxd(), new_mxd()
        outer, inner = {1: first}, {1: second, 0: other}
        expected = in_place(lm, tokens, outer), in_place(lm, tokens, inner)
        with splice(lm, outer):
            close32(lm(tokens), expected[0])
            with splice(lm, inner):
                close32(lm(tokens), expected[1])
            close32(lm(tokens), expected[0])
        untouched()

    def test_by_hand_twice_and_once_more(self, lm, mxd, tokens, untouched):
        expected = in_place(lm, tokens, {1: mxd})
        for _ in range(2):
            spliced = splice(lm, {1: mxd})
            close32(lm(tokens), expected)
            for _ in range(2):
                spliced.restore()
                untouched()

    def test_the_layers_hook_points_get_their_own_names_back(self, lm, mxd, tokens):
        x = torch.randn(3, 16)
        _, before = mxd.run_with_cache(x)
        with splice(lm, {1: mxd}):
            lm(tokens)
        assert list(mxd.run_with_cache(x)[1]) == list(before)

    def test_a_users_hook_on_the_old_mlp_outlives_it(self, lm, mxd, tokens):
        seen = []
        hook_in, hook_out = Site.at(lm, 1).hooks
        lm.add_hook(hook_in, lambda t, hook: seen.append(hook.name))
        lm.add_hook(hook_out, lambda t, hook: 0 * t)
        expected = lm(tokens)
        assert seen == [hook_in]
        with splice(lm, {1: mxd}):
            lm(tokens)
        seen.clear()
        assert torch.equal(lm(tokens), expected)
        assert seen == [hook_in]
        lm.reset_hooks()
        assert (lm(tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("use_past", [True, False], ids=["cached", "uncached"])
def test_generate(lm, mxd, tokens, use_past):
    prompt = tokens[:1, :3]
    with splice(lm, {1: mxd}):
        generated = lm.generate(
            prompt,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past,
            verbose=False,
            return_type="tokens",
        )
        expected = prompt
        for _ in range(6):
            best = lm(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], dim=-1)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("lm", ["tiny_hooked", "tiny_bridge"], indirect=True)
def test_plain_assignment_computes_the_same(lm, mxd, tokens):
    expected, original = in_place(lm, tokens, {1: mxd}), lm(tokens)
    mlp = lm.blocks[1].mlp
    lm.blocks[1].mlp = mxd
    close32(lm(tokens), expected)
    lm.blocks[1].mlp = mlp
    assert torch.equal(lm(tokens), original)


def process(lm: Any) -> None:
    """Fold the norms into the weights: the MLPs of such a model read other inputs."""
    if isinstance(lm, TransformerBridge):
        lm.enable_compatibility_mode()
    else:
        lm.process_weights_()


class TestProcessedWeights:
    @pytest.mark.parametrize("lm", ["tiny_hooked", "tiny_bridge"], indirect=True)
    @pytest.mark.parametrize("architecture", ["mxd", "topk_skip_transcoder"])
    def test_a_layer_trained_on_others_is_refused(
        self, lm, make_config, documents, llama_folder, architecture
    ):
        if isinstance(lm, HookedTransformer):
            lm.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
        layer = train(make_config(architecture=architecture, training_tokens=64), lm, documents)
        assert layer.cfg.metadata.hook_name_out == Site.at(lm, 1).hook_out
        assert layer.cfg.metadata.norms_folded is False
        splice(lm, {1: layer}).restore()
        process(lm)
        with pytest.raises(
            ValueError, match=r"trained on unprocessed weights of tiny, .* are processed"
        ):
            splice(lm, {1: layer})

    def test_so_is_one_trained_on_processed_weights_in_a_model_without(self, lm, mxd, tokens):
        mxd.cfg.metadata = SAEMetadata(model_name="tiny", norms_folded=True)
        with pytest.raises(ValueError, match=r"trained on processed .* are unprocessed"):
            splice(lm, {1: mxd})
        process(lm)
        with splice(lm, {1: mxd}):
            lm(tokens)

    def test_a_layer_of_a_model_that_does_not_say_which_is_taken_for_unprocessed(self, lm, mxd):
        mxd.cfg.metadata = SAEMetadata(model_name="tiny")
        splice(lm, {1: mxd}).restore()
        process(lm)
        with pytest.raises(ValueError, match=r"trained on unprocessed weights"):
            splice(lm, {1: mxd})

    @pytest.mark.parametrize("lm", BRIDGES, indirect=True)
    def test_a_bridges_older_names_alone_are_no_processing(self, lm, mxd, tokens):
        mxd.cfg.metadata = SAEMetadata(model_name="tiny")
        with splice(lm, {1: mxd}):
            expected = lm(tokens)
        lm.enable_compatibility_mode(no_processing=True)
        with splice(lm, {1: mxd}):
            close32(lm(tokens), expected)

    @pytest.mark.parametrize("processed", [False, True])
    def test_the_mlps_own_mxd_changes_nothing(self, lm, tokens, processed):
        if processed:
            process(lm)
        expected = lm(tokens)
        with splice(lm, {layer: MxD.from_mlp(get_mlp(lm, layer)) for layer in range(3)}):
            close32(lm(tokens), expected)

    def test_is_not_done_while_layers_are_spliced_in(self, lm, mxd, tokens):
        refused = partial(pytest.raises, RuntimeError, match=r"would process.* restore\(\) its MLP")
        with splice(lm, {1: mxd}):
            with splice(lm, {2: new_mxd()}), refused():
                process(lm)
            expected = lm(tokens)
            with refused():
                process(lm)
            assert torch.equal(lm(tokens), expected)
        first, second = splice(lm, {1: mxd}), splice(lm, {2: new_mxd()})
        first.restore()
        with refused():
            process(lm)
        second.restore()
        expected = lm(tokens).log_softmax(-1)
        process(lm)
        torch.testing.assert_close(lm(tokens).log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (lambda: {1: new_mxd(d_in=8)}, "layer 1 has d_in=8, the model has d_model=16"),
            (lambda: {1: new_mxd(d_out=8)}, "layer 1 has d_out=8, the model has d_model=16"),
            (
                lambda: {1: TopKSAE(TopKSAEConfig(d_in=16, d_sae=8, k=2))},
                r"layer 1 reads what it writes: .* add_sae",
            ),
            (lambda: {1: None}, r"layer 1 must be a module, got"),
            (lambda: {1: MxD}, r"layer 1 must be a module, got"),
            (lambda: {1: new_mxd(), 7: new_mxd()}, r"no layer 7"),
            (lambda: {1: new_mxd(), 2: new_mxd(d_in=8)}, r"layer 2 has d_in=8"),
            (lambda: dict.fromkeys([0, 2], new_mxd()), r"layer 0 is also at layer 2: .* a copy"),
        ],
    )
    def test_nothing_is_replaced(self, lm, untouched, layers, message):
        with pytest.raises(ValueError, match=message):
            splice(lm, layers())
        untouched()

    def test_no_mlp(self, tiny_hooked_attn_only, mxd):
        with pytest.raises(ValueError, match="layer 1 of this model has no MLP"):
            splice(tiny_hooked_attn_only, {1: mxd})

    def test_not_a_language_model(self, mxd):
        with pytest.raises(ValueError, match="cannot splice into a Linear"):
            splice(nn.Linear(2, 2), {0: mxd})

    def test_one_module_at_two_layers(self, lm, mxd, untouched):
        with splice(lm, {1: mxd}), pytest.raises(ValueError, match=r"layer 2 is also at layer 1"):
            splice(lm, {2: mxd})
        with pytest.raises(ValueError, match=r"layer 2 is also at layer 0"):
            splice(lm, {2: get_mlp(lm, 0)})
        untouched()
        with splice(lm, {1: mxd, 2: copy.deepcopy(mxd)}):
            assert {"blocks.1.mlp.hook_experts", "blocks.2.mlp.hook_experts"} <= set(lm.hook_dict)
