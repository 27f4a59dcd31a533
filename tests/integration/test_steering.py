"""Sentence embeddings and steering on the real models."""

from __future__ import annotations

import json

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata

from mxd_lens import MxD, load_model
from mxd_lens.analysis.embedding import coherence, embed
from mxd_lens.analysis.steering import calibrate_strength, generate_steered, steer
from mxd_lens.demo import models
from mxd_lens.models.site import Site


def test_paraphrases_are_closer_than_unrelated_sentences():
    texts = [
        "The cat slept on the sofa all afternoon.",
        "Quarterly profits at the bank fell by a tenth.",
        "All afternoon, a cat was asleep on the couch.",
        "The bank earned ten percent less this quarter." + " It said so." * 300,  # cut
    ]
    embeddings = embed(texts)
    assert embeddings.shape == (4, 384)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(embed(texts, batch_size=1), embeddings, rtol=1e-4, atol=1e-5)
    assert (embeddings[0] @ embeddings[2]) > 0.7
    assert (embeddings[0] @ embeddings[1]) < 0.2
    assert coherence(embeddings[[0, 2]]) > coherence(embeddings) > coherence(embeddings[:2])


def test_embeddings_are_made_as_the_models_own_files_say():
    folder = models.minilm_dir()
    modules = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    names = [module.rpartition(".")[2] for module in modules]
    assert names == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, on in pooling.items() if on is True] == ["pooling_mode_mean_tokens"]
    sentence = json.loads((folder / "sentence_bert_config.json").read_text())
    assert sentence["max_seq_length"] == 256


PROMPT = "I think that"


@pytest.fixture(scope="module", params=["TransformerBridge", "HookedTransformer"])
def model(request):
    return load_model("demo:smollm2", request.param)


@pytest.fixture
def site(model):
    return Site.at(model, 6)


@pytest.fixture
def mxd(site):
    """The MLP in eight equal parts, four of which are always on."""
    mxd = MxD.from_mlp(site.model.blocks[6].mlp, d_sae=8, k=4)
    mxd.cfg.metadata = SAEMetadata(hook_name=site.hook_in, hook_name_out=site.hook_out)
    return mxd


@torch.no_grad()
def test_half_of_the_mlp_more_is_one_and_a_half_times_its_output(site, mxd):
    model = site.model
    tokens = model.to_tokens(PROMPT)
    original, cache = model.run_with_cache(tokens)
    x, y = (cache[hook][0, 1:] for hook in site.hooks)
    (amount,) = calibrate_strength(mxd, [7], 0.5, x, y.norm(dim=-1).mean().item())
    assert amount.item() == pytest.approx(0.5, rel=1e-3)
    more = [(site.hook_out, lambda y, hook: 1.5 * y)]
    expected = model.run_with_hooks(tokens, fwd_hooks=more)
    assert (expected - original).abs().max() > 0.1
    with model.saes([mxd], use_error_term=True), steer(model, mxd, [7], add=amount):
        torch.testing.assert_close(model(tokens), expected, rtol=1e-3, atol=5e-3)


def test_steered_text(model, mxd):
    tokens = model.to_tokens(PROMPT)
    original = model(tokens)
    plain, steered = generate_steered(
        model, mxd, [6, 7], torch.tensor([0.0, 20.0]), n_tokens=8, temperature=0.0, prompt=PROMPT
    )
    expected = model.generate(
        PROMPT, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert expected.removeprefix("<|im_start|>") == PROMPT + plain[0]
    assert steered != plain
    assert torch.equal(model(tokens), original)
