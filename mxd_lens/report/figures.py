"""Pages: what was measured, as self-contained plotly HTML."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable
from itertools import cycle
from statistics import median
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import qualitative
from torch import Tensor

from mxd_lens.layers.matching import LABELS, label


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
