"""Configurations: of a training run, and the parts that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import AfterValidator, BeforeValidator
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from simple_parsing import field as argument

from mxd_lens.data.text import Text, load_text, split_documents
from mxd_lens.fields import (
    ContextSize,
    Count,
    Device,
    EachOnce,
    Flag,
    Index,
    Name,
    NotNegative,
    PathStr,
    Positive,
    Probability,
    Seed,
    check,
    config,
)
from mxd_lens.files import read_json
from mxd_lens.layers import answers, config_class
from mxd_lens.layers.base import check_k
from mxd_lens.models.load import ModelClass, ModelDtype, load_model

WHERE = {"output", "device", "llm_device"}
"""Fields that say where a run is and works, which decides nothing else."""

_HAS_BFLOAT16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()

COMPARISON_FILENAME = "comparison.json"
"""Settings that all runs of a comparison share; marks its folder."""


@config
class TextFormat:
    """How text is found in a data set."""

    dataset_split: Name = "train"
    """Split of a hub data set."""
    text_column: Name = "text"
    """Column of the data set that holds the text, or its tokens."""


@config
class TextSource(TextFormat):
    """Where text comes from."""

    dataset: PathStr
    """Hub data set (name or name:config), local .txt/.jsonl/.parquet/.csv, demo:wikipedia, or the
    folder of a saved data set; text, or tokens of SAELens' PretokenizeRunner."""
    streaming: bool = argument(default=False, action=Flag)
    """Stream the data set instead of downloading it whole."""

    def load(self) -> Text:
        """The documents, see `load_text`."""
        return load_text(self.dataset, self.dataset_split, self.text_column, self.streaming)


@config
class OtherText(TextSource):
    """Text beside the run's own."""

    dataset: PathStr | None = None
    """Named as for train; by default the run's own text."""


@config
class Sampling:
    """How the language model writes."""

    prompt: str = "I think that"
    """What the samples continue."""
    sample_tokens: Count = 24
    """Tokens of a sample."""
    temperature: NotNegative = 1.0
    """Temperature of sampling; 0 takes the likeliest token."""
    top_p: Probability | None = None
    """Sample from the fewest tokens with more than this probability; by default from all."""
    seed: Seed = 0
    """Seed of all that is random."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate_steered`."""
        own = values(self, ("prompt", "temperature", "top_p", "seed"))
        return own | {"n_tokens": self.sample_tokens}


@config
class Measuring:
    """On how much text layers are measured."""

    n_sequences: Count = 64
    """Sequences on which cross-entropies are taken."""


@config
class RunConfig(TextSource):
    """Which model on which text: what all layers that are trained together share."""

    model: PathStr
    """Hugging Face name or local folder of the language model; demo:smollm2 and demo:gemma3 need
    no hub."""
    output: PathStr
    """Folder of the results. The same command again resumes what was interrupted there."""
    expansion: Count = 16
    """Every layer gets the parameters of a transcoder with expansion * d_in units."""
    training_tokens: Count = 1_024_000
    """Tokens to train on; a shorter text is repeated."""
    batch_size: Count = 2048
    """Tokens per training step."""
    context_size: ContextSize = 128
    """Tokens per sequence the language model reads."""
    lm_batch_size: Count = 32
    """Sequences per language-model pass."""
    heldout_documents: Count = 1000
    """Documents kept for evaluation, the same for every seed."""
    model_class: ModelClass = "TransformerBridge"
    """How TransformerLens wraps the model."""
    dtype: ModelDtype = "float32"
    """Type of the language model's weights. Layers are float32, see autocast."""
    autocast: bool = argument(default=_HAS_BFLOAT16, action=Flag)
    """Run the language model and the layer in bfloat16 where that is safe."""
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the model and the layer."""
    llm_device: Literal["auto"] | Device | None = None
    """Device of the model, if another, or auto, which spreads it over several: it then reads ahead
    while layers are trained."""

    def __post_init__(self) -> None:
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"{self.batch_size}"
            )

    def load_model(self) -> Any:
        """The language model, see `load_model`."""
        device = self.llm_device or self.device
        return load_model(self.model, self.model_class, device, dtype=self.dtype)

    @property
    def pair_dtype(self) -> torch.dtype:
        """Of activations that wait or are kept: what runs in bfloat16 reads no more of them."""
        half = self.autocast or self.dtype == "bfloat16"
        return torch.bfloat16 if half else torch.float32

    @property
    def steps(self) -> int:
        return self.training_tokens // self.batch_size

    @property
    def reading_heldout(self) -> dict[str, Any]:
        """Arguments of `read_heldout`."""
        return values(self, ("context_size", "device"))

    @property
    def reading_texts(self) -> dict[str, Any]:
        """Arguments of `text_activations` and `inspect_experts`."""
        return values(self, ("context_size", "lm_batch_size", "autocast"))

    def documents(self, dataset: Text | None = None) -> tuple[Text, Text]:
        """The run's (training, held-out) documents."""
        return split_documents(self.load() if dataset is None else dataset, self.heldout_documents)


@config
class Recipe:
    """How layers are trained."""

    d_sae: Count | None = None
    """Number of experts or units; by default as many as match the expansion's parameters."""
    sae_options: str = "{}"
    """Further fields of the architecture's SAELens training config, as JSON."""
    lr: Positive | None = None
    """Peak learning rate; by default the architecture's."""
    lr_warm_up_steps: Index | None = None
    """Steps of linear warm-up, by default a tenth."""
    lr_decay_steps: Index | None = None
    """Steps of linear decay to zero at the end, by default the last fifth."""
    activations: PathStr | None = None
    """Folder that keeps the MLPs' inputs and outputs for further runs. By default `train` keeps
    none, nor does `compare` for more than one layer."""


@config
class TrainConfig(RunConfig, Recipe):
    """The training run of one layer."""

    layer: Index
    """Which MLP to replace, counted from 0."""
    architecture: str = "mxd"
    """As one of `ManyConfig.architectures`."""
    k: Count = 32
    """Active experts or units per token, where the architecture has a k."""
    seed: Seed = 0
    """Seed of all that is random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cfg_class = config_class(self.architecture)
        warm_up, decay = self.warm_up_and_decay
        if warm_up + decay > self.steps:
            raise ValueError(
                f"lr_warm_up_steps={warm_up} and lr_decay_steps={decay} are more than the run's "
                f"{self.steps} steps, training_tokens // batch_size"
            )
        try:
            options = json.loads(self.sae_options, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f"sae_options is not JSON: {error}") from error
        known = field_names(cfg_class) - _SAID_OTHERWISE
        if not isinstance(options, dict) or not options.keys() <= known:
            raise ValueError(
                f"sae_options must be an object with fields of {cfg_class.__name__}: "
                f"{', '.join(sorted(known))}"
            )
        if options.get("normalize_activations", "none") != "none":
            raise ValueError(
                "sae_options: normalize_activations would be estimated on batches that other "
                "layers train on, too: leave it at none"
            )
        kinds = get_type_hints(cfg_class)
        for name, value in options.items():
            check(kinds[name], **{f"sae_options[{name!r}]": value})
        if self.d_sae is not None and has_k(self.architecture):
            check_k(self.k, self.d_sae)

    @property
    def warm_up_and_decay(self) -> tuple[int, int]:
        """Steps in which the learning rate rises, and falls."""
        warm_up, decay = self.lr_warm_up_steps, self.lr_decay_steps
        warm_up = self.steps // 10 if warm_up is None else warm_up
        return warm_up, self.steps // 5 if decay is None else decay

    @property
    def peak_lr(self) -> float:
        return answers(self.architecture).default_lr if self.lr is None else self.lr

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the run's layer from others: fields of a row of results."""
        k = self.k if has_k(self.architecture) else None
        return {"architecture": self.architecture, "k": k, "seed": self.seed, "lr": self.peak_lr}

    @property
    def layer_path(self) -> Path:
        """Where the trained layer is: load it with ``SAE.load_from_disk``."""
        return Path(self.output) / "layer"

    @property
    def finished(self) -> bool:
        return (self.layer_path / SAE_CFG_FILENAME).exists()

    def __str__(self) -> str:
        k = f", k = {self.k}" if has_k(self.architecture) else ""
        return f"layer {self.layer}: {answers(self.architecture).label}{k}, seed {self.seed}"


def _each_layer(layers: list[str]) -> list[str]:
    if layers != ["all"] and not all(layer.isdecimal() for layer in layers):
        raise ValueError('must be numbers of layers, counted from 0, or "all"')
    return layers


Layers = Annotated[
    EachOnce[str],
    BeforeValidator(lambda layers: [str(layer) for layer in layers]),
    AfterValidator(_each_layer),
]


@config
class ManyConfig(RunConfig, Recipe, Measuring):
    """Train layers in place of a language model's MLPs and measure them on held-out documents.

    Example: mxd-lens train --model gpt2 --layers 8 --dataset my_text.jsonl --output runs/gpt2
    """

    layers: Layers
    """Which MLPs to replace, counted from 0, or all."""
    architectures: EachOnce[Name] = field(default_factory=lambda: ["mxd"])
    """mxd, mxd_meaningful, mxd_paper, molt, topk_transcoder, topk_skip_transcoder, dense, or any
    that SAELens trains, which is then an SAE of the MLP's output (topk, jumprelu, ...)."""
    k: EachOnce[Count] = field(default_factory=lambda: [32])
    """Active experts or units per token; an architecture without a k is trained once a seed."""
    seeds: EachOnce[Seed] = field(default_factory=lambda: [0])
    """Seeds of the weights and of the batches' order."""
    probe: PathStr | None = None
    """Labelled text to probe every layer on, demo:bbc for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs(1)  # each run's configuration checks itself

    def runs(self, n_layers: int | None = None) -> list[TrainConfig]:
        """The training runs, in the order they go, each in a folder in `output`.

        Args:
            n_layers: of the model; needed to know which are all.
        """
        if self.layers == ["all"]:
            if n_layers is None:
                raise ValueError("which layers are all is known once the model is loaded")
            layers = range(n_layers)
        else:
            layers = map(int, self.layers)
        shared = values(self, field_names(RunConfig) | field_names(Recipe))
        shared["activations"] = self.kept_activations
        runs: dict[str, TrainConfig] = {}
        for layer, seed, k, name in product(layers, self.seeds, self.k, self.architectures):
            own: dict[str, Any] = {"k": k} if has_k(name) else {}
            own |= {"layer": layer, "architecture": name, "seed": seed}
            folder = folder_name(layer, name, k, seed)
            own["output"] = str(Path(self.output) / folder)
            if folder not in runs:
                runs[folder] = TrainConfig(**(shared | own))
        return list(runs.values())

    def alone(self) -> TrainConfig | None:
        """The run, in `output` itself, if only one is asked for."""
        if self.layers == ["all"] or len(runs := self.runs()) > 1:
            return None
        return replace(runs[0], output=self.output)

    @property
    def kept_activations(self) -> str | None:
        """The folder of activations that the runs read, if they do."""
        return self.activations


_SAID_OTHERWISE = {"d_in", "d_out", "d_sae", "k", "device", "metadata", "write_directions"}
"""Fields of SAELens' training configurations that follow from the model or the run's own."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder; ValueError if it holds something else."""
    path = folder / RUNNER_CFG_FILENAME
    written: dict[str, Any] = read_json(path, dict[str, Any]) or {}
    written["output"] = str(folder)
    try:
        return TrainConfig(**written)
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def finished_runs(folder: Path, one_mlp: bool = True) -> list[TrainConfig]:
    """The run in this folder, or the finished ones of the comparison in it.

    Raises:
        ValueError: there are none, they are of more than one model, or MLP if they may not be, or
            read it differently, or a file there is none of ours.
    """
    alone = folder / RUNNER_CFG_FILENAME
    paths = [alone] if alone.exists() else sorted(folder.glob(f"*/{RUNNER_CFG_FILENAME}"))
    runs = [read_config(path.parent) for path in paths]
    finished = [run for run in runs if run.finished]
    if runs and not finished:
        raise ValueError(f"what is in {folder} is not finished: run its command again")
    if not finished:
        raise ValueError(f"{folder} holds neither a finished run nor a comparison")
    reading = {(r.model, r.model_class, r.context_size, r.autocast, r.dtype) for r in finished}
    if len(reading) > 1 or (one_mlp and len({run.layer for run in finished}) > 1):
        raise ValueError(
            f"{folder} holds layers of several models, at several places, or that differ in "
            "context_size, dtype or autocast: name one of the folders in it"
        )
    return finished


def folder_name(layer: int, architecture: str, k: int, seed: int) -> str:
    """Of a run among others."""
    of_k = [f"k{k}"] if has_k(architecture) else []
    return "-".join([f"layer{layer}", architecture, *of_k, f"seed{seed}"])


def has_k(architecture: str) -> bool:
    """True if layers of this architecture, which must be a known one, are trained with a k."""
    return "k" in field_names(config_class(architecture))


def field_names(cfg_class: type) -> set[str]:
    return {field.name for field in fields(cfg_class)}


def values(cfg: Any, names: Iterable[str]) -> dict[str, Any]:
    """These fields of a configuration."""
    return {name: getattr(cfg, name) for name in names}


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """What a run is known by: all that decides its layer, and not where it is or runs.

    Whether activations are cached counts: their batches come in another order.
    """
    made = asdict(cfg) | {"activations": cfg.activations and "cached"}
    return {name: value for name, value in made.items() if name not in WHERE}
