"""Many layers in place of their MLPs at once: what the model loses, and how errors grow with depth.

Each layer reads what the layers before it have made of the residual stream. Special tokens pass
through the original MLPs, as in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.in_model import cross_entropies, divergences
from mxd_lens.analysis.intervals import interval
from mxd_lens.models.site import Site

Hook = tuple[str, Callable[..., Any]]

PROMPTS = ("The capital of France is", "Once upon a time there was a", "The opposite of hot is")
"""That a model with and without its layers goes on from."""


def sites_of(model: Any, layers: Mapping[int, SAE[Any]]) -> dict[int, Site]:
    """Where layers belong; ValueError for one whose metadata is not of its MLP, see `Site.of`."""
    sites = {number: Site.of(model, sae) for number, sae in sorted(layers.items())}
    for number, site in sites.items():
        if site.layer != number:
            raise ValueError(f"the layer given for MLP {number} was trained at MLP {site.layer}")
    return sites


def hooks_in_place(site: Site, sae: SAE[Any], kept: Bool[Tensor, "batch pos"]) -> Iterator[Hook]:
    """Of a pass of the model with the layer in place of its MLP at these tokens."""
    read: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        read["x"] = x

    def replace(y: Tensor, hook: Any) -> Tensor:
        x, here = read.pop("x", y), kept.to(y.device)
        y = y.clone()
        y[here] = sae(x[here].to(sae.device).float()).to(y)
        return y

    if site.hook_in != site.hook_out:  # an SAE reads the output
        yield site.hook_in, keep
    yield site.hook_out, replace


def spread_evenly(layers: Sequence[int]) -> list[list[int]]:
    """1, 2, 4, ... and all of these layers, evenly spaced over the depth."""
    sizes = [2**i for i in range(len(layers).bit_length()) if 2**i < len(layers)]
    chosen = [[layers[(2 * i + 1) * len(layers) // (2 * n)] for i in range(n)] for n in sizes]
    return [*chosen, list(layers)]


@torch.no_grad()
def evaluate_jointly(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    tokens: Sequence[Int[Tensor, "batch pos"]],
    subsets: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measure layers in place of their MLPs at once.

    Args:
        layers: by MLP; metadata as for `evaluate`.
        tokens: held-out sequences, as `Heldout.in_model`.
        subsets: which of the layers, each time; by default `spread_evenly`'s. The last is what
            ``error`` is of.

    Returns:
        ``ce_original`` and ``ce_tokens``; ``replaced``: for each number of layers, ``layers``,
        ``ce_increase`` and ``kl``, nats per token in float32, with their 95% intervals over
        sequences; ``error``: with the last of them in place, for each block of the model, squared
        distance of the residual stream after it to the original's over its squared norm, mean over
        tokens.

    Raises:
        ValueError: no layers, or see `sites_of`.
    """
    if not layers:
        raise ValueError("there are no layers to put in place")
    sites = sites_of(model, layers)
    subsets = [list(of_n) for of_n in subsets or spread_evenly(sorted(layers))]
    stream = _stream(model)
    sums: dict[str, list[Tensor]] = {}
    errors, n_read = torch.zeros(len(stream), dtype=torch.float64), 0
    with tqdm(total=len(tokens) * (1 + len(subsets)), desc="Measuring together") as progress:
        for batch in tokens:
            kept = sites[subsets[0][0]].non_special(batch)
            predicted = kept[:, 1:].cpu()
            n_read += int(kept.sum())
            original, cache = model.run_with_cache(batch, names_filter=stream, prepend_bos=False)
            progress.update()
            found = {"tokens": predicted, "original": cross_entropies(original, batch)}
            for n, subset in enumerate(subsets):
                hooks = [hook for i in subset for hook in hooks_in_place(sites[i], layers[i], kept)]
                if n + 1 == len(subsets):
                    hooks += [
                        (name, _distance(cache[name], kept, errors[block : block + 1]))
                        for block, name in enumerate(stream)
                    ]
                logits = model.run_with_hooks(batch, fwd_hooks=hooks)
                found[f"ce {n}"] = cross_entropies(logits, batch)
                found[f"kl {n}"] = divergences(original, logits)
                progress.update()
            for name, of_tokens in found.items():
                sums.setdefault(name, []).append((of_tokens * predicted).double().sum(1))
    of_each = {name: torch.cat(parts).numpy() for name, parts in sums.items()}
    n_tokens, before = of_each["tokens"], of_each["original"]
    replaced = []
    for n, subset in enumerate(subsets):
        row: dict[str, Any] = {"layers": subset}
        lost = {"ce_increase": of_each[f"ce {n}"] - before, "kl": of_each[f"kl {n}"]}
        for name, of_sequence in lost.items():
            row[name] = float(of_sequence.sum() / n_tokens.sum())
            row[f"{name}_interval"] = interval(np.divide, of_sequence, n_tokens)
        replaced.append(row)
    return {
        "ce_original": float(before.sum() / n_tokens.sum()),
        "ce_tokens": int(n_tokens.sum()),
        "replaced": replaced,
        "error": (errors / n_read).tolist(),
    }


@torch.no_grad()
def continuations(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    prompts: Sequence[str] = PROMPTS,
    n_tokens: int = 24,
) -> list[str]:
    """What the model writes after each prompt with layers in place of their MLPs, the likeliest
    token each time; without layers, what the original does. ValueError: see `sites_of`."""
    sites = sites_of(model, layers)
    written = []
    for prompt in prompts:
        tokens = model.to_tokens(prompt)
        n_prompt = tokens.shape[1]
        for _ in range(n_tokens):
            hooks = [
                hook
                for number, site in sites.items()
                for hook in hooks_in_place(site, layers[number], site.non_special(tokens))
            ]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1).to(tokens)], dim=1)
        written.append(model.tokenizer.decode(tokens[0, n_prompt:]))
    return written


def _stream(model: Any) -> list[str]:
    """Hooks of the residual stream after each block."""
    for end in ("hook_out", "hook_resid_post"):  # of a bridge, of a HookedTransformer
        names = [f"blocks.{n}.{end}" for n in range(int(model.cfg.n_layers))]
        if all(name in model.hook_dict for name in names):
            return names
    raise ValueError("the model has no hooks of the residual stream after its blocks")


def _distance(
    original: Float[Tensor, "batch pos d"],
    kept: Bool[Tensor, "batch pos"],
    total: Float[Tensor, "1"],
) -> Callable[..., None]:
    """A hook that adds up the squared distance to the original, over its squared norm."""

    def measure(stream: Tensor, hook: Any) -> None:
        here = kept.to(stream.device)
        before = original.to(stream.device)[here].float()
        error = (stream[here].float() - before).square().sum(-1) / before.square().sum(-1)
        total.add_(error.sum().cpu())

    return measure
