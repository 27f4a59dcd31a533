"""Text that was tokenized before, in rows of token ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

Text = Dataset | IterableDataset

TOKENS = "input_ids"
"""The column that holds them."""

_TOKENIZED_BY = "tokenized by "
_N_ROWS = 1000  # at a time


def is_tokenized(dataset: Text) -> bool:
    """True if rows are token ids, not text."""
    return TOKENS in (dataset.column_names or next(iter(dataset), ()))


def token_batches(dataset: Text) -> Iterator[Int[np.ndarray, "rows pos"]]:
    """The ids of 1,000 rows at a time; ValueError if rows differ in length or lack ids."""
    n_pos = 0
    table: Any
    for table in dataset.with_format("arrow").iter(_N_ROWS):
        column = table[TOKENS].combine_chunks()
        lengths = {length or 0 for length in column.value_lengths().unique().to_pylist()}
        lengths |= {n_pos} if n_pos else set()
        if len(lengths) > 1 or lengths == {0}:
            some = " and some of ".join(map(str, sorted(lengths)[:2]))
            raise ValueError(
                f"rows of tokens must be equally long, and there are some of {some}: tokenize the "
                "text into sequences of one size"
            )
        (n_pos,) = lengths
        ids = column.flatten()
        if ids.null_count:
            raise ValueError("rows of tokens must hold an id in every place, and some hold none")
        yield ids.to_numpy().astype(np.int64).reshape(-1, n_pos)


def mark_tokenizer(dataset: Text, source: str) -> None:
    """Have a data set say by which tokenizer, if SAELens has written that down beside it."""
    if Path(source).is_file():
        return
    try:
        path = cached_file(source.partition(":")[0], "sae_lens.json", repo_type="dataset")
    except OSError:  # there is none
        return
    assert path is not None
    name = json.loads(Path(path).read_text(encoding="utf-8"))["tokenizer_name"]
    dataset.info.description = f"{_TOKENIZED_BY}{name}"


@dataclass(frozen=True)
class Sequences:
    """Rows of a data set as SAELens' store reads them, checked as they go by.

    Raises:
        ValueError: the text was tokenized by another tokenizer; while iterating: a row does not
            begin with the model's BOS token, has ids that are none of the model's, or is shorter
            than context_size.
    """

    dataset: Text
    model: Any
    context_size: int

    def __post_init__(self) -> None:
        said, tokenizer = self.dataset.info.description or "", self.model.tokenizer
        name = said.removeprefix(_TOKENIZED_BY)
        if name == said or tokenizer is None or name == tokenizer.name_or_path:
            return
        try:
            theirs = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            warnings.warn(
                f"the text was tokenized by {name!r}, which is not here to be compared with the "
                "model's tokenizer",
                stacklevel=2,
            )
            return
        if not theirs.get_vocab().items() <= tokenizer.get_vocab().items():
            raise ValueError(
                f"the text was tokenized by {name!r}, whose tokens are not those of the model's "
                f"tokenizer, {tokenizer.name_or_path!r}"
            )

    def __iter__(self) -> Iterator[dict[str, Int[np.ndarray, "pos"]]]:
        for ids in token_batches(self.dataset):
            self._check(ids)
            yield from ({TOKENS: row} for row in ids)

    def _check(self, ids: Int[np.ndarray, "rows pos"]) -> None:
        n_pos, n_vocab = ids.shape[1], int(self.model.cfg.d_vocab)
        if n_pos < self.context_size:
            raise ValueError(
                f"context_size={self.context_size}: the text was tokenized into sequences of "
                f"{n_pos}, ask for as many or fewer"
            )
        wrong = ids[(ids < 0) | (ids >= n_vocab)]
        if len(wrong):
            raise ValueError(
                f"the text was tokenized for another model: this one has {n_vocab} tokens, and "
                f"none with id {wrong[0]}"
            )
        bos = getattr(self.model.tokenizer, "bos_token_id", None)
        if bos is not None and (ids[:, 0] != bos).any():
            raise ValueError(
                f"each sequence must begin with the BOS token, {bos}, as those do that SAELens' "
                'PretokenizeRunner makes with begin_batch_token="bos"'
            )
