"""Batches of many layers: in SAELens' order, whoever asks, from whatever batch on."""

from __future__ import annotations

import weakref
from itertools import islice

import pytest
import torch
from datasets import Dataset

from mxd_lens.data.activations import Reader, activations_store
from mxd_lens.data.stream import N_SAMPLE, Part, Stream
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks

from ..helpers import STORE, open_reader, same

PARTS = [Part(0, 5), Part(1, 5), Part(1, 7)]


@pytest.fixture
def sites(tiny_bridge) -> list[Site]:
    return [Site.at(tiny_bridge, layer) for layer in (0, 1)]


def some(stream: Stream, n: int) -> list[dict[Part, torch.Tensor]]:
    return list(islice(stream, n))


def test_batches_are_saelens_own(sites, documents):
    store = activations_store(sites, documents, **STORE)
    torch.manual_seed(5)
    expected = list(islice(store.get_multi_hook_data_loader(), 60))
    for batch, by_hook in zip(Stream(open_reader(sites, documents), PARTS), expected, strict=False):
        for site in sites:
            same(batch[Part(site.layer, 5)], torch.cat([by_hook[h] for h in site.hooks], dim=-1))


def test_a_layer_alone_has_the_batches_that_it_has_in_company(sites, documents):
    together = some(Stream(open_reader(sites, documents), PARTS), 60)
    for part in PARTS:
        alone = Stream(open_reader([sites[part.layer]], documents), [part])
        for batch, of_all in zip(some(alone, 60), together, strict=True):
            same(batch[part], of_all[part])


def test_seeds_order_the_same_rows_each_in_its_way(sites, documents):
    batches = some(Stream(open_reader(sites, documents), PARTS), 20)
    one, other = (torch.cat([batch[Part(1, seed)] for batch in batches]) for seed in (5, 7))
    assert not torch.equal(one, other)
    shared = (torch.cdist(one, other) < 1e-3).any(dim=1).float().mean()
    assert shared > 0.5


@pytest.mark.parametrize("first", [1, 30, 59])
def test_from_any_batch_on_with_few_passes(sites, documents, first, monkeypatch):
    n_passes = []
    read = Reader._run
    monkeypatch.setattr(Reader, "_run", lambda *a: n_passes.append(1) or read(*a))
    whole = some(Stream(open_reader(sites, documents), PARTS), 120)[first:]
    of_whole = len(n_passes)
    resumed = Stream(open_reader(sites, documents), PARTS, first)
    for batch, expected in zip(some(resumed, len(whole)), whole, strict=True):
        for part in PARTS:
            same(batch[part], expected[part])
    assert len(n_passes) - of_whole <= of_whole


def test_far_on_only_what_is_in_the_buffer_is_read(sites, documents, monkeypatch):
    n_passes = []
    read = Reader._run
    monkeypatch.setattr(Reader, "_run", lambda *a: n_passes.append(1) or read(*a))
    some(Stream(open_reader(sites[:1], documents), PARTS[:1], first=1000), 1)
    assert len(n_passes) < 150  # of 1,150 that come before


def test_the_sample_is_the_batches_to_come(sites, documents):
    stream = Stream(open_reader(sites, documents), PARTS)
    samples = [stream.sample(part) for part in PARTS]
    batches = some(stream, N_SAMPLE)
    for part, sample in zip(PARTS, samples, strict=True):
        same(sample, torch.cat([batch[part] for batch in batches]))


def test_parts_of_a_batch_make_it_up(sites, documents):
    parts = [Part(1, 5), *(Part(1, 5, i, 3) for i in range(3))]
    for batch in some(Stream(open_reader(sites, documents), parts), 5):
        shares = [batch[part] for part in parts[1:]]
        assert sum(map(len, shares)) == len(batch[parts[0]])
        for i, share in enumerate(shares):
            same(share, batch[parts[0]][i::3])


def test_it_leaves_the_global_randomness_alone(sites, documents):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    some(Stream(open_reader(sites, documents), PARTS), 20)
    same(torch.rand(4), expected)


def test_a_text_of_less_than_a_pass_is_read_again_and_again(sites):
    text = Dataset.from_dict({"text": ["the cat sat on the mat and ran after a dog"] * 3})
    some(Stream(open_reader(sites, text), PARTS[:1]), 3)


def test_a_rank_reads_its_share_and_gets_all_of_its_layers(sites, documents, monkeypatch):
    """Two ranks as two threads would be: what they exchange is looked at."""
    sent: dict[int, list] = {}

    def exchange(self, parts, n_from_each):
        sent.setdefault(self.rank, []).append(parts)
        return [torch.zeros(n_from_each) for _ in range(self.world)]

    monkeypatch.setattr(Ranks, "exchange", exchange)
    monkeypatch.setattr(Ranks, "largest", lambda self, value: value)
    for rank in range(2):
        reader = open_reader(sites, documents, [[0], [1]], Ranks(rank, 2))
        list(islice(reader.read(reader.passes()), 4))
    alone = open_reader(sites, documents)
    for number, one in enumerate(islice(alone.read(alone.passes()), 4)):
        for layer in (0, 1):
            same(sent[number % 2][number // 2][layer], one.pairs[layer].flatten())


def test_what_has_been_read_is_kept_no_longer_than_it_waits(sites, documents, monkeypatch):
    read, pairs = Reader._run, []

    def run(self, one):
        found = read(self, one)
        pairs.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(Reader, "_run", run)
    stream = Stream(open_reader(sites, documents), PARTS)
    some(stream, 60)
    assert len(pairs) > 60 and sum(ref() is not None for ref in pairs) <= 2
