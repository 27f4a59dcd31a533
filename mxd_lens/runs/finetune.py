"""Train layers that are in place together on what the original model predicts: end to end.

Alone, each layer is trained on the original's activations; together, each reads what the others
have made of the residual stream. The language model is frozen, and each layer keeps its k.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import SAE
from safetensors.torch import load_model, save_model
from simple_parsing import field as argument
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from mxd_lens.analysis.in_model import divergences
from mxd_lens.analysis.joint import evaluate_jointly, hooks_in_place, sites_of
from mxd_lens.data.activations import activations_store
from mxd_lens.data.reading import read_heldout
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, NotNegative, PathStr, Positive, config
from mxd_lens.files import claim, locked, read_json, whole, write_json
from mxd_lens.layers.base import pair_loss
from mxd_lens.models.site import Site
from mxd_lens.runs.claims import check_sources
from mxd_lens.runs.config import TrainConfig, values
from mxd_lens.runs.replacement import Choice, chosen_runs
from mxd_lens.runs.results import load_layer
from mxd_lens.runs.train import Stopped, stopping

SETTINGS_FILENAME = "finetune.json"
"""Of the output folder: what decides the layers."""
CHECKPOINTS = "checkpoints"
"""Where an interrupted run goes on from: a folder for the step it has come to."""
TUNED_FILENAME = "finetuned.json"
"""`evaluate_jointly` of all layers ``before`` and ``after``, and ``meaning_kept``."""
TO_KEEP = 0.9
"""Of ``share`` and of the experts that are alive: how much tuning has to leave."""


@config
class FinetuneConfig(Choice):
    """Train layers that are in place together on what the original model predicts.

    Example: mxd-lens finetune runs/all --architecture mxd --output runs/all-tuned
    """

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train` or `compare` with layers of several MLPs."""
    output: PathStr
    """Folder of the tuned layers, read by all that reads RUN's. The same command resumes."""
    training_tokens: Count = 500_000
    """Tokens to train on; a shorter text is repeated."""
    lr: Positive = 1e-4
    """Peak learning rate, after a tenth of the steps; it falls to zero."""
    lm_batch_size: Count = 8
    """Sequences per step."""
    reconstruction: NotNegative = 0.0
    """Weight of each layer's own loss on the original's activations, beside the KL divergence."""


def run_finetune(cfg: FinetuneConfig, model: Any = None, dataset: Text | None = None) -> Path:
    """Tune the layers of a folder; resume, or do nothing where that is done.

    Returns:
        ``finetuned.json`` in ``cfg.output``, which has a folder for each layer, as a comparison.

    Raises:
        ValueError: no such layers, or an output folder of something else.
        Interrupted: a signal came; the same call goes on.
    """
    folder = Path(cfg.output)
    runs = chosen_runs(cfg.run, **cfg.chosen)
    settings = values(cfg, ("training_tokens", "lr", "lm_batch_size", "reconstruction"))
    settings["runs"] = [str(Path(run.output).resolve()) for run in runs]
    path = folder / TUNED_FILENAME
    with locked(folder):
        claim(folder, SETTINGS_FILENAME, settings, (CHECKPOINTS, TUNED_FILENAME))
        done = read_json(path, dict[str, Any]) or {}
        if "after" in done:
            return path
        first = runs[0]
        dataset = first.load() if dataset is None else dataset
        train, heldout = first.documents(dataset)
        model = first.load_model() if model is None else model
        check_sources(runs, model, dataset)
        layers = {run.layer: load_layer(run.layer_path, run.device) for run in runs}
        options = {"n_sequences": 64, "n_tokens": 64 * first.context_size}
        site = Site.at(model, first.layer)
        tokens = read_heldout(site, heldout, **options, **first.reading_heldout).in_model
        if "before" not in done:
            done["before"] = evaluate_jointly(model, layers, tokens, [sorted(layers)])
            write_json(path, done)
        tuning = Tuning(cfg, model, layers, first)
        tuning.fit(train, folder / CHECKPOINTS)
        for run in runs:
            _save(run, layers[run.layer], folder / Path(run.output).name)
        done["after"] = evaluate_jointly(model, layers, tokens, [sorted(layers)])
        done["meaning_kept"] = meaning_kept(done["before"], done["after"])
        write_json(path, done)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return path


def meaning_kept(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    """False if the experts of tuned layers carry less: by `evaluate_jointly`, the share that is
    theirs, or how many are alive, has fallen below `TO_KEEP` of what it was. None of layers without
    experts."""
    if before["share"] is None:
        return None

    def alive(measured: Mapping[str, Any]) -> float:
        return sum(of_layer["alive_fraction"] or 0.0 for of_layer in measured["in_place"])

    return after["share"] >= TO_KEEP * before["share"] and alive(after) >= TO_KEEP * alive(before)


def _save(run: TrainConfig, sae: SAE[Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    shutil.copy2(Path(run.output) / RUNNER_CFG_FILENAME, folder / RUNNER_CFG_FILENAME)
    shutil.rmtree(folder / "layer", ignore_errors=True)
    with whole(folder / "layer") as unfinished:
        sae.save_model(unfinished)


class Tuning:
    """Layers, in place together, and their optimizer.

    Args:
        layers: by MLP; trained in place.
        reading: a run whose context size and precision the model is read with.
    """

    def __init__(
        self, cfg: FinetuneConfig, model: Any, layers: Mapping[int, SAE[Any]], reading: TrainConfig
    ):
        self.cfg: FinetuneConfig = cfg
        self.model: Any = model
        self.layers: Mapping[int, SAE[Any]] = layers
        self.reading: TrainConfig = reading
        self.sites: dict[int, Site] = sites_of(model, layers)
        self.parameters: list[nn.Parameter] = [
            p for sae in layers.values() for p in sae.parameters()
        ]
        self.optimizer: torch.optim.Adam = torch.optim.Adam(self.parameters, lr=cfg.lr, fused=True)
        self.step: int = 0
        self.steps: int = max(1, cfg.training_tokens // (cfg.lm_batch_size * reading.context_size))
        warm_up = max(1, self.steps // 10)
        self.schedule: LambdaLR = LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm_up, 1 - step / self.steps)
        )

    def fit(self, text: Text, checkpoints: Path) -> None:
        """Train on the text, from the newest checkpoint if there is one; raises Interrupted when a
        signal comes, a checkpoint written."""
        self._load(checkpoints)
        store = activations_store(
            list(self.sites.values()),
            text,
            context_size=self.reading.context_size,
            batch_size=self.cfg.lm_batch_size * self.reading.context_size,
            lm_batch_size=self.cfg.lm_batch_size,
            autocast_lm=False,
        )
        for _ in range(self.step):
            store.get_batch_tokens(move_to_model_device=False)
        stop: list[int] = []
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            with (
                stopping(stop),
                tqdm(desc="Tuning", total=self.steps, initial=self.step, unit="step") as progress,
            ):
                while self.step < self.steps:
                    kl = self.train_on(store.get_batch_tokens())
                    progress.set_postfix(kl=f"{kl:.4f}")
                    progress.update()
                    if stop:
                        self._save(checkpoints)
                        raise Stopped("tuning interrupted; the same command goes on", stop[0])
                    if self.step % max(1, self.steps // 10) == 0:
                        self._save(checkpoints)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def train_on(self, tokens: Int[Tensor, "batch pos"]) -> float:
        """One step; the mean KL divergence before it, in nats per token."""
        site = next(iter(self.sites.values()))
        kept = site.non_special(tokens)
        pairs = [(site, self.layers[n]) for n, site in self.sites.items()]
        hooks = [hook for of_layer in pairs for hook in hooks_in_place(*of_layer, kept)]
        names = [hook for of_site in self.sites.values() for hook in of_site.hooks]
        lower = torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.reading.autocast)
        with lower:
            with torch.no_grad():
                original, cache = self.model.run_with_cache(
                    tokens, names_filter=names if self.cfg.reconstruction else [], prepend_bos=False
                )
            logits = self.model.run_with_hooks(tokens, fwd_hooks=hooks)
            counted = kept[:, 1:].cpu()
            kl = (divergences(original, logits) * counted).sum() / counted.sum()
            loss = kl
            if self.cfg.reconstruction:
                losses = []
                for of_site, sae in pairs:
                    x, y = (cache[hook][kept].float() for hook in of_site.hooks)
                    losses.append(pair_loss(sae(x), y))
                loss = kl + self.cfg.reconstruction * torch.stack(losses).mean().cpu()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        return kl.item()

    def _save(self, folder: Path) -> None:
        before = _checkpoints(folder)
        with whole(folder / str(self.step)) as unfinished:
            unfinished.mkdir()
            for n, sae in self.layers.items():
                save_model(sae, str(unfinished / f"layer{n}.safetensors"))
            state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
            torch.save(state | {"schedule": self.schedule.state_dict()}, unfinished / "state.pt")
        for path in before:
            if path.name != str(self.step):
                shutil.rmtree(path)

    def _load(self, folder: Path) -> None:
        if not (found := _checkpoints(folder)):
            return
        state = torch.load(found[-1] / "state.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        for n, sae in self.layers.items():
            load_model(sae, found[-1] / f"layer{n}.safetensors")


def _checkpoints(folder: Path) -> list[Path]:
    """The newest last."""
    found = [path.parent for path in folder.glob("*/state.pt") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))
