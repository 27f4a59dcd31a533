"""Layers of several architectures and sparsities, trained and measured alike.

One pass of the language model is kept on disk and read by every run. (SAELens' MultiSAETrainer
would train all from one stream as well, but with one learning rate for all, and with nothing
finished before everything is.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import SAE

from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.analysis.probing import pool_layer, probe, summarise
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import Heldout, TextActivations, read_heldout, text_activations
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, EachOnce, Index, Name, PathStr, Seed, config
from mxd_lens.files import claim, locked
from mxd_lens.layers import layer_of
from mxd_lens.models.load import load_model
from mxd_lens.models.site import Site
from mxd_lens.runs.claims import SOURCES_FILENAME, check_sources, claim_folder
from mxd_lens.runs.config import (
    COMPARISON_FILENAME,
    Measuring,
    OtherText,
    RunConfig,
    TrainConfig,
    field_names,
    finished_runs,
    has_k,
    values,
)
from mxd_lens.runs.results import (
    Comparison,
    Parts,
    ResultsFile,
    Row,
    load_layer,
    plain,
    read,
    write,
)
from mxd_lens.runs.train import check_layer, fill_activations, train

COMPARED = ["mxd", "mxd_paper", "topk_transcoder", "topk_skip_transcoder", "topk", "dense"]
"""Architectures of a comparison, in the order of its tables."""

Key = tuple[str, int | None, int]
"""Architecture, k where it has one, and seed."""


@config
class CompareConfig(RunConfig, Measuring):
    """Train several architectures at several k on the same text; draw the frontier.

    Example: mxd-lens compare --layer 6 --k 8 16 32 64 --expansion 16 --autocast true
    """

    model: PathStr = "demo:smollm2"
    layer: Index = 6
    dataset: PathStr = "demo:wikipedia"
    output: PathStr = "runs/compare"
    training_tokens: Count = 1_228_800
    architectures: EachOnce[Name] = field(default_factory=lambda: list(COMPARED))
    """As `train --architecture`."""
    k: EachOnce[Count] = field(default_factory=lambda: [8, 16, 32, 64])
    """Active experts or units per token; an architecture without a k is trained once a seed."""
    seeds: EachOnce[Seed] = field(default_factory=lambda: [0])
    """Seeds of the weights and of the batches' order."""
    probe: PathStr | None = None
    """Labelled text to probe every layer on, demo:bbc for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs()  # each run's configuration checks itself

    def runs(self) -> dict[Key, TrainConfig]:
        """The training runs, in the order they go."""
        shared = values(self, field_names(RunConfig))
        shared["activations"] = str(Path(self.output) / "activations")
        runs: dict[Key, TrainConfig] = {}
        for seed, k, name in product(self.seeds, self.k, self.architectures):
            own: dict[str, Any] = {"k": k} if has_k(name) else {}
            key = name, own.get("k"), seed
            folder = "-".join([name, *(f"k{k}" for _ in own), f"seed{seed}"])
            own |= {"architecture": name, "output": str(Path(self.output) / folder)}
            if key not in runs:
                runs[key] = TrainConfig(**(shared | own), seed=seed)
        return runs


def compare(
    cfg: CompareConfig,
    model: Any = None,
    dataset: Text | None = None,
    *,
    measured: Callable[[Path], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Train and measure every layer, or those that are missing. Raises as `train` does.

    Args:
        measured: is called whenever ``results.json`` has been written anew.

    Returns:
        One plain `Row` per layer. ``results.json``, written anew as each layer is finished, has
        these and what else earlier comparisons have left in the folder.
    """
    folder = Path(cfg.output)
    with locked(folder):
        claim_comparison(cfg, write=False)
        runs = cfg.runs()
        asked: Parts = {"measurements": {}} | ({cfg.probe: {}} if cfg.probe else {})
        paths = {key: Path(run.output) / "results.json" for key, run in runs.items()}
        files = {key: ResultsFile(path, Row, asked) for key, path in paths.items()}
        for key, run in runs.items():
            if files[key].value is not None:
                claim_folder(run)
        _all_rows(folder)
        if not any(file.missing for file in files.values()):
            if dataset is None and Path(cfg.dataset).is_file():
                dataset = cfg.load()
            check_sources(cfg, model, dataset)
        else:
            dataset = cfg.load() if dataset is None else dataset
            documents = cfg.documents(dataset)[1]
            labelled = load_labelled(cfg.probe) if cfg.probe else None
            model = model or load_model(cfg.model, cfg.model_class, cfg.device)
            site = Site.at(model, cfg.layer)
            for run in runs.values():
                claim_folder(run, write=False)
                check_layer(run, site)
            claim_comparison(cfg)
            check_sources(cfg, model, dataset)
            heldout = read_heldout(
                site, documents, n_sequences=cfg.n_sequences, **cfg.reading_heldout
            )
            fill_activations(cfg, folder / "activations", {site.layer: site}, dataset)
            activations = None
            if labelled:
                activations = text_activations(site, labelled["text"], **cfg.reading_texts)
            for n, (key, run) in enumerate(runs.items(), 1):
                if not files[key].missing:
                    continue
                print(f"\n[{n}/{len(runs)}] {run}", flush=True)
                with locked(Path(run.output)):
                    sae = train(run, model, dataset)
                    row = measure(sae, run, heldout, f"{cfg.dataset} (held out)")
                    if labelled and activations and layer_of(sae).has_experts:
                        row |= probe_scores(sae, activations, labelled["label"])
                    row |= {"probe": cfg.probe} if cfg.probe else {}
                    files[key].save(Row(**row), indent=2)
                measured(write_rows(folder, _all_rows(folder)))
        measured(write_rows(folder, _all_rows(folder)))  # a kill may have come before the last one
        return [plain(file.value) for file in files.values()]


def claim_comparison(cfg: CompareConfig, *, write: bool = True) -> None:
    """Write down what all layers of a comparison share, or compare it, as `claim_folder` does."""
    shared = (field_names(RunConfig) | {"n_sequences"}) - {"output", "device"}
    writes = (RUNNER_CFG_FILENAME, "activations", "results.json", "results.html", SOURCES_FILENAME)
    settings = values(cfg, sorted(shared))
    claim(Path(cfg.output), COMPARISON_FILENAME, settings, writes, write=write)


def measure(sae: SAE[Any], run: TrainConfig, heldout: Heldout, dataset: str) -> dict[str, Any]:
    """A plain row: what was trained and how it does on the held-out text."""
    row, _ = evaluate(heldout.site.model, sae, heldout, autocast=run.autocast)
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
    runs = finished_runs(folder)
    if text.dataset is None:
        raise ValueError(f"say on which --dataset to measure the layers in {folder}")
    documents = text.load()
    cfg = runs[0]
    model = load_model(cfg.model, cfg.model_class, cfg.device)
    for run in runs:
        check_sources(run, model)
    site = Site.at(model, cfg.layer)
    heldout = read_heldout(site, documents, n_sequences=n_sequences, **cfg.reading_heldout)
    layers = ((run, load_layer(run.layer_path, run.device)) for run in runs)
    rows = [Row(**measure(sae, run, heldout, text.dataset)) for run, sae in layers]
    with locked(folder):
        return write_rows(folder, rows, results_stem(text.dataset))


def results_stem(dataset: str | None) -> str:
    """Name of the file with what was measured on a text; None: on the run's own."""
    if dataset is None:
        return "results"
    path, suffix = Path(dataset), ""
    if path.exists():  # there may be many of one name
        suffix = "-" + hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]
    return "results-" + re.sub(r"[^\w.-]+", "-", path.stem if suffix else dataset) + suffix


def write_rows(folder: Path, rows: list[Row], stem: str = "results") -> Path:
    """The rows as JSON, this path, in the order of tables."""
    path = folder / f"{stem}.json"
    write(path, Comparison(rows=sorted(rows, key=_place)), indent=2)
    return path
