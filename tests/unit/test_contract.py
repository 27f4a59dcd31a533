"""A layer is an MLP to TransformerLens, an SAE to SAELens and a module to PyTorch: whatever they do
to it has the effect that it has on the plain form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.sae import SparseTopKTrainingSAE
from mxd_lens.models.splice import splice
from tests.conftest import D_MLP, D_MODEL, N_LAYERS, randomise
from tests.helpers import (
    KINDS,
    MODEL_SHAPE,
    SPARSE,
    TRAINING,
    close,
    close32,
    make_layer,
    training_step,
)
from tests.reference import Edit, at, reference, steps

GATE = ["hook_sae_acts_pre", "hook_sae_acts_post"]


def shifted(t: Tensor, hook: Any = None) -> Tensor:
    """An edit that shows at every unit."""
    return 1.5 * t + 0.2


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 5, dtype=torch.float64)


class Shifting(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return shifted(t)


REGISTER: dict[str, Callable[[HookPoint, Callable], Any]] = {
    "forward_hook": HookPoint.register_forward_hook,
    "forward_pre_hook": HookPoint.register_forward_pre_hook,
    "global_forward_hook": lambda _, hook: torch_module.register_module_forward_hook(hook),
    "global_forward_pre_hook": lambda _, hook: torch_module.register_module_forward_pre_hook(hook),
}
REGISTER_BACKWARD: dict[str, Callable[[HookPoint, Callable], Any]] = {
    "hook": HookPoint.register_full_backward_hook,
    "pre_hook": HookPoint.register_full_backward_pre_hook,
    "global_hook": lambda _, hook: torch_module.register_module_full_backward_hook(hook),
    "global_pre_hook": lambda _, hook: torch_module.register_module_full_backward_pre_hook(hook),
}
"""PyTorch's ways to hook a module; the last of what a hook is called with is what passes."""
EDITS = [*REGISTER, "add_hook", "perma_hook", "hooks", "patched_instance", "patched_class"]
EDITS += ["another_module"]


def last(t: Any) -> Tensor:
    return t if isinstance(t, Tensor) else last(t[-1])


@contextmanager
def edited(layer: Any, name: str, way: str) -> Iterator[None]:
    """What passes a hook point is shifted, in one of the EDITS."""
    point = getattr(layer, name)

    def hook(module: nn.Module, *t: Any) -> Tensor | None:
        return shifted(last(t)) if module is point else None

    def forward(self: nn.Module, t: Tensor) -> Tensor:
        return shifted(t) if self is point else t

    with ExitStack() as undo, pytest.MonkeyPatch.context() as patch:
        if way in REGISTER:
            undo.callback(REGISTER[way](point, hook).remove)
        elif way in ("add_hook", "perma_hook"):
            point.add_hook(shifted, is_permanent=way == "perma_hook")
            undo.callback(point.remove_hooks, including_permanent=True)
        elif way == "hooks":
            undo.enter_context(layer.hooks(fwd_hooks=[(name, shifted)]))
        elif way == "another_module":
            patch.setitem(layer._modules, name, Shifting())
        elif way == "patched_instance":
            patch.setattr(point, "forward", shifted)
        else:
            patch.setattr(HookPoint, "forward", forward)
        yield


@pytest.mark.parametrize("name", GATE)
@pytest.mark.parametrize("kind", SPARSE)
class TestHooks:
    @pytest.mark.parametrize("way", EDITS)
    def test_every_way_to_edit_has_its_effect(self, layer, x, way, name):
        expected = reference(layer, x, at(name, shifted))
        assert (expected - reference(layer, x)).abs().max() > 0.01
        with edited(layer, name, way):
            close(layer(x), expected)
        close(layer(x), reference(layer, x))

    @pytest.mark.parametrize("way", REGISTER_BACKWARD)
    def test_every_way_to_see_the_gradient_sees_it(self, layer, x, way, name):
        terms, point = steps(layer, x), getattr(layer, name)
        (expected,) = torch.autograd.grad(terms["hook_out"].sum(), terms[name])
        assert expected.abs().max() > 0.01
        seen: list[Tensor] = []

        def hook(module: nn.Module, *grads: Any) -> None:
            if module is point:
                seen.append(last(grads))

        handle = REGISTER_BACKWARD[way](point, hook)
        layer(x).sum().backward()
        handle.remove()
        assert len(seen) == 1
        close(seen[0], expected)


def gradients(layer: Any, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    layer = copy.deepcopy(layer)  # a step re-normalises its weights
    out = training_step(layer, x, x.flip(0)[..., :4])
    out.loss.backward()
    return out, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [kind for kind in TRAINING if kind in SPARSE])
class TestHooksInTraining:
    @pytest.mark.parametrize("name", GATE)
    @pytest.mark.parametrize("way", EDITS)
    def test_every_way_to_edit_has_its_effect(self, layer, x, way, name):
        x = x.flatten(0, 1)
        with edited(layer, name, way):
            out = training_step(layer, x, x[:, :4])
        close(out.sae_out, reference(layer, x, at(name, shifted)))

    @pytest.mark.parametrize("names", [GATE[:1], GATE[1:], GATE], ids=["pre", "post", "both"])
    def test_looking_changes_no_gradient(self, layer, x, names):
        x = x.flatten(0, 1)
        before, expected = gradients(layer, x)
        with layer.hooks(fwd_hooks=[(name, lambda t, hook: None) for name in names]):
            after, found = gradients(layer, x)
        close(after.loss, before.loss)
        close(after.feature_acts.to_dense(), before.feature_acts.to_dense())
        close(found, expected)


@pytest.mark.parametrize("name", GATE)
@pytest.mark.parametrize("way", EDITS)
def test_the_sparse_sae_is_edited_as_saelens_is(x, way, name):
    if way == "patched_class" and name == "hook_sae_acts_post":
        way = "patched_instance"  # SAELens has a subclass of its own here
    cfg = TopKTrainingSAEConfig(d_in=5, d_sae=11, k=3, dtype="float64")
    theirs, ours = TopKTrainingSAE(cfg), SparseTopKTrainingSAE(cfg)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    step_input = TrainStepInput(x.flatten(0, 1), {}, None, 0, False)
    unhooked = ours.training_forward_pass(step_input).sae_out
    with edited(theirs, name, way):
        expected = theirs.training_forward_pass(step_input).sae_out
    with edited(ours, name, way):
        found = ours.training_forward_pass(step_input).sae_out
    close(found, expected)
    assert (found - unhooked).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", SPARSE)
@torch.no_grad()
def test_looking_changes_no_bit_of_the_activations(kind, precision, monkeypatch):
    dtype = "float32" if precision == "autocast" else precision
    layer = make_layer(kind, 0.3, d_in=24, d_out=16, d_sae=500, k=16, dtype=dtype)
    monkeypatch.setattr(type(layer), "gate_chunk_size", 100)
    x = torch.randn(250, 24, dtype=layer.dtype)
    seen: list[Tensor] = []

    def look(t: Tensor, hook: Any) -> None:
        seen.append(t)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        acts, y = layer.encode(x), layer(x)
        pre_only = layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", look)])
        layer.run_with_hooks(x, fwd_hooks=[(name, look) for name in GATE])
    assert torch.equal(pre_only, y)
    assert [t.dtype for t in seen] == [layer.dtype] * 3
    assert torch.equal(seen[2], acts)
    assert (acts > 0).sum() > 3000


class InPlace(nn.Module):
    """The plain form as an MLP."""

    def __init__(self, layer: Any, edit: Edit = lambda _, t: t):
        super().__init__()
        self.layer, self.edit = [layer], edit

    def forward(self, x: Tensor) -> Tensor:
        return reference(self.layer[0], x, self.edit)


class TestInAModel:
    @pytest.fixture(params=["mxd", "molt", "topk_skip_transcoder", "training_mxd", "jumprelu_mxd"])
    def layer(self, request) -> Any:
        return make_layer(request.param, 0.3, **MODEL_SHAPE)

    @staticmethod
    def logits(lm: Any, layer: nn.Module, tokens: Tensor) -> Tensor:
        with splice(lm, {1: layer}):
            return lm(tokens)

    @pytest.mark.parametrize("way", ["run_with_hooks", "hooks", "add_hook", "add_perma_hook"])
    @pytest.mark.parametrize("name", GATE)
    def test_every_way_to_edit_has_its_effect(self, lm, layer, tokens, way, name):
        expected = self.logits(lm, InPlace(layer, at(name, shifted)), tokens)
        assert (expected - self.logits(lm, layer, tokens)).abs().max() > 0.01
        hook = (f"blocks.1.mlp.{name}", shifted)
        with splice(lm, {1: layer}):
            if way == "run_with_hooks":
                found = lm.run_with_hooks(tokens, fwd_hooks=[hook])
            elif way == "hooks":
                with lm.hooks(fwd_hooks=[hook]):
                    found = lm(tokens)
            else:
                getattr(lm, way)(*hook)
                found = lm(tokens)
        close32(found, expected)

    @pytest.mark.parametrize("name", GATE)
    def test_an_sae_attached_to_its_activations_has_its_effect(self, lm, layer, tokens, name):
        metadata = SAEMetadata(hook_name=f"blocks.1.mlp.{name}")
        sae = StandardSAE(StandardSAEConfig(d_in=40, d_sae=60, metadata=metadata))
        randomise(sae)
        expected = self.logits(lm, InPlace(layer, at(name, sae)), tokens)
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
            assert layer.encode(torch.randn(3, D_MODEL)).dtype == dtype
            lm.to(torch.float32)
            lm.cfg.dtype = torch.float32
            assert layer.cfg.dtype == "float32" and lm(tokens).dtype == torch.float32

    def test_it_has_an_output_bias_and_no_other_weights_of_an_mlp(self, lm, layer):
        with splice(lm, {1: layer}):
            others = [block.mlp.b_out for block in lm.blocks if block.mlp is not layer]
            biases = [b for b in others + [block.attn.b_O for block in lm.blocks] if b is not None]
            close32(lm.accumulated_bias(N_LAYERS), sum(biases) + layer.b_dec)
            for name in ["W_in", "b_in", "W_gate", "W_out"]:
                for of in [lm, layer]:
                    with pytest.raises(RuntimeError, match=f"has no {name}"):
                        getattr(of, name)
        assert lm.W_out.shape == (N_LAYERS, D_MLP, D_MODEL)

    def test_the_weights_of_all_mlps_cannot_be_had(self, lm, layer):
        def weights() -> dict[str, Tensor]:
            hooked = isinstance(lm, HookedSAETransformer)
            return dict(lm.named_parameters()) if hooked else lm.get_params()

        assert "blocks.1.mlp.W_in" in weights()
        with splice(lm, {1: layer}):
            try:
                assert "blocks.1.mlp.W_in" not in weights()
            except RuntimeError as error:
                assert "has no W_in" in str(error)

    @pytest.mark.parametrize("lm", ["tiny_hooked", "plain_bridge"], indirect=True)
    def test_it_has_no_neurons_but_its_part_of_the_residual_stream(self, lm, layer, tokens):
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            # A transcoder has not even hidden units.
            for read, n in [(cache.get_neuron_results, 1), (cache.stack_neuron_results, 2)]:
                with pytest.raises(
                    (RuntimeError, KeyError), match=r"has no W_out|blocks.1.mlp.hook_post"
                ):
                    read(n)
            parts = cache.decompose_resid(mode="all")
            close32(parts.sum(0), cache["blocks.2.hook_resid_post"])
            close32(cache["mlp_out", 1], reference(layer, cache["blocks.1.mlp.hook_in"]))


class TestWeightsThatAreProcessed:
    @pytest.fixture
    def layer(self, kind) -> Any:
        return make_layer(kind, 0.3, **MODEL_SHAPE)

    def test_folding_a_norm_into_weights_it_does_not_have_is_refused(self, tiny_hooked, layer):
        with (
            splice(tiny_hooked, {1: layer}),
            pytest.raises(AssertionError, match=r"MLP W_in not found"),
        ):
            tiny_hooked.fold_layer_norm(tiny_hooked.state_dict(), False, False)

    # In a batch top-k gate two tokens of the same inputs tie.
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if "batchtopk" not in kind])
    def test_centering_the_others_weights_changes_nothing(self, tiny_hooked_mlp, layer, tokens):
        lm = tiny_hooked_mlp
        with splice(lm, {1: layer}), torch.no_grad():
            expected, weights = lm(tokens), copy.deepcopy(layer.state_dict())
            lm.load_state_dict(lm.center_writing_weights(lm.state_dict()))
            torch.testing.assert_close(layer.state_dict(), weights, rtol=0, atol=0)
            torch.testing.assert_close(lm(tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fold", "arguments"),
    [
        ("fold_W_dec_norm", []),
        ("fold_and_get_W_dec_norm", []),
        ("fold_activation_norm_scaling_factor", [2.0]),
        ("fold_activation_whitening", [torch.zeros(5), torch.eye(5), torch.eye(5)]),
    ],
)
def test_what_only_an_sae_can_fold_is_refused(layer, fold, arguments):
    before = copy.deepcopy(layer.state_dict())
    why = "only an SAE's output" if "activation" in fold else "which k units are the largest"
    with pytest.raises(NotImplementedError, match=why):
        getattr(layer, fold)(*arguments)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


class TestCopies:
    def test_a_deep_copy_is_independent(self, layer, x):
        acts = layer.encode(x.requires_grad_())  # whose input is not taken along
        twin, expected = copy.deepcopy(layer), layer(x)
        assert twin._to_decode is None
        close(layer.decode(acts), expected)
        layer.to(torch.float32)
        assert twin.cfg.dtype == "float64" and torch.equal(twin(x), expected)

    def test_a_pickled_one_is_the_same(self, layer, x):
        layer.encode(x)  # whose input is not taken along
        twin = pickle.loads(pickle.dumps(layer))
        assert type(twin) is type(layer) and twin.cfg == layer.cfg
        (y, cache), (expected, theirs) = twin.run_with_cache(x), layer.run_with_cache(x)
        assert torch.equal(twin(x), layer(x)) and torch.equal(y, expected)
        for name in {"hook_sae_input", *GATE} & theirs.keys():
            assert torch.equal(cache[name], theirs[name])

    def test_assigned_weights_bring_their_dtype(self, kind, layer, x):
        twin = make_layer(kind, dtype="float32")
        twin.load_state_dict(layer.state_dict(), assign=True)
        assert (twin.dtype, twin.cfg.dtype) == (torch.float64, "float64")
        close(twin(x), layer(x))

    def test_a_device_without_numbers(self, kind, layer):
        empty = copy.deepcopy(layer).to_empty(device="meta")
        assert (empty.device, empty.cfg.device) == (torch.device("meta"), "meta")
        assert layer.cfg.device == "cpu"
        assert kind not in SPARSE or empty.W_enc.T.is_contiguous()

    def test_to_of_a_tensor(self, layer):
        layer.to(torch.zeros(1, dtype=torch.bfloat16))
        assert layer.cfg.dtype == "bfloat16" and layer.W_dec.dtype == torch.bfloat16
