"""Tokens and their experts in a notebook, against what `encode` says."""

from html.parser import HTMLParser

import pytest
import torch

import mxd_lens
from mxd_lens.files import write_json
from mxd_lens.report.tokens import N_LISTED, Shown
from mxd_lens.runs.results import VERSION

from ..helpers import HOOK_IN, random_layer
from .test_report import EXPERTS, HOSTILE, expert

TEXT = "the cat sat on a dog"
KINDS = ["mxd", "jumprelu_mxd", "molt", "topk_transcoder", "topk_skip_transcoder", "topk"]


class Seen(HTMLParser):
    """``tags``, and for each token its text, its mark and the experts that are listed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tokens, self.within = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.within.append((attrs.get("class") or "").split(" ")[0])
        if self.within[-1] == "mxd-token":
            share = float(attrs["style"].removeprefix("--share: "))
            self.tokens.append({"text": "", "share": share, "experts": []})
        if self.within[-1] == "mxd-expert":
            self.tokens[-1]["experts"].append([])

    def handle_endtag(self, tag):
        self.within.pop()

    def handle_data(self, data):
        if self.within[-1:] == ["mxd-token"]:
            self.tokens[-1]["text"] += data
        elif "mxd-expert" in self.within and data.strip():
            self.tokens[-1]["experts"][-1].append(data)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shows_what_encode_says(lm, kind):
    sae = random_layer(kind, lm)
    shown = mxd_lens.show(lm, sae, TEXT)
    hook = sae.cfg.metadata.hook_name
    _, cache = lm.run_with_cache(lm.to_tokens(TEXT), names_filter=hook)
    acts = sae.encode(cache[hook])[0, 1:].detach()  # without BOS
    assert [token.strip() for token in shown.tokens] == TEXT.split()
    for active, of_token in zip(shown.active, acts, strict=True):
        values, units = of_token.sort(descending=True)
        n = int((values > 0).sum())
        assert dict(active) == pytest.approx(
            dict(zip(units[:n].tolist(), values[:n].tolist(), strict=True))
        )
        assert [v for _, v in active] == sorted((v for _, v in active), reverse=True)
    total = acts.sum(-1)
    assert shown.marks == pytest.approx((total / total.max()).tolist())
    seen = Seen(shown._repr_html_()).tokens
    assert [token["text"].strip() for token in seen] == TEXT.split()
    for token, active, mark in zip(seen, shown.active, shown.marks, strict=True):
        assert token["share"] == pytest.approx(mark, abs=1e-3)
        listed = [(int(id[1:]), float(value)) for value, id, *_ in token["experts"]]
        assert listed == [(i, float(f"{v:.3g}")) for i, v in active[:N_LISTED]]


def test_one_expert_and_names(tiny_bridge, tmp_path):
    sae = random_layer("mxd")
    (unit, _), *_ = mxd_lens.show(tiny_bridge, sae, TEXT).active[2]
    described = EXPERTS | {"d_sae": 40, "experts": [expert(unit, name=HOSTILE)]}
    write_json(tmp_path / "experts.json", {"version": VERSION} | described)
    shown = mxd_lens.show(tiny_bridge, sae, TEXT, expert=unit, experts=tmp_path / "experts.json")
    values = [dict(active).get(unit, 0.0) for active in shown.active]
    assert shown.marks == pytest.approx([value / max(values) for value in values])
    seen = Seen(shown._repr_html_())
    assert seen.tokens[2]["experts"][0][2] == HOSTILE
    assert not {"img", "script"} & {*seen.tags}


def test_hostile_tokens():
    shown = Shown(HOSTILE, [HOSTILE, "\n", ""], [[(3, 1.0)], [], []], {3: HOSTILE}, expert=3)
    seen = Seen(shown._repr_html_())
    assert not {"img", "script"} & {*seen.tags}
    assert [token["text"].strip() for token in seen.tokens] == [HOSTILE.strip(), "↵", "∅"]
    assert [token["share"] for token in seen.tokens] == [1, 0, 0]


def test_nothing_fires():
    assert Shown("here", ["a"], [[]]).marks == [0.0]


def test_errors(tiny_bridge, tmp_path):
    sae = random_layer("mxd")
    with pytest.raises(ValueError, match="expert=40: the layer has experts 0 to 39"):
        mxd_lens.show(tiny_bridge, sae, TEXT, expert=40)
    with pytest.raises(ValueError, match="no token to show in ''"):
        mxd_lens.show(tiny_bridge, sae, "")
    with pytest.raises(ValueError, match=r"there is no .*experts\.json"):
        mxd_lens.show(tiny_bridge, sae, TEXT, experts=tmp_path / "experts.json")
    write_json(tmp_path / "experts.json", {"version": VERSION} | EXPERTS)
    with pytest.raises(ValueError, match=f"is of 12 experts at {HOOK_IN}, this layer has 40"):
        mxd_lens.show(tiny_bridge, sae, TEXT, experts=tmp_path / "experts.json")
    with pytest.raises(ValueError, match="has no experts to show"):
        mxd_lens.show(tiny_bridge, random_layer("dense"), TEXT)
