"""A graph as the JSON that circuit-tracer's page and Neuronpedia read.

The fields are those of circuit-tracer 0.5 (``circuit_tracer/frontend/graph_models.py``): nodes are
named ``layer_unit_position``, an error's unit is -1 and a token's layer is E; targets are in a
layer above all others. What both pages call a feature of a cross-layer transcoder is any unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxd_lens.analysis.graphs.graph import Graph
from mxd_lens.analysis.graphs.prune import Pruned


def circuit_tracer_json(
    graph: Graph,
    pruned: Pruned,
    *,
    slug: str,
    scan: str,
    prompt: str,
    n_vocab: int,
    node_threshold: float,
    names: Mapping[tuple[int, int], str] | None = None,
) -> dict[str, Any]:
    """What of a graph is kept, as circuit-tracer writes it.

    Args:
        slug: the graph's name.
        scan: the model's, by which Neuronpedia finds it.
        n_vocab: tokens of the model; a difference of two has a number beyond those.
        names: of units, by MLP and unit.
    """
    nodes = {i: node for i, node in enumerate(_nodes(graph, pruned, n_vocab, names or {})) if node}
    n, n_sources = graph.n_units, graph.edges.shape[1]
    rows, columns = pruned.edges.nonzero(as_tuple=True)
    weights = graph.edges[rows, columns].tolist()
    links = [
        {
            "source": nodes[source]["node_id"],
            "target": nodes[row if row < n else n_sources + row - n]["node_id"],
            "weight": weight,
        }
        for row, source, weight in zip(rows.tolist(), columns.tolist(), weights, strict=True)
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.words,
        "prompt": prompt,
        "node_threshold": node_threshold,
        "schema_version": 1,
    }
    chosen = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": chosen, "nodes": [*nodes.values()], "links": links}


def _nodes(
    graph: Graph, pruned: Pruned, n_vocab: int, names: Mapping[tuple[int, int], str]
) -> list[dict[str, Any] | None]:
    """Every node, targets last; None for one that is not kept."""
    n_pos = len(graph.tokens)
    units = zip(graph.layer.tolist(), graph.unit.tolist(), graph.position.tolist(), strict=True)
    found: list[dict[str, Any]] = [
        _node(f"{layer}_{unit}_{position}", f"{layer}_{unit}-0", str(layer), position)
        | {
            "feature": _pair(layer, unit),
            "feature_type": "cross layer transcoder",
            "activation": activation,
            "clerp": names.get((layer, unit), ""),
        }
        for (layer, unit, position), activation in zip(
            units, graph.activation.tolist(), strict=True
        )
    ]
    found += [
        _node(f"{layer}_-1_{position}", f"{layer}_-1-{position}", str(layer), position)
        | {"feature": -1, "feature_type": "mlp reconstruction error"}
        for layer in graph.layers
        for position in range(n_pos)
    ]
    found += [
        _node(f"E_{token}_{position}", f"E_{token}-{position}", "E", position)
        | {"feature": position, "feature_type": "embedding"}
        for position, token in enumerate(graph.tokens.tolist())
    ]
    for node, influence in zip(found, pruned.influence.tolist(), strict=True):
        node["influence"] = influence
    kept = [node if k else None for node, k in zip(found, pruned.nodes.tolist(), strict=True)]
    targets, top = graph.targets, graph.layers[-1] + 2
    for i, (name, token, probability) in enumerate(
        zip(targets.names, targets.tokens, targets.probability.tolist(), strict=True)
    ):
        number = token if targets.against is None else n_vocab + i
        kept.append(
            _node(f"{top}_{number}_{n_pos - 1}", f"L_{number}-{n_pos - 1}", str(top), n_pos - 1)
            | {
                "feature": number,
                "feature_type": "logit",
                "token_prob": probability,
                "is_target_logit": i == 0,
                "clerp": f'Output "{name}" (p={probability:.3f})',
            }
        )
    return kept


def _node(node_id: str, js_node_id: str, layer: str, position: int) -> dict[str, Any]:
    """With the defaults of what differs between kinds of nodes."""
    where = {"node_id": node_id, "jsNodeId": js_node_id, "layer": layer, "ctx_idx": position}
    plain = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
    return where | plain | {"clerp": "", "influence": None, "activation": None}


def _pair(x: int, y: int) -> int:
    """Cantor's pairing function."""
    return (x + y) * (x + y + 1) // 2 + y
