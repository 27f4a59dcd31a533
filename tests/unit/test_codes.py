"""Codes, with k entries a token or ragged, against the activations written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxd_lens.layers.codes import DenseCodes, SparseCodes
from mxd_lens.models.splice import splice
from tests.helpers import MODEL_SHAPE, SPARSE, close, make_layer

pytestmark = pytest.mark.usefixtures("one_thread")

D_SAE = 7


def draw(kind: str, *batch: int) -> tuple[Any, Tensor]:
    """Codes and the same activations, of which some are zero."""
    acts = torch.rand(*batch, D_SAE, dtype=torch.float64) * (torch.rand(*batch, D_SAE) > 0.4)
    acts[..., 2] = 0
    if kind == "dense":
        return DenseCodes(acts), acts
    if kind == "k":
        values, indices = acts.topk(6, sorted=False)
        return SparseCodes(values, indices, D_SAE), acts
    entries = acts > 0
    entries[..., :3] |= torch.rand(*batch, 3) > 0.5  # an entry may be zero
    return SparseCodes(acts[entries], entries.nonzero()[:, -1], D_SAE, entries.sum(-1)), acts


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", ["k", "ragged", "dense"])
class TestCodes:
    def test_say_what_the_activations_say(self, kind, batch):
        codes, acts = draw(kind, *batch)
        flat = acts.reshape(-1, D_SAE)
        close(codes.to_dense(), acts)
        counted = codes.for_counting()
        close(counted.to_dense().reshape(flat.shape), flat)
        for dim in (0, -2, -1):
            of_codes = counted.bool().float().sum(dim)
            close(of_codes.flatten(), flat.bool().float().sum(dim))
        token, unit, value = codes.firings()
        close(torch.zeros_like(flat).index_put((token, unit), value), flat)
        assert (value > 0).all() and len(value) == (acts > 0).sum()
        assert token.tolist() == sorted(token.tolist())
        if kind != "dense":
            assert codes.shape == acts.shape and codes.dim() == 1
            close(codes.square_norms(), acts.square().sum(-1))
            assert codes.to(torch.device("meta")).to_dense().shape == acts.shape

    @pytest.mark.parametrize("unit_norm", [False, True])
    def test_decode_as_a_product_with_its_gradients(self, kind, batch, unit_norm):
        codes, acts = draw(kind, *batch)
        table = torch.randn(D_SAE, 4, dtype=torch.float64)
        if unit_norm:
            table /= table.norm(dim=1, keepdim=True)
        table.requires_grad_()
        codes.values.requires_grad_()
        rows = table / table.norm(dim=1, keepdim=True) if unit_norm else table
        expected, found = acts @ rows, codes.decode(table, unit_norm=unit_norm)
        close(found, expected)
        weight = torch.randn_like(expected)
        (of_table,) = torch.autograd.grad((expected * weight).sum(), table)
        close(torch.autograd.grad((found * weight).sum(), table, retain_graph=True)[0], of_table)
        (of_values,) = torch.autograd.grad((found * weight).sum(), codes.values)
        (written_out,) = torch.autograd.grad((codes.to_dense() @ rows * weight).sum(), codes.values)
        close(of_values, written_out)

    def test_are_detached_for_counting(self, kind, batch):
        codes, _ = draw(kind, *batch)
        codes.values.requires_grad_()
        assert codes.decode(torch.randn(D_SAE, 4).double()).requires_grad
        assert (
            not codes.for_counting().to_dense().requires_grad
            and not codes.firings()[2].requires_grad
        )
        assert kind == "dense" or not codes.detach().values.requires_grad


@pytest.mark.parametrize("kind", ["k", "ragged"])
def test_a_part_of_the_batch(kind):
    codes, acts = draw(kind, 4, 3)
    for at in (0, 3, slice(1, 3), slice(None), (slice(2),), (1, slice(2)), (3, 2)):
        close(codes[at].to_dense(), acts[at])
    close(codes[2][1].to_dense(), acts[2, 1])


@pytest.mark.parametrize("kind", [kind for kind in SPARSE if "batchtopk" not in kind])
class TestHookCodes:
    def test_the_layers_cache_holds_them(self, kind):
        layer, x = make_layer(kind), torch.randn(1, 6, 5, dtype=torch.float64)
        expected = layer.encode(x).detach()
        _, cache = layer.run_with_cache(x)
        codes = cache["hook_codes"]
        assert isinstance(codes, SparseCodes) and codes.values.numel() < expected.numel()
        close(codes.to_dense().detach(), expected)
        _, cache = layer.run_with_cache(x, remove_batch_dim=True)
        close(cache["hook_codes"].to_dense().detach(), expected[0])

    @pytest.mark.parametrize("model", ["tiny_hooked", "tiny_bridge"])
    def test_so_does_the_models(self, kind, model, request, tokens):
        lm, layer = request.getfixturevalue(model), make_layer(kind, 0.3, **MODEL_SHAPE)
        name, mlp_in = "blocks.1.mlp.hook_codes", "blocks.1.mlp.hook_in"
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            _, one = lm.run_with_cache(tokens[:1], remove_batch_dim=True)
            last = cache.apply_slice_to_batch_dim(-1)
            _, alone = lm.run_with_cache(tokens, names_filter=name)
        assert list(alone) == [name]
        expected = layer.encode(cache[mlp_in])
        for codes in (cache[name], alone[name]):
            assert isinstance(codes, SparseCodes)
            close(codes.to_dense(), expected, rtol=1e-4, atol=1e-5)
        close(one[name].to_dense(), layer.encode(one[mlp_in]), rtol=1e-4, atol=1e-5)
        close(last[name].to_dense(), layer.encode(last[mlp_in]), rtol=1e-4, atol=1e-5)
        assert one[name].shape == last[name].shape == (7, 40)
