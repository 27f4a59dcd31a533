"""Checkpoints of a training run: only whole ones are there, and only the run's own are touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.files import check_same, discard, read_json, remove_unfinished, whole, write_json


class CheckpointedTrainer(SAETrainer[Any, Any]):
    """SAELens' trainer, which keeps the newest of its checkpoints and can start from it.

    They hold the run's settings, by which they are known.
    """

    def __init__(
        self, cfg: Any, sae: Any, data_provider: Iterator[Tensor], settings: dict[str, Any]
    ):
        super().__init__(cfg, sae, data_provider)
        self.folder = Path(cfg.checkpoint_path)
        self.settings = settings

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Save a checkpoint under its name once it is whole, and drop the older ones; OSError if it
        cannot be written."""
        path = self.folder / checkpoint_name
        if path not in own_checkpoints(self.folder, self.settings):  # else of this very step
            with whole(path) as unfinished:
                super().save_checkpoint(unfinished.name, unfinished.parent, wandb_aliases)
                write_json(unfinished / RUNNER_CFG_FILENAME, self.settings)
        drop_checkpoints(self.folder, self.settings, keep=path)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one, passing the batches it has seen by;
        ValueError if it cannot be read."""
        checkpoints = own_checkpoints(self.folder, self.settings)
        if not checkpoints:
            return
        checkpoint = max(checkpoints, key=lambda path: int(path.name))
        try:
            self.load_trainer_state(checkpoint)
            self.sae.load_weights_from_checkpoint(checkpoint)
        except Exception as error:
            raise ValueError(
                f"the checkpoint {checkpoint} cannot be read, it is truncated or not of this run "
                f"({error}): delete it to start over"
            ) from error
        # SAETrainer takes its periodic checkpoints before it counts the step they belong to.
        self.n_training_steps = self.n_training_samples // self.cfg.train_batch_size_samples
        done = self.n_training_samples
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n > done]
        for _ in tqdm(range(self.n_training_steps), desc="Replaying the batches already seen"):
            next(self.data_provider)


def own_checkpoints(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The run's checkpoints in a folder; ValueError if that is a symbolic link, or has some of
    another run. What else is there is left alone."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link, which is not followed: remove it")
    own = []
    for path in folder.glob("*"):
        if path.name.isdigit() and path.is_dir() and not path.is_symlink():
            marker = read_json(path / RUNNER_CFG_FILENAME, dict[str, Any]) or {}
            if settings.keys() <= marker.keys():
                check_same(path, marker, settings)
                own.append(path)
    return own


def drop_checkpoints(folder: Path, settings: dict[str, Any], keep: Path | None = None) -> None:
    """Remove the run's checkpoints but one, and then the folder if it is empty."""
    for path in own_checkpoints(folder, settings):
        if path != keep:
            discard(path)
    remove_unfinished(folder)
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()
