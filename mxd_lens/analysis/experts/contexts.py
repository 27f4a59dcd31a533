"""Where an expert fires, what to call it, and whether it is about one thing."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from torch import Tensor

from mxd_lens.analysis.embedding import coherence
from mxd_lens.analysis.experts.corpus import N_TOP, Corpus, Firings

Embed = Callable[[list[str]], Float[Tensor, "texts d"]]

QUANTILES = (0.75, 0.5, 0.25)  # of the activation, for weaker contexts
N_RANDOM_SETS = 2000
WORD = r"[^\W\d_]{2,}"


# Contexts


def pick_contexts(
    firings: Firings, corpus: Corpus
) -> tuple[Int[np.ndarray, "live contexts"], list[float]]:
    """For each live expert, firings to show (-1: none left) and the quantile of each column.

    First the strongest of each text, from up to 10 texts; then, for each of `QUANTILES`, the
    firing at this quantile of the expert's activation and the next weaker one. None twice.
    """
    n_live = len(firings.live)
    key = firings.row.astype(np.int64) * (len(corpus.starts) - 1) + corpus.text[firings.token]
    strongest = np.sort(np.unique(key, return_index=True)[1])
    row = firings.row[strongest]
    place = np.arange(len(row)) - np.searchsorted(row, np.arange(n_live))[row]
    kept = place < N_TOP
    top = np.full((n_live, N_TOP), -1)
    top[row[kept], place[kept]] = strongest[kept]
    columns = [*top.T]
    for quantile in QUANTILES:
        at = np.rint((1 - quantile) * (firings.counts - 1)).astype(int)
        for place in (at, at + 1):
            firing = np.where(place < firings.counts, firings.starts[:-1] + place, -1)
            taken = np.any([firing == column for column in columns], axis=0)
            columns.append(np.where(taken, -1, firing))
    return np.stack(columns, axis=1), [1.0] * N_TOP + [q for q in QUANTILES for _ in range(2)]


def histograms_of(firings: Firings, n_bins: int = 20) -> Int[np.ndarray, "live n_bins"]:
    """How often each expert's activation is in each of n_bins equal bins from 0 to its maximum."""
    largest = firings.value[firings.starts[:-1]]
    share = firings.value / largest[firings.row]
    place = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
    n_live, bins = len(firings.live), firings.row * np.int64(n_bins) + place
    return np.bincount(bins, minlength=n_live * n_bins).reshape(n_live, n_bins)


# Meaning


def name_experts(top: Int[np.ndarray, "live n"], firings: Firings, corpus: Corpus) -> list[str]:
    """The three words that tell an expert's top contexts best from the corpus, or fewer.

    A context is 10 tokens on both sides of the firing one. A word that occurs in c of an expert's
    contexts where E are expected, by its frequency in the corpus, scores ``c log(c / E)``, as in
    a likelihood-ratio test; contexts whose firing token is part of it count twice in c. It needs
    two contexts. English stop words are left out.
    """
    row, place = np.nonzero(top >= 0)
    windows, fired = [], []
    for token in firings.token[top[row, place]].tolist():
        windows.append(corpus.string(*corpus.around(token, 10)))
        fired.append(_word_at(corpus, token))
    vectorizer = CountVectorizer(stop_words=list(ENGLISH_STOP_WORDS), token_pattern=WORD)
    documents = (corpus.string(*ends) for ends in pairwise(corpus.starts.tolist()))
    in_corpus: Any = vectorizer.fit_transform(documents)
    frequency = np.asarray(in_corpus.sum(0))[0] / in_corpus.sum()
    in_window: Any = vectorizer.transform(windows)
    words_per_window = in_window.sum() / len(windows)
    in_window.data[:] = 1
    shape = (len(top), len(row))
    group = sparse.csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=shape)
    occurs = sparse.csr_array(group @ in_window)
    fires = sparse.csr_array(group @ vectorizer.transform(fired))
    count = (occurs + fires).multiply(occurs > 1).tocoo()
    chance = 1 - np.exp(-words_per_window * frequency)
    expected = (top >= 0).sum(1)[count.row] * chance[count.col]
    score = count.data * np.log(count.data / expected)
    best = np.lexsort((-score, count.row))
    best = best[score[best] > 0]
    vocabulary = vectorizer.get_feature_names_out()
    names: list[list[str]] = [[] for _ in top]
    for i, word in zip(count.row[best], vocabulary[count.col[best]], strict=True):
        if len(names[i]) < 3:
            names[i].append(word)
    return [" · ".join(words) for words in names]


def _word_at(corpus: Corpus, token: int) -> str:
    """The word that a token is or is part of; none for punctuation, numbers and spaces."""
    start, end = corpus.around(token, 10)
    string = corpus.strings[token]
    place = len(corpus.string(start, token)) + len(string) - len(string.lstrip())
    for match in re.finditer(WORD, corpus.string(start, end)):
        if match.start() <= place < match.end():
            return match.group()
    return ""


def meaning(
    top: Int[np.ndarray, "live n"], firings: Firings, corpus: Corpus, embed: Embed, seed: int = 0
) -> tuple[Float[np.ndarray, "live"], Float[np.ndarray, "live"], Bool[np.ndarray, "live"], str]:
    """Whether the top contexts of an expert are about one thing, or fire on one word.

    Returns:
        ``coherence``: mean pairwise cosine of the embeddings of the pieces of text, of about 32
        tokens, that the expert's 10 top contexts lie in; nan where there are fewer contexts.
        ``same_token``: share of the top contexts whose firing token, in lower case and without
        spaces, is the commonest. Whether the expert counts as meaningful, and the rule in words.
    """
    full = (top >= 0).all(1)
    pieces, chunk = corpus.chunks()
    embeddings = embed(pieces)

    def of_sets(sets: Int[np.ndarray, "sets n"]) -> Float[np.ndarray, "sets"]:
        parts = [coherence(embeddings[part]) for part in torch.from_numpy(sets).split(512)]
        return torch.cat(parts).float().cpu().numpy() if parts else np.empty(0, np.float32)

    threshold = float(np.quantile(of_sets(_random_sets(corpus, chunk, seed)), 0.99))
    coherences = np.full(len(top), np.nan, np.float32)
    coherences[full] = of_sets(chunk[firings.token[top[full]]])

    strings, words = np.full(top.shape, "", object), np.full(top.shape, "", object)
    for place in zip(*np.nonzero(top >= 0), strict=True):
        token = int(firings.token[top[place]])
        strings[place] = corpus.strings[token].strip().lower()
        word = _word_at(corpus, token).lower()
        words[place] = "" if word in ENGLISH_STOP_WORDS else word
    present = top >= 0
    same = (strings[:, :, None] == strings[:, None, :]) & present[:, :, None] & present[:, None, :]
    same_token = same.sum(2).max(1) / present.sum(1)
    whole = (words == strings) & (words != "")
    same_word = (same & whole[:, :, None] & whole[:, None, :]).sum(2).max(1)
    meaningful = full & ((np.nan_to_num(coherences, nan=-1) > threshold) | (same_word >= 8))
    rule = (
        f"An expert is meaningful if its {N_TOP} top contexts, from {N_TOP} different texts, have "
        f"a mean pairwise cosine of sentence embeddings above {threshold:.3f}, the 99th percentile "
        f"of {N_RANDOM_SETS:,} random sets of {N_TOP} such contexts (so that 1 in 100 is by "
        "chance), or if 8 of them fire on the same whole word that is no stop word."
    )
    return coherences, same_token, meaningful, rule


def _random_sets(
    corpus: Corpus, chunk: Int[np.ndarray, "tokens"], seed: int
) -> Int[np.ndarray, "sets n"]:
    """Pieces that random tokens, each of another text, lie in."""
    rng = np.random.default_rng(seed)
    lengths = np.diff(corpus.starts)
    chance = lengths / lengths.sum()
    texts = [rng.choice(len(chance), N_TOP, replace=False, p=chance) for _ in range(N_RANDOM_SETS)]
    sets = np.stack(texts)
    return chunk[corpus.starts[sets] + rng.integers(lengths[sets])]
