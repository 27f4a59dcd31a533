"""Train a layer on a language model with SAELens' trainer: text in, a layer on disk out."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.checkpoints import CheckpointedTrainer, drop_checkpoints, own_checkpoints
from mxd_lens.data import (
    NonFiniteActivations,
    Text,
    activations_store,
    cache_pairs,
    cached_pairs,
    load_text,
    pairs,
    split_documents,
)
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
from mxd_lens.files import (
    claim,
    load_layer,
    locked,
    read_json,
    whole,
    write_json,
)
from mxd_lens.fingerprint import model_fingerprint, text_fingerprint
from mxd_lens.matching import matched_d_sae
from mxd_lens.models import ModelClass, load_model, mlp_hooks
from mxd_lens.mxd import Recipe, TrainingMxD, read_mlp
from mxd_lens.splice import get_mlp, has_folded_norms
from mxd_lens.startup import Interrupted
from mxd_lens.topk_sae import SparseTopKTrainingSAE

COMPARISON_FILENAME = "comparison.json"
"""What says that a folder is that of a comparison."""
SOURCES_FILENAME = "sources.json"
"""Which model and text a run was begun with."""

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
        known = _fields(cfg_class) - _SAID_OTHERWISE
        if not isinstance(options, dict) or not options.keys() <= known:
            raise ValueError(
                f"sae_options must be an object with fields of {cfg_class.__name__}: "
                f"{', '.join(sorted(known))}"
            )
        kinds = get_type_hints(cfg_class)
        for name, value in options.items():
            check(kinds[name], **{f"sae_options[{name!r}]": value})
        if self.d_sae is not None and "k" in _fields(cfg_class):
            _check_k(self, self.k, self.d_sae)

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


def train(cfg: TrainConfig, model: Any = None, dataset: Text | None = None) -> SAE[Any]:
    """Train a layer, or resume or load what `cfg.output` already holds of this very run.

    Args:
        model: the loaded model, instead of loading ``cfg.model``.
        dataset: documents in a column ``text``, instead of loading ``cfg.dataset``.

    Returns:
        The trained layer, also at ``cfg.layer_path`` in SAELens' format. A resumed run passes
        the batches already seen by again, so that those to come, and with them its weights, are
        an uninterrupted one's; without ``cfg.activations`` the model reads that text again.

    Raises:
        ValueError: anything about model, layer, text or configuration that cannot work, the
            output folder of another run or process, a run that was begun with another model or
            text, or a checkpoint that cannot be read.
        OSError: the disk is full; the run can be resumed.
        Interrupted: a signal came; the run can be resumed.
    """
    if cfg.finished and not os.access(cfg.output, os.W_OK):  # nobody can be at work there
        return load_layer(cfg.layer_path, cfg.device)
    with locked(Path(cfg.output)):
        claim_folder(cfg, write=False)
        if cfg.finished:
            if dataset is None and Path(cfg.dataset).is_file():
                dataset = load_dataset(cfg)
            check_sources(cfg, model, dataset)
            drop_checkpoints(_checkpoints(cfg), settings(cfg))
            return load_layer(cfg.layer_path, cfg.device)
        if os.path.lexists(cfg.layer_path):
            raise ValueError(f"{cfg.layer_path} is no layer, it has no cfg.json: move it away")
        own_checkpoints(_checkpoints(cfg), settings(cfg))
        dataset = load_dataset(cfg) if dataset is None else dataset
        if model is None:
            model = load_model(cfg.model, cfg.model_class, cfg.device)
        check_layer(cfg, model)
        claim_folder(cfg)
        check_sources(cfg, model, dataset)
        return _train(cfg, model, dataset)


def _train(cfg: TrainConfig, model: Any, dataset: Text) -> SAE[Any]:
    hooks = mlp_hooks(model, cfg.layer)
    mlp_weights = read_mlp(get_mlp(model, cfg.layer))
    if cfg.activations is None:
        torch.manual_seed(cfg.seed)
        documents, _ = load_documents(cfg, dataset)
        batches = pairs(_store(cfg, model, documents, hooks), hooks)
    else:
        fill_activations(cfg, cfg.activations, model, dataset)
        n_tokens = cfg.steps * cfg.batch_size
        batches = cached_pairs(Path(cfg.activations), n_tokens, cfg.batch_size, cfg.seed)
    sample = list(islice(batches, 8))
    batches = chain(sample, batches)
    torch.manual_seed(cfg.seed)
    mlp = MLPShape.of(mlp_weights)
    sae = new_layer(cfg, layer_config(cfg, mlp, hooks, cfg.device))
    sae.cfg.metadata.norms_folded = has_folded_norms(model)
    x, y = torch.cat(sample).to(cfg.device).split([mlp.d_in, mlp.d_out], dim=-1)
    _start(sae, mlp_weights, x, y)
    if not _reads_pairs(cfg.architecture):
        batches = (batch[:, mlp.d_in :] for batch in batches)

    stop: list[int] = []
    trainer = CheckpointedTrainer(_trainer_config(cfg), sae, _until(stop, batches), settings(cfg))
    for group in trainer.optimizer.param_groups:
        group["fused"] = True  # the same Adam in a third of the time
    trainer._update_pbar = partial(trainer._update_pbar, update_interval=10)
    trainer.resume()
    try:
        with _stopping(stop):
            trainer.fit()
    except (_Stopped, NonFiniteActivations):
        trainer.save_checkpoint(str(trainer.n_training_samples))
        raise
    if not all(p.isfinite().all() for p in sae.parameters()):
        raise ValueError(
            f"training diverged: weights are not finite; lower lr={learning_rate(cfg)}"
        )
    sae.eval()
    return _save(cfg, trainer)


def learning_rate(cfg: TrainConfig) -> float:
    """The run's peak learning rate."""
    return BEST_LR.get(cfg.name, 3e-3) if cfg.lr is None else cfg.lr


def fill_activations(
    cfg: RunConfig, folder: str | Path, model: Any, dataset: Text | None = None
) -> None:
    """One pass of the language model: the activations of the run's training tokens, on disk.

    Raises:
        ValueError: as `train` does, or the folder holds those of another model, layer or text.
    """
    hooks = mlp_hooks(model, cfg.layer)
    dataset = load_dataset(cfg) if dataset is None else dataset
    documents, _ = load_documents(cfg, dataset)
    decisive = "model layer dataset dataset_split text_column context_size lm_batch_size"
    decisive += " heldout_documents model_class autocast"
    source = {name: getattr(cfg, name) for name in decisive.split()}
    source["model_fingerprint"] = model_fingerprint(model)
    source["text_fingerprint"] = text_fingerprint(dataset)
    store = _store(cfg, model, documents, hooks)
    cache_pairs(Path(folder), store, hooks, cfg.steps * cfg.batch_size, source)


def _store(cfg: RunConfig, model: Any, documents: Text, hooks: tuple[str, str]) -> Any:
    return activations_store(
        model,
        documents,
        hooks,
        context_size=cfg.context_size,
        batch_size=cfg.batch_size,
        lm_batch_size=cfg.lm_batch_size,
        device=cfg.device,
        autocast_lm=cfg.autocast,
    )


@dataclass(frozen=True)
class MLPShape:
    """The MLP that is to be replaced."""

    d_in: int
    d_out: int
    d_hidden: int
    act_fn: str
    gated: bool

    @classmethod
    def of(cls, mlp_weights: dict[str, Any]) -> MLPShape:
        """From `read_mlp`'s answer."""
        d_in, d_hidden = mlp_weights["W_in"].shape
        d_out = mlp_weights["W_out"].shape[1]
        return cls(d_in, d_out, d_hidden, mlp_weights["act_fn"], "W_gate" in mlp_weights)


def layer_config(
    cfg: TrainConfig, mlp: MLPShape, hooks: tuple[str, str], device: str
) -> TrainingSAEConfig:
    """The layer's own configuration: SAELens', for the architecture that was asked for."""
    _, cfg_class = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture]
    reads_pairs = _reads_pairs(cfg.architecture)
    shape = (mlp.d_in, mlp.d_out, mlp.d_hidden, mlp.gated)
    values = asdict(mlp) | {
        "d_in": mlp.d_in if reads_pairs else mlp.d_out,
        "d_sae": cfg.d_sae or matched_d_sae(*shape, cfg.expansion, cfg.architecture),
        "k": cfg.k,
        "recipe": cfg.recipe,
        "device": device,
        "metadata": SAEMetadata(
            model_name=cfg.model,
            model_class_name=cfg.model_class,
            hook_name=hooks[0] if reads_pairs else hooks[1],
            hook_name_out=hooks[1] if reads_pairs else None,
            hook_layer=cfg.layer,
            context_size=cfg.context_size,
            prepend_bos=True,
            exclude_special_tokens=True,
            dataset_path=cfg.dataset,
            training_tokens=cfg.steps * cfg.batch_size,
        ),
    }
    known = {name: values[name] for name in values.keys() & _fields(cfg_class)}
    layer_cfg = cfg_class(**(known | json.loads(cfg.sae_options)))
    _check_k(cfg, getattr(layer_cfg, "k", 1), layer_cfg.d_sae)
    return layer_cfg


def _check_k(cfg: TrainConfig, k: float, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        units = "experts" if cfg.architecture == "mxd" else "units"
        raise ValueError(
            f"k={k:g} {units} cannot be active out of d_sae={d_sae}: need 1 <= k <= d_sae"
        )


def shapes_of(
    cfg: TrainConfig, mlp: MLPShape, hooks: tuple[str, str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters the run would train, without allocating any of them.

    Raises:
        ValueError: there is no such layer.
    """
    with torch.device("meta"):
        sae = new_layer(cfg, layer_config(cfg, mlp, hooks, device="meta"))
    return {name: tuple(p.shape) for name, p in sae.named_parameters()}


def new_layer(cfg: TrainConfig, layer_cfg: TrainingSAEConfig) -> TrainingSAE[Any]:
    """A layer of the architecture that was asked for, at random weights."""
    sae_class = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture][0]
    faster: dict[type, Any] = {TopKTrainingSAE: SparseTopKTrainingSAE}
    return faster.get(sae_class, sae_class)(layer_cfg)


def _reads_pairs(architecture: str) -> bool:
    """Whether a layer maps the MLP's input to its output, or is an SAE of the output."""
    return "d_out" in _fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])


def _fields(cfg_class: type) -> set[str]:
    return {field.name for field in fields(cfg_class)}


def _start(sae: TrainingSAE[Any], mlp_weights: dict[str, Any], x: Tensor, y: Tensor) -> None:
    """Start a layer from a sample of its data, as well as its recipe allows."""
    if isinstance(sae, TrainingMxD):
        if sae.cfg.recipe == "centred":
            sae.start_from(mlp_weights, x)
    else:
        sae.b_dec.data.copy_(y.mean(0))


def check_layer(cfg: TrainConfig, model: Any) -> None:
    """Find out before any work whether the run's layer can replace its MLP.

    Raises:
        ValueError: the model has no such MLP, or there is no layer of this configuration.
    """
    mlp = MLPShape.of(read_mlp(get_mlp(model, cfg.layer)))
    shapes_of(cfg, mlp, mlp_hooks(model, cfg.layer))


def _trainer_config(cfg: TrainConfig) -> SAETrainerConfig:
    lr = learning_rate(cfg)
    warm_up, decay = cfg.warm_up_and_decay
    return SAETrainerConfig(
        total_training_samples=cfg.steps * cfg.batch_size,
        train_batch_size_samples=cfg.batch_size,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=warm_up,
        lr_decay_steps=decay,
        device=cfg.device,
        autocast=cfg.autocast,
        n_checkpoints=cfg.n_checkpoints,
        checkpoint_path=str(_checkpoints(cfg)),
    )


def _checkpoints(cfg: TrainConfig) -> Path:
    return Path(cfg.output) / "checkpoints"


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """What a run is known by: all that decides its layer, and not where it is or runs.

    Whether activations are cached counts: their batches come in another order.
    """
    values = asdict(cfg) | {"activations": cfg.activations and "cached"}
    return {k: v for k, v in values.items() if k not in ("output", "device", "n_checkpoints")}


def claim_folder(cfg: TrainConfig, *, write: bool = True) -> None:
    """Write the configuration down, or compare it with the one of the run that is there.

    Args:
        write: False: only compare.

    Raises:
        ValueError: it is another, or the folder holds something else.
    """
    writes = ("layer", "checkpoints", "results.json", "results.html", SOURCES_FILENAME)
    writes = (*writes, COMPARISON_FILENAME)
    claim(Path(cfg.output), RUNNER_CFG_FILENAME, settings(cfg), writes, write=write)


def check_sources(cfg: RunConfig, model: Any = None, dataset: Text | None = None) -> None:
    """Write down which model and which text a run has, or compare them with what is written.

    Args:
        model, dataset: what is loaded of them.

    Raises:
        ValueError: one has changed since the run was begun.
    """
    sources = {}
    if model is not None:
        sources["model"] = model_fingerprint(model)
    if dataset is not None:
        sources["text"] = text_fingerprint(dataset)
    path = Path(cfg.output) / SOURCES_FILENAME
    known = read_json(path, dict[str, str]) or {}
    names = {"model": cfg.model, "text": cfg.dataset}
    for source, print_now in sources.items():
        if known.get(source, print_now) != print_now:
            raise ValueError(
                f"{cfg.output} was begun with another {source} than {names[source]!r} is now: "
                "restore it, or choose another folder"
            )
    if sources.keys() - known.keys():
        write_json(path, known | sources)


class _Stopped(Interrupted):
    """Between two steps, where the state is whole."""


def _until(stop: list[int], batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The batches, until a signal has come."""
    for batch in batches:
        if stop:
            raise _Stopped("training interrupted; run the same command again to resume", stop[0])
        yield batch


@contextmanager
def _stopping(stop: list[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the step in progress, a second one everything at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, _: Any) -> None:
        stop.append(number)
        signal.signal(number, handlers[signal.Signals(number)])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _save(cfg: TrainConfig, trainer: CheckpointedTrainer) -> SAE[Any]:
    """The layer in SAELens' inference format."""
    with whole(cfg.layer_path) as unfinished:
        trainer.sae.save_inference_model(unfinished)
        save_file({"sparsity": trainer.log_feature_sparsity}, unfinished / SPARSITY_FILENAME)
    drop_checkpoints(_checkpoints(cfg), settings(cfg))
    return load_layer(cfg.layer_path, cfg.device)
