"""How faithful a replacement layer is, and whether its experts matter to that.

Faithfulness: what the language model loses when the layer stands in for the MLP. Meaning: what it
loses when the layer keeps its dense part and its gate is ablated. Both are needed: a layer that
copies the MLP's weights is perfectly faithful, and its experts do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.reading import Heldout, read_heldout
from mxd_lens.data.text import Text
from mxd_lens.layers import layer_of
from mxd_lens.layers.layer import Layer
from mxd_lens.models.site import Site

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
) -> tuple[dict[str, Any], Float[Tensor, "d_sae"] | None]:
    """Measure a layer of any architecture on held-out documents.

    Special tokens pass through the original MLP, count nowhere, and are not predicted.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        dataset: documents in a column ``text``, or sequences in ``input_ids``, none of them trained
            on; or what `read_heldout` made of them, where several layers share it.
        n_sequences, n_tokens, batch_size, autocast: as in `read_heldout`.

    Returns:
        The measurements, ready for JSON, and how often each unit fires per token. What a dense
        control lacks is None. Keys:

        - ``ce_original``, ``ce_replaced``, ``ce_zero_ablation``, ``ce_increase``;
          ``ce_recovered``: share of the loss by zero-ablation that the layer wins back;
          ``kl``: original to replaced model, nats per token; ``ce_replaced_all_positions``:
          the layer on special tokens too, as after ``model.blocks[L].mlp = sae``.
        - ``fvu``: summed squared error over summed variance; ``nmse``, ``nmse_median``: squared
          error over squared norm, per token.
        - ``l0``; ``alive_fraction``: experts that fired in ``n_tokens``; ``always_on``: number
          of experts that fire on over half of the tokens.
        - ``ce_mean_gate``: the sparse term (an MxD's ``a W_dec``, otherwise the decoder's
          output) replaced by its mean; ``ce_shuffled_gate``: by another token's;
          ``ce_shuffled_gate_matched``: by another's, scaled to its own norm;
          ``experts_cosine``: mean cosine of the sparse term to its mean direction.

    Raises:
        ValueError: the text is too short for a single batch, metadata is missing, or an unknown
            architecture.
    """
    metadata = sae.cfg.metadata
    layer = layer_of(sae)
    site = Site.of(model, sae)
    if not isinstance(dataset, Heldout):
        if not metadata.context_size:
            raise ValueError("sae.cfg.metadata must say context_size")
        dataset = read_heldout(
            site,
            dataset,
            context_size=int(metadata.context_size),
            device=str(sae.device),
            n_sequences=n_sequences,
            n_tokens=n_tokens,
            batch_size=batch_size,
            autocast=autocast,
        )
    alone, mean_sparse, density = _measure_layer(layer, site, dataset)
    in_model = _measure_in_model(layer, site, dataset, mean_sparse, autocast, seed)
    row = {
        "architecture": metadata.training_architecture or sae.cfg.architecture(),
        "model_name": metadata.model_name,
        "hook_layer": site.layer,
        "hook_name": site.hook_in,
        "hook_name_out": site.hook_out,
        "k": getattr(sae.cfg, "k", None),
        "d_sae": sae.cfg.d_sae,
        "d_hidden": getattr(sae.cfg, "d_hidden", None),
        "n_parameters": sum(p.numel() for p in sae.parameters()),
        "training_tokens": metadata.training_tokens,
        **in_model,
        **alone,
    }
    return row, density


def _measure_layer(
    layer: Layer, site: Site, heldout: Heldout
) -> tuple[dict[str, Any], Float[Tensor, "d_out"] | None, Float[Tensor, "d_sae"] | None]:
    """The layer against its target, and its firing: measurements, mean sparse term, density."""
    sae = layer.sae
    d_out = heldout.pairs[0][site.hook_out].shape[-1]
    zeros: dict[str, Any] = {"dtype": torch.float64, "device": sae.device}
    fired = torch.zeros(sae.cfg.d_sae, **zeros)
    total, total_square = torch.zeros(d_out, **zeros), torch.zeros(d_out, **zeros)
    squared_error = torch.zeros((), **zeros)
    sparse_sum, direction_sum = torch.zeros(d_out, **zeros), torch.zeros(d_out, **zeros)
    nmse: list[Tensor] = []
    for pair in tqdm(heldout.pairs, desc="Measuring the layer"):
        x, y = (pair[hook] for hook in site.hooks)
        if layer.has_experts:
            y_hat, codes, sparse = layer.run_with_codes(x)
            fired += codes.firings()[1].bincount(minlength=len(fired))
            sparse_sum += sparse.double().sum(0)
            direction_sum += F.normalize(sparse, dim=-1).double().sum(0)
        else:
            y_hat = sae(x)
        error = (y_hat - y).square().sum(-1)
        nmse.append(error / y.square().sum(-1))
        squared_error += error.double().sum()
        total += y.double().sum(0)
        total_square += y.double().square().sum(0)
    per_token = torch.cat(nmse)
    n = len(per_token)
    variance = (total_square - total.square() / n).sum()
    measured: dict[str, Any] = {
        "fvu": (squared_error / variance).item(),
        "nmse": per_token.mean().item(),
        "nmse_median": per_token.median().item(),
        "heldout_tokens": n,
    }
    if not layer.has_experts:
        absent = dict.fromkeys(["l0", "alive_fraction", "always_on", "experts_cosine"])
        return measured | absent, None, None
    mean_sparse, density = sparse_sum / n, fired / n
    measured |= {
        "l0": density.sum().item(),
        "alive_fraction": (fired > 0).double().mean().item(),
        "always_on": int((density > 0.5).sum()),
        "experts_cosine": (direction_sum @ mean_sparse / n / mean_sparse.norm()).item(),
    }
    return measured, mean_sparse.to(sae.dtype), density.float().cpu()


def _measure_in_model(
    layer: Layer,
    site: Site,
    heldout: Heldout,
    mean_sparse: Float[Tensor, "d_out"] | None,
    autocast: bool,
    seed: int,
) -> dict[str, float | None]:
    """Cross-entropies of the model with the layer, ablated in turn, in place of the MLP."""
    model, sae = site.model, layer.sae
    generator = torch.Generator().manual_seed(seed)
    batches = heldout.in_model
    lower_precision = torch.autocast(batches[0].device.type, torch.bfloat16, enabled=autocast)

    def shuffled(sparse: Sparse) -> Sparse:
        return sparse[torch.randperm(len(sparse), generator=generator).to(sparse.device)]

    def shuffled_matched(sparse: Sparse) -> Sparse:
        other = shuffled(sparse)
        norms = [s.norm(dim=-1, keepdim=True).clamp_min(1e-12) for s in (sparse, other)]
        return other * (norms[0] / norms[1])

    def at_mean(sparse: Sparse) -> Sparse:
        assert mean_sparse is not None
        return mean_sparse.expand_as(sparse)

    def run(tokens: Tensor, where: Any, at_where: Tensor) -> Tensor:
        def replace(y: Tensor, hook: Any) -> Tensor:
            y = y.clone()
            y[where if where is ... else where.to(y.device)] = at_where.to(y.device, y.dtype)
            return y

        with lower_precision:
            return model.run_with_hooks(tokens, fwd_hooks=[(site.hook_out, replace)])

    def cross_entropy(logits: Tensor, tokens: Tensor, predicted: Tensor) -> float:
        progress.update()
        targets = tokens[:, 1:][predicted]
        logits = logits[:, :-1][predicted].float()
        return F.cross_entropy(logits, targets, reduction="sum").item()

    ablations: dict[str, Callable[[Sparse], Sparse]] = {
        "ce_mean_gate": at_mean,
        "ce_shuffled_gate": shuffled,
        "ce_shuffled_gate_matched": shuffled_matched,
    }
    absent = {} if layer.has_experts else dict.fromkeys(ablations)
    ablations = {} if absent else ablations
    known = dict(heldout.shared)
    names = ["ce_original", "ce_replaced", *ablations, "ce_zero_ablation"]
    sums = dict.fromkeys([*names, "ce_replaced_all_positions", "kl"], 0.0)
    n = 0
    progress = tqdm(total=len(batches) * (len(sums) - 1 - bool(known)), desc="Measuring the model")
    for tokens in batches:
        kept = site.non_special(tokens)
        predicted = kept[:, 1:]
        with lower_precision:
            logits, cache = model.run_with_cache(
                tokens, names_filter=list(site.hooks), prepend_bos=False
            )
        x = cache[site.hook_in].to(sae.device).float()
        of_layer = kept.to(sae.device)
        sums["ce_original"] += cross_entropy(logits, tokens, predicted)
        n += int(predicted.sum())
        replaced = run(tokens, kept, sae(x[of_layer]))
        sums["ce_replaced"] += cross_entropy(replaced, tokens, predicted)
        sums["kl"] += _kl(logits[:, :-1][predicted], replaced[:, :-1][predicted])
        for name, ablate in ablations.items():
            edit = (layer.sparse_hook, lambda sparse, hook, ablate=ablate: ablate(sparse))
            y_hat = sae.run_with_hooks(x[of_layer], fwd_hooks=[edit])
            sums[name] += cross_entropy(run(tokens, kept, y_hat), tokens, predicted)
        if not known:
            y = cache[site.hook_out]
            nothing = run(tokens, kept, torch.zeros_like(y[kept.to(y.device)]))
            sums["ce_zero_ablation"] += cross_entropy(nothing, tokens, predicted)
        everywhere = run(tokens, ..., sae(x))
        sums["ce_replaced_all_positions"] += cross_entropy(everywhere, tokens, predicted)
    progress.close()
    if not n:
        raise ValueError(f"the first {heldout.n_sequences} sequences hold special tokens only")
    ce: dict[str, Any] = {name: value / n for name, value in sums.items()} | known | absent
    heldout.shared["ce_zero_ablation"] = ce["ce_zero_ablation"]
    increase = ce["ce_replaced"] - ce["ce_original"]
    lost = ce["ce_zero_ablation"] - ce["ce_original"]
    return {**ce, "ce_increase": increase, "ce_recovered": 1 - increase / lost, "ce_tokens": n}


def _kl(
    p_logits: Float[Tensor, "tokens d_vocab"], q_logits: Float[Tensor, "tokens d_vocab"]
) -> float:
    """Sum over tokens of KL(p || q), in nats."""
    return sum(
        F.kl_div(
            q.float().log_softmax(-1), p.float().log_softmax(-1), reduction="sum", log_target=True
        ).item()
        for p, q in zip(p_logits.split(512), q_logits.split(512), strict=True)
    )
