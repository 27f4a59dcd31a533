"""Jacobians of layers and MLP, against torch.func on plain forms and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev, vmap

from mxd_lens.analysis.jacobian import jacobians
from mxd_lens.layers import layer_of
from mxd_lens.layers.mxd import MxD

from ..helpers import random_layer


@pytest.fixture
def mlp(tiny_bridge):
    return tiny_bridge.blocks[1].mlp


@pytest.fixture
def x(tiny_bridge):
    return torch.randn(7, tiny_bridge.cfg.d_model)


def of_mlp(mlp):
    return lambda x: mlp(x[None])[0]


def by_differences(function, x, step=1e-3):
    """[tokens, d_out, d_in], central."""
    columns = []
    for i in range(x.shape[1]):
        shift = torch.zeros_like(x)
        shift[:, i] = step
        columns.append((function(x + shift) - function(x - shift)) / (2 * step))
    return torch.stack(columns, dim=-1).detach()


def cosines(one, other):
    return torch.cosine_similarity(one.flatten(1), other.flatten(1), dim=1)


def test_an_exact_copy_has_the_mlps_and_none_of_it_through_its_gate(mlp, x):
    copy = layer_of(MxD.from_mlp(mlp, d_sae=8, k=2))
    found = jacobians(copy, mlp, x)
    assert found["jacobian_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["jacobian_cosine_median"] == pytest.approx(1, abs=1e-5)
    assert found["jacobian_gate_share"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    "name", ["mxd", "molt", "topk_transcoder", "topk_skip_transcoder", "dense"]
)
def test_of_the_parts_by_finite_differences(mlp, x, name):
    sae = random_layer(name, d_sae=20)
    found = jacobians(layer_of(sae), mlp, x)
    with torch.no_grad():
        whole, target = by_differences(sae, x), by_differences(of_mlp(mlp), x)
    assert found["jacobian_cosine"] == pytest.approx(cosines(whole, target).mean().item(), abs=2e-2)
    if name == "dense":
        assert found["jacobian_gate_share"] is None and found["jacobian_gate_cosine"] is None
        return
    acts = sae.encode(x).detach()
    with torch.no_grad():
        held = by_differences(
            lambda moved: sae.run_with_hooks(
                moved, fwd_hooks=[("hook_sae_acts_post", lambda _, hook: acts)]
            ),
            x,
        )
    of_gate = whole - held
    share = of_gate.square().sum() / whole.square().sum()
    assert found["jacobian_gate_share"] == pytest.approx(share.item(), rel=2e-2)
    expected = cosines(of_gate, target).mean().item()
    assert found["jacobian_gate_cosine"] == pytest.approx(expected, abs=2e-2)


def test_of_a_transcoder_by_torch_func(mlp, x):
    sae = random_layer("topk_transcoder", d_sae=20)
    active = sae.encode(x) > 0

    def plain(x, active):
        pre = (x @ sae.W_enc + sae.b_enc).relu()
        return torch.where(active, pre, 0) @ sae.W_dec + sae.b_dec

    whole = vmap(jacrev(plain))(x, active)
    target = torch.stack([jacrev(of_mlp(mlp))(of_token[None])[0, :, 0] for of_token in x])
    found = jacobians(layer_of(sae), mlp, x)
    assert found["jacobian_cosine"] == pytest.approx(cosines(whole, target).mean().item(), abs=1e-5)
    assert found["jacobian_gate_share"] == pytest.approx(1)  # all of it, without a skip
    assert found["jacobian_gate_cosine"] == pytest.approx(found["jacobian_cosine"], abs=1e-5)


def test_an_sae_is_taken_together_with_the_mlp(mlp, x):
    sae = random_layer("topk", d_sae=20)
    found = jacobians(layer_of(sae), mlp, x)
    with torch.no_grad():
        target = by_differences(of_mlp(mlp), x)
        whole = by_differences(lambda moved: sae(of_mlp(mlp)(moved)), x)
    assert found["jacobian_cosine"] == pytest.approx(cosines(whole, target).mean().item(), abs=2e-2)
    assert found["jacobian_gate_share"] == pytest.approx(1)
