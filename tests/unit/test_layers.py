"""Every layer against its definition: values, gradients, hooks, training and the disk."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxd_lens.runs.config import TrainConfig
from tests.conftest import TINY_RUN
from tests.helpers import (
    INFERENCE,
    KINDS,
    RAGGED,
    SHAPE,
    SPARSE,
    TOPK,
    TRAINING,
    close,
    close32,
    make_config,
    make_layer,
    same,
    training_step,
)
from tests.reference import at, plain_loss, reference, steps

GLU = ["hook_pre", "hook_pre_linear", "hook_post"]
INPUT, OUTPUT = ["hook_in", "hook_sae_input"], ["hook_sae_recons", "hook_sae_output", "hook_out"]
GATE = ["hook_sae_acts_pre", "hook_codes", "hook_sae_acts_post"]


def hook_names(kind: str) -> list[str]:
    """In the documented order."""
    units = [name for name in GLU if "mlp" not in kind or name != "hook_pre_linear"]
    if kind not in SPARSE:
        return [*INPUT, *units, "hook_sae_acts_post", *OUTPUT]
    if "mxd" not in kind:
        return [*INPUT, *GATE, *OUTPUT]
    return [*INPUT, *GATE, "hook_experts", *units, "hook_shared", *OUTPUT]


KIND_AND_HOOK = [(kind, name) for kind in KINDS for name in hook_names(kind)]


def grads(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``sin(y).sum()``, by name, where there are any."""
    found = torch.autograd.grad(y.sin().sum(), list(tensors.values()), allow_unused=True)
    return {name: g for name, g in zip(tensors, found, strict=True) if g is not None}


def learned(layer: Any) -> dict[str, Tensor]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


class TestDefinition:
    @pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 3, 4), (0,)])
    def test_equals_the_plain_form(self, kind, layer, batch):
        x = torch.randn(*batch, 5, dtype=torch.float64)
        expected = reference(layer, x)
        close(layer(x), expected)
        hooks = [(name, lambda t, hook: None) for name in hook_names(kind)]
        close(layer.run_with_hooks(x, fwd_hooks=hooks), expected)

    @pytest.mark.parametrize("k", [1, 11])
    @pytest.mark.parametrize("kind", TOPK)
    def test_one_unit_and_all_units(self, kind, x, k):
        layer = make_layer(kind, k=k)
        close(layer(x), reference(layer, x))
        assert 1 <= (layer.encode(x) > 0).sum(-1).max() <= k

    def test_gradients_equal_those_of_the_plain_form(self, layer, x):
        wanted = {"x": x.requires_grad_(), **learned(layer)}
        expected = grads(reference(layer, x), wanted)
        assert {"x", "W_dec", "b_dec"} <= expected.keys()
        close(grads(layer(x), wanted), expected)

    def test_output_has_the_dtype_of_the_input(self, kind):
        layer, x = make_layer(kind, dtype="float32"), torch.randn(6, 5)
        for dtype in (torch.float64, torch.bfloat16):
            assert layer(x.to(dtype)).dtype == dtype
        close32(layer(x.double()).float(), layer(x))

    def test_a_fresh_layer(self, kind, x):
        layer = KINDS[kind][0](make_config(kind))
        parameters = dict(layer.named_parameters())
        for name in {"W_enc", "W_read", "W_hidden", "W_hidden_gate"} & parameters.keys():
            assert parameters[name].abs().max() > 0
            if not hasattr(layer, "gate_mean") or name != "W_enc":
                assert parameters[name].abs().max() <= 5**-0.5
        for name in {"b_enc", "b_dec", "b_hidden", "b_hidden_gate"} & parameters.keys():
            assert (parameters[name] == 0).all()
        if "transcoder" in kind and "skip" not in kind:
            assert (layer(x) != 0).any()
        else:
            assert (layer(x) == 0).all()
        if kind in SPARSE:
            assert layer.W_enc.T.is_contiguous()
        if kind in SPARSE and "skip" not in kind and "molt" not in kind:
            close(layer.W_dec.norm(dim=-1), torch.ones(11).double())
        if hasattr(layer, "hidden"):
            assert layer.hidden(x).abs().min() > 0

    def test_has_a_transcoders_methods(self, layer, x):
        assert layer.d_out == layer.cfg.d_out == 4
        assert torch.equal(layer.process_sae_in(x.float()), x.float().double())
        y, acts = layer.forward_with_activations(x)
        close(y, reference(layer, x))
        close(acts, steps(layer, x)["hook_sae_acts_post"])


class TestHooks:
    def test_each_fires_once_in_documented_order_with_its_term_of_the_formula(self, kind, layer):
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        fired = []

        def note(t: Any, hook: Any) -> None:
            fired.append((hook.name, t))

        y = layer.run_with_hooks(x, fwd_hooks=[(lambda _: True, note)])
        expected = steps(layer, x)
        assert [name for name, _ in fired] == hook_names(kind) == list(expected)
        for name, t in fired:
            close(t.to_dense() if name == "hook_codes" else t, expected[name])
        close(y, expected["hook_out"])
        never = {"hook_sae_error"} | ({*GATE[:2]} if kind not in SPARSE else set())
        assert set(layer.hook_dict) == {*hook_names(kind)} | never

    @pytest.mark.parametrize(("kind", "name"), KIND_AND_HOOK)
    def test_editing_one_changes_the_output_as_the_formula_says(self, layer, x, name):
        noise = torch.randn_like(steps(layer, x)[name])

        def edited(t: Any) -> Any:
            if name != "hook_codes":
                return 0.5 * t + noise
            return 0.5 * t if isinstance(t, Tensor) else t.with_values(0.5 * t.values)

        found = layer.run_with_hooks(x, fwd_hooks=[(name, lambda t, hook: edited(t))])
        close(found, reference(layer, x, at(name, edited)))
        assert (found - layer(x)).abs().max() > 1e-3

    @pytest.mark.parametrize(("kind", "name"), KIND_AND_HOOK)
    def test_gradients_flow_through_a_hook(self, layer, x, name):
        def copied(t: Any, hook: Any) -> Any:
            return t * 1 if isinstance(t, Tensor) else t.with_values(t.values * 1)

        expected = grads(reference(layer, x), learned(layer))
        y = layer.run_with_hooks(x, fwd_hooks=[(name, copied)])
        close(grads(y, learned(layer)), expected)

    def test_backward_hooks_see_the_gradient(self, kind, layer, x):
        seen = {}

        def note(gradient, hook):
            seen[hook.name] = gradient[0] if isinstance(gradient, tuple) else gradient

        names = [name for name in hook_names(kind) if name not in (*INPUT, "hook_codes")]
        with layer.hooks(bwd_hooks=[(name, note) for name in names]):
            layer(x.requires_grad_()).sin().sum().backward()
        terms = steps(layer, x)
        y = terms.pop("hook_out")
        expected = grads(y, {name: terms[name] for name in names if name in terms})
        assert set(expected) == {*names} - {"hook_out"}
        close({name: seen[name] for name in expected}, expected)
        close(seen["hook_out"], y.cos())


class Created(TorchDispatchMode):
    """Storages of numbers with a given last dimension and element count, as they are made."""

    def __init__(self, tokens: int, d_sae: int):
        super().__init__()
        self.size = (tokens * d_sae, d_sae)
        self.kept: dict[int, Tensor] = {}  # keeps them alive: no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, Tensor) or t.is_sparse or not t.ndim or t.dtype == torch.bool:
                continue
            if (t.numel(), t.shape[-1]) == self.size:
                self.kept[t.untyped_storage().data_ptr()] = t
        return out


class TestSparsity:
    @staticmethod
    def count(run: Any, *batch: int) -> int:
        x = torch.randn(*batch, 5, dtype=torch.float64, requires_grad=True)
        with Created(math.prod(batch), 11) as created:
            run(x).sum().backward()
        return len(created.kept)

    @pytest.mark.parametrize("kind", [kind for kind in SPARSE if "molt" not in kind])
    @pytest.mark.parametrize("batch", [(17,), (3, 7)])
    def test_only_the_gates_pre_activations_are_dense(self, layer, batch):
        assert self.count(layer, *batch) == 1
        assert self.count(lambda x: reference(layer, x), *batch) > 3

    @pytest.mark.parametrize(
        "kind", [kind for kind in TRAINING if kind in SPARSE and "molt" not in kind]
    )
    def test_nor_is_anything_else_while_training(self, kind):
        layer, y = make_layer(kind), torch.randn(17, 4, dtype=torch.float64)
        assert self.count(lambda x: training_step(layer, x, y).loss, 17) == 1

    @pytest.mark.parametrize("kind", SPARSE)
    def test_looking_makes_them_dense(self, layer):
        hooks = [("hook_sae_acts_post", lambda t, hook: None)]
        assert self.count(lambda x: layer.run_with_hooks(x, fwd_hooks=hooks), 17) > 1


class TestEncodeDecode:
    def test_decode_after_encode_is_forward(self, layer):
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        acts = layer.encode(x)
        close(acts, steps(layer, x)["hook_sae_acts_post"])
        layer(torch.randn_like(x))  # which does not disturb
        close(layer.decode(acts), layer(x))

    def test_decode_uses_the_activations_it_is_given(self, layer, x):
        other = torch.rand(6, 11, dtype=torch.float64)
        layer.encode(x)
        close(layer.decode(other), reference(layer, x, at("hook_sae_acts_post", lambda _: other)))

    def test_the_input_that_decode_needs(self, layer, x):
        acts = layer.encode(x)
        if not layer.decode_reads_input:
            for _ in range(2):
                close(layer.decode(acts), layer(x))
            return
        with pytest.raises(RuntimeError, match=r"\(2, 11\) after an encode of \(6, 5\)"):
            layer.decode(acts[:2])
        with pytest.raises(RuntimeError, match=r"no encode.* call encode"):
            layer.decode(acts)
        layer.decode(layer.encode(x))
        with pytest.raises(RuntimeError, match="no encode"):
            layer.decode(acts)


def saved(layer: Any, folder: Path) -> Any:
    """A layer's file for inference; the layer as it is in there."""
    if isinstance(layer, TrainingSAE):
        layer.save_inference_model(folder)
        return layer.to_inference()
    layer.save_model(folder)
    return layer


@pytest.mark.parametrize("kind", [*INFERENCE, *(kind for kind in TRAINING if kind not in RAGGED)])
class TestSavedForInference:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_a_layer_in_any_dtype_comes_back_as_it_was(self, kind, tmp_path, dtype):
        layer, x = make_layer(kind, dtype="float32"), torch.randn(5, 5)
        nn.Sequential(layer).to(getattr(torch, dtype))  # not the layer's own .to()
        layer.cfg.metadata = SAEMetadata(hook_name="a", hook_name_out="b")
        before = copy.deepcopy(layer.state_dict())
        expected = saved(layer, tmp_path)
        same(layer.state_dict(), before)
        loaded = SAE.load_from_disk(tmp_path)
        as_what = re.sub("_paper_mlp|_paper|_meaningful", "", kind.removeprefix("training_"))
        assert type(loaded) is type(expected) is INFERENCE[as_what][0]
        assert loaded.cfg.to_dict() == expected.cfg.to_dict()
        assert loaded.cfg.metadata.hook_name == "a" and loaded.cfg.metadata.hook_name_out == "b"
        assert loaded.cfg.dtype == json.loads((tmp_path / "cfg.json").read_text())["dtype"] == dtype
        same(loaded.state_dict(), expected.state_dict())
        assert loaded.W_dec.dtype == getattr(torch, dtype)
        assert not hasattr(layer, "W_enc") or loaded.W_enc.T.is_contiguous()
        assert torch.equal(loaded(x), expected(x))

    @pytest.mark.parametrize(("before", "after"), [("float32", "float64"), ("float64", "float32")])
    def test_loaded_in_another_dtype(self, kind, tmp_path, before, after):
        layer, x = make_layer(kind, dtype=before), torch.randn(5, 5)
        saved(layer, tmp_path)
        loaded = SAE.load_from_disk(tmp_path, dtype=after)
        assert loaded.cfg.dtype == after and loaded.W_dec.dtype == getattr(torch, after)
        close32(loaded(x), layer(x))

    def test_it_computes_what_the_layer_does(self, kind, x, tmp_path):
        layer = make_layer(kind)
        saved(layer, tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        close(loaded(x), layer(x))
        close(loaded.encode(x), layer.encode(x))

    def test_a_loader_that_does_not_cast(self, kind, tmp_path):
        """As SAELens lets one bring."""
        inference = saved(make_layer(kind), tmp_path)

        def converter(path: Path, device: str, cfg_overrides: Any) -> tuple[dict, dict]:
            weights = {name: p.detach() for name, p in inference.state_dict().items()}
            return inference.cfg.to_dict() | (cfg_overrides or {}), weights

        loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16", converter=converter)
        assert type(loaded) is type(inference)
        assert loaded.cfg.dtype == "bfloat16" and loaded.W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", INFERENCE)
class TestDisk:
    def test_configuration_as_a_dict(self, layer):
        saved = layer.cfg.to_dict()
        for cfg in (
            type(layer).from_dict(saved).cfg,
            SAE.from_dict(saved).cfg,
            type(layer.cfg).from_dict(saved),
        ):
            assert type(cfg) is type(layer.cfg) and cfg.to_dict() == saved

    @pytest.mark.parametrize("wrong", ["W_dec", "b_dec", "unexpected", "missing"])
    def test_foreign_weights(self, layer, tmp_path, wrong):
        path, _ = layer.save_model(tmp_path)
        weights = load_file(path)
        if wrong == "missing":
            del weights[wrong := "W_dec"]
        else:
            weights[wrong] = torch.zeros(11, 9)
        save_file(weights, path)
        architecture = layer.cfg.architecture()
        with pytest.raises(ValueError, match=f"not those of the {architecture} .*{wrong}"):
            SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("kind", ["mxd", "dense"])
def test_a_config_that_does_not_fit_the_weights(layer, tmp_path, edit_json):
    _, config = layer.save_model(tmp_path)
    edit_json(config, gated=False)
    with pytest.raises(ValueError, match=r"not those of the .*W_hidden_gate"):
        SAE.load_from_disk(tmp_path)


WRONG = [
    ("k", 12, "k=12 cannot be active out of d_sae=11"),
    ("k", 0, "k=0 .* 1 <= k"),
    ("d_out", 0, "d_out must be at least 1"),
    ("d_hidden", 0, "d_hidden must be at least 1"),
    ("rank", 0, "rank must be at least 1, got 0"),
    ("act_fn", "tanh", "unknown activation act_fn='tanh'; known: relu"),
    ("apply_b_dec_to_input", True, "apply_b_dec_to_input"),
    ("normalize_activations", "layer_norm", "normalize_activations='none'"),
]


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "field", "value", "message"),
        [(k, *case) for k in KINDS for case in WRONG if hasattr(make_config(k), case[0])],
    )
    def test_config(self, kind, field, value, message):
        with pytest.raises(ValueError, match=message):
            make_config(kind, **{field: value})

    @pytest.mark.parametrize("method", ["__call__", "encode"])
    def test_input_width(self, layer, method):
        with pytest.raises(ValueError, match=rf"width 6, this {type(layer).__name__} has d_in=5"):
            getattr(layer, method)(torch.randn(2, 6))


class TestTraining:
    @pytest.fixture(params=TRAINING)
    def kind(self, request) -> str:
        return request.param

    @pytest.fixture
    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def test_loss_and_gradients_are_the_plain_forms(self, layer, batch):
        x, y = batch
        found = training_step(layer, x, y)  # which moves W_dec a little
        terms = steps(layer, x)
        expected = plain_loss(terms["hook_out"], y)
        names = ["mse_loss"]
        if hasattr(layer, "W_aux"):
            linear = terms["hook_sae_acts_post"] @ layer.W_aux + layer.b_aux
            expected = expected + layer.cfg.aux_loss_coefficient * plain_loss(linear, y)
            names.append("auxiliary_loss")
        if coefficient := getattr(layer.cfg, "mean_gate_coefficient", 0):
            gate = terms["hook_experts"]
            constant = gate.mean(0).square().sum() / gate.square().sum(-1).mean()
            expected = expected + coefficient * constant * plain_loss(torch.zeros_like(y), y)
            names.append("mean_gate_loss")
        gradients = torch.autograd.grad(expected, list(learned(layer).values()))
        assert list(found.losses) == names
        close(found.loss, expected)
        close(found.sae_out, terms["hook_out"])
        close(found.sae_in, y)
        close(found.feature_acts.to_dense(), layer.encode(x))
        found.loss.backward()
        for (name, parameter), gradient in zip(learned(layer).items(), gradients, strict=True):
            assert gradient.abs().max() > 0, name
            close(parameter.grad, gradient, msg=lambda m, name=name: f"{name}: {m}")

    def test_rows_of_W_dec_stay_on_the_sphere_where_they_are_kept_there(self, layer, batch):
        layer.W_dec.data *= torch.rand_like(layer.W_dec[..., :1]) + 0.5
        before = layer.W_dec.detach().clone()
        training_step(layer, *batch).loss.backward()
        assert layer.W_dec.grad.abs().max() > 1e-4
        if getattr(layer, "unit_norm_decoder", False):
            close(layer.W_dec.norm(dim=-1), torch.ones(11).double())
            close((layer.W_dec * layer.W_dec.grad).sum(-1), torch.zeros(11).double())
        else:
            assert torch.equal(layer.W_dec, before)

    def test_target_of_zero_gives_a_finite_loss(self, layer, batch):
        x, y = batch
        step = training_step(layer, x, torch.cat([torch.zeros_like(y[:1]), y[1:]]))
        step.loss.backward()
        assert step.loss.isfinite() and layer.W_dec.grad.isfinite().all()

    def test_checkpoint_resumes(self, layer, batch, tmp_path):
        layer.save_model(tmp_path)
        loaded = type(layer).load_from_disk(tmp_path)
        assert type(loaded) is type(layer)
        assert learned(loaded).keys() == learned(layer).keys()
        close(loaded(batch[0]), layer(batch[0]))
        close(training_step(loaded, *batch).loss, training_step(layer, *batch).loss)

    def test_a_batch_of_the_wrong_width(self, layer, batch):
        with pytest.raises(ValueError, match=r"width 10, need d_in \+ d_out = 9"):
            training_step(layer, batch[0], batch[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_batches_of_another_dtype(self, layer, batch, dtype):
        x, y = (tensor.to(dtype) for tensor in batch)
        for _ in range(50):  # to where centring and norming leave W_dec alone
            layer.normalize_decoder()
        expected = training_step(layer, x.double(), y.double()).loss
        loss = training_step(layer, x, y).loss
        torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0)

    def test_trainer_learns_and_counts_firings(self, kind):
        teacher = make_layer(kind, dtype="float32", k=2)
        wide = SHAPE | {"dtype": "float32", "d_hidden": 32, "d_sae": 24, "k": 4}
        student = KINDS[kind][0](make_config(kind, **wide))
        counts = torch.zeros(24)

        @torch.no_grad()
        def data():
            while True:
                x = torch.randn(128, 5)
                student.normalize_decoder()
                counts.add_((student.encode(x) != 0).sum(0))
                yield torch.cat([x, teacher(x)], -1)

        cfg = SAETrainerConfig(
            total_training_samples=128 * 80,
            train_batch_size_samples=128,
            lr=1e-2,
            lr_end=1e-2,
            logger=LoggingConfig(log_to_wandb=False),
        )
        trainer, losses = SAETrainer(cfg, student, data()), []
        train_step = trainer.step
        trainer.step = lambda batch: losses.append((out := train_step(batch)).loss.item()) or out
        trainer.fit()
        assert len(losses) == 80
        left = 0.75 if "mxd" in kind or "molt" in kind else 0.3
        assert sum(losses[-10:]) < left * sum(losses[:10])
        assert counts.sum() > 80 * 128
        assert torch.equal(trainer.act_freq_scores, counts)
        assert trainer.n_frac_active_samples == 80 * 128


class TestWriteDirections:
    @pytest.mark.parametrize("kind", ["training_mxd", "training_batchtopk_mxd"])
    def test_are_kept_of_the_auxiliary_decoder_beside_the_output(self, kind, tmp_path):
        layer = make_layer(kind, 0.3)
        layer.save_inference_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert loaded.cfg.write_directions and "W_write" not in dict(loaded.named_parameters())
        close(loaded.W_write, layer.W_aux)
        x, units = torch.randn(9, 5).double(), torch.tensor([7, 2])
        close(loaded.steering_directions(units, x), layer.W_aux[units])
        close(layer.steering_directions(units, x), layer.W_aux[units])
        before = loaded(x)
        loaded.W_write.zero_()
        close(loaded(x), before)

    def test_without_an_auxiliary_loss_there_are_none(self):
        layer = make_layer("training_mxd", 0.3, aux_loss_coefficient=0.0)
        assert not hasattr(layer, "W_aux") and not hasattr(layer.to_inference(), "W_write")
        assert layer.sample_size == 4 * make_layer("training_mxd", 0.3).sample_size
        assert list(training_step(layer, *pair()).losses) == ["mse_loss"]

    def test_are_none_of_the_users_options(self):
        with pytest.raises(ValueError, match="sae_options must be an object with fields"):
            TrainConfig(**TINY_RUN | {"output": "x", "sae_options": '{"write_directions": true}'})


def pair():
    return torch.randn(9, 5).double(), torch.randn(9, 4).double()
