"""Pages: a run's, a comparison's, and the report of all that is known of a run.

Each is one file that holds everything it needs, but for the contexts of very many experts (see
`mxd_lens.report.experts`), and asks nothing of the network. Texts of a corpus are hostile input:
they travel as JSON in which no tag can begin, and the page's script writes them as text; Jinja2
escapes everything else.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from sae_lens.constants import RUNNER_CFG_FILENAME
from torch import Tensor

from mxd_lens.analysis.labels import detection_scores
from mxd_lens.files import write_text
from mxd_lens.report import figures, tables
from mxd_lens.report.experts import (
    AS_JSON,
    Browser,
    as_json,
    browser_of,
    inline,
    remove_others,
)
from mxd_lens.report.tables import Table, layer_label, method_label
from mxd_lens.runs.config import COMPARISON_FILENAME
from mxd_lens.runs.results import (
    Beside,
    Experts,
    Joint,
    Labels,
    Probes,
    Row,
    Steering,
    plain,
    read,
    read_rows,
)


def write_comparison_page(results: Path) -> None:
    """The numbers of a comparison that matter, its figures and tables, a browser of experts.

    The page goes beside the comparison's ``results.json``. The experts are those of a layer that
    it opens with, if ``experts.json`` is in its run's folder, or else of the first layer with one.

    Raises:
        ValueError: a file is none of ours.
    """
    rows = _with_agreement(read_rows(results), results.parent)
    opening = _opening(rows)
    mlps = sorted({row["hook_layer"] for row in rows})
    described, experts, labels = _described(results.parent, opening)
    _write(
        results.with_suffix(".html"),
        "comparison.html",
        rows[0],
        n_mlps=len(mlps),
        **({"where": f"{len(mlps)} MLPs"} if len(mlps) > 1 else {}),
        opening=[tables.measured(row) for row in opening],
        control=[row for row in rows if not _has_experts(row)],
        figures=figures.comparison(rows),
        decisive=tables.decisive(rows),
        seeds=tables.over_seeds(rows),
        questions=tables.questions(rows),
        everything=tables.everything(rows),
        folder=shlex.quote(str(results.parent)),
        described=described,
        experts=experts,
        labels=labels,
        browsers={"data": browser_of(experts, labels=labels)} if experts else {},
    )


def write_joint_page(results: Path) -> None:
    """Layers in place at once: figures and a table, beside ``joint.json``; ValueError if that is
    none of ours."""
    rows = _read(results, Joint)["rows"]
    drawn = figures.together(rows)
    _write(
        results.with_suffix(".html"),
        "joint.html",
        rows[0],
        title="Layers in place at once",
        where="many MLPs",
        figures=drawn,
        numbers=tables.joint(rows),
        carried=tables.carried(rows),
        in_place=tables.in_place(rows),
        written=tables.written(rows),
    )


def write_run_page(path: Path, row: dict[str, Any], density: Float[Tensor, "d_sae"] | None) -> None:
    """One layer's numbers as a table, and figures: how units fire, only if it has experts."""
    firing = [] if density is None else [figures.firing(density)]
    _write(path, "run.html", row, figures=[figures.losses(row), *firing])


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run's folder, this path, from the results that are there.

    In a comparison, the page also shows that, and probes and steering of the runs that have the
    same k and seed. What has not been measured is a sentence that says how to.

    Raises:
        ValueError: the folder holds no finished run, or a file in it is none of ours.
    """
    row, folder = _finished(run), run.resolve()
    this = row["architecture"], row["k"], row["seed"]
    comparison = (folder.parent / COMPARISON_FILENAME).exists()
    compared = read_rows(folder.parent / "results.json") if comparison else []
    runs = _rows(folder.parent) if compared else {}
    alike = [path for path, row in runs.items() if (row["k"], row["seed"]) == this[1:]]
    alike = [folder, *(path for path in alike if path != folder)]
    experts = _read(run / "experts.json", Experts)
    labels = _read(run / "labels.json", Labels)
    probed = _read_all(alike, "probe.json", Probes)
    who = ("architecture", "k", "run_seed")
    rows = [of_probe for file in probed for of_probe in file["rows"]]
    reads = [of_probe for of_probe in rows if tuple(of_probe[name] for name in who) == this]
    scores = _scores(probed, row["k"])
    steered = _read_all(alike, "steering.json", Steering)
    beside, browsers = _beside(run, experts)
    if experts:
        of_row = f"layer {row['hook_layer']}: {layer_label(row)}, seed {row['seed']}"
        browsers["data"] = browser_of(experts, reads, labels, beside, of_row)
    path = run / "report.html"
    _write(
        path,
        "report.html",
        row,
        folder=shlex.quote(str(run)),
        losses=figures.losses(row),
        comparison=figures.comparison(compared) if compared else [],
        probes=[figures.probes(scores, data) for data in scores["data"].unique()],
        scores=_by_number(scores),
        reads=reads,
        steered=steered[:1],
        steering=_steering(steered),
        steered_this=(run / "steering.json").exists(),
        experts=experts,
        labels=labels,
        beside=beside,
        browsers=browsers,
    )
    return path


def agreement_of(experts: dict[str, Any]) -> str:
    """How often experts write about what they fire on, in a sentence; none if not measured."""
    agreement = [e["agreement"] for e in experts["experts"] if e["agreement"] is not None]
    if not agreement:
        return ""
    return (
        f"What they promote agrees with their own contexts better than with those of "
        f"{sum(agreement) / len(agreement):.1%} of the other experts on average (by chance: 50%), "
        f"and than with those of 99% for {sum(a > 0.99 for a in agreement):,} experts (by chance: "
        f"{0.01 * len(agreement):,.0f})."
    )


def detection_of(labels: dict[str, Any]) -> str:
    """How well names tell where experts fire, in a sentence; none if that was not measured."""
    found = detection_scores(labels["labels"])
    if found is None:
        return ""

    def spread(name: str, form: str = ".2f") -> str:
        ends = found[f"{name}_interval"]
        return "" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})"

    unanswered = found["unanswered"]
    return (
        f"Names of {found['n']:,} experts, by {labels['namer']}, tell held-out contexts with an F1 "
        f"of {found['f1']:.2f}{spread('f1')}, other experts' names with one of "
        f"{found['f1_shuffled']:.2f}{spread('f1_shuffled')}: a gain of "
        f"{found['gain']:+.2f}{spread('gain', '+.2f')}. Accuracy {found['accuracy']:.2f} and "
        f"{found['accuracy_shuffled']:.2f}, by chance 0.50. Judge: {labels['judge']}"
        + (f"; it left {unanswered:.0%} of the contexts unanswered." if unanswered else ".")
    )


def nearness_of(beside: dict[str, Any]) -> str:
    """How near the experts of a layer in ``beside.json`` are, in a sentence."""
    return (
        f"Beside each are those of {beside['label']} that fire on the same tokens. The nearest "
        "one's Jaccard index, tokens on which both fire over tokens on which either does, is "
        f"{beside['jaccard']:.2f} on average (by chance, with the other layer's firings moved on "
        f"by half of the text: {beside['jaccard_by_chance']:.2f})."
    )


def _write(
    path: Path,
    template: str,
    row: dict[str, Any],
    *,
    browsers: dict[str, Browser] | None = None,
    **parts: Any,
) -> None:
    """Render a template: a page about one layer, unless it says ``everything`` of several.

    Args:
        browsers: ``data``, if there is one, and ``beside``, the layer whose experts are shown
            beside those.
    """
    browsers = browsers or {}
    of_one = {} if "numbers" in parts else _of_one_layer(row)
    within = inline(browsers.values())
    folders = {} if within else {name: of.write_beside(path) for name, of in browsers.items()}
    data = {name: of.data | {"folder": folders.get(name)} for name, of in browsers.items()}
    scripts = {
        f"{name}-{i}": shard
        for name, of in browsers.items()
        for i, shard in enumerate(of.shards if within else [])
    }
    scripts |= {name: as_json(lines) for name, lines in data.items() if name != "data"}
    browsed = {"data": data.get("data"), "scripts": scripts, "folders": [*folders.values()]}
    write_page(path, template, **{"row": row} | of_one | browsed | parts)
    remove_others(path, folders.values())


def write_page(path: Path, template: str, **parts: Any) -> None:
    """Render a template, with plotly's script if it may have figures."""
    plotly = get_plotlyjs() if parts.get("figures", True) else ""
    write_text(path, render(template, plotly=plotly, **parts))


def render(template: str, **parts: Any) -> str:
    """What a template of this folder makes of its parts, which it escapes."""
    return _PAGES.get_template(template).render(**parts)


def _of_one_layer(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "where": f"the MLP at {row['hook_name_out']}",
        "title": layer_label(row),
        "numbers": tables.summary(row),
        "everything": tables.everything([row]),
        "by_token": tables.by_token(row),
    }


def _plot(figure: go.Figure) -> go.Figure:
    """A figure for the page's script, without the title, which is a heading of the page."""
    margin = {"t": 56 if figure.layout.updatemenus else 24, "r": 16, "l": 56, "b": 48}
    return go.Figure(figure).update_layout(title=None, margin=margin)


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.policies["json.dumps_kwargs"] = AS_JSON
_PAGES.filters["plot"] = _plot
_PAGES.globals |= {
    "agreement_of": agreement_of,
    "detection_of": detection_of,
    "nearness_of": nearness_of,
    "layer_label": layer_label,
}


# What is in the folder


def _finished(run: Path) -> dict[str, Any]:
    """A run's row of results."""
    of_run = (run / RUNNER_CFG_FILENAME).exists()
    row = _read(run / "results.json", Row) if of_run else None
    if (run / "layer").exists() and row is None:
        raise ValueError(f"{run} has not been measured: run `mxd-lens evaluate {run}` first")
    if row is None:
        raise ValueError(
            f"{run} holds no finished run: name the output folder of `mxd-lens train`, or a "
            "run's folder within a comparison"
        )
    return row


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of results of the run in a folder, or of a comparison's layers, with agreement where
    experts were inspected; ValueError if a file is none of ours."""
    rows = read_rows(folder / "results.json") or list(_rows(folder).values())
    return _with_agreement(rows, folder)


def _rows(folder: Path) -> dict[Path, dict[str, Any]]:
    """The run in a folder, or those of a comparison, that have been measured."""
    alone = (folder / RUNNER_CFG_FILENAME).exists()
    paths = [folder / "results.json"] if alone else sorted(folder.glob("*/results.json"))
    return {path.parent: row for path in paths for row in read_rows(path)}


def _with_agreement(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows, with the mean agreement of those layers whose experts were inspected."""
    who = ("hook_layer", "architecture", "k", "seed")
    agreement = {}
    for path, row in _rows(folder).items():
        experts = _read(path / "experts.json", Experts)
        found = [e["agreement"] for e in experts["experts"]] if experts else []
        found = [of_expert for of_expert in found if of_expert is not None]
        if found:
            agreement[tuple(row[name] for name in who)] = {"agreement": sum(found) / len(found)}
    return [row | agreement.get(tuple(row[name] for name in who), {}) for row in rows]


def _read(path: Path, kind: Any) -> Any:
    """What a file says, plain; None if there is none."""
    found = read(path, kind)
    return None if found is None else plain(found)


def _read_all(folders: list[Path], name: str, kind: Any) -> list[Any]:
    """What those of the folders' files say that there are."""
    return [file for folder in folders if (file := _read(folder / name, kind)) is not None]


def _has_experts(row: dict[str, Any]) -> bool:
    return row["l0"] is not None


def _opening(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a comparison opens with: the MxD's, or else the first layer's that has a k,
    at the middle one of its k."""
    rows = [row for row in rows if _has_experts(row)]
    rows.sort(key=lambda row: row["architecture"] != "mxd")
    first = [row for row in rows if row["architecture"] == rows[0]["architecture"]]
    ks = sorted({row["k"] for row in first}, key=lambda k: k or 0)
    return [row for row in first if row["k"] == ks[len(ks) // 2]]


def _described(
    folder: Path, opening: list[dict[str, Any]]
) -> tuple[str, dict[str, Any] | None, dict[str, Any] | None]:
    """A layer of a comparison, its experts and their labels: one of the opening's, or else any
    other."""
    names = ("architecture", "k", "seed")
    opened = [[row[name] for name in names] for row in opening]
    runs = [(row, run / "experts.json") for run, row in _rows(folder).items()]
    runs = [(row, path) for row, path in runs if path.exists()]
    runs.sort(key=lambda run: [run[0][name] for name in names] not in opened)
    if not runs:
        return "", None, None
    row, path = runs[0]
    label = f"{layer_label(row)}, seed {row['seed']}"
    return label, _read(path, Experts), _read(path.with_name("labels.json"), Labels)


def _beside(
    run: Path, experts: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, Browser]]:
    """The layer in a run's ``beside.json`` that was asked for last, and a browser of its experts,
    unless these are not there, or either layer's were described on another text since."""
    found = _read(run / "beside.json", Beside)
    if found is None or experts is None:
        return None, {}
    beside = found["layers"][-1]
    folder = run / beside["run"]
    theirs = _read(folder / "experts.json", Experts)
    if theirs is None or not all(beside["text"].items() <= of.items() for of in (experts, theirs)):
        return beside, {}
    labels = _read(folder / "labels.json", Labels)
    return beside, {"beside": browser_of(theirs, labels=labels, layer=beside["label"])}


# Probes and steering


_METHOD = ["data", "layer", "k", "run_seed"]


def _scores(files: list[dict[str, Any]], k: float | None) -> pd.DataFrame:
    """F1 of the probes of layers with this k, and of the baselines; ``n_features`` as text."""
    # Only what was asked for as in the first file: on the same texts and splits.
    asked = {data: how for file in reversed(files) for data, how in file["datasets"].items()}
    rows = [
        row | {"layer": method_label(row["architecture"])}
        for file in files
        for row in file["summary"]
        if row["k"] in (None, k) and file["datasets"][row["data"]] == asked[row["data"]]
    ]
    frame = pd.DataFrame(rows, columns=[*_METHOD, "n_features", "f1"])
    frame = frame.astype({"k": "Int64", "run_seed": "Int64", "n_features": "Int64"})
    numbers = [f"{n}" for n in sorted(frame["n_features"].dropna().unique())]
    text = frame["n_features"].astype("string").fillna("all")
    frame["n_features"] = pd.Categorical(text, [*numbers, "all"], ordered=True)
    return frame.drop_duplicates([*_METHOD, "n_features"])  # each file has the baselines


def _by_number(scores: pd.DataFrame) -> Table:
    """F1, a method a line, a number of features a column."""
    text = scores[_METHOD].astype("string").fillna("")
    text = text.assign(n=scores["n_features"], f1=scores["f1"].map("{:.3f}".format))
    wide = text.pivot(index=_METHOD, columns="n", values="f1").fillna("").reset_index()
    head = ["data", "method", "k", "seed", *(f"F1, {n}" for n in wide.columns[len(_METHOD) :])]
    return head, wide.to_numpy().tolist()


def _steering(files: list[dict[str, Any]]) -> list[go.Figure]:
    """A figure of the runs that were steered alike, if any was."""
    made = [{n: v for n, v in file.items() if n not in ("unsteered", "rows")} for file in files]
    alike = [file for file, how in zip(files, made, strict=True) if how == made[0]]
    frame = pd.DataFrame([row for file in alike for row in file["rows"]])
    if frame.empty:
        return []
    frame["layer"] = frame["architecture"].map(method_label)
    return [figures.steering(frame, files[0]["unsteered"])]
