"""The sparse kernels against the dense forms they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mxd_lens.layers.kernels import (
    gate_values,
    to_dense,
    token_of,
    topk_gate,
    topk_relu,
    weighted_row_sum,
)
from tests.helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, D_OUT = 6, 13, 4
WIDTHS = (D_SAE, 1 << 15, (1 << 15) + 5)  # ranked at once, or in groups: of all, or but the last


def draw(*batch: int, d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, columns=True, dtype=torch.float64):
    """x, W_enc (its columns or its rows contiguous), b_enc, table: leaves that need gradients."""
    x = torch.randn(*batch, d_in, dtype=dtype)
    W_enc = torch.randn(d_sae, d_in, dtype=dtype).T
    W_enc = W_enc if columns else W_enc.contiguous()
    assert W_enc.T.is_contiguous() == columns
    b_enc = torch.randn(d_sae, dtype=dtype)
    table = torch.randn(d_sae, d_out, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, W_enc, b_enc, table)]


def dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, table: Tensor, k: int | None) -> Tensor:
    """The same function with every zero written out: sort, threshold, einsum. No k: all that are
    above 0.3."""
    acts = torch.einsum("...i,in->...n", x, W_enc).add(b_enc).clamp_min(0)
    order = acts.detach().argsort(dim=-1, descending=True, stable=True)
    kept = acts.detach() > 0.3 if k is None else order.argsort(dim=-1) < k
    return torch.einsum("...n,no->...o", acts * kept, table)


def sparse(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, table: Tensor, k: int | None, unit_norm: bool = False
) -> Tensor:
    counts = None
    if k is None:
        pre = (x @ W_enc + b_enc).detach()
        picked = pre > 0.3
        values, indices, counts = pre[picked], picked.nonzero()[:, -1], picked.sum(-1)
        gate = (values, indices, x, W_enc, b_enc)
        values = gate_values(*gate, counts=counts, unit_norm=unit_norm)
    else:
        values, indices = topk_gate(x, W_enc, b_enc, k, unit_norm=unit_norm)
    return weighted_row_sum(values, indices, table, counts=counts, unit_norm=unit_norm)


def value_and_grads(function: Callable, inputs: list[Tensor], k: int | None) -> list[Tensor]:
    out = function(*inputs, k)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_same_as_dense(inputs: list[Tensor], k: int | None) -> None:
    close(value_and_grads(sparse, inputs, k), value_and_grads(dense, inputs, k))


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("k", [1, 3, D_SAE, None])
@pytest.mark.parametrize("batch", [(), (7,), (3, 5), (2, 3, 4)])
def test_values_and_gradients_equal_the_dense_form(batch, k, columns):
    assert_same_as_dense(draw(*batch, columns=columns), k)


@pytest.mark.parametrize("trial", range(12))
def test_random_sizes_equal_the_dense_form(trial):
    generator = torch.Generator().manual_seed(trial)
    tokens, d_in, d_sae, d_out = torch.randint(1, 40, (4,), generator=generator).tolist()
    inputs = draw(tokens, d_in=d_in, d_sae=d_sae, d_out=d_out)
    for k in (int(torch.randint(1, d_sae + 1, (), generator=generator)), None):
        assert_same_as_dense(inputs, k)


@pytest.mark.parametrize("chunk_size", [1, 7, 15, 100])
@pytest.mark.parametrize("batch", [(), (15,), (3, 5)])
def test_chunks_change_nothing(batch, chunk_size):
    inputs = draw(*batch)

    def chunked(x, W_enc, b_enc, table, k):
        return weighted_row_sum(*topk_gate(x, W_enc, b_enc, k, chunk_size=chunk_size), table)

    close(value_and_grads(chunked, inputs, 3), value_and_grads(sparse, inputs, 3))


@pytest.mark.parametrize("k", [3, None])
def test_gradients_of_unit_vectors_are_tangential(k):
    x, W_enc, b_enc, table = (tensor.detach() for tensor in draw(30))
    W_enc, table = W_enc / W_enc.norm(dim=0), table / table.norm(dim=1, keepdim=True)
    inputs = [tensor.requires_grad_() for tensor in (x, W_enc, b_enc, table)]

    def unit(*inputs):
        return sparse(*inputs, unit_norm=True)

    def normed(x, W_enc, b_enc, table, k):
        return dense(x, W_enc / W_enc.norm(dim=0), b_enc, table / table.norm(dim=1)[:, None], k)

    close(value_and_grads(unit, inputs, k), value_and_grads(normed, inputs, k))


def test_gradcheck():
    x, W_enc, b_enc, table = draw(4)
    pre = (x @ W_enc + b_enc).detach()
    ranked = pre.sort(dim=-1, descending=True).values
    assert (ranked[:, 2] - ranked[:, 3]).min() > 1e-3 < pre.abs().min()  # no kink within reach
    assert torch.autograd.gradcheck(lambda *a: topk_gate(*a, 3)[0].sum(-1), (x, W_enc, b_enc))
    weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1, 2], [2, 2, 5], [12, 0, 12], [7, 7, 7]])
    counts = torch.tensor([[3, 0], [4, 5]])
    for rows in (indices, None), (indices.flatten(), counts):
        assert torch.autograd.gradcheck(
            lambda w, t, rows=rows: weighted_row_sum(
                w.view_as(rows[0]), rows[0], t, counts=rows[1]
            ),
            (weights, table),
        )


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("frozen", range(4), ids=["x", "W_enc", "b_enc", "table"])
def test_an_input_without_gradient_leaves_the_others_theirs(frozen, k):
    inputs = draw(7)
    expected = torch.autograd.grad(dense(*inputs, k).square().sum(), inputs)
    inputs[frozen] = inputs[frozen].detach()
    sparse(*inputs, k).square().sum().backward()
    assert inputs[frozen].grad is None
    for i in {0, 1, 2, 3} - {frozen}:
        close(inputs[i].grad, expected[i])


@pytest.mark.parametrize("d_sae", WIDTHS)
def test_gate_gives_the_k_largest_and_where_they_are(d_sae):
    x, W_enc, b_enc, _ = draw(9, d_sae=d_sae)
    pre = x @ W_enc + b_enc
    values, indices = topk_gate(x, W_enc, b_enc, 4)
    close(values, pre.gather(-1, indices).clamp_min(0))
    left_out = pre.scatter(-1, indices, -torch.inf).amax(-1)
    assert (pre.gather(-1, indices).amin(-1) >= left_out).all()
    picked = topk_relu(pre.detach().split(2), 4, batch=torch.Size([3, 3]), dtype=pre.dtype)
    close(picked, (values.detach().view(3, 3, 4), indices.view(3, 3, 4)))


@pytest.mark.parametrize("d_sae", WIDTHS)
def test_ties_choose_k_different_experts_and_give_only_them_gradient(d_sae):
    x, W_enc, b_enc, _ = draw(5, d_sae=d_sae)
    with torch.no_grad():
        W_enc[:] = W_enc[:, :1]
        b_enc[:] = 50.0
    values, indices = topk_gate(x, W_enc, b_enc, 4)
    assert all(len(set(row)) == 4 for row in indices.tolist())
    close(values, (x @ W_enc + b_enc)[:, :4])
    values.sum().backward()
    close(b_enc.grad, indices.flatten().bincount(minlength=d_sae).double())
    close(x.grad, 4 * W_enc[:, 0].expand(5, -1))


@pytest.mark.parametrize("k", [3, None])
def test_a_row_that_rectifies_to_zero_gives_zeros_and_no_gradient(k):
    x, W_enc, b_enc, _ = inputs = draw(6)
    with torch.no_grad():
        W_enc.abs_()
        x[2] = -100.0
    assert (x[2] @ W_enc + b_enc < 0).all()
    assert_same_as_dense(inputs, k)
    out, grad_x, *_ = value_and_grads(sparse, inputs, k)
    assert (out[2] == 0).all() and (grad_x[2] == 0).all() and grad_x[1].any()


def test_fewer_than_k_positive_carry_zeros():
    x, W_enc, b_enc, _ = inputs = draw(6)
    with torch.no_grad():
        b_enc -= 1.5
    alive = (x @ W_enc + b_enc > 0).sum(-1)
    assert 0 < alive.max() < 9 and alive.unique().numel() > 1
    assert_same_as_dense(inputs, 9)
    values, _ = topk_gate(x, W_enc, b_enc, 9)
    assert ((values > 0).sum(-1) == alive).all()


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_empty_batch(batch, k):
    inputs = draw(*batch)
    out, grad_x, *grads = value_and_grads(sparse, inputs, k)
    assert out.shape == (*batch, D_OUT) and grad_x.shape == inputs[0].shape
    for grad, parameter in zip(grads, inputs[1:], strict=True):
        assert grad.shape == parameter.shape and (grad == 0).all()


@pytest.mark.parametrize("counts", [None, torch.tensor([2])], ids=["k", "ragged"])
def test_an_expert_used_twice_by_a_token_counts_twice(counts):
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    shape = (1, 2) if counts is None else (2,)
    weights = torch.tensor([2.0, 3.0], dtype=torch.float64).view(shape).requires_grad_()
    out = weighted_row_sum(weights, torch.ones(shape, dtype=torch.long), table, counts=counts)
    close(out, 5 * table[1:2])
    out.sum().backward()
    close(table.grad[1], torch.full((3,), 5.0).double())
    close(weights.grad, table[1].sum().detach().expand(shape))


def test_to_dense_writes_every_activation_where_it_belongs():
    values, indices = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([[[3, 0]], [[1, 2]]])
    expected = [[[2.0, 0.0, 0.0, 1.0]], [[0.0, 3.0, 0.0, 0.0]]]
    assert to_dense(values, indices, 4).tolist() == expected
    assert token_of(indices, None).tolist() == [0, 0, 1, 1]
    counts = torch.tensor([[2], [0], [1]])
    ragged = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3, 0, 1])
    expected.insert(1, [[0.0] * 4])
    assert to_dense(*ragged, 4, counts=counts).tolist() == expected
    assert token_of(ragged[1], counts).tolist() == [0, 0, 2]


@pytest.mark.parametrize("k", [16, None])  # all of them, lest rounding swaps experts
def test_bfloat16_autocast_stays_close_to_float32(k):
    inputs = draw(64, d_in=32, d_sae=16, d_out=8, dtype=torch.float32)
    expected = value_and_grads(dense, inputs, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_gate(*inputs[:3], 16)[0].dtype == torch.float32
        found = value_and_grads(sparse, inputs, k)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.1
    assert (found[0] - expected[0]).abs().max() > 0  # it did run in bfloat16


def saved_for_backward(function, inputs, k) -> list[tuple[int, ...]]:
    """Shapes of the tensors autograd keeps, the inputs themselves aside."""
    leaves = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in leaves:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs, k)
    return shapes


def test_nothing_of_size_d_sae_is_saved_for_backward():
    inputs = draw(50)
    assert any(D_SAE in shape for shape in saved_for_backward(dense, inputs, 3))
    shapes = saved_for_backward(sparse, inputs, 3)
    assert (50, 3) in shapes and all(math.prod(shape) <= 50 * 3 for shape in shapes)


def test_the_pre_activations_are_freed_by_the_end_of_forward():
    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (50, D_SAE):
                made.append(StorageWeakRef(out.untyped_storage()))
            return out

    inputs = draw(50)
    with Record():
        out = sparse(*inputs, 3)
    assert made and all(storage.expired() for storage in made)
    with Record():
        out = dense(*inputs, 3)
    assert not all(storage.expired() for storage in made)
    assert out.requires_grad
