"""What a language model computes on texts: read once, shared by many layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from mxd_lens.data.activations import activations_store
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, check
from mxd_lens.models.site import Hooks, restore_hook_names, special_tokens


@dataclass
class Heldout:
    """Held-out text as the language model reads it: made once, shared by many layers.

    Args:
        hooks: names of the MLP's input and output.
        tokens: token batches [batch, pos], each text once.
        special: ids of the tokens that are left out.
        pairs: for each batch, input and output of the MLP at the ordinary tokens.
        n_sequences: sequences of these on which cross-entropies are taken.
    """

    hooks: Hooks
    tokens: list[Int[Tensor, "batch pos"]]
    special: Int[Tensor, "n_special"]
    pairs: list[dict[str, Float[Tensor, "tokens d"]]]
    n_sequences: int
    shared: dict[str, float] = field(default_factory=dict)
    """Cross-entropies no layer takes part in, once they are known."""

    @property
    def in_model(self) -> list[Int[Tensor, "batch pos"]]:
        return self.tokens[: -(-self.n_sequences // len(self.tokens[0]))]


@torch.no_grad()
def read_heldout(
    model: Any,
    hooks: Hooks,
    dataset: Text,
    *,
    context_size: int,
    device: str,
    n_sequences: int = 64,
    n_tokens: int = 100_000,
    batch_size: int = 16,
    autocast: bool = False,
) -> Heldout:
    """Run the language model over held-out documents, up to the MLP.

    Args:
        n_sequences: sequences on which cross-entropies (nats per token) will be taken.
        n_tokens: tokens on which layers alone will be measured; fewer if the text is shorter.
        batch_size: sequences per pass of the language model.
        autocast: run the language model in bfloat16 where that is safe.

    Raises:
        ValueError: the text is too short for a single batch.
    """
    check(Count, n_sequences=n_sequences, n_tokens=n_tokens, batch_size=batch_size)
    restore_hook_names(model)
    store = _heldout_store(model, hooks, dataset, context_size, device, batch_size, autocast)
    special = special_tokens(model).to(device)
    batches = _token_batches(store, -(-n_tokens // (batch_size * (context_size - 1))))
    pairs = []
    for tokens in tqdm(batches, desc="Reading held-out text"):
        acts = store.get_multi_hook_activations(tokens)
        keep = ~torch.isin(tokens, special)
        pairs.append({hook: acts[hook][keep].float() for hook in hooks})
    return Heldout(hooks, batches, special, pairs, n_sequences)


def check_heldout(
    model: Any, hooks: Hooks, dataset: Text, *, context_size: int, batch_size: int = 16
) -> None:
    """Find out before any training whether `read_heldout` will have text enough.

    Raises:
        ValueError: it will not.
    """
    _token_batches(_heldout_store(model, hooks, dataset, context_size, "cpu", batch_size), 1)


def _heldout_store(
    model: Any,
    hooks: Hooks,
    dataset: Text,
    context_size: int,
    device: str,
    batch_size: int,
    autocast: bool = False,
) -> ActivationsStore:
    return activations_store(
        model,
        dataset,
        hooks,
        context_size=context_size,
        batch_size=batch_size * context_size,
        lm_batch_size=batch_size,
        device=device,
        autocast_lm=autocast,
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
        raise ValueError(
            f"the held-out text is too short: it has fewer than {store.store_batch_size_prompts} "
            f"sequences of {store.context_size} tokens"
        )
    return batches


# Texts, each by itself


@dataclass(frozen=True)
class TextActivations:
    """What a language model computes for the ordinary tokens of some texts; on the CPU.

    One language-model pass serves any number of layers. 1,200 texts of 128 tokens at one hook
    of width 576 are 350 MB in float32.
    """

    at: dict[str, Float[Tensor, "tokens d"]]
    """Activations by hook name, in the model's dtype."""
    text: Int[Tensor, "tokens"]
    """Which text each token is of."""
    n_texts: int


@torch.no_grad()
def text_activations(
    model: Any,
    texts: Sequence[str],
    hooks: Iterable[str],
    *,
    context_size: int = 128,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> TextActivations:
    """Run the model on the texts, no further than the last hook.

    Args:
        texts: each read by itself, after a BOS token; special tokens are left out.
        hooks: names of hooks whose activations are [batch, pos, d].
        context_size: tokens of a text that are read, BOS included.
        lm_batch_size: texts per pass of the language model.
        autocast: run the language model in bfloat16 where that is safe.

    Raises:
        ValueError: the model has no such hook, or a text has no ordinary token.
    """
    check(Count, n_texts=len(texts), context_size=context_size, lm_batch_size=lm_batch_size)
    hooks = [*dict.fromkeys(hooks)]
    tokens = [tokenize(model, text, context_size) for text in tqdm(texts, desc="Tokenizing")]
    special = special_tokens(model)
    counts = torch.stack([(~torch.isin(of_text, special)).sum() for of_text in tokens])
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"text {empty} has no ordinary token: {texts[empty]!r}")
    text = torch.arange(len(texts)).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    at: dict[str, Tensor] = {}
    for batch, acts in read_texts(
        model, tokens, hooks, lm_batch_size=lm_batch_size, autocast=autocast
    ):
        for hook in hooks:
            if hook not in at:
                at[hook] = torch.empty(len(text), acts[hook].shape[-1], dtype=acts[hook].dtype)
            of_texts = acts[hook].cpu().split(counts[batch].tolist())
            for i, of_text in zip(batch, of_texts, strict=True):
                at[hook][starts[i] : starts[i] + counts[i]] = of_text
    return TextActivations(at, text, len(texts))


def tokenize(model: Any, text: str, context_size: int) -> Int[Tensor, "pos"]:
    """BOS and the text after it, cut to context_size tokens; on the CPU."""
    return model.to_tokens(text, prepend_bos=True, move_to_device=False)[0, :context_size]


@torch.no_grad()
def read_texts(
    model: Any,
    tokens: Sequence[Int[Tensor, "pos"]],
    hooks: Sequence[str],
    *,
    lm_batch_size: int = 32,
    autocast: bool = False,
) -> Iterator[tuple[Int[Tensor, "batch"], dict[str, Float[Tensor, "tokens d"]]]]:
    """Run the model on tokenized texts, no further than the last hook, the longest first.

    Yields:
        For each pass of the model: which texts it read, and by hook the activations of their
        ordinary tokens, one text after the other, on the model's device.

    Raises:
        ValueError: the model has no such hook.
    """
    restore_hook_names(model)
    special = special_tokens(model)
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
    # Texts of one length together: little padding, which goes to the right, where no causal
    # model sees it.
    order = torch.tensor([len(of_text) for of_text in tokens]).argsort(descending=True, stable=True)
    for batch in tqdm(order.split(lm_batch_size), desc="Reading the texts"):
        padded = pad_sequence(
            [tokens[i] for i in batch.tolist()], True, padding_value=int(special[0])
        )
        device = torch.device(model.cfg.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            _, cache = model.run_with_cache(
                padded.to(device),
                names_filter=list(hooks),
                stop_at_layer=None if None in stops else max(filter(None, stops)),
                prepend_bos=False,
            )
        if missing := [hook for hook in hooks if hook not in cache]:
            raise ValueError(f"the model has no hook {missing[0]!r}")
        ordinary = ~torch.isin(padded, special).to(device)
        yield batch, {hook: cache[hook][ordinary] for hook in hooks}
