"""What a language model loses, token by token, with a layer in place of an MLP: as it is, with its
gate ablated, without any layer, and with an exact copy of the MLP."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.intervals import interval
from mxd_lens.analysis.jacobian import Function
from mxd_lens.data.reading import Heldout
from mxd_lens.layers.layer import Layer
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site
from mxd_lens.models.splice import get_mlp

Sparse = Float[Tensor, "tokens d_out"]
PerToken = Float[Tensor, "sequences pos"]

GATES = ("ce_mean_gate", "ce_shuffled_gate", "ce_shuffled_gate_matched")
"""Ablations of the sparse term: held at its mean; another token's; another's, scaled to its own
norm."""

SHARED = ("ce_zero_ablation", "ce_floor", "kl_floor")
"""Without the MLP, and with an exact copy of it."""

FREQUENCY_EDGES = (0, 100, 1_000, 10_000, 1_000_000)
"""Of a token, per million tokens of the held-out text."""
POSITION_EDGES = (0, 8, 32, 128, 512, 2048, 1 << 20)
"""Of a token in its sequence."""


class InModel:
    """Losses at each position of a `Heldout`'s sequences before a non-special token; in nats, in
    float32 whatever the model's own precision.

    Args:
        mean_sparse: what `GATES` hold the sparse term at; None of a layer without experts.
        seed: of the shuffles.

    Raises:
        ValueError: there is no such position.
    """

    def __init__(
        self,
        layer: Layer,
        site: Site,
        heldout: Heldout,
        mean_sparse: Float[Tensor, "d_out"] | None,
        seed: int = 0,
    ):
        self.layer: Layer = layer
        self.site: Site = site
        self.heldout: Heldout = heldout
        self._ablated: dict[str, Function] = {}
        if mean_sparse is not None:
            self._ablated = ablated(layer, mean_sparse, torch.Generator().manual_seed(seed))
        self._measures_shared = not heldout.shared
        mlp = get_mlp(site.model, site.layer)
        self._copy = MxD.from_mlp(mlp) if self._measures_shared else None
        n = 3 + len(GATES) * layer.has_experts + 2 * self._measures_shared
        self._progress = tqdm(total=len(heldout.in_model) * n, desc="Measuring the model")
        with self._progress:
            batches = [self._measure(tokens) for tokens in heldout.in_model]
        of_tokens = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        shared = [name for name in of_tokens if name in SHARED]
        heldout.shared.update({name: of_tokens[name] for name in shared})
        self.of_tokens: dict[str, PerToken] = of_tokens | heldout.shared
        tokens = torch.cat(heldout.in_model).cpu()
        kept = site.non_special(tokens)
        self.tokens: Int[Tensor, "sequences pos"] = tokens[:, :-1]
        self.counted: Bool[Tensor, "sequences pos"] = kept[:, 1:]
        self.read: Bool[Tensor, "sequences pos"] = kept[:, :-1]
        if not self.counted.any():
            raise ValueError(f"the first {heldout.n_sequences} sequences hold special tokens only")

    def _measure(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, PerToken]:
        """Of a batch, by name."""
        model, site, layer, sae = self.site.model, self.site, self.layer, self.layer.sae
        kept = site.non_special(tokens)
        predicted = kept[:, 1:].cpu()

        def run(where: Any, at_where: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
            def replace(y: Tensor, hook: Any) -> Tensor:
                y = y.clone()
                y[where if where is ... else where.to(y.device)] = at_where.to(y.device, y.dtype)
                return y

            return model.run_with_hooks(tokens, fwd_hooks=[(site.hook_out, replace)])

        def ce(logits: Tensor) -> PerToken:
            self._progress.update()
            return cross_entropies(logits, tokens) * predicted

        def kl(logits: Tensor) -> PerToken:
            return divergences(original, logits) * predicted

        original, cache = model.run_with_cache(
            tokens, names_filter=[*site.hooks, site.mlp_in], prepend_bos=False
        )
        x, y = (cache[hook].to(sae.device).float() for hook in site.hooks)
        here = kept.to(sae.device)
        y_hat = sae(x)
        replaced = run(kept, y_hat[here])
        found = {
            "ce_original": ce(original),
            "ce_replaced": ce(replaced),
            "kl": kl(replaced),
            "ce_replaced_all_positions": ce(run(..., y_hat)),
            "nmse": ((y_hat - y).square().sum(-1) / y.square().sum(-1))[:, :-1].cpu() * predicted,
        }
        if layer.has_experts:
            for name, function in self._ablated.items():
                found[name] = ce(run(kept, function(x[here])))
        if self._copy is not None:
            found["ce_zero_ablation"] = ce(run(kept, torch.zeros_like(y[here])))
            of_mlp = cache[site.mlp_in]
            exact = run(kept, self._copy(of_mlp[kept.to(of_mlp.device)].to(self._copy.device)))
            found |= {"ce_floor": ce(exact), "kl_floor": kl(exact)}
        return found

    def row(self) -> dict[str, Any]:
        """Means over tokens, what follows from them, their intervals, and the sums of each
        sequence, see `evaluate`."""
        n = int(self.counted.sum())
        ce: dict[str, Any] = {
            name: of_token.double().sum().item() / n
            for name, of_token in self.of_tokens.items()
            if name != "nmse"
        }
        for name in () if self.layer.has_experts else GATES:
            ce[name] = None
        increase = ce["ce_replaced"] - ce["ce_original"]
        lost = ce["ce_zero_ablation"] - ce["ce_original"]
        sequences = {
            name: self.of_tokens[name].double().sum(1).numpy()
            for name in ("ce_original", "ce_replaced", "ce_mean_gate", "ce_zero_ablation", "kl")
            if name in self.of_tokens
        } | {"tokens": self.counted.sum(1).numpy()}
        drawn = [sequences[name] for name in ("ce_replaced", "ce_original", "tokens")]
        share = share_interval = None
        if self.layer.has_experts:
            share = (ce["ce_mean_gate"] - ce["ce_replaced"]) / lost
            names = ("ce_mean_gate", "ce_replaced", "ce_zero_ablation", "ce_original")
            share_interval = interval(
                lambda mean, replaced, zero, original: (mean - replaced) / (zero - original),
                *(sequences[name] for name in names),
            )
        return {
            **ce,
            "ce_increase": increase,
            "ce_increase_interval": interval(lambda a, b, n: (a - b) / n, *drawn),
            "kl_interval": interval(lambda kl, n: kl / n, sequences["kl"], sequences["tokens"]),
            "ce_recovered": 1 - increase / lost,
            "ce_floor": ce["ce_floor"] - ce["ce_original"],
            "share": share,
            "share_interval": share_interval,
            "ce_tokens": n,
            "by_frequency": self._by(self._frequency(), FREQUENCY_EDGES),
            "by_position": self._by(
                torch.arange(self.tokens.shape[1]).expand_as(self.tokens), POSITION_EDGES
            ),
            "sequences": {name: of_each.tolist() for name, of_each in sequences.items()},
        }

    def _frequency(self) -> PerToken:
        """Of each token among a million of the held-out text's non-special ones."""
        every = torch.cat([batch.flatten() for batch in self.heldout.tokens]).cpu()
        counts = every[self.site.non_special(every)].bincount(minlength=int(every.max()) + 1)
        return counts[self.tokens] * (1e6 / max(1, int(counts.sum())))

    def _by(self, value: Tensor, edges: tuple[int, ...]) -> list[dict[str, Any]]:
        """Means over the tokens whose value is from one edge on and below the next."""
        bins = []
        for low, high in pairwise(edges):
            here = self.counted & self.read & (value >= low) & (value < high)
            if n := int(here.sum()):
                mean = {name: v[here].double().mean().item() for name, v in self.of_tokens.items()}
                gate = mean.get("ce_mean_gate")
                bins.append(
                    {
                        "low": low,
                        "high": high,
                        "tokens": n,
                        "nmse": mean["nmse"],
                        "ce_increase": mean["ce_replaced"] - mean["ce_original"],
                        "gate_at_mean": None if gate is None else gate - mean["ce_replaced"],
                        "mlp_removed": mean["ce_zero_ablation"] - mean["ce_original"],
                    }
                )
        return bins


def ablated(
    layer: Layer, mean_sparse: Float[Tensor, "d_out"], generator: torch.Generator
) -> dict[str, Function]:
    """The layer with its sparse term ablated, by each name of `GATES`.

    Args:
        mean_sparse: the sparse term's mean over tokens.
        generator: of the shuffles.
    """

    def at_mean(sparse: Sparse) -> Sparse:
        return mean_sparse.expand_as(sparse)

    def shuffled(sparse: Sparse) -> Sparse:
        return sparse[torch.randperm(len(sparse), generator=generator).to(sparse.device)]

    def shuffled_matched(sparse: Sparse) -> Sparse:
        other = shuffled(sparse)
        norms = [s.norm(dim=-1, keepdim=True).clamp_min(1e-12) for s in (sparse, other)]
        return other * (norms[0] / norms[1])

    def of_layer(ablate: Callable[[Sparse], Sparse]) -> Function:
        edits = [(layer.sparse_hook, lambda sparse, hook: ablate(sparse))]
        return lambda x: layer.sae.run_with_hooks(x, fwd_hooks=edits)

    ablations = (at_mean, shuffled, shuffled_matched)
    return {name: of_layer(ablate) for name, ablate in zip(GATES, ablations, strict=True)}


def cross_entropies(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_before"]:
    """Of each token but a text's first, in nats, in float32; on the CPU."""
    losses = [
        F.cross_entropy(of_text[:-1].float(), target.to(logits.device), reduction="none").cpu()
        for of_text, target in zip(logits, tokens[:, 1:], strict=True)
    ]
    return torch.stack(losses)


def divergences(
    original: Float[Tensor, "batch pos d_vocab"], logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch pos_before"]:
    """KL of the original's prediction of each such token to another's, likewise."""
    losses = []
    for p, q in zip(original, logits, strict=True):
        p, q = (of_text[:-1].float().log_softmax(-1) for of_text in (p, q))
        losses.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu())
    return torch.stack(losses)
