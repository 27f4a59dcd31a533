import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import minimize
from sklearn import metrics

from mxd_lens.analysis.probing import (
    labelled_activations,
    pool_layer,
    pool_neurons,
    probe,
    split_texts,
    summarise,
)
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import TextActivations, text_activations, word_activations
from mxd_lens.models.site import Site

from ..conftest import SENTENCES
from ..helpers import HOOK_IN, random_layer

BOS, EOS = 1, 2
TEXTS = [*SENTENCES, "cat", "the cat </s> sat", "fish " * 40, "one dog sat on a dog"]
N_CTX = 9
LAYERS = ["mxd", "jumprelu_mxd", "topk_skip_transcoder", "skip_transcoder", "topk", "standard"]


def plain_means(model, hook, encode):
    """Means over each text's non-special tokens, read without batches or padding."""
    means = []
    for text in TEXTS:
        tokens = model.to_tokens(text)[:, :N_CTX]
        assert tokens[0, 0] == BOS
        ordinary = ~torch.isin(tokens, torch.tensor([BOS, EOS]))
        x = model.run_with_cache(tokens, names_filter=hook)[1][hook][ordinary]
        means.append(encode(x).mean(0).detach())
    return torch.stack(means).numpy()


@pytest.mark.parametrize(
    ("lm", "hidden"),
    [("tiny_hooked", "blocks.1.mlp.hook_post"), ("tiny_bridge", "blocks.1.mlp.out.hook_in")],
    indirect=["lm"],
)
def test_pooled_features_are_the_means_over_non_special_tokens(lm, hidden):
    if hidden.endswith("hook_post"):
        # A HookedTransformer's GLU adds this to its neurons; `read_mlp` makes it an output bias.
        lm.blocks[1].mlp.b_in.data.zero_()
    site = Site.at(lm, 1)
    activations = text_activations(site, TEXTS, context_size=N_CTX, lm_batch_size=3)
    assert tuple(activations.at) == site.hooks
    close = {"rtol": 1e-4, "atol": 1e-5}
    for sae in (random_layer(name, lm) for name in LAYERS):
        expected = plain_means(lm, sae.cfg.metadata.hook_name, sae.encode)
        np.testing.assert_allclose(pool_layer(sae, activations).toarray(), expected, **close)
    neurons = pool_neurons(site, activations)
    np.testing.assert_allclose(neurons, plain_means(lm, hidden, lambda z: z), **close)


def test_the_model_is_run_no_further_than_the_hook(tiny_bridge):
    ran = []
    tiny_bridge.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    text_activations(Site.at(tiny_bridge, 1), SENTENCES)
    assert not ran


def test_words_are_read_at_their_last_token(tiny_bridge):
    """In a text cut at the context's end, and after a special token inside."""
    site, texts = Site.at(tiny_bridge, 1), ["the cat </s> sat on a dog", "fish " * 40, "one dog"]
    words = [(texts[0], 7), (texts[0], 16), (texts[1], 4), (texts[1], 199), (texts[2], 7)]
    words.append((texts[2], 3))
    activations, read = word_activations(site, *zip(*words, strict=True), context_size=N_CTX)
    assert read == [0, 1, 2, 4, 5] and activations.text.tolist() == [0, 1, 2, 3, 4]
    for row, word in enumerate(read):
        text, end = words[word]
        tokens = tiny_bridge.to_tokens(text)[:, :N_CTX]
        at = len(tiny_bridge.to_tokens(text[:end])[0]) - 1
        cache = tiny_bridge.run_with_cache(tokens, names_filter=list(site.hooks))[1]
        for hook in site.hooks:
            torch.testing.assert_close(activations.at[hook][row], cache[hook][0, at])


def test_labelled_words_are_probed_as_texts_of_one_token(tiny_bridge, tmp_path):
    path, site = str(tmp_path / "words.jsonl"), Site.at(tiny_bridge, 1)
    words = [["the", "cat", "sat"], ["one", "dog", "sat"], ["fish", "ran"], ["a", "cat", "ran"]]
    labels = [["O", "animal", "verb"], ["O", "animal", "verb"], ["animal", "verb"]]
    labels.append(["O", "animal", "verb"])
    rows = [{"tokens": of_text, "tags": tags} for of_text, tags in zip(words, labels, strict=True)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="only 3 different texts of class 'O'"):
        load_labelled(path, text_column="tokens", label_column="tags", n_texts=12)
    rows.append({"tokens": ["the", "dog"], "tags": ["O", "animal"]})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_labelled(path, text_column="tokens", label_column="tags", n_texts=12)
    assert sorted(data["label"]) == ["O"] * 4 + ["animal"] * 4 + ["verb"] * 4
    is_animal = [
        text[:end].split()[-1] in ("cat", "dog", "fish")
        for text, end in zip(data["text"], data["end"], strict=True)
    ]
    assert is_animal == [label == "animal" for label in data["label"]]
    activations, labels = labelled_activations(site, data, context_size=N_CTX)
    assert labels == data["label"][:] and activations.n_texts == 12
    mxd = random_layer("mxd")
    expected = mxd.encode(activations.at[HOOK_IN]).detach().numpy()
    np.testing.assert_allclose(pool_layer(mxd, activations).toarray(), expected, rtol=1e-5)


def test_long_texts_are_pooled_in_chunks():
    sae, sizes = random_layer("mxd"), []
    text = torch.tensor([0] * 5000 + [1] * 3 + [2] * 4000)
    x = torch.randn(len(text), 16)
    expected = [sae.encode(x[text == i]).mean(0).detach().numpy() for i in range(3)]
    sae.hook_in.add_hook(lambda of_tokens, hook: sizes.append(len(of_tokens)))
    pooled = pool_layer(sae, TextActivations({HOOK_IN: x}, text, 3))
    np.testing.assert_allclose(pooled.toarray(), np.stack(expected), rtol=1e-4, atol=1e-6)
    assert max(sizes) <= 4096 and sum(sizes) == len(text)


def test_texts_hooks_and_layers_that_cannot_be_read(tiny_bridge):
    site = Site.at(tiny_bridge, 1)
    with pytest.raises(ValueError, match=r"text 1 has no non-special token: '</s>'"):
        text_activations(site, ["cat", "</s>"])
    activations = text_activations(site, ["cat"])
    mxd = random_layer("mxd")
    for hook, message in [
        ("blocks.0.mlp.hook_in", r"activations of blocks\.1.*none of blocks\.0"),
        (None, "must say hook_name"),
    ]:
        mxd.cfg.metadata.hook_name = hook
        with pytest.raises(ValueError, match=message):
            pool_layer(mxd, activations)
    with pytest.raises(ValueError, match="dense control has no sparse units to probe"):
        pool_layer(random_layer("dense"), activations)


# Probes


def noise(n_texts=300, d=60):
    return np.random.default_rng(0).gamma(0.5, size=(n_texts, d)).astype(np.float32)


@pytest.fixture
def labels():
    return ["sport", "tech", "tech", "trade", "trade", "trade"] * 50


@pytest.fixture(params=[np.asarray, sparse.csr_array])
def kept(request):
    """``kept(features)``: as an array, or a sparse one."""
    return request.param


def test_planted_features_are_found_and_tell_all(labels, kept):
    features = noise()
    planted = {"sport": 7, "tech": 59, "trade": 0}
    for name, feature in planted.items():
        features[:, feature] = np.where(np.array(labels) == name, 12.0, 0.5)
    features[:, 59] *= -1  # a feature that goes down is as good
    rows = probe(kept(features), labels, n_features=(1, 2, None))
    assert len(rows) == 9
    for row in rows:
        assert row["features"] is None or row["features"][0] == planted[row["class"]]
        if row["n_features"] != 2:
            assert len(row["features"] or [0]) == 1
            assert [row[s] for s in ("accuracy", "balanced_accuracy", "f1", "roc_auc")] == [1] * 4
    json.dumps(rows)
    assert {row["n_train"] for row in rows} == {row["n_test"] for row in rows} == {150}


@pytest.mark.parametrize("n", [5, None])
def test_scores_are_those_of_a_plain_logistic_regression(labels, kept, n):
    features = noise()
    features[:, 3] += np.array(labels) == "tech"
    train, test = split_texts(labels, 0.4, seed=5)
    assert not set(train) & set(test) and len(test) == 120
    for name in set(labels):
        assert sum(labels[i] == name for i in test) == 0.4 * labels.count(name)

    rows = probe(kept(features), labels, n_features=(n,), test_size=0.4, seed=5)
    row = next(row for row in rows if row["class"] == "tech")
    is_class = np.array(labels) == "tech"
    gap = [
        abs(x[train][is_class[train]].mean() - x[train][~is_class[train]].mean()) / x[train].std()
        for x in features.T
    ]
    assert row["features"] in (None, sorted(range(60), key=lambda i: -gap[i])[:5])
    x = features[:, row["features"] or slice(None)].astype(np.float64)
    x = (x - x[train].mean(0)) / x[train].std(0)
    sign = np.where(is_class, 1, -1)
    weight = np.where(is_class, 3 / 2, 3 / 4)  # a third of the texts and two thirds: as one half

    def loss(w):
        errors = np.logaddexp(0, -sign * (x @ w[1:] + w[0]))
        return w[1:] @ w[1:] / 2 + (weight * errors)[train].sum()

    w = minimize(loss, np.zeros(x.shape[1] + 1)).x
    score = x[test] @ w[1:] + w[0]
    guess, truth = score > 0, is_class[test]
    assert row["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert row["f1"] == pytest.approx(metrics.f1_score(truth, guess))
    assert row["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, guess))
    assert row["roc_auc"] == pytest.approx(metrics.roc_auc_score(truth, score), abs=2e-3)
    assert 0.6 < row["roc_auc"] < 1


def test_with_shuffled_labels_every_probe_falls_to_chance(labels):
    features = noise()
    for i, name in enumerate(["sport", "tech", "trade"]):
        features[:, i] += 8 * (np.array(labels) == name)
    assert all(row["f1"] > 0.85 for row in summarise(probe(features, labels)))
    runs = []
    for seed in range(4):
        shuffled = np.random.default_rng(seed).permutation(labels).tolist()
        runs.append(summarise(probe(features, shuffled, n_features=(0, 1, 2, 5, None))))
    for rows in zip(*runs, strict=True):
        # The mean of 12 probes of 150 texts each: three standard deviations.
        for score, slack in (("balanced_accuracy", 0.05), ("roc_auc", 0.06)):
            assert np.mean([row[score] for row in rows]) == pytest.approx(0.5, abs=slack)


def test_the_held_out_texts_are_never_looked_at(labels):
    features = noise()
    train, test = split_texts(labels, seed=2)
    leaking = features.copy()
    for i, name in enumerate(["sport", "tech", "trade"]):
        leaking[test, i] = 50.0 * (np.array(labels)[test] == name)
    clean, leaked = (probe(x, labels, seed=2) for x in (features, leaking))
    assert [row["features"] for row in leaked] == [row["features"] for row in clean]
    for before, after in zip(clean, leaked, strict=True):
        if before["features"] and not {0, 1, 2} & set(before["features"]):
            assert before == after
    assert max(row["balanced_accuracy"] for row in leaked if row["n_features"] == 1) < 0.65
    # Planted in the training texts it is chosen: that half decides.
    leaking[train, 1] = 50.0 * (np.array(labels)[train] == "tech")
    chosen = [r["features"] for r in probe(leaking, labels, seed=2) if r["class"] == "tech"]
    assert chosen[0] == [1]


def test_no_feature_is_the_majority_guess(labels, kept):
    for row in probe(kept(noise()), labels, n_features=(0,)):
        share = labels.count(row["class"]) / len(labels)
        assert row["features"] == []
        if share != 0.5:
            assert [row["accuracy"], row["f1"]] == [pytest.approx(1 - share), 0]
        assert row["balanced_accuracy"] == row["roc_auc"] == 0.5


def test_a_summary_is_the_mean_over_classes(labels):
    rows = probe(noise(), labels, n_features=(1, None), seed=1)
    summary = summarise(rows)
    assert [row["n_features"] for row in summary] == [1, None]
    f1 = [row["f1"] for row in rows if row["n_features"] is None]
    assert len(f1) == 3 and summary[1]["f1"] == pytest.approx(sum(f1) / 3)
    # A seed decides the split, and nothing else does.
    assert probe(noise(), labels, n_features=(1, None), seed=1) == rows
    assert split_texts(labels, seed=1)[0].tolist() != split_texts(labels, seed=2)[0].tolist()


def test_probes_that_cannot_be_fitted(labels, kept):
    for features, names, options, message in [
        (noise(), labels[1:], {}, "299 labels for 300 texts"),
        (noise(), labels, {"n_features": (61,)}, "cannot read 61 features out of 60"),
        (noise() * np.inf, labels, {}, "not finite"),
        (noise(3), ["a", "a", "a"], {}, r"at least 2 classes, got \['a'\]"),
        (noise(301), [*labels, "rare"], {}, "too few texts of class 'rare'"),
        (noise(302), [*labels, *["rare"] * 2], {"test_size": 0.1}, "too few texts of class 'rare'"),
    ]:
        with pytest.raises(ValueError, match=message):
            probe(kept(features), names, **options)
