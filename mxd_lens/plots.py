"""Pages: what was measured, as self-contained plotly HTML."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor


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


def write_page(path: Path, row: dict[str, Any], density: Float[Tensor, "d_sae"]) -> None:
    """One HTML file with everything inside: the numbers as a table, and the figures."""
    figures = [losses(row), firing(density)]
    plots = "".join(
        figure.to_html(full_html=False, include_plotlyjs=(i == 0), default_height=420)
        for i, figure in enumerate(figures)
    )
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_show(value))}</td></tr>"
        for name, value in row.items()
    )
    title = html.escape(f"{row['architecture']} at {row['hook_name']} of {row['model_name']}")
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }}
th {{ text-align: left; font-weight: 500; padding-right: 2rem }}
td {{ text-align: right; font-variant-numeric: tabular-nums }}
</style></head><body><h1>{title}</h1>{plots}<table>{cells}</table></body></html>
""",
        encoding="utf-8",
    )


def table(row: dict[str, Any]) -> str:
    """The numbers that decide, for a terminal."""
    lost = row["ce_zero_ablation"] - row["ce_original"]
    lines = [
        ("cross-entropy, original model", f"{row['ce_original']:.4f} nats"),
        ("  with the layer swapped in", f"{row['ce_replaced']:.4f}  (+{row['ce_increase']:.4f})"),
        ("  with the MLP removed", f"{row['ce_zero_ablation']:.4f}  (+{lost:.4f})"),
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
        lines.append((label, f"+{row[name] - row['ce_original']:.4f} nats"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def _show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
