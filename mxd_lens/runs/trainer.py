"""SAELens' trainers, for runs that go side by side and that are resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from mxd_lens.data.stream import Part
from mxd_lens.files import whole, write_json
from mxd_lens.layers import layer_of
from mxd_lens.runs.checkpoints import drop_checkpoints, newest_checkpoint, own_checkpoints


class RunTrainer(SAETrainer[Any, Any]):
    """SAELens' trainer of one run, driven by `Lockstep`: keeps the newest of its checkpoints, and
    can start from it.

    Args:
        settings: of the run; its checkpoints hold them, and are known by them.
        members: ranks that share each batch, this one among them. All have the same weights and
            statistics; the first of them writes.
    """

    n_training_steps: int
    n_training_samples: int
    act_freq_scores: Float[Tensor, "d_sae"]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        settings: dict[str, Any],
        members: Sequence[int] = (0,),
        group: Any = None,
    ):
        super().__init__(cfg, sae, iter(()))
        self.folder: Path = Path(str(cfg.checkpoint_path))
        self.settings = settings
        self.ahead: int = 0
        """Batches to come that it has seen already."""
        self.members: Sequence[int] = members
        self.group: Any = group
        self.writes: bool = len(members) == 1 or dist.get_rank() == members[0]
        self.reads_input: bool = layer_of(sae).reads_input
        self.optimizer.param_groups[0]["fused"] = True  # the same Adam in a third of the time
        if len(members) > 1:
            for tensor in sae.state_dict().values():
                dist.broadcast(tensor, members[0], group)
            for parameter in sae.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._sum_gradients)

    def resume(self, first: int) -> None:
        """Go on from the newest checkpoint, if there is one, where batches come from ``first`` on;
        ValueError if it cannot be read."""
        if (checkpoint := newest_checkpoint(self.folder, self.settings)) is None:
            return
        try:
            self.load_trainer_state(checkpoint)
            self.sae.load_weights_from_checkpoint(checkpoint)
        except Exception as error:
            raise ValueError(
                f"the checkpoint {checkpoint} cannot be read, it is truncated or not of this run "
                f"({error}): delete it to start over"
            ) from error
        batch_size = self.cfg.train_batch_size_samples
        self.ahead = self.n_training_samples // batch_size - first
        self.n_training_steps, self.n_training_samples = first, first * batch_size

    def step(self, batch: Float[Tensor, "rows d_pair"]) -> TrainStepOutput | None:  # type: ignore[override]
        """A training step on this rank's rows of a batch; None for one that it has seen."""
        self.n_training_samples += self.cfg.train_batch_size_samples
        if self.ahead:
            self.ahead -= 1
            return None
        self._share = len(batch) / self.cfg.train_batch_size_samples
        output = super().step(batch if self.reads_input else batch[:, -self.sae.cfg.d_in :])
        self.n_training_samples -= len(batch)  # which SAETrainer has added
        return output

    def full_sparsity_window_log(self) -> dict[str, Any]:
        """As SAETrainer's; nothing of batches that it has seen, or that were counted before a stop
        at the end of the window."""
        counted = self.n_frac_active_samples > 0
        return super().full_sparsity_window_log() if counted and not self.ahead else {}

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Save a checkpoint under its name once it is whole, and drop the older ones; OSError if it
        cannot be written. One that is still ahead has its own already."""
        if self.ahead or not self.writes:
            return
        path = self.folder / checkpoint_name
        if path not in own_checkpoints(self.folder, self.settings):  # else of this very step
            with whole(path) as unfinished:
                super().save_checkpoint(unfinished.name, unfinished.parent, wandb_aliases)
                write_json(unfinished / RUNNER_CFG_FILENAME, self.settings)
        drop_checkpoints(self.folder, self.settings, keep=path)

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        if len(self.members) == 1:
            return super()._train_step(sae, sae_in)
        before = self.act_freq_scores.clone()
        output = super()._train_step(sae, sae_in)
        fired = self.act_freq_scores - before
        dist.all_reduce(fired, group=self.group)
        self.act_freq_scores = before + fired
        self.n_forward_passes_since_fired[fired > 0] = 0
        return output

    def _sum_gradients(self, parameter: Tensor) -> None:
        """Within the backward pass, and so before gradients are clipped."""
        assert parameter.grad is not None
        parameter.grad *= self._share
        dist.all_reduce(parameter.grad, group=self.group)


class Lockstep(MultiSAETrainer):
    """SAELens' coordinator of many trainers, each with a configuration and checkpoints of its own.

    Args:
        cfg: how long, and when checkpoints are due.
        trainers: by run; none on a rank that only reads.
        parts: by run, which of the batches it trains on.
        batches: from the one numbered ``first`` on.
    """

    trainers: dict[str, SAETrainer[Any, Any]]
    n_training_steps: int
    n_training_samples: int
    checkpoint_thresholds: list[int]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        trainers: Mapping[str, RunTrainer],
        parts: Mapping[str, Part],
        batches: Iterator[dict[Part, Tensor]],
        first: int = 0,
    ):
        saes: dict[str, Any] = {name: trainer.sae for name, trainer in trainers.items()}
        hooks: Any = dict(parts)  # which SAELens only looks up in a batch
        super().__init__(cfg, saes, hooks, batches)  # type: ignore[arg-type]
        self.trainers = dict(trainers)
        self.n_training_steps = first
        self.n_training_samples = done = first * cfg.train_batch_size_samples
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n > done]
        for trainer in trainers.values():
            trainer.n_training_steps, trainer.n_training_samples = first, done

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train all on the batches that are left."""
        if self.trainers:
            return super().fit()
        for _ in range(
            self.n_training_samples,
            self.cfg.total_training_samples,
            self.cfg.train_batch_size_samples,
        ):
            next(self.data_provider)
        return {}

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """One of every run, in its own folder."""
        for trainer in self.trainers.values():
            trainer.save_checkpoint(checkpoint_name, wandb_aliases=wandb_aliases)

    @torch.no_grad()
    def _update_pbar(self, step_outputs: Any, pbar: Any, update_interval: int = 10) -> None:
        if self.n_training_steps % update_interval == 0:
            seen = [output for output in step_outputs.values() if output is not None]
            if len(seen) == 1:
                losses = torch.stack(list(seen[0].losses.values())).tolist()
                named = zip(seen[0].losses, losses, strict=True)
                said = " | ".join(f"{name}: {loss:.5f}" for name, loss in named)
            else:
                said = f"{len(seen)} layers"
            pbar.set_description(f"{self.n_training_steps}| {said}")
            pbar.update(update_interval * self.cfg.train_batch_size_samples)
