"""Figures: what was measured, in plotly.

A frame has a column ``layer``, the reader's name; several seeds give means and their range.
"""

from __future__ import annotations

import html
import textwrap
from itertools import cycle
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import qualitative
from torch import Tensor

from mxd_lens.layers import architectures
from mxd_lens.report.tables import layer_label, measured, method_label

NATS = "nats per token"


def losses(row: dict[str, Any]) -> go.Figure:
    """Cross-entropy increase over the original model, for the layer and its ablations."""
    names = {
        "ce_increase": "replaced",
        "gate_mean": "gate at its mean",
        "gate_shuffled": "gate shuffled",
        "gate_matched": "gate shuffled, norms kept",
        "mlp_removed": "MLP removed",
    }
    known = measured(row)
    bars = {_lines(said): known[key] for key, said in names.items() if key in known}
    figure = px.bar(x=[*bars.values()], y=[*bars], orientation="h")
    figure.update_traces(_AMOUNT | {"textangle": 0})
    title = f"Increase in cross-entropy (original: {row['ce_original']:.3f} {NATS})"
    return _styled(figure, title, xaxis_title=NATS, yaxis=_NAMES)


def firing(density: Float[Tensor, "d_sae"]) -> go.Figure:
    """How often each expert fires."""
    alive = density[density > 0]
    figure = px.histogram(x=alive.log10().tolist(), nbins=60)
    figure.update_traces(hovertemplate="10^%{x}: %{y} experts")
    title = f"Share of tokens on which an expert fires ({len(alive):,} of {len(density):,} do)"
    axes = {"xaxis_title": "share of tokens (log10)", "yaxis_title": "experts"}
    return _styled(figure, title, **axes)


def comparison(rows: list[dict[str, Any]]) -> list[go.Figure]:
    """What the language model loses, and how much the choice of units matters: lines over depth
    where there are several MLPs; bars where all layers have one k; where they have several, lines
    over k, and the unexplained variance."""
    keys = ["layer", "k", "hook_layer", "ce_increase", "fvu", "gate_matched", "mlp_removed"]
    frame = _drawn(pd.DataFrame([measured(row) for row in rows], columns=keys))
    ce = "Cross-entropy lost with the layer in place of the MLP"
    gate = "Cross-entropy lost by shuffling the activations, norms kept"
    removed = frame["mlp_removed"].mean()
    if frame["hook_layer"].nunique() > 1:
        return [_depth(frame, "ce_increase", ce), _depth(frame, "gate_matched", gate)]
    if frame["k"].nunique() < 2:
        figures = {"ce_increase": f"{ce} (MLP removed: {removed:+.4f})", "gate_matched": gate}
        return [_bars(frame, *of) for of in figures.items() if frame[of[0]].notna().any()]
    return [
        _frontier(frame, "ce_increase", ce, NATS, {"MLP removed": removed}),
        _frontier(frame, "fvu", "Fraction of variance unexplained", "FVU", {}),
        _frontier(frame, "gate_matched", gate, NATS, {"MLP removed": removed}),
    ]


def together(rows: list[dict[str, Any]]) -> list[go.Figure]:
    """Of layers in place at once: what the language model loses by how many, and how the error of
    the residual stream grows with depth."""
    said: list[dict[str, Any]] = [row | {"layer": layer_label(row)} for row in rows]
    many = pd.DataFrame(
        [
            {
                "layer": row["layer"],
                "n": len(of_n["layers"]),
                "lost": of_n["ce_increase"],
                "up": high - of_n["ce_increase"],
                "down": of_n["ce_increase"] - low,
            }
            for row in said
            for of_n in row["replaced"]
            for low, high in [of_n["ce_increase_interval"] or [of_n["ce_increase"]] * 2]
        ]
    )
    lines = {"color": "layer", "markers": True}
    lost = px.line(_drawn(many), x="n", y="lost", error_y="up", error_y_minus="down", **lines)
    lost.update_traces(hovertemplate="%{x} layers: %{y:.4f}")
    axis = {"title": "layers in place at once", "type": "log", "tickvals": sorted({*many["n"]})}
    axes: dict[str, Any] = {"xaxis": axis, "yaxis_title": NATS}
    figures = [_styled(lost, "Cross-entropy lost, 95% intervals over sequences", **axes)]
    grown = pd.DataFrame(
        [
            {"layer": row["layer"], "block": block, "error": error}
            for row in said
            for block, error in enumerate(row["error"])
        ]
    )
    error = px.line(_drawn(grown), x="block", y="error", **lines)
    error.update_traces(hovertemplate="after block %{x}: %{y:.4f}")
    axes = {"xaxis_title": "block", "yaxis_title": "squared error / squared norm"}
    return [*figures, _styled(error, "Error of the residual stream, all in place", **axes)]


def _depth(frame: pd.DataFrame, key: str, title: str) -> go.Figure:
    """An increase in cross-entropy by MLP, a line for each architecture and k; dotted: without the
    MLP."""
    ks = frame["k"].map("k = {:g}".format, na_action="ignore").fillna("")
    at = _spread(frame.assign(k=ks), ["layer", "k", "hook_layer"], key).sort_values("hook_layer")
    lines = {"x": "hook_layer", "y": "mean", "color": "layer", "symbol": "k", "markers": True}
    figure = px.line(at, **lines, **_RANGE, **_colours(frame))
    figure.update_traces(hovertemplate="MLP %{x}: %{y:.5f}")
    removed = frame.groupby("hook_layer")["mlp_removed"].mean()
    dotted = {"name": "MLP removed", "line": {"dash": "dot", "color": "grey"}, "mode": "lines"}
    figure.add_scatter(x=removed.index, y=removed, **dotted)
    axes = {"xaxis_title": "MLP", "yaxis": {"title": NATS, "type": "log"}}
    return _styled(figure, title, **axes)


def _bars(frame: pd.DataFrame, key: str, title: str) -> go.Figure:
    """An increase in cross-entropy, a bar for each architecture."""
    at = _spread(frame, ["layer"], key)
    at["name"] = at["layer"].map(_lines)
    spread = {"error_x": "up", "error_x_minus": "down"}
    figure = px.bar(at, x="mean", y="name", color="layer", **spread, **_colours(frame))
    figure.update_traces(_AMOUNT | {"textposition": "outside", "cliponaxis": False})
    low, high = at["low"].min(), at["high"].max()
    ends = [min(1.3 * low, 0.0), max(1.3 * high, 0.0)]  # room for the texts
    axes = {"xaxis": {"title": NATS, "range": ends}, "yaxis": _NAMES}
    return _styled(figure, title, showlegend=False, height=80 + 44 * len(at), **axes)


def _frontier(
    frame: pd.DataFrame, key: str, title: str, unit: str, lines: dict[str, float]
) -> go.Figure:
    """A measurement against k, a line for each architecture; dotted ones for reference values
    and for layers that have no k."""
    at, colours = _spread(frame, ["layer", "k"], key).sort_values("k"), _colours(frame)
    figure = px.line(at, x="k", y="mean", color="layer", markers=True, **_RANGE, **colours)
    figure.update_traces(hovertemplate="k = %{x}: %{y:.5f}")
    dense = _spread(frame[frame["k"].isna()], ["layer"], key).set_index("layer")["mean"]
    ks = sorted(at["k"].unique())
    for name, value in (lines | dense.to_dict()).items():
        line = {"dash": "dot", "color": colours["color_discrete_map"].get(name, "grey")}
        figure.add_scatter(x=[ks[0], ks[-1]], y=[value] * 2, name=name, mode="lines", line=line)
    buttons = [
        {"label": scale, "method": "relayout", "args": [{"yaxis.type": scale}]}
        for scale in ("linear", "log")
    ]
    menu = {"buttons": buttons, "type": "buttons", "direction": "left", "xanchor": "left"}
    axis = {"title": "k, experts or units active per token", "type": "log", "tickvals": ks}
    menus = [menu | {"x": 0, "y": 1.03, "yanchor": "bottom"}]
    return _styled(figure, title, xaxis=axis, yaxis_title=unit, updatemenus=menus)


def probes(frame: pd.DataFrame, data: str) -> go.Figure:
    """F1 of sparse probes on one data set; a guess that reads no feature is a line. The frame has
    `probing.summarise`'s rows, with ``data``, and ``n_features`` as ordered text."""
    frame = _drawn(frame)
    rows, colours = frame[frame["data"] == data], _colours(frame)
    guess = rows["n_features"] == "0"
    at = _spread(rows[~guess], ["layer", "n_features"], "f1").sort_values("n_features")
    order = {"n_features": [*at["n_features"].unique()], "layer": [*colours["color_discrete_map"]]}
    axes = {"x": "n_features", "y": "mean", "color": "layer", "category_orders": order}
    figure = px.bar(at, barmode="group", **axes, **_RANGE, **colours)
    figure.update_traces(hovertemplate="%{x} features: F1 %{y:.3f}")
    for name, f1 in rows[guess].groupby("layer")["f1"].mean().items():
        figure.add_hline(f1, line={"dash": "dot", "color": "grey"}, annotation={"text": name})
    axis = {"title": "features the probe reads", "type": "category"}
    return _styled(
        figure, data, xaxis=axis, yaxis={"title": "F1, mean over classes", "range": [0, 1.05]}
    )


def steering(frame: pd.DataFrame, unsteered: dict[str, float]) -> go.Figure:
    """Coherence of steered samples against their perplexity: points for an expert at a strength,
    lines through the medians of each strength, a star for the language model left alone."""
    scores = ["perplexity", "coherence"]
    frame = _drawn(frame.assign(sample=frame["samples"].str[0].fillna("").map(_wrapped)))
    medians = frame.groupby(["layer", "strength"], as_index=False)[scores].median()
    where = {"x": scores[0], "y": scores[1], "color": "layer", **_colours(frame)}
    points = px.scatter(frame, custom_data=["expert", "strength", "sample"], opacity=0.4, **where)
    points.update_traces(
        showlegend=False,
        hovertemplate="expert %{customdata[0]}, strength %{customdata[1]:.3g}: coherence "
        "%{y:.3f}, perplexity %{x:.4g}<br><i>%{customdata[2]}</i>",
    )
    lines = px.line(medians, text="strength", markers=True, **where)
    lines.update_traces(
        texttemplate="%{text:.3~g}",
        textposition="top center",
        marker_size=11,
        hovertemplate="medians at strength %{text}: coherence %{y:.3f}, perplexity %{x:.4g}",
    )
    figure = go.Figure([*points.data, *lines.data])
    figure.add_scatter(
        x=[unsteered["perplexity"]],
        y=[unsteered["coherence"]],
        name="unsteered",
        mode="markers",
        marker={"symbol": "star", "size": 14, "color": "grey"},
        hovertemplate="coherence %{y:.3f}, perplexity %{x:.4g}",
    )
    title = "Steered samples; lines: medians at each strength"
    axes = {"xaxis": {"title": "perplexity (log)", "type": "log"}, "yaxis_title": "coherence"}
    return _styled(figure, title, hoverlabel_align="left", **axes)


_RANGE = {"error_y": "up", "error_y_minus": "down"}
_AMOUNT = {"texttemplate": "%{x:+.4f}", "hovertemplate": "%{y}: %{x:.5f} nats per token"}
_NAMES = {"title": None, "autorange": "reversed", "automargin": True}


def _spread(frame: pd.DataFrame, by: list[str], key: str) -> pd.DataFrame:
    """``mean``, ``low`` and ``high`` of each group, and the way from the mean to either if seeds
    differ."""
    values = frame.dropna(subset=[*by, key]).groupby(by, sort=False, observed=True)[key]
    at = values.agg(mean="mean", low="min", high="max").reset_index()
    up, down = at["high"] - at["mean"], at["mean"] - at["low"]
    return at.assign(up=up.where(up > 0), down=down.where(up > 0))


def _drawn(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with names that plotly, which reads some HTML, shows as they are."""
    return frame.assign(layer=frame["layer"].map(_escaped))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _colours(frame: pd.DataFrame) -> dict[str, Any]:
    """A colour for each method; an architecture has the same one in all figures."""
    names = dict.fromkeys([*map(method_label, architectures()), *frame["layer"]])
    return {"color_discrete_map": dict(zip(names, cycle(qualitative.Plotly), strict=False))}


WHERE = {
    "errors": "layers in place, beside the prompt's errors",
    "replacement": "layers in place",
    "original": "original model",
}
"""Where a graph's nodes are ablated."""


def ablations(found: dict[str, Any]) -> go.Figure:
    """What happens when experts are ablated, over what a graph predicts."""
    frame = pd.DataFrame(found["rows"])
    frame["expert"] = [f"{r['layer']}#{r['unit']}, token {r['position']}" for r in found["rows"]]
    long = frame.melt(["expert", "predicted"], [*WHERE], var_name="where", value_name="measured")
    long["where"] = long["where"].map(WHERE)
    figure = px.scatter(long, x="predicted", y="measured", color="where", hover_name="expert")
    ends = [float(frame["predicted"].min()), float(frame["predicted"].max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": "gray", "dash": "dot"})
    figure.data[-1].update(name="as predicted", hoverinfo="skip")
    axes = {"xaxis_title": "predicted change", "yaxis_title": "measured change"}
    return _styled(figure, "Single experts ablated: change of the first target", **axes)


def _styled(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "y": -0.25, "title": None}
    figure.update_layout(title=title, legend=legend, template="plotly_white")
    return figure.update_layout(**layout)


def _lines(name: str) -> str:
    """A name in short lines, for the margin of a narrow figure."""
    return "<br>".join(textwrap.wrap(name, 16))


def _wrapped(text: str) -> str:
    """Text for a hover label."""
    lines = textwrap.wrap(text, 60, max_lines=6, placeholder=" …")
    return "<br>".join(map(_escaped, lines))
