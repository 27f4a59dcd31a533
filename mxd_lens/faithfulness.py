"""How faithful a replacement layer is, and whether its experts matter to that.

Faithfulness: what the language model loses when the layer stands in for the MLP. Meaning: what it
loses when the layer keeps its dense part and its gate is ablated. Both are needed: a layer that
copies the MLP's weights is perfectly faithful, and its experts do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data import Text, activations_store, special_tokens
from mxd_lens.mxd import MxD

Experts = Float[Tensor, "tokens d_out"]


@torch.no_grad()
def evaluate(
    model: Any,
    sae: MxD,
    dataset: Text,
    *,
    n_sequences: int = 64,
    n_tokens: int = 100_000,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[dict[str, Any], Float[Tensor, "d_sae"]]:
    """Measure a layer on held-out documents.

    Special tokens pass through the original MLP, count nowhere, and are not predicted.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        dataset: documents in a column ``text``, none of them trained on.
        n_sequences: sequences on which cross-entropies (nats per token) are taken.
        n_tokens: tokens on which the layer alone is measured; fewer if the text is shorter.
        batch_size: sequences per pass of the language model.

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
        - ``ce_mean_gate``: ``a W_dec`` replaced by its mean; ``ce_shuffled_gate``: by another
          token's; ``ce_shuffled_gate_matched``: by another's, scaled to its own norm;
          ``experts_cosine``: mean cosine of ``a W_dec`` to its mean direction.

    Raises:
        ValueError: the text is too short for a single batch, or metadata is missing.
    """
    metadata = sae.cfg.metadata
    if not (metadata.hook_name and metadata.hook_name_out and metadata.context_size):
        raise ValueError("sae.cfg.metadata must say hook_name, hook_name_out and context_size")
    hooks = (str(metadata.hook_name), str(metadata.hook_name_out))
    context_size = int(metadata.context_size)
    store = activations_store(
        model,
        dataset,
        hooks,
        context_size=context_size,
        batch_size=batch_size * context_size,
        lm_batch_size=batch_size,
        device=str(sae.device),
        autocast_lm=False,
    )
    special = special_tokens(model).to(sae.device)
    per_batch = batch_size * context_size
    batches = _token_batches(store, -(-n_tokens // (per_batch - batch_size)))
    alone, mean_experts, density = _measure_layer(sae, store, hooks, batches, special)
    in_model = _measure_in_model(
        model, sae, hooks, batches[: -(-n_sequences // batch_size)], special, mean_experts, seed
    )
    training_tokens = metadata.training_tokens
    row = {
        "architecture": sae.cfg.architecture(),
        "recipe": (metadata.training_architecture_details or {}).get("recipe"),
        "model_name": metadata.model_name,
        "hook_name": hooks[0],
        "hook_name_out": hooks[1],
        "k": sae.cfg.k,
        "d_sae": sae.cfg.d_sae,
        "d_hidden": sae.cfg.d_hidden,
        "n_parameters": sum(p.numel() for p in sae.parameters()),
        "training_tokens": training_tokens,
        **in_model,
        **alone,
    }
    return row, density


def _token_batches(store: ActivationsStore, n: int) -> list[Int[Tensor, "batch pos"]]:
    """At most n batches, each text once."""
    batches: list[Tensor] = []
    for _ in range(n):
        try:
            batches.append(store.get_batch_tokens(raise_at_epoch_end=True))
        except (StopIteration, RuntimeError):
            break
    if not batches:
        raise ValueError(
            f"the held-out text is too short: it has fewer than {store.store_batch_size_prompts} "
            f"sequences of {store.context_size} tokens"
        )
    return batches


def _measure_layer(
    sae: MxD,
    store: ActivationsStore,
    hooks: tuple[str, str],
    batches: list[Tensor],
    special: Tensor,
) -> tuple[dict[str, float | int], Float[Tensor, "d_out"], Float[Tensor, "d_sae"]]:
    """The layer against its target, and its firing; one LM pass that stops at the layer."""
    cfg = sae.cfg
    zeros = {"dtype": torch.float64, "device": sae.device}
    fired = torch.zeros(cfg.d_sae, **zeros)
    total, total_square = torch.zeros(cfg.d_out, **zeros), torch.zeros(cfg.d_out, **zeros)
    squared_error = torch.zeros((), **zeros)
    experts_sum, direction_sum = torch.zeros(cfg.d_out, **zeros), torch.zeros(cfg.d_out, **zeros)
    nmse: list[Tensor] = []
    for tokens in tqdm(batches, desc="Measuring the layer"):
        acts = store.get_multi_hook_activations(tokens)
        keep = ~torch.isin(tokens, special)
        x, y = (acts[hook][keep].float() for hook in hooks)
        y_hat, cache = sae.run_with_cache(x, names_filter=["hook_sae_acts_post", "hook_experts"])
        experts = cache["hook_experts"]
        error = (y_hat - y).square().sum(-1)
        nmse.append(error / y.square().sum(-1))
        squared_error += error.double().sum()
        total += y.double().sum(0)
        total_square += y.double().square().sum(0)
        fired += (cache["hook_sae_acts_post"] > 0).sum(0)
        experts_sum += experts.double().sum(0)
        direction_sum += torch.nn.functional.normalize(experts, dim=-1).double().sum(0)
    per_token = torch.cat(nmse)
    n = len(per_token)
    mean_experts = experts_sum / n
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
            "experts_cosine": (direction_sum @ mean_experts / n / mean_experts.norm()).item(),
            "heldout_tokens": n,
        },
        mean_experts.to(sae.dtype),
        density.float().cpu(),
    )


def _measure_in_model(
    model: Any,
    sae: MxD,
    hooks: tuple[str, str],
    batches: list[Tensor],
    special: Tensor,
    mean_experts: Tensor,
    seed: int,
) -> dict[str, float]:
    """Cross-entropies of the model with the layer, ablated in turn, in place of the MLP."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(experts: Experts) -> Experts:
        return experts[torch.randperm(len(experts), generator=generator).to(experts.device)]

    def shuffled_matched(experts: Experts) -> Experts:
        other = shuffled(experts)
        norms = [e.norm(dim=-1, keepdim=True).clamp_min(1e-12) for e in (experts, other)]
        return other * (norms[0] / norms[1])

    ablations: dict[str, Callable[[Experts], Experts]] = {
        "ce_replaced": lambda experts: experts,
        "ce_mean_gate": lambda experts: mean_experts.expand_as(experts),
        "ce_shuffled_gate": shuffled,
        "ce_shuffled_gate_matched": shuffled_matched,
    }
    sums = dict.fromkeys(
        ["ce_original", *ablations, "ce_zero_ablation", "ce_replaced_all_positions", "kl"], 0.0
    )
    n = 0
    progress = tqdm(total=len(batches) * (len(sums) - 1), desc="Measuring the model")
    for tokens in batches:
        ordinary = ~torch.isin(tokens, special)
        predicted = ordinary[:, 1:]

        def cross_entropy(logits: Tensor, tokens=tokens, predicted=predicted) -> float:
            progress.update()
            targets = tokens[:, 1:][predicted]
            logits = logits[:, :-1][predicted]
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()

        def run(at_ordinary: Tensor, ordinary=ordinary, tokens=tokens) -> Tensor:
            def replace(y: Tensor, hook: Any) -> Tensor:
                y = y.clone()
                y[ordinary] = at_ordinary.to(y.dtype)
                return y

            return model.run_with_hooks(tokens, fwd_hooks=[(hooks[1], replace)])

        logits, cache = model.run_with_cache(tokens, names_filter=list(hooks), prepend_bos=False)
        x = cache[hooks[0]]
        sums["ce_original"] += cross_entropy(logits)
        n += int(predicted.sum())
        for name, ablate in ablations.items():
            y_hat = sae.run_with_hooks(
                x[ordinary],
                fwd_hooks=[("hook_experts", lambda experts, hook, ablate=ablate: ablate(experts))],
            )
            replaced = run(y_hat)
            sums[name] += cross_entropy(replaced)
            if name == "ce_replaced":
                sums["kl"] += _kl(logits[:, :-1][predicted], replaced[:, :-1][predicted])
        sums["ce_zero_ablation"] += cross_entropy(
            run(x.new_zeros(int(ordinary.sum()), sae.cfg.d_out))
        )
        everywhere = model.run_with_hooks(
            tokens, fwd_hooks=[(hooks[1], lambda y, hook, x=x: sae(x))]
        )
        sums["ce_replaced_all_positions"] += cross_entropy(everywhere)
    progress.close()
    ce = {name: value / n for name, value in sums.items()}
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
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total
