"""Train layers on a language model with SAELens' trainers: text in, layers on disk out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.data.activations import NonFiniteActivations, Reader, activations_store
from mxd_lens.data.cache import Cached, fill
from mxd_lens.data.stream import Part, Stream
from mxd_lens.data.text import Text
from mxd_lens.files import locked, whole
from mxd_lens.layers import answers, config_class, layer_of, width_for
from mxd_lens.layers.base import check_k
from mxd_lens.models.site import Site
from mxd_lens.models.splice import has_folded_norms
from mxd_lens.ranks import Ranks
from mxd_lens.runs.checkpoints import drop_checkpoints, newest_checkpoint, own_checkpoints
from mxd_lens.runs.claims import check_sources, claim_folder
from mxd_lens.runs.config import RunConfig, TrainConfig, field_names, settings, values
from mxd_lens.runs.fingerprint import model_fingerprint, text_fingerprint
from mxd_lens.runs.plan import Job, Member, Plan, free_memory, make_plan, memory
from mxd_lens.runs.results import load_layer
from mxd_lens.runs.trainer import Lockstep, RunTrainer
from mxd_lens.startup import Interrupted, handling

N_CHECKPOINTS = 3
"""Checkpoints on the way; the newest is kept until the run is done."""


def train(cfg: TrainConfig, model: Any = None, dataset: Text | None = None) -> SAE[Any]:
    """Train a layer, or resume or load what `cfg.output` already holds of this very run.

    Arguments and errors are `train_many`'s.

    Returns:
        The trained layer, also at ``cfg.layer_path`` in SAELens' format.
    """
    train_many([cfg], model, dataset)
    return load_layer(cfg.layer_path, cfg.device)


def train_many(runs: Sequence[TrainConfig], model: Any = None, dataset: Text | None = None) -> None:
    """Train the layers of several runs from one pass of the language model over their text.

    Each layer is, to the bit, the one that its run alone would have trained, and so are the files
    in its folder, with which each run is resumed or reused, in whatever company. A resumed run
    passes by what it has seen: the model reads only what is in the buffer at that step.

    Under ``torchrun`` every rank reads its share of the text, and runs are dealt to ranks; where
    there are fewer runs than ranks, some share the batches of one, whose sums then have another
    order.

    Args:
        runs: which differ in layer, architecture and its options, k, learning rate, seed and
            folder only.
        model: the loaded model, instead of loading ``cfg.model``.
        dataset: documents in a column ``text``, or sequences of tokens in ``input_ids``, instead of
            loading ``cfg.dataset``.

    Raises:
        ValueError: anything about model, layers, text or configuration that cannot work, too
            little memory for one layer, an output folder of another run or process, a run that
            was begun with another model or text, or a checkpoint that cannot be read.
        OSError: the disk is full; the runs can be resumed.
        Interrupted: a signal came; the runs can be resumed.
    """
    _check_together(runs)
    # Nobody can be at work in the folder of a finished run that cannot be written to.
    runs = [run for run in runs if not run.finished or os.access(run.output, os.W_OK)]
    ranks = Ranks.here()
    if ranks.world > 1 and any(torch.device(run.device).index is not None for run in runs):
        raise ValueError("under torchrun each rank has a GPU of its own: say --device cuda")
    with ExitStack() as stack:
        for run in runs if ranks.first else ():
            stack.enter_context(locked(Path(run.output)))
            claim_folder(run, write=False)
            if not run.finished and os.path.lexists(run.layer_path):
                raise ValueError(f"{run.layer_path} is no layer, it has no cfg.json: move it away")
            own_checkpoints(_checkpoints(run), settings(run))
        finished = ranks.agree([run.finished for run in runs])
        if all(finished):
            if runs and dataset is None and Path(runs[0].dataset).exists():
                dataset = runs[0].load()
            if ranks.first:
                check_sources(runs, model, dataset)
            for run in runs if ranks.first else ():
                drop_checkpoints(_checkpoints(run), settings(run))
            return
        cfg = runs[0]
        dataset = cfg.load() if dataset is None else dataset
        if model is None:
            model = cfg.load_model()
        if torch.device(cfg.device).type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True  # what is float32 under autocast, too
        sites = {layer: Site.at(model, layer) for layer in sorted({run.layer for run in runs})}
        for run in runs:
            check_layer(run, sites[run.layer])
        for run in runs if ranks.first else ():
            claim_folder(run)
        if ranks.first:
            check_sources(runs, model, dataset)
        ranks.wait()
        runs = [run for run, is_there in zip(runs, finished, strict=True) if not is_there]
        free = min(ranks.gather(free_memory(cfg.device)))
        plan = plan_for(runs, sites, ranks.world, free)
        if ranks.first and len(runs) > 1:
            print(plan, flush=True)
        for passed in plan.passes:
            _train_together(
                [(runs[i], of_run) for i, of_run in passed.items()], sites, dataset, ranks
            )


def _check_together(runs: Sequence[TrainConfig]) -> None:
    shared = sorted(field_names(RunConfig) - {"output"} | {"activations"})
    for run in runs[1:]:
        if different := [name for name in shared if getattr(run, name) != getattr(runs[0], name)]:
            raise ValueError(
                f"{run.output} and {runs[0].output} differ in {', '.join(different)}: what is "
                "trained together shares those"
            )
    if len({Path(run.output).resolve() for run in runs}) < len(runs):
        raise ValueError("runs that are trained together need a folder each")


def plan_for(
    runs: Sequence[TrainConfig], sites: Mapping[int, Site], world: int = 1, free: int | None = None
) -> Plan:
    """What training these runs together takes, and who does what, see `make_plan`.

    Args:
        world: ranks.
        free: bytes on each rank's device; by default what is free here.
    """
    jobs = []
    for run in runs:
        layer = check_layer(run, sites[run.layer])
        sizes = [parameter.numel() for parameter in layer.parameters()]
        asked = layer_of(layer)
        jobs.append(
            Job(
                layer=run.layer,
                seed=run.seed,
                n_parameters=sum(sizes),
                largest=max(sizes),
                d_sae=layer.cfg.d_sae,
                can_share=asked.splits_batches,
                dense_width=asked.dense_width,
            )
        )
    cfg, d_model = runs[0], int(next(iter(sites.values())).model.cfg.d_model)
    taken = partial(
        memory,
        cfg=cfg,
        d_pair=2 * d_model,
        n_layers=len(sites),
        itemsize=cfg.pair_dtype.itemsize,
        cached=cfg.activations is not None,
        n_seeds=len({run.seed for run in runs}),
        world=world,
    )
    return make_plan(jobs, taken, free_memory(cfg.device) if free is None else free, world)


def _train_together(
    members: Sequence[tuple[TrainConfig, Member]],
    sites: Mapping[int, Site],
    dataset: Text,
    ranks: Ranks,
) -> None:
    """Train runs that fit into memory together, each by the ranks that are its members."""
    cfg, _ = members[0]
    sites = {layer: sites[layer] for layer in sorted({run.layer for run, _ in members})}
    first = ranks.agree(min(_steps_done(run) for run, _ in members))
    groups = [ranks.group(of_run) if len(of_run) > 1 else None for _, of_run in members]
    mine = [
        (run, of_run, group, Part(run.layer, run.seed, of_run.index(ranks.rank), len(of_run)))
        for (run, of_run), group in zip(members, groups, strict=True)
        if ranks.rank in of_run
    ]
    parts = sorted({part for *_, part in mine})
    batches: Stream | Cached
    if cfg.activations is None:
        of_ranks = [
            {run.layer for run, of_run in members if n in of_run} for n in range(ranks.world)
        ]
        needs = [sorted(of_rank) for of_rank in of_ranks]
        reader = _reader(cfg, list(sites.values()), dataset, needs, ranks)
        batches = Stream(reader, parts, first, {run.seed for run, _ in members})
    else:
        fill_activations(cfg, cfg.activations, sites, dataset, ranks)
        folders = {layer: of_layer(cfg.activations, layer) for layer in sites}
        sizes = {"n_tokens": cfg.steps * cfg.batch_size, "batch_size": cfg.batch_size}
        batches = Cached(folders, parts, first=first, **sizes)

    trainers, parts_of = {}, {}
    for run, of_run, group, part in mine:
        sae = _begun(run, sites[run.layer], None if _steps_done(run) else batches.sample(part))
        trainer = RunTrainer(_trainer_config(run), sae, settings(run), of_run, group)
        trainer.resume(first)
        trainers[run.output], parts_of[run.output] = trainer, part
    stop: list[int] = []
    ahead = cfg.llm_device is not None and ranks.world == 1  # several take turns in exchanging
    source: Any = PrefetchingIterator(batches, prefetch=2) if ahead else batches
    lockstep = Lockstep(
        _trainer_config(cfg), trainers, parts_of, _until(stop, source, ranks), first
    )
    try:
        with stopping(stop), closing(source) if ahead else nullcontext():
            lockstep.fit()
    except (Stopped, NonFiniteActivations):
        lockstep.save_checkpoint(str(lockstep.n_training_samples))
        raise
    finished = {run.output: _save(run, trainers[run.output]) for run, *_ in mine}
    every = {name: saved for of_rank in ranks.gather(finished) for name, saved in of_rank.items()}
    if diverged := [run for run, _ in members if not every[run.output]]:
        raise ValueError(
            "training diverged, weights are not finite: lower lr of "
            + ", ".join(f"{run.output} ({run.peak_lr})" for run in diverged)
        )


def _begun(run: TrainConfig, site: Site, sample: Tensor | None) -> TrainingSAE[Any]:
    """The layer that training starts with; no sample: that a checkpoint will be loaded into."""
    torch.manual_seed(run.seed)
    sae = new_layer(run, site, run.device)
    sae.cfg.metadata.norms_folded = has_folded_norms(site.model)
    if sample is not None:
        mlp = site.mlp.shape
        x, y = sample.to(run.device).split([mlp.d_in, mlp.d_out], dim=-1)
        layer_of(sae).init_from(site.mlp, x, y)
    return sae


def _save(run: TrainConfig, trainer: RunTrainer) -> bool:
    """Write the layer in SAELens' inference format; False if its weights are not finite."""
    if not all(p.isfinite().all() for p in trainer.sae.parameters()):
        return False
    trainer.sae.eval()
    if trainer.writes:
        with whole(run.layer_path) as unfinished:
            trainer.sae.save_inference_model(unfinished)
            sparsity = {"sparsity": trainer.log_feature_sparsity}
            save_file(sparsity, unfinished / SPARSITY_FILENAME)
        drop_checkpoints(_checkpoints(run), settings(run))
    return True


def _steps_done(run: TrainConfig) -> int:
    """By the newest checkpoint."""
    newest = newest_checkpoint(_checkpoints(run), settings(run))
    return int(newest.name) // run.batch_size if newest else 0


def fill_activations(
    cfg: RunConfig,
    folder: str | Path,
    sites: Mapping[int, Site],
    dataset: Text | None = None,
    ranks: Ranks | None = None,
) -> None:
    """One pass of the language model: the activations of the runs' training tokens, on disk.

    Raises:
        ValueError: as `train_many` does, or the folder holds those of another model or text.
    """
    if (Path(folder) / "cfg.json").exists():
        raise ValueError(f"{folder} holds something else than cached activations: name another")
    ranks = ranks or Ranks.here()
    dataset = cfg.load() if dataset is None else dataset
    decisive = "model dataset dataset_split text_column context_size lm_batch_size"
    decisive += " heldout_documents model_class autocast dtype"
    source = values(cfg, decisive.split())
    source["model_fingerprint"] = model_fingerprint(next(iter(sites.values())).model)
    source["text_fingerprint"] = text_fingerprint(dataset)
    mine = sorted(sites)[ranks.rank :: ranks.world]

    def open_reader(needs: Sequence[Sequence[int]]) -> Reader:
        missing = [sites[layer] for layer in sorted({n for of_rank in needs for n in of_rank})]
        return _reader(cfg, missing, dataset, needs, ranks)

    folders = {layer: of_layer(folder, layer) for layer in mine}
    fill(folders, open_reader, cfg.steps * cfg.batch_size, source, ranks)
    ranks.wait()


def of_layer(folder: str | Path, layer: int) -> Path:
    """Where a folder of activations keeps a layer's."""
    return Path(folder) / f"layer{layer}"


def _reader(
    cfg: RunConfig,
    sites: Sequence[Site],
    dataset: Text,
    needs: Sequence[Sequence[int]],
    ranks: Ranks,
) -> Reader:
    store = activations_store(
        sites,
        cfg.documents(dataset)[0],
        context_size=cfg.context_size,
        batch_size=cfg.batch_size,
        lm_batch_size=cfg.lm_batch_size,
        autocast_lm=cfg.autocast,
    )
    return Reader(store, sites, needs, device=cfg.device, dtype=cfg.pair_dtype, ranks=ranks)


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


def check_layer(cfg: TrainConfig, site: Site) -> TrainingSAE[Any]:
    """The layer of `new_layer` without its weights; raises likewise."""
    with torch.device("meta"):
        return new_layer(cfg, site, "meta")


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


class Stopped(Interrupted):
    """Between two steps, where the state is whole."""


def _until(stop: list[int], batches: Iterator[Any], ranks: Ranks) -> Iterator[Any]:
    """The batches, until a signal has come to any rank."""
    for batch in batches:
        if number := ranks.largest(stop[0] if stop else 0):
            raise Stopped("training interrupted; run the same command again to resume", number)
        yield batch


@contextmanager
def stopping(stop: list[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the step in progress, a second one everything at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: Any) -> None:
        stop.append(number)
        signal.signal(number, before[signal.Signals(number)])

    with handling(dict.fromkeys(before, handle)):
        yield
