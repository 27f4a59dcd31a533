"""Experts inspected, against dense and plain forms of the same numbers."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxd_lens.analysis.experts.contexts import (
    histograms_of,
    meaning,
    name_experts,
    pick_contexts,
)
from mxd_lens.analysis.experts.corpus import (
    Corpus,
    Firings,
    read_corpus,
    read_firings,
    token_strings,
)
from mxd_lens.analysis.experts.effects import logit_effects
from mxd_lens.analysis.experts.nearest import (
    coactive,
    coactive_by_chance,
    mean_best,
    nearest_experts,
)
from mxd_lens.analysis.experts.report import inspect_experts
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site

from ..conftest import D_MLP, D_MODEL, N_VOCAB, WORDS
from ..helpers import random_layer

BOS, N_CTX = 1, 14
MODELS = ["tiny_hooked", "tiny_bridge", "tiny_bridge_gpt2"]


@pytest.fixture
def site(tiny_bridge):
    return Site.at(tiny_bridge, 1)


def bag_of_words(texts):
    """A small embedding: which words occur."""
    return torch.tensor(
        [[float(text.split().count(word)) + 0.01 for word in WORDS] for text in texts]
    )


def dense(model, sae, texts):
    """By text, ids and activations of its non-special tokens, read one by one."""
    hook = sae.cfg.metadata.hook_name
    for text in texts:
        tokens = model.to_tokens(text)[:, :N_CTX]
        assert tokens[0, 0] == BOS
        _, cache = model.run_with_cache(tokens, names_filter=hook)
        kept = tokens[0] > 2
        yield tokens[0, kept], sae.encode(cache[hook][0])[kept].detach().numpy()


# Firing


@pytest.mark.parametrize(
    "kind", ["mxd", "jumprelu_mxd", "molt", "topk_skip_transcoder", "standard"]
)
@pytest.mark.parametrize("lm", MODELS, indirect=True)
def test_report_agrees_with_dense_activations(lm, kind, documents):
    model = lm
    sae = random_layer(kind, model)
    texts = documents["text"][:60]
    options = {"context_size": N_CTX, "lm_batch_size": 7, "embed": bag_of_words}
    report = inspect_experts(model, sae, texts, **options)
    json.dumps(report, allow_nan=False)
    ids, acts = zip(*dense(model, sae, texts), strict=True)
    every = np.concatenate(acts)
    strings = ["".join(of_text) for of_text in report["texts"]]
    where = {" " + model.tokenizer.decode(of_text): i for i, of_text in enumerate(ids)}
    assert report["n_tokens"] == len(every)
    assert [e["id"] for e in report["experts"]] == np.flatnonzero(every.max(0) > 0).tolist()
    assert report["n_live"] == len(report["experts"]) > 10
    n_weaker = 0
    for expert in report["experts"]:
        fired = every[:, expert["id"]]
        fired = fired[fired > 0]
        assert expert["density"] == pytest.approx(len(fired) / len(every), rel=1e-3)
        assert expert["mean"] == pytest.approx(fired.mean(), rel=1e-3)
        assert expert["max"] == pytest.approx(fired.max(), rel=1e-3)
        assert len(expert["histogram"]) == 20 and sum(expert["histogram"]) == len(fired)
        found = []
        for context in expert["contexts"]:
            text = where[strings[context["text"]]]
            value = acts[text][context["position"], expert["id"]]
            assert context["value"] == pytest.approx(value, rel=1e-3)
            found.append((text, context["position"]))
            if context["quantile"] < 1:
                weaker, not_stronger = ((fired < by * value).mean() for by in (0.999, 1.001))
                slack = 2.1 / len(fired)
                assert weaker - slack < context["quantile"] < not_stronger + slack
                n_weaker += 1
        assert len(set(found)) == len(found)
        top = [c["value"] for c in expert["contexts"] if c["quantile"] == 1]
        best = sorted((a[:, expert["id"]].max() for a in acts), reverse=True)[:10]
        assert top == pytest.approx([value for value in best if value > 0], rel=1e-3)
        assert len({text for text, _ in found[: len(top)]}) == len(top)
        assert (expert["coherence"] is None) == (len(top) < 10)
        assert expert["promoted"] is expert["suppressed"] is expert["sample"] is None
    assert n_weaker > 3 * report["n_live"]


def test_data_sets_and_lists_give_the_same_every_time(tiny_bridge, documents):
    sae = random_layer("mxd")
    options = {"context_size": N_CTX, "embed": bag_of_words, "n_tokens": 300}
    reports = [
        inspect_experts(tiny_bridge, sae, texts, **options)
        for texts in (documents, documents["text"], documents.to_iterable_dataset())
    ]
    assert reports[0] == reports[1] == reports[2]


def test_documents_are_read_once_up_to_the_number_of_tokens(site):
    cats = [" ".join(["cat"] * n) for n in range(2, 20)]
    texts = ["", "</s>", cats[0], cats[0], "dog </s> dog", *cats]
    corpus = read_corpus(site, texts, 100, 11)
    assert [len(of_text) - 1 for of_text in corpus.tokens][:3] == [2, 3, 3]
    assert corpus.string(2, 4).split() == ["dog", "dog"]
    lengths = np.diff(corpus.starts).tolist()
    assert lengths == [2, 2, 3, 4, 5, 6, 7, 8, 9, *[10] * 6]  # 10 is as far as a text is read
    assert sum(lengths[:-1]) < 100 <= sum(lengths) == len(corpus.ids)
    assert all(of_text[0] == BOS for of_text in corpus.tokens)


def test_pieces_of_text_are_about_equally_long():
    lengths = [1, 47, 49, 200]
    text, starts = np.repeat(range(4), lengths), np.cumsum([0, *lengths])
    strings = [f" {word}" for word in np.array(["one", "cat", "dog", "fish"])[text]]
    pieces, chunk = Corpus([], text, strings, text, starts).chunks()
    sizes = [len(piece.split()) for piece in pieces]
    assert sizes[:4] == [1, 47, 25, 24] and set(sizes[4:]) == {33, 34} and len(sizes) == 10
    assert np.bincount(chunk).tolist() == sizes
    assert all(len(set(piece.split())) == 1 for piece in pieces)


@pytest.fixture
def toy(site, documents):
    """A corpus and firings made up, with the activations [tokens, experts] they are of."""
    corpus = read_corpus(site, documents["text"], 1200, 30)
    rng = np.random.default_rng(0)
    shape = (len(corpus.ids), 7)
    acts = rng.gamma(2.0, size=shape) * (rng.random(shape) < [0.5, 0.3, 0, 0.02, 0.004, 0.1, 0.1])
    acts[:, 5] = acts[:, 6] * (rng.random(shape[0]) < 0.7)
    acts = acts.astype(np.float32)
    token, expert = np.nonzero(acts)
    order = rng.permutation(len(token))
    return corpus, Firings.sort(expert[order], token[order], acts[token, expert][order]), acts


def test_firings_are_sorted_and_counted(toy):
    _, firings, acts = toy
    assert firings.live.tolist() == [0, 1, 3, 4, 5, 6]
    histograms = histograms_of(firings)
    for row, expert in enumerate(firings.live):
        part = slice(*firings.starts[row : row + 2])
        fired = acts[:, expert][acts[:, expert] > 0]
        assert (firings.row[part] == row).all()
        np.testing.assert_array_equal(firings.value[part], acts[firings.token[part], expert])
        np.testing.assert_array_equal(firings.value[part], -np.sort(-fired))
        expected, _ = np.histogram(fired, bins=20, range=(0, fired.max()))
        np.testing.assert_array_equal(histograms[row], expected)
    assert len(firings.value) == (acts > 0).sum()


def test_contexts_are_the_strongest_of_each_text_and_weaker_ones(toy):
    corpus, firings, acts = toy
    contexts, quantiles = pick_contexts(firings, corpus)
    assert quantiles == [1.0] * 10 + [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    for expert, of_expert in zip(firings.live, contexts, strict=True):
        best = {}
        for token in np.flatnonzero(acts[:, expert]):
            text = corpus.text[token]
            if acts[token, expert] > acts[best.get(text, token), expert] or text not in best:
                best[text] = token
        expected = sorted(best.values(), key=lambda token: -acts[token, expert])[:10]
        top = of_expert[:10][of_expert[:10] >= 0]
        assert firings.token[top].tolist() == expected
        rest = of_expert[of_expert >= 0]
        assert len(set(rest)) == len(rest)
        assert set(firings.live[firings.row[rest]]) == {expert}
    fired = np.sort(acts[:, 0][acts[:, 0] > 0])
    found = firings.value[contexts[0, 10:]].reshape(3, 2)
    for quantile, pair in zip((0.75, 0.5, 0.25), found, strict=True):
        place = np.searchsorted(fired, pair)
        assert place[0] - place[1] == 1
        assert place[0] == pytest.approx(quantile * (len(fired) - 1), abs=0.51)


# Meaning


@pytest.fixture
def planted(site):
    """A corpus of 120 texts of mixed words and 12 about fish, and firings planted in it."""
    rng = random.Random(0)
    mixed = [w for w in WORDS if w not in ("fish", "saw")]
    texts = [
        " ".join([*rng.choices(mixed, k=9), "cat", *rng.choices(mixed, k=9)]) for _ in range(120)
    ]
    fishy = [" ".join([*["fish"] * (i + 1), "saw", "the", "fish", "dog"]) for i in range(12)]
    corpus = read_corpus(site, texts + fishy, 10**6, 32)

    def at(texts, word=None):
        for i in texts:
            place = range(*corpus.starts[i : i + 2])
            yield next(t for t in place if word in (None, corpus.strings[t].strip()))

    the = [i for i in range(120) if " the" in corpus.strings[slice(*corpus.starts[i : i + 2])]]
    plan = [
        [*at(range(120, 130), "saw")],  # one topic
        [*at(range(10))],  # nothing in common
        [*at(range(20, 29), "cat"), *at([30])],  # one word, nine times of ten
        [*at(the[:10], "the")],  # one word, which is a stop word
        [*at(range(120, 129), "saw")],  # too few texts
        [*at(range(40, 50), "cat")],  # one word, ten times
    ]
    row = np.concatenate([[i] * len(tokens) for i, tokens in enumerate(plan)])
    token = np.concatenate(plan)
    value = np.linspace(2, 1, len(token), dtype=np.float32)
    firings = Firings.sort(row, token, value)
    return corpus, firings, pick_contexts(firings, corpus)[0][:, :10]


def test_one_topic_or_one_word_is_meaningful(planted):
    corpus, firings, top = planted
    coherence, same_token, meaningful, rule = meaning(top, firings, corpus, bag_of_words)
    assert meaningful.tolist() == [True, False, True, False, False, True]
    assert same_token[[0, 2, 3, 4, 5]].tolist() == [1, pytest.approx(0.9), 1, 1, 1]
    assert np.isnan(coherence).tolist() == [False] * 4 + [True, False]
    threshold = float(re.search(r"above (\d\.\d+)", rule)[1])
    assert coherence[0] > threshold > coherence[[1, 2, 3, 5]].max()
    pieces, chunk = corpus.chunks()
    for row in (0, 1):
        x = bag_of_words([pieces[chunk[firings.token[i]]] for i in top[row]])
        cosines = F.cosine_similarity(x[:, None], x[None], dim=-1)
        pairs = cosines[~torch.eye(10, dtype=torch.bool)]
        assert coherence[row] == pytest.approx(pairs.mean().item(), abs=1e-5)


def test_the_threshold_is_passed_by_one_random_set_in_a_hundred(planted):
    corpus, *_ = planted
    rng = np.random.default_rng(5)
    tokens = []
    for _ in range(1500):
        one_of_each = rng.permutation(len(corpus.ids))
        _, first = np.unique(corpus.text[one_of_each], return_index=True)
        tokens.append(one_of_each[np.sort(first)[:10]])
    rows, values = np.repeat(range(1500), 10), np.ones(15_000, np.float32)
    firings = Firings.sort(rows, np.concatenate(tokens), values)
    top = pick_contexts(firings, corpus)[0][:, :10]
    coherence, _, _, rule = meaning(top, firings, corpus, bag_of_words)
    threshold = float(re.search(r"above (\d\.\d+)", rule)[1])
    assert 0.003 < (coherence > threshold).mean() < 0.025


def test_names_are_words_the_contexts_have_and_the_rest_has_not(planted):
    corpus, firings, top = planted
    names = name_experts(top, firings, corpus)
    assert names[0].split(" · ") == ["saw", "fish", "dog"]
    assert names[2].split(" · ")[0] == names[5].split(" · ")[0] == "cat"
    assert not {"the", "after", "one"} & {word for name in names for word in name.split(" · ")}


# Effects


def with_contexts(site, sae, documents):
    """Corpus, firings and top contexts of texts of up to 7 words, and of 3 of 8 words, which are
    those that effects are measured in."""
    texts = [" ".join(text.split()[: 3 + i % 5]) for i, text in enumerate(documents["text"][:60])]
    texts = [*dict.fromkeys(texts), *(" ".join(WORDS[i : i + 8]) for i in range(3))]
    corpus = read_corpus(site, texts, 10**6, 30)
    firings = read_firings(site, sae, corpus)
    return pick_contexts(firings, corpus)[0][:, :10], firings, corpus


@torch.no_grad()
def manual_changes(site, directions, pieces):
    """[experts, d_vocab], one pass of the model for each expert and piece."""
    changes = []
    for row in directions:
        hooks = [(site.hook_out, lambda y, hook, row=row: torch.cat([y[:, :1], y[:, 1:] + row], 1))]
        of_row = [
            (site.model.run_with_hooks(tokens, fwd_hooks=hooks) - site.model(tokens))[0, -1]
            for tokens in pieces
        ]
        changes.append(torch.stack(of_row).mean(0))
    changes = torch.stack(changes)
    return changes - changes.mean(-1, keepdim=True)


def manual_typical(top, firings, corpus):
    """[experts, d_vocab]: how typical tokens are of contexts, by loops over both."""
    frequency = np.bincount(corpus.ids, minlength=N_VOCAB) / len(corpus.ids)
    windows = []
    for of_expert in top:
        where = [corpus.around(int(firings.token[i]), 12) for i in of_expert if i >= 0]
        windows.append([{*corpus.ids[start:end].tolist()} for start, end in where])
    size = np.mean([len(window) for of_expert in windows for window in of_expert])
    typical = np.zeros((len(top), N_VOCAB))
    for expert, of_expert in enumerate(windows):
        for token in set.union(*of_expert):
            c = sum(token in window for window in of_expert)
            expected = len(of_expert) * (1 - math.exp(-size * frequency[token]))
            if c > 1:
                typical[expert, token] = max(0.0, c * math.log(c / expected))
    return typical


def manual_agreement(changes, typical):
    spread = changes.std(0)
    changes = (changes - changes.mean(0)) / np.maximum(spread, spread.mean())
    norms = np.outer(np.linalg.norm(changes, axis=1), np.linalg.norm(typical, axis=1))
    scores = changes @ typical.T / np.where(norms, norms, 1)
    scores -= scores.mean(0)
    return [(row < row[i]).sum() / (len(row) - 1) for i, row in enumerate(scores)]


@pytest.mark.parametrize("lm", MODELS, indirect=True)
def test_promoted_tokens_are_those_of_plain_passes(lm, documents):
    model, site = lm, Site.at(lm, 1)
    top, firings, corpus = with_contexts(site, random_layer("mxd", model), documents)
    directions = torch.randn(len(top), D_MODEL)
    tokens = torch.tensor([[BOS, 5, 6, 7]])
    before = model(tokens)
    promoted, suppressed, agreement = logit_effects(
        model, site.hook_out, directions, top, firings, corpus, n=5, n_pieces=3, batch_size=8
    )
    pieces = [torch.from_numpy(np.r_[BOS, ids])[None] for ids in np.split(corpus.ids[-24:], 3)]
    changes = manual_changes(site, directions, pieces)
    strings = token_strings(model.tokenizer, range(N_VOCAB))
    close = {"rel": 2e-3, "abs": 1e-4}
    for expected, most, least in zip(changes - changes.mean(0), promoted, suppressed, strict=True):
        assert expected.abs().max() > 0.01
        assert [x for _, x in most] == pytest.approx(expected.topk(5)[0].tolist(), **close)
        assert [x for _, x in least] == pytest.approx((-(-expected).topk(5)[0]).tolist(), **close)
        for string, change in most + least:
            if strings.count(string) == 1:  # the model knows more ids than the tokenizer
                assert change == pytest.approx(expected[strings.index(string)].item(), **close)
    expected = manual_agreement(changes.double().numpy(), manual_typical(top, firings, corpus))
    assert agreement == pytest.approx(expected, abs=0.051)
    assert 0.2 < np.mean(agreement) < 0.8
    # The model is as it was: the same logits, and hooks that work.
    torch.testing.assert_close(model(tokens), before)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(site.hook_out, lambda y, hook: y * 0)])
    assert (edited - before).abs().max() > 0.01


def test_experts_that_write_what_they_fire_on_agree(site, documents):
    """Written is what raises the tokens that are typical of the expert's own contexts."""
    top, firings, corpus = with_contexts(site, random_layer("mxd"), documents)
    typical = F.normalize(torch.from_numpy(manual_typical(top, firings, corpus)).float())
    W_U = site.model.unembed.weight.detach()
    towards = (typical - typical.mean(0)) @ torch.linalg.pinv(W_U).T
    *_, agreement = logit_effects(site.model, site.hook_out, 30 * towards, top, firings, corpus)
    assert np.mean(agreement) > 0.75


def test_effects_are_in_the_report(site, documents):
    sae = random_layer("mxd")
    directions = torch.randn(sae.cfg.d_sae, D_MODEL)
    options = {"context_size": N_CTX, "embed": bag_of_words, "n_tokens": 400}
    report = inspect_experts(site.model, sae, documents, directions=directions, **options)
    corpus = read_corpus(site, documents, 400, N_CTX)
    firings = read_firings(site, sae, corpus)
    top = pick_contexts(firings, corpus)[0][:, :10]
    effects = logit_effects(
        site.model, site.hook_out, directions[firings.live], top, firings, corpus
    )
    for expert, *expected in zip(report["experts"], *effects, strict=True):
        assert [expert[key] for key in ("promoted", "suppressed", "agreement")] == expected
    json.dumps(report, allow_nan=False)


# Weights


@pytest.mark.parametrize("full", [True, False])
def test_ranks_are_those_of_the_experts_matrices(full):
    sae = random_layer("mxd")
    with torch.no_grad():
        sae.W_dec[3, :6] = 0
        sae.W_dec[4] = 0
        if not full:
            sae.W_shared.copy_(torch.randn(D_MLP, 3) @ torch.randn(3, D_MODEL))
    rank, effective = layer_of(sae).ranks()
    for n in range(sae.cfg.d_sae):
        s = torch.linalg.svdvals(sae.expert_weights(n)).detach()
        expected = s.square().sum().square() / s.pow(4).sum() if n != 4 else 0
        assert effective[n] == pytest.approx(float(expected), rel=1e-4)
        assert rank[n] == (s > 1e-5).sum()
    assert rank[[0, 3, 4]].tolist() == ([16, 10, 0] if full else [3, 3, 0])


def test_ranks_of_a_molt_are_those_of_its_transforms():
    sae = random_layer("molt", rank=5)
    with torch.no_grad():
        sae.W_dec[3, :2] = 0
        sae.W_read[4] = 0
        sae.W_dec[5, 1] = sae.W_dec[5, 0]
    rank, effective = layer_of(sae).ranks()
    for n in range(sae.cfg.d_sae):
        s = torch.linalg.svdvals(sae.transform(n)).detach()
        expected = s.square().sum().square() / s.pow(4).sum() if n != 4 else 0
        assert effective[n] == pytest.approx(float(expected), rel=1e-4)
        assert rank[n] == torch.linalg.matrix_rank(sae.transform(n))
    assert rank[[0, 3, 4, 5]].tolist() == [5, 3, 0, 4]


@pytest.mark.parametrize("kind", ["topk_skip_transcoder", "standard"])
def test_other_layers_units_have_rank_one(kind):
    sae = random_layer(kind)
    with torch.no_grad():
        sae.W_dec[2] = 0
    rank, effective = layer_of(sae).ranks()
    assert rank.tolist() == [int(n != 2) for n in range(40)] == effective.tolist()


@pytest.mark.parametrize("kind", ["mxd", "molt", "topk_skip_transcoder", "standard"])
def test_nearest_experts_are_those_of_the_nearest_weights(kind):
    sae = random_layer(kind, d_sae=600)
    own = {"mxd": "expert_weights", "molt": "transform"}
    maps = getattr(sae, own[kind]) if kind in own else sae.W_dec.__getitem__
    experts = np.array([n for n in range(600) if n % 9])
    rows = F.normalize(torch.stack([maps(n).detach().flatten() for n in experts.tolist()]))
    similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
    found = nearest_experts(layer_of(sae), experts)
    for of_expert, row in zip(found, similarity, strict=True):
        ids, cosines = zip(*of_expert, strict=True)
        best, places = row.topk(5)
        assert list(ids) == experts[places].tolist()
        assert cosines == pytest.approx(best.tolist(), abs=1e-5)


def test_coactive_have_the_largest_jaccard_index(toy):
    corpus, firings, acts = toy
    active = acts[:, firings.live] > 0
    for i, of_expert in enumerate(coactive(firings, len(corpus.ids))):
        expected = {}
        for j, other in enumerate(firings.live):
            both, either = active[:, i] & active[:, j], active[:, i] | active[:, j]
            if i != j and both.any():
                expected[int(other)] = both.sum() / either.sum()
        assert dict(of_expert) == pytest.approx(expected, rel=1e-5)
        scores = [score for _, score in of_expert]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_nearest_in_another_layer_are_those_of_a_dense_count(toy, n):
    corpus, firings, acts = toy
    n_tokens, rng = len(corpus.ids), np.random.default_rng(1)
    theirs = rng.random((n_tokens, 9)) < [0.4, 0, 0.2, 0.05, 0.3, 0.01, 0.1, 0.2, 0]
    theirs[:, 6] = (acts[:, 6] > 0) & (rng.random(n_tokens) < 0.8)
    theirs[:, 2] &= acts[:, 0] == 0  # never with 0
    token, expert = np.nonzero(theirs)
    others = Firings.sort(expert, token, np.ones(len(token), np.float32))

    def jaccard(theirs):
        both = (acts[:, :, None] > 0) & theirs[:, None]
        either = (acts[:, :, None] > 0) | theirs[:, None]
        return both.sum(0) / np.maximum(either.sum(0), 1)

    scores = jaccard(theirs)
    found = coactive(firings, n_tokens, n, others)
    assert len(found) == len(firings.live)
    for of_expert, row in zip(found, scores[firings.live], strict=True):
        best = np.sort(row[row > 0])[::-1][:n]
        assert [score for _, score in of_expert] == pytest.approx(best.tolist(), rel=1e-5)
        for i, score in of_expert:
            assert row[i] == pytest.approx(score, rel=1e-5)
    assert found[-1][0][0] == 6 and found[-1][0][1] > 0.7
    assert 2 not in dict(found[0])
    assert mean_best(found) == pytest.approx(scores[firings.live].max(1).mean(), rel=1e-5)
    by_chance = jaccard(np.roll(theirs, n_tokens // 2, axis=0))[firings.live].max(1).mean()
    assert coactive_by_chance(firings, n_tokens, others) == pytest.approx(by_chance, rel=1e-5)


# What cannot be inspected


def test_texts_layers_and_models_that_cannot_be_inspected(tiny_bridge, documents):
    silent, nowhere, unnamed = (random_layer("mxd") for _ in range(3))
    silent.b_enc.data.fill_(-1e9)
    nowhere.cfg.metadata.hook_name = "blocks.1.nothing"
    unnamed.cfg.metadata.hook_name = None
    for sae, texts, message in [
        (silent, [*WORDS[:9], "", WORDS[0]], "9 different texts with 9 tokens are too little"),
        (silent, documents, "no expert fires"),
        (nowhere, documents, r"no hook 'blocks\.1\.nothing'"),
        (unnamed, documents, "must say hook_name"),
        (random_layer("dense"), documents, "dense control has no experts to inspect"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect_experts(tiny_bridge, sae, texts, embed=bag_of_words)


def test_tokens_keep_the_space_before_them():
    vocab = {word: i for i, word in enumerate(["<s>", "▁cat", "s", "▁", "▁dog", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([1]) == "cat"
    assert token_strings(fast, [5, 1, 2, 4]) == [".", " cat", "s", " dog"]
