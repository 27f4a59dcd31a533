"""The MxD as its paper writes it, its special cases, and how it starts from an MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mxd_lens.layers.mlp import ACTIVATIONS, read_mlp
from mxd_lens.layers.mxd import MxD
from mxd_lens.layers.mxd_meaningful import constant_share
from mxd_lens.models.site import Site
from tests.helpers import KINDS, close, make_config, make_layer, training_step
from tests.reference import reference, steps

close32 = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

MODELS = ["tiny_hooked", "tiny_hooked_mlp", "tiny_bridge", "tiny_bridge_gpt2"]


@pytest.mark.parametrize("kind", ["mxd", "mxd_mlp"])
class TestDefinition:
    def test_is_a_sum_of_experts_acting_on_the_hidden_units(self, kind, x):
        mxd = make_layer(kind)
        terms = steps(mxd, x)
        a, z = terms["hook_sae_acts_post"], terms["hook_post"]
        W = torch.einsum("no,ho->nho", mxd.W_dec, mxd.W_shared)
        close(W, torch.stack([mxd.expert_weights(n) for n in range(11)]))
        close(mxd(x), sum(a[:, n, None] * (z @ W[n]) for n in range(11)) + mxd.b_dec)

    @pytest.mark.parametrize("act_fn", ACTIVATIONS)
    def test_activation(self, kind, x, act_fn):
        mxd = make_layer(kind, act_fn=act_fn)
        close(mxd(x), reference(mxd, x))


class TestFromMLP:
    @pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (8, 3)])
    @pytest.mark.parametrize("model", MODELS)
    def test_computes_what_the_mlp_does_from_a_copy(self, request, model, d_sae, k):
        mlp = request.getfixturevalue(model).blocks[1].mlp
        x = torch.randn(2, 5, 16)
        mxd, expected = MxD.from_mlp(mlp, d_sae=d_sae, k=k), mlp(x)
        assert expected.std() > 0.1
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.zero_()
        close32(mxd(x), expected)
        assert (mxd.encode(x) > 0).sum(-1).unique().tolist() == [k]
        assert mxd.cfg.gated == (model in ("tiny_hooked", "tiny_bridge"))

    def test_something_else_than_an_mlp(self, tiny_hooked):
        for module in (torch.nn.Linear(3, 3), tiny_hooked.blocks[1].attn):
            with pytest.raises(ValueError, match="neither an MLP nor a GLU"):
                MxD.from_mlp(module)

    def test_an_unknown_activation(self, tiny_hooked_mlp):
        mlp = tiny_hooked_mlp.blocks[1].mlp
        mlp.cfg.act_fn = "solu_ln"
        with pytest.raises(ValueError, match="unknown activation 'solu_ln'; known: relu"):
            MxD.from_mlp(mlp)

    def test_hidden_units_of_another_mlp(self, tiny_hooked):
        with pytest.raises(ValueError, match=r"this MLP has .*16, 32.* the layer .*5, 7"):
            make_layer("mxd").copy_hidden_units(read_mlp(tiny_hooked.blocks[1].mlp))


@pytest.mark.parametrize("kind", ["training_mxd", "training_batchtopk_mxd"])
class TestDefaultRecipe:
    @pytest.fixture
    def start(self, kind, tiny_hooked) -> tuple[Any, Tensor]:
        """A layer, and inputs that its MLP may read."""
        shape = {"d_in": 16, "d_out": 16, "d_hidden": 32, "d_sae": 512, "k": 8, "dtype": "float32"}
        mxd = KINDS[kind][0](make_config(kind, **shape))
        mlp_in = 3 * torch.randn(2048, 16) + 5 * torch.randn(16)
        mxd.init_from(Site.at(tiny_hooked, 1).mlp, mlp_in, torch.randn(2048, 16))
        return mxd, mlp_in

    def test_pre_activations_have_mean_zero_and_experts_entries_of_size_one(self, start):
        mxd, mlp_in = start
        _, cache = mxd.run_with_cache(mlp_in)
        assert cache["hook_experts"].square().mean().sqrt() == pytest.approx(1, abs=0.1)
        pre = cache["hook_sae_acts_pre"]
        assert pre.mean(0).abs().max() < 1e-4 * pre.std()
        close32(mxd.W_enc.norm(dim=0), torch.ones(512))

    def test_starting_twice_changes_nothing(self, start, tiny_hooked):
        mxd, mlp_in = start
        scale = mxd.log_gate_scale.item()
        mxd.init_from(Site.at(tiny_hooked, 1).mlp, mlp_in, mlp_in)
        assert mxd.log_gate_scale.item() == pytest.approx(scale, abs=1e-4)

    def test_the_auxiliary_loss_can_be_turned_off(self, kind):
        mxd = make_layer(kind, aux_loss_coefficient=0.0)
        found = training_step(mxd, torch.randn(9, 5).double(), torch.randn(9, 4).double())
        assert list(found.losses) == ["mse_loss"]


def test_a_gate_that_is_the_same_for_all_tokens_is_all_constant():
    assert constant_share(torch.ones(5, 3)) == 1
    assert constant_share(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == 0
    assert constant_share(torch.zeros(5, 3)) == 0
