"""The card of layers on the Hugging Face hub, from their settings and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mxd_lens.layers import answers, label
from mxd_lens.report import tables
from mxd_lens.runs.config import TrainConfig

TAGS = ["mxd-lens", "mixture-of-decoders", "transcoder", "saelens", "mechanistic-interpretability"]
"""By which layers are found, beside their architectures."""

NOT_MEASURED = {
    "worth": "it needs the dense control, `mxd-lens compare --architectures mxd dense`",
    "share": "no layer here has experts",
    "shuffled": "no layer here has experts",
    "agreement": "experts were not inspected, which `mxd-lens experts` does",
}
"""Why a column of `tables.QUESTIONS` is not there."""

CONTROL = (
    "The dense control is a layer of the MLP's hidden width without experts, trained alike: what "
    "is no better needs no experts."
)

_CARDS = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

_SETTINGS: dict[str, Callable[[TrainConfig], str]] = {
    "tokens": lambda run: f"{run.steps * run.batch_size:,}",
    "tokens per step": lambda run: f"{run.batch_size:,}",
    "tokens per sequence": lambda run: f"{run.context_size:,}",
    "split of the text": lambda run: run.dataset_split,
    "peak learning rate": lambda run: f"{run.peak_lr:g}",
    "parameters": lambda run: (
        "those that are asked for" if run.d_sae else f"a transcoder's of expansion {run.expansion}"
    ),
    "further options": lambda run: "none" if run.sae_options == "{}" else run.sae_options,
    "language model": lambda run: f"{run.model_class}, {run.dtype}",
    "autocast to bfloat16": lambda run: "yes" if run.autocast else "no",
    "seed": lambda run: f"{run.seed}",
}


@dataclass(frozen=True)
class Source:
    """A language model or a text: its name for a reader and to load it by, its page if others can
    have it, its licence in words."""

    name: str
    loaded_by: str
    url: str | None
    licence: str

    @property
    def link(self) -> str:
        return f"[{self.name}]({self.url})" if self.url else f"`{self.name}` (a local one)"


def make_card(
    repo: str,
    runs: Mapping[str, TrainConfig],
    rows: Sequence[dict[str, Any]],
    *,
    model: Source,
    text: Source,
    data: ModelCardData,
    widths: Mapping[str, int],
    joint: Sequence[dict[str, Any]] = (),
    pages: Mapping[str, str] | None = None,
    tuned: bool = False,
    quoted: bool = False,
) -> ModelCard:
    """The card of the layers of some runs, by id, all of one language model.

    What has not been measured is a sentence.

    Args:
        rows: results of runs, see `mxd_lens.report.page.measured_rows`; others' are left out.
        data: what the hub knows of the model and the text; gets the tags.
        widths: units of each layer.
        joint: rows of joint.json.
        pages: URLs of pages by name.
        tuned: whether layers were trained together at last.
        quoted: whether what is uploaded quotes the text.
    """
    of_run = {name: _who(run.layer, **run.identity) for name, run in runs.items()}
    found = {_who(row["hook_layer"], **row): row for row in rows}
    place = {who: i for i, who in enumerate(found)}
    of_run = dict(sorted(of_run.items(), key=lambda run: place.get(run[1], len(place))))
    runs = {name: runs[name] for name in of_run}
    measured = [found[who] for who in of_run.values() if who in found]
    architectures = list(dict.fromkeys(run.architecture for run in runs.values()))
    data.library_name = "saelens"
    data.tags = [*TAGS, *(name for name in architectures if name not in TAGS)]
    head, lines = tables.decisive(measured) if measured else ([], [])
    mlps = sorted({run.layer for run in runs.values()})
    every = f"MLP {mlps[0]}" if len(mlps) == 1 else f"MLPs {', '.join(map(str, mlps))}"
    content = _CARDS.get_template("card.md").render(
        card_data=data.to_yaml(),
        title=f"{', '.join(map(label, architectures))} for {every} of {model.name}",
        mlps=f"{every}, counted from 0," if len(mlps) > 1 else f"{every} (counted from 0)",
        units="experts" if any("mxd" in name for name in architectures) else "units",
        version=version("mxd-lens"),
        repo=repo,
        ids=list(runs),
        runs=list(runs.values()),
        model=model,
        text=text,
        layers=tables.markdown(*_layers(runs, widths)),
        numbers=tables.markdown(head, lines) if measured else "",
        measured_on=", ".join(dict.fromkeys(_measured_on(row) for row in measured)),
        questions=tables.questions(measured) if measured else [],
        missing=[(name, why) for name, why in NOT_MEASURED.items() if name not in head],
        unmeasured=[f"`{name}`" for name, who in of_run.items() if who not in found],
        control=CONTROL if "dense" in architectures else "There is no dense control here.",
        joint=tables.markdown(*tables.joint(list(joint))) if joint else "",
        pages=list((pages or {}).items()),
        tuned=", and at last together, by `mxd-lens finetune`" if tuned else "",
        quoted="; pages and `experts.json` quote it" if quoted else "",
        training=tables.markdown(*_training(list(runs.values()))),
    )
    return ModelCard(content)


def _who(layer: int, architecture: str, k: Any, seed: int, **_: Any) -> tuple[Any, ...]:
    return layer, architecture, k, seed


def _measured_on(row: dict[str, Any]) -> str:
    name = row["dataset"].removesuffix(" (held out)")
    name = Path(name).name if Path(name).is_absolute() else name
    return f"{name}, {row['ce_tokens']:,} tokens"


def _layers(runs: Mapping[str, TrainConfig], widths: Mapping[str, int]) -> tables.Table:
    """What there is, an id a line."""
    lines = []
    for name, run in runs.items():
        k = f"{run.k}" if run.identity["k"] is not None else tables.NONE
        kind = answers(run.architecture).label
        lines.append([f"`{name}`", f"{run.layer}", kind, f"{widths[name]:,}", k])
    return ["id", "MLP", "layer", "units", "k"], lines


def _training(runs: Sequence[TrainConfig]) -> tables.Table:
    """Settings, each with all its values, and whose they are where kinds of layers differ."""
    lines = []
    for what, of_run in _SETTINGS.items():
        whose: dict[str, dict[str, None]] = {}
        for run in runs:
            whose.setdefault(of_run(run), {})[label(run.architecture)] = None
        alike = len({frozenset(kinds) for kinds in whose.values()}) == 1
        said = [value if alike else f"{value} ({', '.join(whose[value])})" for value in whose]
        lines.append([what, ", ".join(said)])
    return ["setting", ""], lines
