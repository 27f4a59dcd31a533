"""A layer is an MLP to TransformerLens, an SAE to SAELens and a module to PyTorch: whatever they do
to it has the effect that it has on the plain dense form."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

from mxd_lens import (
    MxD,
    MxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingMxD,
    TrainingMxDConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    splice,
)
from mxd_lens.layers.base import TopKLayer
from mxd_lens.layers.sae import SparseTopKTrainingSAE
from tests.conftest import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
close32 = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

INFERENCE: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mxd": (MxD, MxDConfig, {"d_hidden": 24}),
    "mxd_mlp": (MxD, MxDConfig, {"d_hidden": 24, "gated": False}),
    "transcoder": (TopKTranscoder, TopKTranscoderConfig, {}),
    "skip_transcoder": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
}
TRAINING: dict[str, tuple[type, type, dict[str, Any]]] = {
    "training_mxd": (TrainingMxD, TrainingMxDConfig, {"d_hidden": 24}),
    "training_mxd_paper": (TrainingMxD, TrainingMxDConfig, {"d_hidden": 24, "recipe": "paper"}),
    "training_transcoder": (TrainingTopKTranscoder, TrainingTopKTranscoderConfig, {}),
    "training_skip_transcoder": (TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig, {}),
}
LAYERS = INFERENCE | TRAINING
GATE = ["hook_sae_acts_pre", "hook_sae_acts_post"]


def make_layer(kind: str, **fields: Any) -> Any:
    """A layer with no parameter at zero or one."""
    cls, cfg, own = LAYERS[kind]
    shape = {"d_in": 16, "d_out": 16, "d_sae": 40, "k": 4}
    layer = cls(cfg(**(shape | own | fields)))
    randomise(layer)
    if "gate_mean" in dict(layer.named_buffers()):
        layer.gate_mean.normal_()
        layer.b_enc.data.zero_()
    if isinstance(layer, TrainingSAE):
        layer.renormalise()
    return layer


def dense(layer: Any, x: Tensor, edit: Callable[[str, Tensor], Tensor] = lambda _, t: t) -> Tensor:
    """The layer as einsums over all units; ``edit(hook name, tensor)`` at the gate's hooks."""
    pre = torch.einsum("...i,in->...n", x, layer.W_enc) + layer.b_enc
    if hasattr(layer, "gate_mean"):
        x_gate = x - layer.gate_mean
        pre = torch.einsum("...i,in->...n", x_gate, layer.W_enc) * layer.log_gate_scale.exp()
    pre = edit("hook_sae_acts_pre", pre)
    kth = pre.topk(layer.cfg.k, dim=-1).values[..., -1:]
    acts = edit("hook_sae_acts_post", torch.where(pre >= kth, pre.relu(), 0))
    decoded = torch.einsum("...n,no->...o", acts, layer.W_dec)
    if isinstance(layer, MxD):
        decoded = decoded * torch.einsum("...h,ho->...o", layer.hidden(x), layer.W_shared)
    if isinstance(layer, TopKSkipTranscoder):
        decoded = decoded + torch.einsum("...i,oi->...o", x, layer.W_skip)
    return decoded + layer.b_dec


def shifted(t: Tensor, hook: Any = None) -> Tensor:
    """An edit that shows at every unit."""
    return 1.5 * t + 0.2


def editing(hook_name: str) -> Callable[[str, Tensor], Tensor]:
    return lambda name, t: shifted(t) if name == hook_name else t


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def layer(kind) -> Any:
    return make_layer(kind, dtype="float64")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 16, dtype=torch.float64)


# Ways to edit what passes a hook point. Each takes the layer and the point's name.


@contextmanager
def removing(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward_hook(layer: Any, name: str) -> AbstractContextManager[None]:
    return removing(getattr(layer, name).register_forward_hook(lambda m, i, out: shifted(out)))


def forward_pre_hook(layer: Any, name: str) -> AbstractContextManager[None]:
    return removing(getattr(layer, name).register_forward_pre_hook(lambda m, i: shifted(*i)))


def global_forward_hook(layer: Any, name: str) -> AbstractContextManager[None]:
    point = getattr(layer, name)
    hook = torch_module.register_module_forward_hook
    return removing(hook(lambda m, i, out: shifted(out) if m is point else None))


def global_forward_pre_hook(layer: Any, name: str) -> AbstractContextManager[None]:
    point = getattr(layer, name)
    hook = torch_module.register_module_forward_pre_hook
    return removing(hook(lambda m, i: shifted(*i) if m is point else None))


@contextmanager
def add_hook(layer: Any, name: str, is_permanent: bool = False) -> Iterator[None]:
    getattr(layer, name).add_hook(shifted, is_permanent=is_permanent)
    try:
        yield
    finally:
        getattr(layer, name).remove_hooks(including_permanent=True)


def perma_hook(layer: Any, name: str) -> AbstractContextManager[None]:
    return add_hook(layer, name, is_permanent=True)


def hooks(layer: Any, name: str) -> AbstractContextManager[None]:
    return layer.hooks(fwd_hooks=[(name, shifted)])


@contextmanager
def patched_instance(layer: Any, name: str) -> Iterator[None]:
    point = getattr(layer, name)
    point.forward = shifted
    try:
        yield
    finally:
        del point.forward


@contextmanager
def patched_class(layer: Any, name: str) -> Iterator[None]:
    point, forward = getattr(layer, name), HookPoint.forward
    HookPoint.forward = lambda self, t: shifted(t) if self is point else t  # type: ignore
    try:
        yield
    finally:
        HookPoint.forward = forward  # type: ignore[method-assign]


@contextmanager
def another_module(layer: Any, name: str) -> Iterator[None]:
    class Shifting(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return shifted(t)

    point = getattr(layer, name)
    setattr(layer, name, Shifting())
    try:
        yield
    finally:
        setattr(layer, name, point)


EDITS = [
    forward_hook,
    forward_pre_hook,
    global_forward_hook,
    global_forward_pre_hook,
    add_hook,
    perma_hook,
    hooks,
    patched_instance,
    patched_class,
    another_module,
]


# Ways to see the gradient that passes a hook point. Each takes a list to append it to.


def backward_hook(layer: Any, name: str, seen: list) -> AbstractContextManager[None]:
    hook = getattr(layer, name).register_full_backward_hook
    return removing(hook(lambda m, i, out: seen.append(out[0])))


def backward_pre_hook(layer: Any, name: str, seen: list) -> AbstractContextManager[None]:
    hook = getattr(layer, name).register_full_backward_pre_hook
    return removing(hook(lambda m, out: seen.append(out[0])))


def global_backward_hook(layer: Any, name: str, seen: list) -> AbstractContextManager[None]:
    point = getattr(layer, name)
    hook = torch_module.register_module_full_backward_hook
    return removing(hook(lambda m, i, out: seen.append(out[0]) if m is point else None))


def global_backward_pre_hook(layer: Any, name: str, seen: list) -> AbstractContextManager[None]:
    point = getattr(layer, name)
    hook = torch_module.register_module_full_backward_pre_hook
    return removing(hook(lambda m, out: seen.append(out[0]) if m is point else None))


def bwd_hooks(layer: Any, name: str, seen: list) -> AbstractContextManager[None]:
    return layer.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(grad))])


GRADIENTS = [
    backward_hook,
    backward_pre_hook,
    global_backward_hook,
    global_backward_pre_hook,
    bwd_hooks,
]


class TestHooks:
    def test_unhooked_it_is_the_dense_form(self, layer, x):
        close(layer(x), dense(layer, x))

    @pytest.mark.parametrize("name", GATE)
    @pytest.mark.parametrize("way", EDITS, ids=lambda way: way.__name__)
    def test_every_way_to_edit_has_its_effect(self, layer, x, way, name):
        expected = dense(layer, x, editing(name))
        assert (expected - dense(layer, x)).abs().max() > 0.01
        with way(layer, name):
            close(layer(x), expected)
        close(layer(x), dense(layer, x))

    @pytest.mark.parametrize("name", GATE)
    @pytest.mark.parametrize("way", GRADIENTS, ids=lambda way: way.__name__)
    def test_every_way_to_see_the_gradient_sees_it(self, layer, x, way, name):
        points: dict[str, Tensor] = {}
        y = dense(layer, x, points.setdefault)
        (expected,) = torch.autograd.grad(y.sum(), points[name])
        assert expected.abs().max() > 0.01
        seen: list[Tensor] = []
        with way(layer, name, seen):
            layer(x).sum().backward()
        assert len(seen) == 1
        close(seen[0], expected)

    def test_the_cache_holds_the_dense_forms_steps(self, layer, x):
        expected: dict[str, Tensor] = {}
        y = dense(layer, x, expected.setdefault)
        found, cache = layer.run_with_cache(x)
        close(found, y)
        for name in GATE:
            close(cache[name], expected[name])


class TestHooksInTraining:
    @pytest.fixture(params=TRAINING)
    def kind(self, request) -> str:
        return request.param

    @staticmethod
    def batch(x: Tensor) -> TrainStepInput:
        batch = torch.cat([x, x.flip(0)], dim=-1).flatten(0, 1)
        return TrainStepInput(batch, {}, None, 0, False)

    def step(self, layer: Any, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        layer = copy.deepcopy(layer)  # a step re-normalises its weights
        out = layer.training_forward_pass(self.batch(x))
        out.loss.backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        return out, grads

    @pytest.mark.parametrize("name", GATE)
    @pytest.mark.parametrize("way", EDITS, ids=lambda way: way.__name__)
    def test_every_way_to_edit_has_its_effect(self, layer, x, way, name):
        with way(layer, name):
            out = layer.training_forward_pass(self.batch(x))
        close(out.sae_out, dense(layer, x.flatten(0, 1), editing(name)))

    @pytest.mark.parametrize("names", [GATE[:1], GATE[1:], GATE], ids=["pre", "post", "both"])
    def test_looking_changes_no_gradient(self, layer, x, names):
        before, expected = self.step(layer, x)
        with layer.hooks(fwd_hooks=[(name, lambda t, hook: None) for name in names]):
            after, found = self.step(layer, x)
        close(after.loss, before.loss)
        close(after.feature_acts.to_dense(), before.feature_acts.to_dense())
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            close(found[name], grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", GATE)
@pytest.mark.parametrize("way", EDITS, ids=lambda way: way.__name__)
def test_the_sparse_sae_is_edited_as_saelens_is(x, way, name):
    if way is patched_class and name == "hook_sae_acts_post":
        way = patched_instance  # SAELens has a subclass of its own here
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4, dtype="float64")
    theirs, ours = TopKTrainingSAE(cfg), SparseTopKTrainingSAE(cfg)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    step_input = TrainStepInput(x.flatten(0, 1), {}, None, 0, False)
    unhooked = ours.training_forward_pass(step_input).sae_out
    with way(theirs, name):
        expected = theirs.training_forward_pass(step_input).sae_out
    with way(ours, name):
        found = ours.training_forward_pass(step_input).sae_out
    close(found, expected)
    assert (found - unhooked).abs().max() > 0.01


PRECISIONS = ["float32", "float64", "bfloat16", "float16", "autocast"]


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_looking_changes_no_bit_of_the_coefficients(kind, precision):
    dtype = "float32" if precision == "autocast" else precision
    layer = make_layer(kind, d_in=24, d_sae=500, k=16, dtype=dtype)
    layer.gate_chunk_size = 100
    x = torch.randn(250, 24, dtype=layer.dtype)

    def look(t: Tensor, hook: Any) -> None:
        seen.append(t)

    seen: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        acts, y = layer.encode(x), layer(x)
        pre_only = layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", look)])
        layer.run_with_hooks(x, fwd_hooks=[(name, look) for name in GATE])
    assert torch.equal(pre_only, y)
    assert [t.dtype for t in seen] == [layer.dtype] * 3
    assert torch.equal(seen[2], acts)
    assert (acts > 0).sum() > 3000


MODELS = ["tiny_hooked", "tiny_bridge"]


MLP_WEIGHTS = {
    HookedSAETransformer: lambda lm: dict(lm.named_parameters()),
    SAETransformerBridge: lambda lm: lm.get_params(),
}
NO_NEURONS = r"has no W_out|blocks.1.mlp.hook_post"  # a transcoder has not even hidden units


class InPlace(nn.Module):
    """The dense form as an MLP."""

    def __init__(self, layer: Any, edit: Callable[[str, Tensor], Tensor] = lambda _, t: t):
        super().__init__()
        self.layer, self.edit = [layer], edit

    def forward(self, x: Tensor) -> Tensor:
        return dense(self.layer[0], x, self.edit)


class TestInAModel:
    @pytest.fixture(params=MODELS)
    def lm(self, request) -> Any:
        return request.getfixturevalue(request.param)

    @pytest.fixture(params=["mxd", "skip_transcoder", "training_mxd", "training_transcoder"])
    def layer(self, request) -> Any:
        return make_layer(request.param)

    @staticmethod
    def logits(lm: Any, layer: nn.Module, tokens: Tensor) -> Tensor:
        with splice(lm, {1: layer}):
            return lm(tokens)

    @pytest.mark.parametrize("way", ["run_with_hooks", "hooks", "add_hook", "add_perma_hook"])
    @pytest.mark.parametrize("name", GATE)
    def test_every_way_to_edit_has_its_effect(self, lm, layer, tokens, way, name):
        expected = self.logits(lm, InPlace(layer, editing(name)), tokens)
        assert (expected - self.logits(lm, layer, tokens)).abs().max() > 0.01
        full_name = f"blocks.1.mlp.{name}"
        with splice(lm, {1: layer}):
            if way == "run_with_hooks":
                found = lm.run_with_hooks(tokens, fwd_hooks=[(full_name, shifted)])
            elif way == "hooks":
                with lm.hooks(fwd_hooks=[(full_name, shifted)]):
                    found = lm(tokens)
            else:
                getattr(lm, way)(full_name, shifted)
                found = lm(tokens)
        close32(found, expected)

    @pytest.mark.parametrize("name", GATE)
    def test_an_sae_attached_to_its_coefficients_has_its_effect(self, lm, layer, tokens, name):
        metadata = SAEMetadata(hook_name=f"blocks.1.mlp.{name}")
        sae = StandardSAE(StandardSAEConfig(d_in=40, d_sae=60, metadata=metadata))
        randomise(sae)

        def edit(at: str, t: Tensor) -> Tensor:
            return sae(t) if at == name else t

        expected = self.logits(lm, InPlace(layer, edit), tokens)
        assert (expected - self.logits(lm, layer, tokens)).abs().max() > 0.01
        with splice(lm, {1: layer}):
            close32(lm.run_with_saes(tokens, saes=[sae]), expected)
            close32(lm(tokens), self.logits(lm, InPlace(layer), tokens))

    @pytest.mark.parametrize("cast", ["double", "bfloat16", "half", "to"])
    def test_it_follows_the_models_dtype(self, lm, layer, tokens, cast):
        expected = self.logits(lm, layer, tokens)
        dtype = {"double": torch.float64, "half": torch.float16}.get(cast, torch.bfloat16)
        with splice(lm, {1: layer}), torch.no_grad():
            lm.to(dtype) if cast == "to" else getattr(lm, cast)()
            lm.cfg.dtype = dtype  # of which HookedTransformer's .half() does not know
            found = lm(tokens)
            assert found.dtype == dtype
            error = (found.float() - expected).abs().median()  # other experts may fire at a token
            assert error < (1e-5 if dtype == torch.float64 else 0.1)
            assert {t.dtype for t in layer.state_dict().values()} == {dtype}
            assert (layer.dtype, layer.cfg.dtype) == (dtype, str(dtype).removeprefix("torch."))
            assert layer.W_enc.T.is_contiguous()
            assert layer.encode(torch.randn(3, 16)).dtype == dtype
            lm.to(torch.float32)
            lm.cfg.dtype = torch.float32
            assert layer.cfg.dtype == "float32" and lm(tokens).dtype == torch.float32

    def test_it_has_an_output_bias_and_no_other_weights_of_an_mlp(self, lm, layer):
        with splice(lm, {1: layer}):
            others = [block.mlp.b_out for block in lm.blocks if block.mlp is not layer]
            attention = [block.attn.b_O for block in lm.blocks]
            biases = [b for b in [*others, *attention] if b is not None]
            close32(lm.accumulated_bias(3), sum(biases) + layer.b_dec)
            for name in ["W_in", "b_in", "W_gate", "W_out"]:
                for of in [lm, layer]:
                    with pytest.raises(RuntimeError, match=f"has no {name}"):
                        getattr(of, name)
        assert lm.W_out.shape == (3, 32, 16)

    def test_the_weights_of_all_mlps_cannot_be_had(self, lm, layer):
        assert "blocks.1.mlp.W_in" in MLP_WEIGHTS[type(lm)](lm)
        with splice(lm, {1: layer}):
            try:
                weights = MLP_WEIGHTS[type(lm)](lm)
            except RuntimeError as error:
                assert "has no W_in" in str(error)
            else:
                assert "blocks.1.mlp.W_in" not in weights

    @pytest.mark.parametrize("lm", ["tiny_hooked", "plain_bridge"], indirect=True)
    def test_it_has_no_neurons(self, lm, layer, tokens):
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            for read in [cache.get_neuron_results, cache.stack_neuron_results]:
                with pytest.raises((RuntimeError, KeyError), match=NO_NEURONS):
                    read(1 if read == cache.get_neuron_results else 2)

    @pytest.mark.parametrize("lm", ["tiny_hooked", "plain_bridge"], indirect=True)
    def test_the_residual_streams_parts_add_up(self, lm, layer, tokens):
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            parts = cache.decompose_resid(mode="all")
            close32(parts.sum(0), cache["blocks.2.hook_resid_post"])
            close32(cache["mlp_out", 1], dense(layer, cache["blocks.1.mlp.hook_in"]))


def test_folding_a_norm_into_weights_it_does_not_have_is_refused(tiny_hooked, kind):
    with (
        splice(tiny_hooked, {1: make_layer(kind)}),
        pytest.raises(AssertionError, match=r"MLP W_in not found"),
    ):
        tiny_hooked.fold_layer_norm(tiny_hooked.state_dict(), False, False)


def test_centering_the_others_weights_changes_nothing(tiny_hooked_mlp, kind, tokens):
    lm, layer = tiny_hooked_mlp, make_layer(kind)
    with splice(lm, {1: layer}), torch.no_grad():
        expected, weights = lm(tokens), copy.deepcopy(layer.state_dict())
        state_dict = lm.center_writing_weights(lm.state_dict())
        lm.load_state_dict(state_dict)
        assert all(torch.equal(layer.state_dict()[name], weights[name]) for name in weights)
        torch.testing.assert_close(lm(tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fold",
    [
        lambda layer: layer.fold_W_dec_norm(),
        lambda layer: layer.fold_and_get_W_dec_norm(),
        lambda layer: layer.fold_activation_norm_scaling_factor(2.0),
        lambda layer: layer.fold_activation_whitening(
            torch.zeros(16), torch.eye(16), torch.eye(16)
        ),
    ],
    ids=["W_dec_norm", "and_get_W_dec_norm", "activation_norm_scaling_factor", "whitening"],
)
def test_what_only_an_sae_can_fold_is_refused(layer, fold):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NotImplementedError):
        fold(layer)
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight, before[name])


class TestOfAnotherWidth:
    """Output wider than the input."""

    @pytest.fixture
    def layer(self, kind) -> Any:
        return make_layer(kind, d_out=20, dtype="float64")

    def test_has_a_transcoders_methods(self, layer, x):
        assert layer.d_out == 20
        assert torch.equal(layer.process_sae_in(x.float()), x.float().double())
        y, acts = layer.forward_with_activations(x)
        points: dict[str, Tensor] = {}
        close(y, dense(layer, x, points.setdefault))
        close(acts, points["hook_sae_acts_post"])

    def test_process_sae_in_fires_saelens_hook(self, layer, x):
        seen = []
        hook = ("hook_sae_input", lambda t, hook: seen.append(t))
        with layer.hooks(fwd_hooks=[hook]):
            layer.process_sae_in(x)
        assert len(seen) == 1 and torch.equal(seen[0], x)


def pre_of(layer: Any, x: Tensor) -> Tensor:
    return layer.run_with_cache(x)[1]["hook_sae_acts_pre"]


class TestCopies:
    def test_a_deep_copy_is_independent(self, layer, x):
        twin = copy.deepcopy(layer)
        expected = layer(x)
        layer.to(torch.float32)
        assert twin.cfg.dtype == "float64" and torch.equal(twin(x), expected)

    def test_a_pickled_one_is_the_same(self, layer, x):
        layer.encode(x)  # whose input is not taken along
        twin = pickle.loads(pickle.dumps(layer))
        assert type(twin) is type(layer) and twin.cfg == layer.cfg
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(pre_of(twin, x), pre_of(layer, x))
        assert torch.equal(twin.process_sae_in(x), x)

    def test_a_state_dict_on_disk(self, kind, layer, x, tmp_path):
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        twin = make_layer(kind, dtype="float64")
        twin.load_state_dict(torch.load(tmp_path / "layer.pt"))
        assert torch.equal(twin(x), layer(x))

    def test_assigned_weights_bring_their_dtype(self, kind, layer, x):
        twin = make_layer(kind, dtype="float32")
        twin.load_state_dict(layer.state_dict(), assign=True)
        assert (twin.dtype, twin.cfg.dtype) == (torch.float64, "float64")
        close(twin(x), layer(x))

    def test_a_device_without_numbers(self, layer):
        empty = copy.deepcopy(layer).to_empty(device="meta")
        assert (empty.device, empty.cfg.device) == (torch.device("meta"), "meta")
        assert layer.cfg.device == "cpu" and empty.W_enc.T.is_contiguous()

    def test_to_of_a_tensor(self, layer):
        layer.to(torch.zeros(1, dtype=torch.bfloat16))
        assert layer.cfg.dtype == "bfloat16" and layer.W_dec.dtype == torch.bfloat16


class TestDisk:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_a_cast_layer_comes_back_as_it_was(self, kind, tmp_path, dtype):
        layer = make_layer(kind)
        holder = nn.Sequential(layer).to(getattr(torch, dtype))  # not the layer's own .to()
        x = torch.randn(5, 16)
        training = kind in TRAINING
        path, _ = (layer.save_inference_model if training else layer.save_model)(tmp_path / "out")
        assert json.loads((path.parent / "cfg.json").read_text())["dtype"] == dtype
        loaded = SAE.load_from_disk(path.parent)
        assert loaded.cfg.dtype == dtype and loaded.W_enc.dtype == getattr(torch, dtype)
        expected = layer.to_inference() if training else holder[0]
        assert torch.equal(loaded(x), expected(x))
        assert expected.cfg.dtype == dtype

    def test_loaded_in_another_dtype(self, kind, tmp_path):
        layer = make_layer(kind)
        save = layer.save_inference_model if kind in TRAINING else layer.save_model
        save(tmp_path)
        loaded = SAE.load_from_disk(tmp_path, dtype="float64")
        assert loaded.cfg.dtype == "float64" and loaded.W_dec.dtype == torch.float64
        x = torch.randn(5, 16)
        close32(loaded(x), layer(x))

    def test_a_loader_that_does_not_cast(self, kind, tmp_path):
        """As SAELens lets one bring."""
        layer = make_layer(kind)
        inference = layer.to_inference() if kind in TRAINING else layer

        def converter(path: Path, device: str, cfg_overrides: Any) -> tuple[dict, dict]:
            weights = {name: p.detach() for name, p in inference.state_dict().items()}
            return inference.cfg.to_dict() | (cfg_overrides or {}), weights

        loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16", converter=converter)
        assert isinstance(loaded, TopKLayer)
        assert loaded.cfg.dtype == "bfloat16" and loaded.W_dec.dtype == torch.bfloat16
