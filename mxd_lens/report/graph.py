"""The page of one prompt's graph: nodes, edges, and what is known of its experts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mxd_lens.files import read_json
from mxd_lens.report import figures
from mxd_lens.report.page import write_page
from mxd_lens.runs.config import TrainConfig
from mxd_lens.runs.results import Ablations, Experts, plain, read

CONTEXTS, BEFORE, AFTER = 6, 24, 12
"""Of each expert, and the tokens around it that are shown."""

KINDS = {
    "cross layer transcoder": "expert",
    "mlp reconstruction error": "error",
    "embedding": "token",
    "logit": "target",
}
"""By circuit-tracer's names."""


def write_graph_page(path: Path, runs: Sequence[TrainConfig]) -> Path:
    """The page beside ``graph-<slug>.json``, this path.

    Args:
        runs: whose layers were traced through; what their ``experts.json`` says is shown.

    Raises:
        ValueError: a file is none of ours.
    """
    graph = read_json(path, dict[str, Any])
    if graph is None:
        raise ValueError(f"there is no {path}")
    metadata, nodes = graph["metadata"], [_node(node) for node in graph["nodes"]]
    number = {node["id"]: i for i, node in enumerate(nodes)}
    links = [[number[e["source"]], number[e["target"]], e["weight"]] for e in graph["links"]]
    kept = {(node["layer"], node["unit"]) for node in nodes if node["kind"] == "expert"}
    experts = {
        f"{run.layer}:{expert['id']}": described
        for run in runs
        for expert, described in _described(run, kept)
    }
    found = read(path.with_name(path.name.replace("graph-", "ablations-", 1)), Ablations)
    ablations = None if found is None else plain(found)
    page = path.with_suffix(".html")
    write_page(
        page,
        "graph.html",
        row={"model_name": metadata["scan"]},
        title=f"What follows “{metadata['prompt']}”",
        n_experts=sum(node["kind"] == "expert" for node in nodes),
        n_links=len(links),
        ablations=ablations,
        figures=[] if ablations is None else [figures.ablations(ablations)],
        where=figures.WHERE,
        data={
            "words": metadata["prompt_tokens"],
            "nodes": nodes,
            "links": links,
            "experts": experts,
            "folders": {run.layer: shlex.quote(run.output) for run in runs},
        },
    )
    return page


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script reads of one of circuit-tracer's nodes."""
    kind = KINDS[node["feature_type"]]
    layer = -1 if kind == "token" else int(node["layer"])
    name = node["clerp"]
    if kind == "target":
        name = name.removeprefix('Output "').rpartition('" (p=')[0]
    return {
        "id": node["node_id"],
        "kind": kind,
        "layer": layer,
        "row": layer,
        "unit": int(node["node_id"].split("_")[1]),
        "position": node["ctx_idx"],
        "name": name,
        "value": node["token_prob"] if kind == "target" else node["activation"],
        "influence": node["influence"],
    }


def _described(
    run: TrainConfig, kept: set[tuple[int, int]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Experts of a layer that are nodes, and what of them is shown."""
    file = read(Path(run.output) / "experts.json", Experts)
    if file is None:
        return []
    found = plain(file)

    def context(at: dict[str, Any]) -> list[Any]:
        words, i = found["texts"][at["text"]], at["position"]
        before, after = words[max(0, i - BEFORE) : i], words[i + 1 : i + 1 + AFTER]
        return ["".join(before), words[i], "".join(after), at["value"]]

    return [
        (
            expert,
            {name: expert[name] for name in ("density", "promoted", "suppressed")}
            | {"contexts": [context(at) for at in expert["contexts"][:CONTEXTS]]},
        )
        for expert in found["experts"]
        if (run.layer, expert["id"]) in kept
    ]
