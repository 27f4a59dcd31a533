"""Language models that can be loaded but not used, and how they say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from mxd_lens.models.load import load_model
from mxd_lens.models.site import mlp_hooks
from mxd_lens.models.splice import get_mlp
from tests.conftest import D_MLP, D_MODEL, N_LAYERS, N_VOCAB, save

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory) -> Path:
    config = OPTConfig(
        vocab_size=N_VOCAB,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
        **SPECIAL,
    )
    return save(OPTForCausalLM(config), tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def bloom_folder(tmp_path_factory) -> Path:
    config = BloomConfig(
        vocab_size=N_VOCAB, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=2, **SPECIAL
    )
    return save(BloomForCausalLM(config), tmp_path_factory.mktemp("models") / "bloom")


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("opt_folder", "which in a OPTDecoderLayer is no module of its own"),
        ("bloom_folder", "which in a BloomMLP adds the residual stream to its output"),
    ],
)
@pytest.mark.parametrize("use", [mlp_hooks, get_mlp])
def test_an_mlp_that_a_bridge_cannot_replace_is_refused(request, folder, why, use):
    model = load_model(str(request.getfixturevalue(folder)))
    with pytest.raises(ValueError, match=f"the MLP of layer 1, {why}; load .* HookedTransf"):
        use(model, 1)


def test_a_hooked_transformer_reads_no_folder(llama_folder):
    with pytest.raises(ValueError, match=r"not the folder .*llama': load it as a Transf") as error:
        load_model(str(llama_folder), "HookedTransformer")
    assert len(str(error.value)) < 300
