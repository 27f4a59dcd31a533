"""Analyses of finished layers: probe, inspect and steer them, with the results next to the layer.

Each takes the folder of one run or of a comparison, and keeps what its files already hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, field
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file
from simple_parsing import field as argument
from torch import Tensor

from mxd_lens.analysis.embedding import embed
from mxd_lens.analysis.experts.report import inspect_experts
from mxd_lens.analysis.probing import SCORES, Features, pool_layer, pool_neurons, probe, summarise
from mxd_lens.analysis.steering import (
    contributions,
    effect_amounts,
    evaluate_steering,
    generate_steered,
)
from mxd_lens.data.labelled import DEMO_LABELLED, load_labelled
from mxd_lens.data.reading import read_heldout
from mxd_lens.data.text import Text, load_text, read
from mxd_lens.fields import Count, EachOnce, Finite, Index, Name, NotNegative, PathStr, Seed, config
from mxd_lens.files import check_same, locked, read_json, write_json
from mxd_lens.models.load import load_model
from mxd_lens.models.site import hooks_of, mlp_hooks
from mxd_lens.runs.claims import check_sources
from mxd_lens.runs.compare import check_one_place, finished_runs, mlp_activations
from mxd_lens.runs.config import TrainConfig, load_dataset, load_documents
from mxd_lens.runs.fingerprint import text_fingerprint
from mxd_lens.runs.results import ExpertsFile, LayerFile, ProbeFile, SteeringFile, load_layer


@config
class AnalysisConfig:
    """Which layers to analyse."""

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train`, or of `mxd-lens compare`: all of its layers."""
    k: Count | None = None
    """Only the layers with this many active units."""

    def runs(self) -> list[TrainConfig]:
        """The finished runs in question.

        Raises:
            ValueError: there are none, or they are of more than one MLP or read it differently.
        """
        runs = finished_runs(Path(self.run))
        check_one_place(Path(self.run), runs)
        runs = [run for run in runs if self.k in (None, _layer_file(run).get("k"))]
        if not runs:
            raise ValueError(f"{self.run} holds no finished layer with k={self.k}")
        return runs


def _layer_file(run: TrainConfig) -> LayerFile:
    """A layer's own configuration."""
    path = run.layer_path / SAE_CFG_FILENAME
    layer_file = read_json(path, LayerFile)
    if layer_file is None:
        raise ValueError(f"there is no {path}: delete that folder and train the layer again")
    return layer_file


def _alone(analysis: Callable[[Any], list[Path]]) -> Callable[[Any], list[Path]]:
    """The analysis, as the only process in the folders of its runs, see `locked`."""

    @wraps(analysis)
    def alone(cfg: AnalysisConfig) -> list[Path]:
        with ExitStack() as folders:
            for run in cfg.runs():
                folders.enter_context(locked(Path(run.output)))
            return analysis(cfg)

    return alone


def _load_model(run: TrainConfig) -> Any:
    """The run's language model, see `check_sources`."""
    model = load_model(run.model, run.model_class, run.device)
    check_sources(run, model)
    return model


def _documents(run: TrainConfig) -> tuple[Text, Text]:
    """The run's (training, held-out) documents, see `check_sources`."""
    dataset = load_dataset(run)
    check_sources(run, dataset=dataset)
    return load_documents(run, dataset)


def _of_file(source: str | None) -> dict[str, str]:
    """What tells the text in a local file from what it was, or will be, at another time."""
    if source is None or not Path(source).is_file():
        return {}
    return {"text_fingerprint": text_fingerprint(read(source))}


@config
class ProbeConfig(AnalysisConfig):
    """Which layers to probe, and for what."""

    data: EachOnce[PathStr] = field(default_factory=lambda: list(DEMO_LABELLED))
    """Labelled text: these, a hub data set (name or name:config), or a local file."""
    n_texts: Count = 1200
    """Texts of each, equally many of every class."""
    n_splits: Count = 5
    """Random halves to train and test on, seeded 0, 1, 2, ..."""
    dataset_split: Name = "train"
    """Split of a hub data set."""
    text_column: Name = "text"
    """Column that holds the text."""
    label_column: Name = "label"
    """Column that holds the class."""


@_alone
def run_probe(cfg: ProbeConfig) -> list[Path]:
    """Sparse probes of the layers, beside the MLP's own neurons and a majority guess.

    Returns:
        ``probe.json`` in each run's folder: ``datasets``, by name; ``rows``, as `probe` gives
        them, and ``summary``, their means over classes and splits, both with ``data``, ``name``,
        ``k`` and ``run_seed``. Data sets that are there already are kept.

    Raises:
        ValueError: no such layers or labelled text, or probes there that were asked for otherwise.
    """
    asked = {name: value for name, value in asdict(cfg).items() if name not in ("run", "k", "data")}
    runs = {Path(run.output) / "probe.json": run for run in cfg.runs()}
    nothing = {"datasets": {}, "rows": []}
    reports = {path: read_json(path, ProbeFile) or deepcopy(nothing) for path in runs}
    for path, report in reports.items():
        for data in report["datasets"].keys() & set(cfg.data):
            made = report["datasets"][data]["asked"]
            check_same(f"{data} in {path}", made, asked | _of_file(data))
    lacking = {
        data: [path for path in runs if data not in reports[path]["datasets"]] for data in cfg.data
    }
    labelled = {
        data: load_labelled(
            data,
            split=cfg.dataset_split,
            text_column=cfg.text_column,
            label_column=cfg.label_column,
            n_texts=cfg.n_texts,
        )
        for data, missing in lacking.items()
        if missing
    }
    model = None
    for data, texts in labelled.items():
        missing = lacking[data]
        some = runs[missing[0]]
        model = model or _load_model(some)
        activations = mlp_activations(some, model, texts["text"])
        probed = partial(_probed, labels=texts["label"], n_splits=cfg.n_splits)
        print(f"\n{data}: the MLP's neurons", flush=True)
        neurons = pool_neurons(model, some.layer, activations, mlp_hooks(model, some.layer)[0])
        nobody = {"data": data, "name": "majority", "k": None, "run_seed": None}
        baselines = probed(nobody, neurons, n_features=[0])
        baselines += probed(nobody | {"name": "neurons"}, neurons)
        for path in missing:
            run, report = runs[path], reports[path]
            print(f"\n{data}: {run.name}, k = {run.k}, seed {run.seed}", flush=True)
            sae = load_layer(run.layer_path, run.device)
            k = _layer_file(run).get("k")
            who = {"data": data, "name": run.name, "k": k, "run_seed": run.seed}
            report["rows"] += baselines + probed(who, pool_layer(sae, activations))
            report["summary"] = _summary(report["rows"])
            report["datasets"][data] = {
                "asked": asked | _of_file(data),
                "classes": sorted(set(texts["label"])),
            }
            write_json(path, report, indent=None)
    return list(runs)


def _probed(
    who: dict[str, Any],
    features: Features,
    labels: Sequence[str],
    n_splits: int,
    n_features: Sequence[int | None] = (1, 2, 5, None),
) -> list[dict[str, Any]]:
    splits = [probe(features, labels, n_features=n_features, seed=i) for i in range(n_splits)]
    return [who | row for rows in splits for row in rows]


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over classes and splits, for each data set and layer."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _WHO), []).append(row)
    return [
        dict(zip(_WHO, group, strict=True)) | scores
        for group, of_group in groups.items()
        for scores in summarise(of_group)
    ]


_WHO = ("data", "name", "k", "run_seed")


def probe_table(paths: Sequence[Path]) -> str:
    """Mean scores of the probes, a data set and layer a line, as Markdown."""
    lines = [["data", "layer", "k", "seed", "features", *SCORES]]
    lines.append(["---"] * len(lines[0]))
    summaries = [row for path in paths for row in read_json(path, ProbeFile)["summary"]]
    for row in sorted(summaries, key=lambda row: row["data"]):
        n = "all" if row["n_features"] is None else row["n_features"]
        who = ["" if row[name] is None else f"{row[name]}" for name in _WHO]
        line = [*who, f"{n}", *(f"{row[score]:.3f}" for score in SCORES)]
        if line not in lines:  # every file has the baselines
            lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@config
class ExpertsConfig(AnalysisConfig):
    """Which layers to look into, and on what text."""

    dataset: PathStr | None = None
    """Text to read, named as for train; by default what the layer was trained on."""
    text_column: Name = "text"
    """Column of that text."""
    n_tokens: Count = 100_000
    """Tokens to read."""
    effect_strength: Finite = 2.0
    """Strength, see `steer`, at which its effect on the next token is measured; 0: not."""
    sample_strength: Finite = 3.0
    """Strength at which each expert is steered for a sample; 0: no samples."""
    sample_tokens: Count = 20
    """Tokens of a sample."""
    prompt: str = "I think that"
    """What the samples continue."""


@_alone
def run_experts(cfg: ExpertsConfig) -> list[Path]:
    """Describe every live expert of the layers: ``experts.json`` in each run's folder.

    Returns:
        These files. They hold what `inspect_experts` returns, ``dataset``, and how it was
        ``asked`` for; a file that was asked for in the same way is not made again.

    Raises:
        ValueError: no such layers or text, or a file that was asked for otherwise.
    """
    asked = {name: value for name, value in asdict(cfg).items() if name not in ("run", "k")}
    asked |= _of_file(cfg.dataset)
    paths = {}
    for run in cfg.runs():
        path = paths[run.output] = Path(run.output) / "experts.json"
        if path.exists():
            check_same(path, read_json(path, ExpertsFile).get("asked", {}), asked)
    model = None
    for run in cfg.runs():
        path = paths[run.output]
        found = read_json(path, ExpertsFile)
        sampled = not cfg.sample_strength or (
            found and any(expert["sample"] is not None for expert in found["experts"])
        )
        if found and sampled:
            continue
        print(f"\n{run.name}, k = {run.k}, seed {run.seed}", flush=True)
        sae = load_layer(run.layer_path, run.device)
        model = model or _load_model(run)
        x, y_norm = layer_sample(model, sae, run)
        write = contributions(sae, range(sae.cfg.d_sae), x)
        if not found:
            if cfg.dataset is None:
                texts = _documents(run)[0]
            else:
                texts = load_text(cfg.dataset, text_column=cfg.text_column)
            effect = cfg.effect_strength * y_norm * F.normalize(write, dim=-1)
            found = inspect_experts(
                model,
                sae,
                texts,
                n_tokens=cfg.n_tokens,
                context_size=run.context_size,
                lm_batch_size=run.lm_batch_size,
                write=effect if cfg.effect_strength else None,
                autocast=run.autocast,
                embed=partial(embed, device=run.device),
            )
            found |= {"asked": asked, "dataset": cfg.dataset or run.dataset}
            write_json(path, found, indent=None)
        if not sampled:
            experts = [e for e in found["experts"] if write[e["id"]].norm() > 0]
            ids = [expert["id"] for expert in experts]
            samples = generate_steered(
                model,
                sae,
                ids,
                effect_amounts(sae, ids, cfg.sample_strength, x, y_norm, write=write[ids]),
                write=write[ids],
                prompt=cfg.prompt,
                n_tokens=cfg.sample_tokens,
            )
            for expert, (sample,) in zip(experts, samples, strict=True):
                expert["sample"] = cfg.prompt + sample
            write_json(path, found, indent=None)
    return list(paths.values())


@config
class SteerConfig(AnalysisConfig):
    """Which layers to steer, and how."""

    experts: EachOnce[Index] | None = None
    """Units to steer; by default n_experts random ones that fire on over 1 in 100,000 tokens."""
    n_experts: Count = 20
    """How many, where none are named."""
    strengths: EachOnce[Finite] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    """Norms of the change at the MLP's output, in mean norms of that output."""
    n_samples: Annotated[int, Field(ge=2)] = 8
    """Samples of each unit at each strength."""
    n_tokens: Count = 24
    """Tokens of a sample."""
    temperature: NotNegative = 1.0
    """Temperature of sampling."""
    prompt: str = "I think that"
    """What the samples continue."""
    seed: Seed = 0
    """Seed of the choice of units and of the samples."""
    edit: Literal["contribution", "coefficient"] = "contribution"
    """What an MxD's expert writes: always what it does where its gate is largest, or what raising
    its coefficient does at each token. The same for other layers."""


@_alone
def run_steer(cfg: SteerConfig) -> list[Path]:
    """Steer units of the layers and judge what the model writes: ``steering.json`` in each run.

    Returns:
        These files, as `evaluate_steering` describes them. Rows of earlier calls are kept.

    Raises:
        ValueError: no such layers or units, or a file made with other settings.
    """
    settings = ("edit", "prompt", "n_samples", "n_tokens", "temperature", "seed")
    asked = {name: getattr(cfg, name) for name in settings}
    for run in cfg.runs():
        path = Path(run.output) / "steering.json"
        if found := read_json(path, SteeringFile):
            check_same(path, found, asked)
        d_sae = _layer_file(run)["d_sae"]
        if cfg.experts and max(cfg.experts) >= d_sae:
            raise ValueError(f"experts={cfg.experts}: {run.output} has experts 0 to {d_sae - 1}")
    model, paths = None, []
    for run in cfg.runs():
        print(f"\n{run.name}, k = {run.k}, seed {run.seed}", flush=True)
        path = Path(run.output) / "steering.json"
        sae = load_layer(run.layer_path, run.device)
        units = cfg.experts or random_units(run, cfg.n_experts, cfg.seed)
        if not units:
            raise ValueError(f"no unit of {path.parent} fires often enough: name some experts")
        model = model or _load_model(run)
        x, y_norm = layer_sample(model, sae, run)
        evaluate_steering(
            model,
            sae,
            units,
            cfg.strengths,
            x,
            y_norm,
            write=contributions(sae, units, x) if cfg.edit == "contribution" else None,
            name=run.name,
            prompt=cfg.prompt,
            n_samples=cfg.n_samples,
            n_tokens=cfg.n_tokens,
            temperature=cfg.temperature,
            seed=cfg.seed,
            done=read_json(path, SteeringFile),
            save=partial(write_json, path, indent=None),
        )
        paths.append(path)
    return paths


def random_units(run: TrainConfig, n: int, seed: int = 0) -> list[int]:
    """Some units that fired on over 1 in 100,000 tokens when SAELens last counted in training."""
    path = run.layer_path / SPARSITY_FILENAME
    try:
        log_density = load_file(path)["sparsity"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} does not say how often units fire ({error}): restore it, or name some experts"
        ) from error
    live = (log_density > -5).nonzero().flatten()
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
    return live[order[:n]].tolist()


def steering_table(paths: Sequence[Path]) -> str:
    """Median scores over the units, a layer and strength a line, as Markdown."""
    lines = [["layer", "strength", "units", "coherence", "perplexity"]]
    lines.append(["---"] * len(lines[0]))
    for path in paths:
        report = read_json(path, SteeringFile)
        name = report["rows"][0]["name"]
        for strength in sorted({0.0, *(row["strength"] for row in report["rows"])}):
            rows = [row for row in report["rows"] if row["strength"] == strength]
            rows = rows or [report["unsteered"]]
            scores = [median(row[score] for row in rows) for score in ("coherence", "perplexity")]
            n = len(rows) if strength else ""
            lines.append([name, f"{strength:g}", f"{n}", f"{scores[0]:.3f}", f"{scores[1]:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_sample(
    model: Any, sae: SAE[Any], run: TrainConfig
) -> tuple[Float[Tensor, "tokens d_in"], float]:
    """Inputs of a layer at held-out tokens, and the mean norm of the MLP's output there."""
    hook_in, hook_out = hooks_of(sae)
    heldout = read_heldout(
        model,
        mlp_hooks(model, run.layer),
        _documents(run)[1],
        context_size=run.context_size,
        device=run.device,
        n_tokens=16_384,
        autocast=run.autocast,
    )
    x, y = (torch.cat([pair[hook] for pair in heldout.pairs]) for hook in (hook_in, hook_out))
    return x, y.norm(dim=-1).mean().item()
