"""Nodes of a graph scaled or ablated: what the graph predicts, and what happens.

An edit adds ``(factor - 1)`` times what a node writes to the stream, where it writes it: 0 ablates
it, 2 doubles it. What follows from an edit is predicted by the graph and measured in models that
share less and less with it, see `Where`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.graphs.graph import Graph
from mxd_lens.analysis.graphs.local import LocalModel, Stream
from mxd_lens.analysis.joint import Hook

Where = Literal["linear", "errors", "replacement", "original"]
"""The linear model; the layers in place of their MLPs, beside errors that stay as at the prompt;
the layers in place alone; the original model. All but the first have attention, norms and gates
that respond. Special tokens, and MLPs without a layer, are errors in the first two, and MLPs in
the others."""

WHERE: tuple[Where, ...] = ("errors", "replacement", "original")
"""Where an effect can be other than predicted."""

Edit = Mapping[int, float]
"""Factors, by a node's number in the graph."""


def total_effects(graph: Graph) -> Float[Tensor, "n_targets n_sources"]:
    """What each node adds to each target, along all paths.

    A unit whose pre-activation moves by a share of itself, ``edge / activation``, moves all that it
    writes by that share. With A the edges between units, rows divided by their unit's activation,
    and T those into the targets, this is ``T (I - A)^-1``; no power of A is needed beyond the
    number of layers.
    """
    n = graph.n_units
    into_targets, into_units = graph.edges[n:].double(), graph.edges[:n].double()
    shares = into_units / graph.activation.double()[:, None]
    total, step = into_targets.clone(), into_targets
    while step[:, :n].any():
        step = step[:, :n] @ shares
        total += step
    return total


def predict(graph: Graph, edits: Sequence[Edit]) -> Float[Tensor, "n_edits n_targets"]:
    """How much the targets change, by the graph."""
    total = total_effects(graph)
    return torch.stack(
        [
            sum(((factor - 1) * total[:, node] for node, factor in edit.items()), total[:, 0] * 0)
            for edit in edits
        ]
    )


@torch.no_grad()
def measure(
    graph: Graph,
    local: LocalModel,
    edits: Sequence[Edit],
    where: Where,
    *,
    frozen: bool = False,
    batch: int = 32,
) -> Float[Tensor, "n_edits n_targets"]:
    """How much the targets change, in a model.

    Args:
        frozen: hold attention patterns and the scales of norms, as the linear model does.
        batch: edits at a time.

    Raises:
        ValueError: an edit names a node that there is not, or a target.
    """
    sources = torch.cat([graph.source, torch.arange(local.n_units, local.n_sources)])
    factors = torch.ones(1 + len(edits), local.n_sources, dtype=torch.float64)
    for row, edit in enumerate(edits, start=1):
        for node, factor in edit.items():
            if not 0 <= node < len(sources):
                raise ValueError(f"no node {node} to edit: this graph has 0 to {len(sources) - 1}")
            factors[row, sources[node]] = factor
    found = []
    for part in tqdm(factors.split(batch), desc=f"Editing the {where} model", leave=False):
        final = _final(local, part, where, frozen)
        found.append(graph.targets.of(final[:, -1]).double().cpu())
    values = torch.cat(found)
    return values[1:] - values[0]


def _final(
    local: LocalModel, factors: Float[Tensor, "batch n_sources"], where: Where, frozen: bool
) -> Stream:
    """What the unembedding reads."""
    batch = len(factors)
    if where == "linear":
        return local.affine(factors, responding=True)[1]
    stream, written = local.writes(factors - 1)

    def output(number: int, x: Stream, y: Stream) -> Stream:
        s = local.standins[number]
        if where == "errors":
            y = s.error.expand(batch, -1, -1)
        if where != "original" and s.layer is not None:
            of_layer = s.layer.sae(x[:, s.kept].flatten(0, 1).to(s.x)).to(y)
            y = y.clone()
            y[:, s.kept] = of_layer.unflatten(0, (batch, -1))
            if where == "errors":
                y[:, s.kept] += s.error[s.kept]
        return y + written[number]

    hooks: list[Hook] = [local.entering(local.embedded + stream)]
    return local.run([*hooks, *(local.freezing(batch) if frozen else [])], output, batch)[1]


def rank_correlation(predicted: Float[Tensor, "n"], measured: Float[Tensor, "n"]) -> float | None:
    """Spearman's; None where it is undefined."""
    if len(predicted) < 2 or predicted.std() == 0 or measured.std() == 0:
        return None
    return float(spearmanr(predicted, measured)[0])  # type: ignore[arg-type]
