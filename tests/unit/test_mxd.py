"""The layer against its definitions, its special cases, its training form and the disk."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxd_lens.layers.mlp import ACTIVATIONS, read_mlp
from mxd_lens.layers.mxd import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
pytestmark = pytest.mark.usefixtures("one_thread")

close32 = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

FORMULAS = {
    "relu": lambda v: v.clamp_min(0),
    "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
    "gelu_new": lambda v: v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
}
FORMULAS["gelu_pytorch_tanh"] = FORMULAS["gelu_new"]

HOOKS = [
    "hook_in",
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_experts",
    "hook_pre",
    "hook_pre_linear",
    "hook_post",
    "hook_shared",
    "hook_sae_recons",
    "hook_sae_output",
    "hook_out",
]
MODELS = ["tiny_hooked", "tiny_hooked_mlp", "tiny_bridge", "tiny_bridge_gpt2"]


def reference(weights: MxD | dict[str, Tensor], x: Tensor, cfg, edit=lambda _, t: t) -> Tensor:
    """The layer as one dense sum over all experts; ``edit(hook name, tensor)`` at every step."""
    w = weights if isinstance(weights, dict) else dict(weights.named_parameters())
    x = edit("hook_sae_input", edit("hook_in", x))
    pre = edit("hook_sae_acts_pre", x @ w["W_enc"] + w["b_enc"])
    rank = pre.detach().argsort(dim=-1, descending=True).argsort(dim=-1)
    acts = edit("hook_sae_acts_post", pre.clamp_min(0) * (rank < cfg.k))
    experts = edit("hook_experts", torch.einsum("...n,no->...o", acts, w["W_dec"]))
    act = FORMULAS[cfg.act_fn]
    if cfg.gated:
        gate = edit("hook_pre", x @ w["W_hidden_gate"] + w["b_hidden_gate"])
        z = act(gate) * edit("hook_pre_linear", x @ w["W_hidden"] + w["b_hidden"])
    else:
        z = act(edit("hook_pre", x @ w["W_hidden"] + w["b_hidden"]))
    z = edit("hook_post", z)
    shared = edit("hook_shared", torch.einsum("...h,ho->...o", z, w["W_shared"]))
    y = edit("hook_sae_recons", experts * shared + w["b_dec"])
    return edit("hook_out", edit("hook_sae_output", y))


def steps(mxd: MxD, x: Tensor) -> dict[str, Tensor]:
    """Every intermediate of the dense form, by hook name."""
    seen = {}
    reference(mxd, x, mxd.cfg, lambda name, t: seen.setdefault(name, t))
    return seen


@pytest.fixture(params=[True, False], ids=["glu", "mlp"])
def mxd(random_mxd, request) -> MxD:
    return random_mxd(gated=request.param, act_fn="silu" if request.param else "gelu")


def inputs(mxd: MxD, *batch: int) -> Tensor:
    return torch.randn(*(batch or (6,)), mxd.cfg.d_in, dtype=mxd.dtype)


class TestDefinition:
    @pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 3, 4), (0,)])
    def test_equals_the_dense_form(self, mxd, batch):
        x = torch.randn(*batch, mxd.cfg.d_in, dtype=mxd.dtype)
        close(mxd(x), reference(mxd, x, mxd.cfg))

    def test_is_a_sum_of_experts_acting_on_the_hidden_units(self, mxd):
        x = inputs(mxd)
        a, z = steps(mxd, x)["hook_sae_acts_post"], steps(mxd, x)["hook_post"]
        total = sum(a[:, n, None] * (z @ mxd.expert_weights(n)) for n in range(mxd.cfg.d_sae))
        close(mxd(x), total + mxd.b_dec)

    def test_is_a_third_order_tensor_contracted_mode_by_mode(self, mxd):
        x = inputs(mxd)
        a, z = steps(mxd, x)["hook_sae_acts_post"], steps(mxd, x)["hook_post"]
        W = torch.einsum("no,ho->nho", mxd.W_dec, mxd.W_shared)
        close(W, torch.stack([mxd.expert_weights(n) for n in range(mxd.cfg.d_sae)]))
        experts_first = torch.tensordot(a, W, dims=([1], [0]))  # [batch, h, o]
        close(mxd(x), torch.einsum("bho,bh->bo", experts_first, z) + mxd.b_dec)
        hidden_first = torch.tensordot(z, W, dims=([1], [1]))  # [batch, n, o]
        close(mxd(x), torch.einsum("bno,bn->bo", hidden_first, a) + mxd.b_dec)

    def test_mode_3_unfolding_is_a_transposed_khatri_rao_product(self, mxd):
        x = inputs(mxd)
        a, z = steps(mxd, x)["hook_sae_acts_post"], steps(mxd, x)["hook_post"]
        columns = zip(mxd.W_dec.T, mxd.W_shared.T, strict=True)
        khatri_rao = torch.stack([torch.kron(c, d) for c, d in columns], dim=1)  # [n h, o]
        stacked = torch.cat([mxd.expert_weights(n) for n in range(mxd.cfg.d_sae)])
        close(stacked, khatri_rao)
        for i in range(len(x)):
            close(mxd(x)[i], khatri_rao.T @ torch.kron(a[i], z[i]) + mxd.b_dec)

    def test_is_a_hadamard_product_of_two_matrix_products(self, mxd):
        x = inputs(mxd)
        acts, z = mxd.encode(x), mxd.hidden(x)
        close(mxd(x), (mxd.W_dec.T @ acts.T).T * (mxd.W_shared.T @ z.T).T + mxd.b_dec)

    @pytest.mark.parametrize("rank", [4, 2, 1])
    def test_every_expert_has_the_rank_of_the_shared_decoder(self, random_mxd, rank):
        mxd = random_mxd()
        left, right = torch.randn(7, rank).double(), torch.randn(rank, 4).double()
        mxd.W_shared.data = left @ right
        assert torch.linalg.matrix_rank(mxd.W_shared) == rank
        for n in range(mxd.cfg.d_sae):
            assert torch.linalg.matrix_rank(mxd.expert_weights(n)) == rank

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("act_fn", ACTIVATIONS)
    def test_activation(self, random_mxd, act_fn, gated):
        mxd = random_mxd(act_fn=act_fn, gated=gated)
        x = inputs(mxd)
        close(mxd(x), reference(mxd, x, mxd.cfg))

    @pytest.mark.parametrize("k", [1, 11])
    def test_one_expert_and_all_experts(self, random_mxd, k):
        mxd = random_mxd(k=k)
        x = inputs(mxd)
        close(mxd(x), reference(mxd, x, mxd.cfg))
        assert 1 <= (mxd.encode(x) > 0).sum(-1).max() <= k

    def test_gradients_equal_those_of_the_dense_form(self, mxd):
        x = inputs(mxd).requires_grad_()
        wanted = [x, *mxd.parameters()]
        expected = torch.autograd.grad(reference(mxd, x, mxd.cfg).sin().sum(), wanted)
        close(torch.autograd.grad(mxd(x).sin().sum(), wanted), expected)

    def test_output_has_the_dtype_of_the_input(self, random_mxd):
        mxd = random_mxd(dtype="float32")
        x = torch.randn(6, 5)
        for dtype in (torch.float64, torch.bfloat16):
            assert mxd(x.to(dtype)).dtype == dtype
        close32(mxd(x.double()).float(), mxd(x))

    def test_a_fresh_layer_starts_at_zero_with_unit_experts(self):
        mxd = MxD(MxDConfig(d_in=5, d_out=4, d_hidden=7, d_sae=11, k=3))
        assert (mxd(torch.randn(6, 5)) == 0).all()
        close32(mxd.W_dec.norm(dim=-1), torch.ones(11))
        assert mxd.hidden(torch.randn(6, 5)).abs().min() > 0


class TestSpecialCases:
    @pytest.mark.parametrize("shape", [(1, 1), (8, 3)], ids=["one", "3of8"])
    @pytest.mark.parametrize("model", MODELS)
    def test_from_mlp_computes_what_the_mlp_does(self, request, model, shape):
        mlp = request.getfixturevalue(model).blocks[1].mlp
        x = torch.randn(2, 5, 16)
        d_sae, k = shape
        mxd = MxD.from_mlp(mlp, d_sae=d_sae, k=k)
        expected = mlp(x)
        assert expected.std() > 0.1
        close32(mxd(x), expected)
        assert (mxd.encode(x) > 0).sum(-1).unique().tolist() == [k]
        assert mxd.cfg.gated == (model in ("tiny_hooked", "tiny_bridge"))

    def test_from_mlp_copies(self, tiny_hooked):
        mlp = tiny_hooked.blocks[1].mlp
        x = torch.randn(3, 16)
        mxd, expected = MxD.from_mlp(mlp), mlp(x)
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.zero_()
        close32(mxd(x), expected)

    def test_a_glu_is_a_sum_of_rank_one_experts(self, tiny_hooked):
        mlp = tiny_hooked.blocks[1].mlp
        mlp.b_in.data.zero_()
        x = torch.randn(6, 16)
        total = mlp.b_out.expand(6, -1)
        for gate, row, column in zip(mlp.W_gate.T, mlp.W_in.T, mlp.W_out, strict=True):
            W = torch.outer(row, column)
            assert torch.linalg.matrix_rank(W) == 1
            total = total + FORMULAS["silu"](x @ gate)[:, None] * (x @ W)
        close32(MxD.from_mlp(mlp)(x), total)

    def test_folding_a_hooked_glus_bias(self, tiny_hooked):
        mlp = tiny_hooked.blocks[1].mlp
        weights = read_mlp(mlp)
        assert (weights["b_in"] == 0).all() and mlp.b_in.abs().min() > 0
        close32(weights["b_dec"], mlp.b_out + mlp.W_out.T @ mlp.b_in)


class TestHooks:
    def names(self, mxd: MxD) -> list[str]:
        return [name for name in HOOKS if mxd.cfg.gated or name != "hook_pre_linear"]

    def test_each_fires_once_per_forward_in_documented_order(self, mxd):
        fired = []

        def note(tensor, hook):
            fired.append((hook.name, tuple(tensor.shape)))

        mxd.run_with_hooks(inputs(mxd, 2, 3), fwd_hooks=[(lambda _: True, note)])
        c = mxd.cfg
        widths = dict.fromkeys(HOOKS, c.d_out)
        widths |= {"hook_in": c.d_in, "hook_sae_input": c.d_in}
        widths |= {"hook_sae_acts_pre": c.d_sae, "hook_sae_acts_post": c.d_sae}
        widths |= dict.fromkeys(["hook_pre", "hook_pre_linear", "hook_post"], c.d_hidden)
        assert fired == [(name, (2, 3, widths[name])) for name in self.names(mxd)]
        assert set(mxd.hook_dict) == {*self.names(mxd), "hook_sae_error"}

    def test_each_shows_its_term_of_the_formula(self, mxd):
        x = inputs(mxd, 2, 3)
        _, cache = mxd.run_with_cache(x)
        expected = steps(mxd, x)
        assert list(cache) == list(expected) == self.names(mxd)
        for name in expected:
            close(cache[name], expected[name])

    @pytest.mark.parametrize("name", HOOKS)
    def test_editing_one_changes_the_output_as_the_formula_says(self, random_mxd, name):
        mxd = random_mxd()
        x = inputs(mxd)
        noise = torch.randn_like(steps(mxd, x)[name])

        def edited(tensor: Tensor) -> Tensor:
            return 0.5 * tensor + noise

        expected = reference(mxd, x, mxd.cfg, lambda at, t: edited(t) if at == name else t)
        found = mxd.run_with_hooks(x, fwd_hooks=[(name, lambda tensor, hook: edited(tensor))])
        close(found, expected)
        assert (found - mxd(x)).abs().max() > 1e-3

    @pytest.mark.parametrize("name", HOOKS)
    def test_gradients_flow_through_a_watched_hook(self, random_mxd, name):
        mxd = random_mxd()
        x = inputs(mxd)
        expected = torch.autograd.grad(
            reference(mxd, x, mxd.cfg).sin().sum(), list(mxd.parameters())
        )
        y = mxd.run_with_hooks(x, fwd_hooks=[(name, lambda tensor, hook: tensor * 1)])
        close(torch.autograd.grad(y.sin().sum(), list(mxd.parameters())), expected)

    def test_backward_hooks_see_the_gradient(self, random_mxd):
        mxd = random_mxd()
        x = inputs(mxd).requires_grad_()
        seen = {}

        def note(gradient, hook):
            seen[hook.name] = gradient[0] if isinstance(gradient, tuple) else gradient

        names = ["hook_experts", "hook_sae_acts_post", "hook_sae_acts_pre"]
        with mxd.hooks(bwd_hooks=[(name, note) for name in names]):
            mxd(x).sum().backward()
        terms = {}
        y = reference(mxd, x, mxd.cfg, lambda name, t: terms.setdefault(name, t))
        expected = torch.autograd.grad(y.sum(), [terms[name] for name in names])
        for name, gradient in zip(names, expected, strict=True):
            close(seen[name], gradient)


class Created(TorchDispatchMode):
    """Storages of tensors with a given last dimension and element count, as they are made."""

    def __init__(self, tokens: int, d_sae: int):
        super().__init__()
        self.size = (tokens * d_sae, d_sae)
        self.kept: dict[int, Tensor] = {}  # keeps them alive: no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.is_sparse or not tensor.ndim:
                continue
            if (tensor.numel(), tensor.shape[-1]) == self.size:
                self.kept[tensor.untyped_storage().data_ptr()] = tensor
        return out


class TestSparsity:
    def count(self, run, mxd, *batch) -> int:
        x = inputs(mxd, *batch).requires_grad_()
        with Created(math.prod(batch), mxd.cfg.d_sae) as created:
            run(x).sum().backward()
        return len(created.kept)

    @pytest.mark.parametrize("batch", [(17,), (3, 7)])
    def test_only_the_gates_pre_activations_are_dense(self, mxd, batch):
        assert self.count(mxd, mxd, *batch) == 1
        assert self.count(lambda x: reference(mxd, x, mxd.cfg), mxd, *batch) > 3

    @pytest.mark.parametrize("recipe", ["centred", "paper"])
    def test_nor_is_anything_else_while_training(self, recipe):
        mxd = training_mxd(recipe)

        def run(x):
            return training_loss(mxd, x, torch.randn(17, 4, dtype=x.dtype)).loss

        assert self.count(run, mxd, 17) == 1

    def test_looking_makes_them_dense(self, mxd):
        def run(x):
            hooks = [("hook_sae_acts_post", lambda tensor, hook: None)]
            return mxd.run_with_hooks(x, fwd_hooks=hooks)

        assert self.count(run, mxd, 17) > 1


class TestEncodeDecode:
    def test_decode_after_encode_is_forward(self, mxd):
        x = inputs(mxd, 2, 3)
        acts = mxd.encode(x)
        close(acts, steps(mxd, x)["hook_sae_acts_post"])
        close(mxd.decode(acts), mxd(x))

    def test_decode_uses_the_coefficients_it_is_given(self, mxd):
        x = inputs(mxd)
        other = torch.rand(6, 11, dtype=mxd.dtype)
        mxd.encode(x)
        expected = reference(
            mxd, x, mxd.cfg, lambda name, t: other if name == "hook_sae_acts_post" else t
        )
        close(mxd.decode(other), expected)

    def test_a_forward_in_between_does_not_disturb(self, mxd):
        x = inputs(mxd)
        acts = mxd.encode(x)
        mxd(inputs(mxd))
        close(mxd.decode(acts), mxd(x))

    def test_decode_without_encode(self, mxd):
        with pytest.raises(RuntimeError, match="no encode"):
            mxd.decode(torch.rand(6, 11, dtype=mxd.dtype))

    def test_decode_after_an_encode_of_another_shape(self, mxd):
        mxd.encode(inputs(mxd, 2, 3))
        with pytest.raises(RuntimeError, match=r"\(6, 11\) after an encode of \(2, 3, 5\)"):
            mxd.decode(torch.rand(6, 11, dtype=mxd.dtype))

    def test_decode_twice(self, mxd):
        acts = mxd.encode(inputs(mxd))
        mxd.decode(acts)
        with pytest.raises(RuntimeError, match="call encode"):
            mxd.decode(acts)


class TestDisk:
    def test_round_trip(self, mxd, tmp_path):
        mxd.cfg.metadata = SAEMetadata(hook_name="blocks.1.mlp.hook_in")
        mxd.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert isinstance(loaded, MxD) and loaded.cfg.to_dict() == mxd.cfg.to_dict()
        assert set(loaded.state_dict()) == set(mxd.state_dict())
        for name, parameter in mxd.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], parameter), name
        assert loaded.W_enc.T.is_contiguous()
        x = inputs(mxd)
        assert torch.equal(loaded(x), mxd(x))

    def test_loading_in_another_dtype(self, mxd, tmp_path):
        mxd.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path, dtype="float32")
        x = inputs(mxd)
        assert loaded.W_shared.dtype == torch.float32
        torch.testing.assert_close(loaded(x), mxd(x), rtol=1e-4, atol=1e-4)

    def test_foreign_shape(self, mxd, tmp_path):
        weights, _ = mxd.save_model(tmp_path)
        save_file(load_file(weights) | {"W_dec": torch.zeros(11, 9)}, weights)
        with pytest.raises(ValueError, match=r"not those of the mxd.*W_dec.*\(11, 9\)"):
            SAE.load_from_disk(tmp_path)

    @pytest.mark.parametrize("name", ["W_enc", "W_shared", "b_dec"])
    def test_missing_weight(self, mxd, tmp_path, name):
        weights, _ = mxd.save_model(tmp_path)
        save_file({n: w for n, w in load_file(weights).items() if n != name}, weights)
        with pytest.raises(ValueError, match=f"not those of the mxd.*{name}"):
            SAE.load_from_disk(tmp_path)

    def test_unexpected_weight(self, mxd, tmp_path):
        weights, _ = mxd.save_model(tmp_path)
        save_file(load_file(weights) | {"threshold": torch.zeros(11)}, weights)
        with pytest.raises(ValueError, match=r"not those of the mxd.*threshold"):
            SAE.load_from_disk(tmp_path)

    def test_config_that_does_not_fit_the_weights(self, random_mxd, tmp_path, edit_json):
        _, config = random_mxd(gated=True).save_model(tmp_path)
        edit_json(config, gated=False)
        with pytest.raises(ValueError, match=r"not those of the mxd.*W_hidden_gate"):
            SAE.load_from_disk(tmp_path)


class TestErrors:
    @pytest.mark.parametrize("config", [MxDConfig, TrainingMxDConfig])
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"k": 12}, "k=12 .* d_sae=11"),
            ({"k": 0}, "k=0 .* 1 <= k"),
            ({"k": -1}, "k=-1 .* 1 <= k"),
            ({"act_fn": "tanh"}, "unknown activation act_fn='tanh'; known: relu"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
            ({"normalize_activations": "layer_norm"}, "normalize_activations='none'"),
            ({"d_hidden": 0}, "d_hidden must be at least 1"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_config(self, config, fields, message):
        shape = {"d_in": 5, "d_out": 4, "d_hidden": 7, "d_sae": 11, "k": 3}
        with pytest.raises(ValueError, match=message):
            config(**(shape | fields))

    def test_recipe(self):
        with pytest.raises(ValueError, match=r"\('centred', 'paper'\), got 'best'"):
            TrainingMxDConfig(d_in=5, d_out=4, d_hidden=7, d_sae=11, k=3, recipe="best")

    @pytest.mark.parametrize("method", ["__call__", "encode"])
    def test_input_width(self, mxd, method):
        with pytest.raises(ValueError, match="width 6, this MxD has d_in=5"):
            getattr(mxd, method)(torch.randn(2, 6, dtype=mxd.dtype))

    def test_from_something_else_than_an_mlp(self, tiny_hooked):
        for module in (torch.nn.Linear(3, 3), tiny_hooked.blocks[1].attn):
            with pytest.raises(ValueError, match="neither an MLP nor a GLU"):
                MxD.from_mlp(module)

    def test_from_an_mlp_with_an_unknown_activation(self, tiny_hooked_mlp):
        mlp = tiny_hooked_mlp.blocks[1].mlp
        mlp.cfg.act_fn = "solu_ln"
        with pytest.raises(ValueError, match="unknown activation 'solu_ln'; known: relu"):
            MxD.from_mlp(mlp)

    def test_from_mlp_with_too_many_active_experts(self, tiny_hooked):
        with pytest.raises(ValueError, match=r"k=3 .* d_sae=2"):
            MxD.from_mlp(tiny_hooked.blocks[1].mlp, d_sae=2, k=3)

    def test_folding_norms_would_change_the_choice_of_experts(self, mxd):
        with pytest.raises(NotImplementedError, match="which k units"):
            mxd.fold_W_dec_norm()

    def test_hidden_units_of_another_mlp(self, random_mxd, tiny_hooked):
        with pytest.raises(ValueError, match=r"this MLP has .*16, 32.* the MxD .*5, 7"):
            random_mxd().copy_hidden_units(read_mlp(tiny_hooked.blocks[1].mlp))


@torch.no_grad()
def training_mxd(recipe: str, **fields) -> TrainingMxD:
    """A TrainingMxD in float64 with all its parameters at random, and its rows renormalised."""
    shape = {"d_in": 5, "d_out": 4, "d_hidden": 7, "d_sae": 11, "k": 3, "dtype": "float64"}
    mxd = TrainingMxD(TrainingMxDConfig(**(shape | {"recipe": recipe} | fields)))
    for parameter in mxd.parameters():
        if parameter.requires_grad:
            parameter.add_(0.7 * torch.randn_like(parameter))
    if recipe == "centred":
        mxd.gate_mean.normal_()
    mxd.renormalise()
    return mxd


def training_loss(mxd: TrainingMxD, x: Tensor, y: Tensor):
    return mxd.training_forward_pass(
        TrainStepInput(
            sae_in=torch.cat([x, y], -1),
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )


def plain_weights(mxd: TrainingMxD) -> dict[str, Tensor]:
    """Its parameters as an ordinary MxD's, unit norms and the centred gate spelled out."""
    weights = dict(mxd.named_parameters())
    weights["W_dec"] = mxd.W_dec / mxd.W_dec.norm(dim=1, keepdim=True)
    if mxd.cfg.recipe == "centred":
        columns = mxd.W_enc / mxd.W_enc.norm(dim=0, keepdim=True)
        weights["W_enc"] = columns * weights.pop("log_gate_scale").exp()
        weights["b_enc"] = -(mxd.gate_mean @ weights["W_enc"])
    return weights


@pytest.mark.parametrize("gated", [True, False], ids=["glu", "mlp"])
@pytest.mark.parametrize("recipe", ["centred", "paper"])
class TestTraining:
    @pytest.fixture
    def mxd(self, recipe, gated) -> TrainingMxD:
        return training_mxd(recipe, gated=gated)

    @pytest.fixture
    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def test_output_is_the_plain_forms(self, mxd, batch):
        x, _ = batch
        close(mxd(x), reference(plain_weights(mxd), x, mxd.cfg))

    def test_loss_and_gradients_are_the_plain_forms(self, mxd, batch):
        x, y = batch
        step = training_loss(mxd, x, y)
        y_hat = reference(plain_weights(mxd), x, mxd.cfg)

        def plain_loss(guess):
            return torch.stack(
                [(guess[i, j] - y[i, j]) ** 2 / y[i].norm() for i in range(9) for j in range(4)]
            ).mean()

        expected = plain_loss(y_hat)
        if mxd.cfg.recipe == "centred":
            pre = (x - mxd.gate_mean) @ plain_weights(mxd)["W_enc"]
            kept = pre >= pre.topk(mxd.cfg.k).values[:, -1:]
            linear = torch.where(kept, pre, 0).relu() @ mxd.W_aux + mxd.b_aux
            expected = expected + mxd.cfg.aux_loss_coefficient * plain_loss(linear)
        learned = {name: p for name, p in mxd.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(expected, list(learned.values()))
        close(step.loss, expected)
        close(step.sae_out, y_hat)
        close(step.sae_in, y)
        close(step.feature_acts.to_dense(), mxd.encode(x))
        step.loss.backward()
        for (name, parameter), gradient in zip(learned.items(), gradients, strict=True):
            assert gradient.abs().max() > 0, name
            close(parameter.grad, gradient, msg=lambda m, name=name: f"{name}: {m}")

    def test_the_auxiliary_loss_can_be_turned_off(self, mxd, batch):
        mxd.cfg.aux_loss_coefficient = 0.0
        assert list(training_loss(mxd, *batch).losses) == ["mse_loss"]

    def test_rows_of_W_dec_stay_on_the_sphere(self, mxd, batch):
        mxd.W_dec.data *= torch.rand(11, 1).double() + 0.5
        training_loss(mxd, *batch).loss.backward()
        close(mxd.W_dec.norm(dim=-1), torch.ones(11).double())
        assert mxd.W_dec.grad.abs().max() > 1e-4
        close((mxd.W_dec * mxd.W_dec.grad).sum(-1), torch.zeros(11).double())

    def test_target_of_zero_gives_a_finite_loss(self, mxd, batch):
        x, y = batch
        step = training_loss(mxd, x, torch.cat([torch.zeros_like(y[:1]), y[1:]]))
        step.loss.backward()
        assert step.loss.isfinite() and mxd.W_shared.grad.isfinite().all()

    def test_saved_for_inference_computes_the_same(self, mxd, batch, tmp_path):
        x, _ = batch
        before = {name: p.clone() for name, p in mxd.state_dict().items()}
        mxd.save_inference_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert type(loaded) is MxD and loaded.cfg.dtype == "float64"
        close(loaded(x), mxd(x))
        close(loaded.encode(x), mxd.encode(x))
        close(mxd.to_inference()(x), mxd(x))
        for name, parameter in mxd.state_dict().items():
            assert torch.equal(parameter, before[name]), f"saving changed {name}"

    def test_checkpoint_resumes(self, mxd, batch, tmp_path):
        mxd.save_model(tmp_path)
        loaded = TrainingMxD.load_from_disk(tmp_path)
        assert isinstance(loaded, TrainingMxD)
        close(loaded(batch[0]), mxd(batch[0]))
        close(training_loss(loaded, *batch).loss, training_loss(mxd, *batch).loss)
        ours, theirs = dict(mxd.named_parameters()), dict(loaded.named_parameters())
        assert {n: p.requires_grad for n, p in ours.items()} == {
            n: p.requires_grad for n, p in theirs.items()
        }

    @pytest.mark.parametrize("name", HOOKS)
    def test_editing_a_hook_point_changes_it_as_the_formula_says(self, mxd, batch, name):
        if name not in mxd.hook_dict:
            return
        x, _ = batch
        weights = plain_weights(mxd)
        expected = reference(weights, x, mxd.cfg, lambda at, t: 0.5 * t + 0.3 if at == name else t)
        hooks = [(name, lambda tensor, hook: 0.5 * tensor + 0.3)]
        close(mxd.run_with_hooks(x, fwd_hooks=hooks), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_batches_of_another_dtype(self, mxd, batch, dtype):
        x, y = (tensor.to(dtype) for tensor in batch)
        for _ in range(50):  # to where centring and norming leave W_dec alone
            mxd.renormalise()
        expected = training_loss(mxd, x.double(), y.double()).loss
        loss = training_loss(mxd, x, y).loss
        torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0)

    def test_trainer_learns_and_counts_firings(self, recipe, gated):
        torch.manual_seed(0)
        teacher = training_mxd("paper", gated=gated, dtype="float32", k=2)
        student = TrainingMxD(
            TrainingMxDConfig(
                d_in=5, d_out=4, d_hidden=32, d_sae=24, k=4, recipe=recipe, gated=gated
            )
        )
        counts = torch.zeros(24)

        @torch.no_grad()
        def data():
            while True:
                x = torch.randn(128, 5)
                student.renormalise()
                counts.add_((student.encode(x) > 0).sum(0))
                yield torch.cat([x, teacher(x)], -1)

        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=128 * 80,
                train_batch_size_samples=128,
                lr=1e-2,
                lr_end=1e-2,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            student,
            data(),
        )
        losses = []
        train_step = trainer.step
        trainer.step = lambda batch: losses.append((out := train_step(batch)).loss.item()) or out
        trainer.fit()
        assert len(losses) == 80
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
        assert counts.sum() > 80 * 128
        assert torch.equal(trainer.act_freq_scores, counts)
        assert trainer.n_frac_active_samples == 80 * 128


class TestStart:
    @pytest.fixture
    def started(self, tiny_hooked) -> tuple[TrainingMxD, Tensor, dict]:
        weights = read_mlp(tiny_hooked.blocks[1].mlp)
        mlp_in = 3 * torch.randn(2048, 16) + 5 * torch.randn(16)
        mxd = TrainingMxD(TrainingMxDConfig(d_in=16, d_out=16, d_hidden=32, d_sae=512, k=8))
        mxd.start_from(weights, mlp_in)
        return mxd, mlp_in, weights

    def test_experts_have_entries_of_size_one(self, started):
        mxd, mlp_in, _ = started
        _, cache = mxd.run_with_cache(mlp_in)
        assert cache["hook_experts"].square().mean().sqrt() == pytest.approx(1, abs=0.1)

    def test_every_pre_activation_has_mean_zero(self, started):
        mxd, mlp_in, _ = started
        _, cache = mxd.run_with_cache(mlp_in)
        pre = cache["hook_sae_acts_pre"]
        assert pre.mean(0).abs().max() < 1e-4 * pre.std()
        close32(mxd.W_enc.norm(dim=0), torch.ones(512))

    def test_hidden_units_are_the_mlps_and_the_output_zero(self, started, tiny_hooked):
        mxd, mlp_in, _ = started
        mlp = tiny_hooked.blocks[1].mlp
        z = FORMULAS["silu"](mlp_in @ mlp.W_gate) * (mlp_in @ mlp.W_in)
        torch.testing.assert_close(mxd.hidden(mlp_in), z, rtol=1e-4, atol=1e-4)
        assert (mxd(mlp_in) == 0).all()

    def test_the_papers_recipe_starts_at_random(self, started):
        _, mlp_in, weights = started
        cfg = TrainingMxDConfig(d_in=16, d_out=16, d_hidden=32, d_sae=512, recipe="paper")
        with pytest.raises(ValueError, match="centred recipe"):
            TrainingMxD(cfg).start_from(weights, mlp_in)

    def test_a_batch_of_the_wrong_width(self, started):
        mxd, mlp_in, _ = started
        with pytest.raises(ValueError, match="width 16, need d_in \\+ d_out = 32"):
            mxd.training_forward_pass(TrainStepInput(mlp_in, {}, None, 0, False))

    def test_a_copy_between_encode_and_decode(self, started):
        mxd, mlp_in, _ = started
        acts = mxd.encode(mlp_in.requires_grad_())
        other = copy.deepcopy(mxd)
        with pytest.raises(RuntimeError, match="no encode"):
            other.decode(acts)
        close32(mxd.decode(acts), mxd(mlp_in))

    def test_starting_twice_changes_nothing(self, started):
        mxd, mlp_in, weights = started
        scale = mxd.log_gate_scale.item()
        mxd.start_from(weights, mlp_in)
        assert mxd.log_gate_scale.item() == pytest.approx(scale, abs=1e-4)
