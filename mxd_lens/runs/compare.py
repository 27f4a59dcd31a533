"""Layers of several architectures, sparsities and MLPs, trained and measured alike.

Of one MLP, the activations are kept on disk, and one layer after the other reads them; layers of
several are trained side by side while the language model reads the text. Several processes may be
at work on one comparison, on one machine or many: each takes runs that no other has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import SAE

from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.analysis.intervals import worth
from mxd_lens.analysis.joint import PROMPTS, continuations, evaluate_jointly
from mxd_lens.analysis.probing import labelled_activations, pool_layer, probe, summarise
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import Heldout, TextActivations, read_heldout
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, EachOnce, Name, PathStr, config
from mxd_lens.files import Busy, claim, locked
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks
from mxd_lens.runs.claims import SOURCES_FILENAME, check_sources, claim_folder
from mxd_lens.runs.config import (
    COMPARISON_FILENAME,
    WHERE,
    Layers,
    ManyConfig,
    OtherText,
    RunConfig,
    TrainConfig,
    field_names,
    finished_runs,
    values,
)
from mxd_lens.runs.results import (
    Comparison,
    Continuation,
    Joint,
    JointRow,
    Parts,
    ResultsFile,
    Row,
    load_layer,
    plain,
    read,
    write,
)
from mxd_lens.runs.train import check_layer, train_many

COMPARED = [
    "mxd",
    "mxd_meaningful",
    "mxd_paper",
    "molt",
    "topk_transcoder",
    "topk_skip_transcoder",
    "topk",
    "dense",
]
"""Architectures of a comparison, in the order of its tables."""

CONTROL = "dense"

_WAITING = "waiting for another process, which trains {}"


@config
class CompareConfig(ManyConfig):
    """Train several architectures at several k on the same text; draw the frontier.

    Example: mxd-lens compare --layers 6 --k 8 16 32 64 --expansion 16 --autocast true
    """

    model: PathStr = "demo:smollm2"
    layers: Layers = field(default_factory=lambda: ["6"])
    dataset: PathStr = "demo:wikipedia"
    output: PathStr = "runs/compare"
    training_tokens: Count = 1_228_800
    architectures: EachOnce[Name] = field(default_factory=lambda: list(COMPARED))
    k: EachOnce[Count] = field(default_factory=lambda: [8, 16, 32, 64])

    @property
    def kept_activations(self) -> str | None:
        if self.activations or len(self.layers) > 1 or self.layers == ["all"]:
            return self.activations
        return str(Path(self.output) / "activations")


def compare(
    cfg: ManyConfig,
    model: Any = None,
    dataset: Text | None = None,
    *,
    measured: Callable[[Path], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Train and measure every layer, or those that are missing. Raises as `train_many` does.

    What another process is at work on is left to it until there is nothing else to do; then this
    one waits, and takes over what was not finished.

    Args:
        measured: is called whenever ``results.json`` has been written anew.

    Returns:
        One plain `Row` per layer. ``results.json``, written anew as each layer is finished, has
        these and what else earlier comparisons have left in the folder.
    """
    folder, ranks = Path(cfg.output), Ranks.here()
    with _alone(folder, ranks):
        claim_comparison(cfg, write=False)
        _all_rows(folder)
    if cfg.layers == ["all"]:
        model = model or cfg.load_model()
    runs = cfg.runs(None if model is None else int(model.cfg.n_layers))
    asked: Parts = {"measurements": {}} | ({cfg.probe: {}} if cfg.probe else {})

    def file_of(run: TrainConfig) -> ResultsFile[Row]:
        return ResultsFile(Path(run.output) / "results.json", Row, asked)

    def write() -> None:
        with _alone(folder, ranks):
            measured(write_rows(folder, _all_rows(folder)))

    def taken(group: list[TrainConfig], waiting: str | None, locks: ExitStack) -> list[str]:
        """Folders of the runs that are missing and not another process's, for the others' too."""
        free = []
        for run in group if ranks.first else ():
            if file_of(run).missing and _locked(Path(run.output), waiting, locks):
                free += [run.output] if file_of(run).missing else []
        return ranks.agree(free)

    with _alone(folder, ranks):
        for run in runs:
            if file_of(run).value is not None:
                claim_folder(run)
    if ranks.agree(any(file_of(run).missing for run in runs)):
        dataset = cfg.load() if dataset is None else dataset
        model = model or cfg.load_model()
        sites = {layer: Site.at(model, layer) for layer in sorted({run.layer for run in runs})}
        for run in runs:
            check_layer(run, sites[run.layer])
        with _alone(folder, ranks):
            for run in runs:
                claim_folder(run, write=False)
            claim_comparison(cfg)
            check_sources([cfg], model, dataset)
        bench = Bench(cfg, sites, dataset)
        bench.read(runs[0].layer)
        groups = [[run] for run in runs] if cfg.kept_activations else [runs]
        for waiting, group in product((None, _WAITING), groups):
            with ExitStack() as locks:
                names = taken(group, waiting, locks)
                todo = [run for run in group if run.output in names]
                for run in todo:
                    print(f"\n[{runs.index(run) + 1}/{len(runs)}] {run}", flush=True)
                if todo:
                    train_many(todo, model, dataset)
                for run in todo[ranks.rank :: ranks.world]:
                    file_of(run).save(Row(**bench.row(run)), indent=2)
                    if ranks.world == 1:
                        write()
                ranks.wait()
    else:
        if dataset is None and Path(cfg.dataset).is_file():
            dataset = cfg.load()
        with _alone(folder, ranks):
            check_sources([cfg], model, dataset)
    write()  # a kill may have come before the last one
    ranks.wait()
    every = _all_rows(folder)
    return [plain(_with_worth(file_of(run).value, every)) for run in runs]


def _alone(folder: Path, ranks: Ranks) -> AbstractContextManager[Any]:
    """For a moment, the only process that reads and writes what a comparison shares."""
    if not ranks.first:
        return nullcontext()
    return locked(folder, f"waiting for another process in {folder}")


def _locked(folder: Path, waiting: str | None, locks: ExitStack) -> bool:
    """Take a run's folder; False if another process has it, and this one is not waiting."""
    try:
        locks.enter_context(locked(folder, waiting and waiting.format(folder)))
    except Busy:
        return False
    return True


class Bench:
    """What layers of a comparison are measured with: read once for all that stand in for an MLP."""

    heldout: Heldout
    activations: TextActivations | None
    labels: list[str]

    def __init__(self, cfg: ManyConfig, sites: Mapping[int, Site], dataset: Text):
        self.cfg: ManyConfig = cfg
        self.sites: Mapping[int, Site] = sites
        self.documents: Text = cfg.documents(dataset)[1]
        self.labelled: Dataset | None = load_labelled(cfg.probe) if cfg.probe else None
        self.layer: int | None = None

    def read(self, layer: int) -> None:
        """Have the language model read, for this MLP; ValueError if there is too little text."""
        if self.layer == layer:
            return
        cfg, site = self.cfg, self.sites[layer]
        self.heldout = read_heldout(
            site, self.documents, n_sequences=cfg.n_sequences, **cfg.reading_heldout
        )
        self.activations = None
        if self.labelled:
            read = labelled_activations(site, self.labelled, **cfg.reading_texts)
            self.activations, self.labels = read
        self.layer = layer

    def row(self, run: TrainConfig) -> dict[str, Any]:
        """A plain row: how the run's layer does."""
        self.read(run.layer)
        sae = load_layer(run.layer_path, run.device)
        row = measure(sae, run, self.heldout, f"{run.dataset} (held out)")
        if self.labelled and self.activations and layer_of(sae).has_experts:
            row |= probe_scores(sae, self.activations, self.labels)
        return row | ({"probe": self.cfg.probe} if self.cfg.probe else {})


def claim_comparison(cfg: ManyConfig, *, write: bool = True) -> None:
    """Write down what all layers of a comparison share, or compare it, as `claim_folder` does."""
    shared = (field_names(RunConfig) | {"n_sequences"}) - WHERE
    writes = (RUNNER_CFG_FILENAME, "activations", "results.json", "results.html", SOURCES_FILENAME)
    settings = values(cfg, sorted(shared))
    claim(Path(cfg.output), COMPARISON_FILENAME, settings, writes, write=write)


def measure(sae: SAE[Any], run: TrainConfig, heldout: Heldout, dataset: str) -> dict[str, Any]:
    """A plain row: what was trained and how it does on the held-out text."""
    row, _ = evaluate(heldout.site.model, sae, heldout)
    return {**row, **run.identity, "dataset": dataset}


def _all_rows(folder: Path) -> list[Row]:
    """The rows of all measured layers in a comparison's folder."""
    found = (read(path, Row) for path in folder.glob("*/results.json"))
    return [row for row in found if row is not None]


def _place(row: Row) -> tuple[Any, ...]:
    """Where a row stands in its table."""
    name = row.architecture
    order = COMPARED.index(name) if name in COMPARED else len(COMPARED)
    return order, name, row.k or 0, row.seed


def probe_scores(
    sae: SAE[Any], activations: TextActivations, labels: list[str]
) -> dict[str, float]:
    """F1 of probes on one, two and five features, means over classes and five splits."""
    features = pool_layer(sae, activations)
    splits = [probe(features, labels, n_features=(1, 2, 5), seed=seed) for seed in range(5)]
    means = summarise([row for rows in splits for row in rows])
    return {f"probe_f1_top{of_n['n_features']}": of_n["f1"] for of_n in means}


def measure_again(folder: Path, text: OtherText, n_sequences: int = 64) -> Path:
    """Measure the layers of a comparison on other text: ``results-<text>.json``, this path;
    ValueError if there are none, or no text is named."""
    runs = finished_runs(folder, one_mlp=False)
    if text.dataset is None:
        raise ValueError(f"say on which --dataset to measure the layers in {folder}")
    documents = text.load()
    cfg = runs[0]
    model = cfg.load_model()
    check_sources(runs, model)
    rows = []
    for layer, of_layer in groupby(sorted(runs, key=lambda run: run.layer), lambda run: run.layer):
        site = Site.at(model, layer)
        heldout = read_heldout(site, documents, n_sequences=n_sequences, **cfg.reading_heldout)
        for run in of_layer:
            sae = load_layer(run.layer_path, run.device)
            rows.append(Row(**measure(sae, run, heldout, text.dataset)))
    with locked(folder):
        return write_rows(folder, rows, results_stem(text.dataset))


def measure_together(
    folder: Path, text: OtherText, n_sequences: int = 64, *, each: bool = False
) -> Path:
    """Measure the layers of a comparison all in place at once, those of each architecture, k and
    seed, and if asked each of them beside the others: ``joint.json``, this path; ValueError if
    there are none, or none of several MLPs."""
    runs = finished_runs(folder, one_mlp=False)
    groups: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for run in runs:
        groups.setdefault((run.architecture, run.identity["k"], run.seed), []).append(run)
    groups = {who: of_group for who, of_group in groups.items() if len(of_group) > 1}
    if not groups:
        raise ValueError(
            f"{folder} holds no two layers of different MLPs and the same architecture, k and seed"
        )
    cfg = runs[0]
    own = cfg.load() if text.dataset is None else None
    documents = text.load() if own is None else cfg.documents(own)[1]
    model = cfg.load_model()
    check_sources(runs, model, own)
    site = Site.at(model, cfg.layer)
    options = {"n_sequences": n_sequences, "n_tokens": n_sequences * cfg.context_size}
    tokens = read_heldout(site, documents, **options, **cfg.reading_heldout).in_model
    original = continuations(model, {})
    controls = [run for run in runs if each and run.architecture == CONTROL]
    rows = []
    for (architecture, k, seed), of_group in groups.items():
        layers = {run.layer: load_layer(run.layer_path, run.device) for run in of_group}
        written = zip(PROMPTS, original, continuations(model, layers), strict=True)
        beside: dict[int, TrainConfig] = {}
        if architecture != CONTROL:
            of_seed = sorted(controls, key=lambda run: (run.seed != seed, run.seed), reverse=True)
            beside = {run.layer: run for run in of_seed}  # the first of the order come last
        rows.append(
            JointRow(
                architecture=architecture,
                k=k,
                seed=seed,
                model_name=cfg.model,
                dataset=text.dataset or f"{cfg.dataset} (held out)",
                **evaluate_jointly(
                    model,
                    layers,
                    tokens,
                    each=each,
                    controls={i: load_layer(c.layer_path, c.device) for i, c in beside.items()},
                ),
                continuations=[
                    Continuation(prompt=prompt, original=before, replaced=after)
                    for prompt, before, after in written
                ],
            )
        )
    path = folder / f"{results_stem(text.dataset).replace('results', 'joint', 1)}.json"
    with locked(folder):
        write(path, Joint(rows=rows), indent=2)
    return path


def results_stem(dataset: str | None) -> str:
    """Name of the file with what was measured on a text; None: on the run's own."""
    if dataset is None:
        return "results"
    path, suffix = Path(dataset), ""
    if path.exists():  # there may be many of one name
        suffix = "-" + hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]
    return "results-" + re.sub(r"[^\w.-]+", "-", path.stem if suffix else dataset) + suffix


def write_rows(folder: Path, rows: list[Row], stem: str = "results") -> Path:
    """The rows as JSON, this path, in the order of tables, each with what its experts are worth."""
    path = folder / f"{stem}.json"
    write(path, Comparison(rows=[_with_worth(row, rows) for row in sorted(rows, key=_place)]), 2)
    return path


def _with_worth(row: Row, rows: list[Row]) -> Row:
    """Against the dense control of the same MLP, and of the same seed if there is one."""
    controls = [
        control
        for control in rows
        if control.architecture == CONTROL and control.hook_layer == row.hook_layer
    ]
    if row.architecture == CONTROL or not controls:
        return row
    control = min(controls, key=lambda control: (control.seed != row.seed, control.seed))
    value, spread = worth([plain(row)], [plain(control)])
    return replace(row, worth=value, worth_interval=spread)
