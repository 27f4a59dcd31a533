"""Analyses of finished layers: probe, inspect and steer them, with the results next to the layer.

Each takes the folder of one run or of a comparison, and keeps what its files already hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field, fields
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.saes.sae import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file
from simple_parsing import field as argument
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.chat import ChatModel, LocalChat
from mxd_lens.analysis.embedding import embed
from mxd_lens.analysis.experts.corpus import (
    N_TOP,
    Corpus,
    Firings,
    read_corpus,
    read_firings,
)
from mxd_lens.analysis.experts.effects import short
from mxd_lens.analysis.experts.nearest import coactive, coactive_by_chance, mean_best
from mxd_lens.analysis.experts.report import inspect_experts
from mxd_lens.analysis.labels import (
    ChatDetector,
    ChatNamer,
    Detector,
    EmbeddingDetector,
    Namer,
    detection,
    heldout_contexts,
    marked,
)
from mxd_lens.analysis.probing import (
    SCORES,
    Features,
    labelled_activations,
    pool_layer,
    pool_neurons,
    probe,
    summarise,
)
from mxd_lens.analysis.steering import (
    PAPER,
    calibrate_strength,
    evaluate_steering,
    generate_steered,
    steering_directions,
)
from mxd_lens.data.labelled import DEMO_LABELLED, load_labelled
from mxd_lens.data.reading import read_heldout
from mxd_lens.data.text import Text, load_text, read
from mxd_lens.fields import Count, EachOnce, Finite, Index, Name, PathStr, Seed, config
from mxd_lens.files import check_same, locked
from mxd_lens.layers import answers, layer_of
from mxd_lens.models.load import load_model
from mxd_lens.models.site import Site
from mxd_lens.runs import results
from mxd_lens.runs.claims import check_sources
from mxd_lens.runs.config import (
    OtherText,
    Sampling,
    TextFormat,
    TrainConfig,
    field_names,
    finished_runs,
    values,
)
from mxd_lens.runs.fingerprint import text_fingerprint
from mxd_lens.runs.results import Parts, ResultsFile, load_layer, read_layer_file


@config
class AnalysisConfig:
    """What finished layers to analyse."""

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train`, or of `mxd-lens compare`: all of its layers."""
    k: Count | None = None
    """Only the layers with this many active units."""

    def runs(self) -> list[TrainConfig]:
        """The finished runs in question, see `finished_runs`; ValueError if there are none."""
        finished = finished_runs(Path(self.run))
        runs = [run for run in finished if self.k in (None, run.identity["k"])]
        if not runs:
            raise ValueError(f"{self.run} holds no finished layer with k={self.k}")
        return runs

    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        own = field_names(type(self)) - field_names(AnalysisConfig)
        return values(self, sorted(own))


@contextmanager
def _files(
    cfg: AnalysisConfig, name: str, kind: type[Any], asked: Callable[[TrainConfig], Parts]
) -> Iterator[list[tuple[TrainConfig, ResultsFile[Any]]]]:
    """The results file of every run whose layer has experts, while the runs' folders are locked."""
    runs = []
    for run in cfg.runs():
        layer = answers(run.architecture)
        if layer.has_experts:
            runs.append(run)
        else:
            print(f"{run.output} is left out: a {layer.label} has no experts", flush=True)
    if not runs:
        raise ValueError(f"{cfg.run} holds no layer with experts")
    with ExitStack() as folders:
        for run in runs:
            folders.enter_context(locked(Path(run.output)))
        yield [(run, ResultsFile(Path(run.output) / name, kind, asked(run))) for run in runs]


def _load_site(run: TrainConfig) -> Site:
    """The MLP of the run's language model, see `check_sources`."""
    model = run.load_model()
    check_sources([run], model)
    return Site.at(model, run.layer)


def _documents(run: TrainConfig) -> tuple[Text, Text]:
    """The run's (training, held-out) documents, see `check_sources`."""
    dataset = run.load()
    check_sources([run], dataset=dataset)
    return run.documents(dataset)


def _of_local(source: str | None, split: str) -> dict[str, str]:
    """What tells a local text from what it was, or will be, at another time."""
    if source is None or not Path(source).exists():
        return {}
    return {"text_fingerprint": text_fingerprint(read(source, split))}


@config
class ProbeConfig(AnalysisConfig, TextFormat):
    """Tell topics, languages or your own labels by one, two, five or all units of a layer.

    Example: mxd-lens probe runs/demo --data demo:bbc demo:languages
    """

    data: EachOnce[PathStr] = field(default_factory=lambda: list(DEMO_LABELLED))
    """Labelled text, or lists of labelled words: these, a hub data set (name or name:config), or a
    local file."""
    label_column: Name = "label"
    """Column of the data set that holds the class."""
    n_texts: Count = 1200
    """Texts, or words, of each; equally many of every class."""
    n_splits: Count = 5
    """Random halves to train and test on, seeded 0, 1, 2, ..."""


def run_probe(cfg: ProbeConfig) -> list[Path]:
    """Sparse probes of the layers, beside the MLP's own neurons and a majority guess.

    Returns:
        ``probe.json`` in each run's folder, a `Probes`. Data sets that it has are kept.

    Raises:
        ValueError: no such layers or labelled text, or probes there that were asked for otherwise.
    """
    how = cfg.settings()
    del how["data"]
    asked: Parts = {data: how | _of_local(data, cfg.dataset_split) for data in cfg.data}
    with _files(cfg, "probe.json", results.Probes, lambda run: asked) as files:
        missing = {data: [each for each in files if data in each[1].missing] for data in cfg.data}
        load = values(cfg, ("text_column", "label_column", "n_texts"))
        labelled = {
            data: load_labelled(data, split=cfg.dataset_split, **load)
            for data in cfg.data
            if missing[data]
        }
        site = None
        for data, texts in labelled.items():
            some = missing[data][0][0]
            site = site or _load_site(some)
            activations, labels = labelled_activations(site, texts, **some.reading_texts)
            probed = partial(_probed, labels=labels, n_splits=cfg.n_splits)
            print(f"\n{data}: the MLP's neurons", flush=True)
            neurons = pool_neurons(site, activations)
            baselines = probed((data, "majority", None, None), neurons, n_features=[0])
            baselines += probed((data, "neurons", None, None), neurons)
            about = results.ProbedData(asked=asked[data], classes=sorted(set(labels)))
            for run, file in missing[data]:
                print(f"\n{data}: {run}", flush=True)
                sae = load_layer(run.layer_path, run.device)
                features = pool_layer(sae, activations)
                who = data, run.architecture, run.identity["k"], run.seed
                rows = baselines + probed(who, features)
                before = file.value or results.Probes(datasets={}, rows=[], summary=[])
                file.save(
                    results.Probes(
                        datasets=before.datasets | {data: about},
                        rows=before.rows + [results.ProbeRow(**row) for row in rows],
                        summary=before.summary + _means(rows),
                    )
                )
        return [file.path for _, file in files]


def _probed(
    who: tuple[Any, ...],
    features: Features,
    labels: Sequence[str],
    n_splits: int,
    **n_features: Any,
) -> list[dict[str, Any]]:
    splits = [probe(features, labels, seed=i, **n_features) for i in range(n_splits)]
    return [dict(zip(_WHO, who, strict=True)) | row for rows in splits for row in rows]


_WHO = ("data", "architecture", "k", "run_seed")


def _means(rows: list[dict[str, Any]]) -> list[results.ProbeMeans]:
    """Means over classes and splits, for each layer."""
    return [
        results.ProbeMeans(**dict(zip(_WHO, who, strict=True)), **scores)
        for who, of_layer in groupby(rows, lambda row: tuple(row[name] for name in _WHO))
        for scores in summarise(list(of_layer))
    ]


def probe_table(paths: Sequence[Path]) -> str:
    """Mean scores of the probes, a data set and layer a line, as Markdown."""
    files = [results.read(path, results.Probes) for path in paths]
    means = [results.plain(row) for file in files if file is not None for row in file.summary]
    lines = [
        [
            *("" if row[name] is None else f"{row[name]}" for name in _WHO),
            "all" if row["n_features"] is None else f"{row['n_features']}",
            *(f"{row[score]:.3f}" for score in SCORES),
        ]
        for row in sorted(means, key=lambda row: row["data"])
    ]
    return _markdown(["data", "layer", "k", "seed", "features", *SCORES], lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table, each line once."""
    once = dict.fromkeys(map(tuple, [head, ["---"] * len(head), *lines]))
    return "\n".join(f"| {' | '.join(line)} |" for line in once)


@config
class ExpertsConfig(AnalysisConfig, OtherText, Sampling):
    """Describe every expert: where it fires, what it promotes, which others are like it.

    Example: mxd-lens experts runs/demo/layer6-mxd-k32-seed0 --n_tokens 100_000
    """

    n_tokens: Count = 100_000
    """Tokens to read."""
    effect_strength: Finite = 2.0
    """Strength, see `steer`, at which its effect on the next token is measured; 0: not."""
    sample_strength: Finite = 3.0
    """Strength at which each expert is steered for a sample; 0: no samples."""


def run_experts(cfg: ExpertsConfig) -> list[Path]:
    """Describe every live expert of the layers.

    Returns:
        ``experts.json`` in each run's folder, an `Experts`. What it has of contexts, effects on
        logits and samples is kept.

    Raises:
        ValueError: no such layers or text, or a file that was asked for otherwise.
    """
    contexts = cfg.settings() | _of_local(cfg.dataset, cfg.dataset_split)
    effects = {"effect_strength": contexts.pop("effect_strength")}
    sampled = ("sample_strength", "prompt", "temperature", "top_p", "sample_tokens")
    samples = {name: contexts.pop(name) for name in sampled}
    asked: Parts = {"contexts": contexts}
    asked |= {"effects": effects} if cfg.effect_strength else {}
    asked |= {"samples": samples} if cfg.sample_strength else {}
    with _files(cfg, "experts.json", results.Experts, lambda run: asked) as files:
        site = None
        for run, file in files:
            if not file.missing:
                continue
            print(f"\n{run}", flush=True)
            sae = load_layer(run.layer_path, run.device)
            site = site or _load_site(run)
            made = file.value.asked if file.value else {}
            written = {e.id: e.sample for e in file.value.experts} if file.value else {}
            x, y_norm = layer_sample(site.model, sae, run)
            directions = steering_directions(sae, range(sae.cfg.d_sae), x)
            effect = None
            if "effects" in asked:
                effect = cfg.effect_strength * y_norm * F.normalize(directions, dim=-1)
            if {"contexts", "effects"} & {*file.missing}:
                found = inspect_experts(
                    site.model,
                    sae,
                    _documents(run)[0] if cfg.dataset is None else cfg.load(),
                    n_tokens=cfg.n_tokens,
                    directions=effect,
                    **run.reading_texts,
                    embed=partial(embed, device=run.device),
                    seed=cfg.seed,
                )
                for expert in found["experts"]:
                    expert["sample"] = written.get(expert["id"])
                of_it = {part: asked[part] for part in asked if part != "samples"}
                found |= {"asked": made | of_it, "dataset": cfg.dataset or run.dataset}
                file.save(results.Experts(**found))
            if "samples" in file.missing and file.value is not None:
                experts = [e for e in file.value.experts if directions[e.id].norm() > 0]
                ids = [expert.id for expert in experts]
                of_ids = {"directions": directions[ids]}
                amounts = calibrate_strength(sae, ids, cfg.sample_strength, x, y_norm, **of_ids)
                texts = generate_steered(site.model, sae, ids, amounts, **of_ids, **cfg.sampling)
                for expert, (sample,) in zip(experts, texts, strict=True):
                    expert.sample = cfg.prompt + sample
                file.value.asked["samples"] = asked["samples"]
                file.save(file.value)
        return [file.path for _, file in files]


@config
class LabelsConfig(AnalysisConfig):
    """Name experts by a chat model, and score by other text how well their names tell them apart.

    Example: mxd-lens label runs/demo/layer6-mxd-k32-seed0
    """

    chat: PathStr | None = None
    """A chat model to run here, named as for train. By default OPENAI_MODEL, to which contexts are
    sent at OPENAI_BASE_URL; where that is not set none: names of experts.json are scored."""
    n_experts: Count = 24
    """Random experts to label; more are added to those that are there."""
    n_tokens: Count = 100_000
    """Tokens to read."""
    seed: Seed = 0
    """Seed of all that is random."""


_N_FITTED = 50  # experts on whose contexts a threshold is chosen


def run_label(cfg: LabelsConfig) -> list[Path]:
    """Label experts that have been described, see `mxd_lens.analysis.labels`.

    Names are made from their 10 top contexts, and scored on text that follows what they were
    described on. Without a chat model names stay, and all-MiniLM-L6-v2 is the judge.

    Returns:
        ``labels.json`` in each run's folder, a `Labels`. Experts that it has are kept, and so is
        each when it is finished.

    Raises:
        ValueError: no such layers, experts that were not described or not on this text, none with
            10 top contexts, nothing left of their text, a chat model that cannot be had, or a file
            made otherwise.
    """
    remote = ChatModel() if cfg.chat is None and os.environ.get("OPENAI_BASE_URL") else None
    name = remote.model if remote else cfg.chat
    how = cfg.settings() | {"chat": name}
    del how["n_experts"]
    described: dict[str, results.Experts] = {}

    def asked(run: TrainConfig) -> Parts:
        path, found = _described(run)
        described[run.output] = found
        ids = _in_random_order(found, cfg.seed)[: cfg.n_experts]
        if len(ids) < 2:
            raise ValueError(f"{path} has no two experts with {N_TOP} top contexts to name")
        return {"settings": how | _contexts_of(found)} | {expert: {} for expert in ids}

    with _files(cfg, "labels.json", results.Labels, asked) as files:
        site = chat = None
        for run, file in files:
            missing: list[Any] = [part for part in file.missing if part != "settings"]
            if not missing:
                continue
            print(f"\n{run}", flush=True)
            found = described[run.output]
            order = _in_random_order(found, cfg.seed)
            site = site or _load_site(run)
            n_tokens = found.n_tokens + cfg.n_tokens
            texts = _described_text(run, found)
            corpus = read_corpus(site, texts, n_tokens, run.context_size).after(found.n_tokens)
            firings = _firings(site.model, run, corpus)
            contexts = heldout_contexts(missing, firings, corpus, cfg.seed)
            if cfg.chat is not None:
                chat = chat or LocalChat(load_model(cfg.chat, device=run.device))
            namer, detector = _namer_and_detector(remote or chat, found, order, run.device)
            judge = f"{name}"
            if isinstance(detector, EmbeddingDetector):
                judge = f"all-MiniLM-L6-v2, cosine of at least {detector.threshold:.3f}"
            file.value = file.value or results.Labels(
                asked=how | _contexts_of(found),
                namer=name or "words of the contexts",
                judge=judge,
                n_tokens=len(corpus.ids),
                labels=[],
            )
            for expert in tqdm(missing, desc="Labelling", unit="expert"):
                place = order.index(expert)
                # The one before, so that experts that are added later change nothing.
                other = order[place - 1] if place else order[1]
                label, another = (_named(file, found, i, namer) for i in (expert, other))
                own, theirs = (
                    detection(detector, named.name, *contexts[expert]) for named in (label, another)
                )
                label.shuffled, label.n_contexts = other, len(contexts[expert][0])
                label.f1, label.accuracy = map(_short, own[:2])
                label.f1_shuffled, label.accuracy_shuffled = map(_short, theirs[:2])
                label.unanswered = own[2] + theirs[2]
                file.save(file.value)
        return [file.path for _, file in files]


def _described(run: TrainConfig) -> tuple[Path, results.Experts]:
    """A run's ``experts.json``, and what it says; ValueError if there is none."""
    path = Path(run.output) / "experts.json"
    found = results.read(path, results.Experts)
    if found is None:
        raise ValueError(f"there is no {path}: run `mxd-lens experts {run.output}` first")
    return path, found


def _contexts_of(found: results.Experts) -> dict[str, Any]:
    """What labels depend on beside their own settings."""
    return {"experts": found.asked.get("contexts", {})}


def _in_random_order(found: results.Experts, seed: int) -> list[int]:
    """Experts with enough contexts to be named by."""
    ids = [expert.id for expert in found.experts if len(_top(expert)) == N_TOP]
    return np.random.default_rng(seed).permutation(ids).astype(int).tolist()


def _top(expert: results.Expert) -> list[results.Context]:
    return [context for context in expert.contexts if context.quantile == 1]


def _described_text(run: TrainConfig, found: results.Experts) -> Text:
    """What the experts were described on; ValueError if that is another text now."""
    how = found.asked.get("contexts", {})
    if how.get("dataset") is None:
        return _documents(run)[0]
    source = how["dataset"], how["dataset_split"], how["text_column"], how["streaming"]
    check_same(Path(run.output) / "experts.json", how, _of_local(*source[:2]))
    return load_text(*source)


def _firings(model: Any, run: TrainConfig, corpus: Corpus) -> Firings:
    """When the experts of a run's layer fire."""
    sae = load_layer(run.layer_path, run.device)
    reading = values(run, ("lm_batch_size", "autocast"))
    return read_firings(Site.of(model, sae), sae, corpus, **reading)


def _namer_and_detector(
    chat: Callable[[str], str] | None, found: results.Experts, order: list[int], device: str
) -> tuple[Namer | None, Detector]:
    """A chat model in both roles, or no namer and the sentence embeddings, whose threshold is
    chosen on the contexts that some experts are named by."""
    if chat is not None:
        return ChatNamer(chat), ChatDetector(chat)
    some = {expert.id: expert for expert in found.experts if expert.name}
    some = [some[i] for i in order if i in some][:_N_FITTED]
    if len(some) < 2:
        raise ValueError("no two of these experts have a name to score: name them by a chat model")
    names = [expert.name for expert in some]
    shown = [_shown(expert, found, signs=("", "")) for expert in some]
    return None, EmbeddingDetector.fitted(names, shown, partial(embed, device=device))


def _shown(expert: results.Expert, found: results.Experts, **how: Any) -> list[str]:
    """What a namer is shown of an expert, see `marked`."""
    top = _top(expert)
    return [marked(found.texts[context.text], context.position, **how) for context in top]


def _named(
    file: ResultsFile[results.Labels], found: results.Experts, expert: int, namer: Namer | None
) -> results.Label:
    """The expert's label in the file, where it is put unless it is there."""
    labels: list[results.Label] = file.value.labels
    for label in labels:
        if label.id == expert:
            return label
    (described,) = (each for each in found.experts if each.id == expert)
    name = described.name if namer is None else namer(_shown(described, found))
    nothing = dict.fromkeys(("shuffled", "n_contexts", "f1", "accuracy"))
    nothing |= dict.fromkeys(("f1_shuffled", "accuracy_shuffled"))
    labels.append(results.Label(id=expert, name=name, unanswered=0, **nothing))
    file.save(file.value)
    return labels[-1]


def _short(score: float | None) -> float | None:
    return None if score is None else short(score)


@config
class ReportConfig(AnalysisConfig):
    """Put all that is known of a run on one page, with a browser of its experts.

    Example: mxd-lens report runs/demo/layer6-mxd-k32-seed0
    """

    beside: PathStr | None = None
    """Folder of another run: with each expert, those of its layer that fire on the same tokens."""


def run_beside(cfg: ReportConfig) -> list[Path]:
    """Find for each expert the ones of the layer ``cfg.beside`` that fire on the same tokens, see
    `coactive`, of the text that both layers were described on.

    The layers may be of any architectures with experts, and in place of any MLPs of the model.

    Returns:
        ``beside.json`` in each run's folder, a `Beside`; none if there is no ``cfg.beside``. Other
        layers that it has are kept.

    Raises:
        ValueError: no such layers, the layer itself, experts that were not described or not on the
            same text, or a file made on another text.
    """
    if cfg.beside is None:
        return []
    other, *more = finished_runs(Path(cfg.beside))
    if more:
        raise ValueError(f"beside={cfg.beside!r} holds several layers: name a folder in it")
    if not (kind := answers(other.architecture)).has_experts:
        raise ValueError(f"beside={cfg.beside!r} is a {kind.label} without experts: name another")
    their_path, theirs = _described(other)

    def from_here(run: TrainConfig) -> str:
        here, there = (Path(of.output).resolve() for of in (run, other))
        return Path(os.path.relpath(there, here)).as_posix()

    def asked(run: TrainConfig) -> Parts:
        path, found = _described(run)
        if from_here(run) == ".":
            raise ValueError(f"beside={cfg.beside!r} is one of the layers itself: name another")
        different = [name for name, value in theirs.text.items() if found.text[name] != value]
        if different:
            own, their = (
                ", ".join(f"{name}={of.text[name]!r}" for name in different)
                for of in (found, theirs)
            )
            raise ValueError(
                f"{path} says {own}, and {their_path} {their}: run `mxd-lens experts` on both "
                "with the same model, --dataset and --n_tokens"
            )
        return {from_here(run): theirs.text}

    with _files(cfg, "beside.json", results.Beside, asked) as files:
        missing = [(run, file) for run, file in files if file.missing]
        if missing:
            site = _load_site(other)
            check_sources([run for run, _ in missing], site.model)
            texts = _described_text(other, theirs)
            corpus = read_corpus(site, texts, theirs.n_tokens, other.context_size)
            others = _firings(site.model, other, corpus)
            for run, file in missing:
                print(f"\n{run}", flush=True)
                firings, n_tokens = _firings(site.model, run, corpus), len(corpus.ids)
                found = coactive(firings, n_tokens, others=others)
                by_chance = coactive_by_chance(firings, n_tokens, others)
                near = zip(firings.live.tolist(), found, strict=True)
                layer = results.OtherLayer(
                    run=from_here(run),
                    label=f"{other}",
                    text=theirs.text,
                    jaccard=short(mean_best(found)),
                    jaccard_by_chance=short(by_chance),
                    experts=[
                        results.Nearest(id=expert, nearest=[(i, short(score)) for i, score in of])
                        for expert, of in near
                    ],
                )
                before = file.value.layers if file.value else []
                file.save(results.Beside(layers=[*before, layer]))
        for run, file in files:  # the one asked for last is the last
            layers = sorted(file.value.layers, key=lambda layer: layer.run == from_here(run))
            if layers != file.value.layers:
                file.save(results.Beside(layers=layers))
        return [file.path for _, file in files]


_STRENGTHS = [0.5, 1.0, 2.0, 4.0]


@config
class SteerConfig(AnalysisConfig, Sampling):
    """Steer single experts while the model writes; score coherence and fluency.

    Example: mxd-lens steer runs/demo --n_experts 20 --strengths 0.5 1 2
    """

    experts: EachOnce[Index] | None = None
    """Units to steer; by default n_experts random ones that fire on over 1 in 100,000 tokens."""
    n_experts: Count = 20
    """How many, where none are named."""
    strengths: EachOnce[Finite] = field(default_factory=_STRENGTHS.copy)
    """Norms of the change at the MLP's output, in mean norms of that output."""
    n_samples: Annotated[int, Field(ge=2)] = 8
    """Samples of each unit at each strength."""
    edit: Literal["direction", "activation", "paper"] = "direction"
    """What is added for an MxD's expert: always what its activation tells of the MLP's output, or
    what raising its activation writes at each token. The same for other layers. paper: all as in
    arXiv 2505.21364, which sets prompt and sampling; strengths, 100 by default, are amounts."""

    def __post_init__(self) -> None:
        if self.edit != "paper":
            return
        theirs = {name: value for name, value in PAPER.items() if name != "paper"}
        theirs["sample_tokens"] = theirs.pop("n_tokens")
        defaults = {f.name: f.default for f in fields(type(self))}
        for name, value in theirs.items():
            asked = getattr(self, name)
            if asked not in (defaults[name], value):
                raise ValueError(f"edit=paper has {name}={value!r}, and this asks for {asked!r}")
            setattr(self, name, value)
        if self.strengths == _STRENGTHS:
            self.strengths = [100.0]


def run_steer(cfg: SteerConfig) -> list[Path]:
    """Steer units of the layers and judge what the model writes.

    Returns:
        ``steering.json`` in each run's folder, a `Steering`. Rows of earlier calls are kept.

    Raises:
        ValueError: no such layers or units, or a file made with other settings.
    """
    sampling: dict[str, Any] = cfg.sampling | {"n_samples": cfg.n_samples}

    def asked(run: TrainConfig) -> Parts:
        d_sae = read_layer_file(run.layer_path)["d_sae"]
        if cfg.experts and max(cfg.experts) >= d_sae:
            raise ValueError(f"experts={cfg.experts}: {run.output} has experts 0 to {d_sae - 1}")
        units = cfg.experts or random_units(run, cfg.n_experts, cfg.seed)
        if not units:
            raise ValueError(f"no unit of {run.output} fires often enough: name some experts")
        rows: Parts = {(unit, strength): {} for strength, unit in product(cfg.strengths, units)}
        return {"settings": sampling | {"edit": cfg.edit}} | rows

    with _files(cfg, "steering.json", results.Steering, asked) as files:
        site = None
        for run, file in files:
            missing: list[Any] = [part for part in file.missing if part != "settings"]
            if not missing:
                continue
            print(f"\n{run}", flush=True)
            sae = load_layer(run.layer_path, run.device)
            site = site or _load_site(run)
            paper = cfg.edit == "paper"
            x, y_norm = (None, None) if paper else layer_sample(site.model, sae, run)
            for strength, of_strength in groupby(missing, lambda part: part[1]):
                units = [unit for unit, _ in of_strength]
                directions = None
                if x is not None and cfg.edit == "direction":
                    directions = steering_directions(sae, units, x)
                before = file.value and results.plain(file.value)
                found = evaluate_steering(
                    site.model,
                    sae,
                    units,
                    [strength],
                    x,
                    y_norm,
                    directions=directions,
                    done=before and before | {"rows": []},
                    name=run.architecture,
                    paper=paper,
                    **sampling,
                )
                rows = [{"architecture": row.pop("name"), **row} for row in found["rows"]]
                found["rows"] = (before["rows"] if before else []) + rows
                file.save(results.Steering(**found))
        return [file.path for _, file in files]


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
    lines = []
    for path in paths:
        found = results.plain(results.read(path, results.Steering))
        name = found["rows"][0]["architecture"]
        strengths = sorted({row["strength"] for row in found["rows"]})
        groups = {s: [row for row in found["rows"] if row["strength"] == s] for s in strengths}
        for strength, rows in ({0.0: [found["unsteered"]]} | groups).items():
            scores = [median(row[score] for row in rows) for score in ("coherence", "perplexity")]
            n = f"{len(rows)}" if strength else ""
            lines.append([name, f"{strength:g}", n, f"{scores[0]:.3f}", f"{scores[1]:.1f}"])
    return _markdown(["layer", "strength", "units", "coherence", "perplexity"], lines)


def layer_sample(
    model: Any, sae: SAE[Any], run: TrainConfig
) -> tuple[Float[Tensor, "tokens d_in"], float]:
    """Inputs of a layer at held-out tokens, and the mean norm of the MLP's output there."""
    site, documents = Site.of(model, sae), _documents(run)[1]
    n_tokens = layer_of(sae).sample_size
    heldout = read_heldout(site, documents, n_tokens=n_tokens, **run.reading_heldout)
    x, y = (torch.cat([pair[hook] for pair in heldout.pairs]) for hook in site.hooks)
    return x, y.norm(dim=-1).mean().item()
