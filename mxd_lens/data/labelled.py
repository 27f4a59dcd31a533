"""Labelled text: load it, with equally many texts of every class."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datasets import ClassLabel, Dataset, Value

from mxd_lens.data.text import read
from mxd_lens.demo import corpora

DEMO_LABELLED = {
    "demo:bbc": corpora.bbc_news,
    "demo:languages": corpora.wikipedia_languages,
    "demo:code": corpora.code_and_prose,
}


def load_labelled(
    source: str,
    *,
    split: str = "train",
    text_column: str = "text",
    label_column: str = "label",
    n_texts: int = 1200,
    seed: int = 0,
) -> Dataset:
    """About n_texts different texts, equally many of each class, shuffled: columns ``text`` and
    ``label``, both strings. The source is one of `DEMO_LABELLED`, or as in `load_text`.

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
