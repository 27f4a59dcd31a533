"""The page of a graph: what it says, and that nothing of a prompt or corpus becomes part of it."""

import json
import re

import pytest

from mxd_lens.files import write_json
from mxd_lens.report.graph import write_graph_page
from mxd_lens.runs.config import finished_runs
from mxd_lens.runs.results import VERSION

from ..helpers import write_run
from .test_report import EXPERTS, HOSTILE

WORDS = ["<s>", " cat", HOSTILE]
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"


def node(node_id, kind, **fields):
    layer, _, position = node_id.split("_")
    plain = {"clerp": "", "activation": None, "influence": 0.5, "token_prob": 0.0}
    where = {"node_id": node_id, "layer": layer, "ctx_idx": int(position), "feature_type": kind}
    return where | plain | fields


NODES = [
    *(node(f"E_{token}_{i}", "embedding") for i, token in enumerate([1, 4, 9])),
    node("1_0_1", FEATURE, clerp=HOSTILE, activation=2.5, influence=0.25),
    node("1_2_2", FEATURE, clerp="animals · cats", activation=1.25, influence=0.125),
    node("1_5_2", FEATURE, activation=0.5, influence=0.75),
    node("1_-1_2", ERROR, influence=0.625),
    node("2_3_2", FEATURE, activation=1.0, influence=0.375),
    *(
        node(
            f"4_{token}_2",
            "logit",
            clerp=f'Output "{name}" (p={p:.3f})',
            token_prob=p,
            influence=None,
        )
        for token, name, p in ((7, " mat", 0.5), (8, HOSTILE, 0.25))
    ),
]
LINKS = [
    *(("E_4_1", "1_0_1", 2.0), ("E_1_0", "1_0_1", -0.5), ("E_9_2", "1_2_2", 1.0)),
    *(("1_0_1", "2_3_2", 0.75), ("1_2_2", "2_3_2", -0.25), ("1_5_2", "4_8_2", 0.125)),
    *(("2_3_2", "4_7_2", 1.5), ("1_-1_2", "4_7_2", -1.0), ("1_2_2", "4_7_2", 0.5)),
]
ABLATIONS = {
    "version": VERSION,
    "target": HOSTILE,
    "rank_correlation": {"errors": 0.75, "replacement": None, "original": -0.5},
    "rows": [
        {
            "layer": 1,
            "unit": unit,
            "position": 2,
            "predicted": p,
            "errors": p,
            "replacement": 0,
            "original": 1,
        }
        for unit, p in ((0, 0.5), (2, -0.25))
    ],
}


def write_graph(folder, ablated=True):
    """A folder with a graph of two layers, one of them described; its page."""
    described = write_run(folder / "layer1-mxd", experts=EXPERTS)
    other = write_run(folder / "layer2-mxd")
    path = folder / "graph-a.json"
    metadata = {"slug": "a", "scan": "tiny", "prompt_tokens": WORDS, "prompt": f"cat{HOSTILE}"}
    links = [dict(zip(("source", "target", "weight"), link, strict=True)) for link in LINKS]
    write_json(path, {"metadata": metadata, "qParams": {}, "nodes": NODES, "links": links})
    if ablated:
        write_json(folder / "ablations-a.json", ABLATIONS)
    runs = [finished_runs(run)[0] for run in (described, other)]
    runs[1].layer = 2
    for run, at in zip(runs, (described, other), strict=True):
        run.output = str(at)
    return write_graph_page(path, runs)


def test_what_the_script_reads(tmp_path):
    page = write_graph(tmp_path).read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    data = json.loads(data)
    assert data["words"] == WORDS and len(data["nodes"]) == len(NODES)
    assert data["links"][0] == [1, 3, 2.0]
    assert set(data["experts"]) == {"1:0", "1:2"}
    cats = data["experts"]["1:2"]
    assert cats["promoted"] == [[" kitten", 1.235], ["\n", 0.5]]
    before, token, after, value = cats["contexts"][1]
    assert (token, value) == (" near", 3.5) and before == " far" * 24 and after == " beyond" * 12
    names = {node["id"]: node["name"] for node in data["nodes"]}
    assert names["4_7_2"] == " mat" and names["4_8_2"] == names["1_0_1"] == HOSTILE
    assert data["folders"]["2"].endswith("layer2-mxd")
    assert "4 experts of tiny and 9 edges" in page
    assert "beside the prompt&#39;s errors 0.75, layers in place " in page
    assert "<img" not in page.replace("img-src", "") and "Plotly.react" in page


def test_a_page_without_ablations_is_small(tmp_path):
    page = write_graph(tmp_path, ablated=False)
    assert len(page.read_text()) < 60_000 and "Ablations" not in page.read_text()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*graph-b\.json"):
        write_graph_page(tmp_path / "graph-b.json", [])
