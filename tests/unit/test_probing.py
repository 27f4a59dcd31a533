import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sae_lens import SkipTranscoder, SkipTranscoderConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.optimize import minimize
from transformers import AutoTokenizer

from mxd_lens.analysis.probing import pool, pool_layer, pool_neurons, probe, split_texts, summarise
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import TextActivations, text_activations

from ..conftest import D_MLP, D_MODEL, SENTENCES, randomise

BOS, EOS = 1, 2
TEXTS = [*SENTENCES, "cat", "the cat </s> sat", "fish " * 40, "one dog sat on a dog"]
N_CTX = 9


@pytest.fixture
def tiny_hooked(tiny_hooked, llama_folder):
    tiny_hooked.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
    # A HookedTransformer's GLU adds this to its neurons; `read_mlp` makes it an output bias.
    tiny_hooked.blocks[1].mlp.b_in.data.zero_()
    return tiny_hooked


def one_by_one(model, hook):
    """The activations of each text's ordinary tokens, read without batches or padding."""
    for text in TEXTS:
        tokens = model.to_tokens(text)[:, :N_CTX]
        assert tokens[0, 0] == BOS
        _, cache = model.run_with_cache(tokens, names_filter=hook)
        ordinary = [i for i, token in enumerate(tokens[0].tolist()) if token not in (BOS, EOS)]
        yield cache[hook][0, ordinary]


def plain_means(model, hook, encode):
    with torch.no_grad():
        return np.stack(
            [
                np.mean([encode(x).float().numpy() for x in of_text], axis=0)
                for of_text in one_by_one(model, hook)
            ]
        )


@pytest.mark.parametrize(
    ("fixture", "out", "hidden"),
    [
        ("tiny_hooked", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"),
        ("tiny_bridge", "blocks.1.mlp.hook_out", "blocks.1.mlp.out.hook_in"),
    ],
)
def test_pooled_features_are_the_means_of_every_layers_over_ordinary_tokens(
    request, random_mxd, fixture, out, hidden
):
    model = request.getfixturevalue(fixture)
    hook = "blocks.1.mlp.hook_in"
    metadata = SAEMetadata(hook_name=hook, hook_name_out=out)
    shape = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 40, "metadata": metadata}
    layers = {
        hook: [
            random_mxd(**shape, dtype="float32"),
            SkipTranscoder(SkipTranscoderConfig(**shape, apply_b_dec_to_input=False)),
        ],
        out: [StandardSAE(StandardSAEConfig(D_MODEL, 30, metadata=SAEMetadata(hook_name=out)))],
    }
    activations = text_activations(
        model, TEXTS, [hook, out, hook], context_size=N_CTX, lm_batch_size=3
    )
    assert list(activations.at) == [hook, out]
    close = {"rtol": 1e-4, "atol": 1e-5}
    for read, saes in layers.items():
        for sae in saes:
            randomise(sae)
            np.testing.assert_allclose(
                pool_layer(sae, activations), plain_means(model, read, sae.encode), **close
            )
    neurons = pool_neurons(model, 1, activations, hook)
    assert neurons.shape == (len(TEXTS), D_MLP)
    np.testing.assert_allclose(neurons, plain_means(model, hidden, lambda z: z), **close)
    inputs = pool(lambda x: x, activations, hook)
    np.testing.assert_allclose(inputs, plain_means(model, hook, lambda x: x), **close)


def test_the_model_is_run_no_further_than_the_hook(tiny_bridge):
    ran = []
    tiny_bridge.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    text_activations(tiny_bridge, SENTENCES, ["blocks.1.mlp.hook_in"])
    assert not ran


def test_long_texts_are_pooled_in_chunks():
    rng = np.random.default_rng(0)
    text = torch.tensor([0] * 700 + [1] * 3 + [2] * 600)
    x = torch.tensor(rng.normal(size=(len(text), 4)))
    sizes = []

    def encode(of_tokens):
        sizes.append(len(of_tokens))
        return of_tokens.relu()

    pooled = pool(encode, TextActivations({"hook": x}, text, 3), "hook")
    expected = [x[text == i].relu().mean(0).numpy() for i in range(3)]
    np.testing.assert_allclose(pooled, np.stack(expected), rtol=1e-5)
    assert max(sizes) <= 512 and sum(sizes) == len(text)


def test_texts_and_hooks_that_cannot_be_read(tiny_bridge, random_mxd):
    with pytest.raises(ValueError, match=r"no hook 'blocks\.1\.nothing'"):
        text_activations(tiny_bridge, SENTENCES, ["blocks.1.nothing"])
    with pytest.raises(ValueError, match=r"text 1 has no ordinary token: '</s>'"):
        text_activations(tiny_bridge, ["cat", "</s>"], ["blocks.1.mlp.hook_in"])
    activations = text_activations(tiny_bridge, ["cat"], ["blocks.1.mlp.hook_in"])
    with pytest.raises(ValueError, match=r"activations of blocks\.1.*none of blocks\.0"):
        pool_layer(random_mxd(metadata=SAEMetadata(hook_name="blocks.0.mlp.hook_in")), activations)
    with pytest.raises(ValueError, match="must say hook_name"):
        pool_layer(random_mxd(), activations)
    with pytest.raises(ValueError, match="no layer 7"):
        pool_neurons(tiny_bridge, 7, activations, "blocks.1.mlp.hook_in")


# Probes


def noise(n_texts=300, d=60, seed=0):
    return np.random.default_rng(seed).gamma(0.5, size=(n_texts, d)).astype(np.float32)


@pytest.fixture
def labels():
    return ["sport", "tech", "tech", "trade", "trade", "trade"] * 50


def test_planted_features_are_found_and_tell_all(labels):
    features = noise()
    planted = {"sport": 7, "tech": 59, "trade": 0}
    for name, feature in planted.items():
        is_class = np.array(labels) == name
        features[:, feature] = np.where(is_class, 12.0, 0.5)
    features[:, 59] *= -1  # a feature that goes down is as good
    rows = probe(features, labels, n_features=(1, 2, None))
    assert len(rows) == 9
    for row in rows:
        assert row["features"] is None or row["features"][0] == planted[row["class"]]
        if row["n_features"] != 2:
            assert len(row["features"] or [0]) == 1
            assert [row[s] for s in ("accuracy", "balanced_accuracy", "f1", "roc_auc")] == [1] * 4
    json.dumps(rows)
    assert {row["n_train"] for row in rows} == {row["n_test"] for row in rows} == {150}


def test_scores_are_those_of_a_plain_logistic_regression(labels):
    features = noise()
    features[:, 3] += np.array(labels) == "tech"
    train, test = split_texts(labels, 0.4, seed=5)
    assert not set(train) & set(test) and len(test) == 120
    for name in set(labels):
        assert sum(labels[i] == name for i in test) == 0.4 * labels.count(name)

    rows = probe(features, labels, n_features=(5,), test_size=0.4, seed=5)
    row = next(row for row in rows if row["class"] == "tech")
    is_class = np.array(labels) == "tech"
    gap = [
        abs(x[train][is_class[train]].mean() - x[train][~is_class[train]].mean()) / x[train].std()
        for x in features.T
    ]
    assert row["features"] == sorted(range(60), key=lambda i: -gap[i])[:5]
    x = features[:, row["features"]].astype(np.float64)
    x = (x - x[train].mean(0)) / x[train].std(0)
    sign = np.where(is_class, 1, -1)
    weight = np.where(is_class, 3 / 2, 3 / 4)  # a third of the texts and two thirds: as one half

    def loss(w):
        errors = np.logaddexp(0, -sign * (x @ w[1:] + w[0]))
        return w[1:] @ w[1:] / 2 + (weight * errors)[train].sum()

    w = minimize(loss, np.zeros(6)).x
    score = x[test] @ w[1:] + w[0]
    guess, truth = score > 0, is_class[test]
    hits, recall = (guess & truth).sum(), (guess & truth).sum() / truth.sum()
    assert row["accuracy"] == pytest.approx((guess == truth).mean())
    assert row["f1"] == pytest.approx(2 * hits / (guess.sum() + truth.sum()))
    specificity = (~guess & ~truth).sum() / (~truth).sum()
    assert row["balanced_accuracy"] == pytest.approx((recall + specificity) / 2)
    ordered = score[truth][:, None] > score[~truth]
    assert row["roc_auc"] == pytest.approx(ordered.mean(), abs=2e-3)
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
    for majority, *rows in zip(*runs, strict=True):
        n = majority["n_features"]
        rows.append(majority)
        # The mean of 12 probes of 150 texts each: three standard deviations.
        assert np.mean([row["balanced_accuracy"] for row in rows]) == pytest.approx(
            0.5, abs=0.05
        ), n
        assert np.mean([row["roc_auc"] for row in rows]) == pytest.approx(0.5, abs=0.06), n


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


def test_no_feature_is_the_majority_guess(labels):
    rows = probe(noise(), labels, n_features=(0,))
    for row in rows:
        share = labels.count(row["class"]) / len(labels)
        assert row["features"] == []
        if share != 0.5:
            assert row["accuracy"] == pytest.approx(1 - share)
            assert row["f1"] == 0
        assert row["balanced_accuracy"] == row["roc_auc"] == 0.5


def test_a_summary_is_the_mean_over_classes(labels):
    rows = probe(noise(), labels, n_features=(1, None))
    summary = summarise(rows)
    assert [row["n_features"] for row in summary] == [1, None]
    f1 = [row["f1"] for row in rows if row["n_features"] is None]
    assert len(f1) == 3 and summary[1]["f1"] == pytest.approx(sum(f1) / 3)


def test_a_seed_decides_the_split_and_nothing_else_does(labels):
    features = noise()
    assert probe(features, labels, seed=1) == probe(features, labels, seed=1)
    assert split_texts(labels, seed=1)[0].tolist() != split_texts(labels, seed=2)[0].tolist()


def test_probes_that_cannot_be_fitted(labels):
    with pytest.raises(ValueError, match="299 labels for 300 texts"):
        probe(noise(), labels[1:])
    with pytest.raises(ValueError, match="cannot read 61 features out of 60"):
        probe(noise(), labels, n_features=(61,))
    with pytest.raises(ValueError, match="not finite"):
        probe(noise() * np.inf, labels)
    with pytest.raises(ValueError, match=r"at least 2 classes, got \['a'\]"):
        probe(noise(3), ["a", "a", "a"])
    with pytest.raises(ValueError, match="too few texts of class 'rare'"):
        split_texts([*labels, "rare"])
    with pytest.raises(ValueError, match="too few texts of class 'rare'"):
        split_texts([*labels, "rare", "rare"], test_size=0.1)


# Labelled texts


def reviews(n=20):
    return Dataset.from_dict(
        {
            "body": [f"good {i}" for i in range(n)] + [f"bad {i}" for i in range(2 * n)],
            "stars": [1] * n + [0] * 2 * n,
        }
    )


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_local_files_are_read_as_many_texts_of_each_class(tmp_path, ending):
    path = str(tmp_path / f"a.{ending}")
    write = {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[ending]
    getattr(reviews(), write)(path)
    columns = {"text_column": "body", "label_column": "stars"}
    data = load_labelled(path, n_texts=31, seed=3, **columns)
    assert data.column_names == ["text", "label"]
    assert sorted(data["label"]) == ["0"] * 15 + ["1"] * 15
    assert len(set(data["text"])) == 30
    for row in data:
        assert row["text"].startswith("good" if row["label"] == "1" else "bad")
    assert data["label"][:15] != data["label"][15:] != sorted(data["label"])[15:]
    assert data[:] == load_labelled(path, n_texts=31, seed=3, **columns)[:]
    assert data[:] != load_labelled(path, n_texts=31, seed=4, **columns)[:]


def test_classes_have_their_names(tmp_path):
    names = ClassLabel(names=["bad", "good"])
    data = reviews().cast(Features({"body": Value("string"), "stars": names}))
    data.to_parquet(tmp_path / "a.parquet")
    loaded = load_labelled(
        str(tmp_path / "a.parquet"), text_column="body", label_column="stars", n_texts=40
    )
    assert all(text.startswith(label) for text, label in zip(*loaded[:].values(), strict=True))


def test_no_text_is_taken_twice_nor_an_empty_or_unlabelled_one(tmp_path):
    good = [f"good {i}" for i in range(5)] * 9
    bad = [f"bad {i}" for i in range(5)] + [" "] * 40 + ["neither"]
    label = ["good"] * 45 + ["bad"] * 45 + [None]
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"text": good + bad, "label": label}).to_parquet(path)
    data = load_labelled(path, n_texts=10)
    assert sorted(data["text"]) == sorted({*good, *bad} - {" ", "neither"})
    with pytest.raises(ValueError, match=r"only 5 different texts of class .* at most 10"):
        load_labelled(path, n_texts=12)


def test_labelled_texts_that_cannot_be_loaded(tmp_path):
    path = str(tmp_path / "a.jsonl")
    reviews().to_json(path)
    with pytest.raises(ValueError, match=r"no column 'text'; it has 'body', 'stars'"):
        load_labelled(path)
    with pytest.raises(ValueError, match=r"no column 'topic'; it has 'body', 'stars'"):
        load_labelled(path, text_column="body", label_column="topic")
    with pytest.raises(ValueError, match=r"column 'stars' of .* holds no text"):
        load_labelled(path, text_column="stars", label_column="body", n_texts=2400)
    with pytest.raises(ValueError, match="n_texts=100 are too few for the 60 classes"):
        load_labelled(path, text_column="body", label_column="body", n_texts=100)
    with pytest.raises(ValueError, match="there is no file"):
        load_labelled(str(tmp_path / "none.csv"))
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", "x"]}).to_json(path)
    with pytest.raises(ValueError, match=r"fewer than 2 classes: \['x'\]"):
        load_labelled(path)
