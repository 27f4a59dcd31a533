"""Which learning rate suits each architecture: the search behind `mxd_lens.runs.config.BEST_LR`.

    make search

SmolLM2-135M, layer 6, Wikipedia, k = 32, a third of the comparison's tokens. Layers are judged on
training documents that come after those they were trained on; the documents of the final
comparison are not touched. Prints a table, a row at a time; finished runs are kept and reused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from sae_lens import SAE

from mxd_lens import CompareConfig, load_model, train
from mxd_lens.data.activations import stored_pairs
from mxd_lens.models.site import hooks_of
from mxd_lens.runs.train import fill_activations

LEARNING_RATES = [1e-3, 3e-3, 1e-2, 3e-2]
SEARCH = CompareConfig(output="runs/search", training_tokens=409_600, k=[32], autocast=True)
N_VALIDATION = 40_960


@torch.no_grad()
def measure(sae: SAE, validation: torch.Tensor, d_in: int) -> tuple[float, float]:
    """(fraction of variance unexplained, share of units that fire)"""
    hook_in, hook_out = hooks_of(sae)
    errors, fired = [], torch.zeros(sae.cfg.d_sae)
    for batch in validation.split(2048):
        x, y = batch[:, :d_in], batch[:, d_in:]
        y_hat, cache = sae.run_with_cache(
            y if hook_in == hook_out else x, names_filter="hook_sae_acts_post"
        )
        errors.append((y_hat - y).square().sum(-1))
        fired += (cache["hook_sae_acts_post"] > 0).sum(0)
    variance = (validation[:, d_in:] - validation[:, d_in:].mean(0)).square().sum()
    return (torch.cat(errors).sum() / variance).item(), (fired > 0).float().mean().item()


def main() -> None:
    model = load_model(SEARCH.model, SEARCH.model_class, SEARCH.device)
    activations = Path(SEARCH.output) / "activations"
    n_tokens = SEARCH.training_tokens + N_VALIDATION
    fill_activations(replace(SEARCH, training_tokens=n_tokens), activations, model)
    validation = stored_pairs(activations, n_tokens)[SEARCH.training_tokens :].float()
    print("| architecture | learning rate | FVU | alive |\n|---|---|---|---|", flush=True)
    for (name, _, _), run in SEARCH.runs().items():
        for lr in LEARNING_RATES:
            sae = train(replace(run, lr=lr, output=f"{run.output}-lr{lr:g}"), model)
            fvu, alive = measure(sae, validation, model.cfg.d_model)
            print(f"| {name} | {lr:g} | {fvu:.4f} | {alive:.0%} |", flush=True)


if __name__ == "__main__":
    main()
