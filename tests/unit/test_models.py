"""One MLP of a language model: what is known of it and read there; models that are refused."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from mxd_lens.models.load import load_model
from mxd_lens.models.site import Site
from mxd_lens.models.splice import get_mlp
from tests.conftest import D_MLP, D_MODEL, N_LAYERS, N_VOCAB, TOKENS, save
from tests.helpers import MODEL_SHAPE, close32, make_layer, placed
from tests.reference import FORMULAS

COMMON = TOKENS | {"hidden_size": D_MODEL, "pad_token_id": 2}
OPT = OPTConfig(
    word_embed_proj_dim=D_MODEL,
    ffn_dim=D_MLP,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=2,
    max_position_embeddings=32,
    **COMMON,
)
BLOOM = BloomConfig(n_layer=N_LAYERS, n_head=2, **COMMON)


@pytest.mark.parametrize(
    ("cls", "config", "why"),
    [
        (OPTForCausalLM, OPT, "which in a OPTDecoderLayer is no module of its own"),
        (BloomForCausalLM, BLOOM, "which in a BloomMLP adds the residual stream to its output"),
    ],
)
def test_an_mlp_that_a_bridge_cannot_replace_is_refused(tmp_path, cls, config, why):
    model = load_model(str(save(cls(config), tmp_path / "model")))
    for use in (Site.at, get_mlp):
        with pytest.raises(ValueError, match=f"the MLP of layer 1, {why}; load .* HookedTransf"):
            use(model, 1)


@pytest.mark.parametrize(
    "model", ["tiny_hooked", "tiny_hooked_mlp", "tiny_bridge", "tiny_bridge_gpt2", "plain_bridge"]
)
class TestSite:
    @pytest.fixture
    def lm(self, request, model):
        return request.getfixturevalue(model)

    def test_its_weights_are_those_of_the_mlp_between_its_hooks(self, lm, tokens):
        site = Site.at(lm, 1)
        _, cache = lm.run_with_cache(tokens)
        x, mlp = cache[site.hook_in], site.mlp
        z = x @ mlp.W_in + mlp.b_in
        if mlp.W_gate is None:
            z = FORMULAS[mlp.act_fn](z)
        else:
            z = FORMULAS[mlp.act_fn](x @ mlp.W_gate + mlp.b_gate) * z
        close32(z @ mlp.W_out + mlp.b_out, cache[site.hook_out])
        assert (mlp.shape.d_in, mlp.shape.d_out, mlp.shape.d_hidden) == (D_MODEL, D_MODEL, D_MLP)

    def test_reads_the_activations_of_non_special_tokens(self, lm):
        site = Site.at(lm, 1)
        tokens = torch.randint(N_VOCAB, (3, 9))
        names = ["bos_token_id", "eos_token_id", "pad_token_id"] if lm.tokenizer else []
        special = {getattr(lm.tokenizer, name) for name in names}
        assert {*site.special.tolist()} == special
        kept = torch.tensor([[int(token) not in special for token in row] for row in tokens])
        assert torch.equal(site.non_special(tokens), kept)
        _, cache = lm.run_with_cache(tokens, prepend_bos=False)
        seen = site.read(tokens, site.hooks)
        assert list(seen) == list(site.hooks)
        for hook in site.hooks:
            close32(seen[hook], cache[hook][kept])
        with pytest.raises(ValueError, match=r"the model has no hook 'blocks.0.mlp.hook_nothing'"):
            site.read(tokens, ("blocks.0.mlp.hook_nothing",))

    def test_of_a_layer_is_where_it_was_trained(self, lm):
        layer, site = placed(make_layer("mxd", **MODEL_SHAPE), lm, 2), Site.at(lm, 2)
        found = Site.of(lm, layer)
        assert (found.layer, found.hooks, found.model) == (2, site.hooks, lm)
        layer.cfg.metadata.model_name, layer.cfg.metadata.norms_folded = "tiny", True
        with pytest.raises(ValueError, match="this layer was trained on processed"):
            Site.of(lm, layer)
        layer.cfg.metadata = SAEMetadata()
        with pytest.raises(ValueError, match="metadata must say hook_name"):
            Site.of(lm, layer)

    @pytest.mark.parametrize("layer", [3, -1])
    def test_no_such_layer(self, lm, layer):
        with pytest.raises(ValueError, match=f"no layer {layer}: .* layers 0 to 2"):
            Site.at(lm, layer)


def test_the_names_of_a_bridges_hooks_are_restored(tiny_bridge, tokens):
    layer = placed(make_layer("mxd", **MODEL_SHAPE), tiny_bridge)
    zero = [(layer.cfg.metadata.hook_name_out, lambda t, hook: 0 * t)]
    expected = tiny_bridge.run_with_hooks(tokens, fwd_hooks=zero)
    tiny_bridge.run_with_saes(tokens, saes=[layer])
    Site.of(tiny_bridge, layer)
    close32(tiny_bridge.run_with_hooks(tokens, fwd_hooks=zero), expected)


def test_a_bare_hooked_transformer_has_no_hook_to_read_at(tiny_hooked):
    with pytest.raises(ValueError, match=r"a bare HookedTransformer has no blocks.1.mlp.hook_in"):
        Site.at(HookedTransformer(tiny_hooked.cfg), 1)


SHAPE = {"intermediate_size": D_MLP, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2}
SHAPE |= COMMON | {"max_position_embeddings": 32}
GROUPED = SHAPE | {"num_key_value_heads": 1}
GPT2 = TOKENS | {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", GPT2Config(**GPT2)),
        ("pythia", GPTNeoXConfig(**SHAPE)),
        ("pythia", GPTNeoXConfig(**SHAPE, use_parallel_residual=False)),
        ("llama", LlamaConfig(**SHAPE)),
        ("llama-3", LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
        ("gemma-2-tied", LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        ("mistral", MistralConfig(**GROUPED, sliding_window=4)),
        ("qwen2", Qwen2Config(**GROUPED)),
        ("qwen3", Qwen3Config(**GROUPED, head_dim=16)),
        ("phi3", Phi3Config(**GROUPED)),
        ("opt", OPT),
        ("bloom", BLOOM),
    ],
)
def test_a_hooked_transformer_from_a_folder_is_transformers_model(tmp_path, tokens, name, config):
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / name)
    model = load_model(str(folder), "HookedTransformer")
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    close32(model(tokens), expected)
    assert not model.training and not model.cfg.init_weights
    assert (model.cfg.model_name, model.cfg.tokenizer_name) == (name, str(folder))
    ids = AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]
    assert model.to_tokens("the cat", prepend_bos=True).tolist() == [[1, *ids]]
    site = Site.at(model, 1)
    assert site.read(tokens, site.hooks)[site.hook_out].shape[-1] == D_MODEL


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LlamaConfig(**GROUPED, mlp_bias=True), "predicts something else .* differ by"),
        (LlamaConfig(**GROUPED, rope_parameters=LINEAR), "predicts something else .* differ by"),
        (LlamaConfig(**GROUPED, head_dim=16), "cannot convert it .*size mismatch"),
        (GPT2Config(**GPT2, n_inner=D_MLP), "cannot convert it .*size mismatch"),
        (Gemma2Config(**GROUPED, head_dim=8), "Gemma2ForCausalLM is not currently supported"),
        pytest.param(
            PhiConfig(**SHAPE),
            "cannot convert it .*partial_rotary_factor",
            marks=pytest.mark.skipif(
                hasattr(PhiConfig(**SHAPE), "partial_rotary_factor"),
                reason="which an older transformers has where TransformerLens looks for it",
            ),
        ),
        (
            Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=30, max_window_layers=1),
            "reaches 30 tokens back",
        ),
    ],
)
def test_a_folder_that_transformerlens_gets_wrong_is_refused(tmp_path, config, why):
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    message = f"cannot load the model '{folder}': .*{why}.*: load it as a TransformerBridge$"
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(folder), "HookedTransformer")
    assert len(str(error.value)) < 500
    load_model(str(folder))


def test_weights_of_a_hooked_transformer_in_bfloat16(tmp_path, tokens):
    folder = save(AutoModelForCausalLM.from_config(GPT2Config(**GPT2)), tmp_path / "gpt2")
    single, half = (
        load_model(str(folder), "HookedTransformer", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert {p.dtype for p in half.parameters()} == {half.cfg.dtype} == {torch.bfloat16}
    torch.testing.assert_close(half(tokens).float(), single(tokens), rtol=0.1, atol=0.2)


def test_a_folder_without_weights(tmp_path):
    GPT2Config(**GPT2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load the model '{tmp_path}': .*no file named"):
        load_model(str(tmp_path), "HookedTransformer")
