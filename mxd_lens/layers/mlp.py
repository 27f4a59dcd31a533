"""The MLP that a layer replaces: its shape, and how to read its weights from a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@torch.no_grad()
def read_mlp(mlp: nn.Module) -> dict[str, Any]:
    """Weights of a HookedTransformer's or TransformerBridge's MLP.

    Returns:
        W_in, b_in, W_out, b_dec, act_fn and, for a GLU, W_gate and b_gate.

    Raises:
        ValueError: the module is neither an MLP nor a GLU, or has an unknown activation.
    """
    try:
        W_in, W_out = mlp.W_in, mlp.W_out
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(mlp).__name__} is neither an MLP nor a GLU: it has no W_in and W_out"
        ) from error
    if not isinstance(W_in, Tensor) or not isinstance(W_out, Tensor) or W_in.ndim != 2:
        raise ValueError(f"{type(mlp).__name__} has no single dense hidden layer to read")
    bridged = not hasattr(mlp, "cfg")
    act_fn = _bridged_act_fn(mlp) if bridged else getattr(mlp.cfg, "act_fn", None)
    act_fn = {"gelu_fast": "gelu_new", "swish": "silu"}.get(str(act_fn), act_fn)
    if act_fn not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act_fn!r}; known: {', '.join(ACTIVATIONS)}")

    def bias(name: str, like: Tensor) -> Tensor:
        value = getattr(mlp, name, None)
        return like.new_zeros(like.shape[1]) if value is None else value

    weights = {
        "W_in": W_in,
        "b_in": bias("b_in", W_in),
        "W_out": W_out,
        "b_dec": bias("b_out", W_out),
        "act_fn": act_fn,
    }
    W_gate = getattr(mlp, "W_gate", None)
    if W_gate is not None:
        weights |= {"W_gate": W_gate, "b_gate": bias("b_gate", W_gate)}
        if not bridged:  # TransformerLens adds a GLU's b_in after the product
            weights["b_dec"] = weights["b_dec"] + weights["b_in"] @ W_out
            weights["b_in"] = torch.zeros_like(weights["b_in"])
    return weights


def _bridged_act_fn(mlp: Any) -> str | None:
    """The activation's name in a Hugging Face MLP: by its class, or else by the config."""
    for attribute in ("act_fn", "act", "activation_fn"):
        act = getattr(mlp.original_component, attribute, None)
        for name, entry in ACT2CLS.items():
            cls, kwargs = entry if isinstance(entry, tuple) else (entry, {})
            if type(act) is cls and not kwargs:
                return name
    for attribute in ("activation_function", "hidden_activation", "hidden_act", "act_fn"):
        if (name := getattr(mlp.config, attribute, None)) is not None:
            return name
    return None


@dataclass(frozen=True)
class MLPShape:
    """The MLP that is to be replaced."""

    d_in: int
    d_out: int
    d_hidden: int
    act_fn: str
    gated: bool

    @classmethod
    def of(cls, mlp_weights: dict[str, Any]) -> MLPShape:
        """From `read_mlp`'s answer."""
        d_in, d_hidden = mlp_weights["W_in"].shape
        d_out = mlp_weights["W_out"].shape[1]
        return cls(d_in, d_out, d_hidden, mlp_weights["act_fn"], "W_gate" in mlp_weights)
