"""Sparse probing: does a single feature, or a handful, tell what a text is about?

The same for every layer that has SAELens' ``encode`` (MxDs, transcoders, SAEs), and for the raw
neurons of the MLP they read, the baseline. A text's features are their means over its tokens
without the special ones. For each class against the rest, features are ranked on the training
texts by the absolute difference of the class means, in standard deviations of the feature, and a
logistic regression reads the first few (Gurnee et al. 2023, arXiv 2305.01610; Oldfield et al.
2025, arXiv 2505.21364)::

    data = load_labelled("demo:bbc")
    activations = text_activations(model, data["text"], [sae.cfg.metadata.hook_name])
    rows = probe(pool_layer(sae, activations), data["label"])
    summarise(rows)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.reading import TextActivations
from mxd_lens.fields import EachOnce, Index, check
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.splice import get_mlp

SCORES = ("accuracy", "balanced_accuracy", "f1", "roc_auc")

Features = Float[np.ndarray, "texts d"]


@torch.no_grad()
def pool(
    encode: Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d"]],
    activations: TextActivations,
    hook: str,
    *,
    device: str | torch.device = "cpu",
) -> Features:
    """Mean features of each text; those of 512 tokens at a time are written out.

    Raises:
        ValueError: the activations are not those at this hook.
    """
    if hook not in activations.at:
        raise ValueError(f"activations of {', '.join(activations.at)}, none of {hook}")
    sums: Tensor | None = None
    x, text = activations.at[hook], activations.text
    chunks = zip(x.split(512), text.split(512), strict=True)
    for of_tokens, of_text in tqdm(chunks, desc="Encoding", total=-(-len(text) // 512)):
        features = encode(of_tokens.to(device)).float()
        if sums is None:
            sums = features.new_zeros(activations.n_texts, features.shape[-1])
        sums.index_add_(0, of_text.to(device), features)
    assert sums is not None
    return sums.cpu().div_(text.bincount()[:, None]).numpy()


def pool_layer(sae: SAE[Any], activations: TextActivations) -> Features:
    """Mean features of each text of an MxD, a transcoder or an SAE: what its ``encode`` gives.

    Raises:
        ValueError: its metadata name no hook, or another than those of the activations.
    """
    hook = sae.cfg.metadata.hook_name
    if not hook:
        raise ValueError("sae.cfg.metadata must say hook_name")
    return pool(sae.encode, activations, str(hook), device=sae.device)


def pool_neurons(model: Any, layer: int, activations: TextActivations, hook: str) -> Features:
    """Mean hidden units of the model's own MLP in each text, computed from its input at `hook`.

    Raises:
        ValueError: no such layer, or its MLP is none that `MxD.from_mlp` reads.
    """
    mlp = MxD.from_mlp(get_mlp(model, layer))
    return pool(lambda x: mlp.hidden(x.to(mlp.dtype)), activations, hook, device=mlp.device)


# Probes


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
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite")
    if (most := max(n or 0 for n in n_features)) > d:
        raise ValueError(f"cannot read {most} features out of {d}")
    train, test = split_texts(labels, test_size, seed)
    scaler = StandardScaler().fit(features[train])
    x_train, x_test = (np.asarray(scaler.transform(features[part])) for part in (train, test))
    rows: list[dict[str, Any]] = []
    jobs = [(name, n) for name in sorted(set(labels)) for n in n_features]
    for name, n in tqdm(jobs, desc="Probing"):
        is_class = np.array([label == name for label in labels])
        chosen = rank_features(x_train, is_class[train])[:n]
        reader: Any = (
            DummyClassifier()
            if n == 0
            else LogisticRegression(class_weight="balanced", tol=1e-6, max_iter=1000)
        )
        reader.fit(x_train[:, chosen], is_class[train])
        guess = reader.predict(x_test[:, chosen])
        chance = reader.predict_proba(x_test[:, chosen])[:, 1]
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


def rank_features(features: Features, is_class: Bool[np.ndarray, "texts"]) -> Int[np.ndarray, "d"]:
    """Features by the absolute difference of their means in and out of the class, largest first."""
    difference = features[is_class].mean(0) - features[~is_class].mean(0)
    return np.argsort(-np.abs(difference), kind="stable")


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
