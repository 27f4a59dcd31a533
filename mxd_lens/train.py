"""Train an MxD on a language model with SAELens' trainer: text in, a layer on disk out."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data import (
    NonFiniteActivations,
    Text,
    activations_store,
    load_text,
    pairs,
    split_documents,
)
from mxd_lens.matching import matched_d_sae
from mxd_lens.models import ModelClass, load_model, mlp_hooks
from mxd_lens.mxd import MxD, Recipe, TrainingMxD, TrainingMxDConfig, read_mlp
from mxd_lens.splice import get_mlp


@dataclass
class TrainConfig:
    """One training run. Everything not said here is the recipe's."""

    model: str
    """Hugging Face name or local folder of the language model; demo:smollm2 needs no hub."""
    layer: int
    """Which MLP to replace, counted from 0."""
    dataset: str
    """Hub data set (name or name:config), local .txt/.jsonl/.parquet/.csv, or demo:wikipedia."""
    output: str
    """Folder of the run. The same command again resumes what was interrupted there."""
    k: int = 32
    """Experts active per token."""
    d_sae: int | None = None
    """Number of experts; by default as many as match a transcoder's parameters."""
    expansion: int = 16
    """Expansion factor of the transcoder to match where d_sae is not given."""
    recipe: Recipe = "centred"
    """centred: hidden units from the original MLP, centred gate. paper: all at random."""
    training_tokens: int = 1_024_000
    """Tokens to train on; a shorter text is repeated."""
    lr: float = 3e-3
    """Peak learning rate: warm-up over a tenth of the steps, linear decay over the last fifth."""
    batch_size: int = 2048
    """Tokens per training step."""
    context_size: int = 128
    """Tokens per sequence the language model reads."""
    lm_batch_size: int = 32
    """Sequences per language-model pass."""
    heldout_documents: int = 1000
    """Documents kept for evaluation."""
    text_column: str = "text"
    """Column of the data set that holds the text."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    streaming: bool = False
    """Stream the data set instead of downloading it whole."""
    model_class: ModelClass = "TransformerBridge"
    """How TransformerLens wraps the model."""
    autocast: bool = False
    """Run the language model and the layer in bfloat16 where that is safe."""
    n_checkpoints: int = 3
    """Checkpoints on the way; the newest is kept until the run is done."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the model and the layer."""
    seed: int = 0
    """Seed of weights, of the documents' split and of the batches' shuffle."""

    def __post_init__(self) -> None:
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch of "
                f"{self.batch_size}"
            )

    @property
    def layer_path(self) -> Path:
        """Where the trained layer is: load it with ``SAE.load_from_disk``."""
        return Path(self.output) / "mxd"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; a checkpoint has been saved."""


def load_documents(cfg: TrainConfig, dataset: Text | None = None) -> tuple[Text, Text]:
    """The run's (training, held-out) documents."""
    if dataset is None:
        dataset = load_text(cfg.dataset, cfg.dataset_split, cfg.text_column, cfg.streaming)
    return split_documents(dataset, cfg.heldout_documents, cfg.seed)


def train(cfg: TrainConfig, model: Any = None, dataset: Text | None = None) -> MxD:
    """Train an MxD, or resume or load what `cfg.output` already holds of this very run.

    Args:
        model: the loaded model, instead of loading ``cfg.model``.
        dataset: documents in a column ``text``, instead of loading ``cfg.dataset``.

    Returns:
        The trained layer, also at ``cfg.layer_path`` in SAELens' format. A resumed run passes
        the text already seen through the model again, so that its batches, and with them its
        weights, are those of an uninterrupted one.

    Raises:
        ValueError: anything about model, layer, text or configuration that cannot work, the
            output folder of another run, or a checkpoint that cannot be read.
        Interrupted: a signal came; the run can be resumed.
    """
    _claim_folder(cfg)
    if (cfg.layer_path / "cfg.json").exists():
        return MxD.load_from_disk(cfg.layer_path, device=cfg.device)
    if model is None:
        model = load_model(cfg.model, cfg.model_class, cfg.device)
    hooks = mlp_hooks(model, cfg.layer)
    documents, _ = load_documents(cfg, dataset)

    torch.manual_seed(cfg.seed)
    mlp_weights = read_mlp(get_mlp(model, cfg.layer))
    sae = TrainingMxD(_layer_config(cfg, mlp_weights, hooks))
    store = activations_store(
        model,
        documents,
        hooks,
        context_size=cfg.context_size,
        batch_size=cfg.batch_size,
        lm_batch_size=cfg.lm_batch_size,
        device=cfg.device,
        autocast_lm=cfg.autocast,
    )
    batches = pairs(store, hooks)
    sample = list(islice(batches, 8))
    if cfg.recipe == "centred":
        sae.start_from(mlp_weights, torch.cat(sample)[:, : sae.cfg.d_in])

    stop = threading.Event()
    trainer = SAETrainer(
        _trainer_config(cfg),
        sae,
        _until(stop, chain(sample, batches)),
        save_checkpoint_fn=lambda checkpoint_path: _complete(cfg, checkpoint_path),
    )
    _resume(cfg, trainer)
    try:
        with _stopping(stop):
            trainer.fit()
    except (Interrupted, NonFiniteActivations):
        trainer.save_checkpoint(str(trainer.n_training_samples))
        raise
    if not all(p.isfinite().all() for p in sae.parameters()):
        raise ValueError(f"training diverged: weights are not finite; lower lr={cfg.lr}")
    sae.eval()
    return _save(cfg, trainer)


def _layer_config(
    cfg: TrainConfig, mlp_weights: dict[str, Any], hooks: tuple[str, str]
) -> TrainingMxDConfig:
    d_in, d_hidden = mlp_weights["W_in"].shape
    d_out = mlp_weights["W_out"].shape[1]
    gated = "W_gate" in mlp_weights
    return TrainingMxDConfig(
        d_in=d_in,
        d_out=d_out,
        d_hidden=d_hidden,
        d_sae=cfg.d_sae or matched_d_sae(d_in, d_out, d_hidden, gated, cfg.expansion),
        k=cfg.k,
        act_fn=mlp_weights["act_fn"],
        gated=gated,
        recipe=cfg.recipe,
        device=cfg.device,
        metadata=SAEMetadata(
            model_name=cfg.model,
            model_class_name=cfg.model_class,
            hook_name=hooks[0],
            hook_name_out=hooks[1],
            hook_layer=cfg.layer,
            context_size=cfg.context_size,
            prepend_bos=True,
            exclude_special_tokens=True,
            dataset_path=cfg.dataset,
            training_tokens=cfg.training_tokens // cfg.batch_size * cfg.batch_size,
        ),
    )


def _trainer_config(cfg: TrainConfig) -> SAETrainerConfig:
    steps = cfg.training_tokens // cfg.batch_size
    return SAETrainerConfig(
        total_training_samples=steps * cfg.batch_size,
        train_batch_size_samples=cfg.batch_size,
        lr=cfg.lr,
        lr_end=cfg.lr,
        lr_warm_up_steps=steps // 10,
        lr_decay_steps=steps // 5,
        device=cfg.device,
        autocast=cfg.autocast,
        n_checkpoints=cfg.n_checkpoints,
        checkpoint_path=str(_checkpoints(cfg)),
    )


def _checkpoints(cfg: TrainConfig) -> Path:
    return Path(cfg.output) / "checkpoints"


def _claim_folder(cfg: TrainConfig) -> None:
    """Write the configuration down, or compare it with the one of the run that is there."""
    path = Path(cfg.output) / RUNNER_CFG_FILENAME
    mine = {name: value for name, value in asdict(cfg).items() if name != "output"}
    if path.exists():
        theirs = json.loads(path.read_text())
        different = [name for name in mine if mine[name] != theirs.get(name)]
        if different:
            raise ValueError(
                f"{cfg.output} holds another run, with other {', '.join(different)}: "
                "choose another output folder or delete that one"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2))


def _complete(cfg: TrainConfig, checkpoint_path: Path | None) -> None:
    """Mark a checkpoint as whole, as SAELens' runner does, and drop the older ones."""
    assert checkpoint_path is not None
    (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(asdict(cfg)))
    for other in checkpoint_path.parent.iterdir():
        if other != checkpoint_path:
            shutil.rmtree(other)


def _resume(cfg: TrainConfig, trainer: SAETrainer[Any, Any]) -> None:
    complete = list(_checkpoints(cfg).glob(f"*/{RUNNER_CFG_FILENAME}"))
    if not complete:
        return
    checkpoint = max((path.parent for path in complete), key=lambda path: int(path.name))
    try:
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be read, it is truncated or not of this run "
            f"({error}): delete it to start over"
        ) from error
    # SAETrainer takes its periodic checkpoints before it counts the step they belong to.
    trainer.n_training_steps = trainer.n_training_samples // cfg.batch_size
    trainer.checkpoint_thresholds = [
        threshold
        for threshold in trainer.checkpoint_thresholds
        if threshold > trainer.n_training_samples
    ]
    for _ in tqdm(range(trainer.n_training_steps), desc="Replaying the batches already seen"):
        next(trainer.data_provider)


def _until(stop: threading.Event, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The batches, until somebody asks to stop: between two steps, where the state is whole."""
    for batch in batches:
        if stop.is_set():
            raise Interrupted("training interrupted; run the same command again to resume")
        yield batch


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the step in progress, a second one everything at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, handlers[signal.Signals(number)])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _save(cfg: TrainConfig, trainer: SAETrainer[Any, Any]) -> MxD:
    """The layer in SAELens' inference format, under its name only once it is whole."""
    unfinished = Path(cfg.output) / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer.sae.save_inference_model(unfinished)
    save_file({"sparsity": trainer.log_feature_sparsity}, unfinished / SPARSITY_FILENAME)
    unfinished.replace(cfg.layer_path)
    shutil.rmtree(_checkpoints(cfg), ignore_errors=True)
    return MxD.load_from_disk(cfg.layer_path, device=cfg.device)
