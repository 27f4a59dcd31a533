"""Pages: a run's, a comparison's, and the report, which has a browser of a run's experts.

Each holds everything it needs and asks nothing of the network. Texts of a corpus are hostile
input: they travel as JSON in which no tag can begin, and the page's script writes them as text.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder
from sae_lens.constants import RUNNER_CFG_FILENAME
from torch import Tensor

from mxd_lens.files import read_json, write_text
from mxd_lens.report import figures as plots
from mxd_lens.report.tables import decisive, html_table, label, show, summary
from mxd_lens.runs.config import read_config
from mxd_lens.runs.results import ComparedRow, ExpertsFile, ProbeFile, Row, SteeringFile


def write_comparison_page(results: Path) -> None:
    """The sparsity-accuracy frontier of a comparison, and all its numbers.

    Args:
        results: the comparison's ``results.json``; the page goes beside it.
    """
    rows = read_json(results, list[Row])
    names = list(dict.fromkeys(name for row in rows for name in row))
    everything = html_table(names, [[show(row.get(name)) for name in names] for row in rows])
    names, lines = decisive(rows)
    tables = (
        f'<div class="table">{html_table(names, lines)}</div><details><summary>All numbers'
        f'</summary><div class="table">{everything}</div></details>'
    )
    title = f"Layers in place of the MLP at {rows[0]['hook_name_out']} of {rows[0]['model_name']}"
    note = (
        "The MxD starts from the original MLP's hidden units, which no transcoder can; the paper's "
        "recipe and all others start at random."
    )
    _write(results.with_suffix(".html"), title, plots.frontiers(rows), f"<p>{note}</p>", tables)


def write_run_page(path: Path, row: dict[str, Any], density: Float[Tensor, "d_sae"]) -> None:
    """One layer's numbers as a table, and figures."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(show(value))}</td></tr>"
        for name, value in row.items()
    )
    title = f"{row['architecture']} at {row['hook_name']} of {row['model_name']}"
    _write(path, title, [plots.losses(row), plots.firing(density)], "", f"<table>{cells}</table>")


def _write(path: Path, title: str, figures: list[go.Figure], text: str, tables: str) -> None:
    """One HTML file with everything inside."""
    plots = "".join(
        figure.to_html(full_html=False, include_plotlyjs=(i == 0), default_height=480)
        for i, figure in enumerate(figures)
    )
    title = html.escape(title)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }}
.table {{ overflow-x: auto }}
th {{ text-align: left; font-weight: 500; padding-right: 2rem }}
td {{ text-align: right; font-variant-numeric: tabular-nums; padding-right: 1rem }}
</style></head><body><h1>{title}</h1>{text}{plots}{tables}
</body></html>
""",
    )


TEMPLATE = Path(__file__).with_suffix(".html")


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run's folder, from the results that are there.

    Args:
        run: output folder of `train`, or a run's folder within a comparison: then the page also
            shows the comparison's frontier, and probes and steering of the runs that have the
            same k and seed. What has not been measured is a sentence that says how to.

    Returns:
        Where it is.

    Raises:
        ValueError: the folder holds no finished run, or a file in it is none of ours.
    """
    name, seed, row = _finished(run)
    this = (name, row["k"], seed)
    parent = run.resolve().parent
    comparison = read_json(parent / "results.json", list[ComparedRow] | dict[str, Any])
    if not isinstance(comparison, list):
        comparison = []
    beside = _beside(run, row["k"], seed) if comparison else []
    experts = read_json(run / "experts.json", ExpertsFile)
    steering = _read_all([run, *beside], "steering.json", SteeringFile)
    probes = _read_all([run, *beside], "probe.json", ProbeFile)
    reads = [row for file in probes for row in file["rows"] if _who(row) == this]
    parts = {
        "title": html.escape(f"{label(name)}, k = {row['k']}, {row['model_name']}"),
        "heading": html.escape(f"{label(name)}, k = {row['k']}"),
        "where": html.escape(
            f"in place of the MLP at {row['hook_name_out']} of {row['model_name']}"
        ),
        "plotly": get_plotlyjs(),
        "faithfulness": _faithfulness(row),
        "frontier": _figures(plots.frontiers(comparison)) if comparison else NO_COMPARISON,
        "probes": _probes(probes, row["k"]) + ("" if reads else _missing(run, "probe")),
        "steering": _steering(steering)
        + ("" if (run / "steering.json").exists() else _missing(run, "steer")),
        "experts": _rule(experts) if experts else _missing(run, "experts"),
        "data": _in_script(_json(experts and _browsed(experts, _chosen(reads)))),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], template)
    path = run / "report.html"
    write_text(path, page)
    return path


NO_COMPARISON = (
    "<p>This run is not part of a comparison: <code>mxd-lens compare</code> trains layers of "
    "several architectures and k side by side.</p>"
)


# What is in the folder


def _finished(run: Path) -> tuple[str, int, dict[str, Any]]:
    """A run's name, seed and row of faithfulness."""
    of_run = (run / RUNNER_CFG_FILENAME).exists()
    row = read_json(run / "results.json", Row) if of_run else None
    if (run / "layer").exists() and row is None:
        raise ValueError(f"{run} has not been measured: run `mxd-lens evaluate {run}` first")
    if row is None:
        raise ValueError(
            f"{run} holds no finished run: name the output folder of `mxd-lens train`, or a "
            "run's folder within a comparison"
        )
    cfg = read_config(run)
    return cfg.name, cfg.seed, row


def _beside(run: Path, k: int | None, seed: int) -> list[Path]:
    """The other runs of a comparison that have the same k and seed."""
    run = run.resolve()
    paths = sorted(run.parent.glob("*/results.json"))
    rows = {path.parent: read_json(path, Row) for path in paths}
    return [
        folder
        for folder, row in rows.items()
        if folder != run and (row["k"], row.get("seed")) == (k, seed)
    ]


def _read_all(folders: list[Path], name: str, kind: Any) -> list[Any]:
    """What those of the folders' files say that there are."""
    return [file for folder in folders if (file := read_json(folder / name, kind)) is not None]


# Parts of the page


def _faithfulness(row: dict[str, Any]) -> str:
    numbers = html_table([f"on {row['dataset']}", ""], [list(line) for line in summary(row)])
    everything = html_table(["", ""], [[name, show(value)] for name, value in row.items()])
    return (
        f'<div class="side"><div class="table">{numbers}</div>{_figures([plots.losses(row)])}</div>'
        f'<details><summary>All numbers</summary><div class="table">{everything}</div></details>'
    )


def _who(row: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """Which layer a probe read."""
    return row["name"], row["k"], row["run_seed"]


def _probes(files: list[dict[str, Any]], k: int | None) -> str:
    """Figures and a table of the F1 of probes of layers with this k, and of the baselines."""
    # Only what was asked for as in the first file: on the same texts and splits.
    asked = {data: how for file in reversed(files) for data, how in file["datasets"].items()}
    scores = {
        (row["data"], *_who(row), row["n_features"]): row  # each file has the baselines
        for file in files
        for row in file["summary"]
        if row["k"] in (None, k) and file["datasets"][row["data"]] == asked[row["data"]]
    }
    if not scores:
        return ""
    f1: dict[tuple[Any, ...], dict[int | None, str]] = {}
    for (*method, n), row in scores.items():
        f1.setdefault(tuple(method), {})[n] = f"{row['f1']:.3f}"
    ns = sorted({n for *_, n in scores}, key=lambda n: math.inf if n is None else n)
    lines = [
        [data, label(name), *("" if i is None else str(i) for i in (of_k, seed))]
        + [of_n.get(n, "") for n in ns]
        for (data, name, of_k, seed), of_n in f1.items()
    ]
    head = ["data", "method", "k", "seed", *(f"F1, {'all' if n is None else n}" for n in ns)]
    rows = list(scores.values())
    figures = [plots.probes(rows, data) for data in dict.fromkeys(row["data"] for row in rows)]
    return (
        f'{_figures(figures)}<details><summary>As a table</summary><div class="table">'
        f"{html_table(head, lines)}</div></details>"
    )


def _steering(steered: list[dict[str, Any]]) -> str:
    """A figure of the runs that were steered alike."""
    if not steered:
        return ""
    names = ("edit", "prompt", "n_samples", "n_tokens", "temperature", "seed")
    settings = {key: steered[0][key] for key in names}
    alike = [file for file in steered if settings.items() <= file.items()]
    rows = [row for file in alike for row in file["rows"]]
    text = (
        f"{settings['n_samples']} samples of {settings['n_tokens']} tokens at temperature "
        f"{settings['temperature']}, from “{settings['prompt']}”. Steered by the unit's "
        f"{settings['edit']}. Strength: mean norm of the change at the MLP's output, over that "
        "output's mean norm."
    )
    return f"<p>{html.escape(text)}</p>{_figures([plots.steering(rows, steered[0]['unsteered'])])}"


def _rule(experts: dict[str, Any]) -> str:
    n = sum(expert["meaningful"] for expert in experts["experts"])
    text = (
        f"{experts['n_live']:,} of {experts['d_sae']:,} experts fired in {experts['n_tokens']:,} "
        f"tokens of {experts['dataset']}; {n:,} count as meaningful. {experts['rule']}"
    )
    return f"<p>{html.escape(text)}</p><p>{agreement_of(experts)}</p>"


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


def _missing(run: Path, command: str) -> str:
    line = html.escape(f"mxd-lens {command} {shlex.quote(str(run))}")
    return f"<p>Not measured of this run yet: <code>{line}</code></p>"


def _figures(figures: list[go.Figure]) -> str:
    """Figures side by side where there is room, their titles as headings, which can wrap."""
    return f'<div class="figures">{"".join(map(_figure, figures))}</div>'


def _figure(figure: go.Figure) -> str:
    title = figure.layout.title.text
    figure.update_layout(title=None, margin={"t": 56, "r": 16, "l": 56, "b": 48}, height=440)
    data = _in_script(json.dumps(figure, cls=PlotlyJSONEncoder))
    return (
        f'<figure><figcaption>{title}</figcaption><div class="plot"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


# What the browser of experts reads


def _chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each class, the experts that probes of it read, best first.

    Args:
        rows: `probe`'s, of one layer, with ``data``.

    Returns:
        ``data``, ``class`` and ``experts``: [id, best rank, number of features of the smallest
        probe that reads it, mean F1 of such probes].
    """
    found: dict[tuple[str, str], dict[int, list[tuple[int, int, float]]]] = {}
    for row in rows:
        if row["features"] is not None:
            of_class = found.setdefault((row["data"], row["class"]), {})
            for rank, expert in enumerate(row["features"], 1):
                of_class.setdefault(expert, []).append((rank, row["n_features"], row["f1"]))
    classes = []
    for (data, name), of_class in found.items():
        experts = []
        for expert, reads in of_class.items():
            smallest = min(n for _, n, _ in reads)
            f1 = [f1 for _, n, f1 in reads if n == smallest]
            experts.append([expert, min(rank for rank, *_ in reads), smallest, sum(f1) / len(f1)])
        classes.append({"data": data, "class": name, "experts": sorted(experts, key=_by_rank)})
    return classes


def _by_rank(expert: list[Any]) -> tuple[Any, ...]:
    _, rank, n, f1 = expert
    return rank, n, -f1


def _browsed(experts: dict[str, Any], chosen: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script reads: the experts, their contexts as lists, and the classes."""
    keys = ("text", "position", "value", "quantile")
    rows = [
        expert | {"contexts": [[context[key] for key in keys] for context in expert["contexts"]]}
        for expert in experts["experts"]
    ]
    return {"texts": experts["texts"], "experts": rows, "classes": chosen}


def _in_script(text: str) -> str:
    """JSON in which no tag begins or ends."""
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _json(value: Any) -> str:
    """Short JSON: no needless spaces or escapes, numbers to four digits."""
    return json.dumps(_rounded(value), ensure_ascii=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    """Floats to four digits, and null for those that JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
