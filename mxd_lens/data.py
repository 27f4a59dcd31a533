"""Text: load it, split it by document, turn it into (mlp_in, mlp_out) pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from mxd_lens import assets

Text = Dataset | IterableDataset

DEMO_TEXTS = {
    "demo:wikipedia": assets.wikipedia,
    "demo:state-of-the-union": assets.state_of_the_union,
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
    if source in DEMO_TEXTS:
        dataset: Text = DEMO_TEXTS[source]()
    elif (reader := _FILE_READERS.get(Path(source).suffix)) is not None:
        if not Path(source).is_file():
            raise ValueError(f"there is no file {source}")
        builder, options = reader
        dataset = _load(source, builder, data_files=source, streaming=streaming, **options)
    else:
        name, _, config = source.partition(":")
        dataset = _load(source, name, config or None, split=split, streaming=streaming)
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
    return dataset.select_columns(text_column).rename_columns(
        {} if text_column == "text" else {text_column: "text"}
    )


def _load(source: str, *args: Any, split: str = "train", **kwargs: Any) -> Text:
    try:
        return datasets.load_dataset(*args, split=split, **kwargs)
    except Exception as error:  # `datasets` raises many kinds for one cause: not loadable
        raise ValueError(f"cannot load the text {source!r}: {error}") from error


def split_documents(dataset: Text, n_heldout: int, seed: int = 0) -> tuple[Text, Text]:
    """(training documents, held-out documents), with no text in both.

    Documents are shuffled first; a streamed data set gives its first n_heldout documents.

    Raises:
        ValueError: there are not more than n_heldout documents.
    """
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
    return train, dataset.select(
        [i for i, text in enumerate(dataset[:n_heldout]["text"]) if text not in seen]
    )


def special_tokens(model: Any) -> Tensor:
    """Ids of BOS, EOS, padding and their like: the tokens left out everywhere."""
    return torch.tensor(sorted(get_special_token_ids(model.tokenizer)), dtype=torch.long)


def activations_store(
    model: Any,
    dataset: Text,
    hooks: tuple[str, str],
    *,
    context_size: int,
    batch_size: int,
    lm_batch_size: int,
    device: str,
    autocast_lm: bool,
) -> ActivationsStore:
    """SAELens' store over both hooks of an MLP: one LM pass that stops at the layer."""
    # Half of the buffer is served between two shuffles: at least eight batches or LM passes.
    buffer = max(16 * batch_size, 16 * lm_batch_size * context_size // 2)
    return ActivationsStore.from_config_multi_hook(
        model,
        dataset=dataset,
        hook_names=list(hooks),
        hook_d_ins={hook: int(model.cfg.d_model) for hook in hooks},
        context_size=context_size,
        n_batches_in_buffer=buffer // context_size,
        total_training_tokens=0,
        store_batch_size_prompts=lm_batch_size,
        train_batch_size_tokens=batch_size,
        exclude_special_tokens=special_tokens(model).to(device),
        device=device,
        autocast_lm=autocast_lm,
    )


class NonFiniteActivations(ValueError):
    """The language model produced inf or nan."""


def pairs(store: ActivationsStore, hooks: tuple[str, str]) -> Iterator[Float[Tensor, "batch d"]]:
    """``cat([mlp_in, mlp_out], -1)`` batches without end, for a `SAETrainer`.

    Raises:
        ValueError: the text has too few tokens for a single batch.
        NonFiniteActivations: a batch holds inf or nan; it is not handed out.
    """
    loader = store.get_multi_hook_data_loader()
    while True:
        try:
            batch = next(loader)
        except (StopIteration, RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error.__cause__, StopIteration):
                raise
            raise ValueError(
                f"the text is too short: it has fewer than {store.store_batch_size_prompts} "
                f"sequences of {store.context_size} tokens"
            ) from error
        pair = torch.cat([batch[hook].float() for hook in hooks], dim=-1)
        if not pair.isfinite().all():
            wrong = [hook for hook in hooks if not batch[hook].isfinite().all()]
            raise NonFiniteActivations(
                f"inf or nan in the activations at {' and '.join(wrong)}: the language model "
                "overflows on this text; load it in float32, without autocast"
            )
        yield pair
