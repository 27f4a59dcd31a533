"""What the browser of experts reads: a line for each in the page itself, the rest in shards.

A page that is a file cannot fetch others, but it can run scripts that lie beside it. So what is
only needed of an expert that is open, 1 kB of contexts and tokens each, is cut into shards of 500
experts. Where all of them fit into 30 MB they are in the page, which stays one file that can be
sent to anybody; each is parsed when an expert of its is opened. Else they are scripts in a folder
beside the page, named after what they hold: a page never reads those of another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2.utils import htmlsafe_json_dumps
from plotly.utils import PlotlyJSONEncoder

from mxd_lens.files import discard, whole, write_text

INLINE = 30_000_000
"""Bytes of shards that a page holds itself."""
SHARD = 500
"""Experts in one."""
AS_JSON: dict[str, Any] = {
    "cls": PlotlyJSONEncoder,  # null for what JSON has no word for
    "ensure_ascii": False,
    "separators": (",", ":"),
}
LINE = (
    *("id", "name", "density", "mean", "max"),
    *("coherence", "same_token", "meaningful", "agreement"),
)
"""Of an expert, what it is found, filtered and sorted by; and, behind these, the text and position
of each top context in turn, the tokens it promotes as indices, and its label as [name, detection
F1], where it has one."""
CONTEXT = ("text", "position", "value", "quantile")


@dataclass(frozen=True)
class Browser:
    """The experts of one layer, for a page."""

    data: dict[str, Any]
    """``layer``, ``texts``, ``tokens``, ``experts`` (lines), ``classes`` and ``shard``, the size of
    one."""
    shards: list[str]
    """JSON, in which no tag can begin, of the other fields of `SHARD` experts each."""

    @cached_property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(len(shard.encode("utf-8", "replace")) for shard in self.shards)

    @cached_property
    def hash(self) -> str:
        """16 digits of the SHA-256 of the shards."""
        digest = sha256()
        for shard in self.shards:
            digest.update(shard.encode("utf-8", "replace"))
        return digest.hexdigest()[:16]

    def write_beside(self, page: Path) -> str:
        """The name of the folder beside the page that has the shards, whole or not at all; OSError
        if it cannot be written."""
        folder = page.with_name(f"{page.stem}-experts-{self.hash}")
        if not folder.exists():
            with whole(folder) as unfinished:
                unfinished.mkdir()
                for i, shard in enumerate(self.shards):
                    write_text(unfinished / f"{i}.js", f"take({i},{shard})\n")
        return folder.name


def inline(browsers: Iterable[Browser]) -> bool:
    """Whether the page of these holds their shards itself."""
    return sum(browser.size for browser in browsers) <= INLINE


def as_json(value: Any) -> str:
    """JSON in which no tag can begin."""
    return htmlsafe_json_dumps(value, json.dumps, **AS_JSON)


def shards_beside(page: Path) -> dict[str, Path]:
    """The files of shards that are beside a page, by their path from there."""
    return {
        f"{folder.name}/{file.name}": file
        for folder in _folders(page)
        for file in sorted(folder.iterdir())
    }


def remove_others(page: Path, kept: Collection[str]) -> None:
    """Remove the folders of shards that earlier pages of this name have left."""
    for folder in _folders(page):
        if folder.name not in kept:
            discard(folder)


def _folders(page: Path) -> list[Path]:
    ours = re.compile(re.escape(page.stem) + r"-experts-[0-9a-f]{16}")
    return [path for path in page.parent.glob("*-experts-*") if ours.fullmatch(path.name)]


def browser_of(
    experts: dict[str, Any],
    reads: Iterable[dict[str, Any]] = (),
    labels: dict[str, Any] | None = None,
    beside: dict[str, Any] | None = None,
    layer: str = "",
) -> Browser:
    """What the page's script reads of an ``experts.json``, of the probes of its layer, of its
    ``labels.json``, and of another layer in its ``beside.json``; and the layer in words."""
    labelled = {row["id"]: [row["name"], row["f1"]] for row in (labels or {"labels": []})["labels"]}
    near = {row["id"]: row["nearest"] for row in (beside or {"experts": []})["experts"]}
    promoted = (token for expert in experts["experts"] for token, _ in expert["promoted"] or ())
    tokens = {token: i for i, token in enumerate(dict.fromkeys(promoted))}

    def line(expert: dict[str, Any]) -> list[Any]:
        top = [context for context in expert["contexts"] if context["quantile"] == 1]
        places = [number for context in top for number in (context["text"], context["position"])]
        promotes = [tokens[token] for token, _ in expert["promoted"] or ()]
        return [*(expert[name] for name in LINE), places, promotes, labelled.get(expert["id"])]

    def rest(expert: dict[str, Any]) -> dict[str, Any]:
        contexts = [[context[name] for name in CONTEXT] for context in expert["contexts"]]
        others = {name: value for name, value in expert.items() if name not in LINE}
        return others | {"contexts": contexts, "beside": near.get(expert["id"], [])}

    rows = experts["experts"]
    data = {
        "layer": layer,
        "texts": experts["texts"],
        "tokens": [*tokens],
        "experts": [line(expert) for expert in rows],
        "classes": _chosen(reads),
        "shard": SHARD,
    }
    parts = ([*map(rest, rows[i : i + SHARD])] for i in range(0, len(rows), SHARD))
    return Browser(data, [as_json(part) for part in parts])


def _chosen(reads: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each class, the experts that probes of one layer read, best first: [id, best rank, number
    of features of the smallest probe that reads it, mean F1 of such probes]."""
    names = ["data", "class", "features", "n_features", "f1"]
    frame = pd.DataFrame([*reads], columns=names).dropna(subset="features").explode("features")
    frame = frame.astype({"features": int, "n_features": int})
    frame["rank"] = frame.groupby(level=0).cumcount() + 1
    expert, best = names[:3], ["rank", "n_features"]
    smallest = frame.groupby(expert)[best].transform("min")
    frame = frame.assign(rank=smallest["rank"])[frame["n_features"] == smallest["n_features"]]
    frame = frame.groupby([*expert, *best], sort=False)["f1"].mean().reset_index()
    frame = frame.sort_values([*best, "f1"], ascending=[True, True, False])
    return [
        {"data": data, "class": name, "experts": [list(row)[2:] for row in rows.itertuples(False)]}
        for (data, name), rows in frame.groupby(["data", "class"], sort=False)
    ]
