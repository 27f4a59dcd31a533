"""Why a gate matters more on one text than on another: what holding it at a mean costs, by whose
mean it is, by how often a token occurs in the run's own text, and as it would if each token cost
what it does there; and how much the sparse term varies::

    python -m tests.benchmarks.bench_other_text runs/frontier/*-k32-seed0 \\
        --dataset demo:state-of-the-union

The other text is read as it comes and, where its documents are longer than a sequence, also as one
passage from the middle of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mxd_lens import Site, load_text
from mxd_lens.analysis.alone import Alone
from mxd_lens.analysis.in_model import FREQUENCY_EDGES, GATES, ablated, cross_entropies
from mxd_lens.analysis.intervals import interval
from mxd_lens.data.reading import Heldout, read_heldout
from mxd_lens.layers import layer_of
from mxd_lens.layers.layer import Layer
from mxd_lens.runs.config import read_config
from mxd_lens.runs.results import load_layer

SEEN = 5
PASSAGE = 700
"""Characters: more than a sequence of 128 tokens has."""


class Reading:
    """A text as the model reads it; the losses of what is put in an MLP's place."""

    def __init__(self, site: Site, heldout: Heldout):
        self.site: Site = site
        self.heldout: Heldout = heldout
        self.tokens: Tensor = torch.cat(heldout.in_model)
        kept = site.non_special(self.tokens)
        self.counted: Tensor = kept[:, 1:]
        self.both: Tensor = kept[:, :-1] & kept[:, 1:]
        self.read: Tensor = self.tokens[:, :-1][self.both]
        self.original: Tensor = self.losses(None)
        self.removed: Tensor = self.losses(torch.zeros_like)

    def counts(self) -> Tensor:
        """Of each token id in a million of the text."""
        every = torch.cat([batch.flatten() for batch in self.heldout.tokens])
        counts = every[self.site.non_special(every)].bincount(minlength=self.site.model.cfg.d_vocab)
        return counts * (1e6 / counts.sum())

    def losses(self, function: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[sequences, pos]; function: of the inputs of one sequence's non-special tokens."""
        found, model, site = [], self.site.model, self.site
        for tokens in self.heldout.in_model:
            kept, read = site.non_special(tokens), {}

            def keep(x: Tensor, hook: Any, read: dict[str, Tensor] = read) -> None:
                read["x"] = x

            def replace(
                y: Tensor, hook: Any, read: dict[str, Tensor] = read, kept: Tensor = kept
            ) -> Tensor:
                if function is None:
                    return y
                y = y.clone()
                for i, here in enumerate(kept):
                    y[i, here] = function(read["x"][i, here])
                return y

            logits = model.run_with_hooks(
                tokens, fwd_hooks=[(site.hook_in, keep), (site.hook_out, replace)]
            )
            found.append(cross_entropies(logits, tokens))
        return torch.cat(found).double() * self.counted


def at_own_mean(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The sparse term held at its mean over the sequence."""
    edit = [(layer.sparse_hook, lambda sparse, hook: sparse.mean(0).expand_as(sparse))]
    return lambda x: layer.sae.run_with_hooks(x, fwd_hooks=edit)


Costs = tuple[Tensor, Tensor]
"""Tokens that are read, and what holding the gate costs at each."""


def expected(own: Costs, read: Tensor, rarity: Tensor) -> float:
    """Mean cost on another text's tokens, if each cost what it does on its own text, or where it is
    not there `SEEN` times what those about as frequent do."""
    tokens, costs = own
    edges = torch.tensor(FREQUENCY_EDGES[1:-1])
    bins = torch.bucketize(rarity, edges, right=True)
    of_bin = mean_by(bins[tokens], costs, len(FREQUENCY_EDGES) - 1)
    seen = tokens.bincount(minlength=len(rarity)) >= SEEN
    of_token = torch.where(seen, mean_by(tokens, costs, len(rarity)), of_bin[bins])
    return float(of_token[read].mean())


def mean_by(group: Tensor, values: Tensor, n: int) -> Tensor:
    counts = group.bincount(minlength=n).clamp_min(1)
    return group.bincount(weights=values, minlength=n) / counts


def costliest(model: Any, costs: Costs, n: int = 12) -> list[dict[str, Any]]:
    """Tokens with the largest sums."""
    tokens, of_each = costs
    sums = tokens.bincount(weights=of_each)
    return [
        {
            "token": model.to_string(token[None]),
            "tokens": int((tokens == token).sum()),
            "gate": float(of_each[tokens == token].mean()),
        }
        for token in sums.argsort(descending=True)[:n]
        if (tokens == token).any()
    ]


def measure(
    layer: Layer, reading: Reading, means: dict[str, Tensor], rarity: Tensor
) -> tuple[dict[str, Any], Tensor, Costs]:
    """Of a layer on a text: plain numbers, its mean sparse term there, what holding it there
    costs."""
    alone, square = Alone(layer), 0.0
    for pair in reading.heldout.pairs:
        x, y = (pair[hook] for hook in reading.site.hooks)
        alone.add(x, y)
        square += float(layer.run_with_codes(x)[2].double().square().sum())
    own = alone.mean_sparse
    density = alone.density
    assert own is not None and density is not None
    fired = density.double() / density.sum()
    replaced = reading.losses(layer.sae)
    sums = [loss.sum(1).numpy() for loss in (replaced, reading.original, reading.removed)]
    tokens = reading.counted.sum(1).numpy()
    n = int(tokens.sum())
    row: dict[str, Any] = {
        "ce_original": float(sums[1].sum() / n),
        "ce_increase": float((sums[0] - sums[1]).sum() / n),
        "ce_increase_interval": interval(lambda a, b, n: (a - b) / n, *sums[:2], tokens),
        "removed": float((sums[2] - sums[1]).sum() / n),
        "fvu": alone.row()["fvu"],
        "alive": alone.row()["alive_fraction"],
        "effective_experts": float(torch.special.entr(fired).sum().exp()),
        "varies": 1 - float(own.double().square().sum()) * alone.n_tokens / square,
    }
    held = {name: next(iter(ablated(layer, mean, _rng()).values())) for name, mean in means.items()}
    held |= {"this text": ablated(layer, own, _rng())[GATES[0]], "sequence": at_own_mean(layer)}
    frequency = rarity[reading.read]
    losses = {name: reading.losses(function) for name, function in held.items()}
    of_each = (losses["this text"] - replaced)[reading.both]
    for name, loss in losses.items():
        sums_held = loss.sum(1).numpy()
        row[f"held at {name}"] = {
            "gate": float((sums_held - sums[0]).sum() / n),
            "share": float((sums_held - sums[0]).sum() / (sums[2] - sums[1]).sum()),
            "share_interval": interval(
                lambda held, a, b, zero: (held - a) / (zero - b), sums_held, *sums
            ),
        }
    removed = (reading.removed - reading.original)[reading.both]
    row["by_frequency"] = [
        {
            "low": low,
            "tokens": int(here.sum()),
            "gate": float(of_each[here].mean()),
            "removed": float(removed[here].mean()),
        }
        for low, high in pairwise(FREQUENCY_EDGES)
        if (here := (frequency >= low) & (frequency < high)).any()
    ]
    costs = reading.read, of_each
    return row | {"by_token": costliest(reading.site.model, costs)}, own, costs


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dataset", default="demo:state-of-the-union")
    parser.add_argument("--n_sequences", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("other-text.json"))
    options = parser.parse_args()
    first = read_config(options.runs[0])
    model = first.load_model()
    site = Site.at(model, first.layer)
    own, other = first.documents()[1], load_text(options.dataset)
    middles = [text[len(text) // 2 :][:PASSAGE] for text in other["text"]]
    texts = {
        "own": own,
        "other": other,
        "other, passages": Dataset.from_dict({"text": middles}),
    }
    readings = {
        name: Reading(
            site, read_heldout(site, text, n_sequences=options.n_sequences, **first.reading_heldout)
        )
        for name, text in texts.items()
    }
    rarity = readings["own"].counts()
    rows = []
    for folder in options.runs:
        run = read_config(folder)
        layer = layer_of(load_layer(run.layer_path, run.device))
        means: dict[str, Tensor] = {}
        own_costs = None
        for name, reading in readings.items():
            row, mean, costs = measure(layer, reading, means, rarity)
            means, own_costs = means or {"its own text": mean}, own_costs or costs
            row |= {
                "gate": float(costs[1].mean()),
                "gate_expected": expected(own_costs, reading.read, rarity),
            }
            rows.append({"layer": str(run), "text": name} | row)
            print(json.dumps(rows[-1]), flush=True)
            options.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
