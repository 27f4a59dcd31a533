"""The two sparse operations of a Mixture of Decoders: pick k experts, and sum their rows.

Both are exact. Beyond the gate's matrix product, forward and backward touch only the k active
rows of each token: nothing of shape ``[..., d_sae]`` enters the autograd graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def topk_gate(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The k largest entries of ``relu(x @ W_enc + b_enc)`` and where they are, in no set order.

    Differentiable in ``x``, ``W_enc`` and ``b_enc``. Rows with fewer than k positive
    pre-activations carry zeros. Fastest when ``W_enc.T`` is contiguous.
    """
    return _TopKGate.apply(x, W_enc, b_enc, k)  # type: ignore[return-value]


def topk_relu(
    pre: Float[Tensor, "*batch d_sae"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """`topk_gate` from pre-activations that already exist (because a hook has looked at them)."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return values.relu(), indices


def weighted_row_sum(
    weights: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    table: Float[Tensor, "rows d"],
) -> Float[Tensor, "*batch d"]:
    """``sum_j weights[..., j] * table[indices[..., j]]``, differentiable in weights and table."""
    return _WeightedRowSum.apply(weights, indices, table)  # type: ignore[return-value]


def to_dense(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], d_sae: int
) -> Float[Tensor, "*batch d_sae"]:
    """The sparse coefficients as an ordinary tensor, zeros written out."""
    dense = values.new_zeros(*values.shape[:-1], d_sae)
    return dense.scatter(-1, indices, values)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        # Under autocast the product runs in the lower precision; values return to W_enc's.
        pre = torch.nn.functional.linear(x, W_enc.T, b_enc)  # [*batch, d_sae]
        values, indices = topk_relu(pre, k)
        values = values.to(W_enc.dtype)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _):
        x, W_enc, values, indices = ctx.saved_tensors
        needs_x, needs_W, needs_b, _ = ctx.needs_input_grad
        grad = torch.where(values > 0, grad_values, 0)  # [*batch, k]
        d_sae = W_enc.shape[1]
        grad_x = grad_W = grad_b = None
        if needs_x:
            grad_x = _row_sum(grad, indices, W_enc.T).to(x.dtype)
        if needs_W:
            grad_W = _scatter_rows(grad, indices, x.to(grad.dtype), d_sae).T
        if needs_b:
            grad_b = grad.new_zeros(d_sae).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None


class _WeightedRowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, indices, table):
        ctx.save_for_backward(weights, indices, table)
        return _row_sum(weights, indices, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weights, indices, table = ctx.saved_tensors
        needs_weights, _, needs_table = ctx.needs_input_grad
        grad_out = grad_out.to(table.dtype)
        grad_weights = grad_table = None
        if needs_weights:
            grad_weights = _row_dots(grad_out, indices, table).to(weights.dtype)
        if needs_table:
            grad_table = _scatter_rows(weights, indices, grad_out, table.shape[0])
        return grad_weights, None, grad_table


def _row_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """[*batch, k], [*batch, k], [rows, d] -> [*batch, d]"""
    k = indices.shape[-1]
    out = F.embedding_bag(
        indices.reshape(-1, k),
        table.contiguous(),
        per_sample_weights=weights.reshape(-1, k).to(table.dtype),
        mode="sum",
    )
    return out.view(*indices.shape[:-1], table.shape[1])


def _row_dots(vectors: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``vectors[b] . table[indices[b, j]]``: [*batch, d], [*batch, k], [rows, d] -> [*batch, k]

    This is the gradient of `_row_sum` in its weights, for which torch has a kernel; asking
    autograd for it avoids the [*batch, k, d] tensor that a gather would build.
    """
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=table.dtype, device=table.device)
        weights.requires_grad_()
        (dots,) = torch.autograd.grad(_row_sum(weights, indices, table.detach()), weights, vectors)
    return dots


def _scatter_rows(weights: Tensor, indices: Tensor, vectors: Tensor, rows: int) -> Tensor:
    """``out[indices[b, j]] += weights[b, j] * vectors[b]``, from zeros of shape [rows, d].

    The transpose of `_row_sum`, written as one: occurrences sorted by row make each row's bag.
    """
    k, d = indices.shape[-1], vectors.shape[-1]
    flat, order = indices.flatten().sort()
    starts = torch.searchsorted(flat, torch.arange(rows, device=flat.device))
    return F.embedding_bag(
        order // k,
        vectors.reshape(-1, d).contiguous(),
        offsets=starts,
        per_sample_weights=weights.flatten()[order].to(vectors.dtype),
        mode="sum",
    )
