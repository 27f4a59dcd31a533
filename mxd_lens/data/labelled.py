"""Labelled texts, and labelled words: load them, with equally many of every class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from datasets import ClassLabel, Dataset, Value

from mxd_lens.data.text import read
from mxd_lens.demo import corpora

DEMO_LABELLED = {
    "demo:bbc": corpora.bbc_news,
    "demo:languages": corpora.wikipedia_languages,
    "demo:code": corpora.code_and_prose,
    "demo:python": corpora.python_words,
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

    Where the text column holds lists of words, and the label column a label for each (as data sets
    of parts of speech or entities have them), it is that many words: ``text`` is a word's whole
    text, words joined by spaces, and ``end`` how many of its characters come up to the word's end.

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
    label_type: Any = rows.features[label_column]
    of_words = isinstance(rows[0][text_column], list) if len(rows) else False
    if of_words:
        label_type = getattr(label_type, "feature", label_type)
    if not isinstance(label_type, Value | ClassLabel):
        raise ValueError(f"column {label_column!r} of {source} holds no labels, but {label_type}")

    def name(label: Any) -> str:
        return str(label_type.int2str(label) if isinstance(label_type, ClassLabel) else label)

    labels = rows[label_column]
    every = {label for row in labels for label in row} if of_words else set(labels)
    classes = sorted(name(label) for label in every if label is not None)
    if len(classes) < 2:
        raise ValueError(f"column {label_column!r} of {source} has fewer than 2 classes: {classes}")
    wanted = n_texts // len(classes)
    if wanted < 4:
        raise ValueError(
            f"n_texts={n_texts} are too few for the {len(classes)} classes in column "
            f"{label_column!r} of {source}: need 4 of each"
        )
    taken: dict[tuple[str, int | None], str] = {}
    counts = Counter(dict.fromkeys(classes, 0))
    columns = list({text_column, label_column, *({"end"} & {*rows.column_names})})
    row: Any
    for row in rows.select_columns(columns).shuffle(seed=seed):
        for text, end, label in _places(row, text_column, label_column):
            if not isinstance(text, str):
                raise ValueError(f"column {text_column!r} of {source} holds no text")
            here = text, end
            if label is None or not text.strip() or here in taken or counts[name(label)] == wanted:
                continue
            taken[here] = name(label)
            counts[name(label)] += 1
        if len(taken) == wanted * len(classes):
            break
    rarest, n = min(counts.items(), key=lambda item: item[1])
    if n < wanted:
        raise ValueError(
            f"{source} has only {n} different texts of class {rarest!r}, and n_texts={n_texts} "
            f"wants {wanted}: ask for at most {n * len(classes)}"
        )
    texts, ends = zip(*taken, strict=True)
    found = {"text": list(texts), "label": list(taken.values())}
    return Dataset.from_dict(found if None in ends else found | {"end": list(ends)})


def _places(
    row: dict[str, Any], text_column: str, label_column: str
) -> Iterator[tuple[Any, int | None, Any]]:
    """Text, end of the word and label: of a text one, without a word, of words each."""
    text, label = row[text_column], row[label_column]
    if not isinstance(text, list):
        yield text, row.get("end"), label
        return
    whole = " ".join(text)
    for end, of_word in zip(accumulate(len(word) + 1 for word in text), label, strict=True):
        yield whole, end - 1, of_word
