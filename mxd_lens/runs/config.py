"""The configuration of a training run."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from mxd_lens.data.text import Text, load_text, split_documents
from mxd_lens.fields import (
    ContextSize,
    Count,
    Device,
    Index,
    Name,
    PathStr,
    Positive,
    Seed,
    check,
    config,
)
from mxd_lens.files import read_json
from mxd_lens.layers.mxd import Recipe
from mxd_lens.models.load import ModelClass

COMPARISON_FILENAME = "comparison.json"
"""What says that a folder is that of a comparison."""

BEST_LR = {
    "mxd": 3e-3,
    "mxd:paper": 3e-2,
    "topk_transcoder": 3e-2,
    "topk_skip_transcoder": 1e-2,
    "topk": 3e-3,
}
"""Peak learning rates: the best by FVU in tests/benchmarks/search_lr.py, but for the default MxD,
whose gate keeps more of its meaning at a lower one (CONTRIBUTING.md)."""


@config
class RunConfig:
    """Which layer of which model on which text: what all layers of a comparison share."""

    model: PathStr
    """Hugging Face name or local folder of the language model; demo:smollm2 needs no hub."""
    layer: Index
    """Which MLP to replace, counted from 0."""
    dataset: PathStr
    """Hub data set (name or name:config), local .txt/.jsonl/.parquet/.csv, or demo:wikipedia."""
    output: PathStr
    """Folder of the run. The same command again resumes what was interrupted there."""
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
    text_column: Name = "text"
    """Column of the data set that holds the text."""
    dataset_split: Name = "train"
    """Split of a hub data set."""
    streaming: bool = False
    """Stream the data set instead of downloading it whole."""
    model_class: ModelClass = "TransformerBridge"
    """How TransformerLens wraps the model."""
    autocast: bool = False
    """Run the language model and the layer in bfloat16 where that is safe."""
    n_checkpoints: Index = 3
    """Checkpoints on the way; the newest is kept until the run is done."""
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the model and the layer."""

    def __post_init__(self) -> None:
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"{self.batch_size}"
            )

    @property
    def steps(self) -> int:
        return self.training_tokens // self.batch_size


@config
class TrainConfig(RunConfig):
    """One training run. Everything not said here is the recipe's."""

    architecture: str = "mxd"
    """mxd, topk_transcoder, topk_skip_transcoder, or any in SAELens' training registry, which
    is then an SAE of the MLP's output (topk, jumprelu, ...)."""
    k: Count = 32
    """Experts or units active per token, where the architecture has a k."""
    d_sae: Count | None = None
    """Number of experts or units; by default as many as match the expansion's parameters."""
    recipe: Recipe = "centred"
    """Of an mxd. centred: hidden units from the original MLP, centred gate. paper: random."""
    sae_options: str = "{}"
    """Further fields of the architecture's SAELens training config, as JSON."""
    lr: Positive | None = None
    """Peak learning rate; by default the architecture's best in our search."""
    lr_warm_up_steps: Index | None = None
    """Steps of linear warm-up, by default a tenth."""
    lr_decay_steps: Index | None = None
    """Steps of linear decay to zero at the end, by default the last fifth."""
    activations: PathStr | None = None
    """Folder that keeps the MLP's inputs and outputs, to share one pass of the model."""
    seed: Seed = 0
    """Seed of the weights and of the batches' order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in SAE_TRAINING_CLASS_REGISTRY:
            raise ValueError(
                f"unknown architecture {self.architecture!r}; known: "
                f"{', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}"
            )
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
        _, cfg_class = SAE_TRAINING_CLASS_REGISTRY[self.architecture]
        known = field_names(cfg_class) - _SAID_OTHERWISE
        if not isinstance(options, dict) or not options.keys() <= known:
            raise ValueError(
                f"sae_options must be an object with fields of {cfg_class.__name__}: "
                f"{', '.join(sorted(known))}"
            )
        kinds = get_type_hints(cfg_class)
        for name, value in options.items():
            check(kinds[name], **{f"sae_options[{name!r}]": value})
        if self.d_sae is not None and "k" in field_names(cfg_class):
            check_k(self, self.k, self.d_sae)

    @property
    def warm_up_and_decay(self) -> tuple[int, int]:
        """Steps in which the learning rate rises, and falls."""
        warm_up, decay = self.lr_warm_up_steps, self.lr_decay_steps
        return (
            self.steps // 10 if warm_up is None else warm_up,
            self.steps // 5 if decay is None else decay,
        )

    @property
    def name(self) -> str:
        """What a comparison calls such layers."""
        paper = self.architecture == "mxd" and self.recipe == "paper"
        return "mxd:paper" if paper else self.architecture

    @property
    def layer_path(self) -> Path:
        """Where the trained layer is: load it with ``SAE.load_from_disk``."""
        return Path(self.output) / "layer"

    @property
    def finished(self) -> bool:
        """True if the trained layer is there."""
        return (self.layer_path / SAE_CFG_FILENAME).exists()


_SAID_OTHERWISE = {"d_in", "d_out", "d_sae", "k", "recipe", "device", "metadata"}
"""Fields of SAELens' training configurations that follow from the model or the run's own."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder, on this machine's device.

    Raises:
        ValueError: what the folder holds is not that.
    """
    path = folder / RUNNER_CFG_FILENAME
    values: dict[str, Any] = read_json(path, dict[str, Any]) or {}
    values["output"] = str(folder)
    try:
        return TrainConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def load_documents(cfg: RunConfig, dataset: Text | None = None) -> tuple[Text, Text]:
    """The run's (training, held-out) documents."""
    return split_documents(load_dataset(cfg) if dataset is None else dataset, cfg.heldout_documents)


def load_dataset(cfg: RunConfig) -> Text:
    """The run's documents."""
    return load_text(cfg.dataset, cfg.dataset_split, cfg.text_column, cfg.streaming)


def learning_rate(cfg: TrainConfig) -> float:
    """The run's peak learning rate."""
    return BEST_LR.get(cfg.name, 3e-3) if cfg.lr is None else cfg.lr


def check_k(cfg: TrainConfig, k: float, d_sae: int) -> None:
    """Raises ValueError if so many of the run's units cannot be active at a time."""
    if not 1 <= k <= d_sae:
        units = "experts" if cfg.architecture == "mxd" else "units"
        raise ValueError(
            f"k={k:g} {units} cannot be active out of d_sae={d_sae}: need 1 <= k <= d_sae"
        )


def field_names(cfg_class: type) -> set[str]:
    """Names of a dataclass' fields."""
    return {field.name for field in fields(cfg_class)}


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """What a run is known by: all that decides its layer, and not where it is or runs.

    Whether activations are cached counts: their batches come in another order.
    """
    values = asdict(cfg) | {"activations": cfg.activations and "cached"}
    return {k: v for k, v in values.items() if k not in ("output", "device", "n_checkpoints")}
