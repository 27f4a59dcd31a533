"""Text: load it, and split it by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from mxd_lens.data.tokens import TOKENS, Text, is_tokenized, mark_tokenizer, token_batches
from mxd_lens.demo import corpora
from mxd_lens.fields import Count, check

DEMO_TEXTS = {
    "demo:wikipedia": corpora.wikipedia,
    "demo:state-of-the-union": corpora.state_of_the_union,
}

_FILE_READERS = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
}


def load_text(
    source: str, split: str = "train", text_column: str = "text", streaming: bool = False
) -> Text:
    """Documents, one a row, in a column ``text``; of text that was tokenized before, sequences, in
    a column ``input_ids``.

    Args:
        source: a data set `datasets` can load (``name`` or ``name:config``), a folder that it has
            saved, a local .txt (one document a paragraph), .jsonl, .json, .parquet or .csv file, or
            one of `DEMO_TEXTS`.
        text_column: of text or of tokens; where there is no ``text``, ``input_ids`` or ``tokens``.
        streaming: read it as it goes by, for data sets larger than the disk.

    Raises:
        ValueError: it cannot be loaded, has no such column, or is empty.
    """
    dataset = DEMO_TEXTS[source]() if source in DEMO_TEXTS else read(source, split, streaming)
    with _naming(source):
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source} holds no text")
    if text_column == "text" and "text" not in first:
        text_column = next((name for name in (TOKENS, "tokens") if name in first), "text")
    if text_column not in first:
        raise ValueError(
            f"{source} has no column {text_column!r}; it has {', '.join(map(repr, first))}: "
            "name one of them as the text column"
        )
    value = first[text_column]
    tokenized = isinstance(value, list) and all(isinstance(token, int) for token in value)
    if not isinstance(value, str) and not tokenized:
        raise ValueError(f"column {text_column!r} of {source} holds no text")
    documents = dataset.select_columns(text_column)
    name = TOKENS if tokenized else "text"
    if tokenized:
        with _naming(source):
            mark_tokenizer(documents, source)
    return documents if text_column == name else documents.rename_column(text_column, name)


def read(source: str, split: str = "train", streaming: bool = False) -> Text:
    """What `load_text` loads, but for the demo's, with all its columns; raises likewise."""
    reader = _FILE_READERS.get(Path(source).suffix)
    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        return _saved(source, split, streaming)
    if reader is None:
        name, _, config = source.partition(":")
        how: dict[str, Any] = {"path": name, "name": config or None, "split": split}
    elif Path(source).is_file():
        if not Path(source).stat().st_size:
            raise ValueError(f"{source} is empty")
        builder, options = reader
        how = {"path": builder, "data_files": source, "split": "train", **options}
    else:
        raise ValueError(f"there is no file {source}")
    with _naming(source):
        dataset = datasets.load_dataset(**how, streaming=streaming)
        if reader and not streaming:
            dataset.data.validate(full=True)  # JSON is not decoded until a row is read
    return dataset


def _saved(source: str, split: str, streaming: bool) -> Text:
    """What `datasets` has saved in a folder."""
    with _naming(source):
        dataset = datasets.load_from_disk(source)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"it has no split {split!r}, but {', '.join(map(repr, dataset))}")
            dataset = dataset[split]
        dataset = dataset.with_format(None)
    return dataset.to_iterable_dataset() if streaming else dataset


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Say which source cannot be loaded, and the first of the errors that led to it."""
    try:
        yield
    except Exception as error:  # `datasets` raises many kinds for one cause: not loadable
        cause: BaseException = error
        while earlier := cause.__cause__ or cause.__context__:
            cause = earlier
        raise ValueError(f"cannot load {str(source)!r}: {str(cause) or repr(cause)}") from error


def split_documents(dataset: Text, n_heldout: int, seed: int = 0) -> tuple[Text, Text]:
    """(training documents, held-out documents), with no text in both; or sequences of tokens.

    Documents are shuffled first; a streamed data set gives its first n_heldout documents.

    Raises:
        ValueError: there are not more than n_heldout documents, or all of these are among the
            training documents too.
    """
    check(Count, n_heldout=n_heldout)
    if isinstance(dataset, IterableDataset):
        return dataset.skip(n_heldout), dataset.take(n_heldout)
    if len(dataset) <= n_heldout:
        raise ValueError(
            f"{len(dataset)} documents are too few to hold {n_heldout} of them out: "
            "give more text or hold out fewer"
        )
    shuffled = dataset.shuffle(seed=seed)
    candidates = list(_rows(shuffled.select(range(n_heldout))))
    here = Counter(candidates)
    everywhere = Counter(row for row in _rows(dataset) if row in here)
    held = [i for i, row in enumerate(candidates) if everywhere[row] == here[row]]
    if not held:
        raise ValueError(
            f"the {n_heldout} documents to hold out are all among those to train on: give more "
            "different documents"
        )
    return shuffled.select(range(n_heldout, len(dataset))), shuffled.select(held)


def _rows(dataset: Dataset) -> Iterator[str | bytes]:
    """Each row's text, or bytes of its tokens, in little memory."""
    if is_tokenized(dataset):
        for ids in token_batches(dataset):
            yield from (row.tobytes() for row in ids)
    else:
        table: Any
        for table in dataset.with_format("arrow").iter(1000):
            yield from table["text"].to_pylist()
