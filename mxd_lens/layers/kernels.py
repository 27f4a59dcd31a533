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
    *,
    unit_norm: bool = False,
    chunk_size: int = 1024,
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The k largest entries of ``relu(x @ W_enc + b_enc)`` and where they are, in no set order.

    Differentiable in ``x``, ``W_enc`` and ``b_enc``. Rows with fewer than k positive
    pre-activations carry zeros. Fastest when ``W_enc.T`` is contiguous.

    Args:
        unit_norm: W_enc's columns have unit norm, and are to keep it: their gradient has no
            component along them.
        chunk_size: tokens whose pre-activations, [chunk_size, d_sae], exist at a time. A buffer
            of them that is used again is also faster on a CPU than one for all tokens.
    """
    return _TopKGate.apply(x, W_enc, b_enc, k, unit_norm, chunk_size)  # type: ignore[return-value]


def topk_relu(
    pre: Float[Tensor, "*batch d_sae"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """`topk_gate` from pre-activations that already exist (because a hook has looked at them)."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return values.relu(), indices


def pre_activations(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    *,
    unit_norm: bool = False,
    chunk_size: int = 1024,
) -> Float[Tensor, "*batch d_sae"]:
    """``x @ W_enc + b_enc``, written out: to the bit what `topk_gate` ranks, in W_enc's dtype.

    Args:
        unit_norm, chunk_size: as `topk_gate`'s.
    """
    W = keep_unit_norm(W_enc.T).T if unit_norm else W_enc
    tokens, W, b = _operands(x, W, b_enc)
    pre = torch.cat([torch.addmm(b, read, W) for read in tokens.split(chunk_size)])
    return pre.to(W_enc.dtype).view(*x.shape[:-1], W.shape[1])


def keep_unit_norm(rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Rows of unit norm, as they are: their gradient has no component along them."""
    unit = rows.detach()
    rows = rows.view_as(rows)
    if rows.requires_grad:
        rows.register_hook(lambda grad: _tangential_(grad.clone(), unit))
    return rows


def weighted_row_sum(
    weights: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    table: Float[Tensor, "rows d"],
    *,
    unit_norm: bool = False,
) -> Float[Tensor, "*batch d"]:
    """``sum_j weights[..., j] * table[indices[..., j]]``, differentiable in weights and table.

    Args:
        unit_norm: the table's rows have unit norm, and are to keep it: their gradient has no
            component along them.
    """
    # Torch's own kernel has a good gradient for the weights, but not for the table.
    out = _row_sum(weights.to(table.dtype), indices, table.detach())
    return _TableGradient.apply(out, weights.detach(), indices, table, unit_norm)  # type: ignore[return-value]


def to_dense(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], d_sae: int
) -> Float[Tensor, "*batch d_sae"]:
    """The sparse coefficients as an ordinary tensor, zeros written out."""
    dense = values.new_zeros(*values.shape[:-1], d_sae)
    return dense.scatter(-1, indices, values)


def _operands(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gate's product: tokens [n, d_in], W_enc, b_enc, in autocast's precision under it."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # it has none
    dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
    return x.reshape(-1, x.shape[-1]).to(dtype), W_enc.to(dtype), b_enc.to(dtype)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k, unit_norm, chunk_size):
        tokens, W, b = _operands(x, W_enc, b_enc)
        pre = W.new_empty(min(chunk_size, len(tokens)), W.shape[1])
        values = W_enc.new_empty(len(tokens), k)
        indices = torch.empty_like(values, dtype=torch.long)
        for start in range(0, len(tokens), chunk_size):
            chunk = slice(start, start + chunk_size)
            read = tokens[chunk]
            of_chunk = torch.addmm(b, read, W, out=pre[: len(read)])
            values[chunk], indices[chunk] = topk_relu(of_chunk, k)
        values, indices = values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        ctx.unit_norm = unit_norm
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _):
        x, W_enc, values, indices = ctx.saved_tensors
        needs_x, needs_W, needs_b, *_ = ctx.needs_input_grad
        grad = torch.where(values > 0, grad_values, 0)  # [*batch, k]
        d_sae = W_enc.shape[1]
        grad_x = grad_W = grad_b = None
        if needs_x:
            grad_x = _row_sum(grad, indices, W_enc.T).to(x.dtype)
        if needs_W:
            grad_rows = _scatter_rows(grad, indices, x.to(grad.dtype), d_sae)
            grad_W = (_tangential_(grad_rows, W_enc.T) if ctx.unit_norm else grad_rows).T
        if needs_b:
            grad_b = grad.new_zeros(d_sae).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None, None, None


class _TableGradient(torch.autograd.Function):
    """Hands a `_row_sum` through, and its gradient on to the table."""

    @staticmethod
    def forward(ctx, out, weights, indices, table, unit_norm):
        ctx.save_for_backward(weights, indices, table)
        ctx.unit_norm = unit_norm
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weights, indices, table = ctx.saved_tensors
        grad_table = None
        if ctx.needs_input_grad[3]:
            grad_table = _scatter_rows(weights, indices, grad_out, len(table))
            if ctx.unit_norm:
                grad_table = _tangential_(grad_table, table)
        return grad_out, None, None, grad_table, None


def _row_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """[*batch, k], [*batch, k], [rows, d] -> [*batch, d]"""
    k = indices.shape[-1]
    out = F.embedding_bag(
        indices.reshape(-1, k),
        table.contiguous(),
        per_sample_weights=weights.reshape(-1, k),
        mode="sum",
    )
    return out.view(*indices.shape[:-1], table.shape[1])


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


def _tangential_(grad: Float[Tensor, "rows d"], unit: Float[Tensor, "rows d"]) -> Tensor:
    """Take out of each row of grad, in place, its component along the unit row."""
    along = torch.einsum("nd,nd->n", grad, unit)
    return grad.addcmul_(unit, along[:, None], value=-1)
