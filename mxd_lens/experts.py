"""What each expert of a layer fires on and what it does, as a report ready for JSON.

The same for every layer that has SAELens' ``encode`` (MxDs, transcoders, SAEs)::

    report = inspect_experts(model, sae, load_text("demo:wikipedia"))

The texts are read once, and what is kept of that are the firings, 16 bytes each: where an expert
fires for the strongest and for weaker times, words that tell those places from the rest of the
text, whether they are about the same thing, and which experts fire together are read off them.
From the weights come the rank of an expert's linear map and the experts that resemble it; from
the language model which tokens an expert makes likelier, and whether these are what it fires
on: an expert may tell a subject apart without writing about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import SAE
from scipy import sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from mxd_lens.data import Text, special_tokens
from mxd_lens.embedding import coherence, embed
from mxd_lens.faithfulness import hooks_of
from mxd_lens.fields import Count, check
from mxd_lens.mxd import MxD
from mxd_lens.probing import read_texts, tokenize

Embed = Callable[[list[str]], Float[Tensor, "texts d"]]
Ranked = list[list[tuple[int, float]]]
"""For each expert in question: ids and scores, best first."""

N_TOP = 10  # top contexts of an expert
QUANTILES = (0.75, 0.5, 0.25)  # of the coefficient, for weaker contexts
CHUNK_SIZE = 32  # tokens of a piece of text that is embedded
PIECE_SIZE = 8  # tokens of a piece of text in which effects are measured, without BOS
N_AVERAGED = 256  # experts whose effects are averaged
N_RANDOM_SETS = 2000
WORD = r"[^\W\d_]{2,}"


def inspect_experts(
    model: Any,
    sae: SAE[Any],
    texts: Sequence[str] | Text,
    *,
    n_tokens: int = 100_000,
    context_size: int = 128,
    lm_batch_size: int = 32,
    write: Float[Tensor, "d_sae d_out"] | None = None,
    autocast: bool = False,
    embed: Embed = embed,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe every expert that fires on the texts.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        texts: documents, or a data set of them in a column ``text``. Each is read by itself,
            after a BOS token; special tokens and repeated documents are left out.
        n_tokens: read the first documents that have so many ordinary tokens; all, if fewer.
        context_size: tokens of a document that are read, BOS included.
        lm_batch_size: documents per pass of the language model.
        write: what each expert is to write to the layer's output when its effect on the next
            token is measured, see `logit_effects`, the slowest part. None: ``promoted``,
            ``suppressed`` and ``agreement`` stay null.
        autocast: read the documents in bfloat16 where that is safe. Effects never are.
        embed: sentence embeddings, by whose cosines top contexts are compared.
        seed: of the random sets of contexts that coherent ones are told from.

    Returns:
        Ready for JSON: ``model_name``, ``hook_name``, ``hook_name_out``, ``architecture``, ``k``,
        ``d_sae``, ``dataset`` (null, for the caller to fill in), ``n_tokens`` that were read,
        ``n_live``, the ``rule`` by which an expert counts as meaningful, ``texts`` (token strings
        of those that a context refers to) and ``experts``, those that fired, by id:

        - ``id``, ``name`` (see `name_experts`), ``density`` (share of the tokens it fires on);
        - of the coefficient where it fires: ``mean``, ``max`` and ``histogram`` (20 equal bins
          from 0 to max);
        - ``contexts``: ``text`` (an index of ``texts``), ``position`` of the firing token in it,
          ``value`` and ``quantile`` of the coefficient: 1 for the top ones, the strongest
          firing in each of up to 10 texts, then up to two at each of `QUANTILES`;
        - ``coherence`` (null with fewer than 10 top contexts), ``same_token``, ``meaningful``:
          see `meaning`;
        - ``promoted``, ``suppressed``: token strings and changes of their logit, strongest first,
          and ``agreement`` of these changes with its own contexts: see `logit_effects`;
        - ``alike``, ``coactive``: ids and cosine or Jaccard index, see there;
        - ``rank``, ``effective_rank``: see `ranks`; ``sample``: null, for a steered sample.

    Raises:
        ValueError: a size below 1, metadata is missing, the model has no such hook, fewer than
            10 different documents have an ordinary token, or no expert fires.
    """
    check(Count, n_tokens=n_tokens, context_size=context_size, lm_batch_size=lm_batch_size)
    hook_name, hook_name_out = hooks_of(sae)
    sae.setup()  # a model that it was attached to has left its own names on the hook points
    corpus = read_corpus(model, texts, n_tokens, context_size)
    firings = read_firings(model, sae, corpus, lm_batch_size=lm_batch_size, autocast=autocast)
    contexts, quantiles = pick_contexts(firings, corpus)
    top = contexts[:, :N_TOP]
    names = name_experts(top, firings, corpus)
    coherences, same_token, meaningful, rule = meaning(top, firings, corpus, embed, seed)
    promoted = suppressed = agreement = [None] * len(firings.live)
    if write is not None:
        promoted, suppressed, agreement = logit_effects(
            model,
            hook_name_out,
            write[torch.from_numpy(firings.live).to(write.device)],
            top,
            firings,
            corpus,
            seed=seed,
        )
    near, together = alike(sae, firings.live), coactive(firings, len(corpus.ids))
    rank, effective_rank = ranks(sae)
    counts = firings.counts
    mean = np.add.reduceat(firings.value, firings.starts[:-1], dtype=np.float64) / counts
    largest = firings.value[firings.starts[:-1]]
    histograms = _histograms(firings)
    shown = np.unique(corpus.text[firings.token[contexts[contexts >= 0]]])

    def context(firing: int, quantile: float) -> dict[str, Any]:
        token = firings.token[firing]
        text = corpus.text[token]
        return {
            "text": int(np.searchsorted(shown, text)),
            "position": int(token - corpus.starts[text]),
            "value": _short(firings.value[firing]),
            "quantile": quantile,
        }

    experts = [
        {
            "id": int(expert),
            "name": names[row],
            "density": _short(counts[row] / len(corpus.ids)),
            "mean": _short(mean[row]),
            "max": _short(largest[row]),
            "histogram": histograms[row].tolist(),
            "contexts": [
                context(firing, quantile)
                for firing, quantile in zip(contexts[row], quantiles, strict=True)
                if firing >= 0
            ],
            "coherence": None if np.isnan(coherences[row]) else _short(coherences[row]),
            "same_token": _short(same_token[row]),
            "meaningful": bool(meaningful[row]),
            "promoted": promoted[row],
            "suppressed": suppressed[row],
            "agreement": agreement[row],
            "alike": [[i, _short(score)] for i, score in near[row]],
            "coactive": [[i, _short(score)] for i, score in together[row]],
            "rank": int(rank[expert]),
            "effective_rank": _short(effective_rank[expert]),
            "sample": None,
        }
        for row, expert in enumerate(firings.live)
    ]
    return {
        "model_name": sae.cfg.metadata.model_name,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "architecture": sae.cfg.architecture(),
        "k": getattr(sae.cfg, "k", None),
        "d_sae": sae.cfg.d_sae,
        "dataset": None,
        "n_tokens": len(corpus.ids),
        "n_live": len(experts),
        "rule": rule,
        "texts": [corpus.strings[slice(*corpus.starts[i : i + 2])] for i in shown],
        "experts": experts,
    }


# Reading


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


def read_corpus(
    model: Any, texts: Sequence[str] | Text, n_tokens: int, context_size: int
) -> Corpus:
    """Tokenize the first texts that have n_tokens ordinary tokens in all; each text once.

    Raises:
        ValueError: fewer than 10 different texts have an ordinary token.
    """
    rows: Any = texts
    if isinstance(texts, Dataset | IterableDataset):
        rows = (row["text"] for row in rows)
    special = special_tokens(model)
    tokens: dict[str, Tensor] = {}
    ordinary: list[Tensor] = []
    n = 0
    with tqdm(desc="Tokenizing", total=n_tokens, unit="tok") as progress:
        for text in rows:
            if n >= n_tokens:
                break
            if text in tokens:
                continue
            of_text = tokenize(model, text, context_size)
            kept = of_text[~torch.isin(of_text, special)]
            if len(kept):
                tokens[text] = of_text
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
    """Every time an expert fired: sorted by expert, its largest coefficient first.

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
    """The coefficient."""

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
        """Of firings in any order; equal coefficients in the order of the tokens."""
        order = np.lexsort((token, -value, expert))
        counts = np.bincount(expert)
        live = np.flatnonzero(counts)
        counts = counts[live]
        row = np.repeat(np.arange(len(live), dtype=np.int32), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(live, starts, row, token[order], value[order])


@torch.no_grad()
def read_firings(
    model: Any, sae: SAE[Any], corpus: Corpus, *, lm_batch_size: int = 32, autocast: bool = False
) -> Firings:
    """Run the language model over the corpus, up to the layer, and keep when experts fire.

    Raises:
        ValueError: the model has no such hook, or no expert fires.
    """
    hook = hooks_of(sae)[0]
    parts: list[tuple[np.ndarray, ...]] = []
    for batch, acts in read_texts(
        model, corpus.tokens, [hook], lm_batch_size=lm_batch_size, autocast=autocast
    ):
        tokens = torch.cat([torch.arange(*corpus.starts[i : i + 2]) for i in batch])
        for x, token in zip(acts[hook].split(512), tokens.split(512), strict=True):
            coefficients = sae.encode(x.to(sae.device))
            where, expert = (coefficients > 0).nonzero(as_tuple=True)
            value = coefficients[where, expert].float()
            parts.append(
                (
                    expert.int().cpu().numpy(),
                    token[where.cpu()].int().numpy(),
                    value.cpu().numpy(),
                )
            )
    expert, token, value = map(np.concatenate, zip(*parts, strict=True))
    if not len(expert):
        raise ValueError(f"no expert fires on these {len(corpus.ids):,} tokens")
    return Firings.sort(expert, token, value)


# Contexts


def pick_contexts(
    firings: Firings, corpus: Corpus
) -> tuple[Int[np.ndarray, "live contexts"], list[float]]:
    """For each live expert, firings to show (-1: none left) and the quantile of each column.

    First the strongest of each text, from up to 10 texts; then, for each of `QUANTILES`, the
    firing at this quantile of the expert's coefficient and the next weaker one. None twice.
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


def _histograms(firings: Firings, n_bins: int = 20) -> Int[np.ndarray, "live n_bins"]:
    """How often each expert's coefficient is in each of n_bins equal bins from 0 to its maximum."""
    largest = firings.value[firings.starts[:-1]]
    share = firings.value / largest[firings.row]
    place = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
    n_live = len(firings.live)
    return np.bincount(firings.row * np.int64(n_bins) + place, minlength=n_live * n_bins).reshape(
        n_live, n_bins
    )


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
        spaces, is the commonest. Whether the expert counts as meaningful, and the rule for that
        in words, the threshold included.
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
    sets = np.stack(
        [
            rng.choice(len(lengths), N_TOP, replace=False, p=lengths / lengths.sum())
            for _ in range(N_RANDOM_SETS)
        ]
    )
    return chunk[corpus.starts[sets] + rng.integers(lengths[sets])]


# Effects


@torch.no_grad()
def logit_effects(
    model: Any,
    hook_name_out: str,
    write: Float[Tensor, "live d_out"],
    top: Int[np.ndarray, "live n"],
    firings: Firings,
    corpus: Corpus,
    *,
    n: int = 8,
    n_pieces: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[list[list[list[Any]]], list[list[list[Any]]], list[float]]:
    """Which tokens each expert makes likelier to come next, and whether it fires on such tokens.

    Measured: what an expert writes is added to the layer's output at every token of some pieces
    of the corpus, the same for all experts, but for BOS. The change of the next token's logits,
    less its mean over the vocabulary and less what experts change on average, is averaged over
    the pieces. (Raising coefficients in the experts' own contexts instead says little, of
    transcoders' units as of MxDs': there, the next token completes a word or follows from what
    has been said.)

    Args:
        hook_name_out: where in the model the layer writes.
        write: what is added for each expert that fires. What an MxD's expert writes depends on
            the token: see `mxd_lens.steering.contributions`.
        top: firings that are the experts' top contexts; -1: none.
        n: tokens wanted.
        n_pieces: pieces of text, of BOS and `PIECE_SIZE` tokens (fewer, if no text is as long).
        batch_size: rows per pass of the language model.
        seed: of the choice of pieces, and of experts for the average.

    Returns:
        For each expert ``[token string, change]`` of the n largest changes, and the n smallest.
        And the agreement, between 0 and 1: for which share of the other experts' contexts the
        correlation of the change with how typical a token is of them, see `_typical_tokens`, is
        lower than for its own. One half is chance.
    """
    rng = np.random.default_rng(seed)
    bos = int(corpus.tokens[0][0])
    place = np.arange(len(corpus.ids)) - corpus.starts[corpus.text]
    size = min(PIECE_SIZE, place.max() + 1)
    last = np.flatnonzero(place >= size - 1)
    last = rng.choice(last, min(n_pieces, len(last)), replace=False)
    pieces = [[bos, *corpus.ids[i + 1 - size : i + 1].tolist()] for i in last]
    tokens = torch.tensor(pieces, device=model.cfg.device)
    unedited = _last_logits(model, tokens).mean(0)

    def change(vectors: Float[Tensor, "part d_out"]) -> Float[Tensor, "part d_vocab"]:
        rows = vectors.to(tokens.device).repeat_interleave(len(tokens), 0)

        def add(acts: Float[Tensor, "batch pos d_out"], hook: HookPoint) -> Tensor:
            return torch.cat([acts[:, :1], acts[:, 1:] + rows[:, None].to(acts)], dim=1)

        logits = _last_logits(model, tokens.repeat(len(vectors), 1), [(hook_name_out, add)])
        of_part = logits.unflatten(0, (len(vectors), -1)).mean(1) - unedited
        return of_part - of_part.mean(-1, keepdim=True)

    n_rows = max(1, batch_size // len(tokens))
    some = torch.from_numpy(rng.permutation(len(write))[:N_AVERAGED]).to(write.device)
    of_some = torch.cat([change(part) for part in write[some].split(n_rows)])
    usual, spread = of_some.mean(0), of_some.std(0, correction=0)
    spread = spread.clamp(min=spread.mean())  # no token counts for hardly ever changing

    def scores(of_part: Float[Tensor, "part d_vocab"]) -> Float[np.ndarray, "part live"]:
        typical_of = typical @ F.normalize((of_part - usual) / spread, dim=-1).cpu().numpy().T
        return np.asarray(typical_of.T)

    typical = _typical_tokens(top, firings, corpus, len(usual))
    usual_scores = scores(of_some).mean(0)
    promoted: list[Any] = []
    suppressed: list[Any] = []
    agreement: list[float] = []
    with tqdm(desc="Effects on logits", total=len(write), unit="expert") as progress:
        for part in write.split(n_rows):
            of_part = change(part)
            for found, largest in ((promoted, True), (suppressed, False)):
                best, ids = (of_part - usual).topk(n, dim=-1, largest=largest)
                strings = token_strings(model.tokenizer, ids.flatten().tolist())
                pairs = [[*pair] for pair in zip(strings, map(_short, best.flatten()), strict=True)]
                found += [pairs[i : i + n] for i in range(0, len(pairs), n)]
            score = scores(of_part) - usual_scores
            own = score[range(len(part)), range(len(agreement), len(agreement) + len(part))]
            lower = (score < own[:, None]).sum(1) / max(1, len(write) - 1)
            agreement += map(_short, lower)
            progress.update(len(part))
    return promoted, suppressed, agreement


def _typical_tokens(
    top: Int[np.ndarray, "live n"], firings: Firings, corpus: Corpus, d_vocab: int
) -> Any:
    """How typical tokens are of experts' top contexts: a sparse array [live, d_vocab].

    A token that is in c of an expert's contexts (12 tokens on both sides of the firing one) where
    E are expected, by its frequency in the corpus, scores ``c log(c / E)``, where that is positive
    and c at least two. Rows have unit norm, or are zero.
    """
    row, token = [], []
    for expert, place in zip(*np.nonzero(top >= 0), strict=True):
        start, end = corpus.around(int(firings.token[top[expert, place]]), 12)
        found = np.unique(corpus.ids[start:end])
        row.append(np.full(len(found), expert))
        token.append(found)
    size = sum(map(len, token)) / max(1, len(token))
    ones = np.ones(sum(map(len, token)), np.float32)
    shape = (len(top), d_vocab)
    count = sparse.coo_array((ones, (np.concatenate(row), np.concatenate(token))), shape=shape)
    count.sum_duplicates()
    frequency = np.bincount(corpus.ids, minlength=d_vocab) / len(corpus.ids)
    expected = (top >= 0).sum(1)[count.row] * (1 - np.exp(-size * frequency[count.col]))
    score = np.where(count.data > 1, count.data * np.log(count.data / expected), 0)
    typical = sparse.csr_array((score.clip(min=0), (count.row, count.col)), shape=shape)
    unit: Any = normalize(typical)
    return unit.astype(np.float32)


def _last_logits(
    model: Any, tokens: Int[Tensor, "rows pos"], hooks: Sequence[Any] = ()
) -> Float[Tensor, "rows d_vocab"]:
    """The last token's logits; the others are not computed."""

    def last(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][:, -1:], *args[1:]

    handle = model.unembed.register_forward_pre_hook(last)
    try:
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1].float()
    finally:
        handle.remove()


# Weights


def spectrum(sae: SAE[Any], n: int) -> Float[Tensor, "rank"]:
    """Singular values, largest first, of the linear map of expert n.

    An MxD's maps the hidden units to the output, ``W_shared diag(W_dec[n])``; a transcoder's or an
    SAE's maps the input to the output, ``W_enc[:, n] W_dec[n]``, and has one.
    """
    if isinstance(sae, MxD):
        return torch.linalg.svdvals(sae.expert_weights(n).detach().float())
    return (sae.W_enc[:, n].detach().norm() * sae.W_dec[n].detach().norm()).float()[None]


@torch.no_grad()
def ranks(sae: SAE[Any]) -> tuple[Int[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
    """Rank and effective rank of every expert's linear map, as in `spectrum`.

    An MxD's expert has W_shared's rank where ``W_dec[n]`` has no zero (paper, lemma 1), and is
    computed otherwise. The effective rank is the participation ratio of the squared singular
    values ``s^2``, ``(sum s^2)^2 / sum s^4``: m if m are equal and the others zero. With
    ``G = W_shared^T W_shared`` and ``c = W_dec[n]``, ``sum s^2 = c^2 diag(G)`` and
    ``sum s^4 = c^2 (G * G) c^2``, so that no expert needs a decomposition.
    """
    if not isinstance(sae, MxD):
        zero = (sae.W_enc.norm(dim=0) * sae.W_dec.norm(dim=1) == 0).cpu().numpy()
        return np.where(zero, 0, 1), np.where(zero, 0.0, 1.0)
    W_shared, square = sae.W_shared.cpu().double(), sae.W_dec.cpu().double().square()
    gram = W_shared.T @ W_shared
    second, fourth = square @ gram.diagonal(), (square @ gram.square() * square).sum(-1)
    effective = torch.where(fourth > 0, second.square() / fourth, 0.0)
    rank = torch.linalg.matrix_rank(sae.W_shared.float()).repeat(sae.cfg.d_sae)
    for n in (sae.W_dec == 0).any(-1).nonzero()[:, 0]:
        rank[n] = torch.linalg.matrix_rank(sae.expert_weights(int(n)).float())
    return rank.cpu().numpy(), effective.numpy()


@torch.no_grad()
def alike(sae: SAE[Any], experts: Int[np.ndarray, "experts"], n: int = 5) -> Ranked:
    """The n of these experts with the weights most alike to each, and the cosine.

    For an MxD the cosine of ``W_shared diag(W_dec[n])`` as vectors, which is that of
    ``W_dec[n]`` times the norms of W_shared's columns; otherwise that of rows of W_dec.
    """
    rows = sae.W_dec[torch.from_numpy(experts).to(sae.device)].float()
    rows = F.normalize(rows * sae.W_shared.float().norm(dim=0) if isinstance(sae, MxD) else rows)
    return _nearest(lambda part: rows[part] @ rows.T, experts, n)


def coactive(firings: Firings, n_tokens: int, n: int = 5) -> Ranked:
    """The n experts most often active on the same tokens as each, and the Jaccard index: tokens
    on which both fire over tokens on which either does."""
    shape = (len(firings.live), n_tokens)
    ones = np.ones(len(firings.row), np.float32)
    active = sparse.csr_array((ones, firings.token, firings.starts), shape=shape)
    by_token = sparse.csr_array(active.T)
    counts = firings.counts.astype(np.float32)

    def jaccard(part: slice) -> Tensor:
        both = (active[part] @ by_token).toarray()
        return torch.from_numpy(both / (counts[part, None] + counts - both))

    return [
        [(other, score) for other, score in of_expert if score > 0]
        for of_expert in _nearest(jaccard, firings.live, n)
    ]


def _nearest(
    similarity: Callable[[slice], Float[Tensor, "part experts"]],
    experts: Int[np.ndarray, "experts"],
    n: int,
) -> Ranked:
    """The n others most similar to each, 512 rows of the similarities at a time."""
    found: Ranked = []
    for first in range(0, len(experts), 512):
        part = similarity(slice(first, first + 512))
        own = torch.arange(len(part), device=part.device)
        part[own, first + own] = -torch.inf
        scores, places = part.topk(min(n, len(experts) - 1), dim=-1)
        for ids, of_expert in zip(experts[places.cpu().numpy()], scores.tolist(), strict=True):
            found.append(list(zip(ids.tolist(), of_expert, strict=True)))
    return found


def _short(number: Any) -> float:
    """Four digits: all a report needs."""
    return float(f"{float(number):.4g}")
