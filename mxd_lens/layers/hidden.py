"""The dense hidden units of a layer, an MLP's or a GLU's.

    z = act(x W_hidden + b_hidden)                                          an MLP
    z = act(x W_hidden_gate + b_hidden_gate) * (x W_hidden + b_hidden)      a GLU

The weights' names are not those of TransformerLens' MLPs, whose code would take the layer for one
whose neurons write rows of W_out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.base import PairConfig, PairLayer
from mxd_lens.layers.mlp import ACTIVATIONS, MLPWeights


@dataclass(kw_only=True)
class HiddenConfig(PairConfig):
    """Of a layer with hidden units. Raises as `PairConfig` does, and for an unknown activation."""

    act_fn: str = "silu"
    """A key of `ACTIVATIONS`."""
    gated: bool = True
    """Whether the hidden layer is a GLU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation act_fn={self.act_fn!r}; known: {', '.join(ACTIVATIONS)}"
            )


class HiddenUnits(PairLayer):
    """A `PairLayer` with hidden units z, as many as `d_hidden` says; cfg has act_fn and gated.

    Parameters: W_hidden [d_in, d_hidden], b_hidden [d_hidden] and, for a GLU, W_hidden_gate,
    b_hidden_gate of the same shapes.

    Hook points, named as TransformerLens': ``hook_pre`` and, for a GLU, ``hook_pre_linear``, then
    ``hook_post`` (z) [.., d_hidden].
    """

    W_hidden: nn.Parameter
    b_hidden: nn.Parameter
    W_hidden_gate: nn.Parameter
    b_hidden_gate: nn.Parameter
    hook_pre: HookPoint
    hook_pre_linear: HookPoint
    hook_post: HookPoint

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.hook_pre = HookPoint()
        if cfg.gated:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()
        self.setup()

    @property
    def d_hidden(self) -> int:
        return self.cfg.d_hidden

    @torch.no_grad()
    def initialize_hidden_units(self) -> None:
        """Uniform in +-1/sqrt(d_in), biases zero, as the reference."""
        d_in, d_hidden = self.cfg.d_in, self.d_hidden
        self.W_hidden = nn.Parameter(self._uniform(d_in, d_hidden))
        self.b_hidden = nn.Parameter(self._zeros(d_hidden))
        if self.cfg.gated:
            self.W_hidden_gate = nn.Parameter(self._uniform(d_in, d_hidden))
            self.b_hidden_gate = nn.Parameter(self._zeros(d_hidden))

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_hidden"]:
        """The hidden units z."""
        act = ACTIVATIONS[self.cfg.act_fn]
        linear = x @ self.W_hidden + self.b_hidden
        if not self.cfg.gated:
            return self.hook_post(act(self.hook_pre(linear)))
        pre = self.hook_pre(x @ self.W_hidden_gate + self.b_hidden_gate)
        return self.hook_post(act(pre) * self.hook_pre_linear(linear))

    @torch.no_grad()
    def copy_hidden_units(self, mlp: MLPWeights) -> None:
        """Take an MLP's weights; ValueError if its widths, kind or activation are others."""
        theirs = (mlp.shape.d_in, mlp.shape.d_hidden), mlp.shape.gated, mlp.act_fn
        ours = (self.cfg.d_in, self.d_hidden), self.cfg.gated, self.cfg.act_fn
        if theirs != ours:
            raise ValueError(
                f"this MLP has ((d_in, d_hidden), gated, act_fn) = {theirs}, the layer {ours}"
            )
        self.W_hidden.copy_(mlp.W_in)
        self.b_hidden.copy_(mlp.b_in)
        if mlp.W_gate is not None and mlp.b_gate is not None:
            self.W_hidden_gate.copy_(mlp.W_gate)
            self.b_hidden_gate.copy_(mlp.b_gate)
