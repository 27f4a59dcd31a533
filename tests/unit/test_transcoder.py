"""The transcoders against their definition, SAELens' own, their training form and the disk."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.saes.transcoder import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_lens.layers.transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
)
from mxd_lens.models.splice import splice
from tests.conftest import randomise
from tests.unit.test_mxd import Created

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"d_in": 5, "d_out": 4, "d_sae": 11, "k": 3, "dtype": "float64"}
LAYERS = {
    "transcoder": (TopKTranscoder, TopKTranscoderConfig),
    "skip": (TopKSkipTranscoder, TopKSkipTranscoderConfig),
}
TRAINING = {
    "transcoder": (TrainingTopKTranscoder, TrainingTopKTranscoderConfig),
    "skip": (TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig),
}
SAELENS = {
    "transcoder": (Transcoder, TranscoderConfig),
    "skip": (SkipTranscoder, SkipTranscoderConfig),
}
HOOKS = [
    "hook_in",
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_output",
    "hook_out",
]


def reference(weights, x: Tensor, cfg, edit=lambda _, t: t) -> Tensor:
    """The layer densely; ``edit(hook name, tensor)`` at every step."""
    w = weights if isinstance(weights, dict) else dict(weights.named_parameters())
    x = edit("hook_sae_input", edit("hook_in", x))
    pre = torch.einsum("...i,in->...n", x, w["W_enc"]) + w["b_enc"]
    pre = edit("hook_sae_acts_pre", pre)
    rank = pre.detach().argsort(dim=-1, descending=True).argsort(dim=-1)
    acts = edit("hook_sae_acts_post", pre.clamp_min(0) * (rank < cfg.k))
    y = torch.einsum("...n,no->...o", acts, w["W_dec"]) + w["b_dec"]
    y = edit("hook_sae_recons", y)
    if "W_skip" in w:
        y = y + torch.einsum("...i,oi->...o", x, w["W_skip"])
    return edit("hook_out", edit("hook_sae_output", y))


def steps(layer, x: Tensor) -> dict[str, Tensor]:
    seen = {}
    reference(layer, x, layer.cfg, lambda name, t: seen.setdefault(name, t))
    return seen


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def make(kind):
    """``make(**fields)``: a layer in float64 with no parameter at zero."""

    def make(**fields):
        cls, cfg = LAYERS[kind]
        layer = cls(cfg(**(SHAPE | fields)))
        randomise(layer, 0.7)
        return layer

    return make


@pytest.fixture
def layer(make):
    return make()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64)


class TestDefinition:
    @pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 3, 4), (0,)])
    def test_equals_the_dense_form(self, layer, batch):
        x = torch.randn(*batch, 5, dtype=torch.float64)
        close(layer(x), reference(layer, x, layer.cfg))

    @pytest.mark.parametrize("k", [1, 11])
    def test_one_unit_and_all_units(self, make, x, k):
        layer = make(k=k)
        close(layer(x), reference(layer, x, layer.cfg))
        assert 1 <= (layer.encode(x) > 0).sum(-1).max() <= k

    def test_with_all_units_allowed_it_is_saelens_transcoder(self, kind, make, x):
        layer = make(k=11)
        cls, cfg = SAELENS[kind]
        other = cls(cfg(d_in=5, d_out=4, d_sae=11, dtype="float64", apply_b_dec_to_input=False))
        other.load_state_dict(layer.state_dict())
        assert isinstance(layer, cls)
        close(layer(x), other(x))
        close(layer.encode(x), other.encode(x))
        for ours, theirs in zip(
            layer.forward_with_activations(x), other.forward_with_activations(x), strict=True
        ):
            close(ours, theirs)

    def test_gradients_equal_those_of_the_dense_form(self, layer, x):
        wanted = [x.requires_grad_(), *layer.parameters()]
        expected = torch.autograd.grad(reference(layer, x, layer.cfg).sin().sum(), wanted)
        close(torch.autograd.grad(layer(x).sin().sum(), wanted), expected)

    def test_output_has_the_dtype_of_the_input(self, make, x):
        layer = make(dtype="float32")
        for dtype in (torch.float64, torch.bfloat16):
            assert layer(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(layer(x).float(), layer(x.float()))

    def test_a_fresh_layer(self, kind, x):
        cls, cfg = LAYERS[kind]
        layer = cls(cfg(**SHAPE))
        assert 0 < layer.W_enc.abs().max() <= 5**-0.5
        assert (layer.b_enc == 0).all() and (layer.b_dec == 0).all()
        if kind == "skip":
            assert (layer(x) == 0).all() and layer.W_skip.shape == (4, 5)
        else:
            close(layer.W_dec.norm(dim=-1), torch.ones(11).double())

    def test_units_are_contiguous(self, layer):
        assert layer.W_enc.T.is_contiguous()

    def test_only_the_gates_pre_activations_are_dense(self, layer):
        x = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
        with Created(17, 11) as created:
            layer(x).sum().backward()
        assert len(created.kept) == 1


class TestHooks:
    def test_each_fires_once_per_forward_in_documented_order(self, layer):
        fired = []
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        layer.run_with_hooks(
            x, fwd_hooks=[(lambda _: True, lambda t, hook: fired.append((hook.name, t.shape)))]
        )
        widths = dict(zip(HOOKS, [5, 5, 11, 11, 4, 4, 4], strict=True))
        assert fired == [(name, (2, 3, width)) for name, width in widths.items()]

    def test_each_shows_its_term_of_the_formula(self, layer, x):
        _, cache = layer.run_with_cache(x)
        expected = steps(layer, x)
        assert list(cache) == list(expected) == HOOKS
        for name in expected:
            close(cache[name], expected[name])

    @pytest.mark.parametrize("name", HOOKS)
    def test_editing_one_changes_the_output_as_the_formula_says(self, layer, x, name):
        noise = torch.randn_like(steps(layer, x)[name])

        def edited(tensor: Tensor) -> Tensor:
            return 0.5 * tensor + noise

        expected = reference(layer, x, layer.cfg, lambda at, t: edited(t) if at == name else t)
        found = layer.run_with_hooks(x, fwd_hooks=[(name, lambda tensor, hook: edited(tensor))])
        close(found, expected)
        assert (found - layer(x)).abs().max() > 1e-3

    @pytest.mark.parametrize("model", ["tiny_hooked", "tiny_bridge"])
    def test_in_place_of_an_mlp_it_has_the_mlps_hooks(self, make, request, tokens, model):
        lm = request.getfixturevalue(model)
        layer = make(d_in=16, d_out=16, dtype="float32")
        with splice(lm, {1: layer}):
            _, cache = lm.run_with_cache(tokens)
            mlp_in, mlp_out = (cache[f"blocks.1.mlp.hook_{end}"] for end in ("in", "out"))
        torch.testing.assert_close(mlp_out, layer(mlp_in))
        assert cache["blocks.1.mlp.hook_sae_acts_post"].shape == (2, 7, 11)


class TestEncodeDecode:
    def test_decode_after_encode_is_forward(self, layer):
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        acts = layer.encode(x)
        close(acts, steps(layer, x)["hook_sae_acts_post"])
        layer(torch.randn_like(x))
        close(layer.decode(acts), layer(x))

    def test_decode_uses_the_coefficients_it_is_given(self, layer, x):
        other = torch.rand(6, 11, dtype=torch.float64)
        layer.encode(x)
        expected = reference(
            layer, x, layer.cfg, lambda name, t: other if name == "hook_sae_acts_post" else t
        )
        close(layer.decode(other), expected)

    def test_a_transcoder_decodes_without_an_input(self, x):
        layer = TopKTranscoder(TopKTranscoderConfig(**SHAPE))
        acts = layer.encode(x)
        for _ in range(2):
            close(layer.decode(acts[:2]), layer(x)[:2])

    def test_a_skip_transcoder_does_not(self, x):
        layer = TopKSkipTranscoder(TopKSkipTranscoderConfig(**SHAPE))
        with pytest.raises(RuntimeError, match="no encode"):
            layer.decode(torch.rand(6, 11).double())
        acts = layer.encode(x)
        with pytest.raises(RuntimeError, match=r"\(2, 11\) after an encode of \(6, 5\)"):
            layer.decode(acts[:2])
        with pytest.raises(RuntimeError, match="call encode"):
            layer.decode(acts)

    def test_a_copy_in_between(self, layer, x):
        acts = layer.encode(x.requires_grad_())
        other = copy.deepcopy(layer)
        assert other._to_decode is None
        close(layer.decode(acts), layer(x))


class TestDisk:
    def test_round_trip(self, layer, x, tmp_path):
        layer.cfg.metadata = SAEMetadata(hook_name="a", hook_name_out="b")
        layer.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert type(loaded) is type(layer) and loaded.cfg.to_dict() == layer.cfg.to_dict()
        assert loaded.cfg.k == 3 and loaded.cfg.metadata.hook_name_out == "b"
        assert loaded.W_enc.T.is_contiguous()
        assert torch.equal(loaded(x), layer(x))

    def test_configuration_as_a_dict(self, layer):
        for cfg in (
            type(layer).from_dict(layer.cfg.to_dict()).cfg,
            SAE.from_dict(layer.cfg.to_dict()).cfg,
            type(layer.cfg).from_dict(layer.cfg.to_dict()),
        ):
            assert type(cfg) is type(layer.cfg) and cfg.to_dict() == layer.cfg.to_dict()

    def test_loading_in_another_dtype(self, layer, x, tmp_path):
        layer.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path, dtype="float32")
        assert loaded.W_dec.dtype == torch.float32
        torch.testing.assert_close(loaded(x), layer(x), rtol=1e-4, atol=1e-4)

    def test_foreign_weights(self, layer, tmp_path):
        weights, _ = layer.save_model(tmp_path)
        save_file(load_file(weights) | {"W_dec": torch.zeros(11, 9)}, weights)
        architecture = layer.cfg.architecture()
        with pytest.raises(ValueError, match=rf"not those of the {architecture}.*\(11, 9\)"):
            SAE.load_from_disk(tmp_path)


class TestErrors:
    @pytest.mark.parametrize("configs", [LAYERS, TRAINING], ids=["inference", "training"])
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"k": 12}, "k=12 units .* d_sae=11"),
            ({"k": 0}, "k=0 .* 1 <= k"),
            ({"d_out": 0}, "d_out must be at least 1"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
            ({"normalize_activations": "layer_norm"}, "normalize_activations='none'"),
        ],
    )
    def test_config(self, kind, configs, fields, message):
        with pytest.raises(ValueError, match=message):
            configs[kind][1](**(SHAPE | fields))

    @pytest.mark.parametrize("method", ["__call__", "encode"])
    def test_input_width(self, layer, method):
        with pytest.raises(ValueError, match=r"width 6, this TopK\w+ has d_in=5"):
            getattr(layer, method)(torch.randn(2, 6))

    def test_folding_norms_would_change_the_choice_of_units(self, layer, tmp_path):
        layer.save_model(tmp_path)
        with pytest.raises(NotImplementedError, match="which k units"):
            SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)


def step(layer, x: Tensor, y: Tensor):
    return layer.training_forward_pass(TrainStepInput(torch.cat([x, y], -1), {}, None, 0, False))


class TestTraining:
    @pytest.fixture
    def layer(self, kind):
        cls, cfg = TRAINING[kind]
        layer = cls(cfg(**SHAPE))
        randomise(layer, 0.7)
        layer.renormalise()
        return layer

    @pytest.fixture
    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def test_loss_and_gradients_are_the_dense_forms(self, kind, layer, batch):
        x, y = batch
        found = step(layer, x, y)
        weights = dict(layer.named_parameters())
        if kind == "transcoder":
            weights["W_dec"] = layer.W_dec / layer.W_dec.norm(dim=1, keepdim=True)
        y_hat = reference(weights, x, layer.cfg)
        expected = torch.stack(
            [(y_hat[i, j] - y[i, j]) ** 2 / y[i].norm() for i in range(9) for j in range(4)]
        ).mean()
        names, parameters = zip(*layer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(expected, parameters)
        close(found.loss, expected)
        close(found.sae_out, y_hat)
        close(found.sae_in, y)
        close(found.feature_acts.to_dense(), layer.encode(x))
        found.loss.backward()
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            assert gradient.abs().max() > 0, name
            close(parameter.grad, gradient, msg=lambda m, name=name: f"{name}: {m}")

    def test_nothing_but_the_pre_activations_is_dense(self, layer):
        x, y = torch.randn(17, 5).double(), torch.randn(17, 4).double()
        with Created(17, 11) as created:
            step(layer, x, y).loss.backward()
        assert len(created.kept) == 1

    def test_rows_of_a_transcoders_decoder_stay_on_the_sphere(self, batch):
        layer = TrainingTopKTranscoder(TrainingTopKTranscoderConfig(**SHAPE))
        layer.W_dec.data *= torch.rand(11, 1).double() + 0.5
        step(layer, *batch).loss.backward()
        close(layer.W_dec.norm(dim=-1), torch.ones(11).double())
        assert layer.W_dec.grad.abs().max() > 1e-4
        close((layer.W_dec * layer.W_dec.grad).sum(-1), torch.zeros(11).double())

    def test_rows_of_a_skip_transcoders_decoder_are_free(self, batch):
        layer = TrainingTopKSkipTranscoder(TrainingTopKSkipTranscoderConfig(**SHAPE))
        assert (layer(batch[0]) == 0).all()
        step(layer, *batch).loss.backward()
        assert layer.W_dec.grad.abs().max() > 0 and layer.W_skip.grad.abs().max() > 0
        layer.W_dec.data.uniform_()
        before = layer.W_dec.clone()
        step(layer, *batch)
        assert torch.equal(layer.W_dec, before)

    def test_saved_for_inference_computes_the_same(self, kind, layer, batch, tmp_path):
        x, _ = batch
        layer.cfg.metadata.hook_name_out = "somewhere"
        layer.save_inference_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert type(loaded) is LAYERS[kind][0] and loaded.cfg.k == 3
        assert loaded.cfg.metadata.hook_name_out == "somewhere"
        for other in (loaded, layer.to_inference()):
            close(other(x), layer(x))
            close(other.encode(x), layer.encode(x))

    def test_checkpoint_resumes(self, layer, batch, tmp_path):
        layer.save_model(tmp_path)
        loaded = type(layer).load_from_disk(tmp_path)
        assert type(loaded) is type(layer)
        close(step(loaded, *batch).loss, step(layer, *batch).loss)

    def test_a_batch_of_the_wrong_width(self, layer, batch):
        with pytest.raises(ValueError, match=r"width \d+, need d_in \+ d_out = 9"):
            step(layer, batch[0], batch[0])

    def test_trainer_learns_and_counts_firings(self, kind):
        cls, cfg = LAYERS[kind]
        shape = SHAPE | {"dtype": "float32"}
        teacher = cls(cfg(**shape))
        randomise(teacher, 0.7)
        cls, cfg = TRAINING[kind]
        student = cls(cfg(**(shape | {"d_sae": 24, "k": 4})))
        counts = torch.zeros(24)

        @torch.no_grad()
        def data():
            while True:
                x = torch.randn(128, 5)
                counts.add_((student.encode(x) > 0).sum(0))
                yield torch.cat([x, teacher(x)], -1)

        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=128 * 120,
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
        assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
        assert torch.equal(trainer.act_freq_scores, counts)
