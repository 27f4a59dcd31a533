"""How faithful a replacement layer is, and whether its experts matter to that.

Faithfulness: what the language model loses when the layer stands in for the MLP. Meaning: what it
loses when the layer keeps its dense part and its gate is ablated. Both are needed: a layer that
copies the MLP's weights is perfectly faithful, and its experts do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.reading import Heldout, read_heldout
from mxd_lens.data.text import Text
from mxd_lens.models.site import Hooks, hooks_of, restore_hook_names
from mxd_lens.models.splice import check_norms

Sparse = Float[Tensor, "tokens d_out"]


@torch.no_grad()
def evaluate(
    model: Any,
    sae: SAE[Any],
    dataset: Text | Heldout,
    *,
    n_sequences: int = 64,
    n_tokens: int = 100_000,
    batch_size: int = 16,
    autocast: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], Float[Tensor, "d_sae"]]:
    """Measure a layer, an MxD, a transcoder or an SAE, on held-out documents.

    Special tokens pass through the original MLP, count nowhere, and are not predicted.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        dataset: documents in a column ``text``, none of them trained on; or what
            `read_heldout` made of them, where several layers share it.
        n_sequences, n_tokens, batch_size, autocast: as in `read_heldout`.

    Returns:
        The measurements, ready for JSON, and how often each expert fires per token. Keys:

        - ``ce_original``, ``ce_replaced``, ``ce_zero_ablation``, ``ce_increase``;
          ``ce_recovered``: share of the loss by zero-ablation that the layer wins back;
          ``kl``: original to replaced model, nats per token; ``ce_replaced_all_positions``:
          the layer on special tokens too, as after ``model.blocks[L].mlp = sae``.
        - ``fvu``: summed squared error over summed variance; ``nmse``, ``nmse_median``: squared
          error over squared norm, per token.
        - ``l0``; ``alive_fraction``: experts that fired in ``n_tokens``; ``always_on``: number
          of experts that fire on over half of the tokens.
        - ``ce_mean_gate``: the sparse part (an MxD's ``a W_dec``, otherwise the decoder's
          output) replaced by its mean; ``ce_shuffled_gate``: by another token's;
          ``ce_shuffled_gate_matched``: by another's, scaled to its own norm;
          ``experts_cosine``: mean cosine of the sparse part to its mean direction.

    Raises:
        ValueError: the text is too short for a single batch, or metadata is missing.
    """
    metadata = sae.cfg.metadata
    hooks = hooks_of(sae)
    check_norms(model, metadata, "this layer")
    sae.setup()  # a model that it was attached to has left its own names on the hook points
    restore_hook_names(model)
    if not isinstance(dataset, Heldout):
        if not metadata.context_size:
            raise ValueError("sae.cfg.metadata must say context_size")
        dataset = read_heldout(
            model,
            hooks,
            dataset,
            context_size=int(metadata.context_size),
            device=str(sae.device),
            n_sequences=n_sequences,
            n_tokens=n_tokens,
            batch_size=batch_size,
            autocast=autocast,
        )
    alone, mean_sparse, density = _measure_layer(sae, hooks, dataset)
    in_model = _measure_in_model(model, sae, hooks, dataset, mean_sparse, autocast, seed)
    row = {
        "architecture": sae.cfg.architecture(),
        "recipe": (metadata.training_architecture_details or {}).get("recipe"),
        "model_name": metadata.model_name,
        "hook_name": hooks[0],
        "hook_name_out": hooks[1],
        "k": getattr(sae.cfg, "k", None),
        "d_sae": sae.cfg.d_sae,
        "d_hidden": getattr(sae.cfg, "d_hidden", None),
        "n_parameters": sum(p.numel() for p in sae.parameters()),
        "training_tokens": metadata.training_tokens,
        **in_model,
        **alone,
    }
    return row, density


def _sparse_hook(sae: SAE[Any]) -> str:
    """Where what the sparse coefficients contribute can be seen and edited."""
    return "hook_experts" if "hook_experts" in sae.hook_dict else "hook_sae_recons"


def _measure_layer(
    sae: SAE[Any], hooks: Hooks, heldout: Heldout
) -> tuple[dict[str, float | int], Float[Tensor, "d_out"], Float[Tensor, "d_sae"]]:
    """The layer against its target, and its firing."""
    d_out = heldout.pairs[0][hooks[1]].shape[-1]
    zeros = {"dtype": torch.float64, "device": sae.device}
    fired = torch.zeros(sae.cfg.d_sae, **zeros)
    total, total_square = torch.zeros(d_out, **zeros), torch.zeros(d_out, **zeros)
    squared_error = torch.zeros((), **zeros)
    sparse_sum, direction_sum = torch.zeros(d_out, **zeros), torch.zeros(d_out, **zeros)
    nmse: list[Tensor] = []
    sparse_hook = _sparse_hook(sae)
    for pair in tqdm(heldout.pairs, desc="Measuring the layer"):
        x, y = (pair[hook] for hook in hooks)
        y_hat, cache = sae.run_with_cache(x, names_filter=["hook_sae_acts_post", sparse_hook])
        sparse = cache[sparse_hook]
        error = (y_hat - y).square().sum(-1)
        nmse.append(error / y.square().sum(-1))
        squared_error += error.double().sum()
        total += y.double().sum(0)
        total_square += y.double().square().sum(0)
        fired += (cache["hook_sae_acts_post"] > 0).sum(0)
        sparse_sum += sparse.double().sum(0)
        direction_sum += torch.nn.functional.normalize(sparse, dim=-1).double().sum(0)
    per_token = torch.cat(nmse)
    n = len(per_token)
    mean_sparse = sparse_sum / n
    density = fired / n
    variance = (total_square - total.square() / n).sum()
    return (
        {
            "fvu": (squared_error / variance).item(),
            "nmse": per_token.mean().item(),
            "nmse_median": per_token.median().item(),
            "l0": density.sum().item(),
            "alive_fraction": (fired > 0).double().mean().item(),
            "always_on": int((density > 0.5).sum()),
            "experts_cosine": (direction_sum @ mean_sparse / n / mean_sparse.norm()).item(),
            "heldout_tokens": n,
        },
        mean_sparse.to(sae.dtype),
        density.float().cpu(),
    )


def _measure_in_model(
    model: Any,
    sae: SAE[Any],
    hooks: Hooks,
    heldout: Heldout,
    mean_sparse: Tensor,
    autocast: bool,
    seed: int,
) -> dict[str, float]:
    """Cross-entropies of the model with the layer, ablated in turn, in place of the MLP."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(sparse: Sparse) -> Sparse:
        return sparse[torch.randperm(len(sparse), generator=generator).to(sparse.device)]

    def shuffled_matched(sparse: Sparse) -> Sparse:
        other = shuffled(sparse)
        norms = [s.norm(dim=-1, keepdim=True).clamp_min(1e-12) for s in (sparse, other)]
        return other * (norms[0] / norms[1])

    ablations: dict[str, Callable[[Sparse], Sparse]] = {
        "ce_replaced": lambda sparse: sparse,
        "ce_mean_gate": lambda sparse: mean_sparse.expand_as(sparse),
        "ce_shuffled_gate": shuffled,
        "ce_shuffled_gate_matched": shuffled_matched,
    }
    known = dict(heldout.shared)
    sums = dict.fromkeys(
        ["ce_original", *ablations, "ce_zero_ablation", "ce_replaced_all_positions", "kl"], 0.0
    )
    n = 0
    batches = heldout.in_model
    progress = tqdm(total=len(batches) * (len(sums) - 1 - bool(known)), desc="Measuring the model")
    lower_precision = (
        torch.autocast(torch.device(sae.device).type, torch.bfloat16) if autocast else nullcontext()
    )
    for tokens in batches:
        ordinary = ~torch.isin(tokens, heldout.special)
        predicted = ordinary[:, 1:]

        def cross_entropy(logits: Tensor, tokens=tokens, predicted=predicted) -> float:
            progress.update()
            targets = tokens[:, 1:][predicted]
            logits = logits[:, :-1][predicted].float()
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()

        def run(at_ordinary: Tensor, ordinary=ordinary, tokens=tokens) -> Tensor:
            def replace(y: Tensor, hook: Any) -> Tensor:
                y = y.clone()
                y[ordinary] = at_ordinary.to(y.dtype)
                return y

            with lower_precision:
                return model.run_with_hooks(tokens, fwd_hooks=[(hooks[1], replace)])

        with lower_precision:
            logits, cache = model.run_with_cache(
                tokens, names_filter=list(hooks), prepend_bos=False
            )
        x = cache[hooks[0]].float()
        sums["ce_original"] += cross_entropy(logits)
        n += int(predicted.sum())
        for name, ablate in ablations.items():
            y_hat = sae.run_with_hooks(
                x[ordinary],
                fwd_hooks=[(_sparse_hook(sae), lambda sparse, hook, ablate=ablate: ablate(sparse))],
            )
            replaced = run(y_hat)
            sums[name] += cross_entropy(replaced)
            if name == "ce_replaced":
                sums["kl"] += _kl(logits[:, :-1][predicted], replaced[:, :-1][predicted])
        if not known:
            nothing = torch.zeros_like(cache[hooks[1]][ordinary])
            sums["ce_zero_ablation"] += cross_entropy(run(nothing))
        y_hat = sae(x)
        with lower_precision:
            everywhere = model.run_with_hooks(
                tokens, fwd_hooks=[(hooks[1], lambda y, hook, y_hat=y_hat: y_hat.to(y.dtype))]
            )
        sums["ce_replaced_all_positions"] += cross_entropy(everywhere)
    progress.close()
    if not n:
        raise ValueError(f"the first {heldout.n_sequences} sequences hold special tokens only")
    ce = {name: value / n for name, value in sums.items()} | known
    heldout.shared["ce_zero_ablation"] = ce["ce_zero_ablation"]
    increase = ce["ce_replaced"] - ce["ce_original"]
    lost = ce["ce_zero_ablation"] - ce["ce_original"]
    return {
        **ce,
        "ce_increase": increase,
        "ce_recovered": 1 - increase / lost,
        "ce_tokens": n,
    }


def _kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """Sum over tokens of KL(p || q), in nats."""
    total = 0.0
    for p, q in zip(p_logits.split(512), q_logits.split(512), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total
