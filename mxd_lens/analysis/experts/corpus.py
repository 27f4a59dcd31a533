"""Texts as tokens, and when experts fire on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.reading import read_texts, tokenize
from mxd_lens.data.text import Text
from mxd_lens.data.tokens import TOKENS, Sequences, is_tokenized
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site

N_TOP = 10  # top contexts of an expert

CHUNK_SIZE = 32  # tokens of a piece of text that is embedded


@dataclass(frozen=True)
class Corpus:
    """Tokens of some texts, without the special ones, one text after the other."""

    tokens: list[Int[Tensor, "pos"]]
    """Of each text, as the language model reads it: BOS first, special tokens in place."""
    ids: Int[np.ndarray, "tokens"]
    strings: list[str]
    """Of each token, with the space before it."""
    text: Int[np.ndarray, "tokens"]
    """Which text each token is of."""
    starts: Int[np.ndarray, "texts_and_end"]
    """Text i is tokens ``starts[i]`` to ``starts[i + 1]``."""

    def around(self, token: int, n: int) -> tuple[int, int]:
        """From where to where n tokens on both sides of this one reach, within its text."""
        start, end = self.starts[self.text[token]], self.starts[self.text[token] + 1]
        return max(int(start), token - n), min(int(end), token + n + 1)

    def chunks(self) -> tuple[list[str], Int[np.ndarray, "tokens"]]:
        """Every text cut evenly into pieces of about 32 tokens, and which each token is in."""
        lengths = np.diff(self.starts)
        n_chunks = np.maximum(1, np.rint(lengths / CHUNK_SIZE)).astype(int)
        position = np.arange(len(self.ids)) - self.starts[self.text]
        first = n_chunks.cumsum() - n_chunks
        chunk = first[self.text] + position * n_chunks[self.text] // lengths[self.text]
        bounds = np.flatnonzero(np.diff(chunk, prepend=-1, append=-1))
        return [self.string(*ends).strip() for ends in pairwise(bounds.tolist())], chunk

    def string(self, start: int, end: int) -> str:
        """The text of tokens start to end."""
        return "".join(self.strings[start:end])

    def after(self, n_tokens: int) -> Corpus:
        """The texts after the first ones that have n_tokens in all; ValueError if there are fewer
        than 10."""
        first = int(np.searchsorted(self.starts, n_tokens))
        if len(self.tokens) - first < N_TOP:
            raise ValueError(
                f"{max(0, len(self.tokens) - first)} different texts are left after {n_tokens:,} "
                f"tokens: need at least {N_TOP}"
            )
        start = self.starts[first]
        return Corpus(
            self.tokens[first:],
            self.ids[start:],
            self.strings[start:],
            self.text[start:] - first,
            self.starts[first:] - start,
        )


def read_corpus(
    site: Site, texts: Sequence[str] | Text, n_tokens: int, context_size: int
) -> Corpus:
    """Tokenize the first texts that have n_tokens non-special tokens in all; each text once. Of a
    text that was tokenized before, each sequence is one.

    Raises:
        ValueError: fewer than 10 different texts have a non-special token.
    """
    model = site.model
    tokens: dict[str | bytes, Tensor] = {}
    ordinary: list[Tensor] = []
    n = 0
    with tqdm(desc="Tokenizing", total=n_tokens, unit="tok") as progress:
        for text in _rows(model, texts):
            if n >= n_tokens:
                break
            name = text if isinstance(text, str) else text.tobytes()
            if name in tokens:
                continue
            if isinstance(text, str):
                of_text = tokenize(model, text, context_size)
            else:
                of_text = torch.from_numpy(text[:context_size])
            kept = of_text[site.non_special(of_text)]
            if len(kept):
                tokens[name] = of_text
                ordinary.append(kept)
                n += len(kept)
                progress.update(len(kept))
    if len(tokens) < N_TOP:
        raise ValueError(
            f"{len(tokens)} different texts with {n:,} tokens are too little to inspect experts "
            f"on: need at least {N_TOP} texts"
        )
    lengths = [len(of_text) for of_text in ordinary]
    ids = torch.cat(ordinary).numpy()
    known, place = np.unique(ids, return_inverse=True)
    strings = token_strings(model.tokenizer, known.tolist())
    return Corpus(
        list(tokens.values()),
        ids,
        [strings[i] for i in place],
        np.repeat(np.arange(len(lengths)), lengths),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def _rows(model: Any, texts: Sequence[str] | Text) -> Iterator[str | Int[np.ndarray, "pos"]]:
    """Each text, or its tokens."""
    if not isinstance(texts, Dataset | IterableDataset):
        yield from texts
    elif is_tokenized(texts):
        yield from (row[TOKENS] for row in Sequences(texts, model, 1))
    else:
        row: Any
        for row in texts:
            yield row["text"]


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text, the space before a word included.

    Tokenizers drop that space at the start of what they decode, so each is decoded behind another.
    """
    alone = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    first = next((i for i, string in enumerate(alone) if string.strip().isalpha()), 0)
    pairs = [[ids[first], i] for i in ids]
    decoded = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return [string[len(alone[first]) :] for string in decoded]


@dataclass(frozen=True)
class Firings:
    """Every time an expert fired: sorted by expert, its largest activation first.

    16 bytes a firing, and about 50 while they are sorted: with 32 active experts 512 bytes a
    token, 100 MB for 200,000 tokens and 320 MB in between.
    """

    live: Int[np.ndarray, "live"]
    """Ids of the experts that fired."""
    starts: Int[np.ndarray, "live_and_end"]
    """Firings ``starts[i]`` to ``starts[i + 1]`` are those of ``live[i]``."""
    row: Int[np.ndarray, "firings"]
    """Which of ``live`` fired."""
    token: Int[np.ndarray, "firings"]
    """The token of the corpus."""
    value: Float[np.ndarray, "firings"]
    """The activation."""

    @property
    def counts(self) -> Int[np.ndarray, "live"]:
        return np.diff(self.starts)

    @classmethod
    def sort(
        cls,
        expert: Int[np.ndarray, "firings"],
        token: Int[np.ndarray, "firings"],
        value: Float[np.ndarray, "firings"],
    ) -> Firings:
        """Of firings in any order; equal activations in the order of the tokens."""
        order = np.lexsort((token, -value, expert))
        counts = np.bincount(expert)
        live = np.flatnonzero(counts)
        counts = counts[live]
        row = np.repeat(np.arange(len(live), dtype=np.int32), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(live, starts, row, token[order], value[order])


@torch.no_grad()
def read_firings(
    site: Site, sae: SAE[Any], corpus: Corpus, *, lm_batch_size: int = 32, autocast: bool = False
) -> Firings:
    """Run the language model over the corpus, up to the layer, and keep when units fire.

    Raises:
        ValueError: the model has no such hook, or no unit fires.
    """
    layer, hook = layer_of(sae), site.hook_in
    parts = []
    for batch, acts in read_texts(
        site, corpus.tokens, (hook,), lm_batch_size=lm_batch_size, autocast=autocast
    ):
        tokens = torch.cat([torch.arange(*corpus.starts[i : i + 2]) for i in batch])
        for x, token in zip(acts[hook].split(4096), tokens.split(4096), strict=True):
            where, expert, value = layer.codes(x.to(sae.device)).firings()
            found = (expert.cpu().int(), token[where.cpu()].int(), value.cpu().float())
            parts.append([part.numpy() for part in found])
    expert, token, value = map(np.concatenate, zip(*parts, strict=True))
    if not len(expert):
        raise ValueError(f"no expert fires on these {len(corpus.ids):,} tokens")
    return Firings.sort(expert, token, value)
