"""The report's content, and that nothing of a corpus becomes part of the page."""

import json
import random
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from mxd_lens.report.page import write_report
from mxd_lens.report.tables import summary

from ..conftest import TINY_RUN

HOSTILE = '</script><img src=x onerror="window.pwned=1"><!--data--> & %{x} \u2028'

FAITHFULNESS = {
    "architecture": "mxd",
    "recipe": "centred",
    "model_name": "tiny",
    "hook_name": "blocks.1.mlp.hook_in",
    "hook_name_out": "blocks.1.mlp.hook_out",
    "k": 3,
    "d_sae": 12,
    "n_parameters": 1000,
    "ce_original": 3.0,
    "ce_replaced": 3.0625,
    "ce_mean_gate": 3.125,
    "ce_shuffled_gate": 3.25,
    "ce_shuffled_gate_matched": 3.1875,
    "ce_zero_ablation": 3.5,
    "kl": 0.01,
    "ce_increase": 0.0625,
    "ce_recovered": 0.875,
    "fvu": 0.04,
    "nmse": 0.05,
    "l0": 3.0,
    "alive_fraction": 0.75,
    "always_on": 0,
    "dataset": "tiny (held out)",
}

TEXTS = [
    [" the", " cat", "\n", " sat", HOSTILE, " on"],
    [" a", " dog", " ran", " after", " the", " fish"],
    [*(f" {word}" for word in ["far"] * 30), " near", *(f" {word}" for word in ["beyond"] * 20)],
]


def expert(i, **fields):
    return {
        "id": i,
        "name": "",
        "density": 0.001 * (i + 1),
        "mean": 1.0 + i % 3,
        "max": 4.0,
        "histogram": [20 - bar for bar in range(20)],
        "contexts": [
            {"text": 0, "position": 1, "value": 4.0, "quantile": 1.0},
            {"text": 1, "position": 2, "value": 3.0, "quantile": 0.5},
        ],
        "coherence": None,
        "same_token": 0.5,
        "meaningful": False,
        "promoted": None,
        "suppressed": None,
        "agreement": None,
        "alike": [],
        "coactive": [],
        "rank": 16,
        "effective_rank": 9.5,
        "sample": None,
        **fields,
    }


EXPERTS = {
    "model_name": "tiny",
    "hook_name": "blocks.1.mlp.hook_in",
    "hook_name_out": "blocks.1.mlp.hook_out",
    "architecture": "mxd",
    "k": 3,
    "d_sae": 12,
    "dataset": "tiny",
    "n_tokens": 5000,
    "n_live": 5,
    "rule": f"An expert counts where {HOSTILE}",
    "texts": TEXTS,
    "experts": [
        expert(0, name=HOSTILE, sample=f"steered\n{HOSTILE}", promoted=[[HOSTILE, 1.5]]),
        expert(
            2,
            name="animals · cats",
            meaningful=True,
            coherence=0.25,
            agreement=0.995,
            promoted=[[" kitten", 1.23456789], ["\n", 0.5]],
            suppressed=[[" rock", -0.5]],
            alike=[[7, 0.875], [11, 0.5]],
            coactive=[[0, 0.25]],
            contexts=[
                {"text": 0, "position": 1, "value": 4.0, "quantile": 1.0},
                {"text": 2, "position": 30, "value": 3.5, "quantile": 1.0},
                {"text": 0, "position": 2, "value": 1.0, "quantile": 0.25},
            ],
        ),
        expert(3, coherence=0.5),
        expert(7, name="dogs", meaningful=True, coherence=0.125, agreement=0.255),
        expert(9, contexts=[{"text": 1, "position": 5, "value": 2.0, "quantile": 1.0}]),
    ],
}


def probe_file(name="mxd", k=3, f1=0.5):
    def row(of, features, f1, seed=0, name=name, k=k, run_seed=0):
        n = None if features is None else len(features)
        about = {"data": "tiny", "name": name, "k": k, "run_seed": run_seed, "class": of}
        return about | {"n_features": n, "features": features, "f1": f1, "seed": seed}

    def mean(n, f1, name=name, k=k, run_seed=0):
        about = {"data": "tiny", "name": name, "k": k, "run_seed": run_seed}
        return about | {"n_features": n, "f1": f1}

    return {
        "datasets": {"tiny": {"n_texts": 8, "classes": ["cats", HOSTILE]}},
        "rows": [
            row("cats", [7], 0.75),
            row("cats", [2], 0.5, seed=1),
            row("cats", [7], 0.25, seed=2),
            row("cats", [7, 3], 0.875),
            row(HOSTILE, [11, 0], 0.5),
            row(HOSTILE, None, 1.0),
            row("cats", [9], 1.0, name="neurons", k=None, run_seed=None),
            row("cats", [9], 1.0, run_seed=1),
        ],
        "summary": [
            mean(1, f1),
            mean(2, f1 + 0.25),
            mean(1, 0.375, name="neurons", k=None, run_seed=None),
            mean(0, 0.0, name="majority", k=None, run_seed=None),
        ],
    }


def steering_file(name="mxd", prompt="So"):
    scored = [(2, 1.0, 0.5, 20.0), (3, 1.0, 0.25, 40.0), (2, 2.0, 0.75, 80.0)]
    return {
        "edit": "contribution",
        "prompt": prompt,
        "n_samples": 2,
        "n_tokens": 8,
        "temperature": 0.9,
        "seed": 0,
        "unsteered": {"coherence": 0.25, "perplexity": 10.0},
        "rows": [
            {"name": name, "expert": expert, "strength": strength, "amount": 7.5 * strength}
            | {"coherence": coherence, "perplexity": perplexity, "samples": [HOSTILE, "other"]}
            for expert, strength, coherence, perplexity in scored
        ],
    }


def write_run(folder, architecture="mxd", k=3, seed=0, **files):
    """A finished run: its configuration, its faithfulness, and ``files`` by stem."""
    folder.mkdir(parents=True)
    cfg = TINY_RUN | {"architecture": architecture, "k": k, "seed": seed}
    row = {"name": architecture, "seed": seed} | FAITHFULNESS | {"architecture": architecture}
    files = {"runner_cfg": cfg, "results": row | {"k": k}} | files
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


def write_comparison(folder):
    """A run with everything, and three beside it of which one has the same k and seed."""
    run = write_run(folder / "mxd", experts=EXPERTS, probe=probe_file(), steering=steering_file())
    other = "topk_transcoder"
    write_run(
        folder / "same", other, probe=probe_file(other, f1=0.25), steering=steering_file(other)
    )
    write_run(folder / "other-k", "topk", k=2, steering=steering_file("topk"))
    write_run(folder / "other-seed", "topk", seed=1, probe=probe_file("topk"))
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    (folder / "results.json").write_text(json.dumps(rows))
    return run


class Page(HTMLParser):
    """What a browser would see: ``tags``, ``text`` outside scripts, and ``scripts``."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.within = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.within = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.within = None

    def handle_data(self, data):
        if self.within == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self.within != "style":
            self.text += data

    @property
    def data(self):
        return next(json.loads(text) for attrs, text in self.scripts if attrs.get("id") == "data")

    @property
    def figures(self):
        kind = {"type": "application/json"}
        return [json.loads(text) for attrs, text in self.scripts if attrs == kind]


@pytest.fixture
def whole(tmp_path):
    return Page(write_report(write_comparison(tmp_path)))


@pytest.fixture
def bare(tmp_path):
    return Page(write_report(write_run(tmp_path / "run")))


def figure_with(page, axis):
    return next(
        figure for figure in page.figures if axis in figure["layout"]["xaxis"]["title"]["text"]
    )


class TestWhatIsThere:
    def test_faithfulness(self, bare):
        for name, value in summary(FAITHFULNESS):
            assert name.strip() in bare.text and value in bare.text
        (figure,) = bare.figures
        assert figure["data"][0]["x"] == [0.0625, 0.125, 0.25, 0.1875, 0.5]
        assert "MxD, k = 3" in bare.text and "blocks.1.mlp.hook_out of tiny" in bare.text

    def test_frontier_of_the_whole_comparison(self, whole):
        frontier = figure_with(whole, "k, experts or units")
        at = {trace["name"]: trace["x"] for trace in frontier["data"]}
        assert at == {"MxD": [3], "transcoder": [3], "SAE of the MLP's output": [2, 3]}

    def test_probes_of_the_runs_alike(self, whole):
        bars = {bar["name"]: bar for bar in figure_with(whole, "features the probe reads")["data"]}
        assert list(bars) == ["MxD", "transcoder", "neurons"]
        assert bars["MxD"]["x"] == ["1", "2"] and bars["MxD"]["y"] == [0.5, 0.75]
        assert bars["transcoder"]["y"] == [0.25, 0.5]
        assert bars["neurons"]["y"] == [0.375]
        assert "tinytranscoder300.2500.500" in whole.text  # the table's line

    def test_probes_of_other_texts_are_left_out(self, tmp_path):
        run = write_comparison(tmp_path)
        path = tmp_path / "same" / "probe.json"
        probes = json.loads(path.read_text())
        probes["datasets"]["tiny"]["n_texts"] = 9
        path.write_text(json.dumps(probes))
        bars = figure_with(Page(write_report(run)), "features the probe reads")["data"]
        assert [bar["name"] for bar in bars] == ["MxD", "neurons"]

    def test_a_guess_is_a_line(self, whole):
        layout = figure_with(whole, "features the probe reads")["layout"]
        assert [(shape["y0"], shape["y1"]) for shape in layout["shapes"]] == [(0.0, 0.0)]
        assert [note["text"] for note in layout["annotations"]] == ["majority"]

    def test_a_method_has_one_colour_in_all_figures(self, whole):
        frontier = figure_with(whole, "k, experts or units")
        bars = figure_with(whole, "features the probe reads")
        line = {trace["name"]: trace["line"]["color"] for trace in frontier["data"]}
        bar = {trace["name"]: trace["marker"]["color"] for trace in bars["data"]}
        assert all(bar[name] == line[name] for name in ("MxD", "transcoder"))
        assert len(set(bar.values())) == 3

    def test_steering_of_the_runs_alike(self, whole):
        figure = figure_with(whole, "perplexity")
        traces = [(trace["name"], trace["x"], trace["y"]) for trace in figure["data"]]
        experts = [20.0, 40.0, 80.0], [0.5, 0.25, 0.75]
        medians = [30.0, 80.0], [0.375, 0.75]
        of_each = [
            (name, *points) for name in ("MxD", "transcoder") for points in (experts, medians)
        ]
        assert traces == [*of_each, ("unsteered", [10.0], [0.25])]
        assert figure["layout"]["xaxis"]["type"] == "log"

    def test_steering_from_another_prompt_is_left_out(self, tmp_path):
        run = write_comparison(tmp_path)
        steering = steering_file("topk_transcoder", prompt="But")
        (tmp_path / "same" / "steering.json").write_text(json.dumps(steering))
        figure = figure_with(Page(write_report(run)), "perplexity")
        assert {trace["name"] for trace in figure["data"]} == {"MxD", "unsteered"}

    def test_experts(self, whole):
        data = whole.data
        assert data["texts"] == TEXTS
        assert [expert["id"] for expert in data["experts"]] == [0, 2, 3, 7, 9]
        cats = data["experts"][1]
        assert cats["contexts"] == [[0, 1, 4.0, 1.0], [2, 30, 3.5, 1.0], [0, 2, 1.0, 0.25]]
        assert cats["promoted"] == [[" kitten", 1.235], ["\n", 0.5]]
        assert "2 count as meaningful" in whole.text
        assert "those of 62.5% of the other experts on average" in whole.text
        assert "those of 99% for 1 experts (by chance: 0)" in whole.text

    def test_experts_a_class_was_told_by(self, whole):
        # 7 was first of two splits' one-feature probes, and 3 only ever read beside it.
        cats, hostile = whole.data["classes"]
        assert (cats["data"], cats["class"]) == ("tiny", "cats")
        assert cats["experts"] == [[7, 1, 1, 0.5], [2, 1, 1, 0.5], [3, 2, 2, 0.875]]
        assert hostile["class"] == HOSTILE
        assert hostile["experts"] == [[11, 1, 2, 0.5], [0, 2, 2, 0.5]]


class TestWhatIsMissing:
    def test_says_how_to_measure_it(self, bare, tmp_path):
        for command in ("probe", "experts", "steer"):
            assert f"mxd-lens {command} {tmp_path / 'run'}" in bare.text
        assert "mxd-lens compare" in bare.text
        assert bare.data is None

    def test_a_parent_that_is_no_comparison(self, tmp_path):
        run = write_run(tmp_path / "run")
        (tmp_path / "results.json").write_text(json.dumps(FAITHFULNESS))
        assert len(Page(write_report(run)).figures) == 1

    def test_what_only_other_runs_have(self, tmp_path):
        run = write_comparison(tmp_path)
        (run / "steering.json").unlink()
        page = Page(write_report(run))
        assert f"mxd-lens steer {run}" in page.text
        names = {trace["name"] for trace in figure_with(page, "perplexity")["data"]}
        assert names == {"transcoder", "unsteered"}

    def test_numbers_that_json_has_no_word_for(self, tmp_path):
        experts = EXPERTS | {"experts": [expert(0, coherence=float("nan"))]}
        page = Page(write_report(write_run(tmp_path / "run", experts=experts)))
        assert page.data["experts"][0]["coherence"] is None


class TestHostileText:
    def test_makes_no_element(self, whole):
        assert not [tag for tag, _ in whole.tags if tag == "img"]
        kinds = [attrs.get("type") for attrs, _ in whole.scripts]
        assert kinds.count(None) == 2  # plotly and the page's own

    def test_arrives_unchanged(self, whole):
        assert whole.data["experts"][0]["name"] == HOSTILE
        assert f"An expert counts where {HOSTILE}" in whole.text

    def test_of_labels_that_plotly_reads_as_html(self, whole):
        labels = json.dumps(figure_with(whole, "perplexity")["data"])
        assert "&lt;/script&gt;" in labels and "<img" not in labels

    def test_half_of_a_surrogate_pair(self, tmp_path):
        experts = EXPERTS | {"experts": [expert(0, name="\ud83d")]}
        page = Page(write_report(write_run(tmp_path / "run", experts=experts)))
        assert page.data["experts"][0]["name"] == "?"


def test_the_page_asks_nothing_of_the_network(whole):
    for tag, attrs in whole.tags:
        assert not attrs.get("src") and tag not in ("iframe", "object", "embed")
        href = attrs.get("href") or "#"
        assert href == "data:," if tag == "link" else href.startswith("#")
    policy = next(attrs for tag, attrs in whole.tags if "http-equiv" in attrs)
    assert policy["content"].startswith("default-src 'none'")


def test_size(tmp_path):
    """A tenth of 7,000 experts with 16 contexts each over 1,600 texts of 127 tokens."""
    rng = random.Random(0)
    words = [f" {''.join(rng.choices('abcdefgh', k=rng.randint(1, 8)))}" for _ in range(1000)]

    def contexts():
        return [
            {
                "text": rng.randrange(160),
                "position": rng.randrange(127),
                "value": rng.random(),
                "quantile": rng.choice([1.0, 0.75, 0.5, 0.25]),
            }
            for _ in range(16)
        ]

    def drawn(n):
        return [[rng.choice(words), rng.gauss(0, 1)] for _ in range(n)]

    experts = EXPERTS | {
        "texts": [rng.choices(words, k=127) for _ in range(160)],
        "experts": [
            expert(i, contexts=contexts(), promoted=drawn(10), suppressed=drawn(10))
            for i in range(700)
        ],
    }
    page = write_report(write_run(tmp_path / "run", experts=experts))
    assert page.stat().st_size - len(get_plotlyjs()) < 2.4e6


class TestErrors:
    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path} holds no finished run"):
            write_report(tmp_path)

    def test_a_run_that_has_not_been_measured(self, tmp_path):
        run = write_run(tmp_path / "run")
        (run / "results.json").unlink()
        (run / "layer").mkdir()
        with pytest.raises(ValueError, match="has not been measured: run `mxd-lens evaluate"):
            write_report(run)

    def test_a_comparison(self, tmp_path):
        write_comparison(tmp_path)
        with pytest.raises(ValueError, match="or a run's folder within a comparison"):
            write_report(tmp_path)

    def test_a_file_that_is_cut_off(self, tmp_path):
        run = write_run(tmp_path / "run")
        (run / "experts.json").write_text('{"texts": [')
        with pytest.raises(ValueError, match=r"experts\.json is not JSON"):
            write_report(run)
