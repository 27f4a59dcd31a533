"""The two sparse operations of a Mixture of Decoders: pick experts, and sum their rows.

Both are exact. Beyond the gate's matrix product, forward and backward touch only the active rows
of each token: nothing of shape ``[..., d_sae]`` enters the autograd graph.

Entries are k for every token, values and indices [*batch, k], or ragged: [n], one token after the
other, with counts [*batch] of how many each has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        chunk_size: as `pre_activation_chunks`'.
    """
    values, indices = topk_relu(
        pre_activation_chunks(x, W_enc, b_enc, chunk_size=chunk_size),
        k,
        batch=x.shape[:-1],
        dtype=W_enc.dtype,
    )
    return gate_values(values, indices, x, W_enc, b_enc, unit_norm=unit_norm), indices


@torch.no_grad()
def topk_relu(
    chunks: Iterable[Float[Tensor, "chunk d_sae"]], k: int, *, batch: torch.Size, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The k largest of ``relu(pre)`` of each token, without a gradient."""
    values: Tensor | None = None
    indices: Tensor | None = None
    start = 0
    for pre in chunks:
        if values is None or indices is None:
            values = pre.new_empty(batch.numel(), k, dtype=dtype)
            indices = torch.empty_like(values, dtype=torch.long)
        part = slice(start, start := start + len(pre))
        of_chunk, indices[part] = _topk(pre, k)
        values[part] = of_chunk.relu()
    assert values is not None and indices is not None
    return values.view(*batch, k), indices.view(*batch, k)


_GROUP = 32
_WIDE = 1 << 15


def _topk(pre: Float[Tensor, "chunk d_sae"], k: int) -> tuple[Tensor, Tensor]:
    """``pre.topk(k, sorted=False)``; of a wide gate, in two steps.

    The k largest entries are in the k groups of units with the largest maxima, so only those
    groups are ranked: a maximum is several times as fast as a top-k.
    """
    n_groups, rest = divmod(pre.shape[1], _GROUP)
    if pre.shape[1] < _WIDE or n_groups < 8 * k:
        return pre.topk(k, dim=-1, sorted=False)
    grouped = pre[:, : n_groups * _GROUP].unflatten(1, (n_groups, _GROUP))
    groups = grouped.amax(-1).topk(k, dim=-1, sorted=False).indices
    units = torch.arange(pre.shape[1], device=pre.device)
    of_groups = (groups[..., None] * _GROUP + units[:_GROUP]).flatten(1)
    last = units[n_groups * _GROUP :].expand(len(pre), rest)
    candidates = torch.cat([of_groups, last], dim=1)
    values, at = pre.gather(1, candidates).topk(k, dim=-1, sorted=False)
    return values, candidates.gather(1, at)


def pre_activation_chunks(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    *,
    chunk_size: int = 1024,
) -> Iterator[Float[Tensor, "chunk d_sae"]]:
    """``x @ W_enc + b_enc``, some tokens at a time, without a gradient.

    Yields:
        The next tokens' pre-activations, in one buffer that the next ones overwrite (which is
        also faster on a CPU than one for all tokens).

    Args:
        chunk_size: tokens whose pre-activations, [chunk_size, d_sae], exist at a time.
    """
    tokens, W, b = _operands(x.detach(), W_enc.detach(), b_enc.detach())
    pre = W.new_empty(min(chunk_size, len(tokens)), W.shape[1])
    for read in tokens.split(chunk_size):
        yield torch.addmm(b, read, W, out=pre[: len(read)])


def gate_values(
    values: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    *,
    counts: Int[Tensor, "*batch"] | None = None,
    unit_norm: bool = False,
) -> Float[Tensor, "*batch k"]:
    """Picked entries of ``relu(x @ W_enc + b_enc)``, differentiable in x, W_enc and b_enc.

    Args:
        values, indices, counts: what was picked, and where.
        unit_norm: as `topk_gate`'s.
    """
    return _GateGradient.apply(values, indices, counts, x, W_enc, b_enc, unit_norm)  # type: ignore[return-value]


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
    counts: Int[Tensor, "*batch"] | None = None,
    unit_norm: bool = False,
) -> Float[Tensor, "*batch d"]:
    """``sum_j weights[..., j] * table[indices[..., j]]``, differentiable in weights and table.

    Args:
        counts: of ragged weights and indices.
        unit_norm: the table's rows have unit norm, and are to keep it: their gradient has no
            component along them.
    """
    # Torch's own kernel has a good gradient for the weights, but not for the table.
    out = _row_sum(weights.to(table.dtype), indices, table.detach(), counts)
    return _TableGradient.apply(out, weights.detach(), indices, counts, table, unit_norm)  # type: ignore[return-value]


def to_dense(
    values: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    d_sae: int,
    *,
    counts: Int[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch d_sae"]:
    """The sparse activations as an ordinary tensor, zeros written out."""
    if counts is None:
        return values.new_zeros(*values.shape[:-1], d_sae).scatter(-1, indices, values)
    flat = token_of(indices, counts) * d_sae + indices
    dense = values.new_zeros(counts.numel() * d_sae).index_put((flat,), values)
    return dense.view(*counts.shape, d_sae)


def token_of(
    indices: Int[Tensor, "*batch k"], counts: Int[Tensor, "*batch"] | None
) -> Int[Tensor, "n"]:
    """Which token of the flattened batch each entry is of."""
    if counts is None:
        k = indices.shape[-1]
        tokens = torch.arange(indices.shape[:-1].numel(), device=indices.device)
        return tokens.repeat_interleave(k)
    return torch.arange(counts.numel(), device=counts.device).repeat_interleave(
        counts.flatten(), output_size=len(indices)
    )


def _operands(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gate's product: tokens [n, d_in], W_enc, b_enc, in autocast's precision under it."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # it has none
    dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
    return x.reshape(-1, x.shape[-1]).to(dtype), W_enc.to(dtype), b_enc.to(dtype)


class _GateGradient(torch.autograd.Function):
    """Hands picked activations through, and their gradient on to the gate."""

    @staticmethod
    def forward(ctx, values, indices, counts, x, W_enc, b_enc, unit_norm):
        ctx.save_for_backward(values, indices, counts, x, W_enc)
        ctx.unit_norm = unit_norm
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values):
        values, indices, counts, x, W_enc = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[3:6]
        grad = torch.where(values > 0, grad_values, 0)  # [*batch, k] or [n]
        d_sae = W_enc.shape[1]
        grad_x = grad_W = grad_b = None
        if needs_x:
            grad_x = _row_sum(grad, indices, W_enc.T, counts).to(x.dtype)
        if needs_W:
            grad_rows = _scatter_rows(grad, indices, x.to(grad.dtype), d_sae, counts)
            grad_W = (_tangential_(grad_rows, W_enc.T) if ctx.unit_norm else grad_rows).T
        if needs_b:
            grad_b = grad.new_zeros(d_sae).index_add_(0, indices.flatten(), grad.flatten())
        return None, None, None, grad_x, grad_W, grad_b, None


class _TableGradient(torch.autograd.Function):
    """Hands a `_row_sum` through, and its gradient on to the table."""

    @staticmethod
    def forward(ctx, out, weights, indices, counts, table, unit_norm):
        ctx.save_for_backward(weights, indices, counts, table)
        ctx.unit_norm = unit_norm
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weights, indices, counts, table = ctx.saved_tensors
        grad_table = None
        if ctx.needs_input_grad[4]:
            grad_table = _scatter_rows(weights, indices, grad_out, len(table), counts)
            if ctx.unit_norm:
                grad_table = _tangential_(grad_table, table)
        return grad_out, None, None, None, grad_table, None


def _row_sum(weights: Tensor, indices: Tensor, table: Tensor, counts: Tensor | None) -> Tensor:
    """[*batch, k], [*batch, k], [rows, d] -> [*batch, d]"""
    table = table.contiguous()
    if counts is None:
        k = indices.shape[-1]
        out = F.embedding_bag(
            indices.reshape(-1, k), table, per_sample_weights=weights.reshape(-1, k), mode="sum"
        )
        return out.view(*indices.shape[:-1], table.shape[1])
    offsets = counts.flatten().cumsum(0) - counts.flatten()
    out = F.embedding_bag(indices, table, offsets, per_sample_weights=weights, mode="sum")
    return out.view(*counts.shape, table.shape[1])


def _scatter_rows(
    weights: Tensor, indices: Tensor, vectors: Tensor, rows: int, counts: Tensor | None
) -> Tensor:
    """``out[indices[b, j]] += weights[b, j] * vectors[b]``, from zeros of shape [rows, d].

    The transpose of `_row_sum`, written as one: occurrences sorted by row make each row's bag.
    """
    flat, order = indices.flatten().int().sort()  # in half the time of int64
    starts = torch.searchsorted(flat, torch.arange(rows, device=flat.device, dtype=flat.dtype))
    token = order // indices.shape[-1] if counts is None else token_of(indices, counts)[order]
    return F.embedding_bag(
        token,
        vectors.reshape(-1, vectors.shape[-1]).contiguous(),
        offsets=starts,
        per_sample_weights=weights.flatten()[order].to(vectors.dtype),
        mode="sum",
    )


def _tangential_(grad: Float[Tensor, "rows d"], unit: Float[Tensor, "rows d"]) -> Tensor:
    """Take out of each row of grad, in place, its component along the unit row."""
    along = torch.einsum("nd,nd->n", grad, unit)
    return grad.addcmul_(unit, along[:, None], value=-1)
