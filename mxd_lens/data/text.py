"""Text: load it, and split it by document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from mxd_lens.demo import corpora
from mxd_lens.fields import Count, check

Text = Dataset | IterableDataset

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
    """Documents, one a row, in a column ``text``.

    Args:
        source: a data set `datasets` can load (``name`` or ``name:config``), a local .txt (one
            document a paragraph), .jsonl, .json, .parquet or .csv file, or one of `DEMO_TEXTS`.
        streaming: read it as it goes by, for data sets larger than the disk.

    Raises:
        ValueError: it cannot be loaded, has no such column, or is empty.
    """
    dataset = DEMO_TEXTS[source]() if source in DEMO_TEXTS else read(source, split, streaming)
    with _naming(source):
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source} holds no text")
    if text_column not in first:
        raise ValueError(
            f"{source} has no column {text_column!r}; it has {', '.join(map(repr, first))}: "
            "name one of them as the text column"
        )
    if not isinstance(first[text_column], str):
        raise ValueError(f"column {text_column!r} of {source} holds no text")
    documents = dataset.select_columns(text_column)
    return documents if text_column == "text" else documents.rename_column(text_column, "text")


def read(source: str, split: str = "train", streaming: bool = False) -> Text:
    """What `load_text` loads, but for the demo's, with all its columns; raises likewise."""
    reader = _FILE_READERS.get(Path(source).suffix)
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
    """(training documents, held-out documents), with no text in both.

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
    dataset = dataset.shuffle(seed=seed)
    train = dataset.select(range(n_heldout, len(dataset)))
    seen = set(train["text"])
    held = [i for i, text in enumerate(dataset[:n_heldout]["text"]) if text not in seen]
    if not held:
        raise ValueError(
            f"the {n_heldout} documents to hold out are all among those to train on: give more "
            "different documents"
        )
    return train, dataset.select(held)
