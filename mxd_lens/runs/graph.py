"""The graph of one prompt, through the layers of a folder."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from simple_parsing import field as argument

from mxd_lens.analysis.graphs.export import circuit_tracer_json
from mxd_lens.analysis.graphs.graph import Graph, attribute
from mxd_lens.analysis.graphs.interventions import WHERE, measure, predict, rank_correlation
from mxd_lens.analysis.graphs.local import LocalModel
from mxd_lens.analysis.graphs.prune import Pruned, prune
from mxd_lens.fields import Count, Index, Name, PathStr, config
from mxd_lens.files import write_json
from mxd_lens.runs.claims import check_sources
from mxd_lens.runs.config import TrainConfig
from mxd_lens.runs.replacement import Choice, chosen_runs
from mxd_lens.runs.results import Ablation, Ablations, Experts, load_layer, read, write

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
"""Shares of all influence that the graph's file and page keep, circuit-tracer's."""


@config
class GraphConfig(Choice):
    """Trace what a model says next back through its experts, as a graph.

    Example: mxd-lens graph runs/all --prompt "The capital of France is" --target " Paris"
    """

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train` or `compare`: a layer for every MLP that is to be traced
    through."""
    prompt: Name
    """Text whose next token is explained."""
    target: Name | None = None
    """That token, with its space; by default the likeliest ones, up to ten."""
    against: Name | None = None
    """Explain the target's logit less this token's."""
    max_nodes: Count = 4096
    """Most active experts that become nodes, the most influential ones."""
    ablations: Index = 0
    """So many of the most influential experts are ablated, each by itself, to see whether what the
    graph predicts comes true."""

    @property
    def slug(self) -> str:
        """The graph's name: the prompt's beginning, and a digest of all that was asked."""
        asked = [self.prompt, self.target, self.against, *self.chosen.values()]
        digest = hashlib.sha256(json.dumps([*asked, self.max_nodes]).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-")
        return f"{words or 'prompt'}-{digest}"


@dataclass
class Traced:
    """What the command has made."""

    path: Path
    """``graph-<slug>.json`` in the folder, as circuit-tracer writes it."""
    runs: list[TrainConfig]
    graph: Graph
    pruned: Pruned
    seconds: float
    ablations: Ablations | None


def run_graph(cfg: GraphConfig) -> Traced:
    """Trace a prompt back, and write ``graph-<slug>.json`` and, of ablations,
    ``ablations-<slug>.json``.

    Raises:
        ValueError: no such layers, several for one MLP, layers of another model; see `attribute`.
    """
    runs = chosen_runs(cfg.run, **cfg.chosen)
    model = runs[0].load_model()
    check_sources(runs, model)
    layers = {run.layer: load_layer(run.layer_path, run.device) for run in runs}
    tokens = model.to_tokens(cfg.prompt, prepend_bos=True, truncate=False)[0]
    begun = perf_counter()
    graph, local = attribute(
        model, layers, tokens, cfg.target, cfg.against, max_nodes=cfg.max_nodes
    )
    pruned = prune(graph, NODE_THRESHOLD, EDGE_THRESHOLD)
    seconds = perf_counter() - begun
    path = Path(cfg.run) / f"graph-{cfg.slug}.json"
    value = circuit_tracer_json(
        graph,
        pruned,
        slug=cfg.slug,
        scan=runs[0].model,
        prompt=cfg.prompt,
        n_vocab=len(local.logits),
        node_threshold=NODE_THRESHOLD,
        names=_names(runs),
    )
    write_json(path, value, indent=None)
    ablations = ablate(graph, local, pruned, cfg.ablations) if cfg.ablations else None
    if ablations is not None:
        write(path.with_name(f"ablations-{cfg.slug}.json"), ablations, indent=2)
    return Traced(path, runs, graph, pruned, seconds, ablations)


def ablate(
    graph: Graph, local: LocalModel, pruned: Pruned, n: int, factor: float = 0.0
) -> Ablations:
    """The n most influential experts ablated, or scaled, each by itself: the first target's
    change."""
    nodes = pruned.influence[: graph.n_units].argsort()[:n].tolist()
    edits = [{node: factor} for node in nodes]
    changes: dict[str, Any] = {"predicted": predict(graph, edits)[:, 0]}
    changes |= {where: measure(graph, local, edits, where)[:, 0] for where in WHERE}
    rows = [
        Ablation(
            layer=int(graph.layer[node]),
            unit=int(graph.unit[node]),
            position=int(graph.position[node]),
            **{name: float(change[i]) for name, change in changes.items()},
        )
        for i, node in enumerate(nodes)
    ]
    predicted = changes.pop("predicted")
    ranks = {where: rank_correlation(predicted, change) for where, change in changes.items()}
    return Ablations(target=graph.targets.names[0], rank_correlation=ranks, rows=rows)


def _names(runs: list[TrainConfig]) -> dict[tuple[int, int], str]:
    """Of experts that have been described."""
    files = [(run.layer, read(Path(run.output) / "experts.json", Experts)) for run in runs]
    return {
        (layer, expert.id): expert.name
        for layer, file in files
        if file is not None
        for expert in file.experts
    }
