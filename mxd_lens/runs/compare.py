"""Layers of several architectures and sparsities, trained and measured alike.

One pass of the language model is kept on disk and read by every run. (SAELens' MultiSAETrainer
would train all from one stream as well, but with one learning rate for all, and with nothing
finished before everything is.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import SAE

from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.analysis.probing import SCORES, pool_layer, probe, summarise
from mxd_lens.data.labelled import load_labelled
from mxd_lens.data.reading import Heldout, TextActivations, read_heldout, text_activations
from mxd_lens.data.text import Text, load_text
from mxd_lens.fields import Count, EachOnce, Index, Name, PathStr, Positive, Seed, config
from mxd_lens.files import claim, locked, read_json, write_json
from mxd_lens.layers.matching import LABELS, label
from mxd_lens.models.load import load_model
from mxd_lens.models.site import mlp_hooks
from mxd_lens.runs.claims import SOURCES_FILENAME, check_sources, claim_folder
from mxd_lens.runs.config import (
    COMPARISON_FILENAME,
    RunConfig,
    TrainConfig,
    learning_rate,
    load_dataset,
    load_documents,
    read_config,
)
from mxd_lens.runs.results import ComparedRow, load_layer
from mxd_lens.runs.train import check_layer, fill_activations, train


@config
class CompareConfig(RunConfig):
    """Which layers to train and compare."""

    model: PathStr = "demo:smollm2"
    """Hugging Face name or local folder of the language model; demo:smollm2 needs no hub."""
    layer: Index = 6
    """Which MLP to replace, counted from 0."""
    dataset: PathStr = "demo:wikipedia"
    """Hub data set (name or name:config), local .txt/.jsonl/.parquet/.csv, or demo:wikipedia."""
    output: PathStr = "runs/compare"
    """Folder of the comparison. The same command again goes on where it stopped."""
    training_tokens: Count = 1_228_800
    """Tokens to train each layer on, the same ones for all."""
    architectures: EachOnce[Name] = field(default_factory=lambda: list(LABELS))
    """As `train --architecture`; mxd:paper is the paper's recipe."""
    k: EachOnce[Count] = field(default_factory=lambda: [8, 16, 32, 64])
    """Experts or units active per token."""
    seeds: EachOnce[Seed] = field(default_factory=lambda: [0])
    """Seeds of the weights and of the batches' order."""
    lr: Positive | None = None
    """Peak learning rate of all layers; by default each architecture's best in our search."""
    n_sequences: Count = 64
    """Sequences on which cross-entropies are taken."""
    probe: PathStr | None = None
    """Labelled text to probe every layer on, demo:bbc for one."""
    n_probe_texts: Count = 1200
    """Texts of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs()  # each run's configuration checks itself

    def runs(self) -> dict[tuple[str, int, int], TrainConfig]:
        """The training runs, by (architecture as named here, k, seed), in the order they go."""
        shared = {f.name: getattr(self, f.name) for f in fields(RunConfig)}
        names: dict[str, str] = {}
        runs = {}
        for seed in self.seeds:
            for k in self.k:
                for name in self.architectures:
                    architecture, colon, recipe = name.partition(":")
                    if colon and architecture != "mxd":
                        raise ValueError(f"architectures: {name!r}, but only an mxd has recipes")
                    known: dict[str, Any] = {"recipe": recipe} if colon else {}
                    run = TrainConfig(
                        **shared,
                        architecture=architecture,
                        **known,
                        k=k,
                        seed=seed,
                        lr=self.lr,
                        activations=str(Path(self.output) / "activations"),
                    )
                    if names.setdefault(run.name, name) != name:
                        raise ValueError(
                            f"architectures: {names[run.name]!r} and {name!r} are the same"
                        )
                    folder = f"{run.name.replace(':', '-')}-k{k}-seed{seed}"
                    run.output = str(Path(self.output) / folder)
                    runs[name, k, seed] = run
        return runs


def compare(
    cfg: CompareConfig,
    model: Any = None,
    dataset: Text | None = None,
    *,
    measured: Callable[[Path], None] = lambda results: None,
) -> list[dict]:
    """Train and measure every layer, or those that are missing.

    Args:
        measured: is called whenever ``results.json`` has been written anew.

    Returns:
        One row per layer, with `evaluate`'s keys and `name`, `seed`, `lr`, and probing scores
        where asked for. ``results.json``, written anew as each layer is finished, has
        these and what else earlier comparisons have left in the folder.

    Raises:
        ValueError, Interrupted: as `train`.
    """
    folder = Path(cfg.output)
    with locked(folder):
        claim_comparison(cfg, write=False)
        runs = cfg.runs()
        finished = {key: _finished_row(run, cfg) for key, run in runs.items()}
        all_rows(folder)
        if all(finished.values()):
            if dataset is None and Path(cfg.dataset).is_file():
                dataset = load_dataset(cfg)
            check_sources(cfg, model, dataset)
        else:
            dataset = load_dataset(cfg) if dataset is None else dataset
            documents = load_documents(cfg, dataset)[1]
            texts = load_labelled(cfg.probe, n_texts=cfg.n_probe_texts) if cfg.probe else None
            model = model or load_model(cfg.model, cfg.model_class, cfg.device)
            for run in runs.values():
                claim_folder(run, write=False)
                check_layer(run, model)
            claim_comparison(cfg)
            check_sources(cfg, model, dataset)
            heldout = _heldout(cfg, model, documents, cfg.n_sequences)
            fill_activations(cfg, folder / "activations", model, dataset)
            labelled = None
            if texts is not None:
                labelled = mlp_activations(cfg, model, texts["text"]), texts["label"]
            for n, (key, run) in enumerate(runs.items(), 1):
                if finished[key]:
                    continue
                print(
                    f"\n[{n}/{len(runs)}] {label(key[0])}, k = {key[1]}, seed {key[2]}",
                    flush=True,
                )
                with locked(Path(run.output)):
                    sae = train(run, model, dataset)
                    row = measure(model, sae, run, heldout)
                    row |= {"dataset": f"{cfg.dataset} (held out)"}
                    if labelled is not None:
                        row |= {"probe": cfg.probe, "n_probe_texts": cfg.n_probe_texts}
                        row |= probe_scores(sae, *labelled)
                    write_json(_results(run), row)
                finished[key] = row
                measured(write_results(folder, all_rows(folder)))
        measured(
            write_results(folder, all_rows(folder))
        )  # a kill may have come before the last one
        return [row for row in finished.values() if row]


def claim_comparison(cfg: CompareConfig, *, write: bool = True) -> None:
    """Write down what all layers of a comparison share, or compare it with what is there.

    Args:
        write: False: only compare.

    Raises:
        ValueError: it is another, or the folder holds something else.
    """
    shared = [f.name for f in fields(RunConfig)] + ["n_sequences"]
    elsewhere = ("output", "device", "n_checkpoints")
    settings = {name: getattr(cfg, name) for name in shared if name not in elsewhere}
    writes = (RUNNER_CFG_FILENAME, "activations", "results.json", "results.html", SOURCES_FILENAME)
    claim(Path(cfg.output), COMPARISON_FILENAME, settings, writes, write=write)


def measure(model: Any, sae: SAE[Any], run: TrainConfig, heldout: Heldout) -> dict[str, Any]:
    """One row: what was trained and how it does on the held-out text."""
    row, _ = evaluate(model, sae, heldout, autocast=run.autocast)
    return {**identity(run), **row}


def identity(run: TrainConfig) -> dict[str, Any]:
    """What tells a run from the others of a comparison, beside its layer's own settings."""
    return {"name": run.name, "seed": run.seed, "lr": learning_rate(run)}


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all measured layers in a comparison's folder."""
    names = list(LABELS)

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        known = row["name"] in names
        return (
            names.index(row["name"]) if known else len(names),
            row["name"],
            row["k"] or 0,
            row["seed"],
        )

    rows = (read_json(path, ComparedRow) for path in folder.glob("*/results.json"))
    return sorted(rows, key=place)


def _results(run: TrainConfig) -> Path:
    return Path(run.output) / "results.json"


def _finished_row(run: TrainConfig, cfg: CompareConfig) -> dict[str, Any] | None:
    row = read_json(_results(run), ComparedRow)
    if row is None:
        return None
    claim_folder(run)
    probed = (row.get("probe"), row.get("n_probe_texts")) == (cfg.probe, cfg.n_probe_texts)
    return row if cfg.probe is None or probed else None


def _heldout(cfg: RunConfig, model: Any, documents: Text, n_sequences: int) -> Heldout:
    return read_heldout(
        model,
        mlp_hooks(model, cfg.layer),
        documents,
        context_size=cfg.context_size,
        device=cfg.device,
        n_sequences=n_sequences,
        autocast=cfg.autocast,
    )


def mlp_activations(cfg: RunConfig, model: Any, texts: list[str]) -> TextActivations:
    """Input and output of the run's MLP on some texts, read as the run reads its own."""
    return text_activations(
        model,
        texts,
        mlp_hooks(model, cfg.layer),
        context_size=cfg.context_size,
        lm_batch_size=cfg.lm_batch_size,
        autocast=cfg.autocast,
    )


def probe_scores(
    sae: SAE[Any], activations: TextActivations, labels: list[str]
) -> dict[str, float]:
    """Scores of probes on one, two and five features, means over classes and five splits."""
    features = pool_layer(sae, activations)
    splits = [probe(features, labels, n_features=(1, 2, 5), seed=seed) for seed in range(5)]
    return {
        f"probe_{score}_top{scores['n_features']}": scores[score]
        for scores in summarise([row for rows in splits for row in rows])
        for score in SCORES
    }


def measure_again(
    folder: Path, dataset: str | None, text_column: str = "text", n_sequences: int = 64
) -> Path:
    """Measure the layers of a comparison on other text: ``results-<text>.json``, this path.

    Raises:
        ValueError: there are none, no text is named, or it cannot be loaded.
    """
    runs = finished_runs(folder)
    if dataset is None:
        raise ValueError(f"say on which --dataset to measure the layers in {folder}")
    check_one_place(folder, runs)
    cfg = runs[0]
    text = load_text(dataset, text_column=text_column)
    model = load_model(cfg.model, cfg.model_class, cfg.device)
    for run in runs:
        check_sources(run, model)
    heldout = _heldout(cfg, model, text, n_sequences)
    rows = []
    for run in runs:
        sae = load_layer(run.layer_path, run.device)
        rows.append(measure(model, sae, run, heldout) | {"dataset": dataset})
    with locked(folder):
        return write_results(folder, rows, results_stem(dataset))


def results_stem(dataset: str | None) -> str:
    """Name of the file with what was measured on a text; None: on the run's own."""
    if dataset is None:
        return "results"
    path, suffix = Path(dataset), ""
    if path.exists():  # there may be many of one name
        suffix = "-" + hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]
    return "results-" + re.sub(r"[^\w.-]+", "-", path.stem if suffix else dataset) + suffix


def finished_runs(folder: Path) -> list[TrainConfig]:
    """The run in this folder, or the finished ones of the comparison in it.

    Raises:
        ValueError: it holds neither, its run is not finished, or a file there is none of ours.
    """
    alone = folder / RUNNER_CFG_FILENAME
    paths = [alone] if alone.exists() else sorted(folder.glob(f"*/{RUNNER_CFG_FILENAME}"))
    runs = [read_config(path.parent) for path in paths]
    finished = [run for run in runs if run.finished]
    if runs and not finished:
        raise ValueError(f"what is in {folder} is not finished: run its command again")
    if not finished:
        raise ValueError(f"{folder} holds neither a finished run nor a comparison")
    return finished


def check_one_place(folder: Path, runs: list[TrainConfig]) -> None:
    """Refuse runs of more than one MLP, or that read it differently.

    Raises:
        ValueError: they are.
    """
    if len({(r.model, r.model_class, r.layer, r.context_size, r.autocast) for r in runs}) > 1:
        raise ValueError(
            f"{folder} holds layers of several models, at several places, or that differ in "
            "context_size or autocast: name one of the folders in it"
        )


def write_results(folder: Path, rows: list[dict[str, Any]], stem: str = "results") -> Path:
    """The rows as JSON."""
    path = folder / f"{stem}.json"
    write_json(path, rows)
    return path
