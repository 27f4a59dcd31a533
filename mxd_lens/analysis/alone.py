"""A layer against its target, token by token, and how its units fire; no model takes part."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mxd_lens.layers.layer import Layer


class Alone:
    """Sums over tokens that are `add`-ed batch by batch; on the CPU."""

    def __init__(self, layer: Layer):
        self.layer: Layer = layer
        self._sums: dict[str, Tensor] = {}
        self._nmse: list[Tensor] = []

    def _add(self, **of_batch: Tensor) -> None:
        for name, value in of_batch.items():
            value = value.detach().cpu().double()  # not every device has it
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @torch.no_grad()
    def add(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Inputs of the layer and what its output should be, in its dtype, on its device."""
        if self.layer.has_experts:
            y_hat, codes, sparse = self.layer.run_with_codes(x)
            self._add(
                fired=codes.firings()[1].bincount(minlength=self.layer.sae.cfg.d_sae),
                sparse=sparse.sum(0),
                direction=F.normalize(sparse, dim=-1).sum(0),
            )
        else:
            y_hat = self.layer.sae(x)
        error = (y_hat - y).square().sum(-1)
        self._nmse.append((error / y.square().sum(-1)).cpu())
        of_cpu = y.cpu().double()
        self._add(error=error.sum(), total=of_cpu.sum(0), square=of_cpu.square().sum(0))

    @property
    def n_tokens(self) -> int:
        """So far."""
        return sum(len(of_batch) for of_batch in self._nmse)

    @property
    def mean_sparse(self) -> Float[Tensor, "d_out"] | None:
        """Of the sparse term, where the layer is; None of a layer without experts."""
        if not self.layer.has_experts:
            return None
        sae = self.layer.sae
        return (self._sums["sparse"] / self.n_tokens).to(sae.dtype).to(sae.device)

    @property
    def density(self) -> Float[Tensor, "d_sae"] | None:
        """How often each unit fires per token; None of a layer without experts."""
        if not self.layer.has_experts:
            return None
        return (self._sums["fired"] / self.n_tokens).float()

    def row(self) -> dict[str, Any]:
        """Those keys of `evaluate` that need no model: ``fvu``, ``nmse``, ``nmse_median``,
        ``heldout_tokens``, ``l0``, ``alive_fraction``, ``always_on``, ``experts_cosine``."""
        sums, n = self._sums, self.n_tokens
        per_token = torch.cat(self._nmse)
        variance = (sums["square"] - sums["total"].square() / n).sum()
        measured: dict[str, Any] = {
            "fvu": (sums["error"] / variance).item(),
            "nmse": per_token.mean().item(),
            "nmse_median": per_token.median().item(),
            "heldout_tokens": n,
        }
        if not self.layer.has_experts:
            absent = dict.fromkeys(["l0", "alive_fraction", "always_on", "experts_cosine"])
            return measured | absent
        density, mean = sums["fired"] / n, sums["sparse"] / n
        return measured | {
            "l0": density.sum().item(),
            "alive_fraction": (density > 0).double().mean().item(),
            "always_on": int((density > 0.5).sum()),
            "experts_cosine": (sums["direction"] @ mean / n / mean.norm()).item(),
        }
