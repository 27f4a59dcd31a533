"""Which learning rate suits each architecture: the search behind each `default_lr`.

    make search [ARCHITECTURES="dense molt"]

SmolLM2-135M, layer 6, Wikipedia, k = 32, a third of the comparison's tokens. Layers are judged on
training documents that come after those they were trained on; the documents of the final
comparison are not touched. Prints a table, a row at a time; finished runs are kept and reused.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from sae_lens import SAE

from mxd_lens import CompareConfig, Site, bfloat16_is_fast, load_model, train
from mxd_lens.data.cache import stored_pairs
from mxd_lens.layers import layer_of
from mxd_lens.runs.train import fill_activations, of_layer

LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
SEARCH = CompareConfig(
    output="runs/search", training_tokens=409_600, k=[32], autocast=bfloat16_is_fast()
)
N_VALIDATION = 40_960


@torch.no_grad()
def measure(sae: SAE, validation: torch.Tensor, d_in: int) -> tuple[float, float | None]:
    """(fraction of variance unexplained, share of units that fire)"""
    layer = layer_of(sae)
    errors, fired = [], torch.zeros(sae.cfg.d_sae)
    for batch in validation.split(2048):
        x, y = batch[:, :d_in], batch[:, d_in:]
        read = x if layer.reads_input else y
        errors.append((sae(read) - y).square().sum(-1))
        if layer.has_experts:
            fired += layer.codes(read).firings()[1].bincount(minlength=len(fired))
    variance = (validation[:, d_in:] - validation[:, d_in:].mean(0)).square().sum()
    alive = (fired > 0).float().mean().item() if layer.has_experts else None
    return (torch.cat(errors).sum() / variance).item(), alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=SEARCH.architectures)
    search = replace(SEARCH, architectures=parser.parse_args().architectures)
    model = load_model(SEARCH.model, SEARCH.model_class, SEARCH.device)
    site = Site.at(model, int(SEARCH.layers[0]))
    activations = str(SEARCH.kept_activations)
    n_tokens = SEARCH.training_tokens + N_VALIDATION
    fill_activations(replace(SEARCH, training_tokens=n_tokens), activations, {site.layer: site})
    validation = stored_pairs(of_layer(activations, site.layer), n_tokens)[
        SEARCH.training_tokens :
    ].float()
    print("| architecture | learning rate | FVU | alive |\n|---|---|---|---|", flush=True)
    for run in search.runs():
        for lr in LEARNING_RATES:
            sae = train(replace(run, lr=lr, output=f"{run.output}-lr{lr:g}"), model)
            fvu, alive = measure(sae, validation, model.cfg.d_model)
            shown = "" if alive is None else f"{alive:.0%}"
            print(f"| {run.architecture} | {lr:g} | {fvu:.4f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
