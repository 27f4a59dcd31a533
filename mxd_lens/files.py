"""What is written to disk: whole or not there, by one process at a time, never over another's."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from mxd_lens.fields import sentence

LOCK = ".mxd-lens.lock"
_UNFINISHED = re.compile(r"\..+\.\d+\.mxd-lens-unfinished")


def read_json(path: Path, kind: Any) -> Any:
    """What a file of ours says; None if there is none, ValueError if that is not of this kind."""
    if not path.exists():
        return None
    mend = "restore it, or delete it to have it made anew"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {mend}") from error
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        said = sentence(error.errors(include_input=False)[:1])
        raise ValueError(f"{path} is not what mxd-lens writes there ({said}): {mend}") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, see `whole`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, see `whole`; half of a surrogate pair becomes a question mark."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside this one, for a file or a folder, that takes its place in the end.

    Whatever stops the block, a kill included, leaves at `path` what was there before. What a
    kill leaves of the temporary one, `remove_unfinished` removes.

    Raises:
        OSError: it cannot be written, because the disk is full for one; says which file.
    """
    unfinished = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors, disk full
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if not isinstance(error, OSError) and shutil.disk_usage(path.parent).free < 1 << 20:
            reason = os.strerror(errno.ENOSPC)  # of which torch says only that it was interrupted
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        _remove(unfinished)


def check_new(folder: Path) -> None:
    """Raise ValueError unless a folder is empty, or not there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already: choose another folder")


def discard(folder: Path) -> None:
    """Remove a folder; a kill leaves nothing of it under its name."""
    doomed = _beside(folder)
    folder.replace(doomed)
    _remove(doomed)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of `whole` and `discard` here; it is `locked`."""
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            _remove(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.mxd-lens-unfinished")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Busy(ValueError):
    """Another process is at work in a folder."""


@contextmanager
def locked(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Work in a folder as the only process. A process may lock what it has locked already.

    Raises:
        ValueError: the path is that of a file, or another process is at work there, unless there
            is something to say while ``waiting`` for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder} is a file: choose another folder") from error
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if waiting is None:
            raise Busy(
                f"another mxd-lens process is at work in {folder}: wait until it is done, "
                "or choose another folder"
            ) from error
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def claim(
    folder: Path,
    marker: str,
    settings: dict[str, Any],
    writes: Sequence[str],
    *,
    write: bool = True,
) -> None:
    """Make a folder that of a run with these settings, or find that it is; it is `locked`.

    Args:
        marker: the file in it that holds the settings, and by which it is known.
        writes: what the run writes there.
        write: False: find that it is, or may become so.

    Raises:
        ValueError: it is that of other settings, or holds something that would be overwritten.
    """
    path = folder / marker
    if path.exists():
        check_same(folder, read_json(path, dict[str, Any]), settings)
        remove_unfinished(folder)
        return
    for name in writes:
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{folder} holds something else, with {name} in it: choose another folder"
            )
    if write:
        write_json(path, settings)
        remove_unfinished(folder)


def check_same(what: object, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting asked for differs, or is not known of what was made."""
    different = [name for name in asked if name not in made or made[name] != asked[name]]
    if different:
        theirs, ours = (
            ", ".join(f"{name}={settings.get(name)!r}" for name in different)
            for settings in (made, asked)
        )
        raise ValueError(
            f"{what} was made with {theirs}, and this asks for {ours}: ask for the same, "
            "or move it away"
        )
