"""Training batches of any number of MLPs, from one pass of the language model over the text.

In which order tokens come is SAELens' mixing buffer's to say. It is asked with places in a buffer
instead of activations, which makes the order one of text and seed alone: the same for one layer as
for many, on one process as on several, from the first batch as from any other. A run that resumes
reads again what is in the buffer at that batch, and nothing that came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.training.mixing_buffer import mixing_buffer
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.activations import Pass, Reader


class Part(NamedTuple):
    """Which rows of which batches a run trains on."""

    layer: int
    seed: int
    """Of the batches' order."""
    part: int = 0
    """Which rows of each batch: every parts-th from this one on."""
    parts: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Its rows of a batch."""
        return rows[self.part :: self.parts]


N_SAMPLE = 8
"""Batches that a layer starts from: no more than are served between two shuffles."""


class Stream(Iterator[dict[Part, Float[Tensor, "batch d_pair"]]]):
    """Batches without end of all that this rank trains on.

    Args:
        parts: what it trains on.
        first: the batch to begin with.
        seeds: those of all ranks, which read the same passes; by default the parts'.

    Raises:
        ValueError: the text has too few tokens for a single pass.
        NonFiniteActivations: the model produces inf or nan; what came before was handed out.
    """

    def __init__(
        self,
        reader: Reader,
        parts: Sequence[Part],
        first: int = 0,
        seeds: Iterable[int] | None = None,
    ):
        self.reader: Reader = reader
        self.parts: Sequence[Part] = parts
        self._skipping = True
        seeds = sorted({part.seed for part in parts} if seeds is None else set(seeds))
        layers = {seed: sorted({p.layer for p in parts if p.seed == seed}) for seed in seeds}
        self._source = self._passes()
        self._waiting: dict[int, deque[Pass]] = {seed: deque() for seed in layers}
        self.mixers: dict[int, Mixer] = {
            seed: Mixer(self._passes_for(seed), reader, layers[seed], seed) for seed in layers
        }
        for _ in tqdm(range(first), desc="Passing by what has been seen", disable=not first):
            for mixer in self.mixers.values():
                mixer.next_slots()
        unread = {one.number: one for mixer in self.mixers.values() for one in mixer.unread()}
        for one in reader.read(unread[number] for number in sorted(unread)):
            for mixer in self.mixers.values():
                mixer.fill(one)
        self._skipping = False

    def __next__(self) -> dict[Part, Float[Tensor, "batch d_pair"]]:
        slots = {seed: mixer.next_slots() for seed, mixer in self.mixers.items()}
        return {
            part: self.mixers[part.seed].rows(part.layer, part.of(slots[part.seed]))
            for part in self.parts
        }

    def sample(self, part: Part) -> Float[Tensor, "tokens d_pair"]:
        """The next `N_SAMPLE` batches, which are still to come, whole and as one."""
        mixer = self.mixers[part.seed]
        return mixer.rows(part.layer, torch.cat(mixer.peek(N_SAMPLE)))

    def _passes_for(self, seed: int) -> Iterator[Pass]:
        """Every pass; it waits for no longer than until each seed's mixer has taken it."""
        while True:  # itertools.tee would keep the last 57
            if not self._waiting[seed]:
                one = next(self._source)
                for waiting in self._waiting.values():
                    waiting.append(one)
                del one
            yield self._waiting[seed].popleft()

    def _passes(self) -> Iterator[Pass]:
        passes = self.reader.passes()
        while self._skipping:
            yield next(passes)
        yield from self.reader.read(passes)


class Mixer:
    """Which rows of which passes make up each batch of one seed, and the buffer they wait in.

    Args:
        passes: without end; those that are not read have to be filled in later.
        layers: whose rows are kept.
    """

    def __init__(self, passes: Iterator[Pass], reader: Reader, layers: Sequence[int], seed: int):
        store = reader.store
        size = store.n_batches_in_buffer * store.training_context_size
        capacity = size + store.store_batch_size_prompts * store.training_context_size
        shape = capacity, reader.d_pair
        self.buffers: dict[int, Float[Tensor, "capacity d_pair"]] = {
            layer: torch.empty(shape, dtype=reader.dtype, device=reader.device) for layer in layers
        }
        self._passes, self._device = passes, reader.device
        self._unread: dict[int, Pass] = {}
        self._origin = torch.full((capacity, 2), -1)  # number of the pass and row in it, by slot
        self._free = torch.arange(capacity)
        self._n_free = capacity
        self._served = self._free[:0]
        self._ahead: deque[Tensor] = deque()
        self._rng = torch.Generator().manual_seed(seed).get_state()
        self._order = mixing_buffer(size, store.train_batch_size_tokens, self._arrivals())

    def next_slots(self) -> Int[Tensor, "batch"]:
        """Where the next batch is; the slots of the one before are free again."""
        n = len(self._served)
        self._free[self._n_free : self._n_free + n] = self._served
        self._n_free += n
        (self._served,) = self.peek(1)
        self._ahead.popleft()
        return self._served

    def peek(self, n: int) -> list[Int[Tensor, "batch"]]:
        """Where the next n batches are."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng)
            while len(self._ahead) < n:
                self._ahead.append(next(self._order)[:, 0])
            self._rng = torch.get_rng_state()
        return list(islice(self._ahead, n))

    def rows(self, layer: int, slots: Int[Tensor, "n"]) -> Float[Tensor, "n d_pair"]:
        """What is there, in float32."""
        buffer = self.buffers[layer]
        return buffer[slots.to(buffer.device, non_blocking=True)].float()

    def unread(self) -> list[Pass]:
        """Passes with rows in the buffer that the model has not read."""
        live = set(self._origin[self._taken(), 0].tolist())
        self._unread = {number: one for number, one in self._unread.items() if number in live}
        return list(self._unread.values())

    def fill(self, one: Pass) -> None:
        """Put the rows of a pass, now read, where they belong."""
        slots = (self._taken() & (self._origin[:, 0] == one.number)).nonzero()[:, 0]
        self._write(one, slots, self._origin[slots, 1])

    def _taken(self) -> Bool[Tensor, "capacity"]:
        taken = torch.ones(len(self._free), dtype=torch.bool)
        taken[self._free[: self._n_free]] = False
        return taken

    def _arrivals(self) -> Iterator[Int[Tensor, "rows 1"]]:
        for one in self._passes:
            rows = torch.arange(int(one.kept.sum()))
            self._n_free -= len(rows)
            slots = self._free[self._n_free : self._n_free + len(rows)].clone()
            self._origin[slots] = torch.stack([torch.full_like(rows, one.number), rows], dim=1)
            if one.pairs is None:
                self._unread[one.number] = one
                if one.number % 64 == 0:
                    self.unread()  # forgets the others
            else:
                self._write(one, slots, rows)
            yield slots[:, None]

    def _write(self, one: Pass, slots: Int[Tensor, "n"], rows: Int[Tensor, "n"]) -> None:
        assert one.pairs is not None
        tokens = one.kept.nonzero()[rows, 0]
        to, of = torch.stack([slots, tokens]).to(self._device, non_blocking=True)
        for layer, buffer in self.buffers.items():
            buffer[to] = one.pairs[layer][of]
