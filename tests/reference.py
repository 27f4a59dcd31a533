"""Layers written plainly, as sums over all units: what the fast forms are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Edit = Callable[[str, Tensor], Tensor]

FORMULAS = {
    "relu": lambda v: v.clamp_min(0),
    "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
    "gelu_new": lambda v: v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
}
FORMULAS["gelu_pytorch_tanh"] = FORMULAS["gelu_new"]


def plain_weights(layer: Any) -> dict[str, Tensor]:
    """The parameters with unit norms and a centred gate spelled out."""
    w = dict(layer.named_parameters())
    if getattr(layer, "unit_norm_decoder", False):
        w["W_dec"] = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    if "log_gate_scale" in w:
        columns = w["W_enc"] / w["W_enc"].norm(dim=0, keepdim=True)
        w["W_enc"] = columns * w["log_gate_scale"].exp()
        w["b_enc"] = -(layer.gate_mean @ w["W_enc"])
    return w


def active(layer: Any, pre: Tensor) -> Tensor:
    """Which units are: the k largest of each token or, where the layer has a threshold, those above
    it or, while it learns one, the k per token largest of the batch."""
    pre = pre.detach()
    if hasattr(layer, "threshold"):
        return pre > layer.threshold
    ranked = pre.flatten() if hasattr(layer, "topk_threshold") else pre
    n = layer.cfg.k * pre[..., 0].numel() if ranked.ndim == 1 else layer.cfg.k
    rank = ranked.argsort(dim=-1, descending=True).argsort(dim=-1)
    return (rank < n).view(pre.shape)


def reference(layer: Any, x: Tensor, edit: Edit = lambda _, t: t) -> Tensor:
    """The layer's output; ``edit(hook name, tensor)`` at every step. hook_codes is written out."""
    w = plain_weights(layer)
    x = edit("hook_sae_input", edit("hook_in", x))
    if "W_enc" not in w:
        acts = edit("hook_sae_acts_post", hidden(layer, w, x, edit))
        y = edit("hook_sae_recons", acts @ w["W_dec"] + w["b_dec"])
        return edit("hook_out", edit("hook_sae_output", y))
    pre = torch.einsum("...i,in->...n", x, w["W_enc"]) + w["b_enc"]
    pre = edit("hook_sae_acts_pre", pre)
    acts = edit("hook_codes", pre.clamp_min(0) * active(layer, pre))
    acts = edit("hook_sae_acts_post", acts)
    if "W_read" in w:
        transforms = torch.einsum("nri,nro->nio", w["W_read"], w["W_dec"])
        y = torch.einsum("...n,nio,...i->...o", acts, transforms, x)
    else:
        y = torch.einsum("...n,no->...o", acts, w["W_dec"])
    if "W_shared" in w:
        y = edit("hook_experts", y)
        z = hidden(layer, w, x, edit)
        y = y * edit("hook_shared", torch.einsum("...h,ho->...o", z, w["W_shared"]))
    y = edit("hook_sae_recons", y + w["b_dec"])
    if "W_skip" in w:
        y = y + torch.einsum("...i,oi->...o", x, w["W_skip"])
    return edit("hook_out", edit("hook_sae_output", y))


def hidden(layer: Any, w: dict[str, Tensor], x: Tensor, edit: Edit) -> Tensor:
    """An MLP's or GLU's hidden units."""
    act, linear = FORMULAS[layer.cfg.act_fn], x @ w["W_hidden"] + w["b_hidden"]
    if not layer.cfg.gated:
        return edit("hook_post", act(edit("hook_pre", linear)))
    gate = edit("hook_pre", x @ w["W_hidden_gate"] + w["b_hidden_gate"])
    return edit("hook_post", act(gate) * edit("hook_pre_linear", linear))


def steps(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Every intermediate, by hook name, in order."""
    seen: dict[str, Tensor] = {}
    reference(layer, x, seen.setdefault)
    return seen


def at(hook_name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """An edit of one step."""
    return lambda name, t: change(t) if name == hook_name else t


def plain_loss(y_hat: Tensor, y: Tensor) -> Tensor:
    """``(y_hat - y)^2 / ||y||``, entry by entry."""
    errors = [
        (y_hat[i, j] - y[i, j]) ** 2 / y[i].norm() for i in range(len(y)) for j in range(y.shape[1])
    ]
    return torch.stack(errors).mean()
