"""What a language model computes on texts: read once, shared by many layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from mxd_lens.data.activations import activations_store, too_short
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, check
from mxd_lens.models.site import Hooks, Site


@dataclass
class Heldout:
    """Held-out text as the language model reads it: made once, shared by many layers."""

    site: Site
    tokens: list[Int[Tensor, "batch pos"]]
    """Each text once."""
    pairs: list[dict[str, Float[Tensor, "tokens d"]]]
    """For each batch, input and output of the MLP, and what the layer reads, at the non-special
    tokens."""
    n_sequences: int
    """Sequences of these on which cross-entropies are taken."""
    shared: dict[str, Float[Tensor, "sequences pos"]] = field(default_factory=dict)
    """Losses that no layer takes part in, once they are known, see `InModel`."""

    @property
    def in_model(self) -> list[Int[Tensor, "batch pos"]]:
        """The first `n_sequences`, if there are as many, in batches."""
        return list(torch.cat(self.tokens)[: self.n_sequences].split(len(self.tokens[0])))


@torch.no_grad()
def read_heldout(
    site: Site,
    dataset: Text,
    *,
    context_size: int,
    device: str,
    n_sequences: int = 64,
    n_tokens: int = 100_000,
    batch_size: int = 16,
) -> Heldout:
    """Run the language model over held-out documents, up to the MLP, in its weights' precision.

    Args:
        n_sequences: sequences on which cross-entropies (nats per token) will be taken.
        n_tokens: tokens on which layers alone will be measured; fewer if the text is shorter.
        batch_size: sequences per pass of the language model.

    Raises:
        ValueError: the text is too short for a single batch.
    """
    check(Count, n_sequences=n_sequences, n_tokens=n_tokens, batch_size=batch_size)
    store = _heldout_store(site, dataset, context_size, batch_size)
    batches = _token_batches(store, -(-n_tokens // (batch_size * (context_size - 1))))
    pairs = []
    for tokens in tqdm(batches, desc="Reading held-out text"):
        acts = site.kept(store.get_multi_hook_activations(site.on_model(tokens)), tokens)
        pairs.append({hook: of_hook.to(device).float() for hook, of_hook in acts.items()})
    return Heldout(site, batches, pairs, n_sequences)


def check_heldout(site: Site, dataset: Text, *, context_size: int, batch_size: int = 16) -> None:
    """Raise ValueError, before any training, if `read_heldout` will not have text enough."""
    _token_batches(_heldout_store(site, dataset, context_size, batch_size), 1)


def _heldout_store(
    site: Site, dataset: Text, context_size: int, batch_size: int
) -> ActivationsStore:
    return activations_store(
        [site, Site.at(site.model, site.layer)],
        dataset,
        context_size=context_size,
        batch_size=batch_size * context_size,
        lm_batch_size=batch_size,
        autocast_lm=False,
    )


def _token_batches(store: ActivationsStore, n: int) -> list[Int[Tensor, "batch pos"]]:
    """At most n batches, each text once."""
    batches: list[Tensor] = []
    for _ in range(n):
        try:
            batches.append(store.get_batch_tokens(raise_at_epoch_end=True))
        except (StopIteration, RuntimeError):
            break
    if not batches:
        raise too_short(store, "held-out text")
    return batches


@dataclass(frozen=True)
class TextActivations:
    """What a language model computes for the non-special tokens of some texts; on the CPU.

    1,200 texts of 128 tokens at one hook of width 576 are 350 MB in float32.
    """

    at: dict[str, Float[Tensor, "tokens d"]]
    """Activations by hook name, in the model's dtype."""
    text: Int[Tensor, "tokens"]
    """Which text each token is of."""
    n_texts: int


@torch.no_grad()
def text_activations(
    site: Site,
    texts: Sequence[str],
    *,
    context_size: int = 128,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> TextActivations:
    """The MLP's input and output on the texts; the model is run no further.

    Each is read by itself, context_size tokens of it at most, BOS included, and lm_batch_size of
    them per pass of the language model. Special tokens are left out.

    Raises:
        ValueError: the model has no such hook, or a text has no non-special token.
    """
    check(Count, n_texts=len(texts), context_size=context_size, lm_batch_size=lm_batch_size)
    tokens = [tokenize(site.model, text, context_size) for text in tqdm(texts, desc="Tokenizing")]
    counts = torch.stack([site.non_special(of_text).sum() for of_text in tokens])
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"text {empty} has no non-special token: {texts[empty]!r}")
    text = torch.arange(len(texts)).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    at: dict[str, Tensor] = {}
    for batch, acts in read_texts(
        site, tokens, site.hooks, lm_batch_size=lm_batch_size, autocast=autocast
    ):
        for hook in acts:
            if hook not in at:
                at[hook] = torch.empty(len(text), acts[hook].shape[-1], dtype=acts[hook].dtype)
            of_texts = acts[hook].cpu().split(counts[batch].tolist())
            for i, of_text in zip(batch, of_texts, strict=True):
                at[hook][starts[i] : starts[i] + counts[i]] = of_text
    return TextActivations(at, text, len(texts))


def word_activations(
    site: Site,
    texts: Sequence[str],
    ends: Sequence[int],
    *,
    context_size: int = 128,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> tuple[TextActivations, list[int]]:
    """Of words in texts, as `text_activations` of texts: those of the last token of each, which has
    read the whole word.

    Args:
        texts: of each word, the text it is in; each text is read once.
        ends: of each word, the number of its text's characters up to its end.

    Returns:
        The activations, each token a text of its own, and the words they are of, in order: those
        whose end is among the first context_size tokens.

    Raises:
        ValueError: as `text_activations` does, or the tokenizer does not tell where tokens are.
    """
    different = list(dict.fromkeys(texts))
    reading = {"context_size": context_size, "lm_batch_size": lm_batch_size, "autocast": autocast}
    read = text_activations(site, different, **reading)
    counts = read.text.bincount(minlength=len(different))
    starts = dict(zip(different, (counts.cumsum(0) - counts).tolist(), strict=True))
    rank_at = {text: _ranks(site, text, context_size) for text in different}
    words, rows = [], []
    for word, (text, end) in enumerate(zip(texts, ends, strict=True)):
        rank = rank_at[text].get(end - 1)
        if rank is not None:
            words.append(word)
            rows.append(starts[text] + rank)
    at = {hook: of_hook[rows] for hook, of_hook in read.at.items()}
    return TextActivations(at, torch.arange(len(rows)), len(rows)), words


def _ranks(site: Site, text: str, context_size: int) -> dict[int, int]:
    """Of each character of a text, how many non-special tokens come before the one it is in."""
    tokens = tokenize(site.model, text, context_size)
    try:
        encoded = site.model.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=False, verbose=False
        )
    except NotImplementedError as error:
        raise ValueError(
            "words are found by the tokenizer's offsets, which only fast tokenizers have"
        ) from error
    kept, ids = site.non_special(tokens), encoded["input_ids"]
    first = int(tokens[:1].tolist() != ids[:1])  # BOS comes before it
    if tokens[first:].tolist() != ids[: len(tokens) - first]:
        raise ValueError(f"the tokenizer reads a text in two ways: {text[:80]!r}")
    before = (kept.cumsum(0) - 1).tolist()
    return {
        character: before[first + n]
        for n, (start, end) in enumerate(encoded["offset_mapping"][: len(tokens) - first])
        if kept[first + n]
        for character in range(start, end)
    }


def tokenize(model: Any, text: str, context_size: int) -> Int[Tensor, "pos"]:
    """BOS and the text after it, cut to context_size tokens; on the CPU."""
    return model.to_tokens(text, prepend_bos=True, move_to_device=False)[0, :context_size]


def read_texts(
    site: Site,
    tokens: Sequence[Int[Tensor, "pos"]],
    hooks: Hooks | tuple[str],
    *,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> Iterator[tuple[Int[Tensor, "batch"], dict[str, Float[Tensor, "tokens d"]]]]:
    """Run the model on tokenized texts, no further than the last hook, the longest first.

    Yields:
        For each pass of the model: which texts it read, and what `Site.read` gives of them.
    """
    # Texts of one length together: little padding, which goes to the right, where no causal
    # model sees it.
    order = torch.tensor([len(of_text) for of_text in tokens]).argsort(descending=True, stable=True)
    padding = int(site.special[0])
    for batch in tqdm(order.split(lm_batch_size), desc="Reading the texts"):
        padded = pad_sequence([tokens[i] for i in batch.tolist()], True, padding_value=padding)
        yield batch, site.read(padded, hooks, autocast=autocast)
