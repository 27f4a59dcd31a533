"""Pages: what was measured, as self-contained plotly HTML."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import qualitative
from torch import Tensor

from mxd_lens.files import write_text


def losses(row: dict[str, Any]) -> go.Figure:
    """Cross-entropy increase over the original model, for the layer and its ablations."""
    bars = {
        "replaced": row["ce_replaced"],
        "gate at its mean": row["ce_mean_gate"],
        "gate shuffled": row["ce_shuffled_gate"],
        "gate shuffled, norms kept": row["ce_shuffled_gate_matched"],
        "MLP removed": row["ce_zero_ablation"],
    }
    increase = [ce - row["ce_original"] for ce in bars.values()]
    figure = go.Figure(
        go.Bar(
            x=increase,
            y=list(bars),
            orientation="h",
            text=[f"{value:+.4f}" for value in increase],
            textposition="auto",
            hovertemplate="%{y}: %{x:.5f} nats per token<extra></extra>",
        )
    )
    return figure.update_layout(
        title=f"What the language model loses (original: {row['ce_original']:.3f} nats per token)",
        xaxis_title="increase in cross-entropy (nats per token)",
        yaxis={"autorange": "reversed", "automargin": True},
        template="plotly_white",
    )


def firing(density: Float[Tensor, "d_sae"]) -> go.Figure:
    """How often each expert fires."""
    alive = density[density > 0]
    figure = go.Figure(
        go.Histogram(
            x=alive.log10().tolist(),
            nbinsx=60,
            hovertemplate="10^%{x}: %{y} experts<extra></extra>",
        )
    )
    return figure.update_layout(
        title=f"How often experts fire ({len(alive):,} of {len(density):,} do at all)",
        xaxis_title="share of tokens on which the expert fires (log10)",
        yaxis_title="experts",
        template="plotly_white",
    )


LABELS = {
    "mxd": "MxD",
    "mxd:paper": "MxD, paper's recipe",
    "topk_transcoder": "transcoder",
    "topk_skip_transcoder": "skip transcoder",
    "topk": "SAE of the MLP's output",
}


def label(name: str) -> str:
    """What a layer is called for people."""
    return LABELS.get(name, name)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each method; an architecture has the same one in all figures."""
    return dict(zip(dict.fromkeys([*LABELS, *names]), cycle(qualitative.Plotly), strict=False))


def frontier(
    rows: list[dict[str, Any]], key: str, title: str, unit: str, lines: dict[str, float]
) -> go.Figure:
    """A measurement against k, one line per architecture: means over seeds, and their range.

    Args:
        key: the measurement.
        title, unit: what it is, and in what it is counted.
        lines: reference values.
    """
    figure = go.Figure()
    colours = _colours(row["name"] for row in rows)
    for name in dict.fromkeys(row["name"] for row in rows):
        at: dict[int, list[float]] = {}
        for row in rows:
            if row["name"] == name and row["k"] is not None:
                at.setdefault(row["k"], []).append(row[key])
        ks = sorted(at)
        means = [sum(at[k]) / len(at[k]) for k in ks]
        figure.add_scatter(
            x=ks,
            y=means,
            name=label(name),
            mode="lines+markers",
            line_color=colours[name],
            error_y={
                "array": [max(at[k]) - mean for k, mean in zip(ks, means, strict=True)],
                "arrayminus": [mean - min(at[k]) for k, mean in zip(ks, means, strict=True)],
            },
            customdata=[len(at[k]) for k in ks],
            hovertemplate="k = %{x}: %{y:.5f}<br>seeds: %{customdata}",
        )
    for text, value in lines.items():
        figure.add_hline(y=value, line_dash="dot", annotation_text=text)
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    buttons = [
        {"label": scale, "method": "relayout", "args": [{"yaxis.type": scale}]}
        for scale in ("linear", "log")
    ]
    return figure.update_layout(
        title=title,
        xaxis={"title": "k, experts or units active per token", "type": "log", "tickvals": ks},
        yaxis={"title": unit, "automargin": True},
        legend={"orientation": "h", "y": -0.25},
        updatemenus=[
            {
                "buttons": buttons,
                "type": "buttons",
                "direction": "left",
                "x": 0,
                "xanchor": "left",
                "y": 1.03,
                "yanchor": "bottom",
            }
        ],
        template="plotly_white",
    )


def frontiers(rows: list[dict[str, Any]]) -> list[go.Figure]:
    """What the language model loses, what is unexplained, and what the gate's choices matter."""
    removed = {"MLP removed": rows[0]["ce_zero_ablation"] - rows[0]["ce_original"]}
    shuffled = [
        row | {"cost": row["ce_shuffled_gate_matched"] - row["ce_original"]} for row in rows
    ]
    nats = "nats per token"
    return [
        frontier(
            rows,
            "ce_increase",
            "Increase in cross-entropy",
            nats,
            removed | {"original model": 0.0},
        ),
        frontier(rows, "fvu", "Fraction of variance unexplained", "FVU", {}),
        frontier(
            shuffled,
            "cost",
            "Cross-entropy lost by shuffling the coefficients, norms kept",
            nats,
            removed,
        ),
    ]


def probes(scores: list[dict[str, Any]], data: str) -> go.Figure:
    """F1 of sparse probes on one data set: means over seeds, and their range.

    Args:
        scores: `probing.summarise`'s rows, with ``data`` and ``name``. A guess that reads no
            feature is a line.
    """
    rows = [row for row in scores if row["data"] == data]
    colours = _colours(row["name"] for row in scores)
    ns = sorted(
        {n for row in rows if (n := row["n_features"]) != 0}, key=lambda n: float(n or math.inf)
    )
    figure = go.Figure()
    for name in sorted({row["name"] for row in rows}, key=list(colours).index):
        at: dict[int | None, list[float]] = {}
        for row in rows:
            if row["name"] == name:
                at.setdefault(row["n_features"], []).append(row["f1"])
        means = {n: sum(f1) / len(f1) for n, f1 in at.items()}
        if 0 in at:
            figure.add_hline(
                means[0],
                line_dash="dot",
                annotation={"text": html.escape(label(name)), "bgcolor": "white", "opacity": 0.8},
            )
        if not (read := [n for n in ns if n in at]):
            continue
        figure.add_bar(
            x=["all" if n is None else str(n) for n in read],
            y=[means[n] for n in read],
            name=html.escape(label(name)),
            marker_color=colours[name],
            error_y={
                "array": [max(at[n]) - means[n] for n in read],
                "arrayminus": [means[n] - min(at[n]) for n in read],
                "visible": any(len(at[n]) > 1 for n in read),
            },
            hovertemplate="%{x} features: F1 %{y:.3f}",
        )
    return figure.update_layout(
        title=html.escape(data),
        xaxis={
            "title": "features the probe reads",
            "type": "category",
            "categoryorder": "array",
            "categoryarray": ["all" if n is None else str(n) for n in ns],
        },
        yaxis={"title": "F1, mean over classes", "range": [0, 1.05]},
        legend={"orientation": "h", "y": -0.25},
        template="plotly_white",
    )


def steering(rows: list[dict[str, Any]], unsteered: dict[str, float]) -> go.Figure:
    """Coherence of steered samples against their perplexity: points for an expert at a strength,
    lines through the medians of each strength.

    Args:
        rows: with ``name``, ``expert``, ``strength``, ``coherence``, ``perplexity``, ``samples``.
        unsteered: coherence and perplexity of the language model left alone.
    """
    figure = go.Figure()
    colours = _colours(row["name"] for row in rows)
    for name in sorted({row["name"] for row in rows}, key=list(colours).index):
        points = [row for row in rows if row["name"] == name]
        figure.add_scatter(
            x=[row["perplexity"] for row in points],
            y=[row["coherence"] for row in points],
            name=html.escape(label(name)),
            legendgroup=name,
            showlegend=False,
            mode="markers",
            marker={"color": colours[name], "opacity": 0.4},
            customdata=[
                [row["expert"], row["strength"], _wrapped(*row["samples"][:1])] for row in points
            ],
            hovertemplate="expert %{customdata[0]}, strength %{customdata[1]:.3g}: coherence "
            "%{y:.3f}, perplexity %{x:.4g}<br><i>%{customdata[2]}</i>",
        )
        strengths = sorted({row["strength"] for row in points})
        at = [[row for row in points if row["strength"] == strength] for strength in strengths]
        figure.add_scatter(
            x=[median(point["perplexity"] for point in same) for same in at],
            y=[median(point["coherence"] for point in same) for same in at],
            text=[f"{strength:.3g}" for strength in strengths],
            name=html.escape(label(name)),
            legendgroup=name,
            mode="lines+markers+text",
            textposition="top center",
            marker={"color": colours[name], "size": 11},
            hovertemplate="medians at strength %{text}: coherence %{y:.3f}, perplexity %{x:.4g}",
        )
    figure.add_scatter(
        x=[unsteered["perplexity"]],
        y=[unsteered["coherence"]],
        name="unsteered",
        mode="markers",
        marker={"symbol": "star", "size": 14, "color": "black"},
        hovertemplate="coherence %{y:.3f}, perplexity %{x:.4g}",
    )
    return figure.update_layout(
        title="Steered samples; lines: medians at each strength",
        xaxis={"title": "perplexity (log)", "type": "log"},
        yaxis={"title": "coherence of the samples", "automargin": True},
        legend={"orientation": "h", "y": -0.25},
        hoverlabel={"align": "left"},
        template="plotly_white",
    )


def _wrapped(text: str = "") -> str:
    """Text for a hover label, where plotly reads some HTML."""
    lines = textwrap.wrap(text, 60, max_lines=6, placeholder=" …")
    return "<br>".join(html.escape(line) for line in lines)


def write_frontier_page(path: Path, rows: list[dict[str, Any]]) -> None:
    """The sparsity-accuracy frontier of a comparison, and all its numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    everything = html_table(names, [[show(row.get(name)) for name in names] for row in rows])
    names, lines = _decisive(rows)
    tables = (
        f'<div class="table">{html_table(names, lines)}</div><details><summary>All numbers'
        f'</summary><div class="table">{everything}</div></details>'
    )
    title = f"Layers in place of the MLP at {rows[0]['hook_name_out']} of {rows[0]['model_name']}"
    note = (
        "The MxD starts from the original MLP's hidden units, which no transcoder can; the paper's "
        "recipe and all others start at random."
    )
    _write(path, title, frontiers(rows), f"<p>{note}</p>", tables)


def html_table(names: list[str], lines: list[list[str]]) -> str:
    """A table with a head."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead>{body}</table>"


def write_page(path: Path, row: dict[str, Any], density: Float[Tensor, "d_sae"]) -> None:
    """One layer's numbers as a table, and figures."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(show(value))}</td></tr>"
        for name, value in row.items()
    )
    title = f"{row['architecture']} at {row['hook_name']} of {row['model_name']}"
    _write(path, title, [losses(row), firing(density)], "", f"<table>{cells}</table>")


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


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The numbers that decide, a layer a line, as Markdown."""
    names, lines = _decisive(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *lines])


def _decisive(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table of a comparison."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "layer": lambda row: label(row["name"]),
        "k": lambda row: str(row["k"]),
        "seed": lambda row: str(row["seed"]),
        "CE increase": lambda row: f"{row['ce_increase']:.4f}",
        "recovered": lambda row: f"{row['ce_recovered']:.1%}",
        "FVU": lambda row: f"{row['fvu']:.3f}",
        "shuffled, norms kept": lambda row: (
            f"{row['ce_shuffled_gate_matched'] - row['ce_original']:+.4f}"
        ),
        "alive": lambda row: f"{row['alive_fraction']:.0%}",
        "always on": lambda row: str(row["always_on"]),
        "parameters": lambda row: f"{row['n_parameters']:,}",
    }
    for n in (1, 2, 5):
        key = f"probe_f1_top{n}"
        if any(key in row for row in rows):
            columns[f"probe F1, top {n}"] = lambda row, key=key: (
                f"{row[key]:.3f}" if key in row else ""
            )
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def summary(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers that decide, each with what it is."""
    lost = row["ce_zero_ablation"] - row["ce_original"]
    lines = [
        ("cross-entropy, original model", f"{row['ce_original']:.4f} nats"),
        ("  with the layer swapped in", f"{row['ce_replaced']:.4f}  ({row['ce_increase']:+.4f})"),
        ("  with the MLP removed", f"{row['ce_zero_ablation']:.4f}  ({lost:+.4f})"),
        ("recovered", f"{row['ce_recovered']:.1%}"),
        ("KL divergence", f"{row['kl']:.4f} nats"),
        ("normalised MSE per token", f"{row['nmse']:.3f}"),
        ("fraction of variance unexplained", f"{row['fvu']:.4f}"),
        ("L0", f"{row['l0']:.1f} of {row['d_sae']:,}"),
        ("experts alive / always on", f"{row['alive_fraction']:.1%} / {row['always_on']}"),
    ]
    for name, label in (
        ("ce_mean_gate", "gate at its mean"),
        ("ce_shuffled_gate", "gate shuffled"),
        ("ce_shuffled_gate_matched", "gate shuffled, norms kept"),
    ):
        lines.append((label, f"{row[name] - row['ce_original']:+.4f} nats"))
    return lines


def table(row: dict[str, Any]) -> str:
    """The numbers that decide, for a terminal."""
    lines = summary(row)
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def show(value: Any) -> str:
    """A number as people read it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
