"""Putting layers in place of MLPs, and taking them out again without a trace."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from mxd_lens import train
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.splice import get_mlp, splice

pytestmark = pytest.mark.usefixtures("one_thread")

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

HOOK_OUT = {
    "tiny_hooked": "blocks.{}.hook_mlp_out",
    "tiny_hooked_mlp": "blocks.{}.hook_mlp_out",
    "tiny_bridge": "blocks.{}.mlp.hook_out",
    "tiny_bridge_gpt2": "blocks.{}.mlp.hook_out",
}
HOOKED = ["tiny_hooked", "tiny_hooked_mlp"]
PLAIN_BRIDGES = ["plain_bridge", "plain_bridge_gpt2"]  # SAELens' bridges hide aliases


@pytest.fixture(params=HOOK_OUT)
def name(request) -> str:
    return request.param


@pytest.fixture
def lm(request, name):
    return request.getfixturevalue(name)


@pytest.fixture
def make_mxd(random_mxd):
    """A random MxD that fits the models, gated or not as the caller likes."""
    shape = {"d_in": 16, "d_out": 16, "d_hidden": 32, "d_sae": 40, "k": 4, "dtype": "float32"}
    return partial(random_mxd, **({"size": 0.2} | shape))


@pytest.fixture
def mxd(make_mxd) -> MxD:
    return make_mxd()


def substituted(lm, name: str, tokens, layers: dict[int, MxD]) -> torch.Tensor:
    """Logits of the untouched model with hooks that read MLP inputs and replace MLP outputs."""
    seen = {}
    hooks = []
    for layer, mxd in layers.items():

        def read(tensor, hook, layer=layer):
            seen[layer] = tensor

        def write(tensor, hook, layer=layer, mxd=mxd):
            return mxd(seen[layer])

        hooks.append((f"blocks.{layer}.mlp.hook_in", read))
        hooks.append((HOOK_OUT[name].format(layer), write))
    return lm.run_with_hooks(tokens, fwd_hooks=hooks)


def assert_untouched(lm, before: dict, logits: torch.Tensor, tokens) -> None:
    assert lm.hook_dict.keys() == before.keys()
    assert [key for key, hook in lm.hook_dict.items() if hook is not before[key]] == []
    assert torch.equal(lm(tokens), logits)


@pytest.mark.parametrize("gated", [True, False], ids=["glu", "mlp"])
def test_logits_are_those_with_the_mlps_output_substituted(lm, name, make_mxd, gated, tokens):
    mxd = make_mxd(gated=gated)
    original, expected = lm(tokens), substituted(lm, name, tokens, {1: mxd})
    assert (expected - original).abs().max() > 0.1
    with splice(lm, {1: mxd}):
        close(lm(tokens), expected)


def test_several_layers_at_once(lm, name, make_mxd, tokens):
    layers = {2: make_mxd(), 0: make_mxd(gated=False)}
    expected = substituted(lm, name, tokens, layers)
    assert (expected - substituted(lm, name, tokens, {0: layers[0]})).abs().max() > 0.1
    with splice(lm, layers):
        close(lm(tokens), expected)


def test_the_mlps_own_mxd_changes_nothing(lm, tokens):
    expected = lm(tokens)
    with splice(lm, {layer: MxD.from_mlp(get_mlp(lm, layer)) for layer in range(3)}):
        close(lm(tokens), expected)


class TestHooks:
    def test_every_hook_point_of_the_layer_is_cached(self, lm, mxd, tokens):
        mlp_in = lm.run_with_cache(tokens)[1]["blocks.1.mlp.hook_in"]
        _, expected = mxd.run_with_cache(mlp_in)
        assert "hook_experts" in expected and len(expected) == 12
        with splice(lm, {1: mxd}):
            _, cache = lm.run_with_cache(tokens)
        assert [key for key in cache if ".1.mlp." in key] == [
            f"blocks.1.mlp.{key}" for key in expected
        ]
        for key in expected:
            close(cache[f"blocks.1.mlp.{key}"], expected[key])

    def test_names_filter_finds_them(self, lm, mxd, tokens):
        with splice(lm, {1: mxd}):
            key = "blocks.1.mlp.hook_experts"
            _, cache = lm.run_with_cache(tokens, names_filter=key)
        assert list(cache) == [key]
        assert cache[key].shape == (2, 7, 16)

    def test_the_rest_of_the_cache_keeps_its_names(self, lm, mxd, tokens):
        def others() -> list[str]:
            return [key for key in lm.run_with_cache(tokens)[1] if ".1.mlp." not in key]

        before = others()
        assert len(before) > 20
        with splice(lm, {1: mxd}):
            assert others() == before

    @pytest.mark.parametrize("hook", ["hook_in", "hook_experts", "hook_sae_acts_post", "hook_out"])
    def test_editing_one_has_its_effect_downstream(self, lm, name, mxd, tokens, hook):
        class Edited(nn.Module):
            def forward(self, x):
                return mxd.run_with_hooks(x, fwd_hooks=[(hook, lambda t, hook: 2 * t + 1)])

        expected = substituted(lm, name, tokens, {1: Edited()})
        with splice(lm, {1: mxd}):
            edit = (f"blocks.1.mlp.{hook}", lambda t, hook: 2 * t + 1)
            found = lm.run_with_hooks(tokens, fwd_hooks=[edit])
            close(found, expected)
            assert (found - lm(tokens)).abs().max() > 0.05

    def test_old_hook_points_are_gone_while_spliced(self, lm, mxd):
        with splice(lm, {1: mxd}):
            now = {key for key in lm.hook_dict if key.startswith("blocks.1.mlp.")}
        assert now == {f"blocks.1.mlp.{key}" for key in mxd.hook_dict}

    @pytest.mark.parametrize("name", HOOKED + PLAIN_BRIDGES)
    def test_hook_mlp_out_is_whichever_output_there_is(self, lm, mxd, tokens):
        alias = "blocks.1.hook_mlp_out"

        def seen_and_zeroed():
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
            close(new_output, cache["blocks.1.mlp.hook_out"])
            assert (new_output - old_output).abs().max() > 0.1
            close(zeroed_now, zeroed)
        restored, zeroed_again = seen_and_zeroed()
        assert torch.equal(restored, old_output) and torch.equal(zeroed_again, zeroed)

    def test_gradients_reach_the_layer_and_the_model(self, lm, mxd, tokens):
        with splice(lm, {1: mxd}):
            lm(tokens).square().mean().backward()
        assert mxd.W_shared.grad.abs().max() > 0 and mxd.W_enc.grad.abs().max() > 0

    @pytest.mark.parametrize("name", PLAIN_BRIDGES)
    def test_looking_at_the_hooks_warns_of_nothing(self, lm, mxd, tokens):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with splice(lm, {1: mxd}):
                lm.run_with_cache(tokens)
            lm.run_with_cache(tokens)


class TestRestoring:
    @pytest.fixture
    def before(self, lm, tokens) -> tuple[dict, torch.Tensor]:
        return dict(lm.hook_dict), lm(tokens)

    def test_on_exit(self, lm, mxd, make_mxd, tokens, before):
        mlp = lm.blocks[1].mlp
        with splice(lm, {1: mxd, 2: make_mxd()}):
            lm.run_with_cache(tokens)
            assert get_mlp(lm, 1) is mxd
        assert lm.blocks[1].mlp is mlp
        assert_untouched(lm, *before, tokens)

    def test_after_an_exception(self, lm, mxd, tokens, before):
        with pytest.raises(KeyError, match="inside"), splice(lm, {1: mxd}):
            lm(tokens)
            raise KeyError("inside")
        assert_untouched(lm, *before, tokens)

    def test_nested(self, lm, name, make_mxd, tokens, before):
        first, second, other = make_mxd(), make_mxd(), make_mxd()
        expected = [
            substituted(lm, name, tokens, layers) for layers in ({1: first}, {1: second, 0: other})
        ]
        with splice(lm, {1: first}):
            close(lm(tokens), expected[0])
            with splice(lm, {1: second, 0: other}):
                close(lm(tokens), expected[1])
            close(lm(tokens), expected[0])
        assert_untouched(lm, *before, tokens)

    def test_for_good_and_by_hand(self, lm, name, mxd, tokens, before):
        expected = substituted(lm, name, tokens, {1: mxd})
        spliced = splice(lm, {1: mxd})
        close(lm(tokens), expected)
        spliced.restore()
        assert_untouched(lm, *before, tokens)
        spliced.restore()
        assert_untouched(lm, *before, tokens)

    def test_twice_in_a_row(self, lm, name, mxd, tokens, before):
        expected = substituted(lm, name, tokens, {1: mxd})
        for _ in range(2):
            with splice(lm, {1: mxd}):
                close(lm(tokens), expected)
            assert_untouched(lm, *before, tokens)

    def test_the_layers_hook_points_get_their_own_names_back(self, lm, mxd, tokens):
        x = torch.randn(3, 16)
        _, before = mxd.run_with_cache(x)
        with splice(lm, {1: mxd}):
            lm(tokens)
        _, after = mxd.run_with_cache(x)
        assert list(after) == list(before)

    @pytest.mark.parametrize("name", PLAIN_BRIDGES)
    def test_every_other_name_of_a_hook_point(self, lm, mxd, tokens, before):
        assert "blocks.1.hook_mlp_out" in before[0]
        with splice(lm, {1: mxd}):
            lm.run_with_cache(tokens)
        assert_untouched(lm, *before, tokens)

    def test_a_users_hook_on_the_old_mlp_outlives_it(self, lm, name, mxd, tokens):
        seen = []
        lm.add_hook("blocks.1.mlp.hook_in", lambda t, hook: seen.append(hook.name))
        lm.add_hook(HOOK_OUT[name].format(1), lambda t, hook: 0 * t)
        expected = lm(tokens)
        assert seen == ["blocks.1.mlp.hook_in"]
        with splice(lm, {1: mxd}):
            lm(tokens)
        seen.clear()
        assert torch.equal(lm(tokens), expected)
        assert seen == ["blocks.1.mlp.hook_in"]
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


@pytest.mark.parametrize("name", ["tiny_hooked", "tiny_bridge"])
def test_plain_assignment_computes_the_same(lm, name, mxd, tokens):
    expected, original = substituted(lm, name, tokens, {1: mxd}), lm(tokens)
    mlp = lm.blocks[1].mlp
    lm.blocks[1].mlp = mxd
    close(lm(tokens), expected)
    lm.blocks[1].mlp = mlp
    assert torch.equal(lm(tokens), original)


def process(lm) -> None:
    """Fold the norms into the weights: the MLPs of such a model read other inputs."""
    if isinstance(lm, TransformerBridge):
        lm.enable_compatibility_mode()
    else:
        lm.process_weights_()


class TestProcessedWeights:
    @pytest.mark.parametrize("name", ["tiny_hooked", "tiny_bridge"])
    @pytest.mark.parametrize("architecture", ["mxd", "topk_skip_transcoder"])
    def test_a_layer_trained_on_others_is_refused(
        self, lm, make_config, documents, llama_folder, architecture
    ):
        if isinstance(lm, HookedTransformer):
            lm.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
        cfg = make_config(architecture=architecture, training_tokens=64)
        layer = train(cfg, lm, documents)
        assert layer.cfg.metadata.norms_folded is False
        with splice(lm, {1: layer}):
            pass
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

    @pytest.mark.parametrize("name", ["tiny_bridge", "tiny_bridge_gpt2"])
    def test_a_bridges_older_names_alone_are_no_processing(self, lm, mxd, tokens):
        mxd.cfg.metadata = SAEMetadata(model_name="tiny")
        with splice(lm, {1: mxd}):
            expected = lm(tokens)
        lm.enable_compatibility_mode(no_processing=True)
        with splice(lm, {1: mxd}):
            close(lm(tokens), expected)

    def test_the_mlps_own_mxd_changes_nothing(self, lm, tokens):
        process(lm)
        expected = lm(tokens)
        with splice(lm, {1: MxD.from_mlp(get_mlp(lm, 1))}):
            close(lm(tokens), expected)

    def test_is_not_done_while_layers_are_spliced_in(self, lm, mxd, make_mxd, tokens):
        with splice(lm, {1: mxd}):
            with splice(lm, {2: make_mxd()}), pytest.raises(RuntimeError, match="would process"):
                process(lm)
            expected = lm(tokens)
            with pytest.raises(RuntimeError, match=r"restore\(\) its MLPs first"):
                process(lm)
            assert torch.equal(lm(tokens), expected)
        first, second = splice(lm, {1: mxd}), splice(lm, {2: make_mxd()})
        first.restore()
        with pytest.raises(RuntimeError, match="would process"):
            process(lm)
        second.restore()
        expected = lm(tokens).log_softmax(-1)
        process(lm)
        torch.testing.assert_close(lm(tokens).log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize("layer", [3, -1])
    def test_no_such_layer(self, lm, mxd, layer):
        with pytest.raises(ValueError, match=f"no layer {layer}: .* layers 0 to 2"):
            splice(lm, {layer: mxd})

    def test_no_mlp(self, tiny_hooked_attn_only, mxd):
        with pytest.raises(ValueError, match="layer 1 of this model has no MLP"):
            splice(tiny_hooked_attn_only, {1: mxd})

    @pytest.mark.parametrize("width", ["d_in", "d_out"])
    def test_width(self, lm, make_mxd, width):
        with pytest.raises(ValueError, match=f"layer 1 has {width}=8, the model has d_model=16"):
            splice(lm, {1: make_mxd(**{width: 8})})

    def test_an_sae_of_the_output(self, lm):
        sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=8, k=2))
        with pytest.raises(ValueError, match=r"layer 1 reads what it writes: .* add_sae"):
            splice(lm, {1: sae})

    def test_not_a_language_model(self, mxd):
        with pytest.raises(ValueError, match="cannot splice into a Linear"):
            splice(nn.Linear(2, 2), {0: mxd})

    @pytest.mark.parametrize("nothing", [None, lambda x: x, MxD])
    def test_not_a_module(self, lm, nothing, tokens):
        before, logits = dict(lm.hook_dict), lm(tokens)
        with pytest.raises(ValueError, match=r"layer 1 must be a module, got"):
            splice(lm, {1: nothing})
        assert_untouched(lm, before, logits, tokens)

    def test_one_module_at_two_layers(self, lm, mxd, tokens):
        before, logits = dict(lm.hook_dict), lm(tokens)
        with pytest.raises(ValueError, match=r"layer 0 is also at layer 2: .* use a copy"):
            splice(lm, {0: mxd, 2: mxd})
        with splice(lm, {1: mxd}), pytest.raises(ValueError, match=r"layer 2 is also at layer 1"):
            splice(lm, {2: mxd})
        with pytest.raises(ValueError, match=r"layer 2 is also at layer 0"):
            splice(lm, {2: get_mlp(lm, 0)})
        assert_untouched(lm, before, logits, tokens)
        with splice(lm, {1: mxd, 2: copy.deepcopy(mxd)}):
            assert {"blocks.1.mlp.hook_experts", "blocks.2.mlp.hook_experts"} <= set(lm.hook_dict)

    @pytest.mark.parametrize("wrong", ["layer", "width"])
    def test_an_error_in_the_second_layer_replaces_nothing(self, lm, mxd, make_mxd, tokens, wrong):
        before, logits = dict(lm.hook_dict), lm(tokens)
        second = {"layer": {7: mxd}, "width": {2: make_mxd(d_in=8)}}[wrong]
        with pytest.raises(ValueError, match=r"layer [72]"):
            splice(lm, {1: mxd} | second)
        assert_untouched(lm, before, logits, tokens)
