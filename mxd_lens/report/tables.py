"""Tables: the numbers that decide, for a terminal, Markdown and the pages."""

from __future__ import annotations

from typing import Any

from mxd_lens.layers import label

NONE = "-"
COLUMNS = {
    "layer": "{layer}",
    "MLP": "{hook_layer}",
    "k": "{k:g}",
    "seed": "{seed}",
    "CE increase": "{ce_increase:.4f}",
    "recovered": "{ce_recovered:.1%}",
    "FVU": "{fvu:.3f}",
    "shuffled, norms kept": "{gate_matched:+.4f}",
    "alive": "{alive_fraction:.0%}",
    "always on": "{always_on}",
    "parameters": "{n_parameters:,}",
    **{f"probe F1, top {n}": f"{{probe_f1_top{n}:.3f}}" for n in (1, 2, 5)},
}
"""Of a comparison: heading, and what `measured` says below it."""
SUMMARY = {
    "cross-entropy, original model": "{ce_original:.4f} nats",
    "  with the layer swapped in": "{ce_replaced:.4f}  ({ce_increase:+.4f})",
    "  with the MLP removed": "{ce_zero_ablation:.4f}  ({mlp_removed:+.4f})",
    "recovered": "{ce_recovered:.1%}",
    "KL divergence": "{kl:.4f} nats",
    "normalised MSE per token": "{nmse:.3f}",
    "fraction of variance unexplained": "{fvu:.4f}",
    "L0": "{l0:.1f} of {d_sae:,}",
    "experts alive / always on": "{alive_fraction:.1%} / {always_on}",
    "gate at its mean": "{gate_mean:+.4f} nats",
    "gate shuffled": "{gate_shuffled:+.4f} nats",
    "gate shuffled, norms kept": "{gate_matched:+.4f} nats",
}
"""Of one layer, likewise."""
INCREASES = {
    "gate_mean": "ce_mean_gate",
    "gate_shuffled": "ce_shuffled_gate",
    "gate_matched": "ce_shuffled_gate_matched",
    "mlp_removed": "ce_zero_ablation",
}

BASELINES = ("majority", "neurons")
"""What probes are compared with."""

Table = tuple[list[str], list[list[str]]]
"""Head and body."""


def method_label(method: str) -> str:
    """Reader's name of an architecture, or of a probe's baseline; ValueError for neither."""
    return method if method in BASELINES else label(method)


def layer_label(row: dict[str, Any]) -> str:
    """Reader's name of a row's layer, with its k where it has one."""
    name = method_label(row["architecture"])
    return name if row["k"] is None else f"{name}, k = {row['k']:g}"


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """What is not None of a row of results, with ``layer``, the reader's name of the architecture,
    and cross-entropy increases of the ablations over the original model, in nats per token."""
    known = {name: value for name, value in row.items() if value is not None}
    increases = {
        name: known[ce] - row["ce_original"] for name, ce in INCREASES.items() if ce in known
    }
    return known | increases | {"layer": method_label(row["architecture"])}


def _said(form: str, known: dict[str, Any]) -> str:
    try:
        return form.format(**known)
    except KeyError:
        return NONE


def decisive(rows: list[dict[str, Any]]) -> Table:
    """The numbers that decide, a layer a line, without columns that no layer has, or the MLP's
    if there is but one."""
    columns = {name: [_said(form, measured(row)) for row in rows] for name, form in COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if {*cells} != {NONE}}
    if len({*columns["MLP"]}) == 1:
        del columns["MLP"]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The numbers that decide, a layer a line, as Markdown."""
    head, lines = decisive(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def summary(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers that decide, each with what it is, without those that the layer lacks."""
    known = measured(row)
    lines = [(what, _said(form, known)) for what, form in SUMMARY.items()]
    return [(what, value) for what, value in lines if value != NONE]


def table(row: dict[str, Any]) -> str:
    """The numbers that decide, for a terminal."""
    width = max(map(len, SUMMARY))
    return "\n".join(f"{what:<{width}}  {value}" for what, value in summary(row))


def everything(rows: list[dict[str, Any]]) -> Table:
    """All numbers, a layer a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [[name, *(_shown(row.get(name)) for row in rows)] for name in names]
    return ["", *map(layer_label, rows)], lines


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.5g}" if isinstance(value, float) else str(value)
