"""Do experts write what they fire on? Mean agreement of some random experts of each layer, by its
own write directions and, of an MxD, by regression on so many tokens of activations::

    python -m tests.benchmarks.bench_agreement runs/frontier/*-k32-seed0 --regress 16384 65536
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap

from mxd_lens import Site
from mxd_lens.analysis.experts.contexts import pick_contexts
from mxd_lens.analysis.experts.corpus import N_TOP, read_corpus, read_firings
from mxd_lens.analysis.experts.effects import logit_effects
from mxd_lens.data.reading import read_heldout
from mxd_lens.layers import layer_of
from mxd_lens.layers.mxd import MxD
from mxd_lens.runs.analyse import layer_sample
from mxd_lens.runs.config import read_config
from mxd_lens.runs.results import load_layer

STRENGTH = 2.0
"""Of the effects, see `mxd-lens experts`."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--n_experts", type=int, default=1500)
    parser.add_argument("--n_tokens", type=int, default=100_000)
    parser.add_argument("--regress", nargs="*", type=int, default=[])
    options = parser.parse_args()
    model = None
    print("| layer | directions | agreement | 95% interval | above 99% |\n|---|---|---|---|---|")
    for folder in options.runs:
        run = read_config(folder)
        model = model or run.load_model()
        sae = load_layer(run.layer_path, run.device)
        site, layer = Site.of(model, sae), layer_of(sae)
        x, y_norm = layer_sample(model, sae, run)
        every = torch.arange(sae.cfg.d_sae, device=sae.device)
        directions = {"its own": layer.steering_directions(every, x)}
        train = run.documents()[0]
        if isinstance(sae, MxD):
            for n in options.regress:
                read = read_heldout(site, train, n_tokens=n, **run.reading_heldout)
                inputs = torch.cat([pair[site.hook_in] for pair in read.pairs])[:n]
                directions[f"regression, {n:,} tokens"] = sae.regress(inputs)
        corpus = read_corpus(site, train, options.n_tokens, run.context_size)
        firings = read_firings(site, sae, corpus, autocast=run.autocast)
        top = pick_contexts(firings, corpus)[0][:, :N_TOP]
        n = min(options.n_experts, len(firings.live))
        chosen = np.sort(np.random.default_rng(1).choice(len(firings.live), n, replace=False))
        ids = torch.from_numpy(firings.live[chosen]).to(sae.device)
        for name, rows in directions.items():
            effect = STRENGTH * y_norm * F.normalize(rows[ids], dim=-1)
            found = logit_effects(model, site.hook_out, effect, top[chosen], firings, corpus)[2]
            interval = bootstrap((found,), np.mean).confidence_interval
            spread = f"{interval.low:.3f} to {interval.high:.3f}"
            above = np.mean(np.array(found) > 0.99)
            print(f"| {run} | {name} | {np.mean(found):.3f} | {spread} | {above:.1%} |", flush=True)


if __name__ == "__main__":
    main()
