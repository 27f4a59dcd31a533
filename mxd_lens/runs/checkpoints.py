"""Checkpoints of a training run: only whole ones are there, and only the run's own are touched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from mxd_lens.files import check_same, discard, read_json, remove_unfinished


def newest_checkpoint(folder: Path, settings: dict[str, Any]) -> Path | None:
    """That of the run, if it has any; see `own_checkpoints`."""
    own = own_checkpoints(folder, settings)
    return max(own, key=lambda path: int(path.name), default=None)


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
