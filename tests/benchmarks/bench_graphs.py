"""Attribution graphs of twenty prompts: what they cost, what is kept, and whether they predict what
ablations do, for each architecture in a folder of layers::

    python -m tests.benchmarks.bench_graphs runs/all --k 32 --output graphs.json
"""

from __future__ import annotations

import argparse
import json
import resource
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mxd_lens.analysis.graphs.graph import attribute
from mxd_lens.analysis.graphs.interventions import WHERE
from mxd_lens.analysis.graphs.prune import prune
from mxd_lens.runs.config import finished_runs
from mxd_lens.runs.graph import ablate
from mxd_lens.runs.replacement import chosen_runs
from mxd_lens.runs.results import load_layer

PROMPTS = [
    "The capital of France is",
    "The capital of Japan is",
    "The opposite of hot is",
    "The opposite of small is",
    "Two plus three equals",
    "Monday, Tuesday, Wednesday,",
    "January, February, March,",
    "The color of the sky is",
    "The color of grass is",
    "Cats and",
    "Salt and",
    "She opened the door and",
    "He was born in the city of",
    "The river flows into the",
    "Once upon a",
    "The first president of the United",
    "Water freezes at zero degrees",
    "The largest planet in the solar",
    "In the year 1945 the war",
    "The keys to the cabinet",
]


def trace(model: Any, layers: Any, prompt: str, max_nodes: int, n: int) -> dict[str, Any]:
    """One prompt's graph, and its n most influential experts ablated."""
    tokens = model.to_tokens(prompt, prepend_bos=True)[0]
    begun = perf_counter()
    graph, local = attribute(model, layers, tokens, max_nodes=max_nodes)
    pruned = prune(graph)
    seconds = perf_counter() - begun
    ranks = ablate(graph, local, pruned, n).rank_correlation
    return {
        "prompt": prompt,
        "seconds": seconds,
        "tokens": len(tokens),
        "active": graph.n_active,
        "nodes": int(pruned.nodes.sum()) + len(graph.targets),
        "edges": int(pruned.edges.sum()),
        "incompleteness": graph.incompleteness,
        "through_units": pruned.through_units,
        "explained": pruned.explained,
    } | {f"rank {where}": ranks[where] for where in WHERE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--k", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_nodes", type=int, default=4096)
    parser.add_argument("--ablations", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    options = parser.parse_args()
    found: dict[str, list[Any]] = defaultdict(list)
    model = None
    every = finished_runs(Path(options.folder), one_mlp=False)
    for architecture in sorted({run.architecture for run in every}):
        runs = chosen_runs(options.folder, architecture=architecture, k=options.k)
        model = model or runs[0].load_model()
        layers = {run.layer: load_layer(run.layer_path, run.device) for run in runs}
        for prompt in PROMPTS[: options.prompts]:
            row = trace(model, layers, prompt, options.max_nodes, options.ablations)
            found[architecture].append(row)
            print(architecture, json.dumps(row), flush=True)
            options.output.write_text(json.dumps(found, indent=1))
    for architecture, rows in found.items():
        numbers = [name for name, value in rows[0].items() if not isinstance(value, str)]
        medians = {name: median(row[name] or 0 for row in rows) for name in numbers}
        print(architecture, {name: f"{value:.3g}" for name, value in medians.items()})
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
