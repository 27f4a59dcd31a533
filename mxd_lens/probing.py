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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from mxd_lens import assets
from mxd_lens.data import read, special_tokens
from mxd_lens.fields import Count, EachOnce, Index, check
from mxd_lens.models import restore_hook_names
from mxd_lens.mxd import MxD
from mxd_lens.splice import get_mlp

DEMO_LABELLED = {
    "demo:bbc": assets.bbc_news,
    "demo:languages": assets.wikipedia_languages,
    "demo:code": assets.code_and_prose,
}
SCORES = ("accuracy", "balanced_accuracy", "f1", "roc_auc")

Features = Float[np.ndarray, "texts d"]


# Labelled texts


def load_labelled(
    source: str,
    *,
    split: str = "train",
    text_column: str = "text",
    label_column: str = "label",
    n_texts: int = 1200,
    seed: int = 0,
) -> Dataset:
    """About n_texts different texts, equally many of each class, shuffled.

    Args:
        source: one of `DEMO_LABELLED`, a data set `datasets` can load (``name`` or
            ``name:config``), or a local .jsonl, .json, .parquet or .csv file.
        split: of a hub data set.

    Returns:
        Columns ``text`` and ``label``, both strings.

    Raises:
        ValueError: it cannot be loaded, has no such column, or has too few texts of a class.
    """
    rows = DEMO_LABELLED[source]() if source in DEMO_LABELLED else read(source, split)
    assert isinstance(rows, Dataset)
    for column in (text_column, label_column):
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; it has "
                f"{', '.join(map(repr, rows.column_names))}"
            )
    label_type = rows.features[label_column]
    if not isinstance(label_type, Value | ClassLabel):
        raise ValueError(f"column {label_column!r} of {source} holds no labels, but {label_type}")

    def name(label: Any) -> str:
        return str(label_type.int2str(label) if isinstance(label_type, ClassLabel) else label)

    classes = [name(label) for label in rows.unique(label_column) if label is not None]
    if len(classes) < 2:
        raise ValueError(f"column {label_column!r} of {source} has fewer than 2 classes: {classes}")
    wanted = n_texts // len(classes)
    if wanted < 4:
        raise ValueError(
            f"n_texts={n_texts} are too few for the {len(classes)} classes in column "
            f"{label_column!r} of {source}: need 4 of each"
        )
    taken: dict[str, str] = {}
    counts = Counter(dict.fromkeys(classes, 0))
    row: Any
    for row in rows.select_columns(list({text_column, label_column})).shuffle(seed=seed):
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str):
            raise ValueError(f"column {text_column!r} of {source} holds no text")
        if label is None or not text.strip() or text in taken or counts[name(label)] == wanted:
            continue
        taken[text] = name(label)
        counts[name(label)] += 1
        if len(taken) == wanted * len(classes):
            break
    rarest, n = min(counts.items(), key=lambda item: item[1])
    if n < wanted:
        raise ValueError(
            f"{source} has only {n} different texts of class {rarest!r}, and n_texts={n_texts} "
            f"wants {wanted}: ask for at most {n * len(classes)}"
        )
    return Dataset.from_dict({"text": list(taken), "label": list(taken.values())})


# Features of texts


@dataclass(frozen=True)
class TextActivations:
    """What a language model computes for the ordinary tokens of some texts; on the CPU.

    One language-model pass serves any number of layers. 1,200 texts of 128 tokens at one hook
    of width 576 are 350 MB in float32.
    """

    at: dict[str, Float[Tensor, "tokens d"]]
    """Activations by hook name, in the model's dtype."""
    text: Int[Tensor, "tokens"]
    """Which text each token is of."""
    n_texts: int


@torch.no_grad()
def text_activations(
    model: Any,
    texts: Sequence[str],
    hooks: Iterable[str],
    *,
    context_size: int = 128,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> TextActivations:
    """Run the model on the texts, no further than the last hook.

    Args:
        texts: each read by itself, after a BOS token; special tokens are left out.
        hooks: names of hooks whose activations are [batch, pos, d].
        context_size: tokens of a text that are read, BOS included.
        lm_batch_size: texts per pass of the language model.
        autocast: run the language model in bfloat16 where that is safe.

    Raises:
        ValueError: the model has no such hook, or a text has no ordinary token.
    """
    check(Count, n_texts=len(texts), context_size=context_size, lm_batch_size=lm_batch_size)
    hooks = [*dict.fromkeys(hooks)]
    tokens = [tokenize(model, text, context_size) for text in tqdm(texts, desc="Tokenizing")]
    special = special_tokens(model)
    counts = torch.stack([(~torch.isin(of_text, special)).sum() for of_text in tokens])
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"text {empty} has no ordinary token: {texts[empty]!r}")
    text = torch.arange(len(texts)).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    at: dict[str, Tensor] = {}
    for batch, acts in read_texts(
        model, tokens, hooks, lm_batch_size=lm_batch_size, autocast=autocast
    ):
        for hook in hooks:
            if hook not in at:
                at[hook] = torch.empty(len(text), acts[hook].shape[-1], dtype=acts[hook].dtype)
            of_texts = acts[hook].cpu().split(counts[batch].tolist())
            for i, of_text in zip(batch, of_texts, strict=True):
                at[hook][starts[i] : starts[i] + counts[i]] = of_text
    return TextActivations(at, text, len(texts))


def tokenize(model: Any, text: str, context_size: int) -> Int[Tensor, "pos"]:
    """BOS and the text after it, cut to context_size tokens; on the CPU."""
    return model.to_tokens(text, prepend_bos=True, move_to_device=False)[0, :context_size]


@torch.no_grad()
def read_texts(
    model: Any,
    tokens: Sequence[Int[Tensor, "pos"]],
    hooks: Sequence[str],
    *,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> Iterator[tuple[Int[Tensor, "batch"], dict[str, Float[Tensor, "tokens d"]]]]:
    """Run the model on tokenized texts, no further than the last hook, the longest first.

    Yields:
        For each pass of the model: which texts it read, and by hook the activations of their
        ordinary tokens, one text after the other, on the model's device.

    Raises:
        ValueError: the model has no such hook.
    """
    restore_hook_names(model)
    special = special_tokens(model)
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
    # Texts of one length together: little padding, which goes to the right, where no causal
    # model sees it.
    order = torch.tensor([len(of_text) for of_text in tokens]).argsort(descending=True, stable=True)
    for batch in tqdm(order.split(lm_batch_size), desc="Reading the texts"):
        padded = pad_sequence(
            [tokens[i] for i in batch.tolist()], True, padding_value=int(special[0])
        )
        device = torch.device(model.cfg.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            _, cache = model.run_with_cache(
                padded.to(device),
                names_filter=list(hooks),
                stop_at_layer=None if None in stops else max(filter(None, stops)),
                prepend_bos=False,
            )
        if missing := [hook for hook in hooks if hook not in cache]:
            raise ValueError(f"the model has no hook {missing[0]!r}")
        ordinary = ~torch.isin(padded, special).to(device)
        yield batch, {hook: cache[hook][ordinary] for hook in hooks}


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
