"""What the MxD's auxiliary loss and learning rate buy, and what they cost in faithfulness.

    make search-recipe

SmolLM2-135M, layer 6, Wikipedia, k = 32, the comparison's tokens and activations. Judged on
held-out documents behind those on which the comparison takes cross-entropies, and by probes of
Wikipedia's topics: the comparison reports neither. Finished layers are kept and reused.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from mxd_lens import CompareConfig, Site, bfloat16_is_fast, load_model, train
from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.data.reading import read_heldout, text_activations
from mxd_lens.data.text import split_documents
from mxd_lens.demo.corpora import wikipedia
from mxd_lens.runs.compare import probe_scores

CANDIDATES = [(3e-3, 0.3), (3e-3, 0.0), (1e-2, 0.3), (1e-2, 0.0)]
"""(peak learning rate, aux_loss_coefficient)"""
SEEDS = [0, 1]
COMPARISON = CompareConfig(architectures=["mxd"], k=[32], autocast=bfloat16_is_fast())
FIRST_DOCUMENT = 300
N_TOPICS, N_TEXTS = 6, 200


def topics() -> Dataset:
    """As many training documents of each of Wikipedia's largest topics."""
    documents, _ = split_documents(wikipedia(), COMPARISON.heldout_documents)
    assert isinstance(documents, Dataset)
    counts = Counter(documents["topic"])
    del counts["Uncategorized"]
    rows = documents.to_list()
    return Dataset.from_list(
        [
            row
            for topic, _ in counts.most_common(N_TOPICS)
            for row in [row for row in rows if row["topic"] == topic][:N_TEXTS]
        ]
    )


def main() -> None:
    model = load_model(COMPARISON.model, COMPARISON.model_class, COMPARISON.device)
    site = Site.at(model, int(COMPARISON.layers[0]))
    _, heldout = COMPARISON.documents()
    assert isinstance(heldout, Dataset)
    validation = read_heldout(
        site,
        heldout.select(range(FIRST_DOCUMENT, len(heldout))),
        context_size=COMPARISON.context_size,
        device=COMPARISON.device,
        n_sequences=48,
        n_tokens=40_000,
    )
    labelled = topics()
    activations = text_activations(site, labelled["text"], autocast=COMPARISON.autocast)
    for run in replace(COMPARISON, seeds=SEEDS).runs():
        for lr, coefficient in CANDIDATES:
            candidate = {"lr": lr, "aux_loss_coefficient": coefficient, "seed": run.seed}
            folder = Path(f"runs/search/recipe-lr{lr:g}-aux{coefficient:g}-seed{run.seed}")
            results = folder / "results.json"
            if not results.exists():
                options = json.dumps({"aux_loss_coefficient": coefficient})
                sae = train(replace(run, lr=lr, sae_options=options, output=str(folder)), model)
                row, _ = evaluate(model, sae, validation)
                probes = probe_scores(sae, activations, labelled["topic"])
                results.write_text(json.dumps(candidate | shown(row) | probes, indent=2))
            print(json.dumps(json.loads(results.read_text())), flush=True)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """What decides: faithfulness, live experts, and the increase in cross-entropy by ablations."""
    ablations = ("ce_mean_gate", "ce_shuffled_gate", "ce_shuffled_gate_matched")
    kept = {name: row[name] for name in ("ce_increase", "fvu", "alive_fraction", "always_on")}
    return kept | {name: row[name] - row["ce_original"] for name in ablations}


if __name__ == "__main__":
    main()
