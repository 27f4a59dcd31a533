"""The pages' content, and that nothing of a corpus becomes part of a page."""

import json
import random
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from mxd_lens.analysis.intervals import worth
from mxd_lens.files import write_json
from mxd_lens.report.experts import LINE
from mxd_lens.report.page import write_comparison_page, write_report, write_run_page
from mxd_lens.report.tables import comparison_table, method_label, over_seeds, summary, table
from mxd_lens.runs.results import VERSION, read_rows

from ..helpers import GATE, ROW, write_comparison, write_run

HOSTILE = '</script><img src=x onerror="window.pwned=1"><!--data--> & %{x} \u2028'
OF_EXPERTS = ("l0", "alive_fraction", "always_on", "experts_cosine", "share", "share_interval")
OF_EXPERTS += ("jacobian_gate_share", "jacobian_gate_cosine")
CONTROL = dict.fromkeys([*GATE, "k", *OF_EXPERTS])
CONTROL |= {"architecture": "dense", "ce_increase": 0.125}
"""What a row of a control has else."""
TEXTS = [
    [" the", " cat", "\n", " sat", HOSTILE, " on"],
    [" a", " dog", " ran", " after", " the", " fish"],
    [*(f" {word}" for word in ["far"] * 30), " near", *(f" {word}" for word in ["beyond"] * 20)],
]


def context(text, position, value, quantile=1.0):
    return {"text": text, "position": position, "value": value, "quantile": quantile}


def expert(i, **fields):
    fires = {"density": 0.001 * (i + 1), "mean": 1.0 + i % 3, "max": 4.0, "same_token": 0.5}
    fires |= {"contexts": [context(0, 1, 4.0), context(1, 2, 3.0, 0.5)]}
    fires |= {"histogram": [20 - bar for bar in range(20)], "meaningful": False}
    weights = {"nearest": [], "coactive": [], "rank": 16, "effective_rank": 9.5}
    nothing = dict.fromkeys(("coherence", "promoted", "suppressed", "agreement", "sample"))
    return {"id": i, "name": "", **fires, **weights, **nothing, **fields}


EXPERTS = {
    **{name: ROW[name] for name in ("hook_name", "hook_name_out", "model_name", "k", "d_sae")},
    **{"architecture": "mxd", "dataset": "tiny", "n_tokens": 5000, "n_live": 5, "asked": {}},
    "rule": f"An expert counts where {HOSTILE}",
    "texts": TEXTS,
    "experts": [
        expert(0, name=HOSTILE, sample=f"steered\n{HOSTILE}", promoted=[[HOSTILE, 1.5]]),
        expert(
            2,
            **{"name": "animals · cats", "meaningful": True, "coherence": 0.25, "agreement": 0.995},
            promoted=[[" kitten", 1.235], ["\n", 0.5]],
            suppressed=[[" rock", -0.5]],
            nearest=[[7, 0.875], [11, 0.5]],
            coactive=[[0, 0.25]],
            contexts=[context(0, 1, 4.0), context(2, 30, 3.5), context(0, 2, 1.0, 0.25)],
        ),
        expert(3, coherence=0.5),
        expert(7, name="dogs", meaningful=True, coherence=0.125, agreement=0.255),
        expert(9, contexts=[context(1, 5, 2.0)]),
    ],
}
UNDESCRIBED = EXPERTS | {"experts": [expert(i) for i in range(3)]}
"""Where an expert fires, and nothing that takes long to measure."""


def probe_file(name="mxd", k=3, f1=0.5):
    def row(of, features, f1, seed=0, **who):
        n = None if features is None else len(features)
        how = {"class": of, "features": features, "seed": seed, "test_size": 0.5}
        return mean(n, f1, **who) | how | {"n_train": 4, "n_test": 4}

    def mean(n, f1, **who):
        about = {"data": "tiny", "architecture": name, "k": k, "run_seed": 0} | who
        others = dict.fromkeys(["accuracy", "balanced_accuracy", "roc_auc"], 0.5)
        return about | others | {"n_features": n, "f1": f1}

    nobody = {"k": None, "run_seed": None}
    return {
        "datasets": {"tiny": {"asked": {"n_texts": 8}, "classes": ["cats", HOSTILE]}},
        "rows": [
            row("cats", [7], 0.75),
            row("cats", [2], 0.5, seed=1),
            row("cats", [7], 0.25, seed=2),
            row("cats", [7, 3], 0.875),
            row(HOSTILE, [11, 0], 0.5),
            row(HOSTILE, None, 1.0),
            row("cats", [9], 1.0, architecture="neurons", **nobody),
            row("cats", [9], 1.0, run_seed=1),
        ],
        "summary": [
            mean(1, f1),
            mean(2, f1 + 0.25),
            mean(1, 0.375, architecture="neurons", **nobody),
            mean(0, 0.0, architecture="majority", **nobody),
        ],
    }


def steering_file(name="mxd", prompt="So"):
    scored = [(2, 1.0, 0.5, 20.0), (3, 1.0, 0.25, 40.0), (2, 2.0, 0.75, 80.0)]
    sizes = {"n_samples": 2, "n_tokens": 8, "temperature": 0.9, "seed": 0}
    return sizes | {
        "edit": "direction",
        "prompt": prompt,
        "unsteered": {"coherence": 0.25, "perplexity": 10.0},
        "rows": [
            {"architecture": name, "expert": expert, "strength": strength, "amount": 7.5 * strength}
            | {"coherence": coherence, "perplexity": perplexity, "samples": [HOSTILE, "other"]}
            for expert, strength, coherence, perplexity in scored
        ],
    }


def label(i, name, **scores):
    """Of a label that was not judged yet, unless there are scores."""
    nothing = ("shuffled", "n_contexts", "f1", "accuracy", "f1_shuffled", "accuracy_shuffled")
    return {"id": i, "name": name, **dict.fromkeys(nothing), "unanswered": 0, **scores}


JUDGED = {"n_contexts": 20, "accuracy": 0.75, "accuracy_shuffled": 0.5}
LABELS = {
    **{"asked": {}, "namer": HOSTILE, "judge": "a judge", "n_tokens": 4000},
    "labels": [
        label(2, "felines", shuffled=7, f1=0.75, f1_shuffled=0.25, unanswered=4, **JUDGED),
        label(7, "dogs", shuffled=2, f1=0.5, f1_shuffled=0.5, **JUDGED),
        label(3, HOSTILE),
    ],
}


def write_whole(folder):
    """A run with everything, and three beside it of which one has the same k and seed."""
    of_experts = {"experts": EXPERTS, "labels": LABELS}
    run = write_run(folder / "mxd", **of_experts, probe=probe_file(), steering=steering_file())
    other = "topk_transcoder"
    write_run(
        folder / "same", other, probe=probe_file(other, f1=0.25), steering=steering_file(other)
    )
    write_run(folder / "other-k", "topk", k=2, steering=steering_file("topk"))
    write_run(folder / "other-seed", "topk", seed=1, probe=probe_file("topk"))
    write_comparison(
        folder, *(read_rows(path)[0] for path in sorted(folder.glob("*/results.json")))
    )
    return run


THEIRS = EXPERTS | {
    **{"architecture": "topk_transcoder", "hook_name": "blocks.0.mlp.hook_in"},
    "texts": [[" its", " own", " text"], TEXTS[0]],
    "experts": [
        expert(1, name=HOSTILE, sample=HOSTILE, contexts=[context(1, 4, 2.0)]),
        expert(4, name="pets", contexts=[context(1, 1, 4.0)], nearest=[[8, 0.5]]),
        expert(8, contexts=[context(0, 1, 3.0)]),
    ],
}
"""Of another layer."""
BESIDE = {
    **{"run": "../other", "label": f"layer 0: {HOSTILE}"},
    **{"text": {name: EXPERTS[name] for name in ("model_name", "dataset", "n_tokens")}},
    **{"jaccard": 0.4375, "jaccard_by_chance": 0.0625},
    "experts": [
        {"id": 0, "nearest": [[1, 0.25]]},
        {"id": 2, "nearest": [[4, 0.75], [8, 0.125], [11, 0.0625]]},
        *({"id": i, "nearest": []} for i in (3, 7, 9)),
    ],
}


def write_pair(folder, **files):
    """Two runs, with the experts of one beside those of the other."""
    labels = LABELS | {"labels": [label(4, "felines, too", f1=0.75)]}
    write_run(folder / "other", "topk_transcoder", experts=THEIRS, labels=labels)
    earlier = BESIDE | {"run": "../earlier", "label": "an earlier one"}
    of_run = {"experts": EXPERTS, "labels": LABELS, "beside": {"layers": [earlier, BESIDE]}}
    return write_run(folder / "run", **of_run | files)


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
        return next((json.loads(text) for of, text in self.scripts if of.get("id") == "data"), None)

    @property
    def shards(self):
        return self.shards_of("data")

    def shards_of(self, name):
        ids = ((of.get("id") or "", text) for of, text in self.scripts)
        return [json.loads(text) for i, text in ids if re.fullmatch(rf"{name}-\d+", i)]

    @property
    def beside(self):
        """The data of the other layer."""
        return next(
            (json.loads(text) for of, text in self.scripts if of.get("id") == "beside"), None
        )

    @property
    def ids(self):
        return [line[0] for line in self.data["experts"]]

    def line(self, i):
        """What the page says of the i-th expert outside shards."""
        return dict(zip(LINE, self.data["experts"][i], strict=False))

    @property
    def figures(self):
        kind = {"type": "application/json"}
        return [json.loads(text, object_hook=decoded) for of, text in self.scripts if of == kind]

    def figure_with(self, axis):
        of_axis = (of for of in self.figures if axis in of["layout"]["xaxis"]["title"]["text"])
        return next(of_axis)


def decoded(value):
    """plotly's arrays, which are base64, as lists."""
    if "bdata" not in value:
        return value
    return np.frombuffer(b64decode(value["bdata"]), value["dtype"]).tolist()


@pytest.fixture
def whole(tmp_path):
    return Page(write_report(write_whole(tmp_path)))


@pytest.fixture
def bare(tmp_path):
    return Page(write_report(write_run(tmp_path / "run")))


@pytest.fixture
def compared(tmp_path):
    """``compared(*rows)``: the page of a comparison of such layers."""

    def write(*rows):
        write_comparison_page(write_comparison(tmp_path, *rows))
        return Page(tmp_path / "results.html")

    return write


class TestWhatIsThere:
    def test_faithfulness(self, bare):
        for name, value in summary(ROW):
            assert name.strip() in bare.text and value in bare.text
        (figure,) = bare.figures
        assert figure["data"][0]["x"] == [0.0625, 0.125, 0.25, 0.1875, 0.5]
        assert "MxD, k = 3" in bare.text and "blocks.1.mlp.hook_out of tiny" in bare.text

    def test_frontier_of_the_whole_comparison(self, whole):
        frontier = whole.figure_with("k, experts or units")
        at = {trace["name"]: trace["x"] for trace in frontier["data"]}
        alone = {name: [3] for name in ("MxD", "transcoder")}
        assert at == alone | {"SAE of the MLP's output": [2, 3], "MLP removed": [2, 3]}

    def test_probes_of_the_runs_alike(self, whole):
        bars = {bar["name"]: bar for bar in whole.figure_with("features the probe reads")["data"]}
        assert list(bars) == ["MxD", "transcoder", "neurons"]
        assert bars["MxD"]["x"] == ["1", "2"] and bars["MxD"]["y"] == [0.5, 0.75]
        assert bars["transcoder"]["y"] == [0.25, 0.5]
        assert bars["neurons"]["y"] == [0.375]
        assert "tinytranscoder300.2500.500" in whole.text  # the table's line

    def test_probes_of_other_texts_are_left_out(self, tmp_path):
        run = write_whole(tmp_path)
        probes = probe_file("topk_transcoder")
        probes["datasets"]["tiny"]["asked"]["n_texts"] = 9
        write_json(tmp_path / "same" / "probe.json", {"version": VERSION} | probes)
        bars = Page(write_report(run)).figure_with("features the probe reads")["data"]
        assert [bar["name"] for bar in bars] == ["MxD", "neurons"]

    def test_a_guess_is_a_line(self, whole):
        layout = whole.figure_with("features the probe reads")["layout"]
        assert [(shape["y0"], shape["y1"]) for shape in layout["shapes"]] == [(0.0, 0.0)]
        assert [note["text"] for note in layout["annotations"]] == ["majority"]

    def test_a_method_has_one_colour_in_all_figures(self, whole):
        frontier = whole.figure_with("k, experts or units")
        bars = whole.figure_with("features the probe reads")
        line = {trace["name"]: trace["line"]["color"] for trace in frontier["data"]}
        bar = {trace["name"]: trace["marker"]["color"] for trace in bars["data"]}
        assert all(bar[name] == line[name] for name in ("MxD", "transcoder"))
        assert len(set(bar.values())) == 3

    def test_steering_of_the_runs_alike(self, whole):
        figure = whole.figure_with("perplexity")
        traces = [(trace["name"], trace["x"], trace["y"]) for trace in figure["data"]]
        experts, medians = ([20, 40, 80], [0.5, 0.25, 0.75]), ([30, 80], [0.375, 0.75])
        of_each = [(n, *points) for points in (experts, medians) for n in ("MxD", "transcoder")]
        assert traces == [*of_each, ("unsteered", [10.0], [0.25])]
        assert figure["layout"]["xaxis"]["type"] == "log"

    def test_steering_from_another_prompt_is_left_out(self, tmp_path):
        run = write_whole(tmp_path)
        steering = steering_file("topk_transcoder", prompt="But")
        write_json(tmp_path / "same" / "steering.json", {"version": VERSION} | steering)
        figure = Page(write_report(run)).figure_with("perplexity")
        assert {trace["name"] for trace in figure["data"]} == {"MxD", "unsteered"}

    def test_how_it_was_steered_is_said(self, whole, tmp_path):
        assert "temperature 0.9, from “So”. Steered by the unit's direction." in whole.text
        run = write_whole(tmp_path / "paper")
        steering = steering_file() | {"edit": "paper", "top_p": 0.1}
        write_json(run / "steering.json", {"version": VERSION} | steering)
        page = Page(write_report(run))
        assert "temperature 0.9 and top_p 0.1, from “So”. Steered as in arXiv" in page.text
        names = {trace["name"] for trace in page.figure_with("perplexity")["data"]}
        assert names == {"MxD", "unsteered"}  # the other run was steered otherwise

    def test_experts(self, whole):
        data = whole.data
        assert data["texts"] == TEXTS
        assert whole.ids == [0, 2, 3, 7, 9]
        assert data["tokens"] == [HOSTILE, " kitten", "\n"]
        line = [2, "animals · cats", 0.003, 3.0, 4.0, 0.25, 0.5, True, 0.995]
        assert data["experts"][1] == [*line, [0, 1, 2, 30], [1, 2], ["felines", 0.75]]
        assert (data["shard"], data["folder"]) == (500, None)
        (experts,) = whole.shards
        cats = experts[1]
        assert cats["contexts"] == [[0, 1, 4.0, 1.0], [2, 30, 3.5, 1.0], [0, 2, 1.0, 0.25]]
        assert cats["promoted"] == [[" kitten", 1.235], ["\n", 0.5]]
        assert "2 count as meaningful" in whole.text
        assert "those of 62.5% of the other experts on average" in whole.text
        assert "those of 99% for 1 experts (by chance: 0)" in whole.text

    def test_labels(self, whole):
        labels = {line[0]: line[-1] for line in whole.data["experts"]}
        assert labels[2] == ["felines", 0.75] and labels[7] == ["dogs", 0.5]
        assert labels[3] == [HOSTILE, None] and labels[0] is labels[9] is None
        assert f"Names of 2 experts, by {HOSTILE}, tell held-out contexts with an F1" in whole.text
        assert "an F1 of 0.62 (0.50 to 0.75), other experts' names with one of 0.38" in whole.text
        assert "a gain of +0.25 (+0.00 to +0.50)" in whole.text
        assert "by chance 0.50. Judge: a judge; it left 5% of the contexts unan" in whole.text

    def test_experts_a_class_was_told_by(self, whole):
        # 7 was first of two splits' one-feature probes, and 3 only ever read beside it.
        cats, hostile = whole.data["classes"]
        assert (cats["data"], cats["class"]) == ("tiny", "cats")
        assert cats["experts"] == [[7, 1, 1, 0.5], [2, 1, 1, 0.5], [3, 2, 2, 0.875]]
        assert hostile["class"] == HOSTILE
        assert hostile["experts"] == [[11, 1, 2, 0.5], [0, 2, 2, 0.5]]


class TestBeside:
    def test_the_nearest_and_all_that_is_known_of_them(self, tmp_path):
        page = Page(write_report(write_pair(tmp_path)))
        near = dict(zip(page.ids, (rest["beside"] for rest in page.shards[0]), strict=True))
        assert near[2] == [[4, 0.75], [8, 0.125], [11, 0.0625]] and near[7] == []
        assert page.data["layer"] == "layer 1: MxD, k = 3, seed 0"
        theirs = page.beside
        assert theirs["layer"] == f"layer 0: {HOSTILE}" and theirs["texts"] == THEIRS["texts"]
        assert [line[0] for line in theirs["experts"]] == [1, 4, 8]
        assert theirs["experts"][1][-1] == ["felines, too", 0.75]
        (shard,) = page.shards_of("beside")
        assert shard[1]["nearest"] == [[8, 0.5]] and shard[0]["sample"] == HOSTILE
        assert f"Beside each are those of layer 0: {HOSTILE} that fire on the same" in page.text
        assert "is 0.44 on average (by chance" in page.text and "text: 0.06)" in page.text
        assert not [tag for tag, _ in page.tags if tag == "img"]

    def test_says_how_to(self, whole, bare, compared, tmp_path):
        assert f"mxd-lens report {tmp_path / 'mxd'} --beside OTHER_RUN" in whole.text
        assert whole.beside is None
        for page in (bare, compared({})):
            assert "--beside" not in page.text

    @pytest.mark.parametrize("of", ["other", "run"])
    def test_an_expert_of_another_text_is_not_beside(self, tmp_path, of, edit_json):
        run = write_pair(tmp_path)
        edit_json(tmp_path / of / "experts.json", n_tokens=4999)
        page = Page(write_report(run))
        assert page.beside is None and page.ids == [0, 2, 3, 7, 9]
        assert "../other/experts.json is not there now, or one of both" in page.text
        (tmp_path / "other" / "experts.json").unlink()
        assert "../other/experts.json is not there now" in Page(write_report(run)).text

    def test_shards_of_both_are_beside_the_page_or_within(self, tmp_path, monkeypatch):
        run = write_pair(tmp_path)
        page = Page(write_report(run))
        sizes = [
            len(json.dumps(page.shards_of(of), ensure_ascii=False)) for of in ("data", "beside")
        ]
        monkeypatch.setattr("mxd_lens.report.experts.INLINE", max(sizes))
        page = Page(write_report(run))
        folders = {page.data["folder"], page.beside["folder"]}
        assert len(folders) == 2 and {path.name for path in run.glob("report-experts-*")} == folders
        assert page.shards == page.shards_of("beside") == []
        (run / "beside.json").unlink()
        page = Page(write_report(run))
        assert page.data["folder"] is None and not [*run.glob("report-experts-*")]


class TestComparison:
    def test_opens_with_three_numbers_and_bars(self, compared):
        page = compared({}, {"architecture": "topk_transcoder", "ce_increase": 0.25}, CONTROL)
        opening = page.text[: page.text.index("Layers", page.text.index("nats"))]
        numbers = [opening.index(f"{n} nats") for n in ("+0.0625", "+0.1250", "+0.1875")]
        assert numbers == sorted(numbers) and "87.5% recovered of the +0.5000" in opening
        lost, gate = ({bar["name"]: bar["x"] for bar in of["data"]} for of in page.figures)
        dense = method_label("dense")
        assert lost == {"MxD": [0.0625], "transcoder": [0.25], dense: [0.125]}
        assert gate == {"MxD": [0.1875], "transcoder": [0.1875]}
        assert "(MLP removed: +0.5000)" in opening

    def test_several_seeds_are_a_mean_and_a_range(self, compared):
        seeds = [{"seed": 0}, {"seed": 1, "ce_increase": 0.1875}]
        page = compared(*seeds)
        assert "+0.1250 nats" in page.text and "2 seeds, +0.0625 to +0.1875" in page.text
        assert page.text.count("Not measured in this comparison") == 1  # a dense control
        (bar,) = page.figures[0]["data"]
        assert (bar["x"], bar["error_x"]["array"]) == ([0.125], [0.0625])
        assert "0.1250 (0.0625 to 0.1875)" in page.text and "Over seeds" in page.text
        assert "Over seeds" not in compared({}, CONTROL).text

    def test_worth_over_seeds_is_against_the_controls(self):
        rows = [ROW | {"seed": seed} | own for seed in (0, 1) for own in ({}, CONTROL)]
        head, lines = over_seeds(rows)
        assert [dict(zip(head, line, strict=True))["seeds"] for line in lines] == ["2", "2"]
        (value, _), control = worth([ROW], [ROW | CONTROL]), lines[1]
        assert f"{value:+.4f}" == lines[0][head.index("worth")]
        assert control[head.index("worth")] == control[head.index("share")] == "-"

    def test_several_k_are_a_frontier_that_opens_at_the_middle_one(self, compared):
        page = compared(*({"k": k, "ce_increase": 1 / k} for k in (2, 4, 8)), CONTROL)
        lines = {line["name"]: line for line in page.figure_with("k, experts or units")["data"]}
        assert lines["MxD"]["x"] == [2, 4, 8] and lines["MxD"]["y"] == [0.5, 0.25, 0.125]
        dense = method_label("dense")
        assert (lines[dense]["y"], lines["MLP removed"]["y"]) == ([0.125] * 2, [0.5] * 2)
        assert "+0.2500 nats" in page.text and "with MxD, k = 4 in place" in page.text

    def test_several_mlps_are_lines_over_depth(self, compared):
        lost = [0.0625, 0.1875]
        page = compared(
            *({"hook_layer": n, "ce_increase": lost[n]} for n in (0, 1)),
            *({"hook_layer": n, "architecture": "topk_transcoder"} for n in (0, 1)),
        )
        assert "in place of 2 MLPs of tiny" in page.text
        assert "+0.1250 nats" in page.text and "2 layers, +0.0625 to +0.1875" in page.text
        lines = {line["name"]: line for line in page.figures[0]["data"]}
        mxd = next(line for name, line in lines.items() if name.startswith("MxD"))
        assert (mxd["x"], mxd["y"]) == ([0, 1], lost)
        assert lines["MLP removed"]["y"] == [0.5, 0.5]
        rows = [ROW | {"hook_layer": n} for n in (0, 1)]
        assert comparison_table(rows).startswith("| layer | MLP | k | seed |")
        assert comparison_table(rows[:1]).startswith("| layer | k | seed |")

    def test_every_number_is_in_the_tables_and_nothing_is_where_there_is_none(self, compared):
        page = compared({}, CONTROL)
        lists = ("by_frequency", "by_position", "sequences")
        for value in filter(None, (ROW[name] for name in ROW if name not in lists)):
            for number in value if isinstance(value, list) else [value]:
                shown = f"{number:.5g}" if isinstance(number, float) else str(number)
                assert shown in page.text
        assert "None" not in page.text and "nan" not in page.text.split("All numbers")[0]

    def test_of_a_control_alone(self, compared):
        assert len(compared(CONTROL).figures) == 1

    @pytest.mark.parametrize(
        ("described", "shown"),
        [
            ({"a": ("topk", 3, 0), "b": ("mxd", 2, 0), "c": ("mxd", 3, 0)}, "MxD, k = 3"),
            ({"a": ("topk", 3, 0)}, "SAE of the MLP's output, k = 3"),
        ],
    )
    def test_browses_the_experts_of_the_layer_it_opens_with(
        self, compared, tmp_path, described, shown
    ):
        for folder, run in described.items():
            write_run(tmp_path / folder, *run, experts=UNDESCRIBED | {"dataset": shown})
        page = compared({"k": 2}, {"k": 3}, {"architecture": "topk"})
        assert f"Experts of {shown}, seed 0" in page.text
        assert page.ids == [0, 1, 2]
        assert page.data["classes"] == [] and "What they promote agrees" not in page.text

    def test_says_how_to_describe_experts(self, compared, tmp_path):
        page = compared({})
        assert f"mxd-lens experts {tmp_path}" in page.text and page.data is None


def test_a_layer_without_a_gate(tmp_path):
    control, path = ROW | CONTROL, tmp_path / "results.html"
    assert comparison_table([ROW, control]).splitlines()[3].count(" - ") == 3
    assert len(table(control).splitlines()) == 9
    write_run_page(path, control, None)
    (figure,) = Page(path).figures
    assert figure["data"][0]["y"] == ["replaced", "MLP removed"]


class TestWhatIsMissing:
    def test_says_how_to_measure_it(self, bare, tmp_path):
        for command in ("probe", "experts", "steer"):
            assert f"mxd-lens {command} {tmp_path / 'run'}" in bare.text
        assert "mxd-lens compare" in bare.text
        assert bare.data is None

    def test_a_parent_that_is_no_comparison(self, tmp_path):
        run = write_run(tmp_path / "run")
        write_json(tmp_path / "results.json", {"version": VERSION} | ROW)
        assert len(Page(write_report(run)).figures) == 1

    def test_what_only_other_runs_have(self, tmp_path):
        run = write_whole(tmp_path)
        (run / "steering.json").unlink()
        page = Page(write_report(run))
        assert f"mxd-lens steer {run}" in page.text
        names = {trace["name"] for trace in page.figure_with("perplexity")["data"]}
        assert names == {"transcoder", "unsteered"}

    def test_numbers_that_json_has_no_word_for(self, tmp_path):
        experts = EXPERTS | {"experts": [expert(0, coherence=float("nan"))]}
        page = Page(write_report(write_run(tmp_path / "run", experts=experts)))
        assert page.line(0)["coherence"] is None


class TestHostileText:
    def test_makes_no_element(self, whole):
        assert not [tag for tag, _ in whole.tags if tag == "img"]
        kinds = [attrs.get("type") for attrs, _ in whole.scripts]
        assert kinds.count(None) == 3  # plotly, and the page's own for figures and experts

    def test_arrives_unchanged(self, whole):
        assert whole.line(0)["name"] == whole.data["tokens"][0] == HOSTILE
        assert whole.shards[0][0]["sample"] == f"steered\n{HOSTILE}"
        assert f"An expert counts where {HOSTILE}" in whole.text

    def test_of_labels_that_plotly_reads_as_html(self, whole):
        labels = json.dumps(whole.figure_with("perplexity")["data"])
        assert "&lt;/script&gt;" in labels and "<img" not in labels

    def test_half_of_a_surrogate_pair(self, tmp_path):
        experts = EXPERTS | {"experts": [expert(0, name="\ud83d")]}
        page = Page(write_report(write_run(tmp_path / "run", experts=experts)))
        assert page.line(0)["name"] == "?"


def test_the_page_asks_nothing_of_the_network(whole, compared):
    for page in (whole, compared({})):
        for tag, attrs in page.tags:
            assert not attrs.get("src") and tag not in ("iframe", "object", "embed")
            href = attrs.get("href") or "#"
            assert href == "data:," if tag == "link" else href.startswith("#")
        policy = next(attrs for tag, attrs in page.tags if "http-equiv" in attrs)
        assert policy["content"].startswith("default-src 'none'")


def test_the_page_is_smaller_than_the_file_it_shows(tmp_path):
    """Texts are there once, and contexts without the names of their fields."""
    rng = random.Random(0)
    contexts = [
        [context(rng.randrange(160), rng.randrange(127), rng.random()) for _ in range(16)]
        for _ in range(700)
    ]
    experts = EXPERTS | {
        "texts": [[f" {rng.random():.4f}" for _ in range(127)] for _ in range(160)],
        "experts": [expert(i, contexts=of) for i, of in enumerate(contexts)],
    }
    run = write_run(tmp_path / "run", experts=experts)
    page = write_report(run)
    assert page.stat().st_size - len(get_plotlyjs()) < (run / "experts.json").stat().st_size


class TestShards:
    """What lies beside the page of very many experts."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr("mxd_lens.report.experts.INLINE", 1000)
        monkeypatch.setattr("mxd_lens.report.experts.SHARD", 2)

    def write(self, folder, **changes):
        run = folder / "run"
        experts = EXPERTS | {"experts": [*EXPERTS["experts"][1:], expert(10, **changes)]}
        if run.exists():
            write_json(run / "experts.json", {"version": VERSION} | experts)
        else:
            write_run(run, experts=experts)
        return write_report(run)

    def folders(self, page):
        return sorted(path.name for path in page.parent.glob("report-experts-*"))

    def test_hold_the_experts_in_order(self, tmp_path):
        page = self.write(tmp_path, sample=HOSTILE)
        read = Page(page)
        assert read.shards == [] and read.ids == [2, 3, 7, 9, 10]
        assert self.folders(page) == [read.data["folder"]]
        files = sorted((page.parent / read.data["folder"]).iterdir())
        assert [file.name for file in files] == ["0.js", "1.js", "2.js"]
        texts = [file.read_text(encoding="utf-8").strip() for file in files]
        assert not any("<" in text for text in texts)
        shards = [json.loads(t[len("take(0,") : -1]) for t in texts if t.startswith("take(")]
        assert [len(shard) for shard in shards] == [2, 2, 1]
        assert shards[2][0]["sample"] == HOSTILE
        policy = next(attrs for tag, attrs in read.tags if "http-equiv" in attrs)["content"]
        assert "script-src 'unsafe-inline' 'self' file:;" in policy

    def test_of_another_page_are_left_alone_and_old_ones_removed(self, tmp_path):
        page = self.write(tmp_path)
        before = self.folders(page)
        mine = [
            page.with_name("report-experts-mine"),
            page.with_name("results-experts-" + 16 * "0"),
        ]
        for folder in mine:
            folder.mkdir()
        assert self.folders(self.write(tmp_path)) == sorted([*before, mine[0].name])
        after = self.folders(self.write(tmp_path, sample="other"))
        assert len(after) == 2 and before[0] not in after
        assert all(folder.exists() for folder in mine)

    def test_a_page_that_cannot_be_written_keeps_what_it_had(self, tmp_path, monkeypatch):
        page = self.write(tmp_path)
        before = page.read_text(encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr("mxd_lens.report.page.write_text", full)
            with pytest.raises(OSError, match="disk"):
                self.write(tmp_path, sample="other")
        assert page.read_text(encoding="utf-8") == before
        assert Page(page).data["folder"] in self.folders(page)

    def test_are_gone_once_they_fit_into_the_page(self, tmp_path, monkeypatch):
        page = self.write(tmp_path)
        monkeypatch.setattr("mxd_lens.report.experts.INLINE", 1_000_000)
        read = Page(self.write(tmp_path))
        assert self.folders(page) == [] and len(read.shards) == 3 and read.data["folder"] is None


def full(*_):
    raise OSError("the disk is full")


def test_a_run_that_has_not_been_measured(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "results.json").unlink()
    with pytest.raises(ValueError, match="has not been measured: run `mxd-lens evaluate"):
        write_report(run)


def test_no_run_or_a_comparison(tmp_path):
    said = f"{tmp_path} holds no finished run: .* or a run's folder within a comparison"
    with pytest.raises(ValueError, match=said):
        write_report(tmp_path)
    write_whole(tmp_path)
    with pytest.raises(ValueError, match=said):
        write_report(tmp_path)
