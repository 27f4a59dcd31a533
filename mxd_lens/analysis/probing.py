"""Sparse probing: does a single feature, or a handful, tell what a text is about?

The same for the units of every layer, and for the raw neurons of the MLP they stand in for, the
baseline. A text's features are their means over its non-special tokens. For each class against
the rest, features are ranked on the training texts by the absolute difference of the class means,
in standard deviations of the feature, and a logistic regression reads the first few (Gurnee et al.
2023, arXiv 2305.01610; Oldfield et al. 2025, arXiv 2505.21364)::

    data = load_labelled("demo:bbc")
    activations, labels = labelled_activations(Site.of(model, sae), data)
    rows = probe(pool_layer(sae, activations), labels)
    summarise(rows)

Of labelled words (parts of speech, say), each is a text of one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from scipy import sparse
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.reading import TextActivations, text_activations, word_activations
from mxd_lens.fields import EachOnce, Index, check
from mxd_lens.layers import layer_of
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site, hooks_of
from mxd_lens.models.splice import get_mlp

SCORES = ("accuracy", "balanced_accuracy", "f1", "roc_auc")

Features: TypeAlias = Any
"""[texts, d]: an array, or a sparse one (`scipy.sparse.csr_array`)."""


@torch.no_grad()
def pool_layer(sae: SAE[Any], activations: TextActivations) -> Features:
    """Mean activation of each unit of a layer in each text; sparse.

    Raises:
        ValueError: its metadata name no hook, or another than those of the activations, or it has
            no units to probe.
    """
    layer = layer_of(sae)
    if not layer.has_experts:
        raise ValueError(f"a {layer.label} has no sparse units to probe")
    parts = []
    for of_tokens, of_text in _chunks(activations, hooks_of(sae)[0]):
        token, unit, value = layer.codes(of_tokens.to(sae.device)).firings()
        found = (of_text[token.cpu()].int(), unit.cpu().int(), value.cpu().float())
        parts.append([part.numpy() for part in found])
    text, unit, value = map(np.concatenate, zip(*parts, strict=True))
    shape = (activations.n_texts, sae.cfg.d_sae)
    sums = sparse.csr_array((value, (text, unit)), shape=shape)  # those of one place are added
    counts = activations.text.bincount().numpy()
    sums.data /= counts[np.repeat(np.arange(len(counts)), np.diff(sums.indptr))]
    return sums


@torch.no_grad()
def pool_neurons(site: Site, activations: TextActivations) -> Float[np.ndarray, "texts d_hidden"]:
    """Mean hidden units of the model's own MLP in each text, computed from its input.

    Raises:
        ValueError: the MLP is none that `MxD.from_mlp` reads.
    """
    mlp = MxD.from_mlp(get_mlp(site.model, site.layer))
    sums = torch.zeros(activations.n_texts, mlp.cfg.d_hidden, device=mlp.device)
    for of_tokens, of_text in _chunks(activations, site.hook_in):
        neurons = mlp.hidden(of_tokens.to(mlp.device, mlp.dtype)).float()
        sums.index_add_(0, of_text.to(mlp.device), neurons)
    return sums.cpu().div_(activations.text.bincount()[:, None]).numpy()


def _chunks(activations: TextActivations, hook: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations of 4,096 tokens at a time, and of which texts these are."""
    if hook not in activations.at:
        raise ValueError(f"activations of {', '.join(activations.at)}, none of {hook}")
    x, text = activations.at[hook], activations.text
    chunks = zip(x.split(4096), text.split(4096), strict=True)
    yield from tqdm(chunks, desc="Encoding", total=-(-len(text) // 4096))


def labelled_activations(
    site: Site, labelled: Dataset, **reading: Any
) -> tuple[TextActivations, list[str]]:
    """Of what `load_labelled` gives, texts or words, with the labels of those that were read.

    Args:
        reading: context_size, lm_batch_size and autocast of `text_activations`.
    """
    texts, labels = list(labelled["text"]), list(labelled["label"])
    if "end" not in labelled.column_names:
        return text_activations(site, texts, **reading), labels
    activations, words = word_activations(site, texts, labelled["end"], **reading)
    return activations, [labels[word] for word in words]


def split_texts(
    labels: Sequence[str], test_size: float = 0.5, seed: int = 0
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Indices of the training and the held-out texts, with the same shares of every class.

    Raises:
        ValueError: there are fewer than two classes, or too few texts of one for both parts.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"need at least 2 classes, got {list(counts)}")
    rarest, n = min(counts.items(), key=lambda item: item[1])
    if n < 2:
        raise ValueError(f"too few texts of class {rarest!r} to train and test on")
    everything = np.arange(len(labels))
    parts = train_test_split(everything, test_size=test_size, stratify=labels, random_state=seed)
    train, test = map(np.asarray, parts)
    for part in (train, test):
        if missing := set(counts) - {labels[i] for i in part}:
            raise ValueError(f"too few texts of class {min(missing)!r} to train and test on")
    return train, test


def probe(
    features: Features,
    labels: Sequence[str],
    *,
    n_features: Sequence[int | None] = (1, 2, 5, None),
    test_size: float = 0.5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Tell each class from the rest by a few features, and score that on held-out texts.

    On the training texts: features are standardised, ranked by ``|mean in the class - mean in
    the rest|``, and read by a logistic regression (L2 penalty, C = 1) to which the class weighs
    as much as the rest. All share the split ``split_texts(labels, test_size, seed)``.

    Args:
        n_features: how many of the first features a probe reads; None: all, 0: none, which is
            the majority guess.

    Returns:
        A row, ready for JSON, for each class and each of n_features: ``class``, ``n_features``
        (null: all), ``features`` (their indices, best first; null: all), the held-out
        ``accuracy``, ``balanced_accuracy``, ``f1`` of the class and ``roc_auc``, ``n_train``,
        ``n_test``, ``test_size`` and ``seed``.

    Raises:
        ValueError: as many labels as texts are needed, finite features, no more features to
            read than there are; and see `split_texts`.
    """
    check(EachOnce[Index | None], n_features=n_features)
    n_texts, d = features.shape
    if len(labels) != n_texts:
        raise ValueError(f"{len(labels)} labels for {n_texts} texts")
    is_sparse = sparse.issparse(features)
    if not np.isfinite(features.data if is_sparse else features).all():
        raise ValueError("the features are not finite")
    if (most := max(n or 0 for n in n_features)) > d:
        raise ValueError(f"cannot read {most} features out of {d}")
    train, test = split_texts(labels, test_size, seed)
    x_train, x_test = features[train], features[test]
    spread = np.asarray(StandardScaler(with_mean=not is_sparse).fit(x_train).scale_)
    rows: list[dict[str, Any]] = []
    jobs = [(name, n) for name in sorted(set(labels)) for n in n_features]
    for name, n in tqdm(jobs, desc="Probing"):
        is_class = np.array([label == name for label in labels])
        chosen = rank_features(x_train, spread, is_class[train])[:n]
        few = n is not None and is_sparse
        read, unread = (
            part[:, chosen].toarray() if few else part[:, chosen] for part in (x_train, x_test)
        )
        reader: Any = (
            DummyClassifier()
            if n == 0
            else make_pipeline(
                StandardScaler(with_mean=few or not is_sparse),
                LogisticRegression(class_weight="balanced", tol=1e-6, max_iter=1000),
            )
        )
        reader.fit(read, is_class[train])
        guess = reader.predict(unread)
        chance = reader.predict_proba(unread)[:, 1]
        truth = is_class[test]
        rows.append(
            {
                "class": name,
                "n_features": n,
                "features": None if n is None else chosen.tolist(),
                "accuracy": float(accuracy_score(truth, guess)),
                "balanced_accuracy": float(balanced_accuracy_score(truth, guess)),
                "f1": float(f1_score(truth, guess, zero_division=0.0)),  # type: ignore[arg-type]
                "roc_auc": float(roc_auc_score(truth, chance)),
                "n_train": len(train),
                "n_test": len(test),
                "test_size": test_size,
                "seed": seed,
            }
        )
    return rows


def rank_features(
    features: Features, spread: Float[np.ndarray, "d"], is_class: Bool[np.ndarray, "texts"]
) -> Int[np.ndarray, "d"]:
    """Features by the absolute difference of their means in and out of the class, in units of
    their spread, largest first."""
    difference = features[is_class].mean(0) - features[~is_class].mean(0)
    return np.argsort(-np.abs(difference / spread), kind="stable")


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of `probe`'s scores over the classes, one row for each of n_features."""
    return [
        {
            "n_features": n,
            **{
                score: float(np.mean([row[score] for row in rows if row["n_features"] == n]))
                for score in SCORES
            },
        }
        for n in dict.fromkeys(row["n_features"] for row in rows)
    ]
