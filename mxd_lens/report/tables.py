"""Tables: the numbers that decide, for a terminal, Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from mxd_lens.layers.matching import label


def html_table(names: list[str], lines: list[list[str]]) -> str:
    """A table with a head."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead>{body}</table>"


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The numbers that decide, a layer a line, as Markdown."""
    names, lines = decisive(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *lines])


def decisive(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
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
    for name, said in (
        ("ce_mean_gate", "gate at its mean"),
        ("ce_shuffled_gate", "gate shuffled"),
        ("ce_shuffled_gate_matched", "gate shuffled, norms kept"),
    ):
        lines.append((said, f"{row[name] - row['ce_original']:+.4f} nats"))
    return lines


def table(row: dict[str, Any]) -> str:
    """The numbers that decide, for a terminal."""
    lines = summary(row)
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def show(value: Any) -> str:
    """A number as people read it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
