"""The MLP that a layer replaces: its shape and weights, read from a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
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


@dataclass(frozen=True)
class MLPShape:
    """Widths and kind of an MLP or GLU."""

    d_in: int
    d_out: int
    d_hidden: int
    act_fn: str
    gated: bool

    @property
    def n_hidden(self) -> int:
        """Parameters of the hidden units and their decoder as the paper's reference counts them:
        the weights, and d_out output biases."""
        return (self.d_in * (2 if self.gated else 1) + self.d_out) * self.d_hidden + self.d_out


@dataclass(frozen=True)
class MLPWeights:
    """``act(x W_in + b_in) W_out + b_out``; a GLU: ``act(x W_gate + b_gate) * (x W_in + b_in)``
    before W_out."""

    W_in: Float[Tensor, "d_in d_hidden"]
    b_in: Float[Tensor, "d_hidden"]
    W_out: Float[Tensor, "d_hidden d_out"]
    b_out: Float[Tensor, "d_out"]
    act_fn: str
    W_gate: Float[Tensor, "d_in d_hidden"] | None = None
    b_gate: Float[Tensor, "d_hidden"] | None = None

    @property
    def shape(self) -> MLPShape:
        (d_in, d_hidden), d_out = self.W_in.shape, self.W_out.shape[1]
        return MLPShape(d_in, d_out, d_hidden, self.act_fn, self.W_gate is not None)


@torch.no_grad()
def read_mlp(mlp: nn.Module) -> MLPWeights:
    """Weights of a HookedTransformer's or TransformerBridge's MLP; ValueError for a module that is
    neither an MLP nor a GLU, or has an unknown activation."""
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

    b_in, b_out = bias("b_in", W_in), bias("b_out", W_out)
    W_gate = getattr(mlp, "W_gate", None)
    if W_gate is None:
        return MLPWeights(W_in, b_in, W_out, b_out, str(act_fn))
    if not bridged:  # TransformerLens adds a GLU's b_in after the product
        b_in, b_out = torch.zeros_like(b_in), b_out + b_in @ W_out
    return MLPWeights(W_in, b_in, W_out, b_out, str(act_fn), W_gate, bias("b_gate", W_gate))


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
