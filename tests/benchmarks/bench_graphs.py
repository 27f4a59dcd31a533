"""Attribution graphs of twenty prompts: what they cost, what is kept, and whether they predict what
ablations do, for each architecture in a folder of layers (--architecture: for one)::

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

Asked = tuple[str, str, str]

PROMPTS: dict[str, list[Asked]] = {
    "agreement": [
        ("The keys to the cabinet", " are", " is"),
        ("The dogs in the garden", " are", " is"),
        ("The man with the red shoes", " is", " are"),
        ("The children who saw the movie", " were", " was"),
        ("The picture of the mountains", " is", " are"),
        ("The teachers at the school", " are", " is"),
        ("The river between the hills", " is", " are"),
    ],
    "induction": [
        ("The code is blue river stone. I repeat: the code is blue river", " stone", " water"),
        ("red, seven, lamp, green; red, seven, lamp,", " green", " blue"),
        ("Mr. Dursley was late. Everyone waited for Mr. D", "urs", "avid"),
        ("one cat two dog three fish one cat two", " dog", " fish"),
        ("When John and Mary went to the store, John gave a drink to", " Mary", " John"),
        ("Mary met Zorblat at noon. Later that day, Mary talked to Z", "orb", "ach"),
    ],
    "fact": [
        ("The capital of France is", " Paris", " London"),
        ("The capital of Japan is", " Tokyo", " Beijing"),
        ("The capital of Italy is", " Rome", " Paris"),
        ("The opposite of hot is", " cold", " warm"),
        ("The first president of the United States was George", " Washington", " Bush"),
        ("The Eiffel Tower is in the city of", " Paris", " London"),
        ("Water is made of hydrogen and", " oxygen", " nitrogen"),
    ],
}
"""A prompt, how it should go on, and another token: SmolLM2 takes the first for the likelier."""


def trace(model: Any, layers: Any, asked: Asked, options: Any) -> dict[str, Any]:
    """The graph of one prompt's logit difference, its most influential experts ablated or scaled,
    and the mean size of what that changes."""
    prompt, target, against = asked
    tokens = model.to_tokens(prompt, prepend_bos=True)[0]
    begun = perf_counter()
    graph, local = attribute(model, layers, tokens, target, against, max_nodes=options.max_nodes)
    pruned = prune(graph)
    seconds = perf_counter() - begun
    ablations = ablate(graph, local, pruned, options.ablations, options.factor)
    sizes = {
        where: sum(abs(getattr(row, where)) for row in ablations.rows) / len(ablations.rows)
        for where in ("predicted", *WHERE)
    }
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
        "change": sizes,
    } | {f"rank {where}": ablations.rank_correlation[where] for where in WHERE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--k", type=int)
    parser.add_argument("--architecture")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_nodes", type=int, default=4096)
    parser.add_argument("--ablations", type=int, default=24)
    parser.add_argument("--factor", type=float, default=0.0, help="0 ablates, 0.99 barely changes")
    parser.add_argument("--prompts", type=int, help="of each kind")
    options = parser.parse_args()
    found: dict[str, list[Any]] = defaultdict(list)
    model = None
    every = finished_runs(Path(options.folder), one_mlp=False)
    every_name = sorted({run.architecture for run in every})
    for architecture in [options.architecture] if options.architecture else every_name:
        runs = chosen_runs(options.folder, architecture=architecture, k=options.k)
        model = model or runs[0].load_model()
        layers = {run.layer: load_layer(run.layer_path, run.device) for run in runs}
        every_prompt = [(kind, p) for kind, of in PROMPTS.items() for p in of[: options.prompts]]
        for kind, asked in every_prompt:
            row = trace(model, layers, asked, options)
            found[architecture].append({"kind": kind} | row)
            print(architecture, json.dumps(row), flush=True)
            options.output.write_text(json.dumps(found, indent=1))
    for architecture, rows in found.items():
        numbers = [name for name, value in rows[0].items() if not isinstance(value, (str, dict))]
        medians = {name: median(row[name] or 0 for row in rows) for name in numbers}
        print(architecture, {name: f"{value:.3g}" for name, value in medians.items()})
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
