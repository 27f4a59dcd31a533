"""Why a gate matters more on one text than on another: what holding it at a mean costs, by whose
mean it is, and as it would if each token cost what it does on the run's own text; how many experts
are in use, and how much the sparse term varies::

    python -m tests.benchmarks.bench_other_text runs/frontier/*-k32-seed0 \\
        --dataset demo:state-of-the-union

The other text is read as it comes, and as one passage from the middle of each document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mxd_lens import Site, load_text
from mxd_lens.analysis.alone import Alone
from mxd_lens.analysis.in_model import FREQUENCY_EDGES, InModel, cross_entropies
from mxd_lens.analysis.joint import hooks_in_place
from mxd_lens.data.reading import Heldout, read_heldout
from mxd_lens.layers import layer_of
from mxd_lens.layers.layer import Layer
from mxd_lens.runs.config import read_config
from mxd_lens.runs.results import load_layer

PASSAGE_CHARACTERS = 700  # more than a sequence of 128 tokens has
ENOUGH_TOKENS = 5  # to tell what one costs

Costs = tuple[Tensor, Tensor]
"""Tokens that are read, and what holding the gate costs at each, in nats."""


def measure(
    layer: Layer, heldout: Heldout, mean_elsewhere: Tensor | None
) -> tuple[dict[str, Any], Tensor, Costs]:
    """Of a layer on a text: plain numbers, its mean sparse term there, what holding it there
    costs.

    Args:
        mean_elsewhere: the mean sparse term of the run's own text, if that is another.
    """
    alone, square = Alone(layer), 0.0
    for pair in heldout.pairs:
        x, y = (pair[hook] for hook in heldout.site.hooks)
        alone.add(x, y)
        square += float(layer.run_with_codes(x)[2].double().square().sum())
    mean, density = alone.mean_sparse, alone.density
    if mean is None or density is None:
        raise SystemExit("a layer without experts has no gate to hold")
    found = InModel(layer, heldout.site, heldout, mean)
    row = found.row() | alone.row()
    lost = row["ce_zero_ablation"] - row["ce_original"]
    fired = density.double() / density.sum()

    def share(mean: Tensor | None) -> float:
        n = int(found.counted.sum())
        return (held(layer, heldout, mean) / n - row["ce_replaced"]) / lost

    kept = ("ce_increase", "ce_increase_interval", "fvu", "share", "share_interval", "by_frequency")
    numbers = {name: row[name] for name in kept} | {
        "removed": lost,
        "in_use": float(torch.special.entr(fired).sum().exp()),
        "varies": 1 - float(mean.double().square().sum()) * alone.n_tokens / square,
        "share_at_own_texts_mean": None if mean_elsewhere is None else share(mean_elsewhere),
        "share_at_sequences_mean": share(None),
    }
    here = found.counted & found.read
    costs = (found.of_tokens["ce_mean_gate"] - found.of_tokens["ce_replaced"])[here].double()
    return numbers, mean, (found.tokens[here], costs)


def held(layer: Layer, heldout: Heldout, mean: Tensor | None) -> float:
    """Summed cross-entropy with the sparse term at a mean; None: at that of each sequence."""
    site, total = heldout.site, 0.0
    for tokens in heldout.in_model:
        kept = site.non_special(tokens)
        lengths = kept.sum(1).tolist()

        def at_mean(sparse: Tensor, hook: Any, lengths: list[int] = lengths) -> Tensor:
            if mean is not None:
                return mean.expand_as(sparse)
            return torch.cat([of.mean(0).expand_as(of) for of in sparse.split(lengths)])

        def function(x: Tensor, edit: Any = at_mean) -> Tensor:
            return layer.sae.run_with_hooks(x, fwd_hooks=[(layer.sparse_hook, edit)])

        logits = site.model.run_with_hooks(
            tokens, fwd_hooks=list(hooks_in_place(site, layer.sae, kept, function))
        )
        total += float((cross_entropies(logits, tokens).double() * kept[:, 1:].cpu()).sum())
    return total


def per_million(heldout: Heldout) -> Tensor:
    """How often each token id occurs among the text's non-special ones."""
    every = torch.cat([batch.flatten() for batch in heldout.tokens]).cpu()
    every = every[heldout.site.non_special(every)]
    return every.bincount(minlength=heldout.site.model.cfg.d_vocab) * (1e6 / len(every))


def expected(own: Costs, read: Tensor, frequency: Tensor) -> float:
    """Mean cost on another text's tokens, if each cost what it does on its own text, or where there
    are not enough of it there, what those about as frequent do."""
    tokens, costs = own
    bins = torch.bucketize(frequency, torch.tensor(FREQUENCY_EDGES[1:-1]), right=True)
    enough = tokens.bincount(minlength=len(frequency)) >= ENOUGH_TOKENS
    of_token = means_of_groups(tokens, costs, len(frequency))
    of_bin = means_of_groups(bins[tokens], costs, len(FREQUENCY_EDGES) - 1)
    return float(torch.where(enough, of_token, of_bin[bins])[read].mean())


def means_of_groups(group: Tensor, values: Tensor, n_groups: int) -> Tensor:
    n = group.bincount(minlength=n_groups).clamp_min(1)
    return group.bincount(weights=values, minlength=n_groups) / n


def costliest(model: Any, costs: Costs, n: int = 12) -> list[dict[str, Any]]:
    """Tokens with the largest sums."""
    tokens, of_each = costs
    ids = tokens.unique()
    sums = tokens.bincount(weights=of_each)[ids]
    return [
        {
            "token": model.to_string(token[None]),
            "tokens": int((tokens == token).sum()),
            "gate": float(of_each[tokens == token].mean()),
        }
        for token in ids[sums.argsort(descending=True)[:n]]
    ]


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
    other = load_text(options.dataset)
    middles = [text[len(text) // 2 :][:PASSAGE_CHARACTERS] for text in other["text"]]
    texts = {
        "own": first.documents()[1],
        "other": other,
        "other, passages": Dataset.from_dict({"text": middles}),
    }
    reading = {"n_sequences": options.n_sequences, **first.reading_heldout}
    read = {name: read_heldout(site, text, **reading) for name, text in texts.items()}
    frequency = per_million(read["own"])
    rows = []
    for folder in options.runs:
        run = read_config(folder)
        layer = layer_of(load_layer(run.layer_path, run.device))
        own_mean = own_costs = None
        for name, heldout in read.items():
            numbers, mean, costs = measure(layer, heldout, own_mean)
            own_mean, own_costs = own_mean if own_costs else mean, own_costs or costs
            numbers["gate"] = float(costs[1].mean())
            numbers["gate_expected"] = expected(own_costs, costs[0], frequency)
            numbers["by_token"] = costliest(model, costs)
            rows.append({"layer": str(run), "text": name} | numbers)
            print(json.dumps(rows[-1]), flush=True)
            options.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
