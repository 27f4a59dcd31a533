"""Layers in other tools' files, against those tools' formulas, written plainly."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_lens import evaluate, splice
from mxd_lens.formats import read_layers
from mxd_lens.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from mxd_lens.formats.reference import read_reference
from mxd_lens.formats.sparsify import read_sparsify
from mxd_lens.models.site import Site
from tests.conftest import D_MODEL, make_hooked, randomise
from tests.helpers import close32, random_layer, same, substituted, training_step
from tests.reference import FORMULAS, reference

N_FEATURES, K = 40, 4


def keep(v: Tensor, k: int) -> Tensor:
    """v where it is among a token's k largest, else zero."""
    kept = torch.zeros_like(v)
    values, indices = v.topk(k, dim=-1)
    return kept.scatter(-1, indices, values)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, D_MODEL)


def saelens_layer(architecture: str, layer: int = 0, d_model: int = D_MODEL) -> Any:
    """A random transcoder of SAELens' for an MLP."""
    cls, cfg_class = get_sae_class(architecture)
    metadata = SAEMetadata(
        model_name="tiny",
        hook_name=f"blocks.{layer}.mlp.hook_in",
        hook_name_out=f"blocks.{layer}.mlp.hook_out",
        norms_folded=False,
    )
    width = {"d_in": d_model, "d_out": d_model, "d_sae": N_FEATURES}
    sae = cls(cfg_class(**width, apply_b_dec_to_input=False, metadata=metadata))
    randomise(sae, 0.5)
    return sae


def make(architecture: str, layer: int = 0, **options: Any) -> Any:
    """A random layer for an MLP of a tiny bridge."""
    if architecture in ("transcoder", "skip_transcoder") or architecture.startswith("jumprelu_"):
        return saelens_layer(architecture, layer)
    made: Any = random_layer(architecture, **options)
    metadata = made.cfg.metadata
    metadata.hook_name = f"blocks.{layer}.mlp.hook_in"
    metadata.hook_name_out = f"blocks.{layer}.mlp.hook_out"
    return made


def make_training(architecture: str) -> Any:
    """A random layer in training."""
    cls, cfg_class = get_sae_training_class(architecture)
    width: dict[str, Any] = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": N_FEATURES, "k": K}
    layer = cls(cfg_class(**width | ({"d_hidden": 24} if "mxd" in architecture else {})))
    randomise(layer, 0.5)
    return layer


class TestCircuitTracer:
    ARCHITECTURES = (
        *("topk_transcoder", "topk_skip_transcoder", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
    )

    @staticmethod
    def forward(folder: Path, layer: int, x: Tensor) -> Tensor:
        """What circuit-tracer computes from the files alone."""
        config = yaml.safe_load((folder / "config.yaml").read_text())
        w = load_file(folder / f"layer_{layer}.safetensors")
        pre = x @ w["W_enc"].T + w["b_enc"]
        if config["activation"] == "topk":
            acts = keep(pre, config["k"])
        elif "activation_function.threshold" in w:
            acts = pre * (pre > w["activation_function.threshold"])
        else:
            acts = pre.clamp_min(0)
        y = acts @ w["W_dec"] + w["b_dec"]
        return y + x @ w["W_skip"].T if "W_skip" in w else y

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_what_is_written_computes_the_same_there_and_comes_back_to_the_bit(
        self, tmp_path, x, architecture
    ):
        layers = {number: make(architecture, number) for number in range(3)}
        write_circuit_tracer(tmp_path / "out", layers)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "config.yaml",
            *(f"layer_{number}.safetensors" for number in range(3)),
        }
        back = read_layers(tmp_path / "out")
        for number, layer in layers.items():
            close32(self.forward(tmp_path / "out", number, x), layer(x))
            assert type(back[number]) is type(layer)
            ours, theirs = layer.cfg.metadata, back[number].cfg.metadata
            for name in ("model_name", "hook_name", "hook_name_out"):
                assert theirs[name] == ours[name]
            if not architecture.startswith("jumprelu"):
                same(back[number].state_dict(), layer.state_dict())
            same(back[number](x), layer(x))

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_against_circuit_tracer_itself(self, tmp_path, x, architecture):
        theirs = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
        activations = pytest.importorskip("circuit_tracer.transcoder.activation_functions")
        layer = make(architecture)
        write_circuit_tracer(tmp_path, {0: layer})
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        weights = load_file(tmp_path / "layer_0.safetensors")
        activation: Any = torch.relu
        if config["activation"] == "topk":
            activation = activations.TopK(config["k"])
        elif config["activation"] == "jumprelu":
            activation = activations.JumpReLU(torch.zeros(N_FEATURES))
        transcoder = theirs.SingleLayerTranscoder(
            D_MODEL, len(weights["b_enc"]), activation, 0, "W_skip" in weights, dtype=torch.float32
        )
        transcoder.load_state_dict(weights)
        close32(transcoder(x), layer(x))

    def test_few_positive_pre_activations(self, tmp_path):
        """circuit-tracer's top-k would keep negative ones."""
        layer = make("topk_transcoder")
        layer.b_enc.data.sub_(4)
        x = torch.randn(64, D_MODEL)
        pre = x @ layer.W_enc + layer.b_enc
        few = (pre > 0).sum(-1) < K
        assert 0 < few.sum() < len(few)
        write_circuit_tracer(tmp_path, {0: layer})
        close32(self.forward(tmp_path, 0, x), layer(x))
        without = keep(pre, K) @ layer.W_dec + layer.b_dec
        assert not torch.allclose(without[few], layer(x)[few])

    def test_a_foreign_top_k_set(self, tmp_path, x):
        layer = make("topk_transcoder")
        layer.b_enc.data.add_(2)  # k are positive everywhere
        write_circuit_tracer(tmp_path, {0: layer})
        path = tmp_path / "layer_0.safetensors"
        weights = load_file(path)
        cut = {"W_enc", "W_dec", "b_enc"}
        save_file({name: w[:-K] if name in cut else w for name, w in weights.items()}, path)
        with pytest.warns(UserWarning, match="negative pre-activations among the k=4"):
            back = read_circuit_tracer(tmp_path)[0]
        close32(back(x), self.forward(tmp_path, 0, x))

    @pytest.mark.parametrize("architecture", ["topk_transcoder", "batchtopk_transcoder"])
    def test_a_layer_in_training(self, tmp_path, x, architecture):
        layer = make_training(architecture)
        y = torch.randn_like(x)
        training_step(layer, x.flatten(0, 1), y.flatten(0, 1))
        write_circuit_tracer(tmp_path, {0: layer})
        close32(self.forward(tmp_path, 0, x), reference(layer.to_inference(), x))

    def test_negative_thresholds(self, tmp_path, x):
        layer = make("jumprelu_transcoder")
        layer.threshold.data.sub_(0.5)
        assert (layer.threshold < 0).any()
        write_circuit_tracer(tmp_path, {0: layer})
        close32(self.forward(tmp_path, 0, x), layer(x))
        path = tmp_path / "layer_0.safetensors"
        weights = load_file(path)
        weights["activation_function.threshold"] = layer.threshold.detach().clone()
        save_file(weights, path)
        with pytest.raises(ValueError, match=r"layer_0\.safetensors has negative thresholds"):
            read_layers(tmp_path)

    @pytest.mark.parametrize("lm_class", ["TransformerBridge", "HookedTransformer"])
    def test_layers_come_back_for_either_model_class(self, tmp_path, tiny_bridge, lm_class):
        write_circuit_tracer(tmp_path, {0: make("topk_transcoder")})
        model = tiny_bridge if lm_class == "TransformerBridge" else make_hooked(act_fn="relu")
        layer = read_layers(tmp_path, model_class=lm_class)[0]
        assert Site.of(model, layer).hooks == Site.at(model, 0).hooks

    @pytest.mark.parametrize("architecture", ["mxd", "molt", "dense", "topk"])
    def test_a_layer_that_is_no_transcoder(self, tmp_path, architecture):
        layer = make(architecture)
        layer.cfg.metadata.hook_name = None
        with pytest.raises(ValueError, match=rf"layer 0 is no transcoder .* {architecture} .*expo"):
            write_circuit_tracer(tmp_path, {0: layer})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("layers", "said"),
        [
            ({}, r"a layer for every MLP from 0 on, got \[\]"),
            ({1: {}}, r"from 0 on, got \[1\]: train with --layers all"),
            ({0: {}, 1: {"k": 5}}, r"\('topk', 4, 40, 'tiny'\) for layer 0 and \('topk', 5, 40, "),
            ({0: {}, 1: {"d_sae": 41}}, r"'topk', 4, 41, 'tiny'\) for layer 1"),
            ({0: {"d_out": 15}}, "d_in=16 and d_out=15"),
        ],
    )
    def test_sets_that_it_does_not_take(self, tmp_path, layers, said):
        made = {n: make("topk_transcoder", n, **options) for n, options in layers.items()}
        with pytest.raises(ValueError, match=said):
            write_circuit_tracer(tmp_path / "out", made)
        assert not list(tmp_path.iterdir())

    def test_a_layer_of_elsewhere(self, tmp_path):
        with pytest.raises(ValueError, match=r"layer 0 reads blocks\.1\.mlp\.hook_in"):
            write_circuit_tracer(tmp_path, {0: make("transcoder", 1)})
        layer = make("transcoder")
        layer.cfg.metadata.norms_folded = True
        with pytest.raises(ValueError, match="with its norms folded in"):
            write_circuit_tracer(tmp_path, {0: layer})

    def test_never_over_anything(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        for folder in (tmp_path, tmp_path / "notes"):
            with pytest.raises(ValueError, match="holds something already"):
                write_circuit_tracer(folder, {0: make("transcoder")})
        assert [path.name for path in tmp_path.iterdir()] == ["notes"]

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ("[]", r"no config\.yaml of transcoders"),
            ("a: [", r"no config\.yaml of circuit-tracer"),
            ({"model_kind": "cross_layer_transcoder"}, "model_kind='cross_layer_transcoder'"),
            (
                {"feature_input_hook": "hook_resid_mid"},
                "read hook_resid_mid and write mlp.hook_out",
            ),
            ({"feature_input_hook": "ln2.hook_normalized"}, "read ln2.hook_normalized"),
            (
                {"feature_output_hook": "hook_mlp_out", "model_name": "google/gemma-3-270m"},
                "write hook_mlp_out of google/gemma-3-270m",
            ),
            ({"activation": "topk"}, "says activation: topk, and no k"),
            ({"activation": "topk", "k": 0}, "k=0: must be at least 1"),
            ({"activation": "topk", "k": 99}, r"layer_0\.safetensors: k=99 cannot be active"),
        ],
    )
    def test_other_configurations(self, tmp_path, config, said):
        write_circuit_tracer(tmp_path, {0: make("transcoder")})
        path = tmp_path / "config.yaml"
        if isinstance(config, dict):
            config = yaml.safe_dump(yaml.safe_load(path.read_text()) | config)
        path.write_text(config)
        with pytest.raises(ValueError, match=said):
            read_layers(tmp_path)

    @pytest.mark.parametrize("how", ["missing", "truncated", "renamed", "shorter", "integers"])
    def test_damaged_weights(self, tmp_path, how):
        write_circuit_tracer(tmp_path, {n: make("transcoder", n) for n in range(2)})
        path = tmp_path / "layer_0.safetensors"
        weights = load_file(path)
        damaged = {
            "renamed": {("encoder" if n == "W_enc" else n): w for n, w in weights.items()},
            "shorter": weights | {"b_enc": weights["b_enc"][:-1].clone()},
            "integers": weights | {"b_dec": weights["b_dec"].int()},
        }
        if how == "missing":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:200])
        else:
            save_file(damaged[how], path)
        with pytest.raises(ValueError, match=r"layer_[01]\.safetensors"):
            read_layers(tmp_path)


class TestSparsify:
    CONFIG = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True} | {
        "num_latents": N_FEATURES,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": True,
        "d_in": D_MODEL,
    }

    @classmethod
    def write(cls, folder: Path, skip: bool = False, **config: Any) -> dict[str, Tensor]:
        """A transcoder as sparsify saves it."""
        folder.mkdir(parents=True)
        weights = {
            "encoder.weight": torch.randn(N_FEATURES, D_MODEL),
            "encoder.bias": torch.randn(N_FEATURES),
            "W_dec": torch.randn(N_FEATURES, D_MODEL),
            "b_dec": torch.randn(D_MODEL),
        }
        if skip:
            weights["W_skip"] = torch.randn(D_MODEL, D_MODEL)
        save_file(weights, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(
            json.dumps(cls.CONFIG | {"skip_connection": skip} | config)
        )
        return weights

    @staticmethod
    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        acts = keep((x @ w["encoder.weight"].T + w["encoder.bias"]).clamp_min(0), K)
        y = acts @ w["W_dec"] + w["b_dec"]
        return y + x @ w["W_skip"].T if "W_skip" in w else y

    @pytest.mark.parametrize("skip", [False, True])
    def test_the_layers_of_a_run(self, tmp_path, x, skip):
        weights = {n: self.write(tmp_path / f"layers.{n}.mlp", skip) for n in (2, 11)}
        (tmp_path / "config.json").write_text('{"model": "tiny"}')
        layers = read_layers(tmp_path)
        assert list(layers) == [2, 11]
        for number, layer in layers.items():
            close32(layer(x), self.forward(weights[number], x))
            metadata = layer.cfg.metadata
            assert metadata.hook_name == f"blocks.{number}.mlp.hook_in"
            assert metadata.model_name == "tiny" and metadata.norms_folded is False
        (alone,) = read_layers(tmp_path / "layers.2.mlp", "other").values()
        same(alone(x), layers[2](x))
        assert alone.cfg.metadata.model_name == "other"

    @pytest.mark.parametrize("skip", [False, True])
    def test_against_sparsify_itself(self, tmp_path, x, skip):
        sparsify = pytest.importorskip("sparsify")
        self.write(tmp_path / "h.0.mlp", skip)
        theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "h.0.mlp")
        flat = x.flatten(0, 1)
        close32(read_sparsify(tmp_path)[0](flat), theirs(flat).sae_out)

    def test_half_precision_stays(self, tmp_path):
        weights = self.write(tmp_path / "h.0.mlp")
        half = {name: weight.bfloat16() for name, weight in weights.items()}
        save_file(half, tmp_path / "h.0.mlp" / "sae.safetensors")
        layer = read_layers(tmp_path)[0]
        assert layer.cfg.dtype == "bfloat16"
        same(layer.W_enc.data, half["encoder.weight"].T)

    def test_seeds(self, tmp_path, x):
        weights = [self.write(tmp_path / "h.0.mlp" / f"seed{seed}") for seed in range(2)]
        with pytest.raises(ValueError, match=r"several layers for MLP 0: name one of its folders"):
            read_layers(tmp_path)
        layer = read_layers(tmp_path / "h.0.mlp" / "seed1")[0]
        close32(layer(x), self.forward(weights[1], x))

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"transcode": False}, "no transcoder of sparsify's with top-k .*transcode=False"),
            ({"activation": "groupmax"}, "activation='groupmax'"),
            ({"gram_lookup": True}, "gram_lookup=True"),
            ({"k": 0}, "k=0: must be at least 1"),
            ({"k": 99}, r"sae\.safetensors: k=99 cannot be active"),
            ({"skip_connection": True}, r"sae\.safetensors lacks W_skip"),
        ],
    )
    def test_what_is_refused(self, tmp_path, config, said):
        self.write(tmp_path / "h.0.mlp", **config)
        with pytest.raises(ValueError, match=said):
            read_layers(tmp_path)

    def test_before_the_bias_was_left_out(self, tmp_path):
        self.write(tmp_path / "h.0.mlp")
        path = tmp_path / "h.0.mlp" / "cfg.json"
        config = json.loads(path.read_text())
        del config["activation"]
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"cfg\.json is of a sparsify from before .* b_dec"):
            read_layers(tmp_path)

    @pytest.mark.parametrize("name", ["layers.6", "layers.6.attn", "embed_tokens"])
    def test_no_mlp(self, tmp_path, name):
        self.write(tmp_path / name)
        with pytest.raises(ValueError, match=f"hook point {name}, which is no MLP"):
            read_layers(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{", "{}", "3"])
    def test_foreign_configurations(self, tmp_path, content):
        self.write(tmp_path / "h.0.mlp")
        (tmp_path / "h.0.mlp" / "cfg.json").write_text(content)
        with pytest.raises(ValueError, match=r"cfg\.json is no "):
            read_layers(tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="holds no layer"):
            read_layers(tmp_path)
        with pytest.raises(ValueError, match=r"there is no .*nowhere"):
            read_layers(tmp_path / "nowhere")


D_HIDDEN, N_EXPERTS = 24, 20


class TestReference:
    CFG: dict[str, Any] = {
        "model_name": "tiny",
        "hook_point": "blocks.1.ln2.hook_normalized",
        "out_hook_point": "blocks.1.hook_mlp_out",
        "is_transcoder": True,
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "use_conditional": True,
        "use_glu": False,
        "use_skip": False,
        "topk": K,
        "mlp_activation_fn": "gelu",
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "use_ghost_grads": (False,),
    }

    @classmethod
    def checkpoint(cls, monkeypatch: Any, **changes: Any) -> dict[str, Any]:
        """What its code saves: settings of a class of its own, and a state dict."""
        cfg = cls.CFG | changes
        module = ModuleType("sae_training.config")
        name = "LanguageModelSAERunnerConfig"
        kind = type(name, (), {"__module__": "sae_training.config"})
        setattr(module, name, kind)
        monkeypatch.setitem(sys.modules, "sae_training", ModuleType("sae_training"))
        monkeypatch.setitem(sys.modules, "sae_training.config", module)
        settings = kind()
        settings.__dict__.update(cfg)
        d_sae = D_HIDDEN
        weights = {
            "W_enc": torch.randn(D_MODEL, d_sae),
            "b_enc": torch.randn(d_sae),
            "W_dec": torch.randn(d_sae, D_MODEL),
            "b_dec": torch.randn(D_MODEL),
            "b_dec_out": torch.randn(D_MODEL),
        }
        if cfg["use_glu"]:
            weights["W_glu.weight"] = torch.randn(d_sae, D_MODEL)
            weights["W_glu.bias"] = torch.randn(d_sae)
        if cfg["use_skip"]:
            weights["W_skip.weight"] = torch.randn(D_MODEL, D_MODEL)
        if cfg["use_conditional"]:
            weights["gate"] = torch.randn(N_EXPERTS, D_MODEL)
            weights["gate_bias"] = torch.randn(N_EXPERTS)
            weights["W_cond"] = torch.randn(D_MODEL, N_EXPERTS)
        return {"cfg": settings, "state_dict": weights}

    @staticmethod
    def save(checkpoint: Any, path: Path, monkeypatch: Any) -> Path:
        torch.save(checkpoint, path)
        monkeypatch.delitem(sys.modules, "sae_training.config")
        return path

    @staticmethod
    def forward(checkpoint: dict[str, Any], x: Tensor) -> Tensor:
        """As its `SparseAutoencoder.forward`."""
        cfg, w = vars(checkpoint["cfg"]), checkpoint["state_dict"]
        hidden = FORMULAS[cfg["mlp_activation_fn"]](x @ w["W_enc"] + w["b_enc"])
        if cfg["use_glu"]:
            hidden = hidden * (x @ w["W_glu.weight"].T + w["W_glu.bias"])
        k = cfg["topk"]
        if not cfg["use_conditional"] and k > 0:
            hidden = keep(hidden, k)
        y = hidden @ w["W_dec"]
        if cfg["use_conditional"]:
            gate = (x @ w["gate"].T + w["gate_bias"]).clamp_min(0)
            y = y * ((keep(gate, k) if k > 0 else gate) @ w["W_cond"].T)
        if cfg["use_skip"]:
            y = y + x @ w["W_skip.weight"].T
        return y + w["b_dec_out"]

    @pytest.mark.parametrize(
        ("architecture", "changes"),
        [
            ("mxd", {}),
            ("mxd", {"topk": -1}),
            ("mxd", {"use_glu": True, "mlp_activation_fn": "gelu_pytorch_tanh"}),
            ("topk_transcoder", {"use_conditional": False, "mlp_activation_fn": "relu"}),
            (
                "topk_skip_transcoder",
                {"use_conditional": False, "use_skip": True, "mlp_activation_fn": "relu"},
            ),
            ("transcoder", {"use_conditional": False, "topk": -1, "mlp_activation_fn": "relu"}),
        ],
    )
    def test_it_computes_the_same(self, tmp_path, monkeypatch, x, architecture, changes):
        checkpoint = self.checkpoint(monkeypatch, **changes)
        path = self.save(checkpoint, tmp_path / "final.pt", monkeypatch)
        (layer,) = read_layers(path).values()
        assert layer.cfg.architecture() == architecture
        close32(layer(x), self.forward(checkpoint, x))
        close32(reference(layer, x) if "topk" in architecture else layer(x), layer(x))

    def test_in_the_model_that_it_was_trained_on(self, tmp_path, monkeypatch, tokens):
        path = self.save(self.checkpoint(monkeypatch), tmp_path / "final.pt", monkeypatch)
        layer = read_reference(path)[1]
        processed = make_hooked(act_fn="gelu", normalization_type="LNPre")
        with splice(processed, {1: layer}):
            inside = processed(tokens)
        hooks = {("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"): layer}
        close32(inside, substituted(processed, tokens, hooks))
        with pytest.raises(ValueError, match="was trained on processed"):
            splice(make_hooked(act_fn="gelu", normalization_type="LN"), {1: layer})

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"is_transcoder": False}, "does not stand for an MLP"),
            ({"hook_point": "blocks.1.hook_resid_mid"}, "reads blocks.1.hook_resid_mid"),
            ({"out_hook_point": "blocks.2.hook_mlp_out"}, "writes blocks.2.hook_mlp_out"),
            ({"use_skip": True}, "an MxD with a skip"),
            ({"use_conditional": False}, "a transcoder with gelu"),
            ({"mlp_activation_fn": "swish"}, "unknown activation act_fn='swish'"),
            ({"topk": None}, "topk=None"),
            ({"topk": 21}, "k=21 cannot be active out of d_sae=20"),
        ],
    )
    def test_what_is_refused(self, tmp_path, monkeypatch, changes, said):
        checkpoint = self.checkpoint(monkeypatch, **changes)
        path = self.save(checkpoint, tmp_path / "final.pt", monkeypatch)
        with pytest.raises(ValueError, match=rf"final\.pt.*{said}"):
            read_layers(path)

    def test_weights_of_another_shape(self, tmp_path, monkeypatch):
        checkpoint = self.checkpoint(monkeypatch)
        checkpoint["state_dict"]["gate_bias"] = torch.zeros(3)
        path = self.save(checkpoint, tmp_path / "final.pt", monkeypatch)
        with pytest.raises(ValueError, match=r"final\.pt.*b_enc"):
            read_layers(path)

    def test_nothing_is_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (tmp_path / "exploded").touch, ()

        torch.save({"cfg": Bomb(), "state_dict": {}}, tmp_path / "bomb.pt")
        (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
        with gzip.open(tmp_path / "bomb.pkl.gz", "wb") as file:
            pickle.dump(Bomb(), file)
        for path in list(tmp_path.glob("bomb.*")):
            with pytest.raises(ValueError, match=rf"{path.name} is not read: .*could run code"):
                read_layers(path)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("how", ["truncated", "empty", "text", "tensors", "list"])
    def test_foreign_files(self, tmp_path, monkeypatch, how):
        path = self.save(self.checkpoint(monkeypatch), tmp_path / "final.pt", monkeypatch)
        if how in ("truncated", "empty"):
            path.write_bytes(path.read_bytes()[: 300 if how == "truncated" else 0])
        elif how == "text":
            path.write_text("a text")
        else:
            torch.save({"W_enc": torch.zeros(3)} if how == "tensors" else [3], path)
        with pytest.raises(ValueError, match=r"final\.pt is (not read|no checkpoint)"):
            read_layers(path)


class StandIn:
    """delphi's `LatentCache` (`delphi/latents/cache.py`), as far as it calls others."""

    def __init__(
        self, model: Any, hookpoint_to_sparse_encode: Any, batch_size: int, transcode: bool = False
    ):
        self.model, self.encode = model, hookpoint_to_sparse_encode
        self.batch_size, self.transcode = batch_size, transcode
        self.found: list[Tensor] = []

    @torch.no_grad()
    def run(self, n_tokens: int, tokens: Tensor) -> None:
        seen: dict[str, Tensor] = {}
        for name in self.encode:

            def hook(module: Any, inputs: Any, output: Any, name: str = name) -> None:
                seen[name] = inputs[0] if self.transcode else output

            self.model.get_submodule(name).register_forward_hook(hook)
        for batch in tokens[: n_tokens // tokens.shape[1]].split(self.batch_size):
            self.model(batch.to(self.model.device))
            for name, latents in seen.items():
                acts = self.encode[name](latents)
                assert (acts.cpu() > 0).sum((0, 1)).shape == acts.shape[2:]
                self.found.append(acts)

    def save_splits(self, n_splits: int, save_dir: Path) -> None:
        save_dir.mkdir()

    @property
    def acts(self) -> Tensor:
        return torch.cat(self.found)


class TestDelphi:
    LINES = Path(__file__).parents[2] / "docs" / "from-and-to.md"

    @pytest.mark.parametrize("installed", [False, True])
    @pytest.mark.parametrize("architecture", ["mxd", "batchtopk_mxd", "topk_skip_transcoder"])
    def test_the_lines_of_the_documentation(
        self, tmp_path, monkeypatch, llama_folder, tiny_bridge, architecture, installed
    ):
        if installed:
            pytest.importorskip("delphi.latents")
        else:
            for name in ("delphi", "delphi.latents"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            monkeypatch.setattr(
                sys.modules["delphi.latents"], "LatentCache", StandIn, raising=False
            )
        made = (
            make_training(architecture) if architecture == "batchtopk_mxd" else make(architecture)
        )
        layer = made.to_inference() if architecture == "batchtopk_mxd" else made
        layer.save_model(tmp_path / "runs" / "mxd" / "layer")
        monkeypatch.chdir(tmp_path)
        blocks = re.findall(
            r"```python\n(.*?)```", self.LINES.read_text(encoding="utf-8"), re.DOTALL
        )
        (lines,) = (block for block in blocks if "LatentCache" in block)
        assert "model.layers.6.mlp" in lines and "HuggingFaceTB/SmolLM2-135M" in lines
        lines = lines.replace("layers.6.mlp", "layers.1.mlp")
        lines = lines.replace("HuggingFaceTB/SmolLM2-135M", str(llama_folder))
        tokens = torch.randint(3, 24, (16, 7))
        names: dict[str, Any] = {"tokens": tokens}
        exec(lines, names)
        _, cache = tiny_bridge.run_with_cache(tokens, prepend_bos=False)
        expected = layer.codes(cache["blocks.1.mlp.hook_in"]).to_dense()
        if installed:
            (locations,) = names["cache"].cache.latent_locations.values()
            (values,) = names["cache"].cache.latent_activations.values()
            acts = torch.zeros_like(expected)
            acts[tuple(locations.T)] = values
            close32(acts, torch.where(expected > 1e-5, expected, 0))
            assert list((tmp_path / "latents").rglob("*.safetensors"))
        else:
            close32(names["cache"].acts, expected)


def test_the_documentations_other_lines(tmp_path, tiny_bridge):
    write_circuit_tracer(tmp_path / "set", {n: make("topk_skip_transcoder", n) for n in range(3)})
    text = TestDelphi.LINES.read_text(encoding="utf-8")
    lines = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    lines = lines.replace("path/of/any/of/these", str(tmp_path / "set")).replace('"gpt2"', '"tiny"')
    exec(lines, names := {"model": tiny_bridge})
    assert {layer.cfg.metadata.model_name for layer in names["layers"].values()} == {"tiny"}


@pytest.mark.parametrize("architecture", TestCircuitTracer.ARCHITECTURES)
def test_what_is_read_can_be_measured(tmp_path, tiny_bridge, documents, architecture):
    write_circuit_tracer(tmp_path / "set", {n: make(architecture, n) for n in range(2)})
    layer: Any = read_layers(tmp_path / "set")[1]
    layer.cfg.metadata.context_size = 8
    measured, _ = evaluate(tiny_bridge, layer, documents, n_sequences=4)
    assert measured["ce_replaced"] != measured["ce_original"]


def test_what_is_read_is_saved_and_loaded(tmp_path, x):
    write_circuit_tracer(tmp_path / "in", {0: make("jumprelu_skip_transcoder")})
    layer = read_layers(tmp_path / "in")[0]
    layer.save_model(tmp_path / "layer")
    same(SAE.load_from_disk(tmp_path / "layer")(x), layer(x))
    with pytest.raises(ValueError, match="is in SAELens' format already"):
        read_layers(tmp_path / "layer")
