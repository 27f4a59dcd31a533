"""Bad values are refused in one sentence that names them, where they are given."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from mxd_lens import CompareConfig, compare, inspect_experts, steer, train
from mxd_lens.analysis.embedding import embed
from mxd_lens.analysis.probing import probe
from mxd_lens.analysis.steering import calibrate_strength, evaluate_steering, generate_steered
from mxd_lens.cli import EvaluateConfig, main
from mxd_lens.data.reading import read_heldout, text_activations
from mxd_lens.files import LOCK
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site
from mxd_lens.runs.analyse import (
    AnalysisConfig,
    ExpertsConfig,
    ProbeConfig,
    ReportConfig,
    SteerConfig,
)

from ..conftest import TINY_RUN, TINY_RUNS
from ..helpers import placed


class TestConfigurations:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"batch_size": 0}, "batch_size=0: must be at least 1"),
            ({"context_size": 2}, "context_size=2: must be at least 3"),
            ({"lm_batch_size": 0}, "lm_batch_size=0: must be at least 1"),
            ({"heldout_documents": 0}, "heldout_documents=0: must be at least 1"),
            ({"layer": -1}, "layer=-1: must be at least 0"),
            ({"architecture": "relu"}, "unknown architecture 'relu'; known: .*mxd_paper"),
            ({"device": "cuda:99"}, "device='cuda:99': this machine has no such device"),
            ({"device": "meta"}, "device='meta': this machine has no such device"),
            ({"device": "quantum"}, "device='quantum': this machine has no such device"),
            ({"d_sae": 0}, "d_sae=0: must be at least 1"),
            ({"k": 2.5}, "k=2.5: must be a valid integer"),
            ({"k": True}, "k=True: must be a valid integer"),
            ({"lr": 0.0}, "lr=0.0: must be greater than 0"),
            ({"lr": float("nan")}, "lr=nan: must be a finite number"),
            ({"output": ""}, "output='': String should have at least 1 character"),
            ({"lr_warm_up_steps": 41}, "lr_warm_up_steps=41 .* more than the run's 40 steps"),
            (
                {"lr_warm_up_steps": 30, "lr_decay_steps": 11},
                "lr_warm_up_steps=30 and lr_decay_steps=11 are more",
            ),
            ({"sae_options": '{"d_hidden": "x"}'}, r"sae_options\['d_hidden'\]='x': must be a val"),
            ({"sae_options": '{"k": 4}'}, "sae_options must be an object with fields"),
            (
                {"sae_options": '{"aux_loss_coefficient": NaN}'},
                "sae_options is not JSON: NaN is no number",
            ),
            ({"sae_options": '{"device": "meta"}'}, "sae_options must be an object with fields"),
            ({"k": 0, "seed": -1}, "k=0: must be at least 1; seed=-1: must be at least 0"),
            *(
                ({"architecture": name, "k": 13}, "k=13 cannot be active out of d_sae=12")
                for name in ("mxd", "topk", "topk_transcoder")
            ),
            ({"sae_options": "{"}, "sae_options is not JSON"),
            ({"sae_options": '{"l1": 3}'}, ".*fields of TrainingMxDConfig: .*d_hidden"),
            (
                {"architecture": "jumprelu", "sae_options": '{"l0_coefficient": "x"}'},
                r"sae_options\['l0_coefficient'\]='x': must be a val",
            ),
            ({"training_tokens": 31}, ".*less than one batch"),
        ],
    )
    def test_a_run(self, make_config, fields, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            make_config(**fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"k": []}, r"k=\[\]: name at least one"),
            ({"seeds": []}, r"seeds=\[\]: name at least one"),
            ({"architectures": []}, r"architectures=\[\]: name at least one"),
            ({"k": [2, 2]}, r"k=\[2, 2\]: 2 is there twice"),
            ({"seeds": [1, 0, 1]}, "1 is there twice"),
            ({"architectures": ["topk", "topk"]}, "'topk' is there twice"),
            ({"architectures": ["mxd:paper"]}, "unknown architecture 'mxd:paper'; known: "),
            ({"n_sequences": 0}, "n_sequences=0: must be at least 1"),
            ({"k": [2, 2.5]}, r"k\[1\]=2.5: must be a valid integer"),
        ],
    )
    def test_a_comparison(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CompareConfig(**TINY_RUNS | {"output": "nowhere"} | fields)

    @pytest.mark.parametrize(
        ("cfg_class", "fields", "message"),
        [
            (EvaluateConfig, {"n_sequences": 0}, "n_sequences=0: must be at least 1"),
            (AnalysisConfig, {"k": 0}, "k=0: must be at least 1"),
            (ProbeConfig, {"data": []}, r"data=\[\]: name at least one"),
            (ProbeConfig, {"n_splits": 0}, "n_splits=0: must be at least 1"),
            (ExpertsConfig, {"n_tokens": 0}, "n_tokens=0: must be at least 1"),
            (
                ExpertsConfig,
                {"effect_strength": float("nan")},
                "effect_strength=nan: must be a fin",
            ),
            (SteerConfig, {"strengths": [1.0, 1.0]}, "1.0 is there twice"),
            (SteerConfig, {"strengths": [float("inf")]}, r"strengths\[0\]=inf: must be a finite"),
            (SteerConfig, {"temperature": float("nan")}, "temperature=nan: must be a finite"),
            (SteerConfig, {"top_p": 0.0}, "top_p=0.0: must be greater than 0"),
            (ExpertsConfig, {"top_p": 1.5}, "top_p=1.5: must be less than or equal to 1"),
            (
                SteerConfig,
                {"edit": "paper", "n_samples": 4},
                "edit=paper has n_samples=10, and this asks for 4",
            ),
            (ReportConfig, {"beside": ""}, "beside='': String should have at least 1 character"),
            (SteerConfig, {"n_experts": -1}, "n_experts=-1: must be at least 1"),
            (SteerConfig, {"experts": []}, r"experts=\[\]: name at least one"),
            (SteerConfig, {"n_samples": 1}, "n_samples=1: must be at least 2"),
        ],
    )
    def test_an_analysis(self, cfg_class, fields, message):
        with pytest.raises(ValueError, match=message):
            cfg_class(run="nowhere", **fields)

    def test_a_path_may_be_a_path(self, make_config, tiny_bridge, documents, tmp_path):
        cfg = make_config(output=tmp_path / "run")
        assert asdict(cfg)["output"] == str(tmp_path / "run")
        train(cfg, tiny_bridge, documents)
        assert (tmp_path / "run" / "layer").exists()

    def test_a_changed_copy_is_checked_too(self, make_config):
        with pytest.raises(ValueError, match="k=-3: must be at least 1"):
            replace(make_config(), k=-3)


class TestBeforeTheWork:
    @pytest.fixture
    def untouched(self, at_step):
        """Nothing is trained."""
        with at_step(0, lambda: pytest.fail("trained first")):
            yield

    @pytest.mark.parametrize("architecture", ["topk", "mxd", "topk_transcoder"])
    def test_a_k_that_one_layer_of_a_comparison_has_not(
        self, untouched, tiny_bridge, documents, tmp_path, architecture
    ):
        sizes = {"expansion": 4, "architectures": [architecture], "k": [2, 1000]}
        cfg = CompareConfig(**TINY_RUNS | {"output": str(tmp_path / "out")} | sizes)
        with pytest.raises(ValueError, match=r"k=1000 cannot be active out of d_sae="):
            compare(cfg, tiny_bridge, documents)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]

    @pytest.fixture
    def arguments(self, llama_folder, text, tmp_path):
        fields = TINY_RUN | {"model": str(llama_folder), "dataset": text}
        fields |= {"output": str(tmp_path / "run"), "d_sae": 12, "k": 3}

        def arguments(**values):
            return [f"--{name}={value}" for name, value in (fields | values).items()]

        return arguments

    def test_a_heldout_text_that_is_too_short(self, untouched, arguments):
        with pytest.raises(SystemExit, match=r"^mxd-lens: the held-out text is too short"):
            main(["train", *arguments(heldout_documents=2)])

    def test_a_layer_that_cannot_be_leaves_its_folder_free(self, arguments, tmp_path):
        with pytest.raises(SystemExit, match="no layer 7"):
            main(["train", *arguments(layer=7)])
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


class TestText:
    @pytest.mark.parametrize("cached", [False, True])
    def test_special_tokens_only(self, tiny_bridge, make_config, tmp_path, cached):
        documents = Dataset.from_dict({"text": ["</s>" * i for i in range(1, 100)]})
        activations = str(tmp_path / "activations") if cached else None
        with pytest.raises(ValueError, match="the text holds special tokens only"):
            train(make_config(activations=activations), tiny_bridge, documents)

    def test_special_tokens_for_a_while(self, tiny_bridge, documents, make_config, tmp_path):
        texts = ["</s>" * 100] * 3 + list(documents["text"])
        mixed = Dataset.from_dict({"text": texts}).to_iterable_dataset()
        cfg = make_config(activations=str(tmp_path / "activations"), heldout_documents=1)
        train(cfg, tiny_bridge, mixed)

    def test_a_stream_that_is_all_held_out(self, tiny_bridge, documents, make_config):
        stream = documents.to_iterable_dataset()
        with pytest.raises(ValueError, match="there is no document: give more text"):
            train(make_config(heldout_documents=200), tiny_bridge, stream)


class TestArguments:
    @pytest.fixture
    def mxd(self, tiny_bridge):
        return placed(MxD.from_mlp(tiny_bridge.blocks[1].mlp), tiny_bridge)

    @pytest.mark.parametrize("name", ["n_sequences", "n_tokens", "batch_size", "context_size"])
    def test_reading_heldout_text(self, tiny_bridge, documents, name):
        sizes = {"context_size": 8, name: 0}
        with pytest.raises(ValueError, match=f"{name}=0: must be at least"):
            read_heldout(Site.at(tiny_bridge, 1), documents, device="cpu", **sizes)

    @pytest.mark.parametrize("name", ["n_tokens", "context_size", "lm_batch_size"])
    def test_inspecting_experts(self, tiny_bridge, mxd, documents, name):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            inspect_experts(tiny_bridge, mxd, documents, **{name: 0})

    def test_probes(self, tiny_bridge):
        site = Site.at(tiny_bridge, 1)
        with pytest.raises(ValueError, match="lm_batch_size=0: must be at least 1"):
            text_activations(site, ["the cat"], lm_batch_size=0)
        with pytest.raises(ValueError, match="n_texts=0: must be at least 1"):
            text_activations(site, [])
        with pytest.raises(ValueError, match=r"n_features\[0\]=-1: must be at least 0"):
            probe(np.eye(8), ["a", "b"] * 4, n_features=[-1])

    def test_steering(self, tiny_bridge, mxd):
        x, nan = torch.randn(9, 16), float("nan")
        with pytest.raises(ValueError, match="strength=nan: must be a finite number"):
            calibrate_strength(mxd, [0], nan, x, 1.0)
        with pytest.raises(ValueError, match="temperature=nan: must be a finite number"):
            generate_steered(tiny_bridge, mxd, [0], torch.ones(1), temperature=nan)
        with pytest.raises(ValueError, match="n_samples=0: must be at least 1"):
            generate_steered(tiny_bridge, mxd, [0], torch.ones(1), n_samples=0)
        with pytest.raises(ValueError, match="top_p=0: must be greater than 0"):
            generate_steered(tiny_bridge, mxd, [0], torch.ones(1), top_p=0)
        with pytest.raises(ValueError, match=r"strengths\[0\]=inf: must be a finite number"):
            evaluate_steering(tiny_bridge, mxd, [0], [float("inf")], x, 1.0)
        with pytest.raises(ValueError, match=r"strengths=\[1, 1\]: 1.0 is there twice"):
            evaluate_steering(tiny_bridge, mxd, [0], [1, 1], x, 1.0)
        with (
            pytest.raises(ValueError, match="add=nan: must be finite"),
            steer(tiny_bridge, mxd, [0], add=nan),
        ):
            pass

    def test_embedding(self):
        with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
            embed(["a text"], batch_size=0)
