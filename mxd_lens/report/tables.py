"""Tables: the numbers that decide, for a terminal, Markdown and the pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mxd_lens.analysis.intervals import increase_interval, worth
from mxd_lens.layers import label
from mxd_lens.runs.compare import CONTROL

NONE = "-"
COLUMNS = {
    "layer": "{layer}",
    "MLP": "{hook_layer}",
    "k": "{k:g}",
    "seed": "{seed}",
    "CE increase": "{ce_increase:.4f}",
    "95% interval": "{ce_increase_interval[0]:.4f} to {ce_increase_interval[1]:.4f}",
    "worth": "{worth:+.4f}",
    "share": "{share:.0%}",
    "shuffled": "{shuffled:.0%}",
    "agreement": "{agreement:.3f}",
    "Jacobian": "{jacobian_cosine:.2f}",
    "probe F1": "{probe_f1_top1:.3f}",
}
"""Of a comparison: heading, and what `measured` says below it."""
QUESTIONS = {
    "CE increase": "Faithful? Nats per token lost with the layer in place of the MLP, and the 95% "
    "interval over sequences; an exact copy of the MLP loses {ce_floor:.4f}.",
    "worth": "Do experts add to it? How much less that is than a dense control of the MLP's "
    "hidden width, without experts, loses.",
    "share": "Carried by experts? Of what removing the MLP loses, what holding the sparse term at "
    "its mean does.",
    "shuffled": "Do experts fire for a reason? Of what removing the MLP loses, what another "
    "token's sparse term, norms kept, does.",
    "agreement": "Do they write what they fire on? How much of the other experts' contexts an "
    "expert's promoted tokens fit worse than its own, on average; by chance 0.5.",
    "Jacobian": "Does it compute as the MLP does? Mean cosine, over tokens, of the layer's "
    "Jacobian to the MLP's.",
}
"""What the columns ask."""
SUMMARY = {
    "cross-entropy, original model": "{ce_original:.4f} nats",
    "  with the layer swapped in": "{ce_replaced:.4f}  ({ce_increase:+.4f})",
    "    95% interval": "{ce_increase_interval[0]:+.4f} to {ce_increase_interval[1]:+.4f}",
    "  with an exact copy (floor)": "{ce_floor:+.4f}",
    "  with the MLP removed": "{ce_zero_ablation:.4f}  ({mlp_removed:+.4f})",
    "recovered": "{ce_recovered:.1%}",
    "worth of the experts": "{worth:+.4f} nats",
    "KL divergence": "{kl:.4f} nats",
    "fraction of variance unexplained": "{fvu:.4f}",
    "L0": "{l0:.1f} of {d_sae:,}",
    "experts alive / always on": "{alive_fraction:.1%} / {always_on}",
    "gate at its mean": "{gate_mean:+.4f} nats",
    "share of the experts": "{share:.1%}",
    "gate shuffled": "{gate_shuffled:+.4f} nats",
    "gate shuffled, norms kept": "{gate_matched:+.4f} nats  ({shuffled:.1%} of the MLP)",
    "Jacobian's cosine to the MLP's": "{jacobian_cosine:.3f}",
    "  through the gate": "{jacobian_gate_share:.1%}",
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
    cross-entropy increases of the ablations over the original model, in nats per token, and
    ``shuffled``, that with norms kept as a fraction of that without the MLP."""
    known = {name: value for name, value in row.items() if value is not None}
    increases = {
        name: known[ce] - row["ce_original"] for name, ce in INCREASES.items() if ce in known
    }
    if "gate_matched" in increases:
        increases["shuffled"] = increases["gate_matched"] / increases["mlp_removed"]
    return known | increases | {"layer": method_label(row["architecture"])}


def _said(form: str, known: dict[str, Any]) -> str:
    try:
        return form.format(**known)
    except KeyError:
        return NONE


def decisive(rows: list[dict[str, Any]]) -> Table:
    """The numbers that decide, a layer a line, without columns that no layer has, or the MLP's
    if there is but one."""
    several = len({row["hook_layer"] for row in rows}) > 1
    columns = {name: form for name, form in COLUMNS.items() if several or name != "MLP"}
    return _columns(columns, map(measured, rows))


def _columns(columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> Table:
    """A row a line, without columns that none has."""
    known = [{name: v for name, v in row.items() if v is not None} for row in rows]
    cells = {name: [_said(form, row) for row in known] for name, form in columns.items()}
    cells = {name: of_rows for name, of_rows in cells.items() if {*of_rows} != {NONE}}
    return list(cells), [list(line) for line in zip(*cells.values(), strict=True)]


def over_seeds(rows: list[dict[str, Any]]) -> Table | None:
    """Layers that differ in nothing but their seed, a line for all: means and, in brackets, ranges;
    intervals are of the means, over sequences. None if no two do."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["hook_layer"], row["architecture"], row["k"]), []).append(row)
    if max(map(len, groups.values())) == 1:
        return None
    head = ["layer", "MLP", "k", "seeds", "CE increase", "95% interval", "worth", "95% interval"]
    ranges = {"share": "{:.0%}", "shuffled": "{:.0%}", "jacobian_cosine": "{:.2f}"}
    ranges |= {"probe_f1_top1": "{:.3f}"}
    lines = []
    for (mlp, architecture, k), group in groups.items():
        losses = [row["ce_increase"] for row in group]
        shown = [_range(losses, "{:.4f}"), _spread(increase_interval(group), "{:.4f}")]
        controls = groups.get((mlp, CONTROL, None))
        added, spread = None, None
        if controls and architecture != CONTROL:
            added, spread = worth(group, controls)
        shown += [NONE if added is None else f"{added:+.4f}", _spread(spread, "{:+.4f}")]
        known = [measured(row) for row in group]
        for name, form in ranges.items():
            shown.append(_range([row[name] for row in known if name in row], form))
        size = NONE if k is None else f"{k:g}"
        lines.append([method_label(architecture), f"{mlp}", size, f"{len(group)}", *shown])
    return [*head, "share", "shuffled", "Jacobian", "probe F1"], lines


def _range(values: list[float], form: str) -> str:
    if not values:
        return NONE
    mean = form.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _spread(interval: list[float] | None, form: str) -> str:
    return NONE if interval is None else " to ".join(form.format(end) for end in interval)


def joint(rows: list[dict[str, Any]]) -> Table:
    """What layers in place at once lose, a number of layers a line."""
    head = ["layers", "MLPs", "CE increase", "95% interval", "KL"]
    lines = []
    for row in rows:
        for of_n in row["replaced"]:
            interval = of_n["ce_increase_interval"]
            said = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else NONE
            numbers = [f"{of_n['ce_increase']:.4f}", said, f"{of_n['kl']:.4f}"]
            lines.append([layer_label(row), f"{len(of_n['layers'])}", *numbers])
    return head, lines


CARRIED = {
    "layers": "{layer}",
    "MLPs": "{n}",
    "CE increase": "{ce_increase:.4f}",
    "KL": "{kl:.4f}",
    "gates at their means": "{ce_mean_gates:.4f}",
    "MLPs removed": "{ce_zero_ablation:.4f}",
    "share": "{share:.0%}",
    "alive": "{alive:.0%}",
    "FVU": "{fvu:.3f}",
}
"""Of all layers in place: heading, and what `carried` says below it."""


def carried(rows: list[dict[str, Any]]) -> Table:
    """What of it the experts do, with all layers in place; alive and FVU are means over layers."""
    return _columns(CARRIED, [_all_in_place(row) | {"layer": layer_label(row)} for row in rows])


def tuned(measured: dict[str, Any]) -> Table:
    """That before tuning and after."""
    times = ("before", "after")
    return _columns(CARRIED, [_all_in_place(measured[when]) | {"layer": when} for when in times])


def _all_in_place(row: dict[str, Any]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [of_layer[name] for of_layer in row["in_place"] if of_layer[name] is not None]
        return sum(values) / len(values) if values else None

    of_layers = {"n": len(row["in_place"]), "alive": mean("alive_fraction"), "fvu": mean("fvu")}
    return row["replaced"][-1] | row | of_layers


IN_PLACE = {
    "layer": "{label}",
    "MLP": "{layer}",
    "CE increase": "{ce_increase:.4f}",
    "95% interval": "{ce_increase_interval[0]:.4f} to {ce_increase_interval[1]:.4f}",
    "worth": "{worth:+.4f}",
    "share": "{share:.0%}",
    "shuffled": "{shuffled:.0%}",
    "Jacobian": "{jacobian_cosine:.2f}",
    "FVU": "{fvu:.3f}",
    "alive": "{alive_fraction:.0%}",
}
"""Of one layer beside the others: heading, and what `in_place` says below it."""


def in_place(rows: list[dict[str, Any]]) -> Table:
    """Each layer beside all others, an MLP a line."""
    said = [{"label": layer_label(row)} | of_layer for row in rows for of_layer in row["in_place"]]
    return _columns(IN_PLACE, said)


def written(rows: list[dict[str, Any]]) -> Table:
    """How the model goes on from each prompt: the original, and with all layers in place."""
    lines = []
    for i, of_prompt in enumerate(rows[0]["continuations"]):
        texts = {"original": of_prompt["original"]}
        texts |= {layer_label(row): row["continuations"][i]["replaced"] for row in rows}
        lines += [[of_prompt["prompt"], who, " ".join(t.split())] for who, t in texts.items()]
    return ["prompt", "all MLPs by", "goes on"], lines


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The numbers that decide, a layer a line, and their means over seeds, as Markdown."""
    parts = [decisive(rows), over_seeds(rows)]
    return "\n\n".join(markdown(*part) for part in parts if part)


def questions(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the columns of `decisive` ask, each with its name."""
    floor = max((row["ce_floor"] for row in rows), key=abs)
    head, _ = decisive(rows)
    return [(name, asks.format(ce_floor=floor)) for name, asks in QUESTIONS.items() if name in head]


def by_token(row: dict[str, Any]) -> list[Table]:
    """How error and gate's role go with a token's frequency and position, a bin a line."""
    names = {"frequency in a million": "by_frequency", "position": "by_position"}
    tables = []
    for name, key in names.items():
        head = [name, "tokens", "NMSE", "CE increase", "gate at its mean", "MLP removed"]
        lines = []
        for of_bin in row[key]:
            known = {name: value for name, value in of_bin.items() if value is not None}
            forms = ["{low:,} to {high:,}", "{tokens:,}", "{nmse:.3f}", "{ce_increase:+.4f}"]
            forms += ["{gate_at_mean:+.4f}", "{mlp_removed:+.4f}"]
            lines.append([_said(form, known) for form in forms])
        tables.append((head, lines))
    return tables


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
    names = [name for name in names if name not in ("by_frequency", "by_position", "sequences")]
    lines = [[name, *(_shown(row.get(name)) for row in rows)] for name in names]
    return ["", *map(layer_label, rows)], lines


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)
