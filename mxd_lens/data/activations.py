"""What a language model computes at its MLPs as it reads a text, pass by pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from mxd_lens.data.text import Text
from mxd_lens.data.tokens import Sequences, is_tokenized
from mxd_lens.fields import ContextSize, Count, check
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks

Pairs: TypeAlias = Mapping[int, Float[Tensor, "rows d_pair"]]
"""``cat([mlp_in, mlp_out], -1)`` by layer."""


def activations_store(
    sites: Sequence[Site],
    dataset: Text,
    *,
    context_size: int,
    batch_size: int,
    lm_batch_size: int,
    autocast_lm: bool,
) -> ActivationsStore:
    """SAELens' store over the hooks of some MLPs of one model: a pass of it stops at the last one;
    ValueError for a size out of range, a text of no documents or of special tokens only, or one
    that was tokenized for another model, see `Sequences`."""
    check(ContextSize, context_size=context_size)
    check(Count, batch_size=batch_size, lm_batch_size=lm_batch_size)
    if next(iter(dataset), None) is None:
        raise ValueError("there is no document: give more text or hold out fewer")
    site = sites[0]
    rows: Any = dataset
    if is_tokenized(dataset):
        rows = Sequences(dataset, site.model, context_size)
    hooks = list(dict.fromkeys(hook for one in sites for hook in one.hooks))
    store = ActivationsStore.from_config_multi_hook(
        site.model,
        dataset=rows,
        hook_names=hooks,
        hook_d_ins={hook: int(site.model.cfg.d_model) for hook in hooks},
        context_size=context_size,
        n_batches_in_buffer=-(
            -buffer_size(batch_size, lm_batch_size, context_size) // context_size
        ),
        total_training_tokens=0,
        store_batch_size_prompts=lm_batch_size,
        train_batch_size_tokens=batch_size,
        exclude_special_tokens=site.special,
        device="cpu",  # of the tokens, which are handed to the model's as they are read
        autocast_lm=autocast_lm,
    )
    sequences = store._iterate_tokenized_sequences()  # beside those that the store hands out
    first = next(sequences, None)
    if first is not None and not any(
        site.non_special(tokens).any() for tokens in chain([first], sequences)
    ):
        raise ValueError("the text holds special tokens only: nothing to train or measure on")
    return store


def buffer_size(batch_size: int, lm_batch_size: int, context_size: int) -> int:
    """Tokens in SAELens' mixing buffer. Half of it is served between two shuffles: eight batches
    or LM passes at least."""
    return max(16 * batch_size, 8 * lm_batch_size * context_size)


class NonFiniteActivations(ValueError):
    """The language model produced inf or nan."""


def too_short(store: ActivationsStore, text: str = "text") -> ValueError:
    return ValueError(
        f"the {text} is too short: it has fewer than {store.store_batch_size_prompts} "
        f"sequences of {store.context_size} tokens"
    )


@dataclass(frozen=True)
class Pass:
    """What the language model reads at a time."""

    number: int
    """How many passes came before."""
    tokens: Int[Tensor, "batch pos"]
    """Of each text, special ones in place; on the CPU."""
    kept: Bool[Tensor, "batch*pos"]
    """True at the non-special tokens, which are the pass's rows."""
    pairs: Pairs | None = None
    """At all tokens; None where the model has not read them."""


class Reader:
    """The language model, read by all ranks in turn.

    Args:
        store: of the hooks of all sites.
        needs: by rank, the layers whose pairs it gets.
        dtype: of the pairs.
    """

    def __init__(
        self,
        store: ActivationsStore,
        sites: Sequence[Site],
        needs: Sequence[Sequence[int]],
        *,
        device: str,
        dtype: torch.dtype,
        ranks: Ranks,
    ):
        self.store: ActivationsStore = store
        self.sites: Sequence[Site] = sites
        self.needs: Sequence[Sequence[int]] = needs
        self.ranks: Ranks = ranks
        self.device: str = device
        self.dtype: torch.dtype = dtype
        self.d_pair: int = 2 * int(sites[0].model.cfg.d_model)

    def passes(self) -> Iterator[Pass]:
        """All that is to be read, unread: the text again and again; ValueError if it is too short
        for one pass."""
        for number in count():
            try:
                tokens = self.store.get_batch_tokens(
                    raise_at_epoch_end=True, move_to_model_device=False
                )
            except StopIteration:
                try:
                    tokens = self.store.get_batch_tokens(move_to_model_device=False)
                except StopIteration as error:
                    raise too_short(self.store) from error
            yield Pass(number, tokens, self.sites[0].non_special(tokens).flatten())

    def read(self, passes: Iterable[Pass]) -> Iterator[Pass]:
        """These passes with their pairs: each rank runs the model on every world-th of them.

        Raises:
            NonFiniteActivations: the model produces inf or nan.
        """
        passes = iter(passes)
        while round_ := list(islice(passes, self.ranks.world)):
            mine = round_[min(self.ranks.rank, len(round_) - 1)]
            pairs = self._run(mine)
            wrong = self._not_finite(pairs, mine.kept)
            if self.ranks.largest(len(wrong)):
                wrong = sorted({hook for of_rank in self.ranks.gather(wrong) for hook in of_rank})
                raise NonFiniteActivations(
                    f"inf or nan in the activations at {' and '.join(wrong)}: the language model "
                    "overflows on this text; load it in float32, without autocast"
                )
            if self.ranks.world == 1:
                yield replace(mine, pairs=pairs)
                continue
            nothing = torch.empty(0, dtype=self.dtype, device=self.device)
            parts = [
                torch.cat([nothing, *(pairs[layer].flatten() for layer in layers)])
                for layers in self.needs
            ]
            layers = self.needs[self.ranks.rank]
            received = self.ranks.exchange(parts, len(parts[self.ranks.rank]))
            for one, sent in zip(round_, received[: len(round_)], strict=True):
                of_layers = sent.view(len(layers), one.tokens.numel(), self.d_pair)
                yield replace(one, pairs=dict(zip(layers, of_layers, strict=True)))

    @torch.no_grad()
    def _run(self, one: Pass) -> Pairs:
        acts = self.store.get_multi_hook_activations(self.sites[0].on_model(one.tokens))
        pairs = {}
        for site in self.sites:
            of_hooks = [acts[hook].flatten(0, 1).to(self.device, self.dtype) for hook in site.hooks]
            pairs[site.layer] = torch.cat(of_hooks, dim=-1)
        return pairs

    def _not_finite(self, pairs: Pairs, kept: Bool[Tensor, "batch*pos"]) -> list[str]:
        """Hooks at which a row holds inf or nan; where none does, reads the device once."""
        ends = torch.stack([torch.stack(pair.aminmax()) for pair in pairs.values()])
        if ends.isfinite().all():  # of which both are nan if one number is
            return []
        wrong = []
        for site in self.sites:
            of_hooks = pairs[site.layer][kept.to(self.device)].chunk(2, dim=-1)
            at = zip(site.hooks, of_hooks, strict=True)
            wrong += [hook for hook, of_hook in at if not of_hook.isfinite().all()]
        return wrong
