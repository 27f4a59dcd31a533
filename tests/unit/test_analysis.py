"""The analyses of finished runs, on tiny models."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import save_file

from mxd_lens.analysis.chat import ChatModel
from mxd_lens.analysis.probing import pool_layer, probe
from mxd_lens.cli import main
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import text_activations
from mxd_lens.data.text import split_documents
from mxd_lens.models.site import Site
from mxd_lens.runs.analyse import (
    ExpertsConfig,
    LabelsConfig,
    ProbeConfig,
    ReportConfig,
    SteerConfig,
    probe_table,
    random_units,
    run_beside,
    run_experts,
    run_label,
    run_probe,
    run_steer,
    steering_table,
)
from mxd_lens.runs.results import load_layer
from mxd_lens.runs.train import train

from ..helpers import ANALYSES, ROW


@pytest.fixture
def runs(llama_folder, text, make_config, tmp_path):
    """A folder with three finished runs of a tiny model, a dense control's among them, and one
    that is not finished."""
    folder = tmp_path / "runs"
    for name in ("mxd", "topk", "dense"):
        common = {"model": str(llama_folder), "dataset": text, "output": str(folder / name)}
        train(make_config(architecture=name, **common))
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "mxd" / "runner_cfg.json", folder / "unfinished")
    return folder


class TestProbe:
    @pytest.fixture
    def config(self, runs, labelled):
        return ProbeConfig(run=str(runs), data=[labelled], n_texts=40, n_splits=2)

    def test_all_layers_neurons_and_a_guess_are_probed_alike(self, config, runs, tiny_bridge):
        paths = run_probe(config)
        assert paths == [runs / "mxd" / "probe.json", runs / "topk" / "probe.json"]
        reports = [json.loads(path.read_text()) for path in paths]
        for report, name in zip(reports, ["mxd", "topk"], strict=True):
            probed = {row["architecture"] for row in report["summary"]}
            assert probed == {name, "neurons", "majority"}
            assert {row["n_features"] for row in report["summary"]} == {0, 1, 2, 5, None}

        texts = load_labelled(config.data[0], n_texts=40)
        (run,) = [run for run in config.runs() if run.architecture == "topk"]
        sae = train(run)
        site = Site.of(tiny_bridge, sae)
        activations = text_activations(site, texts["text"], context_size=8)
        expected = probe(pool_layer(sae, activations), texts["label"], n_features=(2,), seed=1)
        found = [
            row
            for row in reports[1]["rows"]
            if (row["architecture"], row["n_features"], row["seed"]) == ("topk", 2, 1)
        ]
        assert [row["f1"] for row in found] == [row["f1"] for row in expected]
        assert [row["features"] for row in found] == [row["features"] for row in expected]
        table = probe_table(paths)
        assert table.count(f"| {config.data[0]} | neurons |  |  | 1 |") == 1
        assert "| mxd | 3 | 0 | 2 |" in table and "| topk | 3 | 0 | all |" in table

    def test_what_is_there_is_kept(self, config, monkeypatch):
        first = [path.read_text() for path in run_probe(config)]
        monkeypatch.setattr("mxd_lens.runs.config.load_model", None)
        assert [path.read_text() for path in run_probe(config)] == first
        config.n_texts = 20
        with pytest.raises(ValueError, match=r"n_texts=.*ask for the same, or move"):
            run_probe(config)

    def test_a_single_run_and_only_one_k(self, config, runs):
        config.run = str(runs / "mxd")
        assert run_probe(config) == [runs / "mxd" / "probe.json"]
        config.k = 7
        with pytest.raises(ValueError, match="no finished layer with k=7"):
            run_probe(config)

    def test_a_layer_without_k_and_layers_of_several_places(self, config, runs, make_config):
        (run,) = [run for run in config.runs() if run.architecture == "topk"]
        common = {"model": run.model, "dataset": run.dataset}
        train(make_config(architecture="jumprelu", output=str(runs / "jumprelu"), **common))
        path = next(path for path in run_probe(config) if path.parent.name == "jumprelu")
        assert {row["k"] for row in json.loads(path.read_text())["rows"]} == {None}
        config.k = 3
        assert {run.architecture for run in config.runs()} == {"mxd", "topk"}
        train(make_config(architecture="topk", layer=0, output=str(runs / "below"), **common))
        with pytest.raises(ValueError, match="several places"):
            config.runs()

    def test_a_dense_control_is_left_out(self, config, runs, capsys):
        run_probe(config)
        assert "dense is left out: a dense control has no experts" in capsys.readouterr().out
        assert not (runs / "dense" / "probe.json").exists()
        config.run = str(runs / "dense")
        for analyse, cfg_class in ANALYSES.values():
            with pytest.raises(ValueError, match="dense holds no layer with experts"):
                analyse(cfg_class(run=config.run))

    def test_folders_without_finished_runs(self, config, runs, tmp_path):
        config.run = str(runs / "unfinished")
        with pytest.raises(ValueError, match="is not finished"):
            run_probe(config)
        config.run = str(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="neither a finished run nor a comparison"):
            run_probe(config)
        with pytest.raises(SystemExit, match="holds neither a finished run nor a comparison"):
            main(["evaluate", config.run, "--dataset", "demo:state-of-the-union"])


class TestExperts:
    def test_every_live_expert_of_every_run(self, runs, offline):
        options = {"n_tokens": 600, "sample_tokens": 4, "prompt": "the cat"}
        paths = run_experts(ExpertsConfig(run=str(runs), **options))
        assert paths == [runs / "mxd" / "experts.json", runs / "topk" / "experts.json"]
        for path, name in zip(paths, ["mxd", "topk"], strict=True):
            found = json.loads(path.read_text())
            assert found["architecture"] == name and found["dataset"].endswith("text.jsonl")
            assert len(found["experts"]) == found["n_live"] > 5
            for expert in found["experts"]:
                assert expert["sample"].startswith("the cat")
                assert expert["promoted"] and expert["contexts"]
            assert len({expert["sample"] for expert in found["experts"]}) > 5

    def test_what_is_there_is_kept(self, runs, offline, monkeypatch):
        config = ExpertsConfig(run=str(runs / "mxd"), n_tokens=400)
        config.effect_strength = config.sample_strength = 0
        (path,) = run_experts(config)
        found = path.read_text()
        assert json.loads(found)["experts"][0]["sample"] is None
        monkeypatch.setattr("mxd_lens.runs.config.load_model", None)
        assert run_experts(config) == [path] and path.read_text() == found
        config.n_tokens = 500
        with pytest.raises(ValueError, match=r"n_tokens=.*ask for the same"):
            run_experts(config)

    def test_effects_and_samples_that_are_missing_are_made(self, runs, offline, monkeypatch):
        config = ExpertsConfig(run=str(runs / "mxd"), n_tokens=400, prompt="the cat")
        config.effect_strength = config.sample_strength = 0

        def described():
            (path,) = run_experts(config)
            return json.loads(path.read_text())

        contexts = described()
        config.sample_strength, config.effect_strength = 3.0, 2.0

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("mxd_lens.runs.analyse.generate_steered", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_experts(config)
        effects = json.loads((runs / "mxd" / "experts.json").read_text())
        monkeypatch.setattr("mxd_lens.runs.analyse.inspect_experts", None)
        samples = described()
        assert samples["asked"].pop("samples")["prompt"] == "the cat"
        for expert in samples["experts"]:
            assert expert["sample"].startswith("the cat")
            expert["sample"] = None
        assert samples == effects
        assert effects["asked"].pop("effects") == {"effect_strength": 2.0}
        for expert in effects["experts"]:
            assert expert["promoted"] and expert["suppressed"]
            expert |= dict.fromkeys(("promoted", "suppressed", "agreement"))
        assert effects == contexts

    def test_samples_from_before_top_p_are_kept(self, runs, offline, edit_json):
        config = ExpertsConfig(run=str(runs / "mxd"), n_tokens=400, prompt="the cat")
        config.effect_strength = 0.0
        (path,) = run_experts(config)
        asked = json.loads(path.read_text())["asked"]
        assert asked["samples"].pop("top_p") is None
        edit_json(path, asked=asked)
        before = path.read_text()
        run_experts(config)
        assert path.read_text() == before
        config.top_p = 0.5
        with pytest.raises(ValueError, match=r"top_p=None, and this asks for top_p=0.5"):
            run_experts(config)


class TestLabel:
    @pytest.fixture(autouse=True)
    def no_endpoint(self, monkeypatch):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    @pytest.fixture
    def run(self, llama_folder, text, make_config, tmp_path, offline):
        """A run whose experts have been described."""
        run = tmp_path / "run"
        common = {"model": str(llama_folder), "dataset": text, "training_tokens": 64}
        train(make_config(architecture="topk", output=str(run), **common))
        options = {"n_tokens": 400, "effect_strength": 0.0, "sample_strength": 0.0}
        run_experts(ExpertsConfig(run=str(run), **options))
        return run

    @pytest.fixture
    def config(self, run):
        return LabelsConfig(run=str(run), n_experts=3, n_tokens=400)

    def labels(self, run):
        return json.loads((run / "labels.json").read_text())

    def test_names_there_are_judged_on_other_text(self, config, run, capsys):
        main(["label", str(run), "--n_experts", "3", "--n_tokens", "400"])
        found = self.labels(run)
        described = json.loads((run / "experts.json").read_text())
        names = {expert["id"]: expert["name"] for expert in described["experts"]}
        assert found["namer"] == "words of the contexts" and found["asked"]["chat"] is None
        assert found["judge"].startswith("all-MiniLM-L6-v2, cosine of at least 0.")
        assert found["n_tokens"] >= 400
        judged = [label for label in found["labels"] if label["n_contexts"] is not None]
        assert len(judged) == 3
        for label in judged:
            assert label["name"] == names[label["id"]] and label["shuffled"] != label["id"]
            assert label["n_contexts"] % 2 == 0 and label["unanswered"] == 0
            assert 0 <= label["f1"] <= 1 and 0 <= label["f1_shuffled"] <= 1
        assert "Names of 3 experts, by words of the contexts" in capsys.readouterr().out

    def test_what_is_there_is_kept_and_more_experts_are_added(self, config, run, monkeypatch):
        (path,) = run_label(config)
        before = path.read_text()
        with monkeypatch.context() as patch:
            patch.setattr("mxd_lens.runs.config.load_model", None)
            assert run_label(config) == [path] and path.read_text() == before
        config.n_experts = 5
        run_label(config)
        after = self.labels(run)
        assert after["labels"][:3] == json.loads(before)["labels"][:3]
        path.unlink()
        run_label(config)
        assert self.labels(run) == after

    def test_a_kill_loses_nothing_that_is_finished(self, config, run, monkeypatch, server):
        asked = []

        def answer(chat, prompt):
            asked.append(prompt)
            if len(asked) == n_answers:
                raise KeyboardInterrupt
            if "description and" not in prompt:
                return json.dumps({"name": f"{zlib.crc32(prompt.encode())}"})
            n = len(json.loads(prompt[prompt.index("{") :])["texts"])
            return json.dumps([zlib.crc32(prompt.encode()) >> i & 1 for i in range(n)])

        monkeypatch.setattr(ChatModel, "__call__", answer)
        n_answers = None
        run_label(config)
        whole, needed = self.labels(run), len(asked)
        assert whole["namer"] == whole["judge"] == "tiny" and needed > 8
        (run / "labels.json").unlink()
        asked.clear()
        n_answers = needed - 1  # while the last expert is judged
        with pytest.raises(KeyboardInterrupt):
            run_label(config)
        judged = [label for label in self.labels(run)["labels"] if label["f1"] is not None]
        assert judged == whole["labels"][: len(judged)] and len(judged) == 2
        asked.clear()
        n_answers = None
        run_label(config)
        assert self.labels(run) == whole
        assert len(asked) == 4  # contexts of the last one, with two names

    def test_otherwise_made(self, config, run, monkeypatch, edit_json, server):
        monkeypatch.delenv("OPENAI_BASE_URL")
        run_label(config)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(ValueError, match="made with chat=None, and this asks for chat='tiny'"):
            run_label(config)
        monkeypatch.delenv("OPENAI_BASE_URL")
        config.n_tokens = 500
        with pytest.raises(ValueError, match=r"n_tokens=.*ask for the same"):
            run_label(config)
        config.n_tokens = 400
        described = json.loads((run / "experts.json").read_text())["asked"]["contexts"]
        edit_json(run / "experts.json", asked={"contexts": described | {"seed": 1}})
        with pytest.raises(ValueError, match=r"made with experts="):
            run_label(config)
        assert not server.requests

    def test_what_cannot_be_labelled(self, config, run, edit_json):
        experts = json.loads((run / "experts.json").read_text())
        edit_json(run / "experts.json", n_tokens=100_000)
        with pytest.raises(ValueError, match="0 different texts are left after 100,000 tokens"):
            run_label(config)
        edit_json(run / "experts.json", experts=experts["experts"][:1])
        with pytest.raises(ValueError, match="no two experts with 10 top contexts"):
            run_label(config)
        (run / "experts.json").unlink()
        with pytest.raises(ValueError, match=r"no .*run/experts.json: run `mxd-lens experts"):
            run_label(config)


class TestBeside:
    """Layers of different architectures at different depths, an SAE of the MLP's output too."""

    WHERE = {"mxd": 1, "topk_transcoder": 0, "topk": 1}

    @pytest.fixture
    def layers(self, llama_folder, text, make_config, tmp_path, offline):
        for name, layer in self.WHERE.items():
            common = {"model": str(llama_folder), "dataset": text, "training_tokens": 64}
            output = str(tmp_path / name)
            train(make_config(architecture=name, layer=layer, output=output, **common))
            (tmp_path / name / "results.json").write_text(
                json.dumps({"version": 3} | ROW | {"architecture": name, "hook_layer": layer})
            )
            self.describe(tmp_path / name)
        return tmp_path

    def describe(self, run, n_tokens=400):
        options = {"n_tokens": n_tokens, "effect_strength": 0.0, "sample_strength": 0.0}
        run_experts(ExpertsConfig(run=str(run), **options))

    def active(self, model, run, documents):
        """Where its experts fire in the text it was described on, read text by text."""
        sae = load_layer(run / "layer")
        hook, active, n_tokens = sae.cfg.metadata.hook_name, [], 0
        for document in dict.fromkeys(split_documents(documents, 40)[0]["text"]):
            if n_tokens >= 400:
                break
            tokens = model.to_tokens(document)[:, :8]
            _, cache = model.run_with_cache(tokens, names_filter=hook)
            active.append((sae.encode(cache[hook][0]) > 0)[tokens[0] > 2])
            n_tokens += len(active[-1])
        return torch.cat(active).numpy()

    def test_counted_densely(self, layers, tiny_bridge, documents, capsys):
        main(["report", str(layers / "mxd"), "--beside", str(layers / "topk_transcoder")])
        (layer,) = json.loads((layers / "mxd" / "beside.json").read_text())["layers"]
        assert layer["run"] == "../topk_transcoder"
        assert layer["label"] == "layer 0: transcoder, k = 3, seed 0"
        mine, theirs = (
            self.active(tiny_bridge, layers / name, documents)
            for name in ("mxd", "topk_transcoder")
        )
        assert layer["text"]["n_tokens"] == len(mine) == len(theirs)
        best = []
        for expert in layer["experts"]:
            fires = mine[:, [expert["id"]]]
            jaccard = (fires & theirs).sum(0) / np.maximum((fires | theirs).sum(0), 1)
            best.append(jaccard.max())
            expected = np.sort(jaccard[jaccard > 0])[::-1][:5]
            scores = [score for _, score in expert["nearest"]]
            assert scores == pytest.approx(expected.tolist(), rel=1e-3)
            assert [jaccard[i] for i, _ in expert["nearest"]] == pytest.approx(scores, rel=1e-3)
        described = json.loads((layers / "mxd" / "experts.json").read_text())["experts"]
        assert [expert["id"] for expert in layer["experts"]] == [e["id"] for e in described]
        assert layer["jaccard"] == pytest.approx(np.mean(best), rel=1e-3)
        printed = capsys.readouterr().out
        assert f"{layer['jaccard']:.2f} on average (by chance" in printed
        assert printed.endswith("mxd/report.html\n")
        page = (layers / "mxd" / "report.html").read_text()
        assert '<script id="beside"' in page and "layer 0: transcoder, k = 3, seed 0" in page

    def test_an_sae_reads_the_mlps_output(self, layers, tiny_bridge, documents):
        run_beside(ReportConfig(run=str(layers / "topk"), beside=str(layers / "mxd")))
        (layer,) = json.loads((layers / "topk" / "beside.json").read_text())["layers"]
        mine = self.active(tiny_bridge, layers / "topk", documents)
        assert [e["id"] for e in layer["experts"]] == np.flatnonzero(mine.any(0)).tolist()

    def test_what_is_there_is_kept_and_the_page_is_of_the_last(self, layers, monkeypatch):
        run = layers / "mxd"
        for name in ("topk_transcoder", "topk"):
            main(["report", str(run), "--beside", str(layers / name)])
        monkeypatch.setattr("mxd_lens.runs.config.load_model", None)
        before = json.loads((run / "beside.json").read_text())["layers"]
        assert [layer["run"] for layer in before] == ["../topk_transcoder", "../topk"]

        def shown():
            page = (run / "report.html").read_text()
            return [text in page for text in ("layer 0: transcoder", "layer 1: SAE of the MLP")]

        assert shown() == [False, True]
        main(["report", str(run)])
        assert shown() == [False, True]
        main(["report", str(run), "--beside", str(layers / "topk_transcoder")])
        assert shown() == [True, False]
        main(["report", str(run)])
        assert shown() == [True, False]
        assert json.loads((run / "beside.json").read_text())["layers"] == before[::-1]
        assert run_beside(ReportConfig(run=str(run))) == []

    def test_what_cannot_be_compared(self, layers, make_config, edit_json, documents, tmp_path):
        run, other = layers / "mxd", layers / "topk"

        def beside(name):
            return run_beside(ReportConfig(run=str(run), beside=str(name)))

        with pytest.raises(ValueError, match="mxd' is one of the layers itself: name another"):
            beside(run)
        with pytest.raises(ValueError, match="holds neither a finished run nor a comparison"):
            beside(tmp_path / "nowhere")
        (layers / "both").mkdir()
        for name in ("mxd", "topk"):
            shutil.copytree(layers / name, layers / "both" / name)
        with pytest.raises(ValueError, match="both' holds several layers: name a folder in it"):
            beside(layers / "both")
        shutil.copytree(run, layers / "dense")
        edit_json(layers / "dense" / "runner_cfg.json", architecture="dense")
        with pytest.raises(ValueError, match="is a dense control without experts: name another"):
            beside(layers / "dense")
        (other / "experts.json").rename(other / "aside.json")
        with pytest.raises(ValueError, match=r"no .*topk/experts.json: run `mxd-lens experts"):
            beside(other)
        self.describe(other, n_tokens=300)
        said = r"mxd/experts.json says n_tokens=4\d\d, and .*topk/experts.json n_tokens=3\d\d: run"
        with pytest.raises(ValueError, match=said):
            beside(other)
        assert not (run / "beside.json").exists()
        (other / "aside.json").rename(other / "experts.json")
        beside(other)
        for name in ("mxd", "topk"):
            edit_json(layers / name / "experts.json", n_tokens=500)
        with pytest.raises(ValueError, match=r"beside.json was made with n_tokens=.*ask for the s"):
            beside(other)


class TestSteer:
    @pytest.fixture
    def config(self, runs):
        options = {"n_samples": 3, "sample_tokens": 4, "prompt": "the cat"}
        return SteerConfig(run=str(runs), experts=[1, 5], strengths=[0.5, 2.0], **options)

    def test_all_layers_at_the_same_strengths(self, config, runs, offline):
        paths = run_steer(config)
        assert paths == [runs / "mxd" / "steering.json", runs / "topk" / "steering.json"]
        for path, name in zip(paths, ["mxd", "topk"], strict=True):
            rows = json.loads(path.read_text())["rows"]
            found = [(row["architecture"], row["strength"], row["expert"]) for row in rows]
            assert found == [(name, strength, i) for strength in (0.5, 2.0) for i in (1, 5)]
            assert all(len(row["samples"]) == 3 for row in rows)
            by_strength = [row["amount"] for row in rows if row["expert"] == 1]
            assert by_strength[1] == pytest.approx(4 * by_strength[0])
        table = steering_table(paths)
        assert "| mxd | 0 |" in table and "| topk | 2 | 2 |" in table

    def test_strengths_are_added_to_what_is_there(self, config, runs, offline):
        config.run = str(runs / "topk")
        (path,) = run_steer(config)
        before = json.loads(path.read_text())["rows"]
        config.strengths = [2.0, 1.0]
        run_steer(config)
        after = json.loads(path.read_text())["rows"]
        assert after[:4] == before and [row["strength"] for row in after[4:]] == [1.0, 1.0]
        config.prompt = "a dog"
        with pytest.raises(ValueError, match=r"prompt=.*ask for the same"):
            run_steer(config)

    def test_the_papers_protocol(self, runs, offline, llama_folder, tmp_path, edit_json):
        longer = tmp_path / "longer"  # than prompt and samples; rotary positions have no weights
        shutil.copytree(llama_folder, longer)
        edit_json(longer / "config.json", max_position_embeddings=64)
        for name in ("mxd", "topk", "dense"):
            edit_json(runs / name / "runner_cfg.json", model=str(longer))
        command = ["steer", str(runs), "--edit", "paper", "--experts", "1", "5"]
        main(command)
        for name in ("mxd", "topk"):
            path = runs / name / "steering.json"
            found = json.loads(path.read_text())
            rows = found.pop("rows")
            assert found.pop("unsteered").keys() == {"coherence", "perplexity"}
            assert found == {
                **{"version": 3, "edit": "paper", "prompt": "Let's talk about ", "seed": 0},
                **{"n_samples": 10, "n_tokens": 32, "temperature": 1.0, "top_p": 0.1},
            }
            assert [(row["expert"], row["strength"], row["amount"]) for row in rows] == [
                (1, 100.0, 100.0), (5, 100.0, 100.0)
            ]  # fmt: skip
            assert all(len(row["samples"]) == 10 for row in rows)
        main([*command, "--strengths", "100", "10"])
        assert [row["amount"] for row in json.loads(path.read_text())["rows"]] == [100, 100, 10, 10]
        with pytest.raises(SystemExit, match=r"edit='paper', and .* edit='direction'"):
            main(["steer", str(runs), "--prompt", "Let's talk about ", "--experts", "1"])

    def test_a_file_from_before_top_p_goes_on(self, config, runs, offline):
        config.run = str(runs / "topk")
        (path,) = run_steer(config)
        before = path.read_text()
        assert "top_p" not in before
        config.top_p = 0.5
        with pytest.raises(ValueError, match=r"top_p=None, and this asks for top_p=0.5"):
            run_steer(config)
        config.top_p = None
        run_steer(config)
        assert path.read_text() == before

    def test_nothing_to_steer(self, config, runs):
        save_file({"sparsity": torch.full((12,), -10.0)}, runs / "mxd/layer" / SPARSITY_FILENAME)
        config.experts = None
        with pytest.raises(ValueError, match=r"no unit of .*mxd fires often enough"):
            run_steer(config)

    def test_random_units_are_live_and_decided_by_the_seed(self, config, runs):
        run = next(run for run in config.runs() if run.architecture == "topk")
        some = random_units(run, 4)
        assert len(set(some)) == 4 and some == random_units(run, 4) != random_units(run, 4, seed=1)
        sparsity = torch.full((12,), -10.0)
        sparsity[[2, 7]] = -1.0
        save_file({"sparsity": sparsity}, run.layer_path / SPARSITY_FILENAME)
        assert sorted(random_units(run, 4)) == [2, 7]
