"""The nodes and edges of a graph that matter, found by influence as in circuit-tracer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mxd_lens.analysis.graphs.graph import Graph, influence, normalised


@dataclass
class Pruned:
    """What is kept of a graph."""

    nodes: Bool[Tensor, "n_sources"]
    """Targets are always kept."""
    edges: Bool[Tensor, "n_rows n_sources"]
    influence: Float[Tensor, "n_sources"]
    """Of the most influential nodes down to each one, their share in all influence."""
    through_units: float
    """Share of the targets that comes from embeddings, by way of units, and not from errors
    (circuit-tracer's replacement score)."""
    explained: float
    """Share of what nodes read that is not from errors, weighted by influence (its completeness
    score)."""


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
    """Keep the nodes, and among them the edges, that have these shares of all influence.

    Embeddings are always kept; units and errors only with an edge out, units only with one in.

    Raises:
        ValueError: a threshold is not between 0 and 1.
    """
    for name, share in (("node", node_threshold), ("edge", edge_threshold)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}_threshold must be between 0 and 1, got {share}")
    n, n_pos, weight = graph.n_units, len(graph.tokens), graph.targets.weight
    units = torch.arange(n)
    of_nodes = influence(graph.edges[n:], graph.edges[:n], units, weight)
    nodes = of_nodes >= _smallest(of_nodes, node_threshold)
    nodes[-n_pos:] = True
    kept = graph.edges * nodes
    kept[:n][~nodes[:n]] = 0
    again = influence(kept[n:], kept[:n], units, weight)
    of_edges = normalised(kept) * torch.cat([again[:n], weight.to(again)])[:, None]
    edges = of_edges >= _smallest(of_edges.flatten(), edge_threshold)
    edges &= kept != 0
    while True:
        before = nodes.clone()
        nodes[:-n_pos] &= edges[:, :-n_pos].any(0)
        nodes[:n] &= edges[:n].any(1)
        edges &= nodes
        edges[:n] &= nodes[:n, None]
        if torch.equal(nodes, before):
            break
    order = of_nodes.argsort(descending=True)
    cumulative = torch.zeros_like(of_nodes)
    cumulative[order] = of_nodes[order].cumsum(0) / of_nodes.sum().clamp_min(1e-30)
    errors = slice(n, len(of_nodes) - n_pos)
    from_tokens, from_errors = of_nodes[-n_pos:].sum(), of_nodes[errors].sum()
    out = torch.cat([of_nodes[:n], weight.to(of_nodes)])
    not_errors = 1 - normalised(graph.edges)[:, errors].sum(1)
    return Pruned(
        nodes,
        edges,
        cumulative,
        float(from_tokens / (from_tokens + from_errors).clamp_min(1e-30)),
        float((not_errors * out).sum() / out.sum().clamp_min(1e-30)),
    )


def _smallest(scores: Float[Tensor, "n"], share: float) -> float:
    """The smallest of the largest scores that have this share of the sum; at least the smallest
    that is not zero."""
    ordered = scores[scores > 0].sort(descending=True).values
    if not len(ordered):
        return float("inf")
    enough = int((ordered.cumsum(0) / ordered.sum() < share).sum())
    return float(ordered[min(enough, len(ordered) - 1)])
