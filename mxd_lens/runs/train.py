"""Train a layer on a language model with SAELens' trainer: text in, a layer on disk out."""

from __future__ import annotations

import json
import os
import signal
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
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
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
from mxd_lens.layers import answers, config_class, layer_of, width_for
from mxd_lens.layers.base import check_k
from mxd_lens.models.load import load_model
from mxd_lens.models.site import Site
from mxd_lens.models.splice import has_folded_norms
from mxd_lens.runs.checkpoints import CheckpointedTrainer, drop_checkpoints, own_checkpoints
from mxd_lens.runs.claims import check_sources, claim_folder
from mxd_lens.runs.config import RunConfig, TrainConfig, field_names, settings, values
from mxd_lens.runs.fingerprint import model_fingerprint, text_fingerprint
from mxd_lens.runs.results import load_layer
from mxd_lens.startup import Interrupted, handling

N_CHECKPOINTS = 3
"""Checkpoints on the way; the newest is kept until the run is done."""


def train(cfg: TrainConfig, model: Any = None, dataset: Text | None = None) -> SAE[Any]:
    """Train a layer, or resume or load what `cfg.output` already holds of this very run.

    Args:
        model: the loaded model, instead of loading ``cfg.model``.
        dataset: documents in a column ``text``, instead of loading ``cfg.dataset``.

    Returns:
        The trained layer, also at ``cfg.layer_path`` in SAELens' format. A resumed run passes
        the batches already seen by, so that its weights are an uninterrupted one's; without
        ``cfg.activations`` the model reads that text again.

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
                dataset = cfg.load()
            check_sources(cfg, model, dataset)
            drop_checkpoints(_checkpoints(cfg), settings(cfg))
            return load_layer(cfg.layer_path, cfg.device)
        if os.path.lexists(cfg.layer_path):
            raise ValueError(f"{cfg.layer_path} is no layer, it has no cfg.json: move it away")
        own_checkpoints(_checkpoints(cfg), settings(cfg))
        dataset = cfg.load() if dataset is None else dataset
        if model is None:
            model = load_model(cfg.model, cfg.model_class, cfg.device)
        site = Site.at(model, cfg.layer)
        check_layer(cfg, site)
        claim_folder(cfg)
        check_sources(cfg, model, dataset)
        return _train(cfg, site, dataset)


def _train(cfg: TrainConfig, site: Site, dataset: Text) -> SAE[Any]:
    if cfg.activations is None:
        torch.manual_seed(cfg.seed)
        batches = pairs(_store(cfg, site, cfg.documents(dataset)[0]), site)
    else:
        fill_activations(cfg, cfg.activations, site, dataset)
        n_tokens = cfg.steps * cfg.batch_size
        batches = cached_pairs(Path(cfg.activations), n_tokens, cfg.batch_size, cfg.seed)
    sample = list(islice(batches, 8))
    batches = chain(sample, batches)
    torch.manual_seed(cfg.seed)
    sae = new_layer(cfg, site, cfg.device)
    sae.cfg.metadata.norms_folded = has_folded_norms(site.model)
    mlp = site.mlp.shape
    x, y = torch.cat(sample).to(cfg.device).split([mlp.d_in, mlp.d_out], dim=-1)
    layer_of(sae).init_from(site.mlp, x, y)
    if not answers(cfg.architecture).reads_input:
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
        raise ValueError(f"training diverged: weights are not finite; lower lr={cfg.peak_lr}")
    sae.eval()
    with whole(cfg.layer_path) as unfinished:
        sae.save_inference_model(unfinished)
        save_file({"sparsity": trainer.log_feature_sparsity}, unfinished / SPARSITY_FILENAME)
    drop_checkpoints(_checkpoints(cfg), settings(cfg))
    return load_layer(cfg.layer_path, cfg.device)


def fill_activations(
    cfg: RunConfig, folder: str | Path, site: Site, dataset: Text | None = None
) -> None:
    """One pass of the language model: the activations of the run's training tokens, on disk.

    Raises:
        ValueError: as `train` does, or the folder holds those of another model, layer or text.
    """
    dataset = cfg.load() if dataset is None else dataset
    decisive = "model layer dataset dataset_split text_column context_size lm_batch_size"
    decisive += " heldout_documents model_class autocast"
    source = values(cfg, decisive.split())
    source["model_fingerprint"] = model_fingerprint(site.model)
    source["text_fingerprint"] = text_fingerprint(dataset)
    store = _store(cfg, site, cfg.documents(dataset)[0])
    cache_pairs(Path(folder), store, site, cfg.steps * cfg.batch_size, source)


def _store(cfg: RunConfig, site: Site, documents: Text) -> Any:
    return activations_store(
        site,
        documents,
        context_size=cfg.context_size,
        batch_size=cfg.batch_size,
        lm_batch_size=cfg.lm_batch_size,
        device=cfg.device,
        autocast_lm=cfg.autocast,
    )


def new_layer(cfg: TrainConfig, site: Site, device: str) -> TrainingSAE[Any]:
    """A layer of the run's architecture for this MLP, at random weights; ValueError if none."""
    layer, cfg_class = answers(cfg.architecture), config_class(cfg.architecture)
    mlp = site.mlp.shape
    known = asdict(mlp) | {
        "d_in": mlp.d_in if layer.reads_input else mlp.d_out,
        "d_sae": cfg.d_sae or width_for(cfg.architecture, mlp, cfg.expansion),
        "k": cfg.k,
        "device": device,
        "metadata": SAEMetadata(
            model_name=cfg.model,
            model_class_name=cfg.model_class,
            hook_name=site.hook_in if layer.reads_input else site.hook_out,
            hook_name_out=site.hook_out if layer.reads_input else None,
            hook_layer=cfg.layer,
            context_size=cfg.context_size,
            prepend_bos=True,
            exclude_special_tokens=True,
            dataset_path=cfg.dataset,
            training_tokens=cfg.steps * cfg.batch_size,
        ),
    }
    fields = field_names(cfg_class)
    own = {name: value for name, value in known.items() if name in fields}
    layer_cfg = cfg_class(**(own | json.loads(cfg.sae_options)))
    check_k(getattr(layer_cfg, "k", 1), layer_cfg.d_sae)
    return layer.training_class()(layer_cfg)


def check_layer(cfg: TrainConfig, site: Site) -> None:
    """Raise the ValueError of `new_layer`, if any, without allocating a layer."""
    with torch.device("meta"):
        new_layer(cfg, site, "meta")


def _trainer_config(cfg: TrainConfig) -> SAETrainerConfig:
    warm_up, decay = cfg.warm_up_and_decay
    return SAETrainerConfig(
        total_training_samples=cfg.steps * cfg.batch_size,
        train_batch_size_samples=cfg.batch_size,
        lr=cfg.peak_lr,
        lr_end=cfg.peak_lr,
        lr_warm_up_steps=warm_up,
        lr_decay_steps=decay,
        device=cfg.device,
        autocast=cfg.autocast,
        n_checkpoints=N_CHECKPOINTS,
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
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: Any) -> None:
        stop.append(number)
        signal.signal(number, before[signal.Signals(number)])

    with handling(dict.fromkeys(before, handle)):
        yield
