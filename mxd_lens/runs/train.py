"""Train a layer on a language model with SAELens' trainer: text in, a layer on disk out."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.data.activations import (
    NonFiniteActivations,
    activations_store,
    cache_pairs,
    cached_pairs,
    pairs,
)
from mxd_lens.data.text import Text
from mxd_lens.files import locked, whole
from mxd_lens.layers.matching import matched_d_sae
from mxd_lens.layers.mlp import MLPShape, read_mlp
from mxd_lens.layers.mxd import TrainingMxD
from mxd_lens.layers.sae import SparseTopKTrainingSAE
from mxd_lens.models.load import load_model
from mxd_lens.models.site import mlp_hooks
from mxd_lens.models.splice import get_mlp, has_folded_norms
from mxd_lens.runs.checkpoints import CheckpointedTrainer, drop_checkpoints, own_checkpoints
from mxd_lens.runs.claims import check_sources, claim_folder
from mxd_lens.runs.config import (
    RunConfig,
    TrainConfig,
    check_k,
    field_names,
    learning_rate,
    load_dataset,
    load_documents,
    settings,
)
from mxd_lens.runs.fingerprint import model_fingerprint, text_fingerprint
from mxd_lens.runs.results import load_layer
from mxd_lens.startup import Interrupted


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
    known = {name: values[name] for name in values.keys() & field_names(cfg_class)}
    layer_cfg = cfg_class(**(known | json.loads(cfg.sae_options)))
    check_k(cfg, getattr(layer_cfg, "k", 1), layer_cfg.d_sae)
    return layer_cfg


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
    return "d_out" in field_names(SAE_TRAINING_CLASS_REGISTRY[architecture][1])


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
